"""Where a model has linear layers, what stands in the way of swapping one, and the swap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .sparse_linear import SparseLinear

# Hooks that compute the weight from other parameters; what they compute is converted. By name:
# importing torch.nn.utils.prune would take longer than all of mixgrain.
_COMPUTING = {
    ("torch.nn.utils.prune", "BasePruningMethod"),
    ("torch.nn.utils.weight_norm", "WeightNorm"),
}
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass
class Site:
    """A linear layer of a model.

    Attributes:
        layer: the layer itself, a torch.nn.Linear or a SparseLinear.
        names: all names it has in the model, its first one first.
        obstacle: why it cannot be swapped, as the end of a sentence; None when it can.
        remedy: what a user may do about that.
        shared_with: (name, layer) of everything else that uses its weight.
    """

    layer: nn.Linear
    names: list[str]
    obstacle: str | None = None
    remedy: str = ""
    shared_with: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def sparse(self) -> bool:
        """Whether it is a SparseLinear already."""
        return isinstance(self.layer, SparseLinear)

    @property
    def weight_id(self) -> int:
        """The same number for layers that share a weight."""
        weight = self.layer._parameters.get("weight")
        return id(self.layer) if weight is None else id(weight)

    def trained(self, what: str) -> bool:
        """Whether what its "weight" or "bias" is made of gets gradients."""
        return any(p.requires_grad for p in _made_of(self.layer, what))

    def refresh(self) -> None:
        """Bring a weight that a hook computes up to date, as the next call would."""
        for hook in self.layer._forward_pre_hooks.values():
            if _computes(hook):
                hook(self.layer, ())


def find_sites(model: nn.Module) -> list[Site]:
    """The linear layers of a model, dense and sparse, in its order."""
    sites: dict[int, Site] = {}
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | SparseLinear):
            site = sites.setdefault(id(module), Site(module, []))  # type: ignore[arg-type]
            site.names.append(name)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    for site in sites.values():
        if site.sparse:
            continue
        _look(site)
        own = {id(module) for module in site.layer.modules()}
        site.shared_with = [
            user
            for parameter in _made_of(site.layer, "weight")
            for user in users[id(parameter)]
            if id(user[1]) not in own
        ]
    return list(sites.values())


def _made_of(layer: nn.Module, what: str) -> Iterator[nn.Parameter]:
    """The parameters that a layer's weight or bias is made of: one, or those that compute it."""
    for name, parameter in layer.named_parameters():
        if name.startswith((what, f"parametrizations.{what}")):
            yield parameter


def _computes(hook: object) -> bool:
    """Whether a hook is one of torch's that compute a weight."""
    return any((cls.__module__, cls.__qualname__) in _COMPUTING for cls in type(hook).__mro__)


def _look(site: Site) -> None:
    """Find what stands in the way of a swap."""
    layer = site.layer
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    hooks = [hook for held in _HOOKS for hook in getattr(layer, held).values()]
    if kind is not nn.Linear:
        site.obstacle = f"is a {kind.__name__}, whose owner may read its weight itself"
        site.remedy = "convert its owner (SparseAttention.from_multihead for attention)"
    elif not all(map(_computes, hooks)):
        site.obstacle = "has hooks, which the swap would drop"
        site.remedy = "remove them first, or add them to the new layer afterwards"
    elif type(layer.weight) not in (Tensor, nn.Parameter):
        site.obstacle = f"has a weight that is a {type(layer.weight).__name__}"
        site.remedy = "make it an ordinary tensor first"


def put(model: nn.Module, site: Site, made: SparseLinear) -> None:
    """Put a layer where another one is, under all its names."""
    for name in site.names:
        holder, _, leaf = name.rpartition(".")
        owner = model.get_submodule(holder)
        owner.register_module(leaf, made)


def close_fast_paths(model: nn.Module) -> None:
    """Keep torch's encoder from reading the weights of swapped layers past those layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if any(isinstance(layer, SparseLinear) for layer in (module.linear1, module.linear2)):
                module.activation_relu_or_gelu = 0  # one of the conditions of its fast path
        elif isinstance(module, nn.TransformerEncoder) and any(
            isinstance(layer, SparseLinear) for layer in module.modules()
        ):
            module.use_nested_tensor = False  # the same of the encoder's own
