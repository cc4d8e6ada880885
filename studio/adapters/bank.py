"""Give parameters other values for a while, and their own back bit for bit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Change
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.parameters import find_parameter
from studio.errors import AdapterError
from studio.kernels.merge_bank import Delta, Sparse, merge_bank

Storage = Literal["auto", "device", "cpu"]
# Pristine copies stay on the GPU if after them this share of its memory is still free: a run needs it for
# activations.
_FREE_SHARE = 0.25


class WeightBank:
    """Pristine copies of some parameters, and effective weights formed from them.

    Weights are formed out of place from the pristine copies and then copied into the parameters' own memory,
    so pointers stay valid (compiled graphs, CUDA graphs). Adding and subtracting in place would drift; this
    cannot. Usable as a context manager, which restores the parameters also after an exception.

    Args:
        components: Modules by name, see ``components_of``.
        names: Canonical names of the parameters to keep.
        storage: Where the pristine copies lie: "device" beside the parameter, "cpu" (pinned when there is a
            GPU), or "auto", beside the parameter unless GPU memory is tight.

    Raises:
        AdapterError: If a parameter does not exist, is named twice, or has no memory of its own (offloaded to
            meta).
    """

    def __init__(
        self, components: Mapping[str, nn.Module], names: Iterable[str], *, storage: Storage = "auto"
    ) -> None:
        self._parameters = {name: find_parameter(components, name) for name in names}
        self._check_own_memory()
        self._pristine = {
            name: self._copy(parameter, storage) for name, parameter in self._parameters.items()
        }
        self._changed: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Canonical names of the parameters that the bank keeps."""
        return list(self._parameters)

    @property
    def nbytes(self) -> int:
        """Memory that the pristine copies take."""
        return sum(tensor.nbytes for tensor in self._pristine.values())

    @torch.no_grad()
    def apply(self, changes: Mapping[str, Sequence[tuple[Change, float]]]) -> None:
        """Set the named parameters to pristine plus the sum of ``weight * change``; all others back to
        pristine.

        A change with weight 0 does not touch its parameter. If anything fails, every parameter is restored
        first.

        Raises:
            AdapterError: If a parameter is not in the bank, a change does not fit it, or a weight is not
                finite.
        """
        if unknown := [name for name in changes if name not in self._parameters]:
            raise AdapterError(
                f"the bank does not keep '{unknown[0]}'. Make it with the names of all changes."
            )
        try:
            active = {name: [pair for pair in pairs if pair[1] != 0] for name, pairs in changes.items()}
            active = {name: pairs for name, pairs in active.items() if pairs}
            self._check_own_memory()
            for name in self._changed - active.keys():
                self._put_back(name)
            for name, pairs in active.items():
                # Entered first: a failure in the midst of writing must be restored too.
                self._changed.add(name)
                parameter = self._parameters[name].detach()
                parameter.copy_(self._effective(name, parameter, pairs))
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Put every parameter back to its pristine bits."""
        for name in list(self._changed):
            self._put_back(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _effective(self, name: str, parameter: Tensor, pairs: Sequence[tuple[Change, float]]) -> Tensor:
        # The parameter may have moved or changed its type since the bank was made.
        weight = self._pristine[name].to(device=parameter.device, dtype=parameter.dtype)
        deltas: list[Delta] = []
        scales: list[float] = []
        for change, strength in pairs:
            if not math.isfinite(strength):
                raise AdapterError(f"the weight of an adapter must be a finite number, got {strength}.")
            if tuple(change.shape) != tuple(weight.shape):
                sizes = f"{list(change.shape)}, the parameter {list(weight.shape)}"
                raise AdapterError(
                    f"a change of '{name}' has shape {sizes}. "
                    "Load the adapter with base= so that it is checked and fitted."
                )
            delta = _compact(change)
            deltas.append(change.delta(weight, weight=strength) if delta is None else delta)
            scales.append(1.0 if delta is None else strength)
        return merge_bank(weight, deltas, scales)

    def _put_back(self, name: str) -> None:
        self._parameters[name].detach().copy_(self._pristine[name])
        self._changed.discard(name)

    def _check_own_memory(self) -> None:
        seen: dict[int, str] = {}
        for name, parameter in self._parameters.items():
            if parameter.device.type == "meta":
                raise AdapterError(
                    f"'{name}' is offloaded layer by layer and has no memory to write to. "
                    "Use enable_model_cpu_offload() instead of sequential or group offload."
                )
            if (other := seen.setdefault(id(parameter), name)) != name:
                raise AdapterError(f"'{name}' and '{other}' are one parameter. Name it once.")

    def _copy(self, parameter: nn.Parameter, storage: Storage) -> Tensor:
        value = parameter.detach()
        if value.device.type != "cuda" or storage == "device":
            # "cpu" and an accelerator without pinned memory: a plain copy on the wanted side.
            return value.to("cpu" if storage == "cpu" else value.device, copy=True)
        if storage == "auto":
            free, total = torch.cuda.mem_get_info(value.device)
            if free - value.nbytes > _FREE_SHARE * total:
                return value.clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value)


def _compact(change: Change) -> Delta | None:
    """Return a change that is linear in its weight in a form smaller than its parameter, or None."""
    if isinstance(change, SparseChange):
        return Sparse(change.indices, change.values)
    return change.low_rank()
