"""The evaluator: a small CNN that names the subject, style and background of a picture.

It is trained on renders only (never on generated pictures), with blur, noise and colour shifts so that a
picture need not be perfect to be recognised, and it knows the held-out subjects, styles and backgrounds.

    python -m studio.assets.builder.evaluator --steps 800
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from studio.assets.builder.autoencoder import to_unit
from studio.assets.builder.dataset import render_many
from studio.assets.builder.subjects import ALL_BACKGROUNDS, ALL_STYLES, ALL_SUBJECTS

FOLDER = Path(__file__).resolve().parent.parent / "evaluator"
SIZE = 64
_WIDTHS = (32, 64, 128, 256)
_COUNTER = ".num_batches_tracked"


class Evaluator(nn.Module):
    """Map pictures ``[N, 3, 64, 64]`` in [-1, 1] to logits over subjects, styles and backgrounds."""

    def __init__(self) -> None:
        super().__init__()
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
            nn.Linear(2 * previous, count)
            for count in (len(ALL_SUBJECTS), len(ALL_STYLES), len(ALL_BACKGROUNDS))
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
    model = Evaluator()
    # The batch norms' counters matter to training only and are not shipped: they keep their start.
    weights = {key: value for key, value in model.state_dict().items() if key.endswith(_COUNTER)}
    weights |= {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval()


def as_tensor(pictures: list[Image.Image]) -> Tensor:
    """Return pictures of any size as ``[N, 3, 64, 64]`` in [-1, 1]."""
    rows = [
        np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)) for picture in pictures
    ]
    return to_unit(torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2))


@torch.no_grad()
def judge(pictures: list[Image.Image]) -> list[Verdict]:
    """Return a verdict for every picture."""
    subjects, styles, grounds = (
        logits.argmax(1).tolist() for logits in load_evaluator()(as_tensor(pictures))
    )
    names = list(ALL_BACKGROUNDS)
    return [
        Verdict(ALL_SUBJECTS[s].name, ALL_STYLES[t], names[b])
        for s, t, b in zip(subjects, styles, grounds, strict=True)
    ]


@torch.no_grad()
def picture_features(pictures: list[Image.Image]) -> Tensor:
    """Return ``[N, 512]`` features whose cosine measures how alike two pictures are to the evaluator."""
    return load_evaluator().features(as_tensor(pictures))


def _disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures with random blur, noise and colour shifts, each on about half of the batch."""
    count = len(pictures)

    def half() -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).float()

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, half() * torch.rand(count, 1, 1, 1, generator=generator))
    pictures = pictures + half() * 0.15 * torch.rand(count, 1, 1, 1, generator=generator) * torch.randn(
        pictures.shape, generator=generator
    )
    return pictures + half() * 0.12 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)


def train_evaluator(
    *, steps: int, renders: int, batch: int = 128, rate: float = 3e-3, seed: int = 7
) -> tuple[Evaluator, dict[str, float]]:
    """Return a trained evaluator and its accuracy on 4,096 fresh renders."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = render_many(renders, seed=100 + seed, size=SIZE, held_out=True)
    model = Evaluator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in (progress := tqdm(range(steps), desc="evaluator", mininterval=5)):
        rows = torch.randint(renders, (batch,), generator=generator)
        pictures = _disturb(to_unit(data.pixels[rows]), generator)
        logits = model(pictures)
        parts = [
            F.cross_entropy(part.float(), data.labels[rows, head], label_smoothing=0.05)
            for head, part in enumerate(logits)
        ]
        loss = torch.stack(parts).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), measure(model, seed=999)


@torch.no_grad()
def measure(model: Evaluator, *, seed: int, count: int = 4096) -> dict[str, float]:
    """Return the share of right answers per head on fresh renders."""
    fresh = render_many(count, seed=seed, size=SIZE, held_out=True)
    right = [
        torch.stack([part.argmax(1) for part in model(to_unit(chunk))], 1) == labels
        for chunk, labels in zip(fresh.pixels.split(256), fresh.labels.split(256), strict=True)
    ]
    shares = torch.cat(right).float().mean(0).tolist()
    return dict(zip(("subject", "style", "background"), (round(share, 4) for share in shares), strict=True))


def main() -> None:
    """Train and publish the evaluator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--renders", type=int, default=24_576)
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    model, accuracy = train_evaluator(steps=args.steps, renders=args.renders)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.endswith(_COUNTER)}
    save_file(weights, args.output / "model.safetensors")
    facts = {"accuracy_on_4096_fresh_renders": accuracy, "steps": args.steps, "renders": args.renders}
    (args.output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
