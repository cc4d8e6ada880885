"""What a user may ask of how a base reads prompts and computes, in training and in drawing alike."""

from typing import Annotated, Literal

from pydantic import Field

ClipSkip = Annotated[
    int,
    Field(
        ge=1,
        le=64,
        description="Layer of the text encoder whose output is used, counted from the end: 1 is the last, 2 "
        "the one before it, as many models that descend from SD 1.x want. SDXL takes no other than its own.",
    ),
]
Attention = Annotated[
    Literal["auto", "sdpa", "xformers", "eager"],
    Field(
        description="How attention is computed: as diffusers picks, which is PyTorch's fused one (sdpa); by "
        "xformers (NVIDIA GPUs, an extra package); or plainly, all scores at once (eager, the most memory)."
    ),
]
Quantization = Annotated[
    Literal["none", "int8", "nf4"],
    Field(
        description="Hold the UNet's transformer blocks in 8 or 4 bits (bitsandbytes): int8 takes half of "
        "what 16 bits take, nf4 about a quarter, both at some loss of quality."
    ),
]
Compile = Annotated[
    bool,
    Field(
        description="Compile the UNet's transformer blocks with torch.compile: the first step takes a minute "
        "or more, the others less. For long runs on a GPU."
    ),
]
Offload = Annotated[
    Literal["none", "model", "sequential"],
    Field(
        description="Keep the base on the CPU and bring to the GPU one network after the other (model), or "
        "one layer after the other (sequential: the least memory, many times slower)."
    ),
]
