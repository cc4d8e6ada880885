"""The recipes of the embedded base models: what each is made of, how large it is and how long it learns."""

from dataclasses import dataclass, field, replace
from typing import Any

from studio.assets.builder.autoencoder import AutoencoderSpec
from studio.assets.builder.subjects import DRAFT, FULL, Vocabulary
from studio.assets.builder.text_encoder import TextSpec
from studio.assets.builder.training import Schedule


@dataclass(frozen=True)
class Recipe:
    """One embedded base model.

    Attributes:
        name: Of the model and its folder.
        vocabulary: What it is taught.
        size: Side of its pictures in pixels.
        renders: Pictures rendered ahead.
        textures: Photograph-like pictures that the autoencoder learns from besides.
        wordings: Captions of each picture's contents.
        autoencoder: Shape of the autoencoder.
        texts: Shapes of the text encoders: one makes a Stable Diffusion 1.x model, two an SDXL model.
        unet: Arguments of ``UNet2DConditionModel`` beyond those that follow from the rest.
        text_schedule: Training of the text encoders.
        decoder_schedule: Training of the decoder.
        unet_schedule: Training of the UNet.
        decoder_batch: Pictures per step of the decoder.
        batch: Samples per step of the UNet.
        aligned: Whether subjects sit on the grid of the autoencoder's patches.
    """

    name: str
    vocabulary: Vocabulary
    size: int
    renders: int
    textures: int
    wordings: int
    autoencoder: AutoencoderSpec
    texts: tuple[TextSpec, ...]
    unet: dict[str, Any] = field(hash=False)
    text_schedule: Schedule
    decoder_schedule: Schedule
    unet_schedule: Schedule
    decoder_batch: int
    batch: int
    aligned: bool = False

    @property
    def cells(self) -> int | None:
        """Cells of the grid that subjects are aligned to."""
        return self.size // self.autoencoder.patch if self.aligned else None

    @property
    def sdxl(self) -> bool:
        """Whether it is made of SDXL's classes."""
        return len(self.texts) == 2

    @property
    def unet_shape(self) -> dict[str, Any]:
        """Arguments of ``UNet2DConditionModel``."""
        channels = self.autoencoder.channels
        shape: dict[str, Any] = {
            "sample_size": self.size // self.autoencoder.patch,
            "in_channels": channels,
            "out_channels": channels,
            "cross_attention_dim": sum(text.width for text in self.texts),
        }
        if self.sdxl:
            # SDXL's blocks, under SDXL's names; only widths and depths differ.
            shape |= {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": _TIME_ID_WIDTH,
                "projection_class_embeddings_input_dim": 6 * _TIME_ID_WIDTH + self.texts[1].width,
            }
        return shape | self.unet


_TIME_ID_WIDTH = 32  # of the sinusoid of each of SDXL's six time ids

STARTER_DRAFT = Recipe(
    name="starter-draft",
    vocabulary=DRAFT,
    size=64,
    renders=61_440,
    textures=0,
    wordings=64,
    autoencoder=AutoencoderSpec(patch=4, channels=12, widths=(32, 96, 96), groups=16),
    texts=(TextSpec(),),
    unet={"block_out_channels": (64, 128, 160, 128), "attention_head_dim": 4},
    text_schedule=Schedule(steps=500, warmup=50, decay=0.9),
    decoder_schedule=Schedule(steps=2500, rate=2e-3, decay=0.9, weight_decay=1e-3),
    unet_schedule=Schedule(steps=4800, ema=0.998),
    decoder_batch=32,
    batch=32,
)
"""What fits an hour on two CPU cores."""

STARTER_XL_DRAFT = replace(
    STARTER_DRAFT,
    name="starter-xl-draft",
    texts=(TextSpec(), TextSpec(projected=True)),
    unet={
        "block_out_channels": (64, 96, 128),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": 4,
    },
)
"""The same with SDXL's classes and blocks, to try on what is made for those."""

STARTER = Recipe(
    name="starter",
    vocabulary=FULL,
    size=128,
    renders=65_536,
    textures=8192,
    wordings=48,
    autoencoder=AutoencoderSpec(),
    texts=(TextSpec(),),
    # One head where the picture is finest: the maps there cost most.
    unet={"block_out_channels": (64, 128, 160, 128), "attention_head_dim": (1, 4, 4, 4)},
    text_schedule=Schedule(steps=2000, warmup=100, decay=0.9),
    decoder_schedule=Schedule(steps=4000, rate=2e-3, decay=0.9, weight_decay=1e-3),
    unet_schedule=Schedule(steps=30_000, rate=1e-3, warmup=500, ema=0.999),
    decoder_batch=8,
    batch=512,
    aligned=True,
)

STARTER_XL = replace(
    STARTER,
    name="starter-xl",
    texts=(TextSpec(), TextSpec(width=192, heads=6, projected=True)),
    unet={
        "block_out_channels": (64, 128, 192),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 6),
    },
)

RECIPES = {recipe.name: recipe for recipe in (STARTER_DRAFT, STARTER_XL_DRAFT, STARTER, STARTER_XL)}
