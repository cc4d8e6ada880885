"""What training is about to do with the pictures, in words, before it starts."""

import statistics

from studio.data.folder import NAMED, PictureSet
from studio.specs.train import TrainSpec


def report(pictures: PictureSet, spec: TrainSpec, *, resolution: int) -> str:
    """Return the report: pictures, sizes, captions, the amount of training, and what may be unintended.

    Args:
        resolution: Side of the training pictures in pixels.
    """
    number = len(pictures.pictures)
    own = sum(picture.own_caption for picture in pictures.pictures)
    samples = spec.steps * spec.batch_size * spec.gradient_accumulation
    accumulated = f" x {spec.gradient_accumulation} accumulated" if spec.gradient_accumulation > 1 else ""
    captions = f"{own} of their own" + (
        f", {number - own} by the prompt '{spec.prompt}'" if own < number else ""
    )
    lines = [
        f"Pictures: {number} in {pictures.folder}",
        f"Sizes: {_sizes(pictures)}",
        f"Captions: {captions}",
        f"Training: {resolution} x {resolution} px, {spec.steps} steps of batch {spec.batch_size}"
        f"{accumulated} = {samples} samples, {samples / number:.3g} epochs",
    ]
    return "\n".join(
        lines + [f"Warning: {text}" for text in warnings_of(pictures, spec, resolution=resolution)]
    )


def warnings_of(pictures: PictureSet, spec: TrainSpec, *, resolution: int) -> list[str]:
    """Return what may be unintended, one sentence each."""
    found = []
    small = [picture.path.name for picture in pictures.pictures if min(picture.size) < resolution]
    if small:
        found.append(f"smaller than {resolution} px and enlarged: {_some(small)}.")
    if pictures.skipped:
        found.append(f"left out: {_some(pictures.skipped)}.")
    if pictures.ignored:
        found.append(f"neither a picture nor a caption of one: {_some(pictures.ignored)}.")
    if spec.warmup_steps >= spec.steps and spec.warmup_steps:
        found.append(
            f"warmup_steps ({spec.warmup_steps}) leave none of {spec.steps} steps at the full learning rate."
        )
    return found


def _sizes(pictures: PictureSet) -> str:
    """Return the smallest, median and largest picture by area."""
    by_area = sorted((picture.size for picture in pictures.pictures), key=lambda size: size[0] * size[1])
    median = statistics.median_low(range(len(by_area)))
    chosen = {"smallest": by_area[0], "median": by_area[median], "largest": by_area[-1]}
    if by_area[0] == by_area[-1] and len(set(by_area)) == 1:
        return f"all {by_area[0][0]} x {by_area[0][1]} px"
    return ", ".join(f"{word} {width} x {height} px" for word, (width, height) in chosen.items())


def _some(names: list[str] | tuple[str, ...]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
