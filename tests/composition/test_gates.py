"""What composing may cost, as counts that do not depend on the machine."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio.composition.engine import compose

METHODS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "merge": ("merge", {}, {}),
    "switch": ("switch", {"switch_every": 1}, {}),
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
        return self.counts["aten._local_scalar_dense.default"] + self.counts["aten.nonzero.default"]


@pytest.fixture(scope="module")
def sd(tiny_sd: Any) -> Any:
    return tiny_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any) -> dict[str, Any]:
    return {"one": make_adapter(sd, 1, text=True), "two": make_adapter(sd, 2, text=True)}


@pytest.mark.parametrize("name", ["merge", "switch", "klora"])
def test_merged_and_switched_weights_add_no_operation_to_a_step(
    name: str, sd: Any, pair: Any, draw: Any
) -> None:
    method, options, modifiers = METHODS[name]
    base = per_call(sd, draw)
    with compose(sd, pair, method=method, options=options, modifiers=modifiers):
        # The first run forms what the second one has.
        draw(sd, steps=6)
        assert per_call(sd, draw) == base


def per_call(pipe: Any, draw: Any) -> list[Counter[str]]:
    """Return the operations of each denoiser call of a run."""
    counted: list[Counter[str]] = []
    forward = pipe.unet.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        with Operations() as operations:
            answer = forward(*args, **kwargs)
        counted.append(operations.counts)
        return answer

    had = vars(pipe.unet).get("forward")
    vars(pipe.unet)["forward"] = watch
    draw(pipe, steps=6)
    if had is None:
        del vars(pipe.unet)["forward"]
    else:
        vars(pipe.unet)["forward"] = had
    return counted


@pytest.mark.parametrize("name", METHODS)
def test_no_value_is_read_on_the_host_beyond_the_pipelines_own(
    name: str, sd: Any, pair: Any, draw: Any
) -> None:
    """Steps are compared: one more step costs the base as many reads as a composition."""
    method, options, modifiers = METHODS[name]
    with compose(sd, pair, method=method, options=options, modifiers=modifiers):
        draw(sd, steps=4)
        composed = [synced(sd, draw, steps) for steps in (4, 6)]
    base = [synced(sd, draw, steps) for steps in (4, 6)]
    assert composed[1] - composed[0] == base[1] - base[0]
    assert composed[0] <= base[0]


def synced(pipe: Any, draw: Any, steps: int) -> int:
    with Operations() as operations:
        draw(pipe, steps=steps)
    return operations.syncs


def test_a_compiled_denoiser_is_traced_once_for_any_number_of_switches(
    tiny_sd: Any, make_adapter: Any, draw: Any
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = tiny_sd()
    triple = {name: make_adapter(pipe, seed) for seed, name in enumerate(("one", "two", "three"), start=1)}
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
