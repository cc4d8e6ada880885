"""What a run tells and writes on its way: events, adapters, samples, and the facts in its file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter
from studio.errors import OutputError
from studio.specs import Event, GenerateSpec, TrainSpec
from studio.trainers.loop import train

Spec = Callable[..., TrainSpec]


def test_events_tell_the_course(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    events: list[Event] = []
    train(
        tiny_sd(),
        spec(steps=3, warmup_steps=2, schedule="linear", train_text_encoder=True),
        on_event=events.append,
    )
    said = [event.message.partition(":")[0] for event in events if event.kind == "message"]
    assert said == ["Memory", "Measured"], "an estimate, and what the first steps showed"
    events = [event for event in events if event.kind != "message"]
    assert [event.kind for event in events] == ["report", "progress", "progress", "progress"]
    assert "Pictures: 4" in events[0].message and "lora in fp32 on cpu" in events[0].message
    assert [(event.step, event.total) for event in events[1:]] == [(1, 3), (2, 3), (3, 3)]
    assert [event.values["learning_rate"] for event in events[1:]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert events[3].values["text_encoder_learning_rate"] == pytest.approx(5e-4)
    assert all(event.values["loss"] > 0 and event.values["steps_per_second"] > 0 for event in events[1:])
    losses = [event.values["loss"] for event in events[1:]]
    assert events[1].values["loss_smoothed"] == pytest.approx(losses[0])
    assert min(losses) < events[3].values["loss_smoothed"] < max(losses)


def test_adapters_are_saved_on_the_way_and_load_again(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    pipe, events = tiny_sd(), []
    train(pipe, spec(steps=3, save_every=1), on_event=events.append)
    saved = [event.path for event in events if event.kind == "saved"]
    folder = tmp_path / "out" / "dog-run" / "adapters"
    assert saved == [folder / f"dog-step-00000{step}.safetensors" for step in (1, 2)]
    adapter = load_adapter(saved[1], base=pipe)
    assert adapter.metadata["ss_steps"] == "2" and len(adapter.changes) == 32
    with pytest.raises(OutputError, match=r"dog-run/adapters exists.*--resume.*--overwrite"):
        train(pipe, spec(steps=3, save_every=1))
    train(pipe, spec(steps=3, save_every=1, overwrite=True))


def test_the_samples_default_to_the_training_prompt(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    drawn: list[str] = []

    def draw(
        pipe: Any, adapter: Adapter | None, specs: Sequence[GenerateSpec], paths: Sequence[Path]
    ) -> list[Image.Image]:
        assert all(spec.raw_prompt for spec in specs), "as captions are read"
        drawn.extend(spec.prompt for spec in specs)
        return [Image.new("RGB", (8, 8)) for _ in specs]

    train(tiny_sd(), spec(steps=1, sample_every=1), sample=draw)
    assert drawn == ["sks dog", "sks dog"]


def test_the_metadata_describes_the_run_without_names_of_people_or_places(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    run = spec(steps=1, seed=7, author="me")
    metadata = train(tiny_sd(), run).metadata
    assert all(isinstance(value, str) for value in metadata.values())
    wanted = {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_seed": "7", "ss_steps": "1",
        "ss_unet_lr": "0.001", "ss_text_encoder_lr": "None", "ss_resolution": "(64, 64)",
        "ss_network_dim": "2", "modelspec.author": "me",
        "modelspec.prediction_type": "epsilon", "ss_output_name": "dog", "ss_mixed_precision": "no",
    }  # fmt: skip
    assert {key: metadata[key] for key in wanted} == wanted
    assert len(metadata["studio.base"]) == 64 and '"rank": 2' in metadata["studio.spec"]
    text = " ".join(metadata.values())
    assert "sks dog" not in text and str(tmp_path) not in text and "blue wall" not in text
