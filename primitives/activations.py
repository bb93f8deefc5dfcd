"""Activations of linear layers: their names, what torch calls them, their codes in the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from mixgrain.formats.arguments import shown
from mixgrain.formats.errors import UnsupportedError


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


#: What each name means, as torch computes it.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": torch.nn.functional.gelu,  # x Φ(x), by erf
    "gelu_tanh": _gelu_tanh,
    "silu": torch.nn.functional.silu,  # x / (1 + exp(−x)), also called swish
    "relu": torch.relu,
}
#: MG_ACTIVATION of activation.cuh; 0 is none.
CODES: Final = {name: code for code, name in enumerate(ACTIVATIONS, 1)}
#: What others call them.
_ALIASES: Final = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "tanh": "gelu_tanh", "erf": "gelu", "swish": "silu", "none": "None", "identity": "None",
}  # fmt: skip


def check_activation(op: str, activation: object) -> None:
    """Raise UnsupportedError unless this is None or a name of ACTIVATIONS."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    meant = _ALIASES.get(activation.lower()) if isinstance(activation, str) else None
    known = ", ".join(map(repr, ACTIVATIONS))
    if meant is None:
        remedy = "apply others to the result, e.g. torch.tanh(linear(x, w))"
    else:
        remedy = f"give {meant if meant == 'None' else repr(meant)}"
    raise UnsupportedError(
        f"{op}: activation={shown(activation)}; expected None or one of {known}; {remedy}"
    )
