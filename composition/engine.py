"""The engine: make a plan happen inside an ordinary diffusers pipeline, and leave the pipeline as it was.

It attaches to the components and nothing else - a forward pre-hook on the denoiser, one on each text encoder,
the scheduler's ``set_timesteps`` and ``step`` - so every pipeline that shares them (image-to-image,
inpainting, ControlNet) is composed too. Weights are formed by the bank from pristine copies, only when the
weighting changes: between changes a forward pass is the base's forward pass, operation for operation.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import nn

from studio.adapters.adapter import Adapter, Change
from studio.adapters.bank import WeightBank
from studio.adapters.parameters import canonical_names, components_of
from studio.composition.fit import check_pipeline, check_weights, claim, fit_adapters, tokens_of
from studio.composition.plan import BaseInfo, Branch, Composer, LayerWeights, Plan, PlanRow, Step, covers
from studio.composition.position import Position
from studio.errors import CompositionError
from studio.models.architecture import architecture
from studio.models.tokens import AddedTokens, tokenizer_of
from studio.registry import COMPOSERS
from studio.specs import Options, parse_spec

logger = logging.getLogger(__name__)


def compose(
    pipe: Any,
    adapters: Mapping[str, Adapter],
    *,
    method: str | Composer = "merge",
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> "Composition":
    """Return a context manager inside which ``pipe`` draws with the adapters.

    Inside, call the pipeline as ever; each call starts from the plan's first step. On exit, also by an
    exception, every parameter is bit for bit what it was. New tokens that adapters bring are known inside
    and act where a prompt names them.

    Args:
        pipe: A diffusers pipeline of SD 1.x, SD 2.x or SDXL.
        adapters: Adapters by the names that weights and options use.
        method: Name of a composition method, or one with its options set.
        weights: Weight per adapter; 1 where not given. It is that of an adapter's changes: tokens have none.
        options: Options of the method, when it is given by name.

    Raises:
        CompositionError: If the pipeline has live peft layers, fused projections or offloaded weights, or an
            adapter cannot be used.
        AdapterError: If an adapter does not fit the base model.
        UsageError: If the method or one of its options does not exist, or a token exists already.

    Example:
        with studio.compose(pipe, {"dog": dog}, weights={"dog": 0.8}):
            image = pipe("a photo of sks dog", generator=torch.Generator().manual_seed(1)).images[0]
    """
    components = {name: getattr(part, "_orig_mod", part) for name, part in components_of(pipe).items()}
    check_pipeline(components)
    all_weights = check_weights(adapters, weights or {})
    base = BaseInfo(architecture(pipe), canonical_names(components))
    tokens = tokens_of(adapters, all_weights)
    # A token acts whenever the prompt names it, so it takes no part in the plan.
    acting = {name: adapter for name, adapter in adapters.items() if adapter.changes or not adapter.tokens}
    fitted = fit_adapters(acting, base.shapes)
    weighted = {name: all_weights[name] for name in acting}
    plan = _composer(method, options).prepare(fitted, weighted, base)
    return Composition(pipe, components, fitted, plan, AddedTokens(pipe, tokens) if tokens else None)


class Composition:
    """A plan attached to a pipeline while the ``with`` block lasts. Made by ``compose``.

    Attributes:
        plan: What acts when.
    """

    def __init__(
        self,
        pipe: Any,
        components: Mapping[str, nn.Module],
        adapters: Mapping[str, Adapter],
        plan: Plan,
        tokens: AddedTokens | None,
    ) -> None:
        self.plan = plan
        self._pipe = pipe
        self._components = components
        self._adapters = adapters
        self._tokens = tokens
        self._text_branch = Branch({name: weight for name, weight in plan.text_weights.items() if weight})
        self._checked: object = None
        self._speaks = self._encoded = False
        self._acting: Branch | None = None
        self._stack: ExitStack | None = None

    def describe(self, total: int) -> list[PlanRow]:
        """Return the plan's table adapter x step for a run of ``total`` steps."""
        return self.plan.describe(total)

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise CompositionError(
                "this composition is entered already. Call compose() again for another one."
            )
        self._acting, self._checked, self._encoded = None, None, False
        spoken = _collect(self._adapters, self._text_branch, of_denoiser=False)
        taught = set(self._tokens.embeddings) if self._tokens is not None else set()
        encoders = sorted({name.split(".", 1)[0] for name in spoken} | taught)
        self._speaks = bool(encoders)
        changed = {name for adapter in self._adapters.values() for name in adapter.changes}
        self._position = Position(self._pipe.scheduler, self._pipe)
        with ExitStack() as stack:
            touched = [self._components[name] for name in ("unet", *encoders)]
            touched += [tokenizer_of(self._pipe, name) for name in sorted(taught)]
            stack.enter_context(claim([*touched, self._pipe.scheduler]))
            if self._tokens is not None:
                stack.enter_context(self._tokens)
            # Two banks: the encoders' weights stay while the denoiser's may change at every step.
            stack.enter_context(WeightBank(self._components, spoken)).apply(spoken)
            self._bank = stack.enter_context(
                WeightBank(self._components, filter(_of_denoiser, sorted(changed)))
            )
            stack.enter_context(self._position.follow())
            for name in encoders:
                encoder = getattr(self._pipe, name)
                stack.callback(encoder.register_forward_pre_hook(self._before_encoding).remove)
            hook = self._pipe.unet.register_forward_pre_hook(self._before_denoising, with_kwargs=True)
            stack.callback(hook.remove)
            if self.plan.constant:
                self._act(self.plan.at(_ANY_STEP))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.close()

    def _before_encoding(self, encoder: nn.Module, args: Any) -> None:
        self._encoded = True

    def _before_denoising(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        run = self._position.run(timestep)
        if run is not None and run is not self._checked:
            self._check_run(run)
            self._checked = run
        if self.plan.constant:
            return
        step = self._position.step(timestep)
        if step is None:
            raise CompositionError(
                "the denoiser was called outside of a run, so the plan cannot know the step. Call the "
                "pipeline given to compose() or one that shares its scheduler, and do not replace the "
                "scheduler inside the 'with' block; a loop of your own calls scheduler.set_timesteps() "
                "first and scheduler.step() after each evaluation."
            )
        self._act(self.plan.at(step))

    def _check_run(self, run: Sequence[Step]) -> None:
        """Raise, before the first evaluation of a run, what would otherwise show in its middle."""
        self.plan.check(run[0].total)
        for step in run:
            _single(self.plan.at(step))
        if self._speaks and not self._encoded:
            logger.warning(
                "the prompt was encoded before compose(): the adapters' text-encoder parts do not act on "
                "it. Pass the prompt as text, or call encode_prompt inside the 'with' block."
            )

    def _act(self, branches: Sequence[Branch]) -> None:
        """Give the denoiser the weights of the step, unless it has them."""
        branch = _single(branches)
        if branch != self._acting:
            self._bank.apply(_collect(self._adapters, branch, of_denoiser=True))
            self._acting = branch


_ANY_STEP = Step(0, 1, 0.0)


def _single(branches: Sequence[Branch]) -> Branch:
    """Return the only branch of a step.

    Raises:
        CompositionError: If the plan wants several evaluations per step, or a part of the batch.
    """
    if len(branches) == 1 and branches[0].rows == "all" and branches[0].share == 1.0:
        return branches[0]
    raise CompositionError(
        f"the plan wants {len(branches)} evaluations of the denoiser in one step; merged weights give one, "
        "on all rows and with share 1. Choose a method with one branch per step, such as 'merge' or "
        "'switch'."
    )


def _of_denoiser(parameter: str) -> bool:
    return parameter.startswith("unet.")


def _collect(
    adapters: Mapping[str, Adapter], branch: Branch, *, of_denoiser: bool
) -> dict[str, list[tuple[Change, float]]]:
    """Return each parameter's changes with weights; weight 0 is left out: it is the base bit for bit."""
    found: dict[str, list[tuple[Change, float]]] = {}
    for name in branch.weights:
        _check_layers(name, branch.weights[name], adapters[name])
        for parameter, change in adapters[name].changes.items():
            weight = branch.weight(name, parameter)
            if weight and _of_denoiser(parameter) == of_denoiser:
                found.setdefault(parameter, []).append((change, weight))
    return found


def _check_layers(name: str, weight: float | LayerWeights, adapter: Adapter) -> None:
    if not isinstance(weight, Mapping):
        return
    idle = [layer for layer in weight if not any(covers(layer, parameter) for parameter in adapter.changes)]
    if idle:
        raise CompositionError(
            f"weights of '{name}' name layers that it does not change: {', '.join(idle)}. Name dotted "
            "prefixes of its parameters, such as 'unet.up_blocks.1'."
        )


def _composer(method: str | Composer, options: Mapping[str, Any] | Options | None) -> Composer:
    if not isinstance(method, str):
        if options is not None:
            raise CompositionError(
                "options were given beside a composer that has its own. Put them into the composer."
            )
        return method
    kind = COMPOSERS[method]
    if not isinstance(options, kind.Options):
        options = parse_spec(kind.Options, dict(options or {}))
    composer: Composer = kind(options)
    return composer
