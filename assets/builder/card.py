"""Write the starter's model card from the facts of its building and measuring.

python -m studio.assets.builder.card --work build/starter --measured measured
"""

import argparse
import json
import shutil
from pathlib import Path

from studio.assets.builder.build import STARTER
from studio.assets.builder.evaluator import FOLDER as EVALUATOR
from studio.assets.builder.subjects import (
    BACKGROUNDS,
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_STYLES,
    HELD_OUT_SUBJECTS,
    STYLES,
    SUBJECTS,
)

_TEMPLATE = Path(__file__).with_name("card.md")


def main() -> None:
    """Write the card and copy the grid beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the builder's work folder")
    parser.add_argument("--measured", type=Path, required=True, help="output folder of the measurement")
    parser.add_argument("--hours", type=float, required=True, help="time the UNet's training took in all")
    parser.add_argument("--decay", type=int, required=True, help="last UNet steps with a falling rate")
    parser.add_argument("--note", default="", help="what was special about this run")
    args = parser.parse_args()
    built = json.loads((args.work / "facts.json").read_text())
    measured = json.loads((args.measured / "accuracy.json").read_text())
    evaluator = json.loads((EVALUATOR / "facts.json").read_text())["accuracy_on_4096_fresh_renders"]
    goals = {"subject": "70 %", "style": "80 %", "background": "90 %"}
    rows = []
    for head, goal in goals.items():
        share, low, high = (measured[head][key] for key in ("share", "low", "high"))
        rows.append(f"| {head} | {share:.1%} | {low:.1%} to {high:.1%} | {goal} |")
    card = _TEMPLATE.read_text().format(
        subjects=len(SUBJECTS),
        styles=len(STYLES),
        backgrounds=len(BACKGROUNDS),
        prompts=measured["prompts"],
        rows="\n".join(rows),
        psnr=built["reconstruction_psnr"],
        code=built["encoder_vs_linear_code"],
        read=built["captions_read_right"],
        evaluator=" / ".join(f"{share:.1%}" for share in evaluator.values()),
        seconds=measured["seconds_per_picture"],
        renders=built["renders"],
        held_subjects=", ".join(subject.name for subject in HELD_OUT_SUBJECTS),
        held_styles=", ".join(HELD_OUT_STYLES),
        held_backgrounds=", ".join(HELD_OUT_BACKGROUNDS),
        steps=built["unet_steps"],
        batch=built["unet_samples"] // built["unet_steps"],
        samples=f"{built['unet_samples']:,}",
        hours=args.hours,
        decay=args.decay,
        note=f"- {args.note}\n" if args.note else "",
    )
    (STARTER / "README.md").write_text(card)
    shutil.copyfile(args.measured / "grid.png", STARTER / "grid.png")


if __name__ == "__main__":
    main()
