"""The engine: make a plan happen inside an ordinary diffusers pipeline, and leave the pipeline as it was.

It attaches to the components - calls of the denoiser, a hook on each text encoder, the scheduler's
``set_timesteps`` and ``step`` - so every pipeline that shares them (image-to-image, inpainting, ControlNet)
is composed too; of the pipeline itself it follows ``encode_prompt``, for plans that want further prompts or
part the rows with the prompt from those without. A step of one branch is the denoiser's own forward pass,
operation for operation, with weights that the bank forms only when the weighting changes.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.parameters import canonical_names, components_of
from studio.composition.attention import AttentionMaps, View
from studio.composition.call import Call
from studio.composition.executor import Executor, Job, Passes, collect, of_encoders
from studio.composition.feature_cache import FeatureCache
from studio.composition.fit import (
    changed_components,
    check_adapters,
    check_pipeline,
    check_weights,
    check_writable,
    claim,
    fit_adapters,
    tokens_of,
)
from studio.composition.interposition import Interposition
from studio.composition.mixing import Mixer, check_branches, half
from studio.composition.multistep import check_restarts
from studio.composition.plan import BaseInfo, Branch, Composer, Plan, PlanRow, Request, Step
from studio.composition.planner import Planner, make_composer, make_modifiers
from studio.composition.policies import say_once
from studio.composition.position import Position
from studio.composition.prompts import Prompts
from studio.errors import CompositionError
from studio.models.architecture import architecture
from studio.models.tokens import AddedTokens, tokenizer_of
from studio.specs import Options as MethodOptions

logger = logging.getLogger(__name__)


def compose(
    pipe: Any,
    adapters: Mapping[str, Adapter],
    *,
    method: str | Composer = "merge",
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | MethodOptions | None = None,
    modifiers: Mapping[str, Mapping[str, Any] | MethodOptions] | None = None,
    batched: bool = True,
    memory: int | None = None,
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
        modifiers: What to change of the method's plan, in this order: names of plan modifiers with their
            options.
        batched: Put the evaluations that a method wants in one step into one batch, where the adapters are of
            low rank; when the GPU's memory is not enough for it they come one after the other. False never
            tries.
        memory: Bytes that weights formed for several weightings may take beside the base's own; by default
            a share of what is free. With less they are formed anew at each change.

    Raises:
        CompositionError: If the pipeline has live peft layers, fused projections or offloaded weights, or an
            adapter cannot be used.
        AdapterError: If an adapter does not fit the base model.
        UsageError: If the method or one of its options does not exist, a weight is not finite, or a token
            exists already.

    Example:
        with studio.compose(pipe, {"dog": dog}, weights={"dog": 0.8}):
            image = pipe("a photo of sks dog", generator=torch.Generator().manual_seed(1)).images[0]
    """
    check_adapters(adapters)
    components = components_of(pipe)
    check_pipeline(
        {name: getattr(part, "_orig_mod", part) for name, part in components.items()},
        changed_components(adapters),
    )
    all_weights = check_weights(adapters, weights or {})
    base = BaseInfo(architecture(pipe), canonical_names(components), pipe)
    tokens = tokens_of(adapters, all_weights)
    # A token acts whenever the prompt names it, so it takes no part in the plan.
    acting = {name: adapter for name, adapter in adapters.items() if adapter.changes or not adapter.tokens}
    fitted = fit_adapters(acting, base.shapes)
    weighted = {name: all_weights[name] for name in acting}
    composer = make_composer(method, options)
    planner = Planner(composer, make_modifiers(modifiers or {}), fitted, weighted, base)
    return Composition(
        pipe,
        components,
        fitted,
        planner,
        AddedTokens(pipe, tokens) if tokens else None,
        Execution(batched, memory),
    )


@dataclass(frozen=True)
class Execution:
    """How branches are evaluated, see ``compose``."""

    batched: bool
    memory: int | None


class Composition:
    """A plan attached to a pipeline while the ``with`` block lasts. Made by ``compose``.

    Attributes:
        plan: What acts when; of a method that reads the prompt that of the last call.
    """

    def __init__(
        self,
        pipe: Any,
        components: Mapping[str, nn.Module],
        adapters: Mapping[str, Adapter],
        planner: Planner,
        tokens: AddedTokens | None,
        execution: Execution,
    ) -> None:
        self.plan = planner.plan()
        self._planner = planner
        self._pipe = pipe
        self._components = components
        self._adapters = {**adapters, **self.plan.formed}
        self._tokens = tokens
        self._executor = Executor(
            components,
            self._adapters,
            live=not check_writable(components, self._adapters),
            batched=execution.batched,
            memory=execution.memory,
        )
        self._cache: FeatureCache | None = None
        self._maps: AttentionMaps | None = None
        self._checked: object = None
        self._speaks = self._encoded = False
        self._stack: ExitStack | None = None

    @property
    def passes(self) -> Passes:
        """What the denoiser has done since the ``with`` block began, in rows of a batch."""
        return self._executor.passes

    def describe(self, total: int) -> list[PlanRow]:
        """Return the plan's table adapter x step for a run of ``total`` steps."""
        return self.plan.describe(total)

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise CompositionError(
                "this composition is entered already. Call compose() again for another one."
            )
        self._checked, self._encoded = None, False
        spoken = {
            name for adapter in self._adapters.values() for name in adapter.changes if of_encoders(name)
        }
        taught = set(self._tokens.embeddings) if self._tokens is not None else set()
        encoders = sorted({name.split(".", 1)[0] for name in spoken} | taught)
        self._speaks = bool(encoders)
        self._unet = self._pipe.unet
        self._denoiser = Interposition(self._unet, self._denoise)
        self._position = Position(self._pipe.scheduler, self._pipe, self._before_run)
        self._mixer = Mixer()
        with ExitStack() as stack:
            parts = [self._components[name] for name in ("unet", *encoders)]
            touched = [getattr(part, "_orig_mod", part) for part in parts]
            touched += [tokenizer_of(self._pipe, name) for name in sorted(taught)]
            stack.enter_context(claim([*touched, self._pipe.scheduler]))
            if self._tokens is not None:
                stack.enter_context(self._tokens)
            # Two banks: the encoders' weights stay while the denoiser's may change at every step.
            self._voice = stack.enter_context(WeightBank(self._components, sorted(spoken)))
            self._speak(self.plan.text_weights)
            stack.enter_context(self._executor)
            self._prompts = stack.enter_context(Prompts(self._pipe, self._prepared, self._speak).follow())
            stack.enter_context(self._position.follow())
            for name in encoders:
                encoder = getattr(self._pipe, name)
                stack.callback(encoder.register_forward_pre_hook(self._before_encoding).remove)
            stack.enter_context(self._denoiser)
            if self.plan.constant and _plain(branches := self.plan.at(_ANY_STEP)):
                self._executor.act(branches[0])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        self._cache = self._maps = None
        stack.close()

    def _prepared(self, request: Request | None) -> Plan:
        """Return the plan for what the pipeline is asked for."""
        if self._planner.reads_prompt:
            if request is None:
                raise CompositionError(
                    "this composition goes by the words of the prompt, but embeddings were given: pass the "
                    "prompt as text."
                )
            self.plan = self._planner.plan(request)
        return self.plan

    def _speak(self, weights: Mapping[str, float]) -> None:
        """Give the text encoders the adapters' parts with these weights."""
        self._voice.apply(collect(self._adapters, Branch(weights), of=of_encoders))

    def _before_encoding(self, encoder: nn.Module, args: Any) -> None:
        self._encoded = True

    def _before_run(self) -> None:
        """Stand where the denoiser is called, whatever was done to it since the last run."""
        if self._pipe.unet is not self._unet:
            raise CompositionError(
                "the pipeline's UNet was replaced inside the 'with' block, such as by torch.compile. Do that "
                "before compose()."
            )
        self._denoiser.attach()

    def _denoise(self, *args: Any, **kwargs: Any) -> Any:
        """Answer one call of the denoiser as the plan says."""
        sample, timestep, prompt = (
            kwargs[name] if name in kwargs else args[place] for place, name in enumerate(_GIVEN)
        )
        run = self._position.run(timestep)
        if run is not None and run is not self._checked:
            self._check_run(run, prompt)
            self._checked = run
        step = _ANY_STEP if self.plan.constant else self._position.step(timestep)
        if step is None:
            raise CompositionError(
                "the denoiser was called outside of a run, so the plan cannot know the step. Call the "
                "pipeline given to compose() or one that shares its scheduler, and do not replace the "
                "scheduler inside the 'with' block; a loop of your own calls scheduler.set_timesteps() "
                "first and scheduler.step() after each evaluation."
            )
        if self.plan.restarts(step):
            self._position.restart()
        branches = self.plan.at(step)
        rows = len(sample)
        self.passes.asked += rows
        if _plain(branches):
            self._executor.act(branches[0])
            self.passes.full += rows
            return self._denoiser.evaluate(*args, **kwargs)
        return self._several(Call.bind(self._unet, args, kwargs), branches, step)

    def _several(self, call: Call, branches: Sequence[Branch], step: Step) -> Any:
        """Answer a call by what its branches say together."""
        # Where all branches answer for all rows with the call's own prompt, nothing depends on guidance.
        apart = any(branch.rows != "all" or branch.text is not None for branch in branches)
        guided = (apart or self._maps is not None) and self._prompts.guides(call.prompt)
        asked = [branch for branch in branches if guided or branch.answers_for("conditional")]
        if self._maps is not None and step.index != self._steered:
            call = self._steer(call, asked, step, guided=guided)
        jobs = [self._job(call, branch, step, guided=guided) for branch in asked]

        def keep(batch: Sequence[Job]) -> AbstractContextManager[None]:
            if self._maps is not None:
                return self._maps.watching(batch, guided=guided)
            slots = [(job.branch.slot, job.rows) for job in batch]
            if self._cache is None or all(slot is None for slot, _ in slots):
                return nullcontext()
            if batch[0].shallow:
                return self._cache.reusing([slot for slot, _ in slots])
            return self._cache.keeping(slots, step=step.index)

        answers = self._executor.answers(self._denoiser.evaluate, jobs, keep)
        regions = self.plan.regions if self._maps is None else self.plan.found(self._maps.maps)
        answer = self._mixer.mixed(asked, answers, guided=guided, regions=regions, feather=self.plan.feather)
        return call.answered(answer)

    def _steer(self, call: Call, branches: Sequence[Branch], step: Step, *, guided: bool) -> Call:
        """Return the call with the latents that the plan goes on with, and the scheduler from there."""
        maps = self._maps
        assert maps is not None
        self._steered = step.index
        own = call.rows(half(len(call.latents), "conditional")) if guided else call
        # Behind the latents an inpainting model is given its mask and picture.
        channels = self._unet.config.out_channels
        latents, others = own.latents.tensor_split([channels], dim=1)
        asked = {
            branch.region: replace(branch, rows="all")
            for branch in branches
            if branch.region is not None and branch.answers_for("conditional")
        }

        def attended(region: str, latents: Tensor) -> Tensor:
            given = own.at(torch.cat([latents, others], dim=1))
            job = self._job(given, asked[region], step, guided=False)
            self._executor.answers(self._denoiser.evaluate, [job], partial(maps.watching, guided=False))
            return maps.maps[region]

        moved = self.plan.steered(View(step, latents, list(asked), attended, self._unet))
        if moved is None:
            return call
        shift = moved - latents
        self._position.shift(shift)
        shifted = call.latents.clone()
        shifted[:, :channels] += torch.cat([shift, shift]) if guided else shift
        return call.at(shifted)

    def _job(self, call: Call, branch: Branch, step: Step, *, guided: bool) -> Job:
        if branch.text is not None:
            text = self._prompts.embeddings(branch.text, guided=guided)
            call.check_prompt_alike(text)
            call = call.speaking(text)
        if guided and branch.rows != "all":
            call = call.rows(half(len(call.latents), branch.rows))
        since = step.index - branch.reuse
        shallow = bool(
            branch.reuse
            and self._cache is not None
            and self._cache.has(branch.slot, rows=len(call.latents), since=since)
        )
        return Job(branch, call, shallow)

    def _check_run(self, run: Sequence[Step], prompt: Tensor) -> None:
        """Raise, before the first evaluation of a run, what would otherwise show in its middle.

        Args:
            run: The step of each denoiser call.
            prompt: Embeddings that the denoiser is called with.
        """
        if self._planner.reads_prompt:
            # The plan is for the prompt that was encoded last: this must be it.
            self._prompts.guides(prompt)
        self._executor.check()
        self.plan.check(run[0].total)
        self._steered = -1
        self._maps = None
        if self.plan.watched:
            self._denoiser.check_uncompiled("attention maps cannot be read")
            self._maps = AttentionMaps(self._unet, self.plan.watched)
        if any(self.plan.restarts(step) for step in run):
            check_restarts(self._pipe.scheduler)
        steps = [self.plan.at(step) for step in run]
        check_branches(self.plan, steps)
        for advice in self.plan.without_effect(run):
            say_once(advice)
        if any(branch.slot is not None for branches in steps for branch in branches):
            if self._maps is not None:
                raise CompositionError(
                    "a method that reads attention maps at every step cannot take layers from a cache. Leave "
                    "the cache out."
                )
            self._denoiser.check_uncompiled("features cannot be kept")
            self._cache = FeatureCache(self._unet, self.plan.cut)
        if self._speaks and not self._encoded:
            logger.warning(
                "the prompt was encoded before compose(): the adapters' text-encoder parts do not act on "
                "it. Pass the prompt as text, or call encode_prompt inside the 'with' block."
            )


_ANY_STEP = Step(0, 1, 0.0)
# Of a denoiser's call, in their places.
_GIVEN = ("sample", "timestep", "encoder_hidden_states")


def _plain(branches: Sequence[Branch]) -> bool:
    """Return whether the step is one evaluation of the call as it came."""
    first = branches[0]
    return (
        len(branches) == 1
        and first.rows == "all"
        and first.text is None
        and first.region is None
        and first.slot is None
    )
