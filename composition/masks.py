"""Masks of regions: from picture files and arrays, and what is left over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from studio.data.decode import open_mask
from studio.errors import CompositionError, DataError

LARGEST = 1024
"""Pixels of a side that are kept of a mask file: the latents of an 8192 px picture have as many."""


def read_masks(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return each adapter's mask as fp32 ``[1, 1, H, W]`` from 0 to 1, all of one size.

    Args:
        given: By adapter a picture file, white where the adapter acts, of at most 100 megapixels; or an array
            or tensor ``[H, W]``, also with leading axes of length 1: truth values, bytes, or numbers from 0
            to 1.

    Raises:
        CompositionError: If one cannot be read, has other values, or is black everywhere.
    """
    masks = {name: _from_file(name, mask) if isinstance(mask, Path) else _from_array(name, mask)
             for name, mask in given.items()}  # fmt: skip
    for name, mask in masks.items():
        if not float(mask.max()) > 0:
            raise CompositionError(
                f"regions: that of '{name}' is black everywhere, so '{name}' would never act. Paint white "
                "where it is to act."
            )
    size = [max((mask.shape[axis] for mask in masks.values()), default=1) for axis in (-2, -1)]
    return {name: F.interpolate(mask, size=size, mode="area") for name, mask in masks.items()}


def left_over(masks: Mapping[str, Tensor]) -> Tensor | None:
    """Return where masks of one size do not sum to 1, as a mask, or None where they do everywhere."""
    rest = (1 - torch.stack(list(masks.values())).sum(0)).clamp_min(0)
    # Tenths in fp32 do not sum to 1 exactly.
    return rest if float(rest.max()) > 1e-5 else None


def _from_file(name: str, path: Path) -> Tensor:
    if not path.is_file():
        raise CompositionError(f"regions: there is no picture file '{path}' for '{name}'.")
    try:
        image = open_mask(path)
    except DataError as error:
        raise CompositionError(f"regions: the mask of '{name}', {error}.") from None
    kept = image.resize((min(image.width, LARGEST), min(image.height, LARGEST)), Image.Resampling.BOX)
    return torch.from_numpy(numpy.array(kept, dtype=numpy.float32) / 255)[None, None]


def _from_array(name: str, given: Any) -> Tensor:
    mask = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(numpy.array(given))
    if mask.ndim < 2 or mask.shape[:-2].numel() != 1 or not mask.numel():
        raise CompositionError(
            f"regions: the mask of '{name}' has shape {list(mask.shape)}, one plane [height, width] was "
            "expected."
        )
    values = mask.float().reshape(1, 1, *mask.shape[-2:])
    if mask.dtype == torch.uint8:
        values = values / 255
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise CompositionError(
            f"regions: the mask of '{name}' has values from {float(values.min()):g} to "
            f"{float(values.max()):g}. Give truth values, bytes, or numbers from 0 to 1."
        )
    return values
