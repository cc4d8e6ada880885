"""What a user may ask of a composition: a base, adapters, and how they act together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from studio.errors import SpecError, UsageError
from studio.registry import COMPOSERS, MODIFIERS, Registry
from studio.specs.base import Flag, MethodSpec, Options, complete, parse_spec
from studio.specs.choice import read_choices, typed


class AdapterUse(BaseModel):
    """One adapter file at one strength, written ``path`` or ``path:weight`` on the command line.

    Attributes:
        path: The file.
        weight: The strength.
        name: By which options speak of it; empty for the file's stem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Path
    weight: float = Field(1.0, ge=-10, le=10)
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> "AdapterUse":
        """Return adapter and weight of ``path:weight``; a colon without a number belongs to the path."""
        path, _, weight = text.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            return cls(path=Path(text))
        return cls(path=Path(path), weight=number) if path else cls(path=Path(text))


def read_uses(given: Any) -> Any:
    """Return adapter uses for what a specification is given: one text or path, or several of either."""
    if isinstance(given, (str, Path)):
        given = (given,)
    if not isinstance(given, (list, tuple)):
        return given
    return tuple(AdapterUse.parse(str(item)) if isinstance(item, (str, Path)) else item for item in given)


def adapter_names(uses: Sequence[AdapterUse]) -> list[str]:
    """Return a name for each adapter: its own, or its file's stem, numbered where that is taken."""
    given = {use.name for use in uses}
    names: list[str] = []
    for use in uses:
        stem, number = use.path.stem, 2
        name = use.name or stem
        while not use.name and (name in names or name in given):
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def read_modifiers(given: Any) -> Any:
    """Return options by plan modifier for what a specification is given: a table, or texts.

    Raises:
        PydanticCustomError: If a modifier or one of its options does not exist or has a wrong value; says all
            of it.
    """
    given = read_choices(given, MODIFIERS)
    if not isinstance(given, Mapping):
        return given
    found: dict[str, Options] = {}
    problems: list[str] = []
    for key, options in given.items():
        name = str(key) if key in MODIFIERS.names() else str(key).replace("_", "-")
        try:
            kind: type[Options] = MODIFIERS[name].Options
            found[name] = options if isinstance(options, kind) else parse_spec(kind, typed(options, kind))
        except SpecError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise complete(" ".join(problems))
    return found


class Ingredients(BaseModel):
    """A base, adapters, and what is changed of any method's plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    adapters: tuple[AdapterUse, ...] = Field(
        (), max_length=64, description="Adapter files with strengths, path or path:weight."
    )
    modifiers: Annotated[
        dict[str, SerializeAsAny[Options]], Flag("with", "NAME:OPTION=VALUE,...")
    ] = Field(
        {},
        description="Change what the method decided ('studio list modifiers'), in this order: "
        "'cache:interval=3', 'pin:adapters=safety', 'schedule:weights.ink=0@0, 1@0.3'; 'none' for none.",
    )
    expected_hashes: dict[str, str] = Field(
        {},
        description="Hash that a base or adapter should have, by its name as given; it is said where another "
        "is found. A picture or composition whose settings are taken brings them along.",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _parse_adapters(cls, given: Any) -> Any:
        return read_uses(given)

    @field_validator("adapters")
    @classmethod
    def _own_names(cls, uses: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        names = adapter_names(uses)
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise complete(f"two are called '{twice[0]}'. Give each a name of its own.")
        return uses

    @field_validator("modifiers", mode="before")
    @classmethod
    def _parse_modifiers(cls, given: Any) -> Any:
        return read_modifiers(given)


class CompositionSpec(MethodSpec, Ingredients):
    """Adapters on a base, and how they act together: what a composition document holds."""

    registry: ClassVar[Registry[Any]] = COMPOSERS

    method: str = Field("merge", description="How several adapters act together.")
