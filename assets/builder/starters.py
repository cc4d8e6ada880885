"""Do all that a starter still lacks: evaluator, model, measurement, card. The next run goes on from here.

python -m studio.assets.builder.starters starter --device cuda --minutes 9 --unet-minutes 15
"""

import argparse
import json
from pathlib import Path

from studio.assets.builder.bars import PARTS, Bench, measure_all
from studio.assets.builder.build import Workshop, add_options, build, open_workshop
from studio.assets.builder.card import write_card
from studio.assets.builder.evaluator import FOLDER, RENDERS, STEPS, build_evaluator


def _has_evaluator(shop: Workshop, folder: Path) -> bool:
    facts = json.loads((folder / "facts.json").read_text())
    return bool(facts["vocabulary"] == shop.recipe.vocabulary.name and facts["size"] == shop.recipe.size)


def make(shop: Workshop, output: Path, *, prompts: int, sweep: int, photographs: Path | None = None) -> bool:
    """Go on until the card is written or the time is up; return whether it is written.

    Args:
        shop: Recipe, folder and machine.
        output: Diffusers folder to write.
        prompts: Prompts of the main counts.
        sweep: Prompts of each other setting.
        photographs: Folder of photographs for the autoencoder.
    """
    recipe, machine = shop.recipe, shop.machine
    if not _has_evaluator(shop, FOLDER) and not build_evaluator(
        recipe.vocabulary,
        FOLDER,
        size=recipe.size,
        steps=STEPS,
        renders=RENDERS,
        machine=machine,
        work=shop.folder.parent / f"evaluator-{recipe.vocabulary.name}",
        workers=shop.workers,
    ):
        return False
    if not build(shop, output):
        return False
    measured = shop.folder.parent / "measured" / recipe.name
    bench = Bench(recipe, output, machine.device, prompts, sweep, photographs, measured)
    if not set(PARTS) <= set(measure_all(bench, deadline=machine.deadline)):
        return False
    write_card(recipe, output, work=shop.folder, measured=measured)
    return True


def main() -> None:
    """Make one starter as far as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--sweep", type=int, default=96, help="prompts of each other setting")
    parser.add_argument("--photographs", type=Path, help="folder of photographs for the autoencoder")
    args = parser.parse_args()
    shop, output = open_workshop(args)
    done = make(shop, output, prompts=args.prompts, sweep=args.sweep, photographs=args.photographs)
    print((shop.folder / "facts.json").read_text())
    print("done" if done else "time is up: the same command goes on from here")


if __name__ == "__main__":
    main()
