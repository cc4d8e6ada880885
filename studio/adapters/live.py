"""Let low-rank changes act beside the weights: in what layers give, not in what they hold."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Change
from studio.adapters.parameters import find_parameter
from studio.errors import AdapterError
from studio.kernels.lora_indexed import (
    IndexedStack,
    Rows,
    lora_indexed,
    lora_indexed_conv,
    rows_of,
    stack_indexed,
)
from studio.kernels.lora_stacked import Stacked, fold, lora_stacked, lora_stacked_conv, stack
from studio.registry import KINDS

Changes = Mapping[str, Sequence[tuple[Change, float]]]
"""Changes with their weights by canonical parameter name."""

_WAY_OUT = "Use it where weights can be written: neither quantised nor offloaded layer by layer."


class LiveLayers:
    """Linear layers and convolutions to whose outputs low-rank changes are added.

    Only a layer's own forward is called. Its weight is never read, so it may be quantised, or on meta because
    it is offloaded layer by layer. A context manager: inside, the layers' ``forward`` is shadowed; leaving
    brings back what was there. To disable offloading in between removes shadows, ``attach`` brings them back.

    Other weights for the same changes cost two calls for the whole model. Factors are joined at the first
    forward after the changes are named first, and kept.

    Args:
        components: Modules by name, see ``components_of``.
        names: Canonical names of the parameters that changes will be of.

    Raises:
        AdapterError: If a parameter does not exist or is not the weight of a linear layer or a convolution.
    """

    def __init__(self, components: Mapping[str, nn.Module], names: Iterable[str]) -> None:
        owners: dict[int, list[nn.Module]] = {}
        for module in nn.ModuleList(components.values()).modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), []).append(module)
        self._layers = {name: _Layer(name, owners[id(find_parameter(components, name))]) for name in names}
        self._layouts: dict[tuple[tuple[int, ...], int], _Layout] = {}
        self._attached = ExitStack()

    @staticmethod
    def why_not(changes: Changes) -> str | None:
        """Return the first reason why changes cannot act beside the weights, or None."""
        for name, pairs in changes.items():
            for change, _ in pairs:
                if change.low_rank() is None:
                    return f"the change of '{name}' is of kind '{_kind(change)}', which has no low-rank form"
        return None

    def apply(self, changes: Changes) -> None:
        """Let changes act on every row; a parameter that is not named gets none.

        Raises:
            AdapterError: If a change is not low-rank, does not fit its layer or is of another layer than
                those that were named, or a weight is not finite. What acted before acts still.
        """
        self._act([changes], None)

    def apply_indexed(self, branches: Sequence[Changes], *, rows: Sequence[int]) -> None:
        """Let the changes of its branch act on each row of the batches to come.

        Rows of one branch side by side, all branches equally often and in order (0, 0, 1, 1), cost two
        operations a layer.

        Args:
            branches: Changes of each branch.
            rows: Branch of each row, -1 for the base. Every layer's input has the rows first.

        Raises:
            AdapterError: As for ``apply``.
            ValueError: If a row names no branch.
        """
        key = tuple(rows), len(branches)
        if key not in self._layouts:
            self._layouts[key] = _Layout(*key)
        self._act(branches, self._layouts[key])

    def attach(self) -> None:
        """Shadow the layers whose shadow was taken away, such as with hooks that were there before."""
        for layer in self._layers.values():
            for module in layer.modules:
                if not layer.is_attached(module):
                    self._attached.callback(layer.attach(module))

    def __enter__(self) -> Self:
        with self._attached:
            self.attach()
            self._attached = self._attached.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers.values():
            layer.clear()
        self._layouts.clear()
        self._attached.close()

    def _act(self, branches: Sequence[Changes], layout: "_Layout | None") -> None:
        for changes in branches:
            if unknown := [name for name in changes if name not in self._layers]:
                raise AdapterError(
                    f"'{unknown[0]}' is none of the live layers. Name all that changes are of."
                )
        found = [
            (layer, *layer.terms([changes.get(name, ()) for changes in branches], indexed=layout is not None))
            for name, layer in self._layers.items()
        ]
        stale = [(terms, weights) for _, terms, weights in found if terms and terms.weights != weights]
        _fold([(terms.factors, weights) for terms, weights in stale if terms.factors is not None])
        for terms, weights in stale:
            terms.weights = weights
        for layer, acting, _ in found:
            layer.acting, layer.layout = acting, layout


def _fold(jobs: Sequence[tuple[Stacked | IndexedStack, "_Weights"]]) -> None:
    folded = [part for factors, _ in jobs for part in factors.folded]
    plain = [part for factors, _ in jobs for part in factors.plain]
    fold(folded, plain, [weight for _, weights in jobs for weight in chain(*weights)])


class _Layout:
    """Which branch each row of a batch is of, on every device that asks."""

    def __init__(self, rows: tuple[int, ...], num_branches: int) -> None:
        self.length = len(rows)
        self._checked = rows_of(rows, num_branches, device=torch.device("cpu"))
        self._by_device: dict[torch.device, Rows] = {}

    def on(self, device: torch.device) -> Rows:
        if device not in self._by_device:
            index = self._checked.index.to(device)
            self._by_device[device] = Rows(index, self._checked.group)
        return self._by_device[device]


class _Layer:
    """The modules with one weight, usually one, and what acts on them.

    Attributes:
        acting: None for nothing.
        layout: None if it acts on all rows alike.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module]) -> None:
        self.acting: _Terms | None = None
        self.layout: _Layout | None = None
        self.name = name
        self.modules = modules
        self._shape = {_weight_shape(name, module) for module in modules}.pop()
        self._terms: dict[object, _Terms] = {}
        self._shadows: dict[nn.Module, Callable[..., Any]] = {}

    def terms(
        self, branches: Sequence[Sequence[tuple[Change, float]]], *, indexed: bool
    ) -> "tuple[_Terms | None, _Weights]":
        """Return the terms of the branches' changes, the same object for the same changes, and weights."""
        active = [[pair for pair in pairs if pair[1] != 0] for pairs in branches]
        weights = tuple(tuple(weight for _, weight in pairs) for pairs in active)
        if not any(weights):
            return None, weights
        if not all(map(math.isfinite, chain(*weights))):
            raise AdapterError(f"the weights of adapters must be finite numbers, got {weights}.")
        # Terms hold their changes, so that ids are theirs alone.
        key = indexed, tuple(tuple(id(change) for change, _ in pairs) for pairs in active)
        if key not in self._terms:
            changes = [[change for change, _ in pairs] for pairs in active]
            for change in chain(*changes):
                self._check(change)
            self._terms[key] = _Terms(changes, indexed=indexed)
        return self._terms[key], weights

    def is_attached(self, module: nn.Module) -> bool:
        """Return whether a module's forward comes to the shadow, through hooks that were put around it."""
        found: Callable[..., Any] | None = module.forward
        shadow = self._shadows.get(module)
        while found is not None and found is not shadow:
            found = getattr(found, "__wrapped__", None)
        return found is not None

    def attach(self, module: nn.Module) -> Callable[[], None]:
        """Shadow a module's forward; return what takes the shadow away."""
        before = module.__dict__.get("forward")
        base = module.forward

        def forward(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = base(input, *args, **kwargs)
            return output if self.acting is None else self._added(self.acting, input, output, module)

        def detach() -> None:
            if module.__dict__.get("forward") is not forward:
                # Others have wrapped or removed the shadow since. Without terms it only passes on.
                return
            del module.forward
            if before is not None:
                module.forward = before

        module.forward = self._shadows[module] = forward
        return detach

    def clear(self) -> None:
        """Let nothing act, and drop what was joined."""
        self.acting, self.layout = None, None
        self._terms.clear()
        self._shadows.clear()

    def _added(self, terms: "_Terms", x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if x.dtype is not y.dtype or x.device != y.device:
            x = x.to(device=y.device, dtype=y.dtype)
        factors = terms.on(y)
        options = _convolution(module)
        if self.layout is None:
            assert isinstance(factors, Stacked)
            if options is None:
                return lora_stacked(x, y, factors)
            return lora_stacked_conv(x, y, factors, **options)
        if len(x) != self.layout.length:
            raise AdapterError(
                f"the input of '{self.name}' has {len(x)} rows, apply_indexed() was told "
                f"{self.layout.length}. Name the branch of every row of the batch."
            )
        assert isinstance(factors, IndexedStack)
        rows = self.layout.on(y.device)
        if options is None:
            return lora_indexed(x, y, factors, rows)
        return lora_indexed_conv(x, y, factors, rows, **options)

    def _check(self, change: Change) -> None:
        if change.low_rank() is None:
            raise AdapterError(
                f"the change of '{self.name}' is of kind '{_kind(change)}', which has no low-rank form and "
                f"can only act in the weights. {_WAY_OUT}"
            )
        if tuple(change.shape) != self._shape:
            raise AdapterError(
                f"a change of '{self.name}' has shape {list(change.shape)}, the layer {list(self._shape)}. "
                "Load the adapter with base= so that it is checked and fitted."
            )


_Weights = tuple[tuple[float, ...], ...]


class _Terms:
    """Changes of one layer that act together: of one branch, or of each that rows may be of.

    Attributes:
        weights: Of the changes, branch by branch.
        factors: Joined, with the weights folded in, where and as the layer's outputs are; None before one.
    """

    def __init__(self, changes: Sequence[Sequence[Change]], *, indexed: bool) -> None:
        self.weights: _Weights = ()
        self.factors: Stacked | IndexedStack | None = None
        self._changes = changes
        self._indexed = indexed

    def on(self, y: Tensor) -> Stacked | IndexedStack:
        """Return the factors for a layer that gave this."""
        factors = self.factors
        if factors is None or factors.up.dtype is not y.dtype or factors.up.device != y.device:
            pairs = [[_factors(change) for change in part] for part in self._changes]
            # Kept for coming evaluations, whichever mode this one is in.
            with torch.inference_mode(False), torch.no_grad():
                if self._indexed:
                    factors = stack_indexed(pairs, self.weights, device=y.device, dtype=y.dtype)
                else:
                    factors = stack(pairs[0], self.weights[0], device=y.device, dtype=y.dtype)
            self.factors = factors
        return factors


def _factors(change: Change) -> tuple[Tensor, Tensor]:
    factors = change.low_rank()
    assert factors is not None
    return factors


def _kind(change: Change) -> str:
    return next((name for name in KINDS if isinstance(change, KINDS[name])), type(change).__name__)


def _convolution(module: nn.Module) -> dict[str, Any] | None:
    """Return how a convolution moves over its input, None for a linear layer."""
    if not isinstance(module, nn.Conv2d):
        return None
    names = ("stride", "padding", "dilation", "groups")
    return {name: getattr(module, name) for name in names}


def _weight_shape(name: str, module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight as the layer tells it: quantised ones are stored in another.

    Raises:
        AdapterError: If it is no layer with such a weight.
    """
    if name.endswith(".weight"):
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    raise AdapterError(
        f"'{name}' is not the weight of a linear layer or of a convolution padded with zeros, so a change of "
        f"it can only act in the weights. {_WAY_OUT}"
    )
