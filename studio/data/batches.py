"""Training samples, each drawn from (seed, epoch, global sample index) alone.

So a run does not depend on batch size against accumulation, on what else draws random numbers, or on where
it was resumed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from studio.data.folder import Picture, PictureSet
from studio.specs.train import TrainSpec


@dataclass(frozen=True)
class Sample:
    """What one sample of training is.

    Attributes:
        index: Global sample index, counted over the whole run.
        picture: Position of its picture in the set.
        caption: Its caption, or an empty string where caption dropout took it.
        flip: Whether the picture is mirrored.
        box: Square cut from the picture: left, top, right, bottom in its own pixels.
        timestep: Position in the noise schedule, ``0 .. num_timesteps - 1``.
        variant: Equal for samples whose pixels are equal, None where every sample has its own crop.
    """

    index: int
    picture: int
    caption: str
    flip: bool
    box: tuple[int, int, int, int]
    timestep: int
    variant: tuple[int, bool] | None


class Samples:
    """The course of samples of one run.

    Args:
        pictures: What to train on.
        spec: Gives seed, flip, center_crop and caption_dropout.
        resolution: Side of the training pictures in pixels.
        num_timesteps: Length of the noise schedule.
    """

    def __init__(self, pictures: PictureSet, spec: TrainSpec, *, resolution: int, num_timesteps: int) -> None:
        self.pictures: Sequence[Picture] = pictures.pictures
        self.resolution = resolution
        self._spec = spec
        self._num_timesteps = num_timesteps
        self._orders: dict[int, list[int]] = {}

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of a global index; each epoch holds every picture once, in its own order."""
        epoch, place = divmod(index, len(self.pictures))
        position = self._order(epoch)[place]
        picture = self.pictures[position]
        generator = self._generator(epoch, index, "sample")
        # All are drawn whether used or not, so that an option changes nothing but what it names.
        dropped, flipped, along = (
            float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(3)
        )
        timestep = int(torch.randint(self._num_timesteps, (), generator=generator))
        flip = self._spec.flip and flipped < 0.5
        return Sample(
            index=index,
            picture=position,
            caption="" if dropped < self._spec.caption_dropout else picture.caption,
            flip=flip,
            box=square_box(picture.size, along=0.5 if self._spec.center_crop else along),
            timestep=timestep,
            variant=(position, flip) if self._spec.center_crop else None,
        )

    def noise(self, sample: Sample, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return two standard normal tensors, fp32 on the CPU: for the latents' draw and the diffusion."""
        generator = self._generator(sample.index // len(self.pictures), sample.index, "noise")
        posterior = torch.randn(tuple(shape), generator=generator)
        return posterior, torch.randn(tuple(shape), generator=generator)

    def pixels(self, sample: Sample) -> Tensor:
        """Return the sample's picture ``[3, resolution, resolution]`` in -1 to 1, fp32."""
        image = self.pictures[sample.picture].open()
        return to_tensor(image, box=sample.box, resolution=self.resolution, flip=sample.flip)

    def size_conditions(self, sample: Sample) -> tuple[int, int, int, int, int, int]:
        """Return SDXL's size conditions: original height, width, crop's top, left, target height, width.

        The crop counts in pixels of the picture resized so that its short side is the resolution. SDXL,
        arXiv:2307.01952, Sec. 2.2.
        """
        width, height = self.pictures[sample.picture].size
        left, top, right, bottom = sample.box
        if sample.flip:
            left = width - right
        scale = self.resolution / (bottom - top)
        return height, width, round(top * scale), round(left * scale), self.resolution, self.resolution

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = self._generator(epoch, 0, "order")
            # Only the epochs of one batch are alive at a time.
            self._orders = {key: order for key, order in self._orders.items() if key >= epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.pictures), generator=generator).tolist()
        return self._orders[epoch]

    def _generator(self, epoch: int, index: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self._spec.seed, epoch, index, purpose))


def derived_seed(seed: int, *parts: int | str) -> int:
    """Return a seed for one purpose: neighbouring seeds and indices give unrelated streams."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def square_box(size: tuple[int, int], *, along: float = 0.5) -> tuple[int, int, int, int]:
    """Return the largest square in a picture.

    Args:
        size: Width and height in pixels.
        along: Where it lies on the longer side, from 0 at the left or top to 1.
    """
    width, height = size
    side = min(width, height)
    left, top = round((width - side) * along), round((height - side) * along)
    return left, top, left + side, top + side


def to_tensor(
    image: Image.Image, *, box: tuple[int, int, int, int], resolution: int, flip: bool = False
) -> Tensor:
    """Return a square of a picture, resized, as ``[3, resolution, resolution]`` in -1 to 1."""
    # Cutting and resizing in one call keeps a very long picture from being enlarged as a whole.
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    if flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(numpy.array(square, dtype=numpy.uint8))
    return values.permute(2, 0, 1).float() / 127.5 - 1.0
