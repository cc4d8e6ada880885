"""What adapter files say of their training, to other tools and to whom they are handed on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.adapters.header import read_header
from studio.errors import TrainingError, UsageError
from studio.models.clip_skip import clip_skip_of
from studio.specs import Event, GenerateSpec, TrainSpec
from studio.trainers.loop import train
from studio.trainers.outputs import save_trained

Spec = Callable[..., TrainSpec]


@pytest.fixture(scope="module")
def base(tiny_sd: Callable[[], Any]) -> Any:
    """Return one base for many runs: each gives it back as it was."""
    return tiny_sd()


@pytest.fixture
def kohya_folders(tmp_path: Path) -> Path:
    """Return two of kohya's folders: one square picture three times, two others once."""
    for name, sizes in {"3_sks dog": [(64, 64)], "1_park": [(64, 64), (128, 64)]}.items():
        folder = tmp_path / "kohya" / name
        folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size, "red").save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text("dog, grass" if number else "dog, night")
    return tmp_path / "kohya"


def test_other_tools_find_what_they_show(base: Any, spec: Spec, kohya_folders: Path) -> None:
    run = spec(
        data=kohya_folders, steps=1, batch_size=1, resolution=64, bucket_step=32, metadata="full",
        optimizer_options={"betas": [0.9, 0.99]}, min_timestep=10, clip_skip=2, noise_offset=0.05,
    )  # fmt: skip
    said = train(base, run).metadata
    wanted = {
        "ss_num_train_images": "5", "ss_num_reg_images": "0", "ss_sd_model_name": "starter",
        "ss_optimizer": "adamw(betas=(0.9, 0.99))", "ss_clip_skip": "2", "ss_noise_offset": "0.05",
        "ss_min_snr_gamma": "5", "ss_lr_scheduler": "cosine", "modelspec.timestep_range": "10,1000",
        "ss_enable_bucket": "True", "ss_flip_aug": "False",
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    # As A1111 reads them.
    buckets = json.loads(said["ss_bucket_info"])["buckets"].values()
    found = sorted((*bucket["resolution"], bucket["count"]) for bucket in buckets)
    assert found == [(64, 64, 4), (96, 32, 1)]
    assert json.loads(said["ss_dataset_dirs"]) == {
        "1_park": {"n_repeats": 1, "img_count": 2},
        "3_sks dog": {"n_repeats": 3, "img_count": 1},
    }
    assert json.loads(said["ss_tag_frequency"])["1_park"] == {"dog": 2, "night": 1, "grass": 1}


def test_how_much_is_said_is_the_users_choice(base: Any, spec: Spec, kohya_folders: Path) -> None:
    given = {"data": kohya_folders, "steps": 1, "batch_size": 1, "author": "me", "trigger": "zzz"}
    usual = train(base, spec(**given)).metadata
    assert json.loads(usual["ss_dataset_dirs"])["1"]["img_count"] == 2
    text = " ".join(usual.values())
    assert "zzz" in text
    assert not any(word in text for word in ("park", "sks dog", "grass", str(kohya_folders)))
    run = spec(**given, metadata="minimal", overwrite=True)
    adapter = train(base, run)
    file = save_trained(adapter, run.output, run, base=base, started=0.0, overwrite=True)[""]
    said = read_header(file).metadata
    assert "zzz" not in " ".join(said.values()) and said["modelspec.author"] == "me"
    assert {key for key in said if key.startswith(("ss_", "studio."))} == {
        "ss_base_model_version", "ss_v2", "ss_output_name", "ss_network_module", "ss_network_dim",
        "ss_network_alpha", "ss_network_args", "ss_network_dropout",
        "studio.base", "studio.base.fp16", "studio.base.bf16", "studio.base.fp16.bf16",
        "studio.format_version",
    }  # fmt: skip


def test_a_file_says_when_it_was_trained(base: Any, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    run = spec(steps=1)
    adapter = train(base, run)
    file = save_trained(adapter, run.output, run, base=base, started=1.5, overwrite=True)[""]
    said = read_header(file).metadata
    assert (said["ss_training_started_at"], said["ss_training_finished_at"]) == ("1.5", "1700000000.0")
    assert "ss_training_started_at" not in adapter.metadata


def test_clip_skip_trains_the_layers_that_are_read_and_holds_in_samples(base: Any, spec: Spec) -> None:
    seen: list[int] = []
    events: list[Event] = []

    def draw(
        pipe: Any, adapter: Adapter | None, specs: Sequence[GenerateSpec], paths: Sequence[Path]
    ) -> list[Image.Image]:
        seen.extend([clip_skip_of(pipe), specs[0].clip_skip])
        return [Image.new("RGB", (8, 8)) for _ in specs]

    run = spec(steps=1, clip_skip=2, train_text_encoder=True, sample_every=1, class_prompts=("dog",))
    adapter = train(base, run.model_copy(update={"class_pictures": 1}), sample=draw, on_event=events.append)
    moved = {name for name, change in adapter.changes.items() if change.up.any()}  # type: ignore[attr-defined]
    layers = {name.split(".layers.")[1][0] for name in moved if name.startswith("text_encoder.")}
    assert layers == {"0"} and set(seen) == {2} and clip_skip_of(base) == 1
    assert "Clip skip: 2, in samples too" in events[0].message


def test_what_a_base_does_not_have_is_refused(base: Any, spec: Spec, tiny_sdxl: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="clip_skip: SDXL always reads"):
        train(tiny_sdxl(), spec(clip_skip=2))
    with pytest.raises(TrainingError, match="max_timestep must be at most 1000 for this base, got 1001"):
        train(base, spec(max_timestep=1001))
    with pytest.raises(ValueError, match=r"must be greater than min_timestep \(500\), got 500"):
        spec(min_timestep=500, max_timestep=500)
