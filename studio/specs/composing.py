"""What a user may ask of a composition beside drawing: document, plan, comparison, one file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from studio.errors import UsageError
from studio.registry import COMPOSERS, FORMATS
from studio.specs.base import Flag, Options, complete
from studio.specs.batch import read_seeds
from studio.specs.checks import ends_in, known_in
from studio.specs.composition import (
    AdapterUse,
    CompositionSpec,
    Ingredients,
    ModifiedIngredients,
    read_named_options,
)
from studio.specs.drawing import Drawing
from studio.specs.generate import GenerateSpec

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(read_seeds)]
"""Numbers and ranges, such as 1-4,9."""


class DocumentSpec(CompositionSpec):
    """A composition to be written."""

    output: Path = Field(description="Composition to write (.toml).")
    overwrite: bool = Field(False, description="Replace one that is there.")


class PlanSpec(CompositionSpec):
    """A composition whose plan is to be shown."""

    steps: int = Field(25, ge=1, le=1000, description="Denoising steps.")
    picture: Annotated[Path | None, ends_in(".png")] = Field(
        None, description="Picture (.png) of the plan along the steps."
    )
    measure: bool = Field(
        False,
        description="Load the base where the method has to measure adapters on it; what it measures is kept.",
    )
    prompt: str | None = Field(
        None, description="For methods whose plan depends on the prompt, which load the base then."
    )
    device: str = Field("auto", description="Of the base: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    precision: Precision = Field("auto", description="Of the base; auto: fp32 on the CPU, fp16 on a GPU.")
    overwrite: bool = Field(False, description="Replace the picture.")


class ProfileSpec(Ingredients):
    """Adapters whose frequencies are to be measured."""

    adapters: tuple[AdapterUse, ...] = Field(
        min_length=1, max_length=64, description="Adapter files; their strengths do not count."
    )
    device: str = Field("auto", description="Where to draw: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    precision: Precision = Field("auto", description="Of the base; auto: fp32 on the CPU, fp16 on a GPU.")


class CompareSpec(ModifiedIngredients, Drawing):
    """The same pictures by several composition methods."""

    methods: Annotated[tuple[str, ...], Flag("compare", "METHOD,METHOD,...")] = Field(
        min_length=1, description="Composition methods to compare ('studio list composition')."
    )
    method_options: Annotated[
        dict[str, SerializeAsAny[Options]], Flag("options", "METHOD:OPTION=VALUE,...")
    ] = Field({}, description="Options of one of the methods, such as 'klora:alpha=1.5'.")
    seeds: Seeds = Field(
        (0,), min_length=1, max_length=1000, description="Seeds of the pictures, such as 1-4 or 1,5,7."
    )
    grid: Annotated[Path, ends_in(".png")] = Field(
        Path("compare.png"), description="Picture (.png) of all; numbers are written beside it (.json)."
    )
    overwrite: bool = Field(False, description="Replace the picture and the numbers.")

    def request(self) -> GenerateSpec:
        """Return the request for a picture, by whatever method is the usual one."""
        shared = GenerateSpec.model_fields.keys() & type(self).model_fields.keys()
        return GenerateSpec(**{name: getattr(self, name) for name in shared})

    @field_validator("methods", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        return _parts(given)

    @field_validator("methods")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                COMPOSERS[name]
            except UsageError as error:
                raise complete(str(error)) from None
        return tuple(dict.fromkeys(names))

    @field_validator("method_options", mode="before")
    @classmethod
    def _parse_options(cls, given: Any) -> Any:
        return read_named_options(given, COMPOSERS)


class BakeSpec(CompositionSpec):
    """One ordinary adapter made of a composition."""

    steps: int = Field(25, ge=1, le=1000, description="Denoising steps whose weights are averaged.")
    max_rank: int | None = Field(
        None, ge=1, description="Rank of the adapter at most; default: exact, the ranks of all added up."
    )
    output: Annotated[Path, ends_in(".safetensors")] = Field(
        description="Adapter file to write (.safetensors)."
    )
    format: Annotated[str, known_in(FORMATS)] = Field(
        "kohya", description="File format of the output: 'kohya' (other tools), 'diffusers', 'sara'."
    )
    precision: Precision = Field(
        "auto", description="Number type to write; auto: fp16, and fp32 where a change is dense or sparse."
    )
    measure: bool = Field(
        False,
        description="Load the base, for methods that measure adapters on it and for kinds of adapters that "
        "depend on its weights (dora, oft, loha, lokr).",
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="Draw these with the composition and with the one adapter, and say how much the pictures "
        "differ; loads the base.",
    )
    seeds: Seeds = Field(
        (0,), min_length=1, max_length=1000, description="Seeds of these pictures, such as 1-4 or 1,5,7."
    )
    device: str = Field("auto", description="Where these are drawn: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    overwrite: bool = Field(False, description="Replace the output.")


def _parts(given: Any) -> Any:
    """Return the items of texts with commas; a repeated flag gives several of them."""
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, (list, tuple)):
        return given
    return [
        part.strip() if isinstance(part, str) else part
        for item in items
        for part in (item.split(",") if isinstance(item, str) else [item])
        if part != ""
    ]
