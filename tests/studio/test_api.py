import gc
import hashlib
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import studio
from studio import api, bases
from studio.errors import BaseModelError, OutputError, UsageError
from studio.png import read_spec
from studio.specs import Event, GenerateSpec, TrainSpec, parse_spec
from studio.trainers import run


def training(base: str, data: Path, output: Path, **values: Any) -> TrainSpec:
    given = {"steps": 3, "rank": 2, "batch_size": 1, "warmup_steps": 0, "prompt": "sks disc", **values}
    return parse_spec(TrainSpec, {"base": base, "data": data, "output": output, **given})


def drawing(base: str, output: Path, **values: Any) -> GenerateSpec:
    return parse_spec(
        GenerateSpec, {"base": base, "prompt": "a disc", "steps": 3, "output": output, **values}
    )


def weights_of(base: str) -> dict[str, torch.Tensor]:
    pipe = bases.cached_base(base, "auto", "fp32")
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def pixels(image: Image.Image) -> "np.ndarray[Any, np.dtype[np.int16]]":
    return np.asarray(image).astype(np.int16)


@pytest.fixture(scope="module")
def trained(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> api.TrainResult:
    folder = tmp_path_factory.mktemp("trained")
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    spec = training(tiny_base, folder, folder / "disc.safetensors", steps=6, learning_rate=0.3)
    return api.train(spec)


def test_training_writes_the_adapter_and_leaves_the_base_alone(
    tiny_base: str, pictures: Path, tmp_path: Path
) -> None:
    before = weights_of(tiny_base)
    events: list[Event] = []
    result = studio.train(
        training(tiny_base, pictures, tmp_path / "new" / "x.safetensors"), on_event=events.append
    )
    assert result.path == tmp_path / "new" / "x.safetensors" and result.path.is_file()
    assert len(result.losses) == 3 and not result.stopped
    assert events[0].kind == "report"
    assert [event.kind for event in events][-2:] == ["saved", "finished"]
    after = weights_of(tiny_base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loaded = studio.load_adapter(result.path, base=bases.cached_base(tiny_base, "auto", "fp32"))
    assert loaded.changes.keys() == result.adapter.changes.keys()


def test_what_the_optimizer_held_is_free_after_a_run(
    tiny_base: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run.optimizer_of
    seen: list[weakref.ref[Any]] = []

    def noted(*args: Any) -> torch.optim.Optimizer:
        optimizer = made(*args)
        # As accelerate's wrapper is to its optimizer where there is a loss scaler.
        optimizer.itself = optimizer  # type: ignore[attr-defined]
        seen.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(run, "optimizer_of", noted)
    gc.disable()
    try:
        api.train(training(tiny_base, pictures, tmp_path / "x.safetensors", steps=1))
        assert seen and all(each() is None for each in seen)
    finally:
        gc.enable()


def test_an_existing_output_is_refused_before_anything_is_loaded(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"x.safetensors' exists.*--overwrite"):
        api.train(training("no/such-base", pictures, output))
    assert output.read_bytes() == b"mine"
    with pytest.raises(BaseModelError):
        api.train(training(str(tmp_path / "no-such-base"), pictures, output, overwrite=True))
    assert output.read_bytes() == b"mine"


def test_a_training_whose_output_cannot_be_written_any_more_is_kept_in_its_folder(
    tiny_base: str, pictures: Path, tmp_path: Path
) -> None:
    spec = training(tiny_base, pictures, tmp_path / "x.safetensors", steps=1)

    def in_the_way(event: Event) -> None:
        if event.kind == "progress":
            spec.output.write_bytes(b"another's")

    with pytest.raises(OutputError, match=r"x.safetensors exists.* kept as .*x-run.adapters.x.safetensors"):
        api.train(spec, on_event=in_the_way)
    assert spec.output.read_bytes() == b"another's"
    kept = tmp_path / "x-run" / "adapters" / "x.safetensors"
    assert studio.load_adapter(kept, base=bases.cached_base(tiny_base, "auto", "fp32")).changes


def test_a_stopped_training_saves_what_it_has(tiny_base: str, pictures: Path, tmp_path: Path) -> None:
    done: list[int] = []

    def count(event: Event) -> None:
        if event.kind == "progress":
            done.append(event.step)

    spec = training(tiny_base, pictures, tmp_path / "x.safetensors", steps=50)
    result = api.train(spec, on_event=count, stop=lambda: bool(done) and done[-1] >= 2)
    assert result.stopped and len(result.losses) == 2 and result.path.is_file()


def test_samples_carry_what_draws_them_again(tiny_base: str, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    asked = {"sample_every": 1, "save_every": 2, "learning_rate": 0.1}
    prompt = "a (red:1.3) disc --n fog --d 7 --s 1 --w 72 --l 2"
    api.train(training(tiny_base, pictures, output, sample_prompts=[prompt], **asked))
    folder = tmp_path / "x-run"
    drawn = [Image.open(folder / "samples" / f"00000{step}-0.png") for step in range(4)]
    assert all(image.size == (72, 64) for image in drawn)
    on_the_way = [folder / "adapters" / f"x-step-00000{step}.safetensors" for step in (1, 2)]
    for step, files in enumerate(([], on_the_way[:1], on_the_way[1:], [output])):
        spec = read_spec(folder / "samples" / f"00000{step}-0.png")
        assert [use.path for use in spec.adapters] == files
        assert (spec.negative_prompt, spec.seed, spec.steps, spec.guidance_scale) == ("fog", 7, 1, 2)
        # What is not written when the picture is, has no hash.
        assert set(spec.expected_hashes) - {tiny_base} == set(map(str, on_the_way[1:] if step == 2 else []))
    said: list[Event] = []
    again = read_spec(folder / "samples" / "000002-0.png").model_copy(update={"output": tmp_path / "again"})
    (result,) = api.generate(again, on_event=said.append)
    # The adapter's file rounds its numbers to fp16.
    assert np.abs(pixels(result.image) - pixels(drawn[2])).max() <= 1
    assert not [event for event in said if event.kind == "message"], "base and adapter are the expected ones"
    text = drawn[1].info["parameters"]
    assert text.startswith("a (red:1.3) disc <lora:x-step-000001:1>\nNegative prompt: fog\nSteps: 1, ")
    assert "CFG scale: 2, Seed: 7, Size: 72x64" in text and "Lora hashes" not in text
    assert "Lora hashes" in drawn[2].info["parameters"] and "<lora:x:1>" in drawn[3].info["parameters"]
    assert np.abs(pixels(drawn[3]) - pixels(drawn[0])).max() > 1


def test_pictures_are_named_by_index_and_seed_and_carry_their_spec(tiny_base: str, tmp_path: Path) -> None:
    events: list[Event] = []
    results = studio.generate(drawing(tiny_base, tmp_path / "out", seed=5, count=2), on_event=events.append)
    assert [result.path and result.path.name for result in results] == ["0000-5.png", "0001-6.png"]
    assert [event.path for event in events if event.kind == "picture"] == [result.path for result in results]
    steps = [event.step for event in events if event.kind == "progress"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert results[1].infotext == Image.open(tmp_path / "out" / "0001-6.png").info["parameters"]
    assert "Seed: 6, Size: 64x64" in results[1].infotext


@pytest.mark.parametrize("scheduler", ["default", "euler-ancestral"])
def test_the_batch_size_does_not_change_a_picture(tiny_base: str, tmp_path: Path, scheduler: str) -> None:
    one = api.generate(drawing(tiny_base, tmp_path / "one", count=3, scheduler=scheduler))
    three = api.generate(drawing(tiny_base, tmp_path / "three", count=3, scheduler=scheduler, batch_size=2))
    for left, right in zip(one, three, strict=True):
        # One level: sums of another batch size round differently.
        assert np.abs(pixels(left.image) - pixels(right.image)).max() <= 1
    assert np.abs(pixels(one[0].image) - pixels(one[1].image)).max() > 10


def test_a_picture_makes_itself_again(tiny_base: str, trained: api.TrainResult, tmp_path: Path) -> None:
    spec = drawing(
        tiny_base,
        tmp_path / "first",
        adapters=[f"{trained.path}:0.7"],
        seed=3,
        count=2,
        scheduler="euler-ancestral",
        guidance_scale=3,
        negative_prompt="dull",
        width=72,
    )
    first = api.generate(spec)
    again = read_spec(tmp_path / "first" / "0001-4.png").model_copy(update={"output": tmp_path / "again"})
    second = api.generate(again)
    assert len(second) == 1 and second[0].seed == 4
    assert np.array_equal(pixels(first[1].image), pixels(second[0].image))
    assert first[1].infotext == second[0].infotext


def test_an_adapter_and_its_weight_change_the_picture_and_nothing_stays(
    tiny_base: str, trained: api.TrainResult, tmp_path: Path
) -> None:
    before = weights_of(tiny_base)

    def draw(name: str, *adapters: str) -> "np.ndarray[Any, np.dtype[np.int16]]":
        return pixels(api.generate(drawing(tiny_base, tmp_path / name, adapters=adapters))[0].image)

    plain, half, full = draw("a"), draw("b", f"{trained.path}:0.5"), draw("c", str(trained.path))
    assert not np.array_equal(plain, half) and not np.array_equal(half, full)
    assert np.array_equal(plain, draw("d", f"{trained.path}:0"))
    after = weights_of(tiny_base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapters_hash_is_that_of_its_tensors(
    tiny_base: str, trained: api.TrainResult, tmp_path: Path
) -> None:
    (result,) = api.generate(drawing(tiny_base, tmp_path, adapters=[str(trained.path)]))
    data = trained.path.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert f'Lora hashes: "disc: {digest[:12]}"' in result.infotext
    assert "Model: tiny" in result.infotext and "<lora:disc:1>" in result.infotext


def test_existing_pictures_are_refused_all_before_the_first(tiny_base: str, tmp_path: Path) -> None:
    (tmp_path / "0001-1.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"0001-1.png' exists"):
        api.generate(drawing(tiny_base, tmp_path, count=2))
    assert [path.name for path in tmp_path.iterdir()] == ["0001-1.png"]
    assert len(api.generate(drawing(tiny_base, tmp_path, count=2, overwrite=True))) == 2


def test_an_output_that_cannot_be_a_folder_is_refused(tiny_base: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot make the folder"):
        api.generate(drawing(tiny_base, tmp_path / "file" / "out"))


def test_a_stopped_drawing_keeps_the_finished_pictures(tiny_base: str, tmp_path: Path) -> None:
    events: list[Event] = []
    results = api.generate(
        drawing(tiny_base, tmp_path, count=3),
        on_event=events.append,
        stop=lambda: sum(event.kind == "progress" for event in events) >= 5,
    )
    assert [result.path for result in results] == sorted(tmp_path.iterdir()) and len(results) == 1
    assert any("stopped after 1 of 3" in event.message for event in events)


def test_the_last_words_of_a_long_prompt_count(tiny_base: str, tmp_path: Path) -> None:
    texts = [f"{'word ' * 80}{last}" for last in ("fox", "cat")]
    (one,), (other,) = (
        api.generate(drawing(tiny_base, tmp_path / text[-3:], prompt=text, count=1)) for text in texts
    )
    assert one.image.tobytes() != other.image.tobytes()


def test_a_batch_yields_every_prompt_with_every_seed_as_they_come(
    tiny_base: str, trained: api.TrainResult
) -> None:
    before = weights_of(tiny_base)
    results = studio.generate_batch(
        ["a disc", "a box"],
        seeds=range(2),
        base=tiny_base,
        adapters={trained.path: 0.5},
        steps=2,
        batch_size=3,
    )
    first = next(results)
    assert first.path is None and first.image.size == (64, 64)
    rest = list(results)
    order = [(result.prompt, result.seed) for result in (first, *rest)]
    assert order == [("a disc", 0), ("a disc", 1), ("a box", 0), ("a box", 1)]
    after = weights_of(tiny_base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_that_is_given_up_restores_the_base(tiny_base: str, trained: api.TrainResult) -> None:
    before = weights_of(tiny_base)
    results = studio.generate_batch(
        ["a disc"], seeds=range(3), base=tiny_base, adapters={trained.path: 1}, steps=1
    )
    next(results)
    during = weights_of(tiny_base)
    assert any(not torch.equal(before[name], during[name]) for name in before)
    results.close()  # type: ignore[attr-defined]
    after = weights_of(tiny_base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_writes_its_pictures_where_it_is_told_to(tiny_base: str, tmp_path: Path) -> None:
    events: list[Event] = []
    given: dict[str, Any] = {"seeds": [4, 9], "base": tiny_base, "steps": 1, "output": tmp_path / "out"}
    results = list(studio.generate_batch(["a disc", "a box"], on_event=events.append, **given))
    names = ["0001-4.png", "0001-9.png", "0002-4.png", "0002-9.png"]
    assert [result.path for result in results] == [tmp_path / "out" / name for name in names]
    assert [event.path for event in events if event.kind == "picture"] == [result.path for result in results]
    assert [event.step for event in events if event.kind == "progress"] == [1, 2, 3, 4]
    assert {event.total for event in events} == {4}
    for result in results:
        assert result.path
        again = read_spec(result.path)
        assert (again.prompt, again.seed) == (result.prompt, result.seed)
    assert list(studio.generate_batch(["a disc"], **given)) == []
    with pytest.raises(OutputError, match=r"0001-4.png \(prompt\)"):
        studio.generate_batch(["a fox"], **given)
    assert len(list(studio.generate_batch(["a fox"], overwrite=True, **given))) == 2


def test_a_batch_checks_its_values_at_once() -> None:
    with pytest.raises(UsageError, match=r"steps: .*0"):
        studio.generate_batch(["x"], steps=0)
    with pytest.raises(UsageError, match="must be a list of texts"):
        studio.generate_batch("x")


def test_the_last_base_is_kept_and_only_that_one(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(bases, "load_base", lambda base, **_: loads.append(base) or object())
    bases._BASES.clear()
    for base in ("a", "a", "b", "a"):
        bases.cached_base(base, "auto", "auto")
    bases._BASES.clear()
    assert loads == ["a", "b", "a"]


def test_a_cache_on_disk_lies_in_the_workspace_unless_a_folder_is_given(
    tiny_base: str, pictures: Path, tmp_path: Path
) -> None:
    from studio.workspace import workspace

    kept = workspace().encoded
    api.train(training(tiny_base, pictures, tmp_path / "a.safetensors", cache="disk"))
    files = sorted(path.name for path in (kept / "latents").iterdir())
    assert len(files) == 3
    own = tmp_path / "own"
    api.train(training(tiny_base, pictures, tmp_path / "b.safetensors", cache="disk", cache_folder=own))
    assert sorted(path.name for path in (own / "latents").iterdir()) == files
