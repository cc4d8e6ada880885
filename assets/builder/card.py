"""Write a starter's model card from the facts of its building and measuring; nothing in it is typed by hand.

python -m studio.assets.builder.card starter --work build/starter --measured build/measured/starter
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from studio.assets.builder.bars import GUIDANCE
from studio.assets.builder.build import ASSETS
from studio.assets.builder.evaluator import FOLDER as EVALUATOR
from studio.assets.builder.measure import HEADS
from studio.assets.builder.publish import hashes
from studio.assets.builder.recipe import RECIPES, Recipe

_TEMPLATE = Path(__file__).with_name("card.md")
FILES = "## Files\n\n"
_GOALS = {"subject": 0.9, "style": 0.9, "background": 0.95}


def hash_table(folder: Path) -> str:
    """Return the card's list of files: ``name sha256``, one indented line each."""
    return "\n".join(f"    {digest}  {name}" for name, digest in hashes(folder).items())


def listed_hashes(card: str) -> dict[str, str]:
    """Return what a card's list of files says, by file."""
    lines = [line.split() for line in card.split(FILES)[-1].splitlines() if line.startswith("    ")]
    return {name: digest for digest, name in lines}


def accuracy_table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per setting: shares with their intervals, those under their bar in bold."""
    lines = ["| | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for name, found in counts.items():
        cells = []
        for head in HEADS:
            share, low, high = (found[head][key] for key in ("share", "low", "high"))
            text = f"{share:.1%} ({low:.1%} to {high:.1%})"
            cells.append(text if share >= _GOALS[head] else f"**{text}**")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _other_rows(recipe: Recipe, bars: Mapping[str, Any]) -> str:
    code, precisions = bars["autoencoder"], bars["precisions"]
    rows = [("autoencoder, renders", f"{code['renders']} dB", "26 dB")]
    if "photographs" in code:
        rows.append((f"autoencoder, {code['count']} photographs", f"{code['photographs']} dB", "22 dB"))
    seconds = bars["seconds"]
    goal = 5 if recipe.sdxl else 3
    rows.append(("one picture on two CPU cores", f"{seconds['seconds']} s", f"{goal} s"))
    for name in ("bf16", "fp16"):
        rows.append((f"{name} beside fp32", f"{precisions[name]['median dB to fp32']} dB", ""))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_PHOTOGRAPHS = """Photographs and what the autoencoder makes of them:

![Top: photographs. Bottom: through the autoencoder.](photographs.png)

"""
_SUBJECT = """A LoRA of {pictures} photographs of a {thing}, trained for {seconds:.0f} s ({steps} steps),
asked for "a photo of sks {thing}". The mean cosine of the evaluator's features to the photographs is
{with_adapter:.2f}, without the adapter {without:.2f}:

![Eight seeds with the adapter.](subject.png)

"""


def _subject_part(measured: Path | None, folder: Path) -> str:
    """Copy what ``tests/benchmarks/bench_subject.py`` drew and return what the card says of it."""
    if measured is None:
        return ""
    facts = json.loads((measured / "facts.json").read_text())
    shutil.copyfile(measured / "drawn.png", folder / "subject.png")
    alike = facts["cosine_in_evaluator"]
    said = {"thing": facts["data"], "with_adapter": alike["with"], "without": alike["without"]}
    return _SUBJECT.format(**facts | said)


def write_card(
    recipe: Recipe,
    folder: Path,
    *,
    work: Path,
    measured: Path,
    subject: Path | None = None,
    note: str = "",
) -> None:
    """Write the card and copy its pictures beside it.

    Args:
        recipe: What was built.
        folder: The starter.
        work: The builder's work folder.
        measured: Output folder of ``bars``.
        subject: Output folder of ``tests/benchmarks/bench_subject.py``: an adapter of photographs.
        note: What was special about this building.
    """
    built = json.loads((work / "facts.json").read_text())
    bars = json.loads((measured / "bars.json").read_text())
    evaluator = json.loads((EVALUATOR / "facts.json").read_text())["accuracy_on_4096_fresh_renders"]
    for picture in ("grid.png", "guidance.png", "pairs.png", "photographs.png"):
        if (measured / picture).exists():
            shutil.copyfile(measured / picture, folder / picture)
    words = recipe.vocabulary
    pairs = "Pairs of subject and style that were never shown together:\n\n![Held-out pairs](pairs.png)\n\n"
    settings = bars["prompts"] | bars["wordings"] | bars["settings"]
    parameters = 0
    for path in (folder / "unet").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            parameters += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    card = _TEMPLATE.read_text().format(
        name=recipe.name,
        family="SDXL" if recipe.sdxl else "Stable Diffusion 1.x",
        subjects=len(words.subjects),
        styles=len(words.styles),
        backgrounds=len(words.backgrounds),
        size=recipe.size,
        style_names=", ".join(words.styles),
        accuracy=accuracy_table(settings | {"fp16": bars["precisions"]["fp16"]}),
        rows=_other_rows(recipe, bars),
        guidance=", ".join(f"{scale:g}" for scale in GUIDANCE),
        pairs=pairs if (folder / "pairs.png").exists() else "",
        photographs=_PHOTOGRAPHS if (folder / "photographs.png").exists() else "",
        subject=_subject_part(subject, folder),
        read=built["captions_read_right"],
        evaluator=" / ".join(f"{share:.1%}" for share in evaluator.values()),
        measured_on=bars["machine"],
        prompts=bars["count"],
        sweep=bars["sweep"],
        renders=built["renders"],
        textures=recipe.textures,
        held_subjects=", ".join(subject.name for subject in words.held_out_subjects),
        held_styles=", ".join(words.held_out_styles),
        held_backgrounds=", ".join(words.held_out_backgrounds),
        held_pairs=len(words.held_out_pairs),
        parameters=parameters / 1e6,
        steps=built["unet_steps"],
        batch=built["batch"],
        samples=built["unet_steps"] * built["batch"],
        minutes=built["unet_minutes"],
        machine=built["machine"],
        note=f"- {note}\n" if note else "",
        command=built["command"],
        hashes=hash_table(folder),
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    """Write the card of a built and measured starter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--starter", type=Path, help="diffusers folder (default: assets/RECIPE)")
    parser.add_argument("--work", type=Path, help="the builder's work folder (default: build/RECIPE)")
    parser.add_argument("--measured", type=Path, help="output of bars (default: build/measured/RECIPE)")
    parser.add_argument("--subject", type=Path, help="output folder of tests/benchmarks/bench_subject.py")
    parser.add_argument("--note", default="", help="what was special about this building")
    args = parser.parse_args()
    write_card(
        RECIPES[args.recipe],
        args.starter or ASSETS / args.recipe,
        work=args.work or Path("build") / args.recipe,
        measured=args.measured or Path("build/measured") / args.recipe,
        subject=args.subject,
        note=args.note,
    )


if __name__ == "__main__":
    main()
