"""What a user may ask of drawing pictures of many prompts."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from studio.specs.base import complete
from studio.specs.composition import CompositionSpec
from studio.specs.drawing import Rendering

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_MOST = 100_000


def read_seeds(given: Any) -> Any:
    """Return the seeds that numbers and texts such as ``1-16,20`` stand for, in their order.

    Raises:
        PydanticCustomError: If a text is no list of numbers and ranges, or a seed stands twice.
    """
    if isinstance(given, (str, int)):
        given = (given,)
    if not isinstance(given, Iterable):
        return given
    seeds: list[Any] = []
    for item in given:
        for part in item.split(",") if isinstance(item, str) else (item,):
            seeds += _range(part) if isinstance(part, str) else [part]
    if len(set(seeds)) < len(seeds):
        raise complete("a seed stands twice. Leave one out.")
    return tuple(seeds)


def _range(text: str) -> range:
    found = _RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < first + _MOST:
        raise complete(f"'{text.strip()}' is no seed and no range of seeds. Write such as 1-16,20.")
    return range(first, last + 1)


class BatchSpec(CompositionSpec, Rendering):
    """Pictures of every prompt of a file with every seed. What a line says of itself counts for it alone."""

    prompts: Path = Field(
        description="Text file with a prompt a line; it may end in settings as kohya's sample prompts do: "
        "--n negative --w width --h height --d seed --s steps --l guidance. Empty lines and those that begin "
        "with # are left out."
    )
    seeds: tuple[int, ...] = Field(
        (0,), description="Seeds of each prompt, such as 1-16,20; a line's own --d counts instead."
    )
    skip_bad: bool = Field(
        False, description="Leave out lines that are wrong, and say so, instead of ending."
    )
    output: Path = Field(Path("out"), description="Folder of the pictures and of manifest.jsonl.")
    overwrite: bool = Field(
        False, description="Draw pictures anew that are there with other settings, instead of refusing."
    )

    @field_validator("seeds", mode="before")
    @classmethod
    def _parse_seeds(cls, given: Any) -> Any:
        return read_seeds(given)

    @field_validator("seeds")
    @classmethod
    def _in_range(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or not all(0 <= seed < 2**63 for seed in seeds):
            raise complete("give at least one, each from 0 to 2^63 - 1.")
        return seeds
