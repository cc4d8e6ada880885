"""Regions: each adapter acts in the part of the picture that a mask gives it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from studio.composition.methods.composite import CompositePlan
from studio.composition.plan import BaseInfo, Branch, Composer, Request, Text
from studio.composition.policies import TextPolicy, known, text_weights
from studio.errors import CompositionError
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter

_REST = "rest of the picture"


def _file_or_array(given: Any) -> Any:
    if isinstance(given, (str, Path)):
        return Path(given)
    if not hasattr(given, "__array__"):
        raise ValueError("a mask is a picture file, or in Python an array or tensor")
    return given


def _in_words(mask: Any) -> str:
    return str(mask) if isinstance(mask, Path) else "<mask in memory>"


_Mask = Annotated[
    Any,
    BeforeValidator(_file_or_array),
    PlainSerializer(_in_words, when_used="json"),
    WithJsonSchema({"type": "string", "format": "mask"}),
]


@COMPOSERS.register("regions")
class Regions(Composer):
    """Let each adapter answer for its own region of the picture, and the base or one adapter for the rest.

    Masks are stretched to the picture. Where several cover a place their answers are mixed, each by its mask;
    what they leave uncovered of a place is the rest's. One evaluation for each region and one for the rest,
    as in Composite. MultiDiffusion, arXiv:2302.08113, mixes answers by masks for prompts, here it is for
    adapters.
    """

    class Options(MethodOptions):
        """Options of Regions."""

        regions: Mapping[str, _Mask] = Field(
            min_length=1,
            description="Mask by adapter: a picture file, white where the adapter acts and black elsewhere.",
        )
        background: str | None = Field(
            None, description="Adapter that acts where no region is; default: the base alone."
        )
        region_prompts: dict[str, str] = Field(
            default_factory=dict,
            description="What a region shows, by its adapter or that of the background; default: the prompt.",
        )
        everywhere: tuple[str, ...] = Field(
            (), description="Adapters, such as styles, that act in the whole picture, beside the others."
        )
        feather: float = Field(
            0.0,
            ge=0,
            le=64,
            description="How soft the edges of regions are, in pixels of the latents, each 8 of the picture: "
            "standard deviation of a Gaussian.",
        )
        shared_unconditional: bool = Field(
            False,
            description="Let the base, with what acts everywhere, alone answer for the unconditional rows.",
        )
        text_encoder_policy: TextPolicy = "merged"

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> CompositePlan:
        """Return the plan.

        Raises:
            CompositionError: If an adapter has no place or two, a name is unknown, or a mask cannot be used.
        """
        from studio.composition.masks import left_over, read_masks

        options = self.options
        _check_places(options, list(adapters))
        masks = read_masks({name: options.regions[name] for name in adapters if name in options.regions})
        rest = left_over(masks)
        if rest is None and options.background is not None:
            raise CompositionError(
                f"regions: the masks cover the whole picture, so the background '{options.background}' would "
                "never act. Paint less white, or leave it out."
            )
        everywhere = {name: weights[name] for name in adapters if name in options.everywhere}
        inside: dict[str, Mapping[str, float]] = {name: {name: weights[name]} for name in masks}
        if rest is not None:
            masks[_REST] = rest
            inside[_REST] = (
                {} if options.background is None else {options.background: weights[options.background]}
            )
        acting = {region: {**own, **everywhere} for region, own in inside.items()}
        spoken = text_weights(options.text_encoder_policy, weights)
        texts = _texts(options, acting, spoken)
        rows: Literal["all", "conditional"] = "conditional" if options.shared_unconditional else "all"
        branches = [
            Branch(uses, rows, 1 / len(acting), text=region if region in texts else None, region=region)
            for region, uses in acting.items()
        ]
        if options.shared_unconditional:
            branches.append(Branch(everywhere, "unconditional"))
        return CompositePlan(
            tuple(adapters),
            branches=tuple(branches),
            text_weights=spoken,
            texts=texts,
            regions=masks,
            feather=options.feather,
        )


def _texts(
    options: Regions.Options, acting: Mapping[str, Mapping[str, float]], spoken: Mapping[str, float]
) -> dict[str, Text]:
    """Return the prompt embeddings of the regions that do not read the picture's own."""
    prompts = {
        _REST if name == options.background else name: said for name, said in options.region_prompts.items()
    }
    own = options.text_encoder_policy == "own"
    return {
        region: Text(uses if own else spoken, prompts.get(region))
        for region, uses in acting.items()
        if own or region in prompts
    }


def _check_places(options: Regions.Options, adapters: list[str]) -> None:
    """Raise CompositionError unless each adapter has one place: a region, the background or everywhere."""
    background = () if options.background is None else (options.background,)
    known("regions", list(options.regions), adapters)
    known("background", background, adapters)
    known("everywhere", options.everywhere, adapters)
    known("region_prompts", list(options.region_prompts), [*options.regions, *background])
    for name in adapters:
        places = [name in options.regions, name in background, name in options.everywhere]
        if sum(places) != 1:
            raise CompositionError(
                f"regions: '{name}' has {'no' if not any(places) else 'more than one'} place. Give it one of "
                "a region, the background and everywhere."
            )
