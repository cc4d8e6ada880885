"""Names of extension points and what they stand for.

A registry discovers its members by importing the modules of one package the first time it is asked, so a new
method is one new file with one registration. Those modules import torch inside functions only: names, options
and help stay light.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from studio.errors import UsageError


def nearest(name: str, known: list[str]) -> str:
    """Return `` Did you mean 'x'?`` for the most similar known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to implementations, filled by the modules of one package.

    Args:
        noun: What a member is called in messages ("method").
        package: Dotted package whose modules register members when imported.
    """

    def __init__(self, noun: str, package: str) -> None:
        self.noun = noun
        self._package = package
        self._members: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under ``name``."""

        def enter(member: T) -> T:
            if name in self._members:
                raise ValueError(f"{self.noun} '{name}' is registered twice")
            self._members[name] = member
            return member

        return enter

    def names(self) -> list[str]:
        """Return all names in alphabetical order."""
        self._discover()
        return sorted(self._members)

    def __getitem__(self, name: str) -> T:
        """Return the member called ``name``.

        Raises:
            UsageError: If there is none; the message names the nearest and all others.
        """
        self._discover()
        if name not in self._members:
            known = self.names()
            raise UsageError(
                f"unknown {self.noun} '{name}'.{nearest(name, known)} Known: {', '.join(known)}."
            )
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


TRAINERS: Registry[Any] = Registry("training method", "studio.trainers.methods")
COMPOSERS: Registry[Any] = Registry("composition method", "studio.composition.methods")
MODIFIERS: Registry[Any] = Registry("plan modifier", "studio.composition.modifiers")
KINDS: Registry[Any] = Registry("adapter kind", "studio.adapters.kinds")
FORMATS: Registry[Any] = Registry("adapter format", "studio.adapters.formats")
MERGERS: Registry[Any] = Registry("merging algorithm", "studio.adapters.merging")
