"""What training is about to do with the pictures, in words, before it starts."""

import statistics
from collections.abc import Sequence

from studio.data.buckets import Buckets
from studio.data.captions import tag_frequency
from studio.data.dataset import DataSet
from studio.data.folder import count, named
from studio.data.picture import Picture, PictureSet
from studio.specs.train import TrainSpec

MOST_TAGS = 10


def report(data: DataSet, spec: TrainSpec, *, buckets: Buckets, processes: int = 1) -> str:
    """Return the report: pictures, sizes, captions, the amount of training, and what may be unintended.

    Args:
        data: The pictures; those that the base draws are known from the specification.
        spec: The run.
        buckets: Sizes that the pictures are brought to.
        processes: How many take a share of each step.

    Raises:
        DataError: If a picture fits no bucket.
    """
    pictures = data.pictures
    members = buckets.assign(pictures.pictures)
    samples = spec.steps * spec.batch_size * spec.gradient_accumulation * processes
    factors = {"accumulated": spec.gradient_accumulation, "processes": processes}
    times = "".join(f" x {number} {word}" for word, number in factors.items() if number > 1)
    sizes = [f"{width} x {height} px" for width, height in members]
    lines = [
        f"Pictures: {len(pictures.pictures)} in {pictures.folder}",
        *_repeats(pictures),
        f"Sizes: {_sizes(pictures)}",
        f"Captions: {_captions(pictures, spec)}",
        *_tags(pictures, spec),
        *_masks(pictures),
        f"Training: {sizes[0] if len(sizes) == 1 else f'{len(sizes)} sizes'}, {spec.steps} steps of batch "
        f"{spec.batch_size}{times} = {samples} samples, {samples / pictures.epoch_size:.3g} epochs",
    ]
    if len(sizes) > 1:
        shown = [f"{size}: {len(found)}" for size, found in zip(sizes, members.values(), strict=True)]
        lines.append(f"Buckets (samples an epoch): {', '.join(shown)}")
    if spec.has_class_pictures or data.class_pictures is not None:
        lines.append(_class_line(spec, data.class_pictures))
    if data.validation is not None:
        held = len(data.validation.pictures)
        lines.append(f"Held out: {count(held, 'picture')} of {data.validation.folder}")
    lines += _particulars(spec)
    return "\n".join(lines + [f"Warning: {text}" for text in warnings_of(pictures, spec, buckets=buckets)])


def warnings_of(pictures: PictureSet, spec: TrainSpec, *, buckets: Buckets) -> list[str]:
    """Return what may be unintended, one sentence each."""
    found = []
    small = [picture.path.name for picture in pictures.pictures if _enlarged(picture, buckets)]
    if small:
        found.append(f"smaller than they are trained in and enlarged: {named(small)}.")
    if pictures.skipped:
        found.append(f"left out: {named(pictures.skipped)}.")
    if pictures.ignored:
        found.append(f"lies there and is not used: {named(pictures.ignored)}.")
    found += pictures.notes
    if spec.warmup_steps >= spec.steps and spec.warmup_steps:
        found.append(
            f"warmup_steps ({spec.warmup_steps}) leave none of {spec.steps} steps at the full learning rate."
        )
    return found


def _particulars(spec: TrainSpec) -> list[str]:
    """Return a line on each thing that most runs do in one way, where this one does it in another."""
    found = []
    if spec.start_from is not None:
        found.append(f"Start: {spec.start_from}")
    if spec.clip_skip > 1:
        found.append(f"Clip skip: {spec.clip_skip}, in samples too; draw with the same")
    if spec.min_timestep is not None or spec.max_timestep is not None:
        end = "" if spec.max_timestep is None else f" up to {spec.max_timestep - 1}"
        found.append(f"Timesteps: from {spec.min_timestep or 0}{end}")
    return found


def _enlarged(picture: Picture, buckets: Buckets) -> bool:
    return any(side < wanted for side, wanted in zip(picture.size, buckets.fit(picture), strict=True))


def _repeats(pictures: PictureSet) -> list[str]:
    """Return a line on repeats where there are any: pictures and repeats of each folder."""
    if pictures.epoch_size == len(pictures.pictures):
        return []
    parts = [f"{name} {len(found)} x {repeats}" for (name, repeats), found in pictures.by_folder().items()]
    return [f"Repeats: {', '.join(parts)} = {pictures.epoch_size} samples an epoch"]


def _captions(pictures: PictureSet, spec: TrainSpec) -> str:
    own = sum(picture.own_caption for picture in pictures.pictures)
    parts = [f"{own} of their own"]
    others: dict[str, int] = {}
    for picture in pictures.pictures:
        if not picture.own_caption:
            others[picture.caption] = others.get(picture.caption, 0) + 1
    for caption, number in others.items():
        by = (
            "by the prompt"
            if caption == spec.prompt
            else "by folder or file"
            if caption
            else "only the trigger"
        )
        parts.append(f"{number} {by} '{caption or spec.trigger}'")
    return ", ".join(parts)


def _tags(pictures: PictureSet, spec: TrainSpec) -> list[str]:
    """Return the most frequent tags, where captions are made of several."""
    if not any(picture.treatment.tag_separator in picture.caption for picture in pictures.pictures):
        return []
    counted = tag_frequency(pictures.pictures)
    shown = ", ".join(f"'{tag}' {number}" for tag, number in counted.most_common(MOST_TAGS))
    rest = f", of {len(counted)} different ones" if len(counted) > MOST_TAGS else ""
    return [f"Tags (samples an epoch): {shown}{rest}"]


def _masks(pictures: PictureSet) -> list[str]:
    masked = sum(picture.mask is not None for picture in pictures.pictures)
    return [f"Masks: {masked} of {len(pictures.pictures)} pictures"] if masked else []


def _class_line(spec: TrainSpec, found: PictureSet | None) -> str:
    if found is not None:
        source = f"{len(found.pictures)} in {found.folder}"
    else:
        shown = named([f"'{prompt}'" for prompt in spec.class_prompts])
        source = f"{spec.class_pictures} drawn by the base of {shown}"
    return f"Class pictures: {source}; weight {spec.prior_weight:g}, a second forward half in each step"


def _sizes(pictures: PictureSet) -> str:
    """Return the smallest, median and largest picture by area."""
    by_area = sorted((picture.size for picture in pictures.pictures), key=lambda size: size[0] * size[1])
    median = statistics.median_low(range(len(by_area)))
    chosen: dict[str, Sequence[int]] = {
        "smallest": by_area[0],
        "median": by_area[median],
        "largest": by_area[-1],
    }
    if by_area[0] == by_area[-1] and len(set(by_area)) == 1:
        return f"all {by_area[0][0]} x {by_area[0][1]} px"
    return ", ".join(f"{word} {width} x {height} px" for word, (width, height) in chosen.items())
