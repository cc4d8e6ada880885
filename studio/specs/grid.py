"""What a user may ask of a grid: pictures that differ along one, two or three axes."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from studio.specs.base import complete
from studio.specs.composition import CompositionSpec
from studio.specs.drawing import Drawing


class Axis(BaseModel):
    """What pictures differ in along an axis, written ``FIELD=VALUE,VALUE`` or as a table with one entry.

    Commas inside of a value need double quotes around it: ``prompt="a red, old fox",a cat``.

    Attributes:
        field: Its name.
        values: What it is from picture to picture, as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    field: str
    values: tuple[str, ...]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            field, equals, values = given.partition("=")
            if not equals or not values.strip():
                raise complete(f"'{given}' must be FIELD=VALUE,VALUE.")
            return {"field": field, "values": values}
        if isinstance(given, Mapping) and len(given) == 1:
            ((field, values),) = given.items()
            return {"field": field, "values": values}
        return given

    @field_validator("field", mode="before")
    @classmethod
    def _spelled(cls, given: Any) -> Any:
        # What stands behind a dot is an adapter's name, whose hyphens are its own.
        name, dot, adapter = str(given).strip().partition(".")
        return name.replace("-", "_") + dot + adapter

    @field_validator("values", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        items = next(csv.reader([given], skipinitialspace=True), []) if isinstance(given, str) else given
        try:
            found = tuple(str(item).strip() for item in items)
        except TypeError:
            found = (str(given),)
        if not any(found):
            raise complete("an axis has at least one value. Write FIELD=VALUE,VALUE.")
        return found


class GridSpec(CompositionSpec, Drawing):
    """Pictures that differ along axes, and one picture of all under their values."""

    x: Axis = Field(
        description="What differs from column to column, FIELD=VALUE,VALUE. FIELD is a setting or an option "
        "of the method, or adapter, weight (of all adapters), weight.NAME (of one), with (a modifier), or "
        "replace (its first value stands in the prompt, the others take its place). Numbers also as 1-4, "
        "1-9(+2) and 0-1[5]."
    )
    y: Axis | None = Field(None, description="What differs from row to row.")
    z: Axis | None = Field(None, description="What differs from one block of rows to the next.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all pictures, unless an axis says another.")
    output: Path = Field(Path("out"), description="Folder of the pictures, of grid.png and manifest.jsonl.")
    overwrite: bool = Field(
        False, description="Draw pictures anew that are there with other settings, instead of refusing."
    )
