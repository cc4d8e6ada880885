"""What a block probe measured, from single pictures to the table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from studio.block_probe.prompt_pairs import KINDS, Kind, Pair

NONE, ALL = "none", "all"
"""Rows beside the probed ones: no block, and every block, reads the other prompt."""


@dataclass(frozen=True)
class Look:
    """What was measured of one pair's picture.

    Attributes:
        along: Its difference from the own prompt's picture, projected on the difference of the picture drawn
            with all blocks reading the other prompt; not divided by anything.
        change: Sum of squares of the change of the UNet's predictions.
        seen: Subject or style, whichever the pair differs in, by the evaluator; None without.
        lean: CLIP's cosine with the other prompt less that with the own one; None without.
    """

    along: float
    change: float
    seen: str | None = None
    lean: float | None = None


@dataclass(frozen=True)
class Effect:
    """What it did to the pictures of one kind of pairs that some blocks read the other prompt.

    Attributes:
        shown: Share of pictures in which the evaluator finds the other subject (or style).
        kept: Share in which it finds the own one.
        clip: Mean change of CLIP's leaning to the other prompt against the own one.
        picture: How far pictures went from the own prompt's (0) to that of all blocks reading the other (1).
        prediction: Change of the UNet's prediction at the same latents, root mean square, as a share of the
            change with all blocks reading the other prompt.
    """

    shown: float | None
    kept: float | None
    clip: float | None
    picture: float
    prediction: float


@dataclass(frozen=True)
class ProbeRow:
    """What some blocks did that read the other prompt together.

    Attributes:
        name: A block's name, a group as it was given, "none" or "all".
        effects: By kind of pairs.
        seconds: Time of drawing, all pairs together.
    """

    name: str
    effects: Mapping[Kind, Effect]
    seconds: float


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found and where it is written.

    Attributes:
        rows: "none" and "all", then what was probed, blocks in the order of the UNet.
        table: JSON with rows, pairs and circumstances.
        grid: The first pairs' pictures, a row for each of the table.
        bars: The measures as bars.
    """

    rows: tuple[ProbeRow, ...]
    table: Path
    grid: Path
    bars: Path

    def lines(self) -> list[str]:
        """Return the table as lines of text."""
        names = measures(self.rows)
        width = max(len(row.name) for row in self.rows)
        titles = "".join(f"{name:>11}" for name in names)
        lines = [
            f"{'':<{width}}  {'content':<{len(titles)}}  style",
            f"{'block':<{width}}{titles}  {titles}  seconds",
        ]
        for row in self.rows:
            cells = [
                "".join(f"{getattr(row.effects[kind], name):>11.3f}" for name in names) for kind in KINDS
            ]
            lines.append(f"{row.name:<{width}}{'  '.join(cells)}  {row.seconds:>7.1f}")
        return lines


def measures(rows: Sequence[ProbeRow]) -> list[str]:
    """Return the names of the measures that were taken."""
    return [name for name, value in asdict(rows[0].effects["content"]).items() if value is not None]


def effects(looks: Mapping[str, Sequence[Look]], pairs: Sequence[Pair], name: str) -> dict[Kind, Effect]:
    """Return what the row ``name`` did, by kind of pairs.

    Args:
        looks: By row, one per pair, with "none" and "all" among them.
        pairs: All of them.
        name: The row.
    """
    found: dict[Kind, Effect] = {}
    for kind in KINDS:
        places = [place for place, pair in enumerate(pairs) if pair.kind == kind]
        own, other, here = ([looks[row][place] for place in places] for row in (NONE, ALL, name))
        leans = [
            look.lean - before.lean
            for look, before in zip(here, own, strict=True)
            if look.lean is not None and before.lean is not None
        ]
        found[kind] = Effect(
            shown=_share([look.seen for look in here], [pairs[place].other.named(kind) for place in places]),
            kept=_share([look.seen for look in here], [pairs[place].own.named(kind) for place in places]),
            clip=sum(leans) / len(leans) if leans else None,
            # Sums before the division: pairs whose pictures hardly differ must not outweigh the others.
            picture=_ratio(sum(look.along for look in here), sum(look.along for look in other)),
            prediction=_ratio(sum(look.change for look in here), sum(look.change for look in other)) ** 0.5,
        )
    return found


def _share(seen: Sequence[str | None], wanted: Sequence[str]) -> float | None:
    if None in seen:
        return None
    return sum(found == name for found, name in zip(seen, wanted, strict=True)) / len(seen)


def _ratio(part: float, whole: float) -> float:
    """Return part / whole; 0 where there is nothing to divide: a base that does not read its prompt."""
    return part / whole if whole else 0.0
