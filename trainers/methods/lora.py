"""LoRA, arXiv:2106.09685: a product of two thin matrices added to each chosen layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from studio.adapters.formats.embedding import TOKEN
from studio.registry import TRAINERS
from studio.specs.base import complete
from studio.specs.train import TrainSpec
from studio.trainers.layer_method import PEFT_NAME, inject
from studio.trainers.low_rank import LowRankMethod, LowRankOptions
from studio.trainers.token_options import TokenOptions

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange
    from studio.trainers.base import ParameterGroup
    from studio.trainers.learned_tokens import LearnedToken
    from studio.trainers.processes import Processes


class LoraOptions(LowRankOptions, TokenOptions):
    """Options of the method ``lora``."""

    init: Literal["default", "pissa", "lora-ga", "eva"] = Field(
        "default",
        description="Start: random; the weights' principal parts (PiSSA, arXiv:2404.02948); the loss's "
        "gradient (LoRA-GA, arXiv:2407.05000); the layers' inputs (EVA, arXiv:2410.07170). PiSSA and LoRA-GA "
        "write twice the rank.",
    )
    init_batches: int = Field(4, ge=1, description="Batches that the starts lora-ga and eva look at.")
    moslora: bool = Field(
        False,
        description="Learn a mixer between the matrices, folded into the file (MoSLoRA, arXiv:2406.11909).",
    )

    token_learning_rate: float = Field(
        5e-3, gt=0, le=1, description="Learning rate of the new token's embeddings, where one is named."
    )
    token_until: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the steps after which the new token stays as it is; the layers learn on.",
    )

    @field_validator("moslora")
    @classmethod
    def _starts_from_zero(cls, mixed: bool, info: ValidationInfo) -> bool:
        if mixed and info.data.get("init") in ("pissa", "lora-ga"):
            raise complete(f"is of no use from the start '{info.data['init']}'. Set init to default or eva.")
        return mixed


@TRAINERS.register("lora")
class Lora(LowRankMethod):
    """Learn low-rank matrices beside chosen layers: the usual choice, small files that every tool loads."""

    Options = LoraOptions
    kind = "lora"
    companions = ("token",)
    options: LoraOptions

    def __init__(self) -> None:
        super().__init__()
        self._learned: LearnedToken | None = None
        self._last_of_token = 0

    @classmethod
    def parts(cls, spec: TrainSpec) -> tuple[str, ...]:
        """Return the token's, where one is trained."""
        assert isinstance(spec.options, LoraOptions)
        return ("token",) if spec.options.token else ()

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str | None:
        """Return what a start sees of the weights that quantised ones do not show."""
        assert isinstance(options, LoraOptions)
        needs = {
            "pissa": "takes the weights' principal parts",
            "lora-ga": "takes the gradient of the weights",
        }
        if options.init not in needs:
            return None
        return f"the start '{options.init}' {needs[options.init]}, which quantised ones do not have"

    @classmethod
    def refuses_start(cls, options: Any) -> str | None:
        """Return which other start is asked for, or what a file cannot give back."""
        assert isinstance(options, LoraOptions)
        if options.init != "default":
            return f"the start '{options.init}' sets the matrices, too. Give one of the two."
        if options.moslora:
            return "files hold moslora's mixer folded in, which none can take out again. Leave moslora out."
        return None

    @classmethod
    def check_captions(cls, pipe: "DiffusionPipeline", spec: TrainSpec, captions: Sequence[str]) -> None:
        """Check that one of the captions names the token, if there is one."""
        from studio.trainers.learned_tokens import check_captions

        assert isinstance(spec.options, LoraOptions)
        if spec.options.token:
            check_captions(pipe, spec.options, captions, max_tokens=spec.max_token_length)

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> "Sequence[ParameterGroup]":
        """Add the layers and the token and return what is trained.

        Raises:
            TrainingError: As for all layers.
            UsageError: If the token exists already, or the words for its start do not fit.
        """
        from studio.trainers.learned_tokens import LearnedToken

        groups = super().prepare(pipe, spec)
        if not self.options.token:
            return groups
        self._learned = LearnedToken(pipe, self.options, seed=self.seed)
        self._last_of_token = round(self.options.token_until * spec.steps)
        return [*groups, *self._learned.groups(self.options.token_learning_rate)]

    def before_clipping(self, step: int) -> None:
        """Leave the token as it is once its share of the steps is done."""
        if self._learned is not None and step > self._last_of_token:
            self._learned.hold()

    def export(self) -> "Adapter":
        """Return the adapter with the token as they are now."""
        adapter = super().export()
        return adapter if self._learned is None else replace(adapter, tokens=self._learned.export())

    @classmethod
    def part(cls, adapter: "Adapter", word: str) -> "Adapter":
        """Return the token alone."""
        return replace(adapter, kind="textual-inversion", changes={})

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Return a context without the layers and the token."""
        with super().suspended(), nullcontext() if self._learned is None else self._learned.suspended():
            yield

    def release(self) -> None:
        """Take layers and token out again; may be called at any time."""
        super().release()
        if self._learned is not None:
            self._learned.release()

    def facts(self) -> Mapping[str, str]:
        """Return kohya's entries, and which token the file goes with."""
        return {**super().facts(), **({TOKEN: self.options.token} if self.options.token else {})}

    @property
    def rank_room(self) -> int:
        """Once; twice where the gradient's next directions start the up matrix."""
        return 2 if self.options.init == "lora-ga" else 1

    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put peft's layers around these, with what the start and the mixer need."""
        from studio.trainers.starts import OFFSET_NAME, add_mixer, turn_offset

        super().add(module, layers, ranks)
        if self.options.init in ("pissa", "lora-ga"):
            inject(module, self.configs(layers, ranks), name=OFFSET_NAME)
            for name in layers:
                turn_offset(module.get_submodule(name))
        if self.options.moslora:
            for name in layers:
                add_mixer(module.get_submodule(name))

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the matrices, and the mixer."""
        found = super().parameters(layer)
        if self.options.moslora:
            weight = layer.lora_B[PEFT_NAME].parametrizations.weight
            found |= {"up": weight.original, "mixer": weight[0].mixer}
        return found

    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Set the random start or PiSSA's; the others have not seen the data yet."""
        from torch import nn

        from studio.trainers.starts import principal_part, set_offset

        if self.options.moslora:
            weight = layer.lora_B[PEFT_NAME].parametrizations.weight
            drawn = nn.init.orthogonal_(weight[0].mixer.detach().cpu(), generator=generator)
            weight[0].mixer.copy_(drawn)
            nn.init.zeros_(weight.original)
        super().start(layer, generator=generator)
        if self.options.init == "pissa":
            set_offset(layer, *principal_part(layer, generator=generator))
        elif self.options.init == "lora-ga":
            # For layers without a gradient: peft drew the offset's numbers from the global random state.
            set_offset(layer, layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight)

    def warm_start(self, loss: "Callable[[int], Tensor]", processes: "Processes | None" = None) -> None:
        """Set the start of LoRA-GA or EVA from the first batches."""
        from studio.trainers.processes import ALONE
        from studio.trainers.starts import start_from_gradient, start_from_inputs

        starts = {"lora-ga": start_from_gradient, "eva": start_from_inputs}
        if self.options.init in starts:
            layers = {f"{component}.{name}": layer for component, name, layer in self.added}
            starts[self.options.init](
                layers,
                loss,
                batches=self.options.init_batches,
                seed=self.seed,
                processes=processes or ALONE,
            )

    def change(self, layer: Any) -> "LoraChange":
        """Return the product, less the one that it started from."""
        from studio.trainers.starts import less_offset

        learned = self.product(layer)
        return less_offset(layer, learned) if self.options.init in ("pissa", "lora-ga") else learned
