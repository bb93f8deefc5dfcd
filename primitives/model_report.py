"""What a conversion did to a model: a line for each weight, and the sizes before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConvertedWeight:
    """One weight that became sparse; sizes in bytes.

    Attributes:
        name: the layer's or the tensor's; of a shared one its first.
        shape: of the dense weight.
        layout: kind and grain, "nm 2:4" say.
        nnz: positions kept.
        density: kept part of all positions; negative in a sum.
        before: of the dense weight.
        after: of the values and the positions.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    nnz: int
    density: float
    before: int
    after: int


@dataclass(frozen=True)
class ModelReport:
    """What ``sparsify_model`` did; prints as a table.

    Attributes:
        converted: the layers that are sparse now. Layers that shared a weight still do; it is
            counted once, under the first name.
        left: every other linear layer by name, and why it was left.
        before: bytes of all parameters and buffers of the model before; shared ones count once.
        after: the same afterwards.
    """

    converted: tuple[ConvertedWeight, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    before: int = 0
    after: int = 0

    @property
    def density(self) -> float:
        """Kept part of all positions of the converted weights; NaN without any."""
        positions = sum(line.shape[0] * line.shape[1] for line in self.converted)
        return sum(line.nnz for line in self.converted) / positions if positions else float("nan")

    def __str__(self) -> str:
        """The table, what was left and why, and the sizes of the model."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines = [table(self.converted, "layer")]
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left as it was: {', '.join(names[:3])}{more}: {reason}")
        ratio = f", {self.after / self.before:.2f} of it" if self.before else ""
        lines.append(f"the whole model: {self.before:,} bytes before, {self.after:,} after{ratio}")
        return "\n".join(lines)


def table(lines: tuple[ConvertedWeight, ...] | list[ConvertedWeight], what: str) -> str:
    """The lines under their heads, columns aligned, with a sum at the end if there are several.

    Args:
        lines: one a weight.
        what: head of the names, "layer" or "tensor".
    """
    heads = (what, "shape", "layout", "nnz", "density", "before", "after", "ratio")
    total = ConvertedWeight(
        "in all", (), "", sum(line.nnz for line in lines), -1.0,
        sum(line.before for line in lines), sum(line.after for line in lines),
    )  # fmt: skip
    rows = [heads]
    for line in [*lines, total] if len(lines) > 1 else lines:
        rows.append(
            (
                line.name, "×".join(map(str, line.shape)), line.layout, f"{line.nnz:,}",
                f"{line.density:.2%}" if line.density >= 0 else "", f"{line.before:,}",
                f"{line.after:,}", f"{line.after / line.before:.2f}" if line.before else "",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 3
    return "\n".join(
        "  ".join(
            cell.ljust(w) if n < left else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
