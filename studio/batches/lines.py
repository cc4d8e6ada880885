"""From lines of prompts to the pictures that they ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from studio.batches.plans import planning_problems
from studio.errors import CompositionError, SpecError, UsageError
from studio.models.prompt_syntax import take_flags
from studio.prompt_settings import settled
from studio.specs import GenerateSpec, parse_spec


@dataclass(frozen=True)
class Line:
    """A prompt as it was written, and its number, from 1."""

    number: int
    text: str


@dataclass(frozen=True)
class Wanted:
    """A picture to draw.

    Attributes:
        spec: All that decides it, settled.
        number: Of what asks for it, a line of a file or a place in a grid.
        about: What the manifest says of that.
    """

    spec: GenerateSpec
    number: int
    about: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its file, ``<number>-<seed>.png``."""
        return self.spec.output / f"{self.number:04d}-{self.spec.seed}.png"


def read_lines(path: Path) -> list[Line]:
    """Return the prompts of a file, without empty lines and those that begin with ``#``.

    Raises:
        UsageError: If it cannot be read or has none.
    """
    try:
        rows = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the prompts in '{path}': {said}.") from None
    found = [Line(number, text.strip()) for number, text in enumerate(rows, 1)]
    found = [line for line in found if line.text and not line.text.startswith("#")]
    if not found:
        raise UsageError(f"there is no prompt in '{path}'. Write one a line.")
    return found


def shared_settings(spec: BaseModel) -> dict[str, Any]:
    """Return what all pictures of a request have in common, as fields of their specifications."""
    return {
        name: getattr(spec, name) for name in type(spec).model_fields if name in GenerateSpec.model_fields
    }


def wanted_pictures(
    lines: Sequence[Line], shared: Mapping[str, Any], seeds: Sequence[int]
) -> tuple[list[Wanted], list[str]]:
    """Return the pictures that lines ask for, line by line, and what is wrong with the lines left out.

    Args:
        lines: The prompts.
        shared: Fields of every picture's specification; what a line says counts above them.
        seeds: Of every line that says none.

    Raises:
        SpecError: If something is wrong with what all share.
        CompositionError: If no line can be drawn, and all for the same reason.
    """
    parse_spec(GenerateSpec, {**shared, "prompt": ""})
    read: list[tuple[Line, GenerateSpec, bool]] = []
    problems: list[tuple[int, str]] = []
    for line in lines:
        try:
            spec = settled(parse_spec(GenerateSpec, {**shared, "prompt": line.text}))
            own = not spec.raw_prompt and "seed" in take_flags(line.text)[1]
        except SpecError as error:
            problems += [(line.number, problem) for problem in error.problems]
            continue
        read.append((line, spec, own))
    refused = planning_problems([spec for _, spec, _ in read])
    if len(refused) == len(lines) > 1 and len(set(refused.values())) == 1:
        raise CompositionError(refused[0])
    problems += [(read[place][0].number, problem) for place, problem in refused.items()]
    found: list[Wanted] = []
    for place, (line, spec, own) in enumerate(read):
        for seed in (spec.seed,) if own else seeds:
            if place not in refused:
                seeded = spec.model_copy(update={"seed": seed})
                found.append(Wanted(seeded, line.number, {"line": line.number}))
    return found, [f"line {number}: {problem}" for number, problem in sorted(problems)]
