"""What a user may ask of training."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from studio.errors import SpecError, UsageError
from studio.registry import FORMATS, TRAINERS, Registry
from studio.specs.base import complete, parse_spec
from studio.specs.checks import ends_in, known_in, read_value
from studio.specs.data import DataSpec
from studio.specs.execution import Attention, ClipSkip, Compile, Quantization
from studio.specs.groups import TRAINING, Groups


class TrainSpec(DataSpec):
    """One training run. Fields below, plus the options of the chosen method."""

    registry: ClassVar[Registry[Any]] = TRAINERS
    groups: ClassVar[Groups] = TRAINING

    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    method: str = Field("lora", description="Training method.")
    output: Annotated[Path, ends_in(".safetensors")] = Field(
        description="Adapter file to write (.safetensors)."
    )
    format: Annotated[str | None, known_in(FORMATS)] = Field(
        None,
        description="File format of the output: 'kohya' (other tools), 'diffusers', 'sara' (sparse changes), "
        "'embedding' (a token); "
        "default: the method's own.",
    )
    overwrite: bool = Field(
        False, description="Replace the output and the run folder beside it if they exist."
    )
    resume: bool = Field(
        False,
        description="Go on from the newest checkpoint in the run folder beside the output, bit for bit as if "
        "the run had never ended; with overwrite too, start anew where there is none.",
    )
    start_from: Annotated[Path | None, ends_in(".safetensors")] = Field(
        None,
        description="Adapter file to start from instead of from nothing, with an optimizer and a schedule "
        "that begin anew: for lora, dora and b-lora, of the same rank and layers. resume goes on with a run.",
    )
    steps: int = Field(300, ge=1, description="Optimizer steps.")
    batch_size: int = Field(2, ge=1, description="Pictures per forward pass of each process.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    gradient_checkpointing: bool = Field(False, description="Trade time for memory in the backward pass.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Learning rate of the UNet's adapter; default: the method's own."
    )
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, le=1, description="Learning rate of the text encoders' adapter; default: half the UNet's."
    )
    schedule: Literal["constant", "cosine", "restarts", "linear", "polynomial"] = Field(
        "cosine",
        description="Course of the learning rate after warm-up: level; down half a cosine; several of them "
        "one after the other; down a line; down along a power.",
    )
    schedule_restarts: int | None = Field(
        None, ge=1, description="With schedule 'restarts', how many cosines; default: 3."
    )
    schedule_power: float | None = Field(
        None, gt=0, description="With schedule 'polynomial', the power; default: 2."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises from zero.")
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy"] = Field(
        "adamw",
        description="What updates the parameters. adamw8bit (bitsandbytes) and adafactor take less memory; "
        "lion wants a lower learning rate; prodigy finds it: leave learning_rate out.",
    )
    optimizer_options: Mapping[str, Any] = Field(
        {},
        description="Further settings of the optimizer by the names that its own documentation gives them, "
        "such as betas = 0.9, 0.99.",
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay, in units of the learning rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    loss: Literal["l2", "l1", "huber"] = Field(
        "l2",
        description="Error of the prediction: squared; absolute; or squared where small and absolute where "
        "large, which outliers bend less.",
    )
    huber_delta: float | None = Field(
        None,
        gt=0,
        description="With loss 'huber', where small ends, in deviations of the noise; default: 0.1.",
    )
    min_snr_gamma: float | None = Field(
        5.0, gt=0, description="Min-SNR loss weighting's gamma, arXiv:2303.09556; none turns it off."
    )
    debiased: bool = Field(
        False,
        description="Weight the loss by 1 / sqrt(SNR) instead, which stresses high noise (arXiv:2310.08442).",
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Deviation of a number added to all noise of a channel: lets very dark and very bright "
        "pictures be learned; 0.05 to 0.1 is usual.",
    )
    min_timestep: int | None = Field(
        None,
        ge=0,
        description="Train on timesteps from this one on: without the low ones, details are left as they "
        "are; default: 0.",
    )
    max_timestep: int | None = Field(
        None,
        ge=1,
        description="Train on timesteps below this one: without the high ones, the composition is left as it "
        "is; default: all of the base's, usually 1000.",
    )
    clip_skip: ClipSkip = 1
    class_prompts: tuple[str, ...] = Field(
        (),
        description="What the base shall not forget: it draws class pictures of these prompts, which are "
        "trained on beside yours (DreamBooth's prior preservation).",
    )
    class_pictures: int = Field(100, ge=1, description="How many class pictures to draw, over all prompts.")
    class_data: Path | None = Field(
        None,
        description="Folder of class (regularisation) pictures to use instead of drawing them, flat or with "
        "kohya's N_name folders; one class prompt may caption those without a caption of their own.",
    )
    prior_weight: float = Field(
        1.0, gt=0, description="Weight of the loss on class pictures beside that on yours."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of noise, timesteps, crops and the adapter's start."
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="Number type of the forward pass; auto: fp32 on the CPU, bf16 on GPUs that have it (from "
        "RTX 30 and A100 on), fp16 on others.",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    attention: Attention = "auto"
    quantize_base: Quantization = "none"
    offload_encoders: bool = Field(
        False,
        description="Encode pictures and captions before the first step, and keep autoencoder and text "
        "encoders on the CPU while training; one that learns or that every step needs stays on the GPU.",
    )
    compile: Compile = False
    sample_every: int = Field(0, ge=0, description="Draw sample pictures every so many steps; 0: never.")
    sample_prompts: tuple[str, ...] = Field(
        (),
        description="Prompts of the samples, each with settings of its own at the end where wanted, such as "
        "'--n fog --d 7 --l 6' (negative prompt, seed, guidance); default: the training prompt.",
    )
    sample_steps: int = Field(20, ge=1, le=1000, description="Denoising steps of the samples.")
    save_every: int = Field(
        0, ge=0, description="Write the adapter so far every so many steps; 0: at the end and on a stop only."
    )
    keep_adapters: int = Field(
        0, ge=0, description="How many of the adapters so far to keep, the last ones; 0: all."
    )
    checkpoint_every: int = Field(
        0,
        ge=0,
        description="Write a checkpoint to resume from every so many steps and at the end; 0: on a stop or "
        "an error only.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many checkpoints to keep, the last ones.")
    validate_every: int = Field(
        0,
        ge=0,
        description="Measure the loss on the pictures that are held out every so many steps; 0: at the start "
        "and the end only.",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Stop early after so many measurements without a better one; 0: never. The best adapter "
        "is kept in the run folder.",
    )
    tracker: str | None = Field(
        None,
        description="Also log to this tracker, by accelerate's name: 'tensorboard' or another that is "
        "installed and set up.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Write the moving average of what is trained, which keeps this share of itself at each "
        "step (0.99 looks back about 100 steps); 0: the last values.",
    )
    average_last: int = Field(
        0,
        ge=0,
        description="Write the mean of the last so many checkpoints (stochastic weight averaging, "
        "arXiv:1803.05407); 0: the last values.",
    )
    author: str | None = Field(None, description="Author written into the file's metadata.")
    metadata: Literal["usual", "full", "minimal"] = Field(
        "usual",
        description="What the file says of its training: settings, counts and the trigger, but no caption or "
        "path; full adds names of folders and tags of captions, which other programs show; minimal says no "
        "more than reading the file takes.",
    )

    @classmethod
    def meaning_changed(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Collection[str]:
        """Return the learning rates where method and optimizer of two requests differ in their own one."""
        chosen = [
            {name: each[name] for name in ("method", "optimizer") if name in each} for each in (before, after)
        ]
        try:
            alike = chosen[0] == chosen[1] or own_rate(chosen[0]) == own_rate(chosen[1])
        except (SpecError, UsageError):
            # A method or optimizer that does not exist is refused in its place.
            return ()
        return () if alike else ("learning_rate", "text_encoder_learning_rate")

    @field_validator("schedule_restarts", "schedule_power", "huber_delta")
    @classmethod
    def _of_use(cls, value: float | None, info: ValidationInfo) -> float | None:
        field, wanted = {
            "schedule_restarts": ("schedule", "restarts"),
            "schedule_power": ("schedule", "polynomial"),
            "huber_delta": ("loss", "huber"),
        }[str(info.field_name)]
        if value is not None and info.data.get(field, wanted) != wanted:
            raise complete(
                f"counts only where {field} is '{wanted}', got '{info.data[field]}'. Leave it out."
            )
        return value

    @field_validator("start_from")
    @classmethod
    def _starts_from_files(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        method = str(info.data.get("method"))
        if file is not None and method in TRAINERS.names() and "options" in info.data:
            reason: str | None = TRAINERS[method].refuses_start(info.data["options"])
            if reason:
                raise complete(reason)
        return file

    @field_validator("optimizer_options")
    @classmethod
    def _as_values(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name.strip(): read_value(name.strip(), value) for name, value in given.items()}

    @field_validator("max_timestep")
    @classmethod
    def _leaves_timesteps(cls, end: int | None, info: ValidationInfo) -> int | None:
        first = info.data.get("min_timestep")
        if end is not None and first is not None and end <= first:
            raise complete(f"must be greater than min_timestep ({first}), got {end}.")
        return end

    @field_validator("quantize_base")
    @classmethod
    def _frozen_base(cls, kind: str, info: ValidationInfo) -> str:
        method = str(info.data.get("method"))
        if kind != "none" and method in TRAINERS.names() and "options" in info.data:
            reason: str | None = TRAINERS[method].refuses_quantized(info.data["options"], kind)
            if reason:
                raise complete(f"{reason}. Choose another method, or leave quantize_base out.")
        return kind

    @field_validator("offload_encoders")
    @classmethod
    def _keeps_encoded(cls, asked: bool, info: ValidationInfo) -> bool:
        if asked and info.data.get("cache") == "off":
            raise complete("needs a cache: without one the encoders are used at every step. Leave cache out.")
        return asked

    @field_validator("patience")
    @classmethod
    def _has_measurements(cls, number: int, info: ValidationInfo) -> int:
        if number and not info.data.get("validate_every"):
            raise complete("needs measurements on the way. Give validate_every.")
        return number

    @field_validator("debiased")
    @classmethod
    def _one_weighting(cls, debiased: bool, info: ValidationInfo) -> bool:
        if debiased and info.data.get("min_snr_gamma") is not None:
            raise complete("min_snr_gamma weights the loss already. Set min_snr_gamma to none.")
        return debiased

    @field_validator("average_last")
    @classmethod
    def _has_checkpoints(cls, number: int, info: ValidationInfo) -> int:
        if not number:
            return number
        if info.data.get("ema_decay"):
            raise complete("ema_decay averages already. Give one of the two.")
        if not info.data.get("checkpoint_every"):
            raise complete("needs checkpoints on the way. Give checkpoint_every.")
        if number > info.data.get("keep_checkpoints", number):
            raise complete(
                f"must be at most keep_checkpoints ({info.data['keep_checkpoints']}), got {number}. Raise "
                "keep_checkpoints."
            )
        return number

    @field_validator("class_prompts")
    @classmethod
    def _says_something(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in prompts):
            raise complete(
                "one is empty. Say what the base shall not forget, such as 'a dog', or leave it out."
            )
        return prompts

    @field_validator("class_data")
    @classmethod
    def _one_class_caption(cls, folder: Path | None, info: ValidationInfo) -> Path | None:
        prompts = info.data.get("class_prompts", ())
        if folder is not None and len(prompts) > 1:
            raise complete(
                "with a folder of class pictures none are drawn, so at most one class prompt is used, got "
                f"{len(prompts)}. Give one, or leave class_data out."
            )
        return folder

    @property
    def may_replace(self) -> bool:
        """Whether what an earlier run wrote may be replaced: a run that goes on replaces its own."""
        return self.overwrite or self.resume

    @property
    def has_class_pictures(self) -> bool:
        """Whether class pictures are trained on beside the user's."""
        return bool(self.class_prompts) or self.class_data is not None

    @property
    def unet_learning_rate(self) -> float:
        """Learning rate of the UNet's adapter: what is asked for, or what method and optimizer want."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "prodigy":
            return 1.0
        own: float = TRAINERS[self.method].learning_rate(self)
        # Its steps have one size whatever the gradient: arXiv:2302.06675, Sec. 5.
        return own / 10 if self.optimizer == "lion" else own

    @property
    def encoder_learning_rate(self) -> float:
        """Learning rate of the text encoders' adapter: what is asked for, or half the UNet's.

        Prodigy knows one rate only.
        """
        share = 1.0 if self.optimizer == "prodigy" else 0.5
        return self.text_encoder_learning_rate or self.unet_learning_rate * share

    @property
    def file_format(self) -> str:
        """File format of the output: what is asked for, or the method's own."""
        if self.format is not None:
            return self.format
        own: str = TRAINERS[self.method].format
        return own


def own_rate(request: Mapping[str, Any]) -> float:
    """Return the learning rate of a request that names none, of however little it says."""
    choices = {name: request[name] for name in ("method", "optimizer") if name in request}
    method = str(request.get("method", TrainSpec.model_fields["method"].default))
    known = TRAINERS[method].Options.model_fields
    options = {name: value for name, value in request.items() if name in known}
    nowhere = {"data": "pictures", "output": "adapter.safetensors"}
    try:
        spec = parse_spec(TrainSpec, {**choices, **options, **nowhere})
    except SpecError:
        # One of the options is half typed.
        spec = parse_spec(TrainSpec, {**choices, **nowhere})
    return spec.unet_learning_rate
