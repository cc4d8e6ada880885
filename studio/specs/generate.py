"""What a user may ask of generation."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from studio.registry import COMPOSERS, Registry
from studio.specs.base import MethodSpec


class AdapterUse(BaseModel):
    """One adapter file at one strength, written ``path`` or ``path:weight`` on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Path
    weight: float = Field(1.0, ge=-10, le=10)

    @classmethod
    def parse(cls, text: str) -> "AdapterUse":
        """Return adapter and weight of ``path:weight``; a colon without a number belongs to the path."""
        path, _, weight = text.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            return cls(path=Path(text))
        return cls(path=Path(path), weight=number) if path else cls(path=Path(text))


class GenerateSpec(MethodSpec):
    """One set of pictures of one prompt. Fields below, plus the options of the composition method."""

    registry: ClassVar[Registry[Any]] = COMPOSERS

    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    prompt: str = Field(description="What to draw.")
    negative_prompt: str = Field("", description="What to steer away from.")
    adapters: tuple[AdapterUse, ...] = Field(
        (), max_length=64, description="Adapter files with strengths, path or path:weight."
    )
    method: str = Field("merge", description="How several adapters act together.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first picture; each further one adds 1.")
    count: int = Field(1, ge=1, le=10_000, description="Number of pictures.")
    batch_size: int = Field(1, ge=1, le=1024, description="Pictures drawn at once.")
    steps: int = Field(25, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(
        5.0, ge=0, le=50, description="Classifier-free guidance; 1 and less turn it off."
    )
    width: int | None = Field(
        None, ge=16, le=8192, multiple_of=8, description="Width in pixels; default: the base's own."
    )
    height: int | None = Field(
        None, ge=16, le=8192, multiple_of=8, description="Height in pixels; default: the base's own."
    )
    scheduler: Literal["default", "ddim", "euler", "euler-ancestral", "dpm++2m", "heun", "pndm", "unipc"] = (
        Field("default", description="Solver; default: the base's own.")
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Number type; auto: fp32 on the CPU, fp16 on a GPU."
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    output: Path = Field(Path("out"), description="Folder of the pictures.")
    overwrite: bool = Field(False, description="Replace pictures of the same name.")
    expected_hashes: dict[str, str] = Field(
        {},
        description="Hash that a base or adapter should have, by its name as given; it is said where another "
        "is found. A picture whose settings are taken brings them along.",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _parse_adapters(cls, given: Any) -> Any:
        if isinstance(given, (str, Path)):
            given = (given,)
        if not isinstance(given, (list, tuple)):
            return given
        return tuple(AdapterUse.parse(str(item)) if isinstance(item, (str, Path)) else item for item in given)
