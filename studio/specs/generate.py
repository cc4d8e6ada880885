"""What a user may ask of generation."""

from pathlib import Path

from pydantic import Field

from studio.specs.composition import CompositionSpec
from studio.specs.drawing import Drawing


class GenerateSpec(CompositionSpec, Drawing):
    """One set of pictures of one prompt. Fields below, plus the options of the composition method."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first picture; each further one adds 1.")
    count: int = Field(1, ge=1, le=10_000, description="Number of pictures.")
    output: Path = Field(Path("out"), description="Folder of the pictures.")
    overwrite: bool = Field(False, description="Replace pictures of the same name.")
