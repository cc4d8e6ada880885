"""What test_processes.py starts in two processes: run after run, and what came of each in either of them."""

import gc
import itertools
import json
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import studio.drawing
from studio.adapters.adapter import Adapter
from studio.batches.run import draw_batch
from studio.errors import StudioError
from studio.models.base import load_base
from studio.specs import BatchSpec, Event, GenerateSpec, TrainSpec, parse_spec
from studio.trainers.loop import train
from studio.trainers.step import TrainStep

RANK = int(os.environ["RANK"])


class Script:
    """Runs specifications in this process and keeps what came of each.

    Args:
        base: Folder of the base.
        specs: By name, as JSON.
    """

    def __init__(self, base: str, specs: dict[str, Any]) -> None:
        self._pipe, self._specs = load_base(base, device="cpu"), specs
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, name: str, *, stop_after: int | None = None, to: str | None = None, **values: Any) -> None:
        """Run one and keep events, drawn pictures, and adapter or error under its name, or another."""
        events: list[Event] = []
        drawn: list[str] = []

        def draw(
            pipe: Any, adapter: Adapter | None, specs: Sequence[GenerateSpec], paths: Sequence[Path]
        ) -> list[Image.Image]:
            drawn.extend(spec.prompt for spec in specs)
            return [Image.new("RGB", (64, 64), "green") for _ in specs]

        asked = itertools.count()
        stop = lambda: next(asked) == stop_after  # noqa: E731
        spec = TrainSpec.model_validate(self._specs[name] | values)
        found: dict[str, Any] = {"events": events, "drawn": drawn}
        try:
            found["adapter"] = train(self._pipe, spec, on_event=events.append, stop=stop, sample=draw)
        except (StudioError, OSError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        self.found[to or name] = found

    def draw(self, name: str, values: dict[str, Any]) -> None:
        """Draw a batch and keep the names of the pictures that this process wrote, and result or error."""
        events: list[Event] = []
        found: dict[str, Any] = {"events": events}
        try:
            found["result"] = draw_batch(parse_spec(BatchSpec, values), on_event=events.append)
        except (StudioError, OSError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        found["pictures"] = [event.path.name for event in events if event.kind == "picture" and event.path]
        self.found[name] = found


@contextmanager
def second_picture_breaks(*, rank: int, by: OSError) -> Iterator[None]:
    """Have the second picture that one of the processes writes raise."""
    write, calls = studio.drawing.write_png, []

    def broken(*args: Any) -> str:
        calls.append(1)
        if rank == RANK and len(calls) == 2:
            raise by
        return write(*args)

    studio.drawing.write_png = broken
    yield
    studio.drawing.write_png = write


@contextmanager
def second_step_breaks(*, rank: int, by: OSError | float) -> Iterator[None]:
    """Have the second forward pass of one of the processes raise, or return a loss that is multiplied."""
    forward, calls = TrainStep.forward, []

    def broken(self: TrainStep, batch: Any) -> torch.Tensor:
        calls.append(1)
        if rank != RANK or len(calls) != 2:
            return forward(self, batch)
        if isinstance(by, OSError):
            raise by
        return forward(self, batch) * by

    TrainStep.forward = broken  # type: ignore[method-assign]
    yield
    TrainStep.forward = forward  # type: ignore[method-assign]


def main(base: str, plan: str, folder: str) -> None:
    """Run all of the plan and write down what this process found."""
    torch.set_num_threads(1)
    # The libraries' half a million objects live to the end.
    gc.freeze()
    specs = json.loads(Path(plan).read_text(encoding="utf-8"))
    batch = specs.pop("batch")
    script = Script(base, specs)
    for name in specs:
        script.run(name)
    # One of the processes alone asks for the stop.
    script.run("lora", stop_after=1 if RANK == 1 else None, to="stopped", overwrite=True, checkpoint_every=1)
    script.run("lora", to="resumed", resume=True)
    fails = {"output": str(Path(folder, "fails.safetensors")), "overwrite": True}
    with second_step_breaks(rank=1, by=OSError("a picture is gone")):
        script.run("lora", to="second fails", **fails)
    with second_step_breaks(rank=0, by=OSError("the disk is full")):
        script.run("lora", to="first fails", **fails)
    with second_step_breaks(rank=1, by=float("nan")):
        script.run("lora", to="diverges", **fails)
    script.run("lora", to="unlike", seed=RANK, **fails)
    with second_picture_breaks(rank=1, by=OSError("the disk is full")):
        script.draw("batch fails", batch)
    script.draw("batch", batch)
    script.draw("batch again", batch)
    Path(folder, f"{RANK}.pickle").write_bytes(pickle.dumps(script.found))


if __name__ == "__main__":
    main(*sys.argv[1:])
