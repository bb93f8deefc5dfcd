"""load_model: weights that are sparse already, into a model whose linear layers are dense."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixgrain.formats.errors import FileFormatError, LayoutError
from mixgrain.formats.files import load
from mixgrain.formats.sparse import SparseTensor

from .layout_module import LayoutModule
from .linear_sites import Site, close_fast_paths, find_sites, put
from .sparse_linear import SparseLinear

#: The files of a folder that `mixgrain convert` writes: sparse/NAME.safetensors with NAME's odd
#: characters as %XX, each for ``mixgrain.load``, and everything else.
SPARSE, DENSE, ENDING = "sparse", "dense.safetensors", ".safetensors"
_OP = "load_model"
_STATE = ".positions._extra_state"
Source = Mapping[str, Any] | str | os.PathLike[str]


def load_model(model: nn.Module, source: Source) -> None:
    """Load the weights of a converted model into one that is dense, in place.

    Each linear layer that is sparse in the source becomes a SparseLinear with the positions found
    there; then everything is loaded as by ``load_state_dict(strict=True)``. The dtypes and devices
    stay those of the model. Layers that are sparse already must have the same positions.

    Args:
        model: as it was before ``sparsify_model``: the same names, the same linear layers.
        source: the state dict of a converted model; a safetensors file with one, also as
            ``safetensors.torch.save_model`` writes it; or a folder that `mixgrain convert` wrote.

    Raises:
        LayoutError: a sparse weight that is no linear layer's in this model; names, sizes or
            positions that do not fit, found by ``load_state_dict`` when layers were swapped.
        FileFormatError: a file that is not what it should be.
        OSError: a file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise LayoutError(f"{_OP}: given a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(source, Mapping):
        state = dict(source)
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        state = _of_folder(path, model) if path.is_dir() else _of_file(path)
    else:
        raise LayoutError(
            f"{_OP}: source is a {type(source).__name__}; expected a state dict, a safetensors "
            "file, or a folder of mixgrain convert"
        )
    _make_room(model, [key.removesuffix(_STATE) for key in state if _is_layer(key, state)])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise LayoutError(
            f"{_OP}: the source does not fit; expected the weights of such a "
            f"{type(model).__name__} ({words[:400]}{'…' * (len(words) > 400)})"
        ) from error


def _is_layer(key: object, state: Mapping[str, Any]) -> bool:
    """Whether a key belongs to a SparseLinear's positions; other modules have such buffers, too."""
    if not isinstance(key, str) or not key.endswith(_STATE):
        return False
    return f"{key.removesuffix(_STATE)}.values" in state


def _make_room(model: nn.Module, names: list[str]) -> None:
    """Swap dense layers of these names for empty sparse ones, sharing what they share."""
    sites = {name: site for site in find_sites(model) for name in site.names}
    chosen: dict[int, Site] = {}
    for name in names:
        site = sites.get(name)
        if site is None or (site.obstacle and not site.sparse):
            found = "there is no such layer" if site is None else f"it {site.obstacle}"
            raise LayoutError(
                f"{_OP}: the source has a sparse weight for {name!r}, and in this "
                f"{type(model).__name__} {found}; expected a torch.nn.Linear of that name: give "
                "the model that was converted"
            )
        if not site.sparse:
            chosen[id(site.layer)] = site
    for site in chosen.values():
        other = _tied(site, set(chosen))
        if other is not None:
            raise LayoutError(
                f"{_OP}: the source has a sparse weight for {site.name!r}, which shares its weight "
                f"with {other!r} in this {type(model).__name__}; expected them to be apart, as in "
                "the model that was converted: give one a copy of the weight first"
            )
    by_weight: dict[int, SparseLinear] = {}
    for site in chosen.values():
        dense = site.layer
        made = SparseLinear(
            dense.in_features, dense.out_features, bias=dense.bias is not None,
            device=dense.weight.device, dtype=dense.weight.dtype,
        ).train(dense.training)  # fmt: skip
        made.values.requires_grad_(site.trained("weight"))
        if isinstance(bias := dense._parameters.get("bias"), nn.Parameter):
            made.bias = bias
        elif made.bias is not None:
            made.bias.requires_grad_(site.trained("bias"))
        first = by_weight.setdefault(site.weight_id, made)
        if first is not made:
            made.values, made.positions = first.values, first.positions
        put(model, site, made)
    close_fast_paths(model)


def _tied(site: Site, swapped: set[int]) -> str | None:
    """The name of something that uses a layer's weight and is not among those swapped, by id."""
    return next((name for name, owner in site.shared_with if id(owner) not in swapped), None)


def _of_file(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; those that save_model left out as copies are back."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(
            f"{path}: no intact safetensors file ({error}); for another format read the state dict "
            "and give that"
        ) from None
    if metadata.get("format") == "mixgrain":
        raise FileFormatError(
            f"{path}: one sparse tensor; expected the state dict of a model; read it with "
            "mixgrain.load"
        )
    copies = {name: kept for name, kept in metadata.items() if kept in state and name not in state}
    return state | {name: state[kept] for name, kept in copies.items()}


def _of_folder(path: Path, model: nn.Module) -> dict[str, Any]:
    """The state dict that a folder of mixgrain convert stands for."""
    files = sorted((path / SPARSE).glob(f"*{ENDING}"))
    if not files:
        raise FileFormatError(
            f"{path}: no {SPARSE}/*{ENDING} in this folder; expected what mixgrain convert wrote"
        )
    state = _of_file(path / DENSE) if (path / DENSE).exists() else {}
    held = {unquote(file.name.removesuffix(ENDING)): file for file in files}
    # Sparse layers for what can be one here; what an embedding shares, say, stays dense.
    sites = [
        site for site in find_sites(model)
        if any(f"{name}.weight" in held for name in site.names)
        and (site.sparse or not site.obstacle)
    ]  # fmt: skip
    there = {id(site.layer) for site in sites}
    linear = {name for site in sites if _tied(site, there) is None for name in site.names}
    for name, file in held.items():
        layer = name.removesuffix(".weight")
        state |= _layer(layer, load(file)) if name != layer and layer in linear else {
            name: load(file).to_dense()
        }  # fmt: skip
    return state


def _layer(name: str, s: SparseTensor) -> dict[str, Tensor]:
    """A sparse weight as the part of a state dict that a SparseLinear has."""
    positions = LayoutModule(s.layout).state_dict(prefix=f"{name}.positions.")
    return {f"{name}.values": s.values, **positions}
