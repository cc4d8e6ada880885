"""Let chosen attention blocks of a UNet read another prompt than the rest of it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def injected(blocks: Iterable[nn.Module], embeddings: Tensor) -> Iterator[None]:
    """Have the blocks' cross-attention read these embeddings for the length of a ``with`` block.

    All else reads what the UNet is given: the other blocks, the unconditional half of a batch that is doubled
    for guidance, and SDXL's pooled embedding, which enters with the timestep and belongs to no block.

    Args:
        blocks: Transformers of one UNet, such as ``attention_blocks`` finds.
        embeddings: Of the other prompts, ``[B, tokens, width]``, one for each conditional row.
    """

    def read_the_other(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: Tensor = kwargs["encoder_hidden_states"]
        unconditional = given[: len(given) - len(embeddings)]
        return args, kwargs | {"encoder_hidden_states": torch.cat([unconditional, embeddings.to(given)])}

    with ExitStack() as stack:
        for block in blocks:
            hook = block.register_forward_pre_hook(read_the_other, with_kwargs=True)
            stack.callback(hook.remove)
        yield


@dataclass(frozen=True)
class Call:
    """What one evaluation of the UNet was given."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def conditional(self, rows: int) -> "Call":
        """Return the last ``rows`` rows: those that read the prompt where the batch is doubled."""
        return Call(
            tuple(_last(value, rows) for value in self.args),
            {key: _last(value, rows) for key, value in self.kwargs.items()},
        )

    @torch.no_grad()
    def predict(self, unet: Any) -> Tensor:
        """Return what the UNet predicts, fp32 on the CPU."""
        prediction: Tensor = unet(*self.args, **{**self.kwargs, "return_dict": False})[0]
        return prediction.float().cpu()


@contextmanager
def recorded(unet: nn.Module) -> Iterator[list[Call]]:
    """Yield a list that fills with the calls of the UNet for the length of a ``with`` block."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))

    hook = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _last(value: Any, rows: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _last(item, rows) for key, item in value.items()}
    return value[-rows:] if isinstance(value, Tensor) and value.ndim else value
