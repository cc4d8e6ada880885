"""Prior preservation: class pictures drawn or given, and their part of the loss."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.data.cache import MemoryCache
from studio.errors import DataError, Interrupted, OutputError, TrainingError, UsageError
from studio.specs import Event, GenerateSpec, TrainSpec, parse_spec
from studio.trainers.class_pictures import class_folder, draw_class_pictures
from studio.trainers.loop import train
from studio.trainers.prompts import Prompts
from studio.trainers.step import Batch, TrainStep

Spec = Callable[..., TrainSpec]
DRAWN = {"class_prompts": ("a cat", "a house"), "class_pictures": 5, "batch_size": 2}


class Painter:
    """Draws every picture in one colour and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        self.asked += list(zip(prompts, seeds, strict=True))
        return [Image.new("RGB", (64, 64), "green") for _ in prompts]

    def sample(
        self, pipe: Any, adapter: Adapter | None, specs: Sequence[GenerateSpec], paths: Sequence[Path]
    ) -> list[Image.Image]:
        assert adapter is None, "class pictures show what the plain base draws"
        assert not paths and all(spec.raw_prompt for spec in specs)
        return self([spec.prompt for spec in specs], [spec.seed for spec in specs])


def drawn(spec: TrainSpec, painter: Painter, **changed: Any) -> list[str]:
    given: dict[str, Any] = {"base": "abc", "resolution": 64, "on_event": lambda event: None}
    return [picture.caption for picture in draw_class_pictures(spec, painter, **(given | changed)).pictures]


def random_batch(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn((size, 4, 8, 8), generator=generator) for _ in range(2))
    timesteps = torch.randint(1000, (size,), generator=generator)
    sizes = torch.zeros((size, 6), dtype=torch.long)
    return Batch(latents, noise, timesteps, ("dog",) * size, sizes, torch.full((size,), 1 / size))


def test_the_loss_is_the_subjects_mean_plus_the_weighted_mean_of_the_prior(
    tiny_sd: Callable[[], Any],
) -> None:
    pipe = tiny_sd()
    step = TrainStep(pipe, prompts=Prompts(pipe, cache=MemoryCache()))
    subject, prior = random_batch(2, 1), random_batch(3, 2)
    with torch.no_grad():
        wanted = float(step(subject)) + 0.3 * float(step(prior))
        assert float(step(subject.with_prior(prior, 0.3))) == pytest.approx(wanted, rel=1e-5)  # fp32 sums


def test_prompts_take_turns_with_seeds_of_their_own(spec: Spec) -> None:
    painter = Painter()
    captions = drawn(spec(**DRAWN), painter)
    assert [prompt for prompt, _ in painter.asked] == ["a cat", "a house", "a cat", "a house", "a cat"]
    assert len({seed for _, seed in painter.asked}) == 5
    assert sorted(captions) == ["a cat"] * 3 + ["a house"] * 2


def test_only_what_is_missing_is_drawn_again(spec: Spec) -> None:
    run, first, second, third = spec(**DRAWN), Painter(), Painter(), Painter()
    drawn(run, first)
    lost = sorted(class_folder(run).glob("*.txt"))[0]
    lost.unlink()
    assert len(drawn(run, second)) == 5 and len(second.asked) == 1 and second.asked[0] in first.asked
    assert len(drawn(run, third)) == 5 and not third.asked


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"class_prompts": ("a dog", "a house")}, {}),
        ({"seed": 5}, {}),
        ({"sample_steps": 9}, {}),
        ({}, {"base": "def"}),
        ({}, {"resolution": 32}),
    ],
    ids=["prompt", "seed", "steps", "base", "resolution"],
)
def test_pictures_made_in_another_way_are_not_taken(
    spec: Spec, values: dict[str, Any], arguments: dict[str, Any]
) -> None:
    drawn(spec(**DRAWN), Painter())
    painter = Painter()
    captions = drawn(spec(**(DRAWN | values)), painter, **arguments)
    assert len(captions) == 5 and painter.asked, "those of the other run lie in the same folder"


def test_a_stop_keeps_what_is_drawn_and_says_so(spec: Spec) -> None:
    run, painter = spec(**DRAWN), Painter()
    with pytest.raises(Interrupted, match=r"2 of 5 are drawn and kept in .*goes on with the rest"):
        drawn(run, painter, stop=lambda: len(painter.asked) >= 2)
    again = Painter()
    drawn(run, again)
    assert len(again.asked) == 3


def test_an_unwritable_folder_is_one_clear_error(spec: Spec) -> None:
    run = spec(**DRAWN)
    class_folder(run).parent.mkdir(parents=True)
    class_folder(run).write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        drawn(run, Painter())


def test_class_pictures_change_training_and_the_base_is_given_back(
    tiny_sd: Callable[[], Any], spec: Spec
) -> None:
    pipe, painter, events = tiny_sd(), Painter(), []
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    alone = train(pipe, spec())
    beside = train(pipe, spec(**DRAWN), sample=painter.sample, on_event=events.append)
    again = train(pipe, spec(**DRAWN), sample=Painter().sample)
    weaker = train(pipe, spec(**DRAWN, prior_weight=0.25), sample=Painter().sample)

    def ups(adapter: Adapter) -> torch.Tensor:
        return torch.cat([change.up.flatten() for change in adapter.changes.values()])  # type: ignore[attr-defined]

    assert torch.equal(ups(beside), ups(again)), "the same class pictures give the same adapter"
    assert not torch.equal(ups(alone), ups(beside)) and not torch.equal(ups(weaker), ups(beside))
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    report = next(event.message for event in events if event.kind == "report")
    assert report is not None and "Class pictures: 5 drawn by the base of 'a cat', 'a house'" in report
    progress = [event for event in events if event.kind == "progress" and not event.values]
    assert [(event.step, event.total) for event in progress] == [(2, 5), (4, 5), (5, 5)]


def test_a_folder_of_class_pictures_is_used_as_it_is(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (64, 64), "green").save(folder / "1.png")
    events: list[Event] = []
    run = spec(class_data=folder, class_prompts=("a dog",))
    train(tiny_sd(), run, on_event=events.append)
    assert any(f"Class pictures: 1 in {folder}" in (event.message or "") for event in events)
    assert not class_folder(run).exists()
    with pytest.raises(DataError, match=r"without a caption.* Give class_prompts \(--class-prompts\)"):
        train(tiny_sd(), spec(class_data=folder))
    with pytest.raises(DataError, match=r"does not exist.* class_data \(--class-data\)"):
        train(tiny_sd(), spec(class_data=tmp_path / "nowhere"))


def test_class_pictures_that_nothing_draws_are_refused_before_any_work(
    tiny_sd: Callable[[], Any], spec: Spec
) -> None:
    with pytest.raises(TrainingError, match="nothing to draw class pictures with"):
        train(tiny_sd(), spec(**DRAWN))


def test_an_empty_class_prompt_is_refused(tmp_path: Path) -> None:
    given = {"data": tmp_path, "output": "dog.safetensors", "class_prompts": ["a cat", " "]}
    with pytest.raises(UsageError, match=r"class_prompts: one is empty. .* or leave it out"):
        parse_spec(TrainSpec, given)


def test_several_class_prompts_beside_a_folder_are_refused(tmp_path: Path) -> None:
    given = {"data": tmp_path, "output": "dog.safetensors", "class_data": tmp_path}
    with pytest.raises(UsageError, match=r"class_data: .*at most one class prompt is used, got 2"):
        parse_spec(TrainSpec, given | {"class_prompts": ["a cat", "a dog"]})
