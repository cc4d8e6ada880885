import json
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.data.dataset import DataSet, read_dataset
from studio.errors import DataError
from studio.specs import TrainSpec

Save = Callable[..., Path]
Spec = Callable[..., TrainSpec]


@pytest.fixture
def read(tmp_path: Path, save: Save, spec: Spec) -> Callable[..., DataSet]:
    """Return a function from a document and changed fields to what is read; there are dog/, cat/, reg/."""
    save(tmp_path / "dog" / "a.png", caption="one, two")
    save(tmp_path / "dog" / "b.png")
    save(tmp_path / "cat" / "c.png")
    save(tmp_path / "reg" / "d.png")

    def build(text: str, *, suffix: str = ".toml", **values: object) -> DataSet:
        file = tmp_path / f"set{suffix}"
        file.write_text(text, encoding="utf-8")
        return read_dataset(spec(data=file, **values))

    return build


def problems(read: Callable[..., DataSet], text: str, **values: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(text, **values)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


DOG = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'dog'\nclass_tokens = 'sks dog'\n"


def test_lower_levels_win_and_every_option_reaches_its_pictures(read: Callable[..., DataSet]) -> None:
    data = read(
        """
        [general]
        shuffle_caption = true
        keep_tokens = 1
        caption_extension = '.txt'
        num_repeats = 2
        [[datasets]]
        keep_tokens = 2
        flip_aug = true
        [[datasets.subsets]]
        image_dir = 'dog'
        class_tokens = 'sks dog'
        num_repeats = 10
        caption_prefix = 'best'
        caption_suffix = 'end'
        caption_separator = ';'
        [[datasets.subsets]]
        image_dir = 'cat'
        class_tokens = 'cat'
        keep_tokens = 3
        caption_dropout_rate = 0.1
        caption_tag_dropout_rate = 0.2
        random_crop = true
        shuffle_caption = false
        """
    )
    first, second, third = data.pictures.pictures
    assert [first.caption, second.caption, third.caption] == [
        "best one, two end",
        "best sks dog end",
        "cat",
    ]
    assert [first.repeats, third.repeats] == [10, 2]
    treatment = first.treatment
    assert (treatment.shuffle_tags, treatment.keep_tags, treatment.tag_separator) == (True, 2, ";")
    assert (treatment.flip, treatment.center_crop) == (True, True)
    treatment = third.treatment
    assert (treatment.shuffle_tags, treatment.keep_tags, treatment.tag_separator) == (False, 3, ",")
    assert (treatment.caption_dropout, treatment.tag_dropout, treatment.center_crop) == (0.1, 0.2, False)


def test_what_the_file_does_not_say_comes_from_the_run(read: Callable[..., DataSet]) -> None:
    data = read(DOG, flip=True, trigger="sks", prompt="not this")
    first, second = data.pictures.pictures
    assert first.treatment.flip and first.treatment.trigger == "sks"
    assert second.caption == "sks dog", "class_tokens are of the folder, the prompt is of the run"


def test_regularisation_folders_become_class_pictures_without_the_trigger(
    read: Callable[..., DataSet],
) -> None:
    text = DOG + "[[datasets.subsets]]\nimage_dir = 'reg'\nis_reg = true\nclass_tokens = 'dog'\n"
    data = read(text, trigger="sks", prompt="not this")
    assert data.class_pictures is not None
    (picture,) = data.class_pictures.pictures
    assert (picture.path.name, picture.caption, picture.treatment.trigger) == ("d.png", "dog", None)
    assert len(data.pictures.pictures) == 2
    with pytest.raises(DataError, match=r"regularisation folders \(is_reg\), and the run has class_prompts"):
        read(text, class_prompts=("a dog",))
    assert problems(
        read, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'reg'\nis_reg = true\nclass_tokens='x'"
    ) == ["all of its folders are regularisation folders. Add one with your pictures."]


def test_json_of_the_same_structure_is_read(read: Callable[..., DataSet]) -> None:
    document = {"datasets": [{"subsets": [{"image_dir": "dog", "class_tokens": "sks dog"}]}]}
    assert len(read(json.dumps(document), suffix=".json").pictures.pictures) == 2


def test_unknown_options_are_answered_with_the_nearest_name_all_at_once(read: Callable[..., DataSet]) -> None:
    text = """
        [general]
        shufle_caption = true
        [[datasets]]
        bach_size = 2
        [[datasets.subsets]]
        image_dir = 'dog'
        num_repeat = 2
        keep_tokens = -1
        flip_aug = 'yes'
    """
    assert set(problems(read, text)) == {
        "general.shufle_caption: unknown option. Did you mean 'shuffle_caption'?",
        "datasets.0.bach_size: unknown option. Did you mean 'batch_size'?",
        "datasets.0.subsets.0.keep_tokens: Input should be greater than or equal to 0, got -1.",
        "datasets.0.subsets.0.flip_aug: Input should be a valid boolean, got 'yes'.",
        "datasets.0.subsets.0.num_repeat: unknown option. Did you mean 'num_repeats'?",
    }


def test_options_without_a_meaning_here_are_listed_with_what_to_do(read: Callable[..., DataSet]) -> None:
    text = "[general]\ncolor_aug = true\ncache_info = false\n" + DOG + "face_crop_aug_range = [1.0, 2.0]\n"
    assert problems(read, text) == [
        "color_aug: has no meaning here; use the run's color_jitter (--color-jitter).",
        "face_crop_aug_range: has no meaning here; use random_crop, or crop the pictures.",
    ]
    assert read("[general]\ncolor_aug = false\nenable_wildcard = false\n" + DOG)


def test_settings_of_the_run_must_agree_with_it(read: Callable[..., DataSet]) -> None:
    text = "[general]\nbatch_size = 4\nenable_bucket = false\nbucket_no_upscale = true\n" + DOG
    text = text.replace("[[datasets]]\n", "[[datasets]]\nresolution = [512, 512]\n")
    assert problems(read, text) == [
        "batch_size: belongs to the run, where batch_size is 2. Give --batch-size 4, or take it out of the "
        "file.",
        "bucket_no_upscale: belongs to the run, where bucket_upscale is true. Give --no-bucket-upscale, or "
        "take it out of the file.",
        "enable_bucket: belongs to the run, where buckets is true. Give --no-buckets, or take it out of the "
        "file.",
        "resolution: belongs to the run, where resolution is left to the base. Give --resolution 512, or "
        "take it out of the file.",
    ]
    assert read(text, batch_size=4, buckets=False, bucket_upscale=False, resolution=512)


def test_data_sets_that_disagree_or_are_not_square_are_refused(read: Callable[..., DataSet]) -> None:
    text = DOG.replace("[[datasets]]\n", "[[datasets]]\nresolution = 512\n") + DOG.replace(
        "[[datasets]]\n", "[[datasets]]\nresolution = 768\n"
    ).replace("'dog'", "'cat'")
    assert problems(read, text, resolution=512) == [
        "resolution: one run has one for all data sets, got 512 and 768. Make them equal."
    ]
    oblong = DOG.replace("[[datasets]]\n", "[[datasets]]\nresolution = [512, 768]\n")
    assert problems(read, oblong) == ["resolution: must be one number or a square, got [512, 768]."]


def test_folders_that_are_not_there_are_all_named(read: Callable[..., DataSet], tmp_path: Path) -> None:
    (tmp_path / "above" / "1_x").mkdir(parents=True)
    text = (
        DOG.replace("'dog'", "'lost'") + DOG.replace("'dog'", "'above'") + DOG + "conditioning_data_dir = 'm'"
    )
    found = problems(read, text)
    assert len(found) == 3 and "lost does not exist" in found[0]
    assert "above holds no pictures; its sub-folders are not read" in found[1]
    assert "is not a folder" in found[2]


def test_masks_may_lie_in_another_folder_or_in_the_alpha_channel(
    read: Callable[..., DataSet], save: Save, tmp_path: Path
) -> None:
    mask = save(tmp_path / "masks of dogs" / "a.png", mode="L", color=255)
    data = read(DOG + "conditioning_data_dir = 'masks of dogs'")
    assert [picture.mask for picture in data.pictures.pictures] == [mask, None]
    save(tmp_path / "dog" / "a.png", mode="RGBA", color=(1, 2, 3, 200))
    data = read(DOG + "alpha_mask = true")
    assert [picture.mask for picture in data.pictures.pictures] == [tmp_path / "dog" / "a.png", None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[datasets", "cannot be read"),
        ("x = 1\n" + DOG, "x: unknown option"),
        ("[general]\n", "datasets: is required"),
        ("[[datasets]]\n[[datasets.subsets]]\nclass_tokens = 'x'", "image_dir: is required"),
    ],
    ids=["no-toml", "top-level", "no-data-sets", "no-folder"],
)
def test_a_file_that_cannot_be_used_says_why(read: Callable[..., DataSet], text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(text)
