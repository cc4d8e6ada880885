"""B-LoRA, arXiv:2403.14572: content and style of one picture, each learned by an attention block of its own.

Both blocks are trained together, so that each takes what the other leaves to it; the files of both can then
be used apart, and with those of other pictures.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field, ValidationInfo, field_validator

from studio.errors import TrainingError
from studio.registry import TRAINERS
from studio.specs.base import complete
from studio.specs.train import TrainSpec
from studio.trainers.low_rank import LowRankMethod, LowRankOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange
    from studio.trainers.base import ParameterGroup

SDXL_BLOCKS = {"content": ("up_blocks.0.attentions.0",), "style": ("up_blocks.0.attentions.1",)}
"""The paper's fourth and fifth block."""
_ROLES = "studio.roles"


class BLoraOptions(LowRankOptions):
    """Options of the method ``b-lora``."""

    rank: int = Field(
        64, ge=1, description="Inner width of the added matrices: more learns more and makes larger files."
    )
    content_blocks: tuple[str, ...] = Field(
        (),
        description="Attention blocks that learn the content, such as 'up_blocks.0.attentions.0'; default: "
        "SDXL's of the paper. On other bases an experiment: 'studio probe' measures their blocks.",
    )
    style_blocks: tuple[str, ...] = Field(
        (), validate_default=True, description="Attention blocks that learn the style."
    )

    @field_validator("train_text_encoder")
    @classmethod
    def _no_text_encoder(cls, asked: bool) -> bool:
        if asked:
            raise complete("content and style are learned by blocks of the UNet alone. Leave it out.")
        return asked

    @field_validator("style_blocks")
    @classmethod
    def _both_or_none(cls, style: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if bool(style) != bool(info.data.get("content_blocks")):
            raise complete("content_blocks and style_blocks are given together or not at all.")
        return style


@TRAINERS.register("b-lora")
class BLora(LowRankMethod):
    """Learn the content and the style of one picture apart, as two files that mix with others' (SDXL).

    Differs from the paper: the down matrices start as nn.Linear does, which at SDXL's width and rank 64 is
    the same spread.
    """

    Options = BLoraOptions
    kind = "lora"
    options: BLoraOptions

    @classmethod
    def parts(cls, spec: TrainSpec) -> tuple[str, ...]:
        """Return the roles."""
        return ("content", "style")

    @classmethod
    def learning_rate(cls, spec: TrainSpec) -> float:
        """Return the paper's."""
        return 5e-5

    @classmethod
    def remarks(cls, spec: TrainSpec, *, family: str, pictures: int) -> Sequence[str]:
        """Say where a run leaves the ground of the paper."""
        found = []
        if pictures > 1:
            found.append(
                f"b-lora is made for one picture, got {pictures}: it learns what they share, but "
                "nothing says in which block."
            )
        if family != "sdxl":
            found.append(
                "on bases other than SDXL b-lora is an experiment: none of their blocks is known to part "
                "content from style as cleanly. 'studio probe' measures what each carries."
            )
        return found

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> "Sequence[ParameterGroup]":
        """Add the layers to the blocks and return their parameters.

        Raises:
            TrainingError: As for LoRA, and if the base lacks SDXL's blocks and no others are named.
            UsageError: If a block that is named does not exist.
        """
        self._prompt = None if spec.metadata == "minimal" else spec.trigger or spec.prompt
        return super().prepare(pipe, spec)

    def blocks(self, pipe: "DiffusionPipeline") -> Collection[str]:
        """Return the blocks of both roles."""
        self._roles = roles_of(pipe, self.options)
        return [block for blocks in self._roles.values() for block in blocks]

    def change(self, layer: "nn.Module") -> "LoraChange":
        """Return the product."""
        return self.product(layer)

    def facts(self) -> dict[str, str]:
        """Return the blocks by role and, unless it is not to be told, the prompt that the file answers to."""
        prompt = {"modelspec.trigger_phrase": self._prompt} if self._prompt else {}
        return {**super().facts(), _ROLES: json.dumps(self._roles), **prompt}

    @classmethod
    def part(cls, adapter: "Adapter", word: str) -> "Adapter":
        """Return the changes of one role's blocks."""
        blocks = json.loads(adapter.metadata[_ROLES])[word]
        inside = tuple(f"unet.{block}." for block in blocks)
        return replace(
            adapter,
            changes={name: change for name, change in adapter.changes.items() if name.startswith(inside)},
            metadata={**adapter.metadata, "studio.role": word, _ROLES: json.dumps({word: blocks})},
        )


def roles_of(pipe: "DiffusionPipeline", options: BLoraOptions) -> dict[str, list[str]]:
    """Return a base's attention blocks by role.

    Raises:
        TrainingError: If a block would have both roles, or none are named and the base lacks the paper's.
        UsageError: If a block that is named does not exist.
    """
    from studio.models.architecture import architecture
    from studio.models.blocks import attention_blocks, choose_blocks

    names = list(attention_blocks(pipe.unet))
    if not options.content_blocks:
        wanted = {role: list(blocks) for role, blocks in SDXL_BLOCKS.items()}
        missing = [block for blocks in wanted.values() for block in blocks if block not in names]
        if missing or architecture(pipe) != "sdxl":
            lacking = f", which lacks {' and '.join(missing)}" if missing else ""
            raise TrainingError(
                f"b-lora knows the blocks of SDXL, the base is {architecture(pipe)}{lacking}. Choose an SDXL "
                "base, or name blocks with content_blocks and style_blocks (an experiment: 'studio probe' "
                f"measures what each carries). The base has {', '.join(names)}."
            )
        return wanted
    roles = {
        "content": choose_blocks(names, options.content_blocks, setting="content_blocks"),
        "style": choose_blocks(names, options.style_blocks, setting="style_blocks"),
    }
    if both := set(roles["content"]) & set(roles["style"]):
        raise TrainingError(
            f"{', '.join(sorted(both))} would learn both content and style. Give each block one role."
        )
    return roles
