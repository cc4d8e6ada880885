"""kohya's data set files (``--dataset_config``), TOML or JSON, read into our own terms.

What describes pictures and captions is taken over; what describes the run must agree with the run's own
settings, so that nothing is decided in two places.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio.data.folder import Subset, check_folder
from studio.data.masks import is_picture_file
from studio.errors import DataError
from studio.registry import nearest
from studio.specs.train import TrainSpec

FOREIGN = {
    "cache_info": "nothing like it is needed",
    "caption_dropout_every_n_epochs": "use caption_dropout_rate",
    "color_aug": "use the run's color_jitter (--color-jitter)",
    "custom_attributes": "no method reads them",
    "enable_wildcard": "write the captions out",
    "face_crop_aug_range": "use random_crop, or crop the pictures",
    "keep_tokens_separator": "use keep_tokens",
    "metadata_file": "write its captions into a metadata.jsonl in the folder, or into .txt files",
    "network_multiplier": "use repeats",
    "resize_interpolation": "pictures are always resized with Lanczos' filter",
    "secondary_separator": "use caption_separator",
    "skip_image_resolution": "move small pictures away, or set the run's bucket_upscale to false",
    "token_warmup_min": "all tags are used from the start",
    "token_warmup_step": "all tags are used from the start",
    "validation_seed": "the run's seed (--seed) chooses the pictures",
}
"""Options of kohya's that have no meaning here, and what to do instead."""


class _SubsetOptions(BaseModel):
    """Options that may stand at every level."""

    model_config = ConfigDict(extra="forbid", strict=True)
    num_repeats: int = Field(1, ge=1)
    shuffle_caption: bool = False
    keep_tokens: int = Field(0, ge=0)
    caption_separator: str = Field(",", min_length=1)
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_extension: str = ".txt"
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    flip_aug: bool = False
    random_crop: bool = False
    alpha_mask: bool = False


class _DatasetOptions(_SubsetOptions):
    """Options of a data set or of all of them; those that describe the run are compared with it."""

    batch_size: int = 1
    resolution: int | tuple[int, int] | list[int] = 512
    enable_bucket: bool = False
    bucket_reso_steps: int = 64
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_no_upscale: bool = False
    validation_split: float = 0.0


class _Subset(_SubsetOptions):
    image_dir: str
    class_tokens: str | None = None
    is_reg: bool = False
    conditioning_data_dir: str | None = None


class _Dataset(_DatasetOptions):
    subsets: list[_Subset] = Field(min_length=1)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    general: _DatasetOptions = _DatasetOptions()
    datasets: list[_Dataset] = Field(min_length=1)


_MODELS = (_Document, _Dataset, _Subset)
_TREATMENT = {
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tags",
    "caption_separator": "tag_separator",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "flip_aug": "flip",
}
_SUBSET = {
    "num_repeats": "repeats",
    "caption_prefix": "prefix",
    "caption_suffix": "suffix",
    "caption_extension": "extension",
}
_RUN = {
    "batch_size": "batch_size",
    "resolution": "resolution",
    "enable_bucket": "buckets",
    "bucket_reso_steps": "bucket_step",
    "min_bucket_reso": "bucket_min",
    "max_bucket_reso": "bucket_max",
    "bucket_no_upscale": "bucket_upscale",
    "validation_split": "validation_split",
}


@dataclass(frozen=True)
class KohyaSubsets:
    """What a data set file names.

    Attributes:
        pictures: Folders to train on.
        class_pictures: Regularisation folders.
    """

    pictures: list[Subset]
    class_pictures: list[Subset]


def read_kohya(file: Path, spec: TrainSpec, template: Subset, class_template: Subset) -> KohyaSubsets:
    """Return the folders of a data set file; relative paths start at the file.

    Args:
        file: TOML, or JSON of the same structure.
        spec: What the file's settings of the run are compared with.
        template: What the file does not say of folders to train on.
        class_template: What it does not say of regularisation folders.

    Raises:
        DataError: Lists every problem: unknown options with the nearest name, options without a meaning here,
            wrong values, settings that disagree with the run, missing folders.
    """
    given = _load(file)
    problems = _foreign(given)
    try:
        document = _Document.model_validate(given)
    except ValidationError as error:
        raise DataError(_text(file, [*problems, *(_problem(item) for item in error.errors())])) from None
    found = KohyaSubsets([], [])
    asked: dict[str, list[Any]] = {}
    for dataset in document.datasets:
        above = document.general.model_dump(exclude_unset=True) | dataset.model_dump(
            exclude_unset=True, exclude={"subsets"}
        )
        for name in _RUN.keys() & above.keys():
            asked.setdefault(name, []).append(above[name])
        for subset in dataset.subsets:
            values = above | subset.model_dump(exclude_unset=True)
            kind, common = (
                (found.class_pictures, class_template) if subset.is_reg else (found.pictures, template)
            )
            try:
                kind.append(_subset(file, values, common))
            except DataError as error:
                problems.append(str(error))
    problems += _disagreements(asked, spec)
    if not problems and not found.pictures:
        problems.append("all of its folders are regularisation folders. Add one with your pictures.")
    if problems:
        raise DataError(_text(file, problems))
    return found


def is_kohya_file(path: Path) -> bool:
    """Say whether a path is a file that ``read_kohya`` is for."""
    return path.suffix.lower() in (".toml", ".json") and path.is_file()


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        document = tomllib.loads(text) if file.suffix.lower() == ".toml" else json.loads(text)
    except ValueError as error:
        raise DataError(f"the data set file {file} cannot be read: {error}.") from None
    if not isinstance(document, dict):
        raise DataError(f"the data set file {file} must hold a table with 'datasets'.")
    return document


def _foreign(document: dict[str, Any]) -> list[str]:
    """Take out the options that have no meaning here and return one line for each that asks for something."""
    problems: dict[str, None] = {}
    datasets = [entry for entry in _tables(document.get("datasets"))]
    subsets = [entry for dataset in datasets for entry in _tables(dataset.get("subsets"))]
    for table in (*_tables([document.get("general")]), *datasets, *subsets):
        for name in FOREIGN.keys() & table.keys():
            if table.pop(name):
                problems[f"{name}: has no meaning here; {FOREIGN[name]}."] = None
    return sorted(problems)


def _tables(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _subset(file: Path, values: Mapping[str, Any], template: Subset) -> Subset:
    folder = file.parent / values["image_dir"]
    check_folder(folder, "image_dir")
    if not any(map(is_picture_file, folder.iterdir())):
        raise DataError(f"image_dir {folder} holds no pictures; its sub-folders are not read.")
    treatment = {_TREATMENT[name]: value for name, value in values.items() if name in _TREATMENT}
    if "random_crop" in values:
        treatment["center_crop"] = not values["random_crop"]
    masks = values.get("conditioning_data_dir")
    if masks and not (file.parent / masks).is_dir():
        raise DataError(f"conditioning_data_dir {file.parent / masks} is not a folder.")
    own = {_SUBSET[name]: value for name, value in values.items() if name in _SUBSET}
    return replace(
        template,
        folder=folder,
        fallback=values.get("class_tokens") or template.fallback,
        masks="alpha" if values.get("alpha_mask") else template.masks,
        mask_folder=file.parent / masks if masks else None,
        treatment=replace(template.treatment, **treatment),
        **own,
    )


def _disagreements(asked: Mapping[str, list[Any]], spec: TrainSpec) -> list[str]:
    """Return one line for each setting of the run that the file and the run have differently."""
    problems = []
    for name in sorted(asked):
        values = [_ours(name, value) for value in asked[name]]
        field = _RUN[name]
        flag = f"--{field.replace('_', '-')}"
        if any(value != values[0] for value in values):
            shown = " and ".join(str(value) for value in dict.fromkeys(map(str, asked[name])))
            problems.append(f"{name}: one run has one for all data sets, got {shown}. Make them equal.")
        elif isinstance(values[0], list):
            problems.append(f"{name}: must be one number or a square, got {asked[name][0]}.")
        elif values[0] != getattr(spec, field):
            how = f"{flag} {values[0]}"
            if isinstance(values[0], bool):
                how = flag if values[0] else f"--no-{field.replace('_', '-')}"
            problems.append(
                f"{name}: belongs to the run, where {field} is {_shown(getattr(spec, field))}. Give {how}, "
                "or take it out of the file."
            )
    return problems


def _ours(name: str, value: Any) -> Any:
    if name == "bucket_no_upscale":
        return not value
    if name == "resolution" and not isinstance(value, int):
        sides = list(value)
        return sides[0] if len(set(sides)) == 1 else sides
    return value


def _shown(value: Any) -> str:
    return (
        "left to the base" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        level = _MODELS[min(2, sum(isinstance(part, int) for part in item["loc"]))]
        model = _DatasetOptions if item["loc"][0] == "general" else level
        known = [*model.model_fields, *FOREIGN]
        return f"{place}: unknown option.{nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{place}: is required."
    return f"{place}: {item['msg']}, got {item['input']!r}."


def _text(file: Path, problems: list[str]) -> str:
    return f"the data set file {file} cannot be used:\n  " + "\n  ".join(problems)
