"""What all specifications share: frozen, strict, and every problem reported at once in the user's words."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from studio.errors import SpecError, UsageError
from studio.registry import Registry, nearest


@dataclass(frozen=True)
class Flag:
    """How the command line calls a field whose own name and type do not say it well.

    Attributes:
        name: Of the flag, without hyphens in front; it may be repeated, and its texts go to the field as they
            are.
        metavar: What stands for a value in the help text.
    """

    name: str
    metavar: str


class Options(BaseModel):
    """Options of one method; each description gives unit and effect for help, tooltip and documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class MethodSpec(BaseModel):
    """A request with a ``method`` of some registry and that method's options.

    The options may be given flat among the other fields (``rank=8``) or in ``options``; both read the same,
    and the flat one wins. ``"none"`` stands for None where None is allowed: neither TOML nor a flag has a
    word for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    registry: ClassVar[Registry[Any]]
    method: str
    options: SerializeAsAny[Options] = Field(default_factory=Options)

    @classmethod
    def meaning_changed(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Collection[str]:
        """Return the fields whose values of one request would mean something else in another."""
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _gather_options(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, Mapping):
            return handler(given)
        values = {str(key).replace("-", "_"): value for key, value in given.items()}
        method = str(values.get("method", cls.model_fields["method"].default))
        problems: list[InitErrorDetails] = []
        try:
            options_type: type[Options] = cls.registry[method].Options
        except UsageError as error:
            # The options of a method that does not exist cannot be judged; only the name is reported.
            problems.append(InitErrorDetails(type=complete(str(error)), loc=("method",), input=method))
            values = {
                key: value for key, value in values.items() if key in cls.model_fields and key != "options"
            }
        else:
            options = values.pop("options", None) or {}
            if not isinstance(options, (Options, Mapping)):
                wrong = complete(f"is a table of its own, got {options!r}.")
                problems.append(InitErrorDetails(type=wrong, loc=("options",), input=options))
                options = {}
            options = dict(options.model_dump() if isinstance(options, Options) else options)
            options = {str(key).replace("-", "_"): value for key, value in options.items()}
            options |= {key: values.pop(key) for key in list(values) if key in options_type.model_fields}
            try:
                values["options"] = options_type.model_validate(with_none(options, options_type))
            except ValidationError as error:
                problems += [_detail(item) for item in error.errors()]
        try:
            spec = handler(with_none(values, cls))
        except ValidationError as error:
            problems += [_detail(item) for item in error.errors()]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return spec


S = TypeVar("S", bound=BaseModel)


def still_meant(
    spec_type: type[BaseModel], below: Mapping[str, Any], above: Mapping[str, Any]
) -> dict[str, Any]:
    """Return those of earlier values that mean something, and the same, under later ones.

    Args:
        spec_type: What they are values of.
        below: Earlier values, such as a preset's.
        above: Later ones, which win.
    """
    if not issubclass(spec_type, MethodSpec):
        return dict(below)
    after = {**below, **above}
    methods = [each.get("method", spec_type.model_fields["method"].default) for each in (below, after)]
    known = settable(spec_type, str(methods[1])) if methods[0] != methods[1] else below
    lost = spec_type.meaning_changed(below, after)
    return {name: value for name, value in below.items() if name in known and name not in lost}


def parse_spec(spec_type: type[S], given: Mapping[str, Any]) -> S:
    """Return the validated specification.

    Raises:
        SpecError: Lists every problem: unknown keys with the nearest known name, and values with what was
            wanted.
    """
    try:
        return spec_type.model_validate(dict(given))
    except ValidationError as error:
        raise SpecError(problems_of(error, spec_type, given)) from None


def problems_of(error: ValidationError, spec_type: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    """Return one line per problem, in the names that the user wrote."""
    method = given.get("method")
    names = known_fields(spec_type, str(method) if method is not None else None)
    return [_problem(item, names, spec_type) for item in error.errors()]


def of_other_methods(spec_type: type[BaseModel], name: str) -> str | None:
    """Return what to say of a field that only options of other methods have, or None where none has it."""
    if not issubclass(spec_type, MethodSpec):
        return None
    registry = spec_type.registry
    having = [method for method in registry.names() if name in registry[method].Options.model_fields]
    return f"is an option of other methods: {', '.join(having)}. Choose one with method." if having else None


def known_fields(spec_type: type[BaseModel], method: str | None = None) -> list[str]:
    """Return the names a user may set: the specification's own and those of its method's options."""
    return list(settable(spec_type, method))


def settable(spec_type: type[BaseModel], method: str | None = None) -> dict[str, FieldInfo]:
    """Return the fields a user may set by name: the specification's own, then its method's options."""
    fields = {name: field for name, field in spec_type.model_fields.items() if name != "options"}
    if issubclass(spec_type, MethodSpec):
        method = method or spec_type.model_fields["method"].default
        if method in spec_type.registry.names():
            fields |= spec_type.registry[method].Options.model_fields
    return fields


def allows_none(field: FieldInfo) -> bool:
    """Say whether the word ``none`` means None for this field; a text field keeps it as text."""
    kinds = get_args(field.annotation)
    return NoneType in kinds and str not in kinds


def with_none(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return values in which the word "none" is None wherever it may be."""
    fields = model.model_fields
    return {
        key: None if value == "none" and key in fields and allows_none(fields[key]) else value
        for key, value in values.items()
    }


def is_sequence(field: FieldInfo) -> bool:
    """Say whether a field holds several values."""
    return any(get_origin(kind) in (tuple, list, frozenset, set) for kind in alternatives(field.annotation))


def is_mapping(field: FieldInfo) -> bool:
    """Say whether a field holds a table."""
    return any(
        isinstance(origin := get_origin(kind) or kind, type) and issubclass(origin, Mapping)
        for kind in alternatives(field.annotation)
    )


def alternatives(annotation: Any) -> list[Any]:
    """Return the types that a union is of; of any other type itself."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in alternatives(part)]
    return [annotation]


def complete(text: str) -> PydanticCustomError:
    """Return a validation error whose text says all there is to say, the value that was given included."""
    return PydanticCustomError("complete", "{text}", {"text": text})


def _detail(item: Any) -> InitErrorDetails:
    """Return an error of an inner validation in the form an outer one is made of."""
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
    elif item["type"] == "complete":
        return InitErrorDetails(type=complete(item["msg"]), loc=item["loc"], input=item["input"])
    elif item["type"] in _KEPT:
        return InitErrorDetails(
            type=item["type"], loc=item["loc"], input=item["input"], ctx=item.get("ctx", {})
        )
    else:
        message = item["msg"]
    return InitErrorDetails(
        type=PydanticCustomError("problem", "{text}", {"text": message}), loc=item["loc"], input=item["input"]
    )


# The kinds that get words of our own in `_problem`.
_KEPT = {"missing", "extra_forbidden", "tuple_type"}


def _problem(item: Any, names: list[str], spec_type: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in item["loc"]) or "specification"
    if item["type"] == "extra_forbidden":
        return f"{name}: {of_other_methods(spec_type, name) or f'unknown option.{nearest(name, names)}'}"
    if item["type"] == "missing":
        return f"{name}: is required."
    if item["type"] == "tuple_type":
        return f'{name}: must be a list, as in ["a", "b"], got {item["input"]!r}.'
    if item["type"] == "complete":
        return f"{name}: {item['msg']}"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}."
