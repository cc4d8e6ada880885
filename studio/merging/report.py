"""What a merged adapter is made of, what writing it loses, and how large its file becomes."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.merge import Merged, MergedLayer

ALL = "all"
SHARES = (0.95, 0.99)
"""Shares of the energy for which a rank is suggested."""


@dataclass(frozen=True)
class MergeRow:
    """A component or block of the merged adapter.

    Attributes:
        name: "unet.down_blocks.0", "text_encoder", "all".
        layers: Parameters that it changes.
        ranks_in: Ranks of the adapters' changes in most of its layers, "8+16"; "-" for one without.
        rank_out: Rank in most of its layers, "-" where most have none.
        error: ``||made - written|| / ||made||`` in the Frobenius norm; 0 is exact.
        bytes: What its tensors take in the file.
        curve: The error at the ranks 0, 1, 2, ... as far as it falls; empty where singular values were not
            looked for. Biases and norms are kept at every rank.
    """

    name: str
    layers: int
    ranks_in: str
    rank_out: str
    error: float
    bytes: int
    curve: tuple[float, ...]

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept."""
        return 1 - self.error**2

    def rank_for(self, share: float) -> int | None:
        """Return the smallest rank at which all layers together keep that share of the energy."""
        return next((rank for rank, error in enumerate(self.curve) if 1 - error**2 >= share), None)


@dataclass(frozen=True)
class MergeReport:
    """What merging made.

    Attributes:
        rows: A row for each block, that of all last.
        errors: Relative error of each parameter.
    """

    rows: tuple[MergeRow, ...]
    errors: Mapping[str, float]

    @property
    def whole(self) -> MergeRow:
        """The row of all layers."""
        return self.rows[-1]

    def lines(self) -> list[str]:
        """Return the table and the suggested ranks as lines of text."""
        name, ranks = (
            max(len(title), *(len(getattr(row, field)) for row in self.rows))
            for title, field in (("block", "name"), ("rank in", "ranks_in"))
        )
        titles = f"{'block':<{name}}  layers  {'rank in':>{ranks}}  rank out    error   energy        MB"
        rows = [
            f"{row.name:<{name}}  {row.layers:>6}  {row.ranks_in:>{ranks}}  {row.rank_out:>8}  "
            f"{row.error:>7.4f}  {row.energy:>7.2%}  {row.bytes / 1e6:>8.2f}"
            for row in self.rows
        ]
        wanted = [(share, rank) for share in SHARES if (rank := self.whole.rank_for(share)) is not None]
        said = ", ".join(f"{rank} keeps {share:.0%}" for share, rank in wanted)
        worst = max(self.errors, key=lambda key: self.errors[key])
        notes = [f"worst layer: {worst}, error {self.errors[worst]:.4f}"] if self.errors[worst] else []
        return [titles, *rows, *notes, *([f"rank in all layers: {said} of the energy"] if said else [])]


def report_of(merged: Merged, *, dtype: torch.dtype, format: str) -> MergeReport:
    """Return the report of a merge.

    Args:
        merged: What it made.
        dtype: Number type of the file.
        format: Of the file: kohya's holds sparse changes in full.
    """
    blocks: dict[str, list[MergedLayer]] = {}
    for name, layer in merged.layers.items():
        blocks.setdefault(block_of(name), []).append(layer)
    groups = [*blocks.items(), (ALL, list(merged.layers.values()))]
    rows = tuple(_row(name, layers, dtype, format) for name, layers in groups)
    return MergeReport(rows, {name: layer.error / layer.size for name, layer in merged.layers.items()})


def block_of(parameter: str) -> str:
    """Return the block of the UNet, or the component, that a parameter lies in."""
    component, *path = parameter.split(".")
    if path[0] in ("down_blocks", "up_blocks"):
        return ".".join((component, *path[:2]))
    return f"{component}.mid_block" if path[0] == "mid_block" else component


def _row(name: str, layers: Sequence[MergedLayer], dtype: torch.dtype, format: str) -> MergeRow:
    whole = math.fsum(layer.size**2 for layer in layers)
    missed = math.fsum(layer.error**2 for layer in layers)
    return MergeRow(
        name=name,
        layers=len(layers),
        ranks_in=_usual("+".join(map(_rank, layer.ranks)) for layer in layers),
        rank_out=_usual(_rank(layer.rank) for layer in layers),
        error=math.sqrt(missed / whole),
        bytes=sum(_bytes(layer, dtype, format) for layer in layers),
        curve=_curve(layers, whole),
    )


def _curve(layers: Sequence[MergedLayer], whole: float) -> tuple[float, ...]:
    weights = [layer for layer in layers if len(layer.change.shape) > 1]
    found = [layer.values for layer in weights if layer.values is not None]
    if len(found) < len(weights) or not found:
        return ()
    energy = torch.zeros(max(len(values) for values in found), dtype=torch.float64)
    for values in found:
        energy[: len(values)] += values.square()
    # What lies behind each rank, summed from the small end: nothing is subtracted.
    behind = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]) / whole
    errors = behind.clamp(0, 1).sqrt().tolist()
    # Below this, rounding.
    end = next(rank for rank, error in enumerate(errors) if error < 1e-6 or rank == len(errors) - 1)
    return tuple(errors[: end + 1])


def _bytes(layer: MergedLayer, dtype: torch.dtype, format: str) -> int:
    """Return what a change takes in the file."""
    change = layer.change
    if isinstance(change, LoraChange):
        alpha = torch.float32.itemsize if format == "kohya" else 0
        return (change.down.numel() + change.up.numel()) * dtype.itemsize + alpha
    if isinstance(change, SparseChange) and format != "kohya":
        # Integers stay what they are.
        return sum(
            part.numel() * (dtype.itemsize if part.is_floating_point() else part.itemsize)
            for part in change.to_parts(alpha=1.0).values()
        )
    return math.prod(change.shape) * dtype.itemsize


def _rank(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


def _usual(texts: Iterable[str]) -> str:
    """Return the text that most have, with a mark if there are others."""
    counts = Counter(texts)
    ((most, _),) = counts.most_common(1)
    return f"{most} .." if len(counts) > 1 else most
