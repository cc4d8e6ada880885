"""The evaluator: a small CNN that names the subject, style and background of a picture.

It is trained on renders only (never on generated pictures), with blur, noise and colour shifts so that a
picture need not be perfect to be recognised, and it knows the held-out subjects, styles and backgrounds.

    python -m studio.assets.builder.evaluator
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from studio.assets.builder.autoencoder import to_unit
from studio.assets.builder.dataset import render_many
from studio.assets.builder.subjects import SHIPPED, VOCABULARIES, Vocabulary
from studio.assets.builder.training import Machine, Schedule, Training, train

FOLDER = Path(__file__).resolve().parent.parent / "evaluator"
STEPS, RENDERS = 1600, 32_768  # of the shipped one's training
_WIDTHS = (32, 64, 128, 256)
_COUNTER = ".num_batches_tracked"
_CHUNK = 128  # pictures looked at at once


class Evaluator(nn.Module):
    """Map pictures ``[N, 3, size, size]`` in [-1, 1] to logits over subjects, styles and backgrounds.

    Attributes:
        vocabulary: What it can name.
        size: Side in pixels of the pictures it was trained on.
    """

    def __init__(self, vocabulary: Vocabulary, *, size: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.size = size
        layers: list[nn.Module] = []
        previous = 3
        for width in _WIDTHS:
            layers += [
                nn.Conv2d(previous, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            previous = width
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList(
            nn.Linear(2 * previous, len(names))
            for names in (vocabulary.all_subjects, vocabulary.all_styles, vocabulary.all_backgrounds)
        )

    def features(self, pictures: Tensor) -> Tensor:
        """Return ``[N, 512]``: mean and maximum of the last feature map."""
        hidden = self.body(pictures)
        return torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        features = self.features(pictures)
        return [head(features) for head in self.heads]


@dataclass(frozen=True)
class Verdict:
    """What the evaluator sees in a picture."""

    subject: str
    style: str
    background: str


@cache
def load_evaluator(folder: Path = FOLDER) -> Evaluator:
    """Return the shipped evaluator in fp32."""
    facts = json.loads((folder / "facts.json").read_text())
    model = Evaluator(VOCABULARIES[facts["vocabulary"]], size=facts["size"])
    # The batch norms' counters matter to training only and are not shipped: they keep their start.
    weights = {key: value for key, value in model.state_dict().items() if key.endswith(_COUNTER)}
    weights |= {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval()


def as_tensor(pictures: list[Image.Image]) -> Tensor:
    """Return pictures of any size as ``[N, 3, size, size]`` in [-1, 1], as the evaluator looks at them."""
    size = load_evaluator().size
    rows = [
        np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX)) for picture in pictures
    ]
    return to_unit(torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2))


@torch.no_grad()
def judge(pictures: list[Image.Image]) -> list[Verdict]:
    """Return a verdict for every picture."""
    model = load_evaluator()
    words = model.vocabulary
    names = [each.name for each in words.all_subjects], words.all_styles, tuple(words.all_backgrounds)
    answers = torch.cat(
        [
            torch.stack([logits.argmax(1) for logits in model(chunk)], 1)
            for chunk in as_tensor(pictures).split(_CHUNK)
        ]
    )
    return [
        Verdict(*(known[each] for known, each in zip(names, row, strict=True))) for row in answers.tolist()
    ]


@torch.no_grad()
def picture_features(pictures: list[Image.Image]) -> Tensor:
    """Return ``[N, 512]`` features whose cosine measures how alike two pictures are to the evaluator."""
    return load_evaluator().features(as_tensor(pictures))


def _disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures with random softness, noise and colour shifts, each on about half of the batch."""
    count, device = len(pictures), pictures.device

    def share() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator, device=device)

    def half() -> Tensor:
        return (share() < 0.5).float()

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, half() * share())
    noise = torch.randn(pictures.shape, generator=generator, device=device)
    pictures = pictures + half() * 0.15 * share() * noise
    shift = torch.rand(count, 3, 1, 1, generator=generator, device=device) - 0.5
    return pictures + half() * 0.12 * shift


def train_evaluator(
    vocabulary: Vocabulary,
    *,
    size: int,
    renders: int,
    schedule: Schedule,
    machine: Machine,
    state: Path,
    batch: int = 128,
    workers: int = 2,
    seed: int = 7,
) -> tuple[Evaluator, Training]:
    """Return an evaluator and its training, which goes as far as the machine's deadline allows."""
    torch.manual_seed(seed)
    device = machine.torch_device
    data = render_many(
        renders, seed=100 + seed, size=size, vocabulary=vocabulary, held_out=True, workers=workers
    )
    model = Evaluator(vocabulary, size=size).to(device)

    def loss_at(step: int) -> Tensor:
        generator = machine.generator(seed, step)
        rows = torch.randint(renders, (batch,), generator=generator, device=device).cpu()
        pictures = _disturb(to_unit(data.pixels[rows].to(device)), generator)
        labels = data.labels[rows].to(device)
        with machine.autocast():
            logits = model(pictures)
        losses = [
            F.cross_entropy(part.float(), labels[:, head], label_smoothing=0.05)
            for head, part in enumerate(logits)
        ]
        return torch.stack(losses).sum()

    training = train(model, loss_at, schedule=schedule, machine=machine, state=state, name="evaluator")
    return model.cpu().eval(), training


@torch.no_grad()
def measure(model: Evaluator, *, seed: int, count: int = 4096, workers: int = 2) -> dict[str, float]:
    """Return the share of right answers per head on fresh renders, held-out ones included."""
    fresh = render_many(
        count, seed=seed, size=model.size, vocabulary=model.vocabulary, held_out=True, workers=workers
    )
    right = [
        torch.stack([part.argmax(1) for part in model(to_unit(chunk))], 1) == labels
        for chunk, labels in zip(fresh.pixels.split(_CHUNK), fresh.labels.split(_CHUNK), strict=True)
    ]
    shares = torch.cat(right).float().mean(0).tolist()
    return dict(zip(("subject", "style", "background"), (round(share, 4) for share in shares), strict=True))


def save_evaluator(model: Evaluator, folder: Path, **facts: object) -> None:
    """Write weights in fp16, and the facts that loading and the model cards need."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.endswith(_COUNTER)}
    save_file(weights, folder / "model.safetensors")
    known = {"vocabulary": model.vocabulary.name, "size": model.size} | facts
    (folder / "facts.json").write_text(json.dumps(known, indent=2) + "\n")


def build_evaluator(
    vocabulary: Vocabulary,
    output: Path,
    *,
    size: int,
    steps: int,
    renders: int,
    machine: Machine,
    work: Path,
    workers: int = 2,
) -> bool:
    """Train the evaluator and, when that is over, write it; return whether it is.

    Args:
        vocabulary: What it shall name.
        output: Folder to write.
        size: Side in pixels of the pictures it looks at.
        steps: Steps of training.
        renders: Pictures to train on.
        machine: Device and deadline.
        work: Folder of the state; a second run goes on from there.
        workers: Processes that render.
    """
    finished = work / "finished"
    if not finished.exists():
        work.mkdir(parents=True, exist_ok=True)
        model, training = train_evaluator(
            vocabulary,
            size=size,
            renders=renders,
            schedule=Schedule(steps, rate=3e-3, warmup=80, decay=0.9, weight_decay=0.02),
            machine=machine,
            state=work / "evaluator.pt",
            workers=workers,
        )
        if not training.done:
            return False
        accuracy = measure(model, seed=999, workers=workers)
        save_evaluator(model, finished, accuracy_on_4096_fresh_renders=accuracy, steps=steps, renders=renders)
        print(f"evaluator: {accuracy}")
    shutil.copytree(finished, output, dirs_exist_ok=True)
    return True


def main() -> None:
    """Train and publish the evaluator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default=SHIPPED.name)
    parser.add_argument("--size", type=int, default=128, help="side of the pictures it looks at, in pixels")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--renders", type=int, default=RENDERS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render")
    parser.add_argument("--work", type=Path, help="folder of the state (default: build/evaluator-VOCABULARY)")
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    build_evaluator(
        VOCABULARIES[args.vocabulary],
        args.output,
        size=args.size,
        steps=args.steps,
        renders=args.renders,
        machine=Machine(args.device, deadline=time.monotonic() + 60 * args.minutes),
        work=args.work or Path("build") / f"evaluator-{args.vocabulary}",
        workers=args.workers,
    )


if __name__ == "__main__":
    main()
