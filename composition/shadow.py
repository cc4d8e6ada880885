"""Give objects other methods for a while, and leave no trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Shadow methods of one object, as the attributes of that object alone.

    What shadows a method already, such as the ``forward`` that moves an offloaded module, comes back.
    """
    before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    try:
        vars(owner).update(methods)
        yield
    finally:
        for name in methods:
            vars(owner).pop(name, None)
        vars(owner).update(before)
