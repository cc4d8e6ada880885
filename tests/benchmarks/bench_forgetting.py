"""How much the demo's adapter gains on its subject and costs on others, by the evaluator.

python tests/benchmarks/bench_forgetting.py --steps 300
"""

import argparse
import json
import tempfile
from pathlib import Path

import studio
from studio.api import generate_batch
from studio.assets.builder.evaluator import judge
from studio.assets.builder.measure import labelled_prompts
from studio.demo import CLASS_PROMPTS, PROMPT, SUBJECT, demo_training


def share(right: list[bool], chosen: list[bool]) -> float:
    """Return the share of right ones among the chosen."""
    return sum(a and b for a, b in zip(right, chosen, strict=True)) / max(1, sum(chosen))


def main() -> None:
    """Train, draw both kinds of prompts with and without the adapter, print shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=demo_training(Path("demo")).steps)
    parser.add_argument("--prompts", type=int, default=144)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = studio.train(demo_training(Path(folder)).model_copy(update={"steps": args.steps}))
        rows = labelled_prompts(args.prompts, seed=77)
        own = [
            f"{PROMPT} on a {ground} background"
            for ground in ("white", "red", "blue", "green", "yellow", "gray")
        ]
        shares: dict[str, dict[str, float]] = {}
        for name, adapters in (("without", {}), ("with", {result.path: 1.0})):
            others = [
                r.image for r in generate_batch([row[0] for row in rows], adapters=adapters, batch_size=12)
            ]
            drawn = [r.image for r in generate_batch(own, seeds=range(4), adapters=adapters, batch_size=12)]
            right = [verdict.subject == row[1] for verdict, row in zip(judge(others), rows, strict=True)]
            kept = [any(row[1] in prompt for prompt in CLASS_PROMPTS) for row in rows]
            found = [verdict.subject == SUBJECT for verdict in judge(drawn)]
            shares[name] = {
                "other subjects right": sum(right) / len(right),
                "those in class pictures": share(right, kept),
                "those in none": share(right, [not flag for flag in kept]),
                "new subject found": sum(found) / len(found),
            }
    print(json.dumps({"steps": args.steps, "seconds": round(result.seconds), **shares}, indent=2))


if __name__ == "__main__":
    main()
