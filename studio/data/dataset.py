"""All pictures of a run: those to train on, class pictures beside them, and those held out."""

import hashlib
from dataclasses import dataclass, replace

from studio.data.folder import Subset, read_subsets
from studio.data.kohya import is_kohya_file, read_kohya
from studio.data.layouts import find_subsets
from studio.data.picture import Picture, PictureSet, Treatment
from studio.errors import DataError
from studio.specs.train import TrainSpec


@dataclass(frozen=True)
class DataSet:
    """What a run reads.

    Attributes:
        pictures: To train on.
        class_pictures: The user's own class (regularisation) pictures, or None.
        validation: Held out, each once and with nothing left to chance, or None.
    """

    pictures: PictureSet
    class_pictures: PictureSet | None = None
    validation: PictureSet | None = None

    @property
    def all_pictures(self) -> tuple[Picture, ...]:
        """The pictures of all its sets."""
        sets = (self.pictures, self.class_pictures, self.validation)
        return tuple(picture for found in sets if found for picture in found.pictures)


def read_dataset(spec: TrainSpec) -> DataSet:
    """Return the pictures and captions that a specification names; decodes every picture once.

    Raises:
        DataError: If they cannot be used: every problem of a set is named.
    """
    template, class_template = _templates(spec)
    class_pictures = validation = None
    if is_kohya_file(spec.data):
        found = read_kohya(spec.data, spec, template, class_template)
        if found.class_pictures and spec.has_class_pictures:
            raise DataError(
                f"{spec.data} names regularisation folders (is_reg), and the run has class_prompts or "
                "class_data as well. Give one of the two."
            )
        subsets, class_subsets, class_root = found.pictures, found.class_pictures, spec.data
    else:
        subsets, class_subsets, class_root = find_subsets(spec.data, template), [], spec.data
    if spec.class_data is not None:
        class_root = spec.class_data
        class_subsets = find_subsets(class_root, class_template, setting="class_data")
    pictures = read_subsets(subsets, root=spec.data, skip_bad=spec.skip_bad)
    if class_subsets:
        class_pictures = read_subsets(
            class_subsets, root=class_root, skip_bad=spec.skip_bad, prompt_setting="class_prompts"
        )
    if spec.validation_data is not None:
        held = find_subsets(spec.validation_data, template, setting="validation_data")
        validation = read_subsets(held, root=spec.validation_data, skip_bad=spec.skip_bad)
    elif spec.validation_split:
        pictures, validation = hold_out(pictures, spec.validation_split, seed=spec.seed)
    return DataSet(pictures, class_pictures, validation.fixed() if validation else None)


def hold_out(pictures: PictureSet, share: float, *, seed: int) -> tuple[PictureSet, PictureSet]:
    """Return a set without some of its pictures, and these: at least one.

    Which ones hangs on the seed and each picture's name alone, so adding a picture moves few of them.

    Args:
        pictures: To choose from.
        share: Of the pictures to hold out, 0 to 1.
        seed: Of the choice.

    Raises:
        DataError: If none would be left to train on.
    """
    found = pictures.pictures
    number = max(1, round(share * len(found)))
    if number >= len(found):
        raise DataError(
            f"validation_split {share:g} holds out {number} of {len(found)} pictures, which leaves none to "
            "train on. Lower it, or give validation_data."
        )
    held = set(sorted(found, key=lambda picture: _lot(picture, seed))[:number])
    rest = tuple(picture for picture in found if picture not in held)
    return (
        replace(pictures, pictures=rest),
        PictureSet(pictures.folder, tuple(picture for picture in found if picture in held)),
    )


def class_treatment(spec: TrainSpec) -> Treatment:
    """Return how samples are made of class pictures: as of the others, without their trigger word."""
    return replace(Treatment.of(spec), trigger=None)


def _templates(spec: TrainSpec) -> tuple[Subset, Subset]:
    """Return what all folders of the user's pictures have in common, and all of class pictures."""
    template = Subset(
        spec.data,
        fallback=spec.prompt,
        extension=spec.caption_extension,
        treatment=Treatment.of(spec),
        masks=spec.masks,
    )
    caption = spec.class_prompts[0] if spec.class_prompts else None
    return template, replace(template, fallback=caption, treatment=class_treatment(spec))


def _lot(picture: Picture, seed: int) -> str:
    name = f"{picture.path.parent.name}/{picture.path.name}"
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
