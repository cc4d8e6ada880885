"""Give objects other methods and parts for a while, and leave no trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Shadow attributes of one object, such as methods, with no word to its class or configuration.

    What shadows one already, such as the ``forward`` that moves an offloaded module, comes back.
    """
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        vars(owner).update(attributes)
        yield
    finally:
        for name in attributes:
            vars(owner).pop(name, None)
        vars(owner).update(before)
