"""sparsify_model: the linear layers of a whole model, by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from mixgrain.formats.errors import LayoutError, MixgrainError, UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify

from .linear_sites import Site, close_fast_paths, find_sites, put
from .model_report import ConvertedWeight, ModelReport
from .rule import Choice, Choosable, check_used, first_match, read_choice, read_globs
from .sparse_linear import SparseLinear

Rule: TypeAlias = str | Layout | Mapping[str, Choosable] | Callable[[str, nn.Linear], Choosable]
_OP = "sparsify_model"


def sparsify_model(model: nn.Module, rule: Rule, **options: Any) -> ModelReport:
    """Swap the linear layers that a rule names for SparseLinear, in place.

    A choice for a layer is a kind of layout ("tile", "nm", "block", "row", "panel", "mixed"),
    "n:m" ("2:4", "1:2"), a dict of ``sparsify``'s options with "kind" or "layout" among them, a
    Layout to sample at, a SparseTensor that is the new weight, or None or "dense" to leave it. As
    in ``sparsify``, nothing may be lost without prune=True; but −0, which a mask multiplied into a
    weight leaves behind, counts as 0.

    The rule is one of

    - a kind with ``options`` beside it: the choice for every ``torch.nn.Linear``;
    - a mapping of globs over layers' names to choices: the first that matches decides, layers that
      none matches stay dense, and a glob that matches no layer raises;
    - a callable (name, layer) -> choice, called once for each layer.

    A layer under several names, and layers that share one weight, still share it afterwards. A
    weight under torch.nn.utils.parametrize, prune or weight_norm is converted as it is in effect,
    and the parametrization goes. Layers that cannot be swapped are left by a rule that is for all,
    with the reason in the report, and raise where a mapping or callable chose them: subclasses of
    Linear, whose owner (MultiheadAttention, say) may read the weight itself; layers with hooks; a
    weight that something else uses too, an embedding say. The fast path of TransformerEncoderLayer
    (inference), which reads its layers' weights, is switched off where they are swapped.
    Activations stay where the model has them: what a linear layer is followed by is not for its
    weight to know. A layer's ``activation`` fuses one by hand.

    Biases stay the parameters they were, values are new ones: make the optimiser afterwards. Either
    all layers are swapped or, when an error is raised, none; until then the device holds both.

    Args:
        model: the model; on its device, in its dtype.
        rule: which layers become what.
        options: of ``sparsify``, beside a rule that is a kind.

    Returns:
        What was swapped and what was not, which prints as a table.

    Raises:
        LayoutError: a rule that cannot be, or names what cannot be swapped; a weight that holds
            more than its layout can, without prune=True.
        UnsupportedError: a model without linear layers, or that is one.

    Source: Chen et al., E.T.: Re-Thinking Self-Attention for Transformer Models on GPUs, SC 2021,
    whose attention-aware pruning gives tiles, rows and columns to different layers.
    """
    sites = _sites(model)
    before = _bytes(model)
    left: dict[str, str] = {}
    chosen: list[tuple[Site, Mapping[str, Any] | SparseTensor]] = []
    for site, choice in _choices(sites, rule, options):
        reason = "the rule leaves it" if choice is None else site.obstacle
        if site.sparse:
            reason = "already sparse"
        if choice is not None and site.obstacle and not site.sparse and not _for_all(rule):
            raise LayoutError(
                f"{_OP}: {site.name!r} {site.obstacle}; leave it out of the rule, "
                f"e.g. {{{site.name!r}: None, …}} first, or {site.remedy}"
            )
        if reason is not None:
            left[site.name] = reason
        elif choice is not None:
            chosen.append((site, choice))
    chosen = _share(chosen, left, _for_all(rule))
    made = _converted(chosen)
    lines = []
    counted: set[int] = set()
    for (site, _), layer in zip(chosen, made, strict=True):
        put(model, site, layer)
        if id(layer.values) not in counted:
            counted.add(id(layer.values))
            lines.append(_line(site, layer))
    close_fast_paths(model)
    return ModelReport(tuple(lines), left, before, _bytes(model))


def _sites(model: object) -> list[Site]:
    if not isinstance(model, nn.Module):
        raise LayoutError(f"{_OP}: given a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, nn.Linear):
        raise UnsupportedError(
            f"{_OP}: the model is itself a {type(model).__name__}, which nothing holds; use "
            "SparseLinear.from_linear, or put it into a torch.nn.Sequential"
        )
    sites = find_sites(model)
    if not sites:
        raise UnsupportedError(
            f"{_OP}: {type(model).__name__} holds no torch.nn.Linear; expected a model of linear "
            "layers; a weight alone goes through sparsify and linear"
        )
    return sites


def _for_all(rule: object) -> bool:
    return isinstance(rule, str | Layout)


def _choices(
    sites: list[Site], rule: object, options: Mapping[str, Any]
) -> list[tuple[Site, Choice]]:
    """What the rule says of each layer."""
    if _for_all(rule):
        choice = read_choice(_OP, rule, options)
        return [(site, choice) for site in sites]
    if options:
        raise LayoutError(
            f"{_OP}: options {options!r:.80} with a rule of its own; they go beside a kind, as in "
            "sparsify_model(model, 'tile', prune=True, density=0.25), or into the rule: "
            "{'*.up': {'kind': 'tile', …}}"
        )
    if isinstance(rule, Mapping):
        globs = read_globs(_OP, rule)
        check_used(_OP, globs, [name for site in sites for name in site.names], "linear layer")
        return [(site, _by_name(globs, site)) for site in sites]
    if not callable(rule) or isinstance(rule, nn.Module):
        raise LayoutError(
            f"{_OP}: the rule is a {type(rule).__name__}; expected a kind of layout, a dict of "
            "layers' names, or a function (name, layer) -> choice"
        )
    return [
        (site, None if site.sparse else
         read_choice(f"{_OP}: {site.name!r}", rule(site.name, site.layer)))
        for site in sites
    ]  # fmt: skip


def _by_name(globs: Mapping[str, Choice], site: Site) -> Choice:
    """The choice of the first glob that matches one of a layer's names; they must agree."""
    found = {name: first_match(globs, name) for name in site.names}
    choices = [None if glob is None else globs[glob] for glob in found.values()]
    if any(not _same(choice, choices[0]) for choice in choices):
        raise LayoutError(
            f"{_OP}: one layer has the names {', '.join(site.names)} and the rule wants different "
            "things of them; name it once, or give all its names the same choice"
        )
    return choices[0]


def _same(a: object, b: object) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    # Layouts and SparseTensors are equal when they are one.
    return a is b or (isinstance(a, str | int | float) and a == b)


def _share(
    chosen: list[tuple[Site, Mapping[str, Any] | SparseTensor]], left: dict[str, str], for_all: bool
) -> list[tuple[Site, Mapping[str, Any] | SparseTensor]]:
    """Drops, or refuses, layers whose weight is used by something that does not become the same."""
    kept = chosen
    while True:
        choice_of = {id(site.layer): choice for site, choice in kept}
        apart = {}
        for site, choice in kept:
            for name, owner in site.shared_with:
                if id(owner) not in choice_of or not _same(choice_of[id(owner)], choice):
                    apart[site.name] = f"shares its weight with {name!r}, which stays as it is"
        if not apart:
            return kept
        if not for_all:
            name, reason = next(iter(apart.items()))
            raise LayoutError(
                f"{_OP}: {name!r} {reason}; leave it out of the rule, give both the same choice, "
                "or untie them first by giving one a copy of the weight"
            )
        left |= apart
        kept = [(site, choice) for site, choice in kept if site.name not in apart]


def _converted(chosen: list[tuple[Site, Mapping[str, Any] | SparseTensor]]) -> list[SparseLinear]:
    """The new layers, sharing what the old ones share."""
    by_weight: dict[int, SparseLinear] = {}
    made = []
    for site, choice in chosen:
        try:
            layer = _one(site, choice)
        except (MixgrainError, TypeError) as error:
            words = str(error)
            raise type(error)(f"{_OP}: layer {site.name!r}: {words}") from None
        first = by_weight.setdefault(site.weight_id, layer)
        if first is not layer:
            layer.values, layer.positions = first.values, first.positions
        made.append(layer)
    return made


def _one(site: Site, choice: Mapping[str, Any] | SparseTensor) -> SparseLinear:
    linear = site.layer
    site.refresh()
    weight = linear.weight.detach()
    if isinstance(choice, SparseTensor):
        if tuple(choice.shape) != tuple(weight.shape) or choice.dtype != weight.dtype:
            raise LayoutError(
                f"the rule gives {choice!r}; expected a weight of {tuple(weight.shape)}, "
                f"{weight.dtype}"
            )
        sparse = choice.to(weight.device)
    else:
        # Adding 0 turns −0, which masks multiplied into a weight leave behind, into +0.
        sparse = sparsify(weight + 0.0, **choice)
    made = SparseLinear.from_sparse(sparse, linear.bias).train(linear.training)
    made.values.requires_grad_(site.trained("weight"))
    if isinstance(bias := linear._parameters.get("bias"), nn.Parameter):
        made.bias = bias  # itself: it may be shared, and an optimiser may hold it
    elif made.bias is not None:
        made.bias.requires_grad_(site.trained("bias"))
    return made


def _line(site: Site, layer: SparseLinear) -> ConvertedWeight:
    weight = layer.weight
    layout = weight.layout
    detail = f" {layout.n}:{layout.m}" if isinstance(layout, NMLayout) else ""
    shape = (layer.out_features, layer.in_features)
    before = shape[0] * shape[1] * layer.values.element_size()
    after = layer.values.nbytes + sum(t.nbytes for t in layout.tensors())
    return ConvertedWeight(
        site.name, shape, layout.kind + detail, weight.nnz, weight.density, before, after
    )


def _bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum({id(t): t.nbytes for t in tensors}.values())
