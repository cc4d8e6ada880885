"""Clip skip: prompts are read from a layer of the text encoder before its last one.

The output of that layer passes the final layer norm, as in A1111 and kohya's trainer. diffusers' own
``clip_skip`` counts one less, and reaches for a part that transformers' text encoder no longer has.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from studio.errors import UsageError


def check_clip_skip(pipe: Any, clip_skip: int) -> None:
    """Check that a pipeline can read prompts so.

    Raises:
        UsageError: If it is SDXL's, or its text encoder has fewer layers.
    """
    if clip_skip == 1:
        return
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise UsageError(
            f"clip_skip: SDXL always reads the layer before the last of both text encoders, got {clip_skip}. "
            "Leave clip_skip out."
        )
    if clip_skip > (number := len(_layers(pipe))):
        raise UsageError(f"clip_skip must be at most {number}, the text encoder's layers, got {clip_skip}.")


@contextmanager
def clip_skipped(pipe: Any, clip_skip: int) -> Iterator[None]:
    """Have a pipeline read prompts from an earlier layer of its text encoder for the length of a block.

    Args:
        pipe: A pipeline of SD 1.x or SD 2.x.
        clip_skip: The layer, counted from the end; 1 changes nothing.

    Raises:
        UsageError: If the pipeline cannot.
    """
    if clip_skip == 1:
        yield
        return
    check_clip_skip(pipe, clip_skip)
    with ExitStack() as hooks:
        for layer in _layers(pipe)[1 - clip_skip :]:
            hooks.callback(layer.register_forward_hook(_pass_on).remove)
        yield


def clip_skip_of(pipe: Any) -> int:
    """Return from which layer a pipeline reads prompts now, counted from the end."""
    return 1 + sum(_pass_on in layer._forward_hooks.values() for layer in _layers(pipe))


def _pass_on(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Take a layer's input for its output; fits a forward hook."""
    return inputs[0]


def _layers(pipe: Any) -> list[nn.Module]:
    encoder = pipe.text_encoder
    # Text encoders with a projection hold the others' parts in a child.
    return list(getattr(encoder, "text_model", encoder).encoder.layers)
