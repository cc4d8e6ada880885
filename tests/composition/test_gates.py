"""What composing may cost, as counts that do not depend on the machine."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio.composition.engine import compose
from studio.models.shadow import shadowed

METHODS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "merge": ("merge", {}, {}),
    "switch": ("switch", {"switch_every": 1, "solver_history": "drop"}, {}),
    "klora": ("klora", {}, {}),
    "composite": ("composite", {}, {}),
    "composite-own-text": ("composite", {"text_encoder_policy": "own"}, {}),
    "cached": ("composite", {}, {"cache": {"interval": 2, "full_first": 0, "full_last": 0}}),
    "unguided": ("merge", {}, {"skip-guidance": {"start": 0.5}}),
}


class Operations(TorchDispatchMode):
    """Count operations by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> int:
        """Values read on the host, for which a GPU is waited for."""
        read = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")
        return sum(self.counts[name] for name in read)


LINEAR = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
)
CONVOLUTION = "unet.mid_block.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any) -> dict[str, Any]:
    targets = (*LINEAR, CONVOLUTION)
    return {
        name: make_adapter(sd, seed, targets=targets, text=True) for seed, name in enumerate(("one", "two"))
    }


@pytest.mark.parametrize("name", ["merge", "switch", "klora"])
def test_merged_and_switched_weights_add_no_operation_to_a_step(
    name: str, sd: Any, pair: Any, draw: Any
) -> None:
    method, options, modifiers = METHODS[name]
    with counting(sd) as base:
        draw(sd, steps=4)
    with compose(sd, pair, method=method, options=options, modifiers=modifiers):
        # The first run forms what the second one has.
        draw(sd, steps=4)
        with counting(sd) as composed:
            draw(sd, steps=4)
    assert composed == base and len(base) == 4


@contextmanager
def counting(pipe: Any) -> Iterator[list[Counter[str]]]:
    """Count the operations of each denoiser call inside the block."""
    counted: list[Counter[str]] = []
    forward = pipe.unet.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        with Operations() as operations:
            answer = forward(*args, **kwargs)
        counted.append(operations.counts)
        return answer

    with shadowed(pipe.unet, {"forward": watch}):
        yield counted


@pytest.mark.parametrize("count", [2, 5])
def test_in_one_batch_a_linear_layer_takes_two_operations_more_for_any_number_of_adapters(
    count: int, sd: Any, make_adapter: Any, draw: Any
) -> None:
    adapters = {f"adapter{seed}": make_adapter(sd, seed, targets=LINEAR) for seed in range(count)}
    # Beneath the composition: what the denoiser does, without what puts batches together and takes the mean.
    with counting(sd) as counted:
        draw(sd, steps=1)
        with compose(sd, adapters, method="composite"):
            draw(sd, steps=2)
    base, _, composed = counted
    assert composed - base == Counter({"aten.bmm.default": 3, "aten.baddbmm_.default": 3})
    assert composed.total() - base.total() == 2 * len(LINEAR)


@pytest.fixture(scope="module")
def own_syncs(sd: Any, draw: Any) -> list[int]:
    """Return how often the pipeline alone reads a value on the host, in runs of 4 and of 6 steps."""
    return [synced(sd, draw, steps) for steps in (4, 6)]


@pytest.mark.parametrize("name", METHODS)
def test_no_value_is_read_on_the_host_beyond_the_pipelines_own(
    name: str, sd: Any, pair: Any, draw: Any, own_syncs: list[int]
) -> None:
    """Steps are compared: one more step costs the base as many reads as a composition."""
    method, options, modifiers = METHODS[name]
    with compose(sd, pair, method=method, options=options, modifiers=modifiers):
        draw(sd, steps=4)
        composed = [synced(sd, draw, steps) for steps in (4, 6)]
    assert composed[1] - composed[0] == own_syncs[1] - own_syncs[0]
    # Once for a run it is asked whether the rows that are told apart are the composed prompt's.
    assert composed[0] - own_syncs[0] <= (name in ("composite-own-text", "unguided"))


def synced(pipe: Any, draw: Any, steps: int) -> int:
    with Operations() as operations:
        draw(pipe, steps=steps)
    return operations.syncs


def test_a_compiled_denoiser_is_traced_once_for_any_number_of_switches(
    short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = short_sd()
    targets = (*LINEAR, CONVOLUTION)
    triple = {
        name: make_adapter(pipe, seed, targets=targets) for seed, name in enumerate(("one", "two", "three"))
    }
    with compose(pipe, triple, method="switch", options={"switch_every": 1}):
        wanted = draw(pipe, steps=6)
    torch._dynamo.reset()
    block = pipe.unet.mid_block
    pipe.unet.mid_block = torch.compile(block, backend=count)
    plain = draw(pipe, steps=2)
    traced = len(graphs)
    with compose(pipe, triple, method="switch", options={"switch_every": 1}):
        got = draw(pipe, steps=6)
    assert torch.equal(draw(pipe, steps=2), plain)
    torch._dynamo.reset()
    assert len(graphs) == traced > 0
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
