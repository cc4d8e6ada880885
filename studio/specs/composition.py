"""What a user may ask of a composition: a base, adapters, and how they act together."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from studio.errors import SpecError, UsageError
from studio.registry import COMPOSERS, MODIFIERS, Registry
from studio.specs.base import Flag, MethodSpec, Options, complete, parse_spec
from studio.specs.choice import read_choices, typed

_TWO_WEIGHTS = re.compile(r"(.+?):((?:unet|te)=.*)")


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
        """Return adapter and weight of ``path:weight``; a colon without a number belongs to the path.

        Raises:
            PydanticCustomError: If what follows a file's name and a colon is no number.
        """
        if found := _TWO_WEIGHTS.fullmatch(text):
            raise complete(
                f"'{text}' has two weights, and one is read here. Write {found[1]}:WEIGHT; 'studio compose "
                "--bake' makes one adapter of several that have two."
            )
        path, _, weight = text.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not path or (math.isnan(number) and not path.endswith(".safetensors")):
            return cls(path=Path(text))
        if not math.isfinite(number):
            raise complete(f"the weight of '{path}' must be a number, got '{weight}'.")
        return cls(path=Path(path), weight=number)


def read_uses(given: Any) -> Any:
    """Return adapter uses for what a specification is given: one text or path, or several of either."""
    if isinstance(given, (str, Path)):
        given = (given,)
    if not isinstance(given, (list, tuple)):
        return given
    return tuple(AdapterUse.parse(str(item)) if isinstance(item, (str, Path)) else item for item in given)


def refuse_same_file(uses: Sequence[AdapterUse]) -> None:
    """Refuse that a file is given twice, also where its path is written in two ways.

    Raises:
        PydanticCustomError: If one is.
    """
    files: dict[Path, Path] = {}
    for path in (use.path for use in uses):
        file = path.resolve()
        if file in files:
            also = "" if files[file] == path else f", also as '{files[file]}'"
            raise complete(f"'{path}' is given twice{also}. Leave one out; one weight can do what both did.")
        files[file] = path


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


def read_named_options(given: Any, registry: Registry[Any]) -> Any:
    """Return options by name of a registry for what a specification is given: a table, or texts.

    Raises:
        PydanticCustomError: If a name or one of its options does not exist or has a wrong value; says all of
            it.
    """
    given = read_choices(given, registry)
    if not isinstance(given, Mapping):
        return given
    found: dict[str, Options] = {}
    problems: list[str] = []
    for key, options in given.items():
        name = str(key) if key in registry.names() else str(key).replace("_", "-")
        try:
            kind: type[Options] = registry[name].Options
            found[name] = options if isinstance(options, kind) else parse_spec(kind, typed(options, kind))
        except SpecError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise complete(" ".join(problems))
    return found


def read_weights(text: str) -> tuple[float, float | None]:
    """Return an adapter's weight and, where it has one of its own, that of its part in the text encoders.

    Two numbers need their names: what comes first differs from program to program.

    Raises:
        ValueError: If the text is neither a number nor ``unet=number:te=number``, in any order.

    Example:
        >>> read_weights("0.8"), read_weights("te=0.5:unet=0.8")
        ((0.8, None), (0.8, 0.5))
    """
    named = dict(part.split("=", 1) for part in text.split(":")) if "=" in text else {}
    if not named:
        return float(text), None
    if named.keys() != {"unet", "te"}:
        raise ValueError("both weights, by their names")
    return float(named["unet"]), float(named["te"])


def with_text_weights(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a specification's values in which weights of text encoders are those of the modifier ``blocks``.

    Args:
        given: The values, adapters and modifiers in any form that their fields take. Of adapters those that
            are written ``path:unet=weight:te=weight`` come out as ``path:weight``.

    Raises:
        PydanticCustomError: If two weights cannot be read, or ``blocks`` has weights of the same adapter.
    """
    items = [items] if isinstance(items := given.get("adapters"), str) else items
    if not isinstance(items, (list, tuple)):
        return given
    plain: list[Any] = []
    tables: dict[int, dict[str, float]] = {}
    for place, item in enumerate(items):
        found = _TWO_WEIGHTS.fullmatch(item) if isinstance(item, str) else None
        if found:
            weight, spoken = _two_weights(found[2], item)
            # What the method weighs is the adapter; the text encoders get a factor, or all but them nothing.
            if spoken != weight:
                tables[place] = {"BASE": spoken / weight} if weight else {"unet": 0.0}
            item = f"{found[1]}:{weight or spoken}"
        plain.append(item)
    given = {**given, "adapters": plain}
    try:
        names = adapter_names(TypeAdapter(list[AdapterUse]).validate_python(read_uses(plain)))
    except (ValidationError, PydanticCustomError):
        # The field says what is wrong with it.
        return given
    modifiers = read_named_options(given.get("modifiers", {}), MODIFIERS) if tables else None
    if not isinstance(modifiers, Mapping):
        return given
    blocks = modifiers["blocks"].model_dump()["weights"] if "blocks" in modifiers else {}
    own = {names[place]: table for place, table in tables.items()}
    if both := own.keys() & blocks.keys():
        raise complete(
            f"'{min(both)}' has block weights, too. Say there what the text encoders' is, as BASE, and give "
            "the adapter one weight."
        )
    return {**given, "modifiers": {**modifiers, "blocks": {"weights": {**blocks, **own}}}}


def _two_weights(text: str, item: str) -> tuple[float, float]:
    try:
        weight, spoken = read_weights(text)
    except ValueError:
        spoken = None
    if spoken is None:
        raise complete(f"'{item}' must be PATH:WEIGHT or PATH:unet=WEIGHT:te=WEIGHT.")
    return weight, spoken


class Ingredients(BaseModel):
    """A base and adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    adapters: tuple[AdapterUse, ...] = Field(
        (), max_length=64, description="Adapter files with strengths, path or path:weight."
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
    def _once(cls, uses: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        refuse_same_file(uses)
        names = adapter_names(uses)
        if twice_called := [name for place, name in enumerate(names) if name in names[:place]]:
            raise complete(f"two are called '{twice_called[0]}'. Give each a name of its own.")
        return uses


class ModifiedIngredients(Ingredients):
    """A base and adapters, and what is changed of any method's plan.

    An adapter may be written ``path:unet=weight:te=weight``, too.
    """

    modifiers: Annotated[dict[str, SerializeAsAny[Options]], Flag("with", "NAME:OPTION=VALUE,...")] = Field(
        {},
        description="Change what the method decided ('studio list modifiers'), in this order: "
        "'cache:interval=3', 'pin:adapters=safety', 'schedule:weights.ink=0@0, 1@0.3'; 'none' for none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_text_weights(cls, given: Any) -> Any:
        try:
            return with_text_weights(given) if isinstance(given, Mapping) else given
        except PydanticCustomError as error:
            problem = InitErrorDetails(type=error, loc=("adapters",), input=given["adapters"])
            raise ValidationError.from_exception_data(cls.__name__, [problem]) from None

    @field_validator("modifiers", mode="before")
    @classmethod
    def _parse_modifiers(cls, given: Any) -> Any:
        return read_named_options(given, MODIFIERS)


class CompositionSpec(MethodSpec, ModifiedIngredients):
    """Adapters on a base, and how they act together: what a composition document holds."""

    registry: ClassVar[Registry[Any]] = COMPOSERS

    method: str = Field("merge", description="How several adapters act together.")
