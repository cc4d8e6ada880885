"""A prompt broken down: one prompt for each adapter's concept, and which tokens name which concept.

"a cat and a dog" with the concepts cat and dog, whose adapters' trigger words are "sks cat" and "tok",
becomes "a sks cat and a dog" and "a cat and a tok dog". CLoRA, arXiv:2403.19776.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from studio.errors import CompositionError

Span = tuple[int, int]
"""First character, and the one behind the last."""
Places = tuple[int, ...]
"""Rows of a prompt embedding."""


@dataclass(frozen=True)
class Breakdown:
    """What the prompts of a plan say where.

    Attributes:
        prompts: By adapter: the prompt with its trigger words in the place of its concept.
        base: Where the prompt itself names each concept, by adapter.
        concepts: Where an adapter's prompt names each concept, by both adapters.
        triggers: Where an adapter's prompt has its own trigger words, the concept's own left out; perhaps
            nowhere.
    """

    prompts: Mapping[str, str]
    base: Mapping[str, Places]
    concepts: Mapping[str, Mapping[str, Places]]
    triggers: Mapping[str, Places]


def break_down(
    prompt: str, concepts: Mapping[str, str], triggers: Mapping[str, str], rows: Callable[[str], int]
) -> Breakdown:
    """Return the breakdown of a prompt.

    Args:
        prompt: What is asked for.
        concepts: Words of the prompt by adapter; of equal words each adapter has the next that is left.
        triggers: Trigger words by adapter; with the concept among them they stand in its place, without they
            stand before it.
        rows: Number of rows that a text's embedding has, start and end included.

    Raises:
        CompositionError: If the prompt lacks words, or is too long with trigger words.
    """

    def places(text: str, span: Span) -> Places:
        # Of the beginning of a text that ends with a word, the tokens are those of the text.
        first, behind = (rows(text[:end]) - 1 for end in span)
        if first >= behind or rows(text) < behind + 1:
            raise CompositionError(
                f'the prompt is too long with trigger words: "{text[span[0] : span[1]]}" would be cut off. '
                "Shorten it."
            )
        return tuple(range(first, behind))

    found = find_concepts(prompt, concepts)
    prompts: dict[str, str] = {}
    own: dict[str, Places] = {}
    named: dict[str, dict[str, Places]] = {}
    for adapter, (start, end) in found.items():
        words, trigger = prompt[start:end], triggers[adapter]
        inside = list(_whole_words(words, trigger))
        put = trigger if inside else f"{trigger} {words}"
        text = prompt[:start] + put + prompt[end:]
        longer = len(put) - (end - start)
        inner = inside[-1] if inside else (len(put) - len(words), len(put))
        spans = {
            other: span if span[1] <= start else (span[0] + longer, span[1] + longer)
            for other, span in found.items()
        }
        spans[adapter] = (start + inner[0], start + inner[1])
        prompts[adapter] = text
        named[adapter] = {other: places(text, span) for other, span in spans.items()}
        whole = places(text, (start, start + len(put)))
        own[adapter] = tuple(place for place in whole if place not in named[adapter][adapter])
    base = {adapter: places(prompt, span) for adapter, span in found.items()}
    return Breakdown(prompts, base, named, own)


def find_concepts(prompt: str, concepts: Mapping[str, str]) -> dict[str, Span]:
    """Return where a prompt names each concept, by adapter; of equal words each has the next that is left.

    Raises:
        CompositionError: If the prompt lacks words.
    """
    taken: dict[str, Span] = {}
    for adapter, words in concepts.items():
        free = [
            span
            for span in _whole_words(words, prompt)
            if all(span[1] <= start or span[0] >= end for start, end in taken.values())
        ]
        if not free:
            raise CompositionError(
                f'concepts: "{words}" of \'{adapter}\' is not in the prompt "{prompt}"'
                f"{', or another concept has it' if words in prompt else ''}. Name words that are."
            )
        taken[adapter] = free[0]
    return taken


def _whole_words(words: str, text: str) -> list[Span]:
    pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, flags=re.IGNORECASE)]
