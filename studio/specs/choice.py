"""A name of a registry with its options in one text: ``cache:interval=3,full_first=2``."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from studio.errors import UsageError
from studio.registry import Registry
from studio.specs.base import complete, is_sequence, with_none

NONE = "none"


def read_choice(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of ``name:option=value,option.key=value``.

    A piece between two commas that has no ``=`` belongs to the value before it, so lists need no marks of
    their own. A dot behind an option's name names an entry of a table.

    Raises:
        UsageError: If the first piece has no ``=``, or an option is a value and a table.

    Example:
        >>> read_choice("pin:adapters=safety,anatomy")
        ('pin', {'adapters': 'safety,anatomy'})
        >>> read_choice("schedule:weights.fox=0.5,weights.ink=0@0, 1@0.3")
        ('schedule', {'weights': {'fox': '0.5', 'ink': '0@0, 1@0.3'}})
    """
    name, _, rest = text.partition(":")
    pieces: list[str] = []
    for piece in rest.split(",") if rest.strip() else ():
        if "=" in piece:
            pieces.append(piece)
        elif pieces:
            pieces[-1] += f",{piece}"
        else:
            raise UsageError(f"'{text}': '{piece.strip()}' must be OPTION=VALUE.")
    options: dict[str, Any] = {}
    for piece in pieces:
        key, _, value = piece.partition("=")
        option, dot, entry = key.strip().partition(".")
        option = option.replace("-", "_")
        if not dot:
            options[option] = value.strip()
            continue
        table = options.setdefault(option, {})
        if not isinstance(table, dict):
            raise UsageError(f"'{text}': {option} has a value already; name all its entries or none.")
        table[entry] = value.strip()
    return name.strip(), options


def read_choices(given: Any, registry: Registry[Any]) -> Any:
    """Return options by name for texts of :func:`read_choice`; what is no text is given back as it is.

    A name that comes twice has the options of both; the word ``none`` alone stands for no name.

    Raises:
        PydanticCustomError: If a text cannot be read.
    """
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return given
    if list(texts) == [NONE]:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        try:
            name, options = read_choice(text)
        except UsageError as error:
            raise complete(str(error)) from None
        known = registry[name].Options if name in registry.names() else None
        together = found.setdefault(name, {})
        for option, value in (split(options, known) if known else options).items():
            both = isinstance(value, dict) and isinstance(together.get(option), dict)
            together[option] = {**together[option], **value} if both else value
    return found


def split(options: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return options in which texts of lists are taken apart at their commas."""
    fields = model.model_fields
    return {
        option: [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str) and option in fields and is_sequence(fields[option])
        else value
        for option, value in options.items()
    }


def typed(options: Any, model: type[BaseModel]) -> dict[str, Any]:
    """Return a table of options with underscores in the names, and None for the word "none" where it may be.

    Raises:
        UsageError: If it is no table.
    """
    given = options.model_dump() if isinstance(options, BaseModel) else options or {}
    if not isinstance(given, Mapping):
        raise UsageError(f"options are a table, got {given!r}.")
    return with_none({str(key).replace("-", "_"): value for key, value in given.items()}, model)
