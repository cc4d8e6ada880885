"""From the axes of a grid to the pictures that stand in it, and to one picture of all."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from math import isqrt, prod
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps
from pydantic.fields import FieldInfo

from studio.batches.lines import Wanted, shared_settings
from studio.errors import SpecError, UsageError
from studio.plots import GridRow, draw_grid
from studio.png import NOT_OF_THE_PICTURE
from studio.prompt_settings import settled
from studio.registry import COMPOSERS, MODIFIERS, nearest
from studio.specs import GenerateSpec, GridSpec, adapter_names, parse_spec, settable
from studio.specs.base import alternatives, of_other_methods
from studio.specs.choice import NONE, read_choice, split
from studio.specs.grid import Axis

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SHEET = "grid.png"
_ADDED = ("adapter", "replace", "weight", "with")  # axes that are no field
_TEXTS = ("prompt", "negative_prompt", "replace")
_MOST = 10_000  # pictures
_SMALLEST, _LARGEST = 128, 512  # sides of a picture in the one of all, in pixels
_PIXELS = 100_000_000  # of all at most
_LETTER, _LABEL, _LINES = 7, 24, 6  # pixels of a letter; letters of a line and lines of a label
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_RANGE = re.compile(rf"{_NUMBER}\s*-\s*{_NUMBER}\s*(?:\(\s*\+?{_NUMBER}\s*\)|\[\s*(\d+)\s*\])?")


@dataclass(frozen=True)
class Grid:
    """The pictures of a grid.

    Attributes:
        pictures: Row by row, block by block; ``about`` of each says its place.
        columns: Number of the x axis' values.
        rows: Of the y axis', 1 without one.
    """

    pictures: Sequence[Wanted]
    columns: int
    rows: int

    def sheet(self) -> "Picture":
        """Return the picture of all pictures, read from their files."""
        with Image.open(self.pictures[0].path) as first:
            side = min(_LARGEST, max(_SMALLEST, *first.size), isqrt(_PIXELS // len(self.pictures)))
        found: list[GridRow] = []
        for start in range(0, len(self.pictures), self.columns):
            row = self.pictures[start : start + self.columns]
            about = row[0].about
            if "z" in about and start % (self.columns * self.rows) == 0:
                found.append(GridRow(_wrapped(about["z"], _LABEL), ()))
            found.append(
                GridRow(_wrapped(about.get("y", ""), _LABEL), [_small(each.path, side) for each in row])
            )
        titles = [_wrapped(each.about["x"], side // _LETTER) for each in self.pictures[: self.columns]]
        return draw_grid(found, titles, side=side)


def lay_out(spec: GridSpec) -> Grid:
    """Return the pictures of a grid.

    Raises:
        SpecError: If an axis names nothing that pictures differ in, a value is wrong, or two pictures would
            be the same. Lists all of it.
    """
    axes = [(name, axis) for name in "zyx" if (axis := getattr(spec, name)) is not None]
    fields = [axis.field for _, axis in axes]
    names = {axis.field: name for name, axis in axes}
    if twice := [(name, axis.field) for name, axis in axes if names[axis.field] != name]:
        name, field = twice[0]
        raise SpecError([f"{names[field]} and {name} are both '{field}'. Leave one out."])
    known = _known(spec)
    values = [_values(name, axis, known) for name, axis in axes]
    if (count := prod(map(len, values))) > _MOST:
        raise SpecError([f"the grid has {count} pictures, at most {_MOST} are drawn. Give fewer values."])
    found: list[Wanted] = []
    problems: dict[str, None] = {}
    same: dict[str, str] = {}
    for number, chosen in enumerate(product(*values), 1):
        about = {name: label(axis.field, value) for (name, axis), value in zip(axes, chosen, strict=True)}
        try:
            cell = _cell(spec, dict(zip(fields, chosen, strict=True)))
        except UsageError as error:
            for problem in error.problems if isinstance(error, SpecError) else [str(error)]:
                axis_name = names.get(problem.partition(":")[0])
                problems[f"{axis_name}: {problem}" if axis_name else problem] = None
            continue
        words = ", ".join(about.values())
        if (other := same.setdefault(cell.model_dump_json(), words)) is not words:
            if other == words:
                problem = f"'{words}' stands twice. Give each value once."
            else:
                problem = (
                    f"'{other}' and '{words}' are the same picture. Leave a value out; what the prompt "
                    "itself says counts above the axes."
                )
            problems[problem] = None
        found.append(Wanted(cell, number, about))
    if problems:
        raise SpecError(list(problems))
    return Grid(found, len(values[-1]), len(values[-2]) if spec.y else 1)


def label(field: str, value: str) -> str:
    """Return what stands beside a picture for a value."""
    if field in _TEXTS:
        return value
    if field in ("method", "with"):
        return value.replace(":", ": ").replace(",", ", ")
    if field == "adapter":
        return "no adapter" if value == NONE else Path(value).name.replace(".safetensors", "")
    return f"{field.replace('_', ' ')} {Path(value).name if field == 'base' else value}"


def _known(spec: GridSpec) -> dict[str, FieldInfo | None]:
    """Return what axes may be called: fields that decide a picture, options of the methods, and ours."""
    axes = [axis for axis in (spec.x, spec.y, spec.z) if axis is not None and axis.field == "method"]
    methods = {spec.method, *(text.partition(":")[0] for axis in axes for text in axis.values)}
    fields = {name: field for method in methods for name, field in settable(GenerateSpec, method).items()}
    left_out = NOT_OF_THE_PICTURE | {"adapters", "modifiers"}
    return {name: field for name, field in fields.items() if name not in left_out} | dict.fromkeys(_ADDED)


def _values(name: str, axis: Axis, known: Mapping[str, FieldInfo | None]) -> list[str]:
    """Return an axis' values, ranges of numbers written out.

    Raises:
        SpecError: If nothing is called like the axis, or a range is none.
    """
    field, dot, _ = axis.field.partition(".")
    if field not in known or (dot and field != "weight"):
        other = of_other_methods(GenerateSpec, axis.field)
        close = nearest(axis.field, list(known))
        said = f"'{axis.field}' {other}" if other else f"there is no '{axis.field}'.{close}"
        raise SpecError([f"{name}: {said}"])
    declared = known[field]
    kinds = alternatives(declared.annotation) if declared else [float] if field == "weight" else []
    if str in kinds or not {int, float} & {*kinds}:
        return list(axis.values)
    return [value for text in axis.values for value in _numbers(name, text, whole=float not in kinds)]


def _numbers(name: str, text: str, *, whole: bool) -> list[str]:
    """Return the numbers that ``1-4``, ``1-9(+2)`` or ``0-1[5]`` stands for; other texts as they are."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return [text]
    first, last, step = Decimal(found[1]), Decimal(found[2]), Decimal(found[3] or 1)
    if found[4]:
        count = int(found[4])
        step = (last - first) / max(count - 1, 1)
    else:
        count = int((last - first) / step) + 1 if step else 0
    if count < 1 or last < first:
        raise SpecError(
            [
                f"{name}: '{text}' is no range, which goes up from its first number. Write FIRST-LAST, "
                "FIRST-LAST(+STEP) or FIRST-LAST[COUNT]."
            ]
        )
    if count > _MOST:
        raise SpecError([f"{name}: '{text}' has {count} values, at most {_MOST} are drawn. Give fewer."])
    values = [first + step * place for place in range(count)]
    return [str(round(value)) if whole else f"{round(value, 6).normalize():f}" for value in values]


def _cell(spec: GridSpec, chosen: Mapping[str, str]) -> GenerateSpec:
    """Return the specification of the picture at these values, by field.

    Raises:
        UsageError: If something is wrong with them.
    """
    settings = shared_settings(spec)
    settings |= {field: value for field, value in chosen.items() if field.partition(".")[0] not in _ADDED}
    if "method" in chosen:
        settings |= _method(spec, chosen["method"])
    if (adapter := chosen.get("adapter", NONE)) != NONE:
        settings["adapters"] = (*spec.adapters, adapter)
    if (modifier := chosen.get("with", NONE)) != NONE:
        name, options = read_choice(modifier)
        settings["modifiers"] = {**spec.modifiers, name: split(options, MODIFIERS[name].Options)}
    if "replace" in chosen:
        settings |= _replaced(settings, spec, chosen["replace"])
    cell = settled(parse_spec(GenerateSpec, settings))
    for field, value in chosen.items():
        if field.partition(".")[0] == "weight":
            cell = _weighed(cell, field, value)
    return cell


def _method(spec: GridSpec, text: str) -> dict[str, Any]:
    """Return method and options of ``method:option=value``: of the options of all those that it has, too."""
    name, options = read_choice(text)
    kind = COMPOSERS[name].Options
    shared = spec.options.model_dump(exclude_unset=True)
    known = {option: value for option, value in shared.items() if option in kind.model_fields}
    return {"method": name, "options": known | split(options, kind)}


def _replaced(settings: Mapping[str, Any], spec: GridSpec, new: str) -> dict[str, str]:
    """Return the prompts with a text in the place of the axis' first value."""
    old = next(axis.values[0] for axis in (spec.x, spec.y, spec.z) if axis and axis.field == "replace")
    texts = {name: str(settings[name]) for name in ("prompt", "negative_prompt")}
    if not any(old in text for text in texts.values()):
        raise UsageError(
            f"replace: '{old}' stands neither in the prompt '{texts['prompt']}' nor in the negative prompt. "
            "Begin the values with what is there."
        )
    return {name: text.replace(old, new) for name, text in texts.items()}


def _weighed(cell: GenerateSpec, field: str, weight: str) -> GenerateSpec:
    """Return a specification with another weight of the adapter that ``weight.NAME`` names, or of all."""
    wanted = field.partition(".")[2]
    names = adapter_names(cell.adapters)
    if not names or (wanted and wanted not in names):
        known = f"{nearest(wanted, names)} Known: {', '.join(names)}." if names else " Give --adapter."
        raise UsageError(f"{field}: there is no adapter{f' {wanted!r}' if wanted else ''}.{known}")
    uses = [
        {**use.model_dump(), "weight": weight} if wanted in ("", name) else use
        for name, use in zip(names, cell.adapters, strict=True)
    ]
    return parse_spec(GenerateSpec, {**shared_settings(cell), "adapters": uses})


def _wrapped(text: str, width: int) -> str:
    return "\n".join(wrap(text, width, max_lines=_LINES, placeholder=" ..."))


def _small(path: Path, side: int) -> "Picture":
    with Image.open(path) as picture:
        return ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
