"""How far an adapter moves pictures toward photographs: loss on fixed noise, likeness of what is drawn.

    python tests/benchmarks/bench_subject.py --data PHOTOS --prompt "a photo of sks dog" --output measured

Without --data it runs on the example pictures of a held-out subject. Prints JSON with machine and versions.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from PIL import Image

import studio
from studio.assets.builder.evaluator import as_tensor, picture_features
from studio.assets.builder.measure import grid
from studio.data.folder import read_pictures
from studio.demo import example_folder
from studio.trainers.evaluate import evaluate_loss


def latents_of(pipe: object, pictures: list[Image.Image]) -> torch.Tensor:
    """Return the autoencoder's latents ``[N, C*h*w]``."""
    with torch.no_grad():
        return pipe.vae.encode(as_tensor(pictures)).latent_dist.mean.flatten(1)


def likeness(drawn: torch.Tensor, real: torch.Tensor) -> float:
    """Return the mean cosine between all pairs of drawn and real pictures."""
    drawn, real = (torch.nn.functional.normalize(rows, dim=1) for rows in (drawn, real))
    return float((drawn @ real.T).mean())


def main() -> None:
    """Train, draw with and without, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=example_folder("unicorn"))
    parser.add_argument("--prompt", default="a photo of sks unicorn")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    output = args.output or Path(tempfile.mkdtemp())
    output.mkdir(parents=True, exist_ok=True)
    pipe = studio.load_base("starter", device="cpu", precision="fp32")
    pictures = read_pictures(args.data, prompt=args.prompt, skip_bad=False)
    spec = studio.TrainSpec.model_validate(
        {
            "data": args.data,
            "prompt": args.prompt,
            "output": output / "adapter.safetensors",
            "overwrite": True,
            "steps": args.steps,
            "batch_size": 4,
            "rank": args.rank,
            "learning_rate": args.learning_rate,
            "targets": args.targets,
            "min_snr_gamma": None,
        }
    )
    before = evaluate_loss(pipe, pictures, num=64)
    result = studio.train(spec)
    after = evaluate_loss(pipe, pictures, result.adapter, num=64)

    real = [picture.open() for picture in pictures.pictures]
    drawn = {
        name: [
            r.image
            for r in studio.generate_batch([args.prompt], seeds=range(8), adapters=adapters, batch_size=8)
        ]
        for name, adapters in (("without", {}), ("with", {result.path: 1.0}))
    }
    facts = {
        "data": args.data.name,
        "pictures": len(real),
        "steps": args.steps,
        "seconds": round(result.seconds, 1),
        "loss_on_fixed_noise": {"before": round(before, 4), "after": round(after, 4)},
        "cosine_in_autoencoder": {
            k: round(likeness(latents_of(pipe, v), latents_of(pipe, real)), 4) for k, v in drawn.items()
        },
        "cosine_in_evaluator": {
            k: round(likeness(picture_features(v), picture_features(real)), 4) for k, v in drawn.items()
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    side = drawn["with"][0].size
    grid(drawn["with"], columns=8).save(output / "drawn.png")
    rows = [*(p.resize(side) for p in (real * 8)[:8]), *drawn["without"], *drawn["with"]]
    grid(rows, columns=8).resize((8 * 128, 3 * 128)).save(output / "comparison.png")
    (output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
