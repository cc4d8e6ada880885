"""What passes take is told from small ones, exactly where torch can be asked the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from studio.adapters.adapter import Adapter
from studio.specs import Event, TrainSpec
from studio.trainers import forecast
from studio.trainers.loop import train
from studio.trainers.pass_cost import Speed, Tally, training_pass

CPU = torch.device("cpu")
SPEED = Speed(flops=1e9, traffic=1e9)


def forward(pipe: Any, *, rows: int = 2) -> Callable[[int, int], Tensor]:
    """Return a pass through a UNet of which the attention learns."""
    unet = pipe.unet.train()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".attn" in name)
    words = torch.zeros(rows, 77, unet.config.cross_attention_dim)

    def run(height: int, width: int) -> Tensor:
        noise = torch.ones(rows, unet.config.in_channels, height, width)
        loss: Tensor = unet(noise, torch.zeros(rows), words, return_dict=False)[0].square().mean()
        return loss

    return run


def saved(pipe: Any, run: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of a pass beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in pipe.unet.parameters()}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()
    assert loss.requires_grad
    return sum(value.untyped_storage().nbytes() for key, value in found.items() if key not in own)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_small_passes_say_what_a_larger_one_keeps(one_block_sd: Callable[[], Any], attention: str) -> None:
    pipe = one_block_sd()
    run = forward(pipe)
    if attention == "eager":
        pipe.unet.set_attn_processor(AttnProcessor())
    memory, _ = training_pass(run, (24, 24), parts=[pipe.unet], speed=SPEED, device=CPU)
    kept = saved(pipe, lambda: run(24, 24))
    assert kept <= memory <= 1.1 * kept, "beside it there is what the last operations work with"


def test_arithmetic_is_that_of_torchs_own_counter_with_the_backward_pass(
    one_block_sd: Callable[[], Any],
) -> None:
    pipe = one_block_sd()
    # Of attention as one operation on the CPU it has no formula.
    pipe.unet.set_attn_processor(AttnProcessor())
    run = forward(pipe)
    with Tally() as tally:
        loss = run(8, 8)
    with FlopCounterMode(display=False) as counter:
        run(8, 8).backward()
    assert loss.requires_grad
    assert tally.work.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_checkpointing_takes_what_blocks_get_and_one_block(short_sd: Callable[[], Any]) -> None:
    pipe = short_sd()
    run = forward(pipe)
    plain, time = training_pass(run, (8, 8), parts=[pipe.unet], speed=SPEED, device=CPU)
    pipe.unet.enable_gradient_checkpointing()
    given = saved(pipe, lambda: run(8, 8))
    less, longer = training_pass(run, (8, 8), parts=[pipe.unet], speed=SPEED, device=CPU)
    with Tally() as tally:
        run(8, 8).backward()
    gradients = sum(value.grad.nbytes for value in pipe.unet.parameters() if value.grad is not None)
    assert given < less < plain / 2 and longer > time
    assert less == pytest.approx(tally.work.memory - gradients, rel=0.25)


def same(first: Adapter, second: Adapter) -> bool:
    pairs = zip(first.changes.values(), second.changes.values(), strict=True)
    return all(
        torch.equal(
            one.delta(torch.ones(one.shape), weight=1), other.delta(torch.ones(other.shape), weight=1)
        )
        for one, other in pairs
    )


def test_the_estimate_changes_no_bit_and_a_run_goes_on_where_it_fails(
    one_block_sd: Callable[[], Any], spec: Callable[..., TrainSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("not on this base")

    monkeypatch.setattr(forecast, "SHORT", 0)

    def run(**values: Any) -> tuple[Adapter, str]:
        events: list[Event] = []
        values = {"steps": 3, "exclude": (), "dropout": 0.5, **values}
        adapter = train(one_block_sd(), spec(**values), on_event=events.append)
        return adapter, next(event.message for event in events if event.message.startswith("Memory:"))

    told, text = run()
    monkeypatch.setattr(forecast, "training_pass", fail)
    without, short = run(overwrite=True)
    assert same(told, without)
    assert "activations" in text and "Time:" in text
    assert "before activations" in short and "Time:" not in short
