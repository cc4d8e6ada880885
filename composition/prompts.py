"""Prompt embeddings of a pipeline's call: its own, and further ones that branches of a plan ask for."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from studio.composition.call import Embeddings
from studio.composition.plan import Plan, Request, Text
from studio.composition.projection import projected_out
from studio.errors import CompositionError
from studio.models.prompt_encoding import PromptEncoder
from studio.models.shadow import shadowed

Encode = Callable[..., Any]
Speak = Callable[[Mapping[str, float]], None]
"""Gives the text encoders the adapters' text-encoder parts with these weights."""


class Prompts:
    """Follows ``encode_prompt`` of a pipeline; encodes what a plan wants beside.

    Every text is encoded once for each call of the pipeline, also where several branches ask for it.

    Args:
        pipe: The pipeline.
        plan_for: Called with what the pipeline was asked for, before it is encoded; returns the plan.
        speak: See ``Speak``.
    """

    def __init__(self, pipe: Any, plan_for: Callable[[Request | None], Plan], speak: Speak) -> None:
        self._pipe = pipe
        self._plan_for = plan_for
        self._speak = speak
        # Under None the pipeline's own.
        self._conditional: dict[str | None, Embeddings] = {}
        self._guided: dict[str | None, Embeddings] = {}
        self._seen: tuple[Tensor, bool] | None = None

    @contextmanager
    def follow(self) -> Iterator["Prompts"]:
        """Shadow ``encode_prompt`` of this pipeline for the length of a block."""
        encode = getattr(self._pipe, "encode_prompt", None)
        if encode is None:
            yield self
            return
        signature = inspect.signature(encode)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return self._encode(encode, bound.arguments)

        encode_prompt.__signature__ = signature  # type: ignore[attr-defined]
        with shadowed(self._pipe, {"encode_prompt": encode_prompt}):
            try:
                yield self
            finally:
                self._forget()

    def guides(self, given: Tensor) -> bool:
        """Return whether the denoiser is called with the unconditional rows before the conditional ones.

        Args:
            given: Prompt embeddings that it is called with ``[B, tokens, width]``.

        Raises:
            CompositionError: If they are not what the pipeline's prompt was encoded to.
        """
        # Pipelines give the same tensor at every step, so values are compared, and a GPU is waited for, once
        # in a run.
        if self._seen is None or self._seen[0] is not given:
            self._seen = given, self._is_guided(given)
        return self._seen[1]

    def _is_guided(self, given: Tensor) -> bool:
        for known, guided in ((self._guided, True), (self._conditional, False)):
            own = known[None].tokens if None in known else None
            if own is not None and own.shape == given.shape and torch.equal(own.to(given), given):
                return guided
        raise CompositionError(
            "this composition goes by the prompt's words or tells the rows with it from those without, but "
            "what the denoiser is given was not encoded by the pipeline given to compose(). Give compose() "
            "the pipeline that you call, without perturbed-attention guidance, and call it inside the 'with' "
            "block."
        )

    def embeddings(self, text: str, *, guided: bool) -> Embeddings:
        """Return the embeddings of one of the plan's texts as the denoiser is given them.

        Args:
            text: A name in ``Plan.texts``.
            guided: Whether the batch begins with the unconditional rows.

        Raises:
            CompositionError: If the call's prompts were encoded elsewhere.
        """
        found = (self._guided if guided else self._conditional).get(text)
        if found is None:
            raise CompositionError(
                "this composition gives its branches prompts of their own, but the pipeline's prompt was "
                "encoded outside. Call the pipeline given to compose() inside the 'with' block and pass the "
                "prompt as text."
            )
        return found

    def _forget(self) -> None:
        self._conditional, self._guided, self._seen = {}, {}, None

    def _encode(self, encode: Encode, arguments: Mapping[str, Any]) -> Any:
        self._forget()
        asked = arguments.get("prompt")
        plan = self._plan_for(None if asked is None else self._request(encode, arguments))
        self._speak(plan.text_weights)
        try:
            own = encode(**arguments)
            if asked is not None:
                texts, found = [Text(plan.text_weights)], [own]
                for text in plan.texts.values():
                    if text not in texts:
                        texts.append(text)
                        found.append(self._encoded(encode, arguments, text))
                found = self._as_long(encode, arguments, found, [text.weights for text in texts])
                own = found[0]
                for name, text in plan.texts.items():
                    self._keep(name, *found[texts.index(text)])
            self._keep(None, *own)
        finally:
            self._speak(plan.text_weights)
        return own

    def _as_long(
        self,
        encode: Encode,
        arguments: Mapping[str, Any],
        found: Sequence[tuple[Any, ...]],
        weights: Sequence[Mapping[str, float]],
    ) -> list[tuple[Any, ...]]:
        """Return embeddings of as many tokens, with those of empty prompts behind the shorter ones.

        Args:
            encode: Encodes prompts.
            arguments: Of the pipeline's call.
            found: What was encoded.
            weights: Of the text encoders when it was.
        """
        longest = max(each[0].shape[1] for each in found)
        same = []
        for each, spoken in zip(found, weights, strict=True):
            tokens, negative, *others = each
            if tokens.shape[1] < longest:
                self._speak(spoken)
                empty = encode(**_said(arguments, "", negative=""))
                times = (longest - tokens.shape[1]) // empty[0].shape[1]
                tokens = torch.cat([tokens, *[empty[0]] * times], dim=1)
                negative = None if negative is None else torch.cat([negative, *[empty[1]] * times], dim=1)
            same.append((tokens, negative, *others))
        return same

    def _encoded(self, encode: Encode, arguments: Mapping[str, Any], text: Text) -> tuple[Any, ...]:
        self._speak(text.weights)
        changed = arguments if text.prompt is None else _said(arguments, text.prompt)
        tokens, *others = encode(**changed)
        if (unwanted := text.without) is not None:
            directions = self._embedded(encode, arguments, unwanted.words)
            # The first and the last token are the same for all words.
            tokens = projected_out(tokens, directions[1:-1], unwanted)
        return tokens, *others

    def _keep(self, name: str | None, tokens: Tensor, negative: Tensor | None, *pooled: Tensor) -> None:
        conditional = Embeddings(tokens, pooled[0] if pooled else None)
        self._conditional[name] = conditional
        if negative is not None:
            self._guided[name] = Embeddings(
                torch.cat([negative, tokens]), torch.cat([pooled[1], pooled[0]]) if pooled else None
            )

    def _request(self, encode: Encode, arguments: Mapping[str, Any]) -> Request:
        prompts = _texts(arguments["prompt"])
        negatives = _texts(arguments.get("negative_prompt")) or [""]
        return Request(
            prompts[0],
            negatives[0],
            embed=lambda text: self._embedded(encode, arguments, text),
            others=tuple(prompts[1:]),
        )

    def _embedded(self, encode: Encode, arguments: Mapping[str, Any], text: str) -> Tensor:
        """Return the base's embedding of a text, padding left out."""
        self._speak({})
        changed = {**arguments, "prompt": text, "do_classifier_free_guidance": False}
        changed["num_images_per_prompt"] = 1
        for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
            if name in changed:
                changed[name] = None
        tokens: Tensor = encode(**changed)[0][0]
        if isinstance(encode, PromptEncoder):
            length = encode.num_rows(text)
        else:
            length = len(self._pipe.tokenizer(text, truncation=True, max_length=len(tokens)).input_ids)
        return tokens[:length].float()


def _said(arguments: Mapping[str, Any], prompt: str, *, negative: str | None = None) -> dict[str, Any]:
    """Return the arguments with another prompt, and another negative prompt where there is one."""
    texts = {"prompt": prompt} | ({} if negative is None else {"negative_prompt": negative})
    changed = dict(arguments)
    for name, text in texts.items():
        given = arguments.get(name)
        if given is not None:
            changed[name] = text if isinstance(given, str) else [text] * len(given)
        if f"{name}_2" in changed:
            changed[f"{name}_2"] = None
    return changed


def _texts(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
