"""What adapters do to the frequencies of a picture, measured once on a base and kept.

CMLoRA, arXiv:2502.04923, Sec. 3: some adapters bring edges and textures in early (characters, styles), others
large shapes (backgrounds). The base draws pictures alone and then with each adapter, from the same noise;
after each step the share of the latents' energy in high frequencies is taken. Differs from the paper, which
reads amplitudes in bins of pixels off one picture of 512 px: shares of energy beyond a part of the Nyquist
frequency do not depend on the picture's size, and the base's own are subtracted.
"""

import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.parameters import canonical_names, components_of
from studio.composition import facts
from studio.composition.engine import compose
from studio.composition.fit import fit_adapters
from studio.errors import CompositionError
from studio.models.architecture import architecture
from studio.models.clip_skip import clip_skip_of
from studio.models.fingerprint import fingerprint
from studio.models.schedulers import make_scheduler

logger = logging.getLogger(__name__)

_KIND = "frequency"
_BATCH = 4
_EARLY = 0.4


@dataclass(frozen=True)
class Measurement:
    """How frequency profiles are measured; what was measured otherwise is another fact.

    Attributes:
        prompts: What is drawn; the trigger words that an adapter's file tells come before them.
        seeds: Each prompt is drawn with each of these.
        steps: Of DDIM.
        guidance_scale: Classifier-free guidance.
        above: High is a frequency whose radius is above this part of the Nyquist frequency (the paper's h).
        size: Height and width in pixels; None for the base's own.
    """

    prompts: tuple[str, ...] = ("a photo of a person in a street", "a painting of a house in a landscape")
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 20
    guidance_scale: float = 5.0
    above: float = 0.2
    size: int | None = None


@dataclass(frozen=True)
class Profile:
    """How much more of the energy is in high frequencies with an adapter than without it.

    Attributes:
        curve: Difference of the shares after each step; above 0 where the adapter adds high frequencies.
    """

    curve: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean over the first 40 % of the steps."""
        early = self.curve[: max(1, round(_EARLY * len(self.curve)))]
        return sum(early) / len(early)


def profile(
    pipe: Any, adapters: Mapping[str, Adapter], *, measurement: Measurement | None = None
) -> dict[str, Profile]:
    """Return the frequency profile of each adapter on this base; only what is not known is measured.

    Measuring takes one run of the base and one of each adapter for every prompt and seed, by default 80
    evaluations of the guided denoiser each. The pipeline and its scheduler are left as they were.

    Args:
        pipe: A pipeline of the base; not inside ``compose``.
        adapters: What to measure, each alone and with weight 1.
        measurement: How; the default is what CMLoRA looks for.

    Raises:
        CompositionError: If the pipeline is in a composition, cannot draw from text alone, or an adapter
            makes it draw NaN or infinity.
        AdapterError: If an adapter does not fit the base.
    """
    fitted = fit_adapters(adapters, canonical_names(components_of(pipe)))
    how = measurement or Measurement()
    meter = _Meter(pipe, how)
    profiles = {}
    for name, adapter in fitted.items():
        prompts = _prompts(adapter, how)
        profiles[name] = _profile(meter.curve(None, prompts), meter.curve(adapter, prompts))
    return profiles


def known_profiles(
    base: str, adapters: Mapping[str, Adapter], *, measurement: Measurement | None = None
) -> dict[str, Profile]:
    """Return the profiles of those adapters that were measured before; nothing is measured, no base needed.

    Args:
        base: Fingerprint of the base.
        adapters: As for :func:`profile`.
        measurement: As for :func:`profile`.
    """
    how = measurement or Measurement()
    profiles = {}
    for name, adapter in adapters.items():
        prompts = _prompts(adapter, how)
        alone, own = (facts.get(_KIND, _key(each, prompts, base, how)) for each in (None, adapter))
        if alone and own:
            profiles[name] = _profile(alone["curve"], own["curve"])
    return profiles


def high_share(latents: Tensor, *, above: float) -> Tensor:
    """Return the share of each picture's energy in high frequencies, mean over its channels ``[B]``, fp32.

    Args:
        latents: ``[B, C, H, W]``.
        above: Radius as a part of the Nyquist frequency from which on, itself not counted, a frequency is
            high.
    """
    height, width = latents.shape[-2:]
    energy = torch.fft.rfft2(latents.float()).abs().square()
    rows = torch.fft.fftfreq(height, device=latents.device)
    columns = torch.fft.rfftfreq(width, device=latents.device)
    # A real picture's spectrum is symmetric: rfft2 leaves out the mirror image of all but these columns.
    mirrored = (columns > 0) & (columns < 0.5)
    energy = energy * (1 + mirrored.float())
    high = torch.hypot(rows[:, None], columns) > above / 2
    shares: Tensor = (energy * high).sum((-2, -1)) / energy.sum((-2, -1))
    return shares.mean(1)


def _prompts(adapter: Adapter, how: Measurement) -> tuple[str, ...]:
    """Return the prompts that an adapter is measured with."""
    words = adapter.metadata.get("modelspec.trigger_phrase")
    return tuple(f"{words}, {text}" if words else text for text in how.prompts)


def _key(adapter: Adapter | None, prompts: Sequence[str], base: str, how: Measurement) -> str:
    """Return under what the curve of an adapter, or of the base alone, is kept."""
    content = "base" if adapter is None else facts.content_hash(adapter)
    settings = {**asdict(how), "prompts": list(prompts)}
    return f"{content} {base} {json.dumps(settings, sort_keys=True)}"


def _profile(base: Sequence[float], own: Sequence[float]) -> Profile:
    return Profile(tuple(one - other for one, other in zip(own, base, strict=True)))


class _Meter:
    """Measures on one base, or finds what was measured before."""

    def __init__(self, pipe: Any, measurement: Measurement) -> None:
        self._pipe = pipe
        self._measurement = measurement
        skipped = clip_skip_of(pipe)
        self._base = fingerprint(pipe) + (f" clip skip {skipped}" if skipped > 1 else "")

    def curve(self, adapter: Adapter | None, prompts: Sequence[str]) -> list[float]:
        """Return the share of high frequencies after each step, mean over prompts and seeds."""
        key = _key(adapter, prompts, self._base, self._measurement)
        known = facts.get(_KIND, key)
        if known is None:
            name = "the base" if adapter is None else f"'{adapter.name}'"
            logger.info("measuring the frequency profile of %s; it is kept for later.", name)
            known = {"curve": self._measured(adapter, prompts)}
            if not all(map(math.isfinite, known["curve"])):
                raise CompositionError(
                    f"{name} draws NaN or infinity, so its frequencies cannot be measured. Load the base in "
                    "another precision, or give roles to all adapters."
                )
            facts.put(_KIND, key, known)
        curve: list[float] = known["curve"]
        return curve

    @torch.no_grad()
    def _measured(self, adapter: Adapter | None, prompts: Sequence[str]) -> list[float]:
        wanted = self._measurement
        pictures = list(product(prompts, wanted.seeds))
        found: list[Tensor] = []
        # Entered once, so that an adapter's weights are formed once.
        with nullcontext() if adapter is None else compose(self._drawing, {"adapter": adapter}):
            for start in range(0, len(pictures), _BATCH):
                shares: list[Tensor] = []

                def record(
                    _: Any, __: int, ___: Any, values: dict[str, Any], to: list[Tensor] = shares
                ) -> Any:
                    to.append(high_share(values["latents"], above=wanted.above))
                    return values

                batch = pictures[start : start + _BATCH]
                self._drawing(
                    prompt=[text for text, _ in batch],
                    num_inference_steps=wanted.steps,
                    guidance_scale=wanted.guidance_scale,
                    height=wanted.size,
                    width=wanted.size,
                    generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                    output_type="latent",
                    callback_on_step_end=record,
                )
                found.append(torch.stack(shares))
        # The one place that waits for a GPU.
        curve: list[float] = torch.cat(found, dim=1).mean(1).tolist()
        return curve

    @cached_property
    def _drawing(self) -> Any:
        """A text-to-image pipeline of the base's own components, with a scheduler of its own."""
        import diffusers

        pipe = self._pipe
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise CompositionError(
                f"frequency profiles are measured on pictures drawn from text alone, and this base's UNet "
                f"reads {pipe.unet.config.in_channels} channels where latents have "
                f"{pipe.vae.config.latent_channels}. Give roles to all adapters."
            )
        kind: Any = diffusers.StableDiffusionPipeline
        own: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        own["requires_safety_checker"] = False
        if architecture(pipe) == "sdxl":
            kind = diffusers.StableDiffusionXLPipeline
            own = {"add_watermarker": False}
            own["force_zeros_for_empty_prompt"] = pipe.config.get("force_zeros_for_empty_prompt", True)
        own["scheduler"] = make_scheduler(pipe, "ddim")
        taken = inspect.signature(kind.__init__).parameters.keys() - own.keys()
        drawing = kind(**own, **{name: part for name, part in pipe.components.items() if name in taken})
        drawing.set_progress_bar_config(disable=True)
        return drawing
