"""Checks that several specifications make of what they are given."""

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
