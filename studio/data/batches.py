"""Training samples, each drawn from (seed, epoch, global sample index) alone.

So a run does not depend on what else draws random numbers or on where it was resumed, and not on how an
optimizer step is divided into batches; with pictures of one size not on how many samples a step has either.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from studio.data.buckets import Box, Buckets, Size, cover_box
from studio.data.captions import draw_caption, full_caption, varies
from studio.data.order import Order
from studio.data.picture import Picture, PictureSet

Color = tuple[float, float, float]
"""Factors of brightness, contrast and saturation."""


@dataclass(frozen=True)
class Sample:
    """What one sample of training is.

    Attributes:
        index: Global sample index, counted over the whole run.
        picture: Position of its picture in the set.
        caption: Its caption, or an empty string where caption dropout took it.
        flip: Whether the picture is mirrored.
        size: Width and height that it is brought to, in pixels.
        box: Part cut from the picture: left, top, right, bottom in its own pixels.
        color: Factors of its colours, or None.
        timestep: Position in the noise schedule, ``0 .. num_timesteps - 1``.
        recurs: Whether the same pixels come again in later epochs.
    """

    index: int
    picture: int
    caption: str
    flip: bool
    size: Size
    box: Box
    color: Color | None
    timestep: int
    recurs: bool


class Samples:
    """The course of samples of one run.

    Args:
        pictures: What to train on, each with its treatment.
        seed: Of all that is drawn.
        buckets: Sizes that the pictures are brought to.
        num_timesteps: Length of the noise schedule, or of as much of it as is drawn from.
        first_timestep: The least that is drawn.
        group: Samples of one optimizer step, which are all of one size.
        stream: Courses of different names draw unrelated random numbers.
        noise_offset: Deviation of a number added to all noise of a channel, which lets a model learn to draw
            very dark and very bright pictures.

    Attributes:
        group: Samples of one optimizer step.
        largest: The largest size that pictures are brought to.

    Raises:
        DataError: If a picture fits no bucket.
    """

    def __init__(
        self,
        pictures: PictureSet,
        *,
        seed: int,
        buckets: Buckets,
        num_timesteps: int,
        first_timestep: int = 0,
        group: int = 1,
        stream: str = "",
        noise_offset: float = 0.0,
    ) -> None:
        self._noise_offset = noise_offset
        self.group = group
        self.pictures: Sequence[Picture] = pictures.pictures
        self._epoch_size = pictures.epoch_size
        self._seed = seed
        self._timesteps = first_timestep, num_timesteps
        self._stream = stream
        members = buckets.assign(self.pictures)
        self.largest: Size = max(members, key=lambda size: size[0] * size[1])
        self._order = Order(members, group=group, generator=self._generator)

    @property
    def recurring_captions(self) -> frozenset[str]:
        """The captions that come again in every epoch, which are worth keeping encoded."""
        found = (full_caption(picture) for picture in self.pictures if not varies(picture.treatment))
        return frozenset({"", *found})

    @property
    def captions_vary(self) -> bool:
        """Whether a picture's caption differs from sample to sample, caption dropout apart."""
        return any(varies(picture.treatment) for picture in self.pictures)

    @property
    def pixels_recur(self) -> bool:
        """Whether every epoch shows the same pixels, mirrored or not."""
        return all(picture.treatment.pixels_recur for picture in self.pictures)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of a global index."""
        epoch = index // self._epoch_size
        position, size = self._order[index]
        picture = self.pictures[position]
        treatment = picture.treatment
        generator = self._generator(epoch, index, "sample")
        # All are drawn whether used or not, so that an option changes nothing but what it names.
        dropped, flipped, along = (
            float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(3)
        )
        timestep = int(torch.randint(*self._timesteps, (), generator=generator))
        caption = draw_caption(picture, self._generator(epoch, index, "caption"))
        return Sample(
            index=index,
            picture=position,
            caption="" if dropped < treatment.caption_dropout else caption,
            flip=treatment.flip and flipped < 0.5,
            size=size,
            box=cover_box(picture.size, size, along=0.5 if treatment.center_crop else along),
            color=self._color(epoch, index, treatment.color_jitter),
            timestep=timestep,
            recurs=treatment.pixels_recur,
        )

    def noise(self, sample: Sample, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return two normal tensors, fp32 on the CPU: for the latents' draw and, offset, the diffusion."""
        generator = self._generator(sample.index // self._epoch_size, sample.index, "noise")
        posterior, noise, offset = (
            torch.randn(size, generator=generator) for size in (tuple(shape), tuple(shape), (shape[0], 1, 1))
        )
        return posterior, noise + self._noise_offset * offset if self._noise_offset else noise

    def pixels(self, sample: Sample) -> Tensor:
        """Return the sample's picture ``[3, height, width]`` in -1 to 1, fp32."""
        image = self.pictures[sample.picture].open()
        return to_tensor(image, box=sample.box, size=sample.size, flip=sample.flip, color=sample.color)

    def mask(self, sample: Sample, shape: Sequence[int]) -> Tensor | None:
        """Return the weights of the loss ``[1, h, w]`` in 0 to 1, fp32, or None where there is no mask.

        Args:
            sample: The sample.
            shape: Height and width of its latents; each weight is the mask's mean over a latent's area.
        """
        picture = self.pictures[sample.picture]
        image = picture.open_mask()
        if image is None:
            return None
        height, width = shape
        # As floats, so that a mean over an area is not rounded to a level.
        image = image.convert("F").resize((width, height), Image.Resampling.BOX, box=sample.box)
        if sample.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        floor = picture.treatment.unmasked_weight
        white = torch.from_numpy(numpy.array(image, dtype=numpy.float32))[None] / 255
        return floor + (1 - floor) * white

    def size_conditions(self, sample: Sample) -> tuple[int, int, int, int, int, int]:
        """Return SDXL's size conditions: original height, width, crop's top, left, target height, width.

        The crop counts in pixels of the picture resized so that it just covers its bucket. SDXL,
        arXiv:2307.01952, Sec. 2.2.
        """
        width, height = self.pictures[sample.picture].size
        left, top, right, bottom = sample.box
        across, down = sample.size[0] / (right - left), sample.size[1] / (bottom - top)
        if sample.flip:
            left = width - right
        return height, width, round(top * down), round(left * across), sample.size[1], sample.size[0]

    def _color(self, epoch: int, index: int, amount: float) -> Color | None:
        if not amount:
            return None
        generator = self._generator(epoch, index, "color")
        drawn = torch.rand(3, generator=generator, dtype=torch.float64)
        brightness, contrast, saturation = (1 + amount * (2 * drawn - 1)).tolist()
        return brightness, contrast, saturation

    def _generator(self, epoch: int, index: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self._seed, epoch, index, self._stream + purpose))


def derived_seed(seed: int, *parts: int | str) -> int:
    """Return a seed for one purpose: neighbouring seeds and indices give unrelated streams."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def to_tensor(
    image: Image.Image, *, box: Box, size: Size, flip: bool = False, color: Color | None = None
) -> Tensor:
    """Return a part of a picture, resized, as ``[3, height, width]`` in -1 to 1."""
    # Cutting and resizing in one call keeps a very long picture from being enlarged as a whole.
    part = image.resize(size, Image.Resampling.LANCZOS, box=box)
    if flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if color is not None:
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind, factor in zip(kinds, color, strict=True):
            part = kind(part).enhance(factor)
    values = torch.from_numpy(numpy.array(part, dtype=numpy.uint8))
    return values.permute(2, 0, 1).float() / 127.5 - 1.0
