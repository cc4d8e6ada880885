"""A training picture, how samples are made of it, and sets of pictures."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from PIL import Image

from studio.data.decode import open_alpha, open_mask, open_picture
from studio.specs.data import DataSpec


@dataclass(frozen=True)
class Treatment:
    """How samples are made of a picture. Fields mean what those of the same name mean in ``DataSpec``."""

    trigger: str | None = None
    tag_separator: str = ","
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    flip: bool = False
    center_crop: bool = True
    color_jitter: float = 0.0
    unmasked_weight: float = 0.0

    @property
    def pixels_recur(self) -> bool:
        """Whether every epoch shows the same pixels, mirrored or not."""
        return self.center_crop and not self.color_jitter

    @classmethod
    def of(cls, spec: DataSpec) -> Self:
        """Return what a specification asks for."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(cls)})

    def fixed(self) -> Self:
        """Return the same without what is left to chance: for measurements."""
        return type(self)(
            trigger=self.trigger,
            tag_separator=self.tag_separator,
            keep_tags=self.keep_tags,
            unmasked_weight=self.unmasked_weight,
        )


PLAIN = Treatment()
"""The whole picture, its caption as it is, nothing left to chance."""


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Attributes:
        path: Its file.
        size: Width and height in pixels, upright (after the EXIF orientation).
        caption: What it shows.
        own_caption: Whether the caption is its own rather than one that stands in.
        repeats: How many times an epoch holds it.
        treatment: How samples are made of it.
        mask: File of its mask, its own where the alpha channel is the mask, or None.
    """

    path: Path
    size: tuple[int, int]
    caption: str
    own_caption: bool
    repeats: int = 1
    treatment: Treatment = PLAIN
    mask: Path | None = None

    def open(self) -> Image.Image:
        """Return the picture upright, in RGB, transparent parts on white."""
        return open_picture(self.path)

    def open_mask(self) -> Image.Image | None:
        """Return its mask in 8-bit grey, of the picture's size, or None where it has none."""
        if self.mask is None:
            return None
        return open_alpha(self.path) if self.mask == self.path else open_mask(self.mask)


@dataclass(frozen=True)
class PictureSet:
    """Pictures that are trained on together, in the order of their names.

    Attributes:
        folder: Where they lie, or the file that lists them.
        pictures: Those to train on.
        skipped: Pictures left out by request, each as ``name: reason``.
        ignored: Names of files and folders beside them that are not used.
        notes: Sentences on what may be unintended.
    """

    folder: Path
    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def epoch_size(self) -> int:
        """How many samples an epoch has: the pictures with their repeats."""
        return sum(picture.repeats for picture in self.pictures)

    def by_folder(self) -> dict[tuple[str, int], list[Picture]]:
        """Return the pictures by the name of their folder and how many times an epoch holds each."""
        folders: dict[tuple[str, int], list[Picture]] = {}
        for picture in self.pictures:
            folders.setdefault((picture.path.parent.name, picture.repeats), []).append(picture)
        return folders

    def fixed(self) -> "PictureSet":
        """Return the set as it is measured on: each picture once, nothing left to chance."""
        return replace(
            self,
            pictures=tuple(
                replace(picture, repeats=1, treatment=picture.treatment.fixed()) for picture in self.pictures
            ),
        )
