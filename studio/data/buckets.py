"""Sizes of training pictures: a square, or buckets of about the same area for other shapes.

SDXL, arXiv:2307.01952, Sec. 2.3, trains on such buckets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from studio.data.picture import Picture
from studio.errors import DataError

Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in a picture's own pixels."""


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are brought to.

    Attributes:
        sizes: Those to choose from.
        step: Sides of other sizes are multiples of it, in pixels.
        upscale: Whether pictures smaller than their bucket are enlarged; otherwise they keep their own size.
    """

    sizes: tuple[Size, ...]
    step: int
    upscale: bool = True

    @classmethod
    def square(cls, resolution: int) -> Self:
        """Return the one bucket of training on squares."""
        return cls(((resolution, resolution),), resolution)

    @classmethod
    def around(cls, resolution: int, *, step: int, smallest: int, largest: int, upscale: bool = True) -> Self:
        """Return the buckets of at most the area of a square, and the square itself.

        Args:
            resolution: Side of the square in pixels.
            step: Sides of the others are multiples of it.
            smallest: No side is shorter, in pixels.
            largest: No side is longer.
            upscale: Whether small pictures are enlarged.
        """
        found = {(resolution, resolution)}
        first, last = math.ceil(smallest / step), largest // step
        for columns in range(max(1, first), last + 1):
            rows = min(last, resolution * resolution // (columns * step) // step)
            if rows >= max(1, first):
                # Upright and lying, so that turning a picture turns its bucket.
                found |= {(columns * step, rows * step), (rows * step, columns * step)}
        return cls(tuple(sorted(found)), step, upscale)

    def fit(self, picture: Picture) -> Size:
        """Return a picture's bucket: the one whose shape is nearest to its own, as a ratio.

        Raises:
            DataError: If small pictures are not enlarged and this one is smaller than a step.
        """
        width, height = picture.size

        def distance(size: Size) -> tuple[float, int]:
            # Of equally near ones the larger.
            return abs(math.log(width / height * size[1] / size[0])), -size[0] * size[1]

        chosen = min(self.sizes, key=distance)
        if self.upscale or (width >= chosen[0] and height >= chosen[1]):
            return chosen
        own = min(width, chosen[0]) // self.step * self.step, min(height, chosen[1]) // self.step * self.step
        if not all(own):
            raise DataError(
                f"{picture.path.name} ({width} x {height} px) is smaller than the bucket step of {self.step} "
                "px and may not be enlarged. Remove it, or set bucket_upscale (--bucket-upscale)."
            )
        return own

    def assign(self, pictures: Sequence[Picture]) -> dict[Size, list[int]]:
        """Return the positions of the pictures of each bucket in use, an entry for every repeat.

        Raises:
            DataError: As for ``fit``.
        """
        members: dict[Size, list[int]] = {}
        for position, picture in enumerate(pictures):
            members.setdefault(self.fit(picture), []).extend([position] * picture.repeats)
        return dict(sorted(members.items()))


def cover_box(size: Size, target: Size, *, along: float = 0.5) -> Box:
    """Return the largest part of a picture that has a target's shape.

    Args:
        size: Width and height of the picture.
        target: Size to which the part will be brought; only its shape counts.
        along: Where it lies on the side that is cut, from 0 at the left or top to 1.
    """
    width, height = size
    if width * target[1] <= height * target[0]:
        part = width, max(1, round(width * target[1] / target[0]))
    else:
        part = max(1, round(height * target[0] / target[1])), height
    left, top = round((width - part[0]) * along), round((height - part[1]) * along)
    return left, top, left + part[0], top + part[1]
