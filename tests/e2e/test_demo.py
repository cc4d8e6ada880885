"""The main job on the shipped starter: an adapter of a subject it has never seen, measured by the evaluator.

The goals: the new subject in at least 60 % of pictures prompted with its token, and in at most 10 % without
the adapter. What it costs other subjects is measured by tests/benchmarks/bench_forgetting.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import studio
from studio.assets.builder.measure import draw
from studio.demo import PROMPT, PROMPTS, STEPS, DemoReport, run
from studio.demo import draw as draw_demo
from studio.models.base import starter_path
from studio.specs import AdapterUse, Event, GenerateSpec


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> Iterator[DemoReport]:
    yield run(tmp_path_factory.mktemp("demo"), on_event=events.append)


def test_the_demo_writes_what_it_promises(report: DemoReport, events: list[Event]) -> None:
    assert report.adapter.stat().st_size > 0 and report.diffusers_adapter.stat().st_size > 0
    assert Image.open(report.comparison).height == 3 * 128
    assert len([event for event in events if event.kind == "picture"]) == 2 * report.count
    for label in ("drawing without", "drawing with"):
        bar = [(event.step, event.total) for event in events if event.message == label]
        total = STEPS * report.count
        # The prompts of a seed are drawn at once.
        assert bar == [(step, total) for step in range(len(PROMPTS), total + 1, len(PROMPTS))]
    assert f"{report.hits_with} of {report.count}" in "\n".join(report.lines())


def test_the_adapter_draws_the_new_subject_and_the_base_does_not(report: DemoReport) -> None:
    assert report.hits_with >= 0.6 * report.count
    assert report.hits_without <= 0.1 * report.count


def test_pictures_of_an_earlier_demo_are_found_again(report: DemoReport) -> None:
    folder = report.comparison.parent / "without"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    again = draw_demo(folder, {}, seeds=report.count // len(PROMPTS))
    assert {path.name: path.stat().st_mtime_ns for path in again} == before


@pytest.mark.parametrize("which", ["adapter", "diffusers_adapter"])
def test_plain_diffusers_draws_the_same_picture(report: DemoReport, which: str) -> None:
    path: Path = getattr(report, which)
    ours = studio.load_base("starter", device="cpu", precision="fp32")
    with studio.compose(ours, {"robot": studio.load_adapter(path, base=ours)}):
        wanted = draw(ours, list(PROMPTS[:2]), seed=3, steps=4)
    theirs = StableDiffusionPipeline.from_pretrained(starter_path(), torch_dtype=torch.float32)
    theirs.load_lora_weights(path.parent, weight_name=path.name, use_safetensors=True)
    for one, other in zip(wanted, draw(theirs, list(PROMPTS[:2]), seed=3, steps=4), strict=True):
        difference = torch.tensor(list(one.tobytes())).int() - torch.tensor(list(other.tobytes())).int()
        assert difference.abs().max() <= 3  # of 255: merged and unmerged sums round differently in fp32


def test_a_picture_can_be_drawn_again_from_itself(report: DemoReport, tmp_path: Path) -> None:
    from studio.png import read_spec

    spec = GenerateSpec(
        prompt=PROMPT, adapters=(AdapterUse(path=report.adapter),), steps=6, seed=9, output=tmp_path / "a"
    )
    first = studio.generate(spec)[0]
    assert first.path is not None
    again = studio.generate(read_spec(first.path).model_copy(update={"output": tmp_path / "b"}))[0]
    assert first.image.tobytes() == again.image.tobytes()
