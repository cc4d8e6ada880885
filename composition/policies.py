"""What several methods and modifiers do alike: text-encoder policies, and checks of adapters by name."""

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Literal

from pydantic import Field

from studio.errors import CompositionError
from studio.registry import nearest

logger = logging.getLogger(__name__)

TextPolicy = Annotated[
    Literal["base", "first", "merged", "own"],
    Field(
        description="What the text encoders hold: no adapter, the first, all, or for each answer its own "
        "adapters (one more encoding of the prompt for each)."
    ),
]
"""Of methods whose steps have several answers."""
SharedTextPolicy = Annotated[
    Literal["base", "first", "merged"],
    Field(description="What the text encoders, which run once, hold: no adapter, the first, or all."),
]
"""Of methods whose steps have one answer."""


def text_weights(policy: TextPolicy, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of the adapters' text-encoder parts for the pipeline's own prompt embeddings.

    Args:
        policy: No adapter, the first, or all of them; "own" is for plans that give each branch embeddings of
            its own, beside which the pipeline's are the base's.
        weights: By adapter, in the order in which they act.
    """
    if policy == "first":
        return dict(list(weights.items())[:1])
    return dict(weights) if policy == "merged" else {}


def check_some(method: str, adapters: Collection[str]) -> None:
    """Raise CompositionError if a method is given no adapter."""
    if not adapters:
        raise CompositionError(
            f"method '{method}' got no adapters. Give at least one, or use method 'merge'."
        )


def say_if_alone(adapters: Collection[str]) -> None:
    """Say, once of each name, when a method that takes turns or averages is given one adapter."""
    if len(adapters) == 1:
        say_once(
            f"'{next(iter(adapters))}' alone acts in every step, as it would by method 'merge': this method "
            "is for several adapters."
        )


@cache
def say_once(text: str) -> None:
    """Warn of what does nothing, once of each."""
    logger.warning(text)


def known(asker: str, names: Sequence[str], adapters: Sequence[str]) -> tuple[str, ...]:
    """Return names of adapters.

    Raises:
        CompositionError: If one is not among the adapters; the message begins with who asks.
    """
    if unknown := [name for name in names if name not in adapters]:
        raise CompositionError(
            f"{asker}: unknown adapter '{unknown[0]}'.{nearest(unknown[0], list(adapters))} Known: "
            f"{', '.join(adapters) or 'none'}."
        )
    return tuple(names)
