"""How much each adapter matters to a prompt, by the base's own text encoder.

W-Switch and W-Composite, arXiv:2606.03792.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from studio.composition.plan import Request
from studio.composition.policies import known
from studio.errors import CompositionError

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter


def triggers_of(
    adapters: "Mapping[str, Adapter]", given: Mapping[str, str], *, option: str = "triggers"
) -> dict[str, str]:
    """Return each adapter's trigger words: those given, or those that its file tells.

    Args:
        adapters: By name.
        given: By adapter, where the file's do not count.
        option: What of the method gives them, for the message.

    Raises:
        CompositionError: If an adapter has none, or words are given for one that is not there.
    """
    known("triggers", list(given), list(adapters))
    found = {}
    for name, adapter in adapters.items():
        told = given.get(name) or _told(adapter)
        if not told:
            raise CompositionError(
                f"the trigger words of '{name}' are not known: its file tells none. Give them with the "
                f"method's option '{option}'."
            )
        found[name] = told
    return found


def by_ablation(triggers: Mapping[str, str], request: Request) -> dict[str, float]:
    """Return how much a prompt changes when an adapter's trigger words are left out.

    ``1 - cos(e(prompt), e(prompt without the words))``, mean over the prompts of a batch; 0 where a prompt
    does not hold the words. Prompt-ablation weights of W-Switch, arXiv:2606.03792.
    """
    embed = _embedder(request)
    prompts = (request.prompt, *request.others)
    return {
        name: sum(1 - _alike(embed(text), embed(_without(text, words))) for text in prompts) / len(prompts)
        for name, words in triggers.items()
    }


def by_similarity(triggers: Mapping[str, str], request: Request) -> dict[str, float]:
    """Return how near an adapter's trigger words are to a prompt.

    ``max(cos(e(words), e(prompt)), 0)``, mean over the prompts of a batch. Prompt-trigger weights of
    W-Composite, arXiv:2606.03792.
    """
    embed = _embedder(request)
    prompts = (request.prompt, *request.others)
    return {
        name: sum(max(_alike(embed(words), embed(text)), 0.0) for text in prompts) / len(prompts)
        for name, words in triggers.items()
    }


def _told(adapter: "Adapter") -> str:
    return str((getattr(adapter, "metadata", None) or {}).get("modelspec.trigger_phrase") or "")


def _without(prompt: str, words: str) -> str:
    """Return a prompt without words, wherever they stand as whole words."""
    pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
    return re.sub(r"\s+", " ", re.sub(pattern, " ", prompt, flags=re.IGNORECASE)).strip()


def _embedder(request: Request) -> "Callable[[str], Tensor]":
    """Return what embeds a text as one vector, that of its last token, which has read all others."""
    assert request.embed is not None
    kept: dict[str, Tensor] = {}

    def embed(text: str) -> "Tensor":
        if text not in kept:
            assert request.embed is not None
            kept[text] = request.embed(text)[-1]
        return kept[text]

    return embed


def _alike(one: "Tensor", other: "Tensor") -> float:
    return float((one @ other) / (one.norm() * other.norm()))
