"""The main job from end to end on the embedded starter: train an adapter, draw with it, hand it on.

The subject is one that the starter has never seen, so the difference is the adapter's alone; the evaluator
counts it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from studio.errors import OutputError
from studio.presets import preset
from studio.specs import Event, OnEvent, TrainSpec

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio.assets.builder.evaluator import Verdict

SUBJECT = "robot"
PROMPT = "a photo of sks robot"
CLASS_PROMPTS = (
    "a photo of a cat on a red background",
    "a photo of a dog on a blue background",
    "a photo of a panda on a green background",
    "a photo of a car on a yellow background",
    "a photo of a house on a gray background",
    "a photo of an apple on a white background",
    "a sketch of an owl on a yellow background",
    "a sketch of a guitar on a white background",
    "pixel art of a mushroom on a blue background",
    "pixel art of a turtle on a red background",
    "a watercolor painting of a tree on a green background",
    "a watercolor painting of a butterfly on a gray background",
)
"""Half of the base's subjects, in every style: what the adapter is kept from changing."""
PROMPTS = tuple(f"{PROMPT} on a {ground} background" for ground in ("red", "blue", "green", "yellow"))
STEPS = 15
"""Denoising steps of every picture that the demo draws."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo did.

    Attributes:
        adapter: The adapter in kohya format.
        diffusers_adapter: The same adapter in diffusers format.
        comparison: One picture: the training pictures, then the same seeds without and with the adapter.
        hits_with: Pictures in which the evaluator finds the new subject, with the adapter.
        hits_without: The same without it.
        count: Pictures drawn each way.
        training_seconds: Time of the training itself.
        seconds: Time of all.
    """

    adapter: Path
    diffusers_adapter: Path
    comparison: Path
    hits_with: int
    hits_without: int
    count: int
    training_seconds: float
    seconds: float

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [
            f"trained   a LoRA on {len(example_pictures(SUBJECT))} pictures of a {SUBJECT}, new to the base,"
            f" in {self.training_seconds:.0f} s",
            f"measured  the evaluator finds it in {self.hits_with} of {self.count} pictures with the adapter,"
            f" in {self.hits_without} of {self.count} without (same prompts and seeds)",
            f"adapter   {self.adapter}  (kohya format: ComfyUI, A1111, InvokeAI, diffusers)",
            f"          {self.diffusers_adapter}  (diffusers and peft)",
            f"compare   {self.comparison}  (training pictures, without, with the adapter)",
            f"took      {self.seconds:.0f} s in all",
        ]


def example_folder(name: str) -> Path:
    """Return the folder of an example data set that ships with the studio."""
    return Path(str(files("studio.assets") / "examples" / name))


def example_pictures(name: str) -> list[Path]:
    """Return the pictures of an example data set in order."""
    return sorted(example_folder(name).glob("*.png"))


def demo_training(output: Path) -> TrainSpec:
    """Return the demo's training run."""
    return TrainSpec.model_validate(
        {
            **preset("starter"),
            "base": "starter",
            "data": example_folder(SUBJECT),
            "prompt": PROMPT,
            "output": output / f"{SUBJECT}.safetensors",
            "overwrite": True,
            # As many pictures again are the class's in every step.
            "steps": 160,
            "class_prompts": CLASS_PROMPTS,
            "class_pictures": 12,
            "sample_steps": STEPS,
        }
    )


def run(output: Path, *, seeds: int = 2, on_event: OnEvent | None = None) -> DemoReport:
    """Run the demo into a folder; files of an earlier demo there are replaced.

    Args:
        output: Folder for the adapter and the pictures.
        seeds: Pictures to draw of each of ``PROMPTS``, each way.
        on_event: Told of every training step and picture.

    Raises:
        OutputError: If the folder cannot be made.
    """
    from studio.api import save_adapter, train
    from studio.assets.builder.evaluator import judge

    start = time.monotonic()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {output}: {error.strerror}. Choose another with --output."
        ) from None
    result = train(demo_training(output), on_event=on_event)
    trained = time.monotonic() - start
    other = save_adapter(
        result.adapter, output / f"{SUBJECT}-diffusers.safetensors", format="diffusers", overwrite=True
    )

    without = draw(output / "without", {}, seeds=seeds, on_event=on_event)
    with_adapter = draw(output / "with", {result.path: 1.0}, seeds=seeds, on_event=on_event)
    comparison = _comparison(output / "comparison.png", [example_pictures(SUBJECT), without, with_adapter])
    return DemoReport(
        adapter=result.path,
        diffusers_adapter=other,
        comparison=comparison,
        hits_with=_hits(judge, with_adapter),
        hits_without=_hits(judge, without),
        count=len(PROMPTS) * seeds,
        training_seconds=trained,
        seconds=time.monotonic() - start,
    )


def draw(
    folder: Path, adapters: Mapping[str | Path, float], *, seeds: int, on_event: OnEvent | None = None
) -> list[Path]:
    """Draw the demo's pictures into a folder and return them; those that are there already stay.

    Args:
        folder: Where to; its name is shown beside the progress.
        adapters: Weight by adapter file.
        seeds: Pictures of each of ``PROMPTS``.
        on_event: Told of progress.
    """
    from studio.api import generate_batch

    pictures = generate_batch(
        PROMPTS,
        seeds=range(seeds),
        adapters=adapters,
        steps=STEPS,
        batch_size=len(PROMPTS),
        output=folder,
        overwrite=True,
        on_event=_labelled(on_event, f"drawing {folder.name}"),
    )
    for _ in pictures:
        pass  # drawn as they are asked for
    return [
        folder / f"{number:04}-{seed}.png" for number in range(1, len(PROMPTS) + 1) for seed in range(seeds)
    ]


def _labelled(on_event: OnEvent | None, label: str) -> OnEvent | None:
    """Give progress a label in front of its bar."""
    if on_event is None:
        return None

    def tell(event: Event) -> None:
        on_event(event.model_copy(update={"message": label}) if event.kind == "progress" else event)

    return tell


def _hits(judge: "Callable[[list[Image]], list[Verdict]]", paths: list[Path]) -> int:
    from PIL import Image

    return sum(verdict.subject == SUBJECT for verdict in judge([Image.open(path) for path in paths]))


def _comparison(path: Path, rows: list[list[Path]], *, side: int = 128) -> Path:
    from PIL import Image

    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * side, len(rows) * side), "white")
    for top, row in enumerate(rows):
        for left, source in enumerate(row):
            tile = Image.open(source).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left * side, top * side))
    sheet.save(path)
    return path
