"""Class pictures: what the base itself draws of other subjects, trained on beside the user's own.

They keep the adapter from bending everything towards its subject: prior preservation, DreamBooth,
arXiv:2208.12242, Sec. 3.3.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from studio.data.batches import derived_seed
from studio.data.dataset import class_treatment
from studio.data.folder import read_pictures
from studio.data.picture import PictureSet
from studio.errors import Interrupted
from studio.specs.events import Event, OnEvent
from studio.specs.train import TrainSpec
from studio.trainers.run_folder import RunFolder
from studio.whole_file import whole_file

DrawFunction = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
"""Draws one picture of the plain base for each prompt and seed, as one batch."""


def class_folder(spec: TrainSpec) -> Path:
    """Return where a run's drawn class pictures lie, for the next run to find."""
    return RunFolder(spec.output).class_pictures


def draw_class_pictures(
    spec: TrainSpec,
    draw: DrawFunction,
    *,
    base: str,
    resolution: int,
    on_event: OnEvent,
    stop: Callable[[], bool] = lambda: False,
) -> PictureSet:
    """Draw the class pictures that are not there yet and return all of the run's.

    A file's name is a hash of what made it, so an interrupted or repeated run draws only what is missing and
    one with another prompt, base or size never takes a wrong one.

    Args:
        spec: Gives the prompts, their number, the seed and the denoising steps.
        draw: Draws on the plain base.
        base: The base's fingerprint.
        resolution: Side of the training pictures in pixels.
        on_event: Told of progress in pictures.
        stop: Asked before each batch of pictures.

    Raises:
        OutputError: If a picture cannot be written.
        Interrupted: If told to stop; the pictures drawn so far are kept.
    """
    folder = class_folder(spec)
    wanted: dict[Path, tuple[str, int]] = {}
    for number in range(spec.class_pictures):
        prompt = spec.class_prompts[number % len(spec.class_prompts)]
        seed = derived_seed(spec.seed, number, "class picture")
        made_with = (base, prompt, seed, resolution, spec.sample_steps)
        skipped = (f"clip skip {spec.clip_skip}",) if spec.clip_skip > 1 else ()
        key = "/".join(map(str, (*made_with, *skipped)))
        wanted[folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.png"] = (prompt, seed)
    missing = [(path, *made_of) for path, made_of in wanted.items() if not _complete(path)]
    for first in range(0, len(missing), spec.batch_size):
        if stop():
            raise Interrupted(
                f"stopped while drawing class pictures, before the first training step. {first} of "
                f"{len(missing)} are drawn and kept in {folder}; the same run goes on with the rest."
            )
        part = missing[first : first + spec.batch_size]
        images = draw([prompt for _, prompt, _ in part], [seed for _, _, seed in part])
        for (path, prompt, _), image in zip(part, images, strict=True):
            _write(path, image, prompt)
        on_event(
            Event(
                kind="progress",
                message="drawing class pictures",
                step=first + len(part),
                total=len(missing),
            )
        )
    found = read_pictures(folder, treatment=class_treatment(spec))
    names = {path.name for path in wanted}
    return PictureSet(folder, tuple(picture for picture in found.pictures if picture.path.name in names))


def _complete(path: Path) -> bool:
    # The caption is written last.
    return path.is_file() and path.with_suffix(".txt").is_file()


def _write(path: Path, image: Image.Image, prompt: str) -> None:
    with whole_file(path) as unfinished:
        image.save(unfinished, format="PNG")
    with whole_file(path.with_suffix(".txt")) as unfinished:
        unfinished.write_text(prompt, encoding="utf-8")
