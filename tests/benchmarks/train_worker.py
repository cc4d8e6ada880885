"""One process of ``bench_train_cost``: makes training steps when it is told to and says what they took.

python tests/benchmarks/train_worker.py '["studio", {"method": "lora", "rank": 16}]' random
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft import LoraConfig
from PIL import Image

import studio
from studio.assets.builder.build import STARTER
from studio.models.activations import fewer_kept
from studio.specs import Event, TrainSpec
from studio.trainers.loop import train

BATCH = 2
RANK = 16
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Provider:
    """Something that makes training steps.

    Attributes:
        kind: "forward", "full" or "peft" for a plain loop of this file, "passes" for one that updates
            nothing, "studio" for the studio's own.
        options: Of the optimizer, or of the studio's run.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


def make_pipe(model: str) -> Any:
    """Return the starter, or the random model with the starter's tokenizer and schedule."""
    pipe = studio.load_base("starter", device="cpu", precision="fp32")
    if model == "starter":
        return pipe
    torch.manual_seed(0)
    width = 256
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(96, 192, 384),
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )
    text = transformers.CLIPTextConfig(
        vocab_size=len(pipe.tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=diffusers.AutoencoderKL(),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=pipe.tokenizer,
        scheduler=diffusers.DDIMScheduler.from_pretrained(STARTER, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to("cpu")


class Worker:
    """The process of one provider: tells of each step on its output and waits for a word to go on."""

    def __init__(self, provider: Provider, model: str) -> None:
        self._provider, self._pipe = provider, make_pipe(model)
        parts = (self._pipe.unet, self._pipe.vae, self._pipe.text_encoder)
        self._base = {tensor.data_ptr() for part in parts for tensor in part.state_dict().values()}
        self._began = 0.0

    def run(self) -> None:
        """Make steps until told to end."""
        self.pause(0.0)
        loops: dict[str, Callable[[], None]] = {
            "studio": self.studio_loop,
            "forward": self.forward_loop,
            "passes": self.passes_loop,
        }
        loops.get(self._provider.kind, self.plain_loop)()

    def pause(self, loss: float) -> None:
        """Tell of the step that ended and wait; the first one ends before it began."""
        seconds = time.process_time() - self._began
        print(json.dumps({"loss": loss, "seconds": seconds, "peak": resident("VmHWM")}), flush=True)
        while (word := sys.stdin.readline().strip()) != "step":
            if word == "forget":
                Path("/proc/self/clear_refs").write_text("5")
            elif word == "state":
                print(json.dumps(held(self._base)), flush=True)
            else:
                sys.stdout.flush()
                os._exit(0)
        self._began = time.process_time()

    def studio_loop(self) -> None:
        """Train in the studio's own loop, which tells of every step."""

        def watch(event: Event) -> None:
            if event.kind == "progress":
                self.pause(event.values["loss"])

        side = self._pipe.unet.config.sample_size * self._pipe.vae_scale_factor
        with tempfile.TemporaryDirectory() as folder:
            for number in range(BATCH):
                Image.effect_noise((side, side), 90).convert("RGB").save(Path(folder) / f"{number}.png")
            given = {"data": folder, "prompt": "a photo of sks dog", "output": Path(folder) / "a.safetensors"}
            given |= {"steps": 100_000, "batch_size": BATCH, "schedule": "constant", "learning_rate": 1e-5}
            given |= {"min_snr_gamma": None, "cache": "memory", "precision": "fp32", "device": "cpu"}
            train(self._pipe, TrainSpec.model_validate(given | dict(self._provider.options)), on_event=watch)

    def plain_loop(self) -> None:
        """Train as diffusers' example scripts do, with clipping: all weights, or peft's LoRA."""
        unet = self._pipe.unet.train()
        if self._provider.kind == "peft":
            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS)))
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, **self._provider.options)
        inputs = self._inputs()
        while True:
            loss = torch.nn.functional.mse_loss(unet(*inputs, return_dict=False)[0], inputs[0])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.pause(loss.item())

    def forward_loop(self) -> None:
        """Run the forward pass alone."""
        inputs = self._inputs()
        with torch.no_grad():
            while True:
                found = self._pipe.unet(*inputs, return_dict=False)[0]
                self.pause(torch.nn.functional.mse_loss(found, inputs[0]).item())

    def passes_loop(self) -> None:
        """Run both passes and free every gradient as it comes: less than that no method can do.

        Frozen, the gradient passes through the network to its input, as it must to reach the first layers,
        and the fewest activations are kept.
        """
        unet = self._pipe.unet.train().requires_grad_(not self._provider.options["frozen"])

        def free(weight: torch.Tensor) -> None:
            weight.grad = None

        latents, *conditions = self._inputs()
        for leaf in (*unet.parameters(), latents.requires_grad_(self._provider.options["frozen"])):
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(free)
        with fewer_kept(unet):
            while True:
                found = unet(latents, *conditions, return_dict=False)[0]
                loss = torch.nn.functional.mse_loss(found, latents.detach())
                loss.backward()
                self.pause(loss.item())

    def _inputs(self) -> tuple[Any, Any, Any]:
        config = self._pipe.unet.config
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(
            BATCH, config.in_channels, config.sample_size, config.sample_size, generator=generator
        )
        words = torch.randn(BATCH, 77, config.cross_attention_dim, generator=generator)
        return latents, torch.tensor([100, 700]), words


def resident(name: str) -> int:
    """Return a line of the process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def held(base: set[int]) -> dict[str, int]:
    """Return the bytes of what is kept between steps beside the base's tensors.

    Args:
        base: Where the base's tensors lie.
    """
    objects = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor | torch.optim.Optimizer)]
    optimizers = [one for one in objects if type(one).__name__ in ("AdamW", "SparseAdamW")]
    trained = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
    moments = {
        value.data_ptr(): value.nbytes
        for one in optimizers
        for state in one.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    }
    values = {one.data_ptr(): one.nbytes for one in trained if one.data_ptr() not in base}
    # Views count once, as the whole of what they show.
    others = {
        one.untyped_storage().data_ptr(): (one.untyped_storage().nbytes(), one.dtype)
        for one in objects
        if isinstance(one, torch.Tensor) and one.device.type == "cpu"
    }
    known = base | set(moments) | set(values)
    rest = {place: found for place, found in others.items() if place not in known}
    index = sum(size for size, dtype in rest.values() if dtype == torch.int32)
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "values": sum(values.values()),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "moments": sum(moments.values()),
        "index": index,
        "copies": sum(size for size, _ in rest.values()) - index,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    Worker(Provider(*json.loads(sys.argv[1])), sys.argv[2]).run()
