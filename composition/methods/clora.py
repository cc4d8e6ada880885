"""CLoRA: each adapter acts where the picture attends to its concept, found out while it is drawn."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from studio.composition.concepts import Breakdown, break_down, find_concepts
from studio.composition.importance import triggers_of
from studio.composition.plan import BaseInfo, Branch, Composer, Plan, Request, Step, Text
from studio.composition.policies import known
from studio.errors import CompositionError
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter
    from studio.composition.attention import View

_REST = "rest of the picture"
_REFINED = (0.0, 0.2, 0.4)
"""Where more than one update is made: iterations 0, 10 and 20 of 50."""
_SIDE = 16
"""Side of the maps that are read, where pictures have the base's own size."""
_CROSS_ATTENTION = re.compile(r"unet\.((down|up)_blocks\.(\d+)\..+\.attn2)\.to_q\.weight")


@dataclass(frozen=True)
class CloraPlan(Plan):
    """A branch for each concept and one for the prompt itself, whose masks come from attention maps.

    Attributes:
        branches: The same at every step.
        words: What the prompts say where; None until the prompt is known.
        options: Of the method.
    """

    branches: tuple[Branch, ...]
    words: Breakdown | None
    options: "Clora.Options"

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the branches."""
        return self.branches

    def check(self, total: int) -> None:
        """Raise CompositionError unless the prompt is known."""
        if self.words is None:
            raise CompositionError(
                "method 'clora' looks for concepts in the prompt, which is not known. Give it (--prompt); in "
                "Python call the pipeline given to compose() inside the 'with' block, the prompt as text."
            )

    def updates(self, step: Step) -> int:
        """Return how often the latents are updated before a step."""
        options = self.options
        if not options.contrast or step.fraction >= options.contrast_until or len(self.texts) < 2:
            return 0
        return options.refinements if step.index in {round(at * step.total) for at in _REFINED} else 1

    def steered(self, view: "View") -> "Tensor | None":
        """Return latents that pull the concepts' maps apart: ``z - alpha_t grad L``, as often as is due."""
        from studio.composition.contrast import contrastive_loss, groups_of

        words, latents = self.words, view.latents
        assert words is not None
        updates = self.updates(view.step)

        def loss(maps: "Mapping[str, Tensor]") -> "Tensor":
            groups = groups_of(words, maps, base=_REST)
            return contrastive_loss(groups, temperature=self.options.temperature)

        size = self.options.step_size * math.sqrt(1 - view.step.fraction / 2)
        for _ in range(updates):
            latents = (latents.float() - size * view.gradient(latents, loss)).to(latents.dtype)
        return latents if updates else None

    def found(self, maps: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Return each concept's mask, and where no concept is."""
        from studio.composition.contrast import masks_of

        assert self.words is not None
        return masks_of(self.words, maps, base=_REST, threshold=self.options.mask_threshold)


@COMPOSERS.register("clora")
class Clora(Composer):
    """Experimental, SD 1.x: let each adapter act where the picture attends to its words in the prompt.

    Every concept has a prompt with its adapter's trigger words and an evaluation of its own, beside that of
    the prompt by the base. Their attention maps at 16 x 16 (at a base's own picture size; with the picture
    they grow) give each place to one adapter or to the base. In the first half of the run the latents are
    updated against a contrastive loss, which pulls maps of different concepts apart: three times the work
    there, or without ``contrast`` as much as Composite with one more.

    CLoRA, arXiv:2403.19776; temperature 0.5, several updates at iterations 0, 10 and 20 of 50 and none from
    25 on as there. Iterations are fractions here, for any number of steps. Step size as in Attend-and-Excite,
    arXiv:2301.13826, Alg. 1; how many updates those three iterations have and where a map counts as a mask
    are ours.
    """

    class Options(MethodOptions):
        """Options of CLoRA."""

        concepts: dict[str, str] = Field(
            min_length=1, description="Words of the prompt by adapter: what of the picture it is to draw."
        )
        triggers: dict[str, str] = Field(
            default_factory=dict, description="Trigger words by adapter; default: what its file tells."
        )
        everywhere: tuple[str, ...] = Field(
            (), description="Adapters, such as styles, that act in the whole picture, beside the others."
        )
        contrast: bool = Field(
            True, description="Update the latents against the contrastive loss; off: masks alone, cheaper."
        )
        contrast_until: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Where updates end, as a fraction of the run; later ones leave traces.",
        )
        refinements: int = Field(
            5, ge=1, le=100, description="Updates before the steps at 0, 20 and 40 % of the run; 1 elsewhere."
        )
        step_size: float = Field(
            20.0, ge=0, description="Factor of the gradient at the start (alpha); it falls with the run."
        )
        temperature: float = Field(0.5, gt=0, description="Of the contrastive loss; lower pulls harder.")
        mask_threshold: float = Field(
            0.5,
            gt=0,
            le=1,
            description="Share of its largest attention from which on a place belongs to a concept; lower "
            "makes larger masks.",
        )
        shared_unconditional: bool = Field(
            False,
            description="Let the base, with what acts everywhere, alone answer for the unconditional rows.",
        )

    reads_prompt = True

    def check_prompt(self, prompt: str, adapters: Sequence[str]) -> None:
        """Raise CompositionError if a prompt lacks words of a concept."""
        concepts = self.options.concepts
        find_concepts(prompt, {name: concepts[name] for name in adapters if name in concepts})

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> CloraPlan:
        """Return the plan; while the prompt is not known, one that cannot run.

        Raises:
            CompositionError: If an adapter has no concept, trigger words or the concept's words are not
                there, or the base is not SD 1.x.
        """
        options = self.options
        concepts = _concepts(options, list(adapters))
        if base is not None and base.architecture not in (None, "sd1"):
            raise CompositionError(
                f"method 'clora' is for SD 1.x, the base is {base.architecture}. Choose another method, such "
                "as regions."
            )
        triggers = triggers_of({name: adapters[name] for name in concepts}, options.triggers)
        words = None if request is None else _words(request, concepts, triggers)
        everywhere = {name: weights[name] for name in adapters if name in options.everywhere}
        acting = {name: {name: weights[name], **everywhere} for name in concepts}
        rows: Literal["all", "conditional"] = "conditional" if options.shared_unconditional else "all"
        share = 1 / (len(concepts) + 1)
        branches = [Branch(uses, rows, share, text=name, region=name) for name, uses in acting.items()]
        branches.append(Branch(everywhere, rows, share, region=_REST))
        if options.shared_unconditional:
            branches.append(Branch(everywhere, "unconditional"))
        prompts: Mapping[str, str | None] = dict.fromkeys(concepts) if words is None else words.prompts
        return CloraPlan(
            tuple(adapters),
            branches=tuple(branches),
            words=words,
            options=options,
            text_weights=everywhere,
            texts={name: Text(uses, prompts[name]) for name, uses in acting.items()},
            watched=layers_to_watch(base.shapes, side=_latents_side(base)) if base and base.shapes else (),
        )


def layers_to_watch(names: Collection[str], *, side: int) -> tuple[str, ...]:
    """Return the cross-attention layers of one level, that whose maps are nearest to 16 x 16.

    Args:
        names: Of the base's parameters.
        side: Of the latents of a picture of the base's own size.
    """
    wanted = math.log2(side / _SIDE)
    found = [match for name in names if (match := _CROSS_ATTENTION.fullmatch(name))]
    deepest = max(int(name.split(".")[2]) for name in names if name.startswith("unet.down_blocks."))
    by_level: dict[int, list[str]] = {}
    for match in found:
        number = int(match[3])
        by_level.setdefault(number if match[2] == "down" else deepest - number, []).append(match[1])
    return tuple(by_level[min(by_level, key=lambda level: abs(level - wanted))])


def _latents_side(base: BaseInfo) -> int:
    """Return the side of the latents of a picture of the base's own size; that of SD 1.5 without a base."""
    size = 64 if base.pipe is None else base.pipe.unet.config.sample_size
    return int(size if isinstance(size, int) else min(size))


def _concepts(options: Clora.Options, adapters: Sequence[str]) -> dict[str, str]:
    known("concepts", list(options.concepts), adapters)
    known("everywhere", options.everywhere, adapters)
    for name in adapters:
        if (name in options.concepts) == (name in options.everywhere):
            raise CompositionError(
                f"clora: '{name}' has {'both' if name in options.concepts else 'none'} of a concept and a "
                "place everywhere. Give it one of them."
            )
    return {name: options.concepts[name] for name in adapters if name in options.concepts}


def _words(request: Request, concepts: Mapping[str, str], triggers: Mapping[str, str]) -> Breakdown:
    if {request.prompt, *request.others} != {request.prompt}:
        raise CompositionError(
            "method 'clora' looks for concepts in one prompt, got several. Draw each prompt by itself."
        )
    assert request.embed is not None
    kept: dict[str, int] = {}

    def rows(text: str) -> int:
        if text not in kept:
            assert request.embed is not None
            kept[text] = len(request.embed(text))
        return kept[text]

    return break_down(request.prompt, concepts, triggers, rows)
