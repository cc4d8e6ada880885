"""Zip a content and a style adapter into one that answers like each of them where it is asked for it.

    L = |e_m(x_c, p_c) - e_c(x_c, p_c)|^2 + |e_m(x_s, p_s) - e_s(x_s, p_s)|^2 + lambda sum_l mean |m_c m_s|

``e_c`` and ``e_s`` are the answers of the single adapters, ``e_m`` that of both with weighted columns, see
``columns.py``. ZipLoRA, arXiv:2311.13600, Sec. 3. Differs from the paper: the overlap of a layer is the mean
over its columns, so that wide layers weigh no more than others; text encoders, which the paper does not
adapt, hold both adapters for ``e_m`` and one of them for the others; pictures may be those that the adapters
draw.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.container import check_target
from studio.adapters.files import load_adapter, usual_dtype
from studio.adapters.merge import merge_adapters
from studio.adapters.parameters import components_of, find_parameter
from studio.bases import cached_base
from studio.composition.engine import compose
from studio.composition.executor import of_encoders
from studio.composition.fit import tokens_of
from studio.data.batches import Samples, derived_seed
from studio.data.buckets import Buckets
from studio.data.cache import MemoryCache
from studio.data.folder import read_pictures
from studio.errors import TrainingError
from studio.generation import Settings, Stopped, draw, quiet
from studio.merging.columns import Columns
from studio.merging.outputs import described, inherited_facts, write_with_tokens
from studio.models.gradients import GradientScale, frozen
from studio.models.prompts import check_prompt
from studio.registry import MERGERS
from studio.specs import Event, OnEvent, ZipSpec
from studio.specs.events import silent
from studio.trainers.borrow import converted
from studio.trainers.prompts import Prompts
from studio.trainers.step import Batch, Latents, NoiseSchedule

CONTENT, STYLE = "content", "style"
_SIDES = (CONTENT, STYLE)

Embedded = tuple[Tensor, Tensor | None]
"""Prompt embeddings, and for SDXL pooled ones."""


@dataclass(frozen=True)
class ZipResult:
    """What zipping made.

    Attributes:
        adapter: The zipped adapter, with tokens and metadata.
        paths: Its file and one for each new token beside it.
        losses: Of each optimizer step, the overlap included.
        overlap: Mean of ``|m_c m_s|`` over the columns that both change; 1 before the first step.
        seconds: Time of all, the loading of the base included.
        stopped: Whether it was asked to stop before its last step.
    """

    adapter: Adapter
    paths: tuple[Path, ...]
    losses: tuple[float, ...]
    overlap: float
    seconds: float
    stopped: bool


def zip_adapters(
    spec: ZipSpec, *, on_event: OnEvent | None = None, stop: Callable[[], bool] | None = None
) -> ZipResult:
    """Learn the columns' weights of a content and a style adapter and write them as one ordinary adapter.

    Args:
        spec: The request.
        on_event: Told of progress and files.
        stop: Asked between steps; what is learnt by then is written.

    Raises:
        AdapterError: If an adapter cannot be read, does not fit the base, or is not of low rank.
        BaseModelError: If the base cannot be loaded.
        DataError: If pictures cannot be used.
        OutputError: If the file exists or cannot be written.
        TrainingError: If it is stopped before the first step.
    """
    start = time.monotonic()
    tell, stop = on_event or silent, stop or (lambda: False)
    check_target(spec.output, overwrite=spec.overwrite)
    pipe = cached_base(spec.base, spec.device, spec.precision, on_event=tell)
    uses = {CONTENT: spec.content, STYLE: spec.style}
    adapters = {
        side: load_adapter(use.path, base=pipe, name=side, any_base=spec.any_base)
        for side, use in uses.items()
    }
    weights = {side: use.weight for side, use in uses.items()}
    tokens = tokens_of(adapters, weights)
    columns = Columns(components_of(pipe), adapters, weights)
    with quiet(pipe), TemporaryDirectory() as folder:
        losses = _Zipping(pipe, spec, adapters, weights, columns, Path(folder)).run(tell, stop)
    zipped = Adapter(
        spec.output.stem,
        "lora",
        {**columns.changes(), **_spoken(pipe, adapters, weights)},
        tokens,
        inherited_facts(adapters.values(), pipe, tell=tell) | {"studio.zip": _recipe(spec, len(losses))},
    )
    paths = write_with_tokens(
        zipped,
        spec.output,
        format=spec.format,
        dtype=usual_dtype(zipped),
        pipe=pipe,
        overwrite=spec.overwrite,
    )
    for path in paths:
        tell(Event(kind="saved", path=path, message=f"wrote {path}"))
    tell(Event(kind="finished", path=spec.output, values={"overlap": columns.overlap()}))
    seconds = time.monotonic() - start
    return ZipResult(
        zipped, paths, tuple(losses), columns.overlap(), seconds, stopped=len(losses) < spec.steps
    )


class _Zipping:
    """One run."""

    def __init__(
        self,
        pipe: Any,
        spec: ZipSpec,
        adapters: Mapping[str, Adapter],
        weights: Mapping[str, float],
        columns: Columns,
        folder: Path,
    ) -> None:
        self._pipe, self._spec, self._adapters, self._weights = pipe, spec, adapters, weights
        self._columns, self._folder = columns, folder
        self._schedule = NoiseSchedule(pipe)
        self._side = spec.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
        self._prompts = {CONTENT: spec.content_prompt, STYLE: spec.style_prompt}
        self._folders = {CONTENT: spec.content_data, STYLE: spec.style_data}

    def run(self, tell: OnEvent, stop: Callable[[], bool]) -> list[float]:
        """Learn the columns' weights and return the losses."""
        pictures = {side: self._pictures(side, tell, stop) for side in _SIDES}
        alone = {side: self._embedded([side], self._prompts[side]) for side in _SIDES}
        both = {side: self._embedded(_SIDES, self._prompts[side]) for side in _SIDES}
        optimizer = torch.optim.Adam(self._columns.parameters, lr=self._spec.learning_rate)
        losses: list[float] = []
        scale = GradientScale()
        with (
            frozen(self._pipe.unet),
            _checkpointing(self._pipe.unet, self._spec.gradient_checkpointing),
            # What pictures are encoded in; they are drawn by now, which takes the UNet's number type.
            converted(self._pipe.vae, torch.float32),
        ):
            while len(losses) < self._spec.steps and not stop():
                content, style = (pictures[side].batch(len(losses), 1) for side in _SIDES)
                # Both pictures at one timestep, with one noise, as in the authors' experiments.
                style = replace(style, noise=content.noise, timesteps=content.timesteps)
                losses.append(self._step({CONTENT: content, STYLE: style}, alone, both, optimizer, scale))
                values = {"loss": losses[-1], "overlap": self._columns.overlap()}
                tell(Event(kind="progress", step=len(losses), total=self._spec.steps, values=values))
        return losses

    def _step(
        self,
        batches: Mapping[str, Batch],
        alone: Mapping[str, Embedded],
        both: Mapping[str, Embedded],
        optimizer: torch.optim.Optimizer,
        scale: GradientScale,
    ) -> float:
        """Learn from one picture of each adapter and return the loss."""
        parts: list[float] = []

        def learn(factor: float) -> list[Tensor | None]:
            optimizer.zero_grad()
            parts[:] = [self._learn(side, batches[side], alone[side], both[side], factor) for side in _SIDES]
            return [parameter.grad for parameter in self._columns.parameters]

        _, factor = scale.finite(learn)
        return sum(parts) + self._finish(optimizer, factor)

    def _learn(self, side: str, batch: Batch, alone: Embedded, both: Embedded, factor: float) -> float:
        """Add to the gradients those of one adapter's part of the loss, times a factor; return that part."""
        with torch.no_grad(), self._columns.acting(side, zipped=False):
            wanted = self._predicted(batch, alone)
        # Checkpointing computes the forward pass again in the backward one.
        with torch.enable_grad(), self._columns.acting(*_SIDES, zipped=True):
            loss = (self._predicted(batch, both) - wanted).square().mean()
            (loss * factor).backward()
        return float(loss.detach())

    def _finish(self, optimizer: torch.optim.Optimizer, factor: float) -> float:
        """Add the overlap's gradients, make the step and return the overlap's part of the loss."""
        for parameter in self._columns.parameters:
            if parameter.grad is not None:
                parameter.grad /= factor
        overlap = self._spec.penalty * self._columns.penalty()
        if overlap.requires_grad:
            overlap.backward()
        optimizer.step()
        return float(overlap.detach())

    def _predicted(self, batch: Batch, words: Embedded) -> Tensor:
        """Return what the UNet predicts, fp32."""
        unet = self._pipe.unet
        noisy = self._schedule.noisy(batch.latents, batch.noise, batch.timesteps).to(unet.dtype)
        embeddings, pooled = words
        conditions = None
        if pooled is not None:
            sizes = batch.size_conditions
            conditions = {"text_embeds": pooled.to(unet.dtype), "time_ids": sizes.to(unet.dtype)}
        answer: Tensor = unet(
            noisy,
            batch.timesteps,
            embeddings.to(unet.dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return answer.float()

    def _embedded(self, sides: Any, prompt: str) -> Embedded:
        """Return a prompt as the text encoders read it with these adapters' parts."""
        spoken = {side: _without_unet(self._adapters[side]) for side in sides}
        spoken = {side: adapter for side, adapter in spoken.items() if adapter.changes or adapter.tokens}
        weights = {side: self._weights[side] for side in spoken}
        with compose(self._pipe, spoken, weights=weights), torch.no_grad():
            check_prompt(self._pipe, prompt)
            embeddings, pooled, _ = Prompts(self._pipe)([prompt], self._pipe.unet.device)
            return embeddings, pooled

    def _pictures(self, side: str, tell: OnEvent, stop: Callable[[], bool]) -> Latents:
        """Return the course of one adapter's pictures: those given, or what it draws alone."""
        folder = self._folders[side]
        found = read_pictures(
            folder or self._drawn(side, tell, stop), prompt=self._prompts[side], setting=f"{side}_data"
        )
        samples = Samples(
            found,
            seed=self._spec.seed,
            buckets=Buckets.square(self._side),
            num_timesteps=self._schedule.num_timesteps,
            stream=f"{side} ",
        )
        return Latents(self._pipe, samples, device=self._pipe.unet.device, cache=MemoryCache())

    def _drawn(self, side: str, tell: OnEvent, stop: Callable[[], bool]) -> Path:
        spec, folder = self._spec, self._folder / side
        folder.mkdir()
        settings = Settings(steps=spec.sample_steps, width=self._side, height=self._side)
        with compose(self._pipe, {side: self._adapters[side]}, weights={side: self._weights[side]}):
            for number in range(spec.pictures):
                seed = derived_seed(spec.seed, number, side)
                try:
                    image = draw(self._pipe, [self._prompts[side]], [seed], settings=settings, stop=stop)[0]
                except Stopped:
                    raise TrainingError(
                        "stopped before the first step, so there is nothing to write. To save the drawing of "
                        "pictures give folders as content_data and style_data."
                    ) from None
                image.save(folder / f"{number:04}.png")
                what = f"drawing the {side}"
                tell(Event(kind="progress", message=what, step=number + 1, total=spec.pictures))
        return folder


@contextmanager
def _checkpointing(unet: Any, wanted: bool) -> Iterator[None]:
    """Keep few of a UNet's activations for a while."""
    if not wanted or unet.is_gradient_checkpointing:
        yield
        return
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


def _without_unet(adapter: Adapter) -> Adapter:
    return replace(
        adapter, changes={name: each for name, each in adapter.changes.items() if of_encoders(name)}
    )


def _spoken(pipe: Any, adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> Mapping[str, Any]:
    """Return the text encoders' changes: the sum of both adapters', exactly."""
    spoken = {side: _without_unet(adapter) for side, adapter in adapters.items()}
    if not any(adapter.changes for adapter in spoken.values()):
        return {}
    components = components_of(pipe)
    merged = merge_adapters(
        spoken,
        weights,
        MERGERS["linear"](),
        parameter=lambda name: find_parameter(components, name).detach(),
    )
    return merged.adapter.changes


def _recipe(spec: ZipSpec, steps: int) -> str:
    """Return what the file says of how it was made."""
    kept = ("content_prompt", "style_prompt", "learning_rate", "penalty", "seed", "pictures", "sample_steps")
    settings = {name: getattr(spec, name) for name in kept}
    given = {side: bool(getattr(spec, f"{side}_data")) for side in _SIDES}
    facts = {"adapters": described({CONTENT: spec.content, STYLE: spec.style}), "own_pictures": given}
    return json.dumps({**settings, **facts, "steps": steps}, sort_keys=True)
