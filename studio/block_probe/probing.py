"""The block probe: how much of a picture's content and of its style each attention block decides.

Two prompts differ in the subject alone, or in the style alone. One block after another reads the other prompt
while the rest of the UNet reads the own one, from the same noise. B-LoRA, arXiv:2403.14572, found its two
blocks in this way. Differs from the paper: on an embedded base an evaluator that knows the right answers says
what the pictures show; CLIP is for other bases; how far pictures and predictions went is always measured.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from studio.block_probe.injection import Call, injected, recorded
from studio.block_probe.pictures import draw_bars, draw_looks
from studio.block_probe.prompt_pairs import COMMON_WORDS, STARTER_WORDS, Pair, prompt_pairs
from studio.block_probe.table import ALL, NONE, Look, ProbeReport, ProbeRow, effects
from studio.errors import OutputError
from studio.generation import Settings, draw, quiet
from studio.inspection import refuse_existing
from studio.models.base import STARTERS, fingerprint, load_base
from studio.models.blocks import attention_blocks, choose_blocks
from studio.models.clip import ClipSimilarity
from studio.models.prompts import check_prompt
from studio.specs import Event, OnEvent, ProbeSpec
from studio.whole_file import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

MOMENTS = 4
"""Evaluations of the UNet, evenly spread over a run, at which predictions are compared."""
_COLUMNS = 6
"""Pairs of each kind that the grid shows."""


def probe(spec: ProbeSpec, *, on_event: OnEvent | None = None) -> ProbeReport:
    """Measure every attention block of a base and write ``probe.json``, ``grid.png`` and ``bars.png``.

    Args:
        spec: What to measure, and how.
        on_event: Told of progress in denoising steps, and before files are downloaded.

    Raises:
        OutputError: If the table exists and may not be replaced, or cannot be written.
        BaseModelError: If the base or the CLIP model cannot be loaded.
        UsageError: If a group names a block that the base lacks.
    """
    table, grid, bars = (spec.output / name for name in ("probe.json", "grid.png", "bars.png"))
    refuse_existing(table, overwrite=spec.overwrite)
    try:
        spec.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {spec.output}: {error.strerror}. Choose another with --output."
        ) from None
    pipe = load_base(spec.base, device=spec.device, precision=spec.precision, on_event=on_event)
    judged = spec.base in STARTERS if spec.evaluator is None else spec.evaluator
    pairs = prompt_pairs(spec.pairs, words=STARTER_WORDS if judged else COMMON_WORDS, seed=spec.seed)
    for prompt in dict.fromkeys(scene.prompt for pair in pairs for scene in (pair.own, pair.other)):
        check_prompt(pipe, prompt)
    clip = ClipSimilarity(spec.clip, device=pipe.device) if spec.clip else None
    probed = _Probe(pipe, spec, pairs, judged=judged, clip=clip)
    with quiet(pipe):
        probed.run(on_event or (lambda event: None))
    rows = probed.rows()
    facts = _circumstances(spec, pipe) | {"rows": [asdict(row) for row in rows], "pairs": probed.pair_facts()}
    looks = draw_looks(probed.pictures, [probed.title(place) for place in probed.columns])
    for picture, path in ((looks, grid), (draw_bars(rows), bars)):
        with whole_file(path) as unfinished:
            picture.save(unfinished, format="PNG", optimize=True)
    with whole_file(table) as unfinished:
        unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return ProbeReport(rows, table, grid, bars)


@dataclass(frozen=True)
class _Drawn:
    """What one batch gave with one group of blocks reading the other prompts."""

    pictures: "list[Image]"
    predictions: list[Tensor]
    seconds: float


class _Probe:
    """All pairs with all groups of blocks, batch by batch, so that pictures need not be kept."""

    def __init__(
        self,
        pipe: Any,
        spec: ProbeSpec,
        pairs: Sequence[Pair],
        *,
        judged: bool,
        clip: ClipSimilarity | None,
    ) -> None:
        self._pipe, self._spec, self._pairs, self._judged, self._clip = pipe, spec, pairs, judged, clip
        blocks = attention_blocks(pipe.unet)
        groups = {name: choose_blocks(blocks, name.split("+"), setting="groups") for name in spec.groups}
        names = {NONE: [], ALL: list(blocks)} | (groups or {name: [name] for name in blocks})
        self._groups: dict[str, list[nn.Module]] = {
            name: [blocks[block] for block in found] for name, found in names.items()
        }
        self._settings = Settings(
            steps=spec.steps, guidance_scale=spec.guidance_scale, width=spec.width, height=spec.height
        )
        self._looks: dict[str, list[Look]] = {name: [] for name in self._groups}
        self._seconds = dict.fromkeys(self._groups, 0.0)
        self.columns = [
            start + column for start in (0, spec.pairs) for column in range(min(_COLUMNS, spec.pairs))
        ]
        self.pictures: dict[str, list[Image]] = {name: [] for name in self._groups}

    def run(self, tell: OnEvent) -> None:
        """Draw and measure everything."""
        size, steps = self._spec.batch_size, self._spec.steps
        total, done = len(self._groups) * len(self._pairs) * steps, 0

        def advance(step: int, rows: int) -> None:
            tell(Event(kind="progress", step=done + step * rows, total=total))

        for start in range(0, len(self._pairs), size):
            batch = self._pairs[start : start + size]
            drawn: dict[str, _Drawn] = {}
            for name, outcome in self._draw(batch, advance):
                drawn[name] = outcome
                done += steps * len(batch)
            self._measure(start, batch, drawn)
        tell(Event(kind="finished"))

    def _draw(
        self, batch: Sequence[Pair], advance: Callable[[int, int], None]
    ) -> Iterator[tuple[str, _Drawn]]:
        """Yield what each group gives for a batch; all predict at the moments of the first, the plain one."""
        pipe, words = self._pipe, self._encode([pair.other.prompt for pair in batch])
        moments: list[Call] = []
        for name, blocks in self._groups.items():
            began = time.perf_counter()
            with injected(blocks, words), recorded(pipe.unet) as calls:
                pictures = draw(
                    pipe,
                    [pair.own.prompt for pair in batch],
                    [pair.seed for pair in batch],
                    settings=self._settings,
                    on_step=lambda step: advance(step, len(batch)),
                )
                moments = moments or [call.conditional(len(batch)) for call in _spread(calls)]
                predictions = [call.predict(pipe.unet) for call in moments]
            yield name, _Drawn(pictures, predictions, time.perf_counter() - began)

    def _encode(self, prompts: list[str]) -> Tensor:
        with torch.no_grad():
            encoded = self._pipe.encode_prompt(
                prompt=prompts,
                device=self._pipe.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        embeddings: Tensor = encoded[0]
        return embeddings

    def _measure(self, start: int, batch: Sequence[Pair], drawn: Mapping[str, _Drawn]) -> None:
        own = _pixels(drawn[NONE].pictures)
        way = _pixels(drawn[ALL].pictures) - own
        for name, outcome in drawn.items():
            along = ((_pixels(outcome.pictures) - own) * way).sum((1, 2, 3)).tolist()
            changes = [
                (now - before).square().flatten(1).sum(1)
                for now, before in zip(outcome.predictions, drawn[NONE].predictions, strict=True)
            ]
            seen, leans = self._seen(outcome.pictures, batch), self._leans(outcome.pictures, batch)
            change = torch.stack(changes).sum(0).tolist()
            self._looks[name] += map(Look, along, change, seen, leans)
            self._seconds[name] += outcome.seconds
            self.pictures[name] += [
                picture for place, picture in enumerate(outcome.pictures, start) if place in self.columns
            ]

    def _seen(self, pictures: "list[Image]", batch: Sequence[Pair]) -> Sequence[str | None]:
        if not self._judged:
            return [None] * len(batch)
        from studio.assets.builder.evaluator import judge

        verdicts = judge(pictures)
        return [
            verdict.subject if pair.kind == "content" else verdict.style
            for verdict, pair in zip(verdicts, batch, strict=True)
        ]

    def _leans(self, pictures: "list[Image]", batch: Sequence[Pair]) -> Sequence[float | None]:
        if self._clip is None:
            return [None] * len(batch)
        other = self._clip(pictures, [pair.other.prompt for pair in batch])
        leans: list[float | None] = (
            other - self._clip(pictures, [pair.own.prompt for pair in batch])
        ).tolist()
        return leans

    def rows(self) -> tuple[ProbeRow, ...]:
        """Return the table."""
        return tuple(
            ProbeRow(name, effects(self._looks, self._pairs, name), self._seconds[name])
            for name in self._groups
        )

    def title(self, place: int) -> str:
        """Return what a pair changes, in few words."""
        pair = self._pairs[place]
        return f"{pair.own.named(pair.kind)} > {pair.other.named(pair.kind)}"

    def pair_facts(self) -> list[dict[str, Any]]:
        """Return every pair with what the evaluator found in its pictures, by row."""
        return [
            asdict(pair)
            | (
                {"seen": {name: looks[place].seen for name, looks in self._looks.items()}}
                if self._judged
                else {}
            )
            for place, pair in enumerate(self._pairs)
        ]


def _spread(calls: Sequence[Call]) -> list[Call]:
    """Return at most ``MOMENTS`` calls, the first and the last among them, evenly spread."""
    places = np.linspace(0, len(calls) - 1, min(MOMENTS, len(calls))).round().astype(int)
    return [calls[place] for place in places]


def _pixels(pictures: "Sequence[Image]") -> Tensor:
    """Return pictures as ``[N, height, width, 3]`` fp64 in 0 to 1."""
    return (
        torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).double()
        / 255
    )


def _circumstances(spec: ProbeSpec, pipe: Any) -> dict[str, Any]:
    return {
        "spec": spec.model_dump(mode="json", exclude={"output", "overwrite", "clip"}),
        "clip": spec.clip and os.path.basename(os.path.normpath(spec.clip)),
        "base_fingerprint": fingerprint(pipe),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {pipe.device}",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
