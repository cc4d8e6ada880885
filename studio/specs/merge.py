"""What a user may ask of merging several adapters into one."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from studio.registry import FORMATS, MERGERS
from studio.specs.base import Options, complete
from studio.specs.checks import ends_in, known_in
from studio.specs.composition import AdapterUse, read_uses, refuse_same_file


class MergeOptions(Options):
    """An algorithm of the registry and what it is to do; an option that it does not read is refused."""

    how: Annotated[str, known_in(MERGERS)] = Field(
        "linear", description="Merging algorithm: `studio list` and docs/merging.md say what each is for."
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="Rank of the merged adapter at most; default: the largest that an adapter has in the "
        "layer. Not for linear and soup, which keep all of it.",
    )
    dense: bool = Field(
        False, description="Write every entry in place of a low rank: nothing is lost, files are large."
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of its entries that an adapter keeps in a layer (ties, pcb: default 0.2; dare, "
        "magnitude: 0.5).",
    )
    combine: Literal["linear", "ties"] | None = Field(
        None, description="How dare combines what it kept; default: linear."
    )
    merge_seed: int | None = Field(
        None, ge=0, lt=2**62, description="Seed of what dare drops and where lego starts; default: 0."
    )

    @field_validator("rank", "dense", "density", "combine", "merge_seed")
    @classmethod
    def _of_use(cls, value: Any, info: ValidationInfo) -> Any:
        how, option = info.data.get("how"), str(info.field_name)
        if value is None or value is False or how is None:
            return value
        if option not in MERGERS[how].reads():
            readers = ", ".join(name for name in MERGERS if option in MERGERS[name].reads())
            raise complete(f"counts only where how is one of {readers}; got '{how}'. Leave it out.")
        if option == "dense" and info.data.get("rank") is not None:
            raise complete("a dense adapter has no rank. Give one of dense and rank.")
        return value

    def settings(self) -> dict[str, Any]:
        """Return what is asked for, by the names of the algorithm's own options."""
        given = {name: getattr(self, name) for name in MERGERS[self.how].reads()}
        return {name: value for name, value in given.items() if value is not None}

    def merger(self) -> Any:
        """Return the algorithm with its options set."""
        return MERGERS[self.how](**self.settings())


class MergeSpec(MergeOptions):
    """One adapter made of several."""

    adapters: tuple[AdapterUse, ...] = Field(
        min_length=1, max_length=64, description="Adapter files with strengths, path or path:weight."
    )
    output: Annotated[Path | None, ends_in(".safetensors")] = Field(
        None, description="Adapter file to write (.safetensors); default: none, only say what it would be."
    )
    preview: Annotated[Path | None, ends_in(".png")] = Field(
        None, description="Picture (.png) of the error against the rank, for all and for each block."
    )
    base: str | None = Field(
        None,
        description="Base model of the adapters; needed by kinds that depend on its weights or shapes (dora, "
        "oft, loha, lokr) and by adapters of bases with layers of their own.",
    )
    format: Annotated[str, known_in(FORMATS)] = Field(
        "kohya", description="File format of the output: 'kohya' (other tools), 'diffusers', 'sara'."
    )
    precision: Literal["auto", "fp16", "bf16", "fp32"] = Field(
        "auto", description="Number type to write; auto: fp16, and fp32 where a change is dense or sparse."
    )
    any_base: bool = Field(False, description="Take an adapter that names another base.")
    overwrite: bool = Field(False, description="Replace the output and the picture.")

    @field_validator("adapters", mode="before")
    @classmethod
    def _parse_adapters(cls, given: Any) -> Any:
        return read_uses(given)

    @field_validator("adapters")
    @classmethod
    def _once(cls, uses: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        refuse_same_file(uses)
        return uses
