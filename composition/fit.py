"""Whether a pipeline can be composed on and adapters and weights fit it, before anything is touched."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import chain, combinations
from numbers import Real
from threading import Lock
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Adapter, Change, KindOfChange
from studio.adapters.live import LiveLayers
from studio.adapters.parameters import find_parameter
from studio.errors import AdapterError, CompositionError, UsageError
from studio.registry import nearest

logger = logging.getLogger(__name__)
_SHOWN = 4
_claimed: WeakSet[Any] = WeakSet()
_lock = Lock()


@contextmanager
def claim(parts: Sequence[Any]) -> Iterator[None]:
    """Hold modules and a scheduler for one composition.

    Raises:
        CompositionError: If another composition holds one of them.
    """
    with _lock:
        taken = [part for part in parts if part in _claimed]
        if taken:
            raise CompositionError(
                f"this pipeline's {type(taken[0]).__name__} is in another composition. Leave that 'with' "
                "block first, or give all adapters to one compose(); a second pipeline needs a denoiser and "
                "a scheduler of its own."
            )
        _claimed.update(parts)
    try:
        yield
    finally:
        with _lock:
            _claimed.difference_update(parts)


def changed_components(adapters: Mapping[str, Adapter]) -> set[str]:
    """Return the names of the components that adapters change or teach tokens."""
    changed = {name.partition(".")[0] for adapter in adapters.values() for name in adapter.changes}
    taught = {name for adapter in adapters.values() for rows in adapter.tokens.values() for name in rows}
    return changed | taught


def check_pipeline(components: Mapping[str, nn.Module], changed: Collection[str]) -> None:
    """Raise CompositionError if weights of the components are not plainly there to be changed.

    Args:
        components: Without what torch.compile wraps around them.
        changed: Names of those that adapters change.
    """
    if "unet" not in components:
        raise CompositionError("the pipeline has no 'unet'. Choose an SD 1.x, SD 2.x or SDXL base.")
    for name, component in components.items():
        # Unloading by deletion alone leaves peft's layers in place, so the layers are looked for, not their
        # list.
        if any(hasattr(module, "base_layer") for module in component.modules()):
            raise CompositionError(
                f"{name} has live peft layers. Call pipe.unload_lora_weights() before compose()."
            )
        written = name != "unet" and name in changed
        if written and any(parameter.is_meta for parameter in component.parameters()):
            raise CompositionError(
                f"the weights of {name} are offloaded layer by layer, so no adapter can change them. Use "
                "pipe.enable_model_cpu_offload() instead of sequential offload."
            )
        _check_groups(name, component)
    processors = getattr(components["unet"], "attn_processors", {})
    if any(type(processor).__name__.startswith("Fused") for processor in processors.values()):
        raise CompositionError(
            "unet computes query, key and value from fused weights. Call pipe.unfuse_qkv_projections() "
            "before compose()."
        )


def _check_groups(name: str, component: nn.Module) -> None:
    """Raise CompositionError if diffusers' group offloading keeps a component from being composed."""
    groups = list(_groups(component))
    if any(group.offload_to_disk_path for group in groups):
        raise CompositionError(
            f"the weights of {name} lie on disk between uses, so they can neither be read nor changed. Leave "
            "offload_to_disk_path out of enable_group_offload(), or use pipe.enable_model_cpu_offload()."
        )
    if name != "unet" and any(group.stream is not None for group in groups):
        raise CompositionError(
            f"group offloading with streams brings the weights of {name} from copies of its own, so they "
            "cannot be merged. Call enable_group_offload() without use_stream, or with "
            f"exclude_modules='{name}'."
        )
    registry = vars(component).get("_diffusers_hook") if name == "unet" else None
    if registry is not None and registry.get_hook("lazy_prefetch_group_offloading") is not None:
        # What finds the order in which layers run takes itself away after one pass, and with it whatever was
        # attached to the forward since.
        raise CompositionError(
            "group offloading with streams does not know yet in which order the layers of unet run. Call the "
            "pipeline once, with one step, before compose()."
        )


def _groups(component: nn.Module) -> Iterator[Any]:
    """Go through the groups in which diffusers offloads a component."""
    for module in component.modules():
        registry = vars(module).get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            yield hook.group


def _brought_by_streams(component: nn.Module) -> set[int]:
    """Return the ids of parameters whose weights come from copies at each use, so that writing is in vain."""
    groups = [group for group in _groups(component) if group.stream is not None]
    owned = [chain(group.parameters, *(part.parameters() for part in group.modules)) for group in groups]
    return {id(parameter) for parameter in chain(*owned)}


def check_writable(components: Mapping[str, nn.Module], adapters: Mapping[str, Adapter]) -> bool:
    """Return whether the denoiser's weights can be written to, as far as adapters change them.

    Raises:
        CompositionError: If they cannot, and an adapter has no other way to act.
    """
    changes = {
        name: {
            parameter: each for parameter, each in adapter.changes.items() if parameter.startswith("unet.")
        }
        for name, adapter in adapters.items()
    }
    fixed = _brought_by_streams(components["unet"])
    touched = {parameter for each in changes.values() for parameter in each}
    found = [find_parameter(components, name) for name in sorted(touched)]
    if all(_plain(parameter) and id(parameter) not in fixed for parameter in found):
        return True
    for name, each in changes.items():
        why = LiveLayers.why_not({parameter: [(change, 1.0)] for parameter, change in each.items()})
        if why is not None:
            raise CompositionError(
                "the base's weights are quantised, or offloaded layer by layer or with streams, so nothing "
                f"can be merged into them, and '{name}' cannot act beside them: {why}. Load the base without "
                "quantisation, or use pipe.enable_model_cpu_offload()."
            )
    return False


def _plain(parameter: nn.Parameter) -> bool:
    # bitsandbytes keeps its weights in classes of its own, which differ in type where nothing is packed yet.
    return not parameter.is_meta and type(parameter) is nn.Parameter and parameter.is_floating_point()


def check_adapters(adapters: Any) -> None:
    """Raise UsageError unless these are adapters by name, each under one name."""
    if not isinstance(adapters, Mapping):
        raise UsageError(
            f"adapters: a table from names to adapters is wanted, such as {{'dog': dog}}, got "
            f"{type(adapters).__name__}."
        )
    for name, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            kind = type(adapter).__name__
            raise UsageError(f"adapters: '{name}' is a {kind}. Read files with studio.load_adapter(path).")
    for (first, one), (second, other) in combinations(adapters.items(), 2):
        if one is other:
            raise UsageError(
                f"adapters: '{first}' and '{second}' are the same adapter. Leave one out; one weight can do "
                "what both did. To have it act twice all the same, load it twice."
            )
        if one.changes and _alike(one.changes, other.changes):
            logger.warning("'%s' and '%s' make the same changes. Is one of them meant?", first, second)


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values hold the same numbers, those in tables, tuples and changes included."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if is_dataclass(one):
        return all(_alike(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    return bool(one == other)


def check_weights(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> dict[str, float]:
    """Return a weight for every adapter, in their order; 1 where not given.

    Raises:
        UsageError: If a weight names no adapter or is not a finite number.
    """
    for name, weight in weights.items():
        if name not in adapters:
            known = ", ".join(adapters) or "none"
            raise UsageError(
                f"weights: unknown adapter '{name}'.{nearest(name, list(adapters))} Known: {known}."
            )
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UsageError(f"weights: '{name}' must be a finite number, got {weight!r}.")
    return {name: float(weights.get(name, 1.0)) for name in adapters}


def tokens_of(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[str, Mapping[str, Tensor]]:
    """Return all new tokens that adapters bring.

    Raises:
        UsageError: If an adapter that is a token only is given a weight.
        CompositionError: If two adapters bring the same token.
    """
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, adapter in adapters.items():
        if adapter.tokens and not adapter.changes and weights[name] != 1:
            raise UsageError(
                f"weights: '{name}' is the token {', '.join(adapter.tokens)}, which has no strength: it acts "
                f"where the prompt names it. Give it weight 1 or leave it out, got {weights[name]:g}."
            )
        if both := found.keys() & adapter.tokens.keys():
            raise CompositionError(
                f"'{name}' brings the token {', '.join(sorted(both))}, as another adapter does. Use one of "
                "them, or train it anew with another token."
            )
        found |= adapter.tokens
    return found


def fit_adapters(
    adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Adapter]:
    """Return the adapters for a base whose parameters have these shapes by canonical name.

    A linear layer and a 1x1 convolution stand for each other, as in files of other tools.

    Raises:
        AdapterError: If an adapter changes what the base does not have, or in another shape.
    """
    return {name: _fitted(name, adapter, shapes) for name, adapter in adapters.items()}


def _fitted(name: str, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    problems: list[str] = []
    changes: dict[str, Change] = {}
    for parameter, change in adapter.changes.items():
        if parameter not in shapes:
            problems.append(f"the base has no '{parameter}'")
            continue
        wanted, got = tuple(shapes[parameter]), tuple(change.shape)
        fitted = change if got == wanted else cast(KindOfChange, change).fitted(wanted)
        if fitted is None:
            texts = (" x ".join(map(str, shape)) for shape in (wanted, got))
            problems.append(f"'{parameter}' is {next(texts)} in the base and {next(texts)} in the adapter")
        else:
            changes[parameter] = fitted
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise AdapterError(
            f"'{name}' does not fit the base model ({len(problems)} of {len(adapter.changes)} changes): "
            f"{'; '.join(problems[:_SHOWN])}{more}. Choose the base that it was trained on."
        )
    return replace(adapter, changes=changes)
