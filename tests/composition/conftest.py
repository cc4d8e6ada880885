"""Adapters for the tests of composition: random low-rank changes of a pipeline's own layers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

TARGET = {
    "linear": "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
    "conv": "unet.mid_block.resnets.0.conv1.weight",
    "text": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",
}
TARGETS = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    TARGET["linear"],
    TARGET["conv"],
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
)


@pytest.fixture
def make_adapter() -> Callable[..., Any]:
    """Return a factory: pipeline, seed, names of parameters -> Adapter of rank 3 and alpha 2."""

    def make(pipe: Any, seed: int, *, targets: Sequence[str] = TARGETS, text: bool = False) -> Any:
        import torch

        from studio.adapters.adapter import Adapter
        from studio.adapters.kinds.lora import LoraChange
        from studio.adapters.parameters import components_of, find_parameter

        generator = torch.Generator().manual_seed(seed)
        names = [*targets, TARGET["text"]] if text else list(targets)
        shapes = {name: tuple(find_parameter(components_of(pipe), name).shape) for name in names}
        changes = {name: LoraChange.sample(shape, generator=generator) for name, shape in shapes.items()}
        return Adapter(name=f"adapter{seed}", kind="lora", changes=changes)

    return make


@pytest.fixture(scope="session")
def make_frequency_adapter() -> Callable[..., Any]:
    """Return a factory: pipeline, "edges" or "shapes" -> Adapter that draws these, and nothing else."""

    def make(pipe: Any, name: str) -> Any:
        import torch

        from studio.adapters.adapter import Adapter
        from studio.adapters.kinds.full import FullChange

        line = torch.tensor([-0.5, 1.0, -0.5]) if name == "edges" else torch.ones(3) / 3
        weight = pipe.unet.conv_out.weight
        mixture = torch.randn(*weight.shape[:2], 1, 1, generator=torch.Generator().manual_seed(0))
        return Adapter(name, "full", {"unet.conv_out.weight": FullChange(mixture * torch.outer(line, line))})

    return make


@pytest.fixture
def target() -> dict[str, str]:
    """Return names of parameters that the adapters change: "linear", "conv" and "text"."""
    return TARGET


@pytest.fixture
def parameter() -> Callable[..., Any]:
    """Return a function from a pipeline and a parameter's name to its value."""

    def read(pipe: Any, name: str = TARGET["linear"]) -> Any:
        from studio.adapters.parameters import components_of, find_parameter

        return find_parameter(components_of(pipe), name).detach()

    return read


@pytest.fixture
def summed(parameter: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function: the weight plus the weighted changes, summed in fp64 and rounded once."""

    def add(pipe: Any, uses: Sequence[tuple[Any, float]], name: str = TARGET["linear"]) -> Any:
        total = parameter(pipe, name).double()
        for adapter, weight in uses:
            change = adapter.changes[name]
            scale = weight * change.alpha / change.down.shape[0]
            product = change.up.double().flatten(1) @ change.down.double().flatten(1)
            total = total + scale * product.reshape(total.shape)
        return total

    return add


@pytest.fixture
def watch(parameter: Callable[..., Any]) -> Callable[..., tuple[list[Any], Any]]:
    """Return a function: a list that fills with a parameter's value at each denoiser call, and its hook."""

    def start(pipe: Any, name: str = TARGET["linear"]) -> tuple[list[Any], Any]:
        seen: list[Any] = []
        return seen, pipe.unet.register_forward_hook(lambda *_: seen.append(parameter(pipe, name).clone()))

    return start


@pytest.fixture(scope="session")
def draw() -> Callable[..., Any]:
    """Return a function that runs a pipeline to its latents with a fixed seed."""

    def run(pipe: Any, *, steps: int = 4, seed: int = 0, prompt: str = "a fox", **more: Any) -> Any:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return pipe(
            prompt, num_inference_steps=steps, generator=generator, output_type="latent", **more
        ).images

    return run


@pytest.fixture
def snapshot() -> Callable[[Any], dict[str, Any]]:
    """Return a function that copies every parameter and buffer of a pipeline's modules."""

    def copy(pipe: Any) -> dict[str, Any]:
        from studio.adapters.parameters import components_of

        return {
            f"{component}.{name}": tensor.detach().clone()
            for component, module in components_of(pipe).items()
            for name, tensor in module.state_dict().items()
        }

    return copy
