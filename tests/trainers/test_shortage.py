"""Too little memory: said before, told in one message, and what is done is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.errors import MemoryShortage
from studio.specs import Event, TrainSpec
from studio.trainers import forecast
from studio.trainers.loop import train

Spec = Callable[..., TrainSpec]


def test_a_run_that_finds_too_little_memory_says_what_takes_less_and_what_is_kept(
    one_block_sd: Callable[[], Any], spec: Spec
) -> None:
    pipe, steps = one_block_sd(), []

    def fill(*_: Any) -> None:
        if len(steps) == 2:
            torch.empty(2**58, dtype=torch.uint8)

    values = {"steps": 4, "exclude": (), "checkpoint_every": 1}
    handle = pipe.unet.conv_in.register_forward_hook(fill)
    with pytest.raises(
        MemoryShortage, match=r"machine's memory is not enough: 2\.68e\+08 GiB more"
    ) as caught:
        train(
            pipe, spec(**values), on_event=lambda event: steps.append(1) if event.kind == "progress" else None
        )
    handle.remove()
    checkpoint = spec().output.parent / "dog-run" / "checkpoints" / "000002.safetensors"
    text = str(caught.value)
    assert "batch_size 1 with gradient_accumulation 2" in text and "gradient_checkpointing" in text
    assert f"The checkpoint after step 2 is kept, {checkpoint}: resume" in text and checkpoint.exists()
    less = {"batch_size": 1, "gradient_accumulation": 2, "gradient_checkpointing": True, "resume": True}
    assert train(pipe, spec(**values, **less)).metadata["ss_steps"] == "4"


def test_a_gpu_that_cannot_hold_the_base_is_told_without_a_checkpoint_of_another_run(
    one_block_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")

    values = {"steps": 1, "exclude": (), "checkpoint_every": 1}
    train(one_block_sd(), spec(**values))
    monkeypatch.setattr("studio.trainers.borrow._convert", convert)
    with pytest.raises(MemoryShortage, match=r"^the GPU's memory is not enough: 2\.00 GiB") as caught:
        train(one_block_sd(), spec(**values | {"steps": 2, "overwrite": True}))
    assert "checkpoint after" not in str(caught.value)


def test_a_run_warns_before_it_starts_where_the_estimate_is_more_than_what_is_free(
    one_block_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    monkeypatch.setattr(forecast, "free_memory", lambda _: (1024, 2**30))
    train(one_block_sd(), spec(exclude=()), on_event=events.append)
    told = [event.message or event.kind for event in events]
    warning = next(
        place for place, text in enumerate(told) if text.startswith("Warning: the steps are estim")
    )
    assert "1 KiB are free on 'cpu'" in told[warning] and warning < told.index("progress")
    assert "gradient_checkpointing" in told[warning]


def test_ways_out_on_a_gpu_leave_out_what_is_done_or_refused(spec: Spec) -> None:
    from studio.trainers.shortage import ways_out

    gpu = torch.device("cuda")
    done = {"batch_size": 1, "gradient_checkpointing": True, "offload_encoders": True, "optimizer": "lion"}
    text = ways_out(spec(**done, quantize_base="nf4"), gpu)
    assert not any(name in text for name in ("batch_size", "checkpointing", "offload", "nf4", "adamw8bit"))
    assert "a lower resolution" in text and "Less is taken" not in text
    assert "nf4" in ways_out(spec(), gpu)
    full = TrainSpec.model_validate(spec().model_dump(exclude={"options", "method"}) | {"method": "full"})
    assert "nf4" not in ways_out(full, gpu)
