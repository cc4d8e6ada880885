"""Frequency profiles: the measure against numpy, what adapters made for it score, and what is kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.full import FullChange
from studio.composition import profiles
from studio.composition.engine import compose
from studio.composition.profiles import Measurement, Profile, high_share, profile
from studio.errors import CompositionError

SHORT = Measurement(prompts=("a fox",), seeds=(0, 3), steps=3, above=0.5)


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture(scope="module")
def made(make_frequency_adapter: Callable[..., Adapter], sd: Any) -> dict[str, Adapter]:
    return {name: make_frequency_adapter(sd, name) for name in ("shapes", "edges")}


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which to measure is an error."""

    def forbid() -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("measured again")

        monkeypatch.setattr(profiles._Meter, "_measured", refuse)

    return forbid


def share(latents: Any, above: float) -> Any:
    """Return the share of high frequencies of each channel by the whole spectrum in fp64."""
    spectrum = numpy.abs(numpy.fft.fft2(numpy.asarray(latents, dtype=numpy.float64))) ** 2
    rows, columns = (numpy.fft.fftfreq(size) for size in spectrum.shape[-2:])
    high = numpy.sqrt(rows[:, None] ** 2 + columns[None, :] ** 2) / 0.5 > above
    return (spectrum * high).sum((-2, -1)) / spectrum.sum((-2, -1))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (16, 12), (5, 6)], ids=str)
@pytest.mark.parametrize("above", [0.2, 0.5, 1.0])
def test_the_share_is_that_of_the_whole_spectrum(size: tuple[int, int], above: float) -> None:
    latents = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(0)) + 0.5
    wanted = share(latents, above).mean(1)
    numpy.testing.assert_allclose(high_share(latents, above=above), wanted, rtol=1e-5)  # fp32
    half = high_share(latents.half(), above=above)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, high_share(latents.half().float(), above=above))


def test_a_wave_is_high_or_low_whatever_the_size_of_the_picture() -> None:
    for size in (20, 40):
        place = torch.arange(size).float()
        for frequency, high in ((0.05, 0.0), (0.15, 1.0), (0.5, 1.0)):
            wave = torch.cos(2 * torch.pi * frequency * place)
            for latents in (wave.expand(1, 1, size, size), wave[:, None].expand(1, 1, size, size)):
                assert float(high_share(latents, above=0.2)) == pytest.approx(high, abs=1e-5)


def test_adapters_made_for_high_and_low_frequencies_score_so(sd: Any, made: dict[str, Adapter]) -> None:
    found = profile(sd, made, measurement=SHORT)
    assert list(found) == ["shapes", "edges"]
    assert found["shapes"].score < -0.05 and found["edges"].score > 0.05


def test_a_curve_is_the_difference_to_the_base_on_the_same_noise(sd: Any, made: dict[str, Adapter]) -> None:
    from studio.models.schedulers import make_scheduler

    def measured() -> Any:
        seen: list[Any] = []
        before, sd.scheduler = sd.scheduler, make_scheduler(sd, "ddim")
        step = sd.scheduler.step

        def watch(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            seen.append(share(result[0], 0.5).mean())
            return result

        sd.scheduler.step = watch
        try:
            noise = [torch.Generator().manual_seed(seed) for seed in (0, 3)]
            sd(
                ["a fox"] * 2,
                num_inference_steps=3,
                guidance_scale=5.0,
                generator=noise,
                output_type="latent",
            )
        finally:
            sd.scheduler = before
        return numpy.array(seen)

    base = measured()
    with compose(sd, {"edges": made["edges"]}):
        # The pipeline's scheduler is replaced inside, which a merge does not mind.
        wanted = measured() - base
    got = profile(sd, {"edges": made["edges"]}, measurement=SHORT)["edges"].curve
    numpy.testing.assert_allclose(got, wanted, atol=1e-5)  # fp32 spectra


def test_a_score_is_the_mean_of_the_first_40_per_cent() -> None:
    assert Profile((1.0, 2.0, 6.0, 9.0, 9.0)).score == 1.5
    assert Profile((0.5,)).score == 0.5


def test_what_was_measured_is_not_measured_again(
    sd: Any, made: dict[str, Adapter], no_measuring: Callable[[], None]
) -> None:
    first = profile(sd, made, measurement=SHORT)
    no_measuring()
    renamed = {"other": replace(made["edges"], name="other")}
    assert profile(sd, renamed, measurement=SHORT)["other"] == first["edges"]
    changed = replace(made["edges"], changes={n: FullChange(c.values * 2) for n, c in _changes(made)})
    with pytest.raises(AssertionError, match="measured again"):
        profile(sd, {"edges": changed}, measurement=SHORT)


def _changes(made: dict[str, Adapter]) -> Any:
    return made["edges"].changes.items()


def test_another_base_is_measured_anew(
    sd: Any, short_sd: Any, made: dict[str, Adapter], no_measuring: Callable[[], None]
) -> None:
    profile(sd, made, measurement=SHORT)
    other = short_sd()
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.1)
    no_measuring()
    with pytest.raises(AssertionError, match="measured again"):
        profile(other, made, measurement=SHORT)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ("a house",)},
        {"seeds": (4,)},
        {"steps": 4},
        {"guidance_scale": 2.0},
        {"above": 0.8},
        {"size": 128},
    ],
    ids=str,
)
def test_everything_that_can_be_set_counts(change: dict[str, Any], sd: Any, made: dict[str, Adapter]) -> None:
    given = {"edges": made["edges"]}
    usual = profile(sd, given, measurement=replace(SHORT, steps=2))["edges"].curve
    assert profile(sd, given, measurement=replace(replace(SHORT, steps=2), **change))["edges"].curve != usual


def test_trigger_words_come_before_the_prompts(
    sd: Any, made: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    call = type(sd).__call__

    def listen(self: Any, *args: Any, **kwargs: Any) -> Any:
        said.append(kwargs["prompt"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(sd), "__call__", listen)
    edges = replace(made["edges"], metadata={"modelspec.trigger_phrase": "sks dog"})
    profile(
        sd, {"edges": edges}, measurement=replace(SHORT, prompts=("a fox", "a hill"), steps=1, seeds=(0,))
    )
    assert said == [["sks dog, a fox", "sks dog, a hill"]] * 2


def test_pictures_beyond_a_batch_come_in_further_ones(sd: Any, made: dict[str, Adapter]) -> None:
    given = {"edges": made["edges"]}
    singles = [
        profile(sd, given, measurement=replace(SHORT, seeds=(seed,), steps=2))["edges"].curve
        for seed in range(5)
    ]
    got = profile(sd, given, measurement=replace(SHORT, seeds=tuple(range(5)), steps=2))["edges"].curve
    numpy.testing.assert_allclose(got, numpy.mean(singles, axis=0), atol=1e-5)  # fp32


@pytest.mark.parametrize("broken", [False, True], ids=["measured", "failed"])
def test_measuring_leaves_no_trace(
    broken: bool, sd: Any, made: dict[str, Adapter], snapshot: Any, draw: Any
) -> None:
    drawn = draw(sd, steps=2)
    before, methods = snapshot(sd), {name: set(vars(part)) for name, part in sd.unet.named_modules()}
    scheduler = sd.scheduler, {name: repr(value) for name, value in vars(sd.scheduler).items()}
    if broken:
        nothing = {name: FullChange(change.values * torch.nan) for name, change in _changes(made)}
        with pytest.raises(CompositionError, match="'edges' draws NaN or infinity"):
            profile(sd, {"edges": replace(made["edges"], changes=nothing)}, measurement=SHORT)
    else:
        profile(sd, made, measurement=SHORT)
    assert all(torch.equal(before[name], value) for name, value in snapshot(sd).items())
    assert {name: set(vars(part)) for name, part in sd.unet.named_modules()} == methods
    assert (sd.scheduler, {name: repr(value) for name, value in vars(sd.scheduler).items()}) == scheduler
    assert torch.equal(draw(sd, steps=2), drawn)


def test_sdxl_is_measured_with_its_two_encoders(short_sdxl: Any, make_adapter: Any, target: Any) -> None:
    pipe = short_sdxl()
    adapter = make_adapter(pipe, 1, targets=[target["linear"]])
    curve = profile(pipe, {"one": adapter}, measurement=replace(SHORT, steps=2))["one"].curve
    assert len(curve) == 2 and any(curve)


def test_a_pipeline_in_a_composition_is_not_measured(sd: Any, made: dict[str, Adapter]) -> None:
    with compose(sd, made), pytest.raises(CompositionError, match="in another composition"):
        profile(sd, made, measurement=SHORT)


def test_a_base_that_does_not_draw_from_text_alone_is_said(short_sd: Any, made: dict[str, Adapter]) -> None:
    pipe = short_sd()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(CompositionError, match="reads 9 channels where latents have 4"):
        profile(pipe, made, measurement=SHORT)
