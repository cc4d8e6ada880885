"""What ``bench_compose`` compares: the studio's compositions, and rivals written here anew.

The rivals are LoRA layers of peft beside the weights, ``set_adapters`` at every step, fusing and unfusing,
and LoRA Composite with one evaluation after the other.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import full_size
import torch
import train_worker
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import studio
from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.live import LiveLayers
from studio.adapters.parameters import canonical_names, components_of

MOST = 8
"""Adapters that are loaded."""
LATENTS = {"random": 32, "sd1": 64, "sdxl": 128}
"""Side of the latents by model."""

Step = Callable[[Any, Any], Tensor]


class Ready(NamedTuple):
    """A provider at work: a step of this pipeline, and for the studio's the composition."""

    pipe: Any
    step: Step
    composition: Any = None


Provider = Callable[["Bench"], AbstractContextManager[Ready]]


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    Attributes:
        model: "random", a UNet of 56 M parameters; "sd1" and "sdxl", of full size and in bf16. All with
            random weights.
        device: Of everything.
        rank: Of the adapters.
        batch: Pictures, each of which is two rows.
        steps: Of a run.
    """

    model: str = "random"
    device: str = "cpu"
    rank: int = 8
    batch: int = 1
    steps: int = 8


class Counter(TorchDispatchMode):
    """Count operations, views left out: a stand-in for kernel launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Bench:
    """Two equal pipelines, one for the studio and one for its rivals, with the same adapters, and inputs."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ours, self.rival = self._pipe(), self._pipe()
        names = [f"a{number}" for number in range(MOST)]
        self.adapters = {
            name: random_adapter(self.ours, name, seed=seed, rank=setting.rank)
            for seed, name in enumerate(names)
        }
        with tempfile.TemporaryDirectory() as folder:
            for name, adapter in self.adapters.items():
                path = Path(folder) / f"{name}.safetensors"
                studio.save_adapter(adapter, path, format="diffusers", dtype=torch.float32)
                self.rival.load_lora_weights(folder, weight_name=path.name, adapter_name=name)
        self.rival.disable_lora()
        unet, side, rows = self.ours.unet, LATENTS[setting.model], 2 * setting.batch
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(setting.device, unet.dtype)

        self.sample = noise(rows, unet.config.in_channels, side, side)
        self.text = noise(rows, 77, unet.config.cross_attention_dim)
        self.added = (
            {"text_embeds": noise(rows, 1280), "time_ids": noise(rows, 6)}
            if setting.model == "sdxl"
            else None
        )

    def _pipe(self) -> Any:
        model = self.setting.model
        if model == "random":
            return train_worker.make_pipe(model).to(self.setting.device)
        return full_size.make_pipe(model, whole_encoders=False).to(self.setting.device)

    def some(self, number: int) -> dict[str, Adapter]:
        """Return the first adapters."""
        return dict(list(self.adapters.items())[:number])

    def encode(self) -> None:
        """Tell the studio's pipeline what the denoiser is given: rows without the prompt, then with it."""
        names = ("negative_prompt_embeds", "prompt_embeds")
        given = dict(zip(names, self.text.chunk(2), strict=True))
        if self.added is not None:
            pooled = self.added["text_embeds"].chunk(2)
            given |= {
                name.replace("prompt", "pooled_prompt"): each
                for name, each in zip(names, pooled, strict=True)
            }
        self.ours.encode_prompt(
            prompt=None,
            device=self.setting.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            **given,
        )

    def forward(self, pipe: Any, timestep: Any) -> Tensor:
        """Evaluate a denoiser."""
        answer: Tensor = pipe.unet(
            self.sample, timestep, self.text, added_cond_kwargs=self.added, return_dict=False
        )[0]
        return answer

    def run(self, pipe: Any, step: Step) -> float:
        """Make a run and return its seconds a step, weights that are formed for the first time included."""
        start = self.clock()
        for timestep in self._timesteps(pipe):
            self._go_on(pipe, step(pipe, timestep), timestep)
        return (self.clock() - start) / self.setting.steps

    def operations(self, pipe: Any, step: Step) -> int:
        """Return the operations of the last step of a run, when all that is kept has been formed."""
        *before, last = self._timesteps(pipe)
        for timestep in before:
            self._go_on(pipe, step(pipe, timestep), timestep)
        with Counter() as counter:
            step(pipe, last)
        return counter.count

    def clock(self) -> float:
        """Return seconds: of the CPU, or on a GPU of the wall after all that it was given to do."""
        if not self.setting.device.startswith("cuda"):
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _timesteps(self, pipe: Any) -> list[Any]:
        pipe.scheduler.set_timesteps(self.setting.steps)
        return list(pipe.scheduler.timesteps)

    def _go_on(self, pipe: Any, answer: Tensor, timestep: Any) -> None:
        half = self.setting.batch
        pipe.scheduler.step(answer[half:], timestep, self.sample[:half])


def random_adapter(pipe: Any, name: str, *, seed: int, rank: int) -> Adapter:
    """Return a LoRA on all attention projections of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    shapes = canonical_names({"unet": components_of(pipe)["unet"]})
    changes = {
        key: LoraChange(
            torch.randn(rank, shape[1], generator=generator) * 0.05,
            torch.randn(shape[0], rank, generator=generator) * 0.05,
            float(rank),
        )
        for key, shape in shapes.items()
        if ".attn" in key and key.endswith(".weight") and "norm" not in key
    }
    return Adapter(name, "lora", changes)


@contextmanager
def base(bench: Bench) -> Iterator[Ready]:
    """The plain denoiser."""
    yield Ready(bench.ours, bench.forward)


def composed(method: str, number: int, **settings: Any) -> Provider:
    """Return the studio's composition of some adapters."""

    @contextmanager
    def provide(bench: Bench) -> Iterator[Ready]:
        weights = {name: 1 / number for name in bench.some(number)} if method == "merge" else None
        with studio.compose(
            bench.ours, bench.some(number), method=method, weights=weights, **settings
        ) as composition:
            bench.encode()
            yield Ready(bench.ours, bench.forward, composition)

    return provide


def live(number: int) -> Provider:
    """Return low-rank layers beside the weights, all adapters of a layer stacked."""

    @contextmanager
    def provide(bench: Bench) -> Iterator[Ready]:
        names = list(bench.adapters["a0"].changes)
        with LiveLayers(components_of(bench.ours), names) as layers:
            layers.apply(
                {
                    name: [(one.changes[name], 1 / number) for one in bench.some(number).values()]
                    for name in names
                }
            )
            yield Ready(bench.ours, bench.forward)

    return provide


def rival(make: Callable[[Bench], Step], number: int) -> Provider:
    """Return one of the rivals, with peft's layers of some adapters on."""

    @contextmanager
    def provide(bench: Bench) -> Iterator[Ready]:
        bench.rival.enable_lora()
        bench.rival.set_adapters(list(bench.some(number)), [1 / number] * number)
        yield Ready(bench.rival, make(bench))
        bench.rival.disable_lora()

    return provide


def unmerged(bench: Bench) -> Step:
    """Return steps with peft's layers beside the weights."""
    return bench.forward


def set_adapters(bench: Bench) -> Step:
    """Return steps of LoRA Switch with peft: another adapter at each."""
    turn = iter(range(10**9))

    def step(pipe: Any, timestep: Any) -> Tensor:
        pipe.set_adapters([f"a{next(turn) % 3}"])
        return bench.forward(pipe, timestep)

    return step


def fusing(bench: Bench) -> Step:
    """Return steps of LoRA Switch that fuse and unfuse."""
    turn = iter(range(10**9))

    def step(pipe: Any, timestep: Any) -> Tensor:
        pipe.fuse_lora(adapter_names=[f"a{next(turn) % 3}"])
        answer = bench.forward(pipe, timestep)
        pipe.unfuse_lora()
        return answer

    return step


def one_after_the_other(bench: Bench) -> Step:
    """Return steps of LoRA Composite of three as published: an evaluation for each, toggled by peft."""

    def step(pipe: Any, timestep: Any) -> Tensor:
        answers = []
        for number in range(3):
            pipe.set_adapters([f"a{number}"])
            answers.append(bench.forward(pipe, timestep))
        return torch.stack(answers).mean(0)

    return step
