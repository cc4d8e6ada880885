from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from studio.specs import Event, TrainSpec
from studio.trainers.ema import Ema, mean_of
from studio.trainers.loop import train

Spec = Callable[..., TrainSpec]


def test_the_average_follows_its_formula_and_forgets_the_start() -> None:
    parameter = nn.Parameter(torch.full((3,), 100.0))
    ema, wanted = Ema([parameter], decay=0.5), torch.full((3,), 100.0, dtype=torch.float64)
    for step in range(1, 30):
        parameter.data = torch.tensor([1.0, 2.0, 3.0]) * step
        ema.update()
        keep = min(0.5, step / (9 + step)) if step > 1 else 0.0
        wanted = keep * wanted + (1 - keep) * parameter.detach().double()
    with ema.applied():
        assert torch.allclose(parameter.double(), wanted, rtol=1e-6)  # fp32 sums
    assert parameter.tolist() == [29.0, 58.0, 87.0], "the values return"


def test_a_parameter_of_another_length_starts_anew() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema([parameter], decay=0.9)
    ema.update()
    parameter.data = torch.tensor([7.0])
    ema.update()
    with ema.applied():
        assert parameter.tolist() == [7.0]


def test_the_mean_of_states_is_taken_number_by_number() -> None:
    states = [[torch.tensor([1.0, 2.0]), torch.tensor(0.0)], [torch.tensor([3.0, 6.0]), torch.tensor(1.0)]]
    assert [value.tolist() for value in mean_of(states)] == [[2.0, 4.0], 0.5]


@pytest.mark.parametrize("method", ["lora", "sara"])
def test_averaging_changes_what_is_written_and_not_what_is_trained(
    tiny_sd: Callable[[], Any], spec: Spec, method: str
) -> None:
    def run(**values: Any) -> tuple[list[float], Any]:
        events: list[Event] = []
        given = {**plain, "steps": 4, "overwrite": True, "learning_rate": 1e-2, **values}
        adapter = train(pipe, TrainSpec.model_validate(given), on_event=events.append)
        changes = {
            name: change.delta(torch.zeros(change.shape), weight=1.0)
            for name, change in adapter.changes.items()
        }
        return [event.values["loss"] for event in events if event.kind == "progress"], changes

    pipe = tiny_sd()
    own = {"rank": 2} if method == "lora" else {"rank_weight": 0, "reselect_at": 0}
    plain = spec().model_dump(exclude={"options"}) | {"method": method} | own
    losses, last = run()
    after = [run(steps=4, checkpoint_every=1, keep_checkpoints=4, average_last=number) for number in (1, 3)]
    averaged = run(ema_decay=0.9, save_every=1)
    assert losses == after[0][0] == after[1][0] == averaged[0], "training sees its own parameters"
    name = max(last, key=lambda key: float(last[key].abs().max()))
    assert torch.equal(after[0][1][name], last[name]), "of one, the mean is itself"
    assert not torch.equal(after[1][1][name], last[name])
    assert not torch.equal(averaged[1][name], last[name])
