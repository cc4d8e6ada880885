"""Buckets, masks, repeats and caches in a run, from the pictures to the adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.data.buckets import Buckets
from studio.data.dataset import read_dataset
from studio.errors import DataError, TrainingError
from studio.specs import Event, TrainSpec
from studio.trainers.evaluate import evaluate_loss
from studio.trainers.inputs import make_batches, make_buckets
from studio.trainers.loop import train
from studio.trainers.losses import Loss
from studio.trainers.prompts import Prompts
from studio.trainers.step import Batch, TrainStep, masked_mean

Spec = Callable[..., TrainSpec]
CPU = torch.device("cpu")


def ups(adapter: Adapter) -> torch.Tensor:
    return torch.cat([change.up.flatten() for change in adapter.changes.values()])  # type: ignore[attr-defined]


def gradient(size: tuple[int, int], turn: int) -> Image.Image:
    return Image.linear_gradient("L").resize((200, 200)).rotate(turn).resize(size).convert("RGB")


@pytest.fixture
def shapes(folder: Path) -> Path:
    """Return the folder with pictures of three shapes: four square, three wide, one high."""
    for number in range(4):
        gradient((64, 64), 50 * number).save(folder / f"{number}.png")
    for number in range(3):
        gradient((120, 40), 80 * number).save(folder / f"wide{number}.png")
    gradient((40, 120), 20).save(folder / "high.png")
    return folder


BUCKETS: dict[str, Any] = {"bucket_step": 16, "bucket_min": 32}


def batches_of(pipe: Any, run: TrainSpec) -> Any:
    buckets = make_buckets(pipe, run, 64)
    pictures = read_dataset(run).pictures
    return make_batches(pipe, run, pictures, None, buckets=buckets, device=CPU, tell=print)


def test_the_step_between_buckets_follows_the_base(
    tiny_sd: Callable[[], Any], tiny_sdxl: Callable[[], Any], spec: Spec
) -> None:
    for pipe in (tiny_sd(), tiny_sdxl()):
        assert make_buckets(pipe, spec(), 512).step == 8 * pipe.vae_scale_factor == 64
    assert (
        make_buckets(tiny_sd(), spec(), 512).sizes
        == make_buckets(tiny_sd(), spec(bucket_min=256, bucket_max=1024), 512).sizes
    )
    assert make_buckets(tiny_sd(), spec(buckets=False), 512) == Buckets.square(512)
    with pytest.raises(TrainingError, match="bucket_step must be a multiple of 8 for this base, got 20"):
        make_buckets(tiny_sd(), spec(bucket_step=20), 512)


def test_batches_are_of_one_size_and_follow_each_pictures_shape(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path
) -> None:
    source = batches_of(tiny_sd(), spec(**BUCKETS, batch_size=3))
    seen = {tuple(source.batch(first, 3).latents.shape) for first in range(0, 72, 3)}
    assert seen == {(3, 4, 8, 8), (3, 4, 4, 12), (3, 4, 12, 4)}


def test_accumulating_equals_one_batch_with_several_buckets_too(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path
) -> None:
    pipe = tiny_sd()
    together = train(pipe, spec(**BUCKETS, steps=4, batch_size=4))
    accumulated = train(pipe, spec(**BUCKETS, steps=4, batch_size=2, gradient_accumulation=2))
    assert torch.allclose(ups(together), ups(accumulated), atol=1e-5)  # AdamW divides by small moments
    squares = train(pipe, spec(**BUCKETS, steps=4, batch_size=4, buckets=False))
    assert not torch.allclose(ups(together), ups(squares), atol=1e-5)


def test_sdxl_is_told_the_sizes_of_its_bucket(tiny_sdxl: Callable[[], Any], spec: Spec, shapes: Path) -> None:
    source = batches_of(tiny_sdxl(), spec(**BUCKETS))
    told = {
        tuple(row) for first in range(0, 64, 2) for row in source.batch(first, 2).size_conditions.tolist()
    }
    assert told == {(64, 64, 0, 0, 64, 64), (40, 120, 0, 0, 32, 96), (120, 40, 0, 0, 96, 32)}


def test_class_pictures_of_another_size_count_like_those_of_the_same(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    step = TrainStep(pipe, loss=Loss(min_snr_gamma=5.0), prompts=Prompts(pipe))
    subject, prior = random_batch((8, 8)), random_batch((4, 12))
    with torch.no_grad():
        wanted = float(step(subject)) + 0.3 * float(step(prior))
        assert float(step(subject.with_prior(prior, 0.3))) == pytest.approx(wanted, rel=1e-5)  # fp32 sums


def test_class_pictures_of_other_shapes_are_trained_on(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "reg" / "2_thing"
    folder.mkdir(parents=True)
    gradient((120, 40), 10).save(folder / "1.png")
    pipe = tiny_sd()
    alone = train(pipe, spec(**BUCKETS))
    beside = train(pipe, spec(**BUCKETS, class_data=tmp_path / "reg"))
    assert not torch.equal(ups(alone), ups(beside))


def random_batch(side: tuple[int, int], *, size: int = 2, masks: torch.Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(sum(side))
    latents, noise = (torch.randn((size, 4, *side), generator=generator) for _ in range(2))
    timesteps = torch.randint(1000, (size,), generator=generator)
    sizes = torch.zeros((size, 6), dtype=torch.long)
    return Batch(latents, noise, timesteps, ("dog",) * size, sizes, torch.full((size,), 1 / size), masks)


def test_the_masked_loss_is_the_weighted_mean_whatever_the_masks_area() -> None:
    generator = torch.Generator().manual_seed(1)
    errors = torch.rand((3, 4, 6, 5), generator=generator)
    masks = torch.rand((3, 1, 6, 5), generator=generator)
    masks[1] = 0
    masks[1, 0, 2, 3] = 0.01
    weights = masks.double().expand(3, 4, 6, 5)
    wanted = (errors.double() * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    assert torch.allclose(masked_mean(errors, masks).double(), wanted, rtol=1e-5)  # fp32 sums
    assert float(masked_mean(errors, masks)[1]) == pytest.approx(float(errors[1, :, 2, 3].mean()), rel=1e-5)
    assert torch.equal(masked_mean(errors, None), errors.flatten(1).mean(1))
    assert torch.allclose(masked_mean(errors, torch.ones(3, 1, 6, 5)), masked_mean(errors, None))


def test_a_crop_without_any_of_its_mask_adds_nothing_and_no_nan() -> None:
    errors = torch.ones((2, 4, 3, 3), requires_grad=True)
    masks = torch.ones((2, 1, 3, 3))
    masks[0] = 0
    loss = masked_mean(errors, masks)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1.0] and errors.grad is not None and torch.isfinite(errors.grad).all()


def test_no_gradient_comes_from_outside_a_mask(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    masks = torch.zeros((2, 1, 8, 8))
    masks[..., :4] = 1
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        output[0].requires_grad_().retain_grad()
        seen.append(output[0])

    pipe.unet.register_forward_hook(keep)
    step = TrainStep(pipe, prompts=Prompts(pipe))
    step(random_batch((8, 8), masks=masks)).backward()
    grad = seen[0].grad
    assert grad is not None and not grad[..., 4:].any() and grad[..., :4].abs().min() > 0


def test_with_class_pictures_unmasked_ones_count_everywhere(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    step = TrainStep(pipe, prompts=Prompts(pipe))
    masks = torch.zeros((2, 1, 8, 8))
    masks[..., :4] = 1
    subject, prior = random_batch((8, 8), masks=masks), random_batch((8, 8))
    with torch.no_grad():
        wanted = float(step(subject)) + 0.5 * float(step(prior))
        assert float(step(subject.with_prior(prior, 0.5))) == pytest.approx(wanted, rel=1e-5)  # fp32 sums


def test_masks_change_training_and_their_options_change_it_back(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path
) -> None:
    pipe = tiny_sd()
    plain = train(pipe, spec())
    for number in range(4):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(shapes / f"{number}.mask.png")
    masked = train(pipe, spec())
    assert not torch.equal(ups(plain), ups(masked))
    assert torch.equal(ups(plain), ups(train(pipe, spec(masks="off"))))
    everywhere = train(pipe, spec(unmasked_weight=1.0))
    assert torch.allclose(ups(plain), ups(everywhere), atol=1e-5)  # sums in another order
    assert not torch.equal(ups(masked), ups(train(pipe, spec(unmasked_weight=0.5))))


@pytest.mark.parametrize(
    "values",
    [
        {"trigger": "zzz"},
        {"shuffle_tags": True},
        {"tag_dropout": 0.5},
        {"tag_dropout": 0.5, "keep_tags": 1},
        {"color_jitter": 0.3},
        {"seed": 1},
    ],
    ids=str,
)
def test_each_treatment_changes_the_result(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path, values: dict[str, Any]
) -> None:
    for path in shapes.glob("*.png"):
        path.with_suffix(".txt").write_text("a dog, a sofa, at night")
    pipe = tiny_sd()
    before = {key: value for key, value in values.items() if key == "tag_dropout" and len(values) > 1}
    assert not torch.equal(ups(train(pipe, spec(**before))), ups(train(pipe, spec(**values))))


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
def test_no_kind_of_cache_changes_any_bit_of_the_result(
    base: str, spec: Spec, shapes: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(base)()
    where = {"cache": "disk", "cache_folder": tmp_path / "cache"}
    chance = {**BUCKETS, "steps": 4, "flip": True, "caption_dropout": 0.3, "trigger": "zzz"}
    plain = ups(train(pipe, spec(**chance, cache="off")))
    calls = {"vae": 0, "text": 0}
    # An empty picture is the estimate's.
    pipe.vae.encoder.register_forward_hook(
        lambda _, args, __: calls.update(vae=calls["vae"] + bool(args[0].any()))
    )
    pipe.text_encoder.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    assert torch.equal(plain, ups(train(pipe, spec(**chance, cache="memory"))))
    assert calls["vae"] and calls["text"]
    assert torch.equal(plain, ups(train(pipe, spec(**chance, **where))))
    calls.update(vae=0, text=0)
    assert torch.equal(plain, ups(train(pipe, spec(**chance, **where)))) and calls == {"vae": 0, "text": 0}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"latents", "captions"}


def test_cached_files_follow_the_picture_the_autoencoder_and_the_text_encoder(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path, tmp_path: Path
) -> None:
    run = spec(cache="disk", cache_folder=tmp_path / "cache", batch_size=8, steps=1)

    def files(pipe: Any) -> tuple[int, int]:
        train(pipe, run)
        latents, captions = (tmp_path / "cache" / name for name in ("latents", "captions"))
        return len(list(latents.iterdir())), len(list(captions.iterdir()))

    latents, captions = files(tiny_sd())
    assert files(tiny_sd()) == (latents, captions)
    gradient((64, 64), 7).save(shapes / "0.png")
    assert files(tiny_sd()) == (latents + 1, captions)
    pipe = tiny_sd()
    pipe.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert files(pipe) == (2 * latents + 1, captions)
    pipe = tiny_sd()
    pipe.text_encoder.get_input_embeddings().weight.data[7, 7] += 1e-3
    assert files(pipe) == (2 * latents + 1, 2 * captions)


def test_captions_that_never_recur_are_not_kept(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"cache": "disk", "cache_folder": tmp_path / "cache", "steps": 4}
    for path in shapes.glob("*.png"):
        path.with_suffix(".txt").write_text("a, b, c, d, e")
    train(tiny_sd(), spec(**where, shuffle_tags=True))
    assert list((tmp_path / "cache" / "captions").iterdir()) == []
    train(tiny_sd(), spec(**where, color_jitter=0.1))
    assert len(list((tmp_path / "cache" / "captions").iterdir())) == 1
    before = len(list((tmp_path / "cache" / "latents").iterdir()))
    train(tiny_sd(), spec(**where, center_crop=False))
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == before


def test_trained_text_encoders_are_never_served_from_a_cache(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    train(tiny_sd(), spec(cache="disk", cache_folder=tmp_path / "cache", train_text_encoder=True))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"latents"}


def test_a_damaged_cached_file_is_told_and_made_again(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    run, events = spec(cache="disk", cache_folder=tmp_path / "cache"), list[Event]()
    first = train(tiny_sd(), run)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(ups(first), ups(train(tiny_sd(), run, on_event=events.append)))
    assert any(event.kind == "message" and "is damaged" in event.message for event in events)
    with pytest.raises(TrainingError, match="cache is 'disk' but there is no folder"):
        train(tiny_sd(), spec(cache="disk"))


def test_a_kohya_folder_trains_with_its_repeats(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path, tmp_path: Path
) -> None:
    for name in ("3_a dog", "1_a cat"):
        (tmp_path / "img" / name).mkdir(parents=True)
    gradient((64, 64), 10).save(tmp_path / "img" / "3_a dog" / "1.png")
    gradient((64, 64), 60).save(tmp_path / "img" / "1_a cat" / "2.png")
    adapter = train(tiny_sd(), spec(data=tmp_path / "img", prompt=None, steps=4, batch_size=2))
    assert adapter.metadata["ss_num_train_images"] == "4" and adapter.metadata["ss_epoch"] == "2"


def test_the_trigger_word_is_written_into_the_file(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    assert train(tiny_sd(), spec(trigger="zzz")).metadata["modelspec.trigger_phrase"] == "zzz"
    assert "modelspec.trigger_phrase" not in train(tiny_sd(), spec()).metadata


def test_held_out_pictures_are_not_trained_on(tiny_sd: Callable[[], Any], spec: Spec, shapes: Path) -> None:
    events: list[Event] = []
    run = spec(validation_split=0.25, steps=1)
    adapter = train(tiny_sd(), run, on_event=events.append)
    assert adapter.metadata["ss_num_train_images"] == "6"
    assert any("Held out: 2 pictures" in event.message for event in events if event.kind == "report")


def test_the_loss_on_held_out_pictures_of_any_shape_leaves_nothing_to_chance(
    tiny_sd: Callable[[], Any], spec: Spec, shapes: Path
) -> None:
    pipe = tiny_sd()
    run = spec(**BUCKETS, validation_split=0.9, flip=True, center_crop=False, color_jitter=0.3)
    data, buckets = read_dataset(run), make_buckets(pipe, run, 64)
    plain = read_dataset(spec(**BUCKETS, validation_split=0.9))
    assert data.validation is not None and plain.validation is not None
    assert len({picture.size for picture in data.validation.pictures}) > 1
    losses = {
        evaluate_loss(pipe, given, num=9, buckets=buckets) for given in (data.validation, plain.validation)
    }
    assert len(losses) == 1
    (loss,) = losses
    assert evaluate_loss(pipe, data.validation, num=9, buckets=buckets, batch_size=1) == pytest.approx(
        loss, rel=1e-5
    )  # sums in another order


def test_a_picture_that_fits_no_bucket_is_said_before_any_work(
    tiny_sd: Callable[[], Any], spec: Spec, folder: Path
) -> None:
    gradient((60, 12), 0).save(folder / "thin.png")
    with pytest.raises(DataError, match=r"thin.png \(60 x 12 px\) is smaller than the bucket step of 16"):
        train(tiny_sd(), spec(**BUCKETS, bucket_upscale=False))
