"""One call of the denoiser as data: take rows of it, give them another prompt, put several calls together."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from studio.errors import CompositionError

_EMBEDDINGS = "encoder_hidden_states"
_ADDED = "added_cond_kwargs"


@dataclass(frozen=True)
class Embeddings:
    """What a text encoder made of the prompts of a batch.

    Attributes:
        tokens: ``[B, tokens, width]``.
        pooled: ``[B, width]``, or None for bases that do not use it.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def rows(self, rows: slice) -> "Embeddings":
        """Return some rows."""
        return Embeddings(self.tokens[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser call by name.

    Every tensor whose first axis is as long as the batch (latents, prompt embeddings, added conditions,
    residuals of a ControlNet) goes with its rows; all else belongs to the whole batch.
    """

    arguments: Mapping[str, Any]

    @classmethod
    def bind(cls, denoiser: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Call":
        """Return the call that these arguments make."""
        # Of the class: what compiles or moves the module has replaced the forward of the object.
        forward = type(getattr(denoiser, "_orig_mod", denoiser)).forward
        bound = inspect.signature(forward).bind(denoiser, *args, **kwargs)
        _, *given = bound.arguments.items()
        return cls(dict(given))

    @property
    def latents(self) -> Tensor:
        """The latents ``[B, C, H, W]``."""
        sample: Tensor = self.arguments["sample"]
        return sample

    @property
    def prompt(self) -> Tensor:
        """The prompt embeddings ``[B, tokens, width]``."""
        prompt: Tensor = self.arguments[_EMBEDDINGS]
        return prompt

    def rows(self, rows: slice) -> "Call":
        """Return the same call for some rows only."""
        size = len(self.latents)

        def select(value: Tensor) -> Tensor:
            return value[rows] if value.ndim and len(value) == size else value

        return Call({name: _mapped(select, value) for name, value in self.arguments.items()})

    def at(self, latents: Tensor) -> "Call":
        """Return the same call for other latents."""
        return replace(self, arguments={**self.arguments, "sample": latents})

    def speaking(self, text: Embeddings) -> "Call":
        """Return the same call with other prompt embeddings."""
        changed = {**self.arguments, _EMBEDDINGS: text.tokens}
        if text.pooled is not None:
            changed[_ADDED] = {**self.arguments[_ADDED], "text_embeds": text.pooled}
        return replace(self, arguments=changed)

    def evaluate(self, forward: Callable[..., Any]) -> Tensor:
        """Return the denoiser's answer ``[B, C, H, W]``."""
        # Lists are given anew each time: the denoiser takes residuals out of them.
        answer: Tensor = forward(**{**_mapped(lambda value: value, self.arguments), "return_dict": False})[0]
        return answer

    def answered(self, answer: Tensor) -> Any:
        """Return an answer in the form that the call asked for."""
        if not self.arguments.get("return_dict", True):
            return (answer,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=answer)

    def check_prompt_alike(self, text: Embeddings) -> None:
        """Raise CompositionError unless embeddings are of the batch that the call is for."""
        if text.tokens.shape != self.prompt.shape:
            raise CompositionError(
                f"prompt embeddings of a branch are {list(text.tokens.shape)}, the denoiser was called with "
                f"{list(self.prompt.shape)}. Let the pipeline encode the prompts of each call itself."
            )


def joined(calls: Sequence[Call]) -> Call:
    """Return one call whose batch is those of the calls, one after the other."""
    if len(calls) == 1:
        return calls[0]
    first = calls[0]
    sizes = [len(call.latents) for call in calls]
    return Call(
        {
            name: _joined(value, [call.arguments[name] for call in calls], sizes)
            for name, value in first.arguments.items()
        }
    )


def _joined(first: Any, values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if isinstance(first, Tensor):
        if first.ndim and all(len(value) == size for value, size in zip(values, sizes, strict=True)):
            return torch.cat(list(values))
        return first
    if isinstance(first, Mapping):
        return {key: _joined(each, [value[key] for value in values], sizes) for key, each in first.items()}
    if isinstance(first, (list, tuple)):
        return type(first)(
            _joined(each, [value[place] for value in values], sizes) for place, each in enumerate(first)
        )
    return first


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value with every tensor in it changed, in new containers."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(change, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, each) for each in value)
    return value
