"""The attention blocks of a UNet: the parts that read the prompt, under their names."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from studio.errors import UsageError
from studio.registry import nearest

_BLOCK = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+")
_ORDER = ("down_blocks", "mid_block", "up_blocks")


def attention_blocks(unet: Any) -> dict[str, nn.Module]:
    """Return the transformers that read the prompt by name, in the order in which the UNet runs them."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if _BLOCK.fullmatch(name) and hasattr(module, "transformer_blocks")
    }
    # Modules are listed as they were registered, the middle last.
    return dict(sorted(found.items(), key=lambda item: _ORDER.index(item[0].partition(".")[0])))


def choose_blocks(names: Collection[str], prefixes: Sequence[str], *, setting: str) -> list[str]:
    """Return the names that lie under the dotted prefixes, in their own order.

    Args:
        names: Of all attention blocks.
        prefixes: "up_blocks.1.attentions.0" for one block, "up_blocks.1" for all of that level.
        setting: What gave the prefixes, for the message.

    Raises:
        UsageError: If a prefix holds no attention block; the message lists them.
    """
    for prefix in prefixes:
        if not any(_holds(prefix, name) for name in names):
            raise UsageError(
                f"{setting}: the base has no attention block '{prefix}'.{nearest(prefix, list(names))} "
                f"It has {', '.join(names)}."
            )
    return [name for name in names if any(_holds(prefix, name) for prefix in prefixes)]


def _holds(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
