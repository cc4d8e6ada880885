"""Checks that several specifications make of what they are given."""

import ast
from pathlib import Path
from typing import Any

from pydantic import AfterValidator

from studio.errors import UsageError
from studio.registry import Registry
from studio.specs.base import complete


def known_in(registry: Registry[Any]) -> AfterValidator:
    """Return the check that a name, where one is given, stands in a registry."""

    def check(name: str | None) -> str | None:
        try:
            if name is not None:
                registry[name]
        except UsageError as error:
            raise complete(str(error)) from None
        return name

    return AfterValidator(check)


def ends_in(ending: str) -> AfterValidator:
    """Return the check that a file's name, where one is given, has an ending such as ".png"."""

    def check(path: Path | None) -> Path | None:
        if path is not None and path.suffix != ending:
            raise ValueError(f"must be a file name that ends in {ending}")
        return path

    return AfterValidator(check)


def read_value(name: str, value: Any) -> Any:
    """Return a number, a truth value, a word, or a tuple of these, read from text where it is text.

    Args:
        name: What the user calls it.
        value: As TOML, JSON, a flag or the page gives it.

    Raises:
        PydanticCustomError: If it is something else.
    """
    if isinstance(value, str):
        text = value.strip()
        words = {"true": True, "false": False}
        try:
            value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    if isinstance(value, list | tuple):
        return tuple(read_value(name, entry) for entry in value)
    if not isinstance(value, bool | int | float | str):
        raise complete(f"{name} must be a number, true or false, a word, or a list of these, got {value!r}.")
    return value
