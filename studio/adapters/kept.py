"""One parameter of a weight bank: what is its own, what it has now, and how it is given another weight."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Change
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.resident import Keepable, Resident, spare_memory
from studio.errors import AdapterError
from studio.kernels.merge_bank import Delta, Sparse, merged

Storage = Literal["auto", "device", "cpu"]
Weighted = Sequence[tuple[Change, float]]
# What each change is, and how strong.
_Key = tuple[tuple[int, float], ...]


class Form(Keepable):
    """One weighting of one parameter, and the effective weight where that is kept."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: Weighted) -> None:
        super().__init__()
        self.pairs = pairs


class Kept(ABC):
    """One parameter of a bank.

    Attributes:
        pristine: Its own weight.
        acting: The weighting that it has now.
    """

    def __init__(self, name: str, parameter: nn.Parameter, pristine: Tensor) -> None:
        self.name = name
        self.pristine = pristine
        self.acting: Form | None = None
        self._parameter = parameter
        # As long as something holds a form its changes live too, so that their ids are theirs alone.
        self._forms: WeakValueDictionary[_Key, Form] = WeakValueDictionary()

    def form(self, pairs: Weighted) -> Form:
        """Return the form of a weighting, the same object for the same changes and weights."""
        key = tuple([(id(change), weight) for change, weight in pairs])
        found = self._forms.get(key)
        if found is None:
            self._check(pairs)
            found = self._forms[key] = Form(tuple(pairs))
        return found

    @abstractmethod
    def show(self, form: Form) -> bool:
        """Give the parameter a weighting that it has or that is kept; say whether that could be done."""

    @abstractmethod
    def make(self, form: Form) -> None:
        """Form the effective weight, give it to the parameter, and keep it where there is room."""

    @abstractmethod
    def restore(self) -> None:
        """Put the parameter back to its pristine bits."""

    def _check(self, pairs: Weighted) -> None:
        for change, weight in pairs:
            if not math.isfinite(weight):
                raise AdapterError(f"the weight of an adapter must be a finite number, got {weight}.")
            if tuple(change.shape) != tuple(self.pristine.shape):
                sizes = f"{list(change.shape)}, the parameter {list(self.pristine.shape)}"
                raise AdapterError(
                    f"a change of '{self.name}' has shape {sizes}. "
                    "Load the adapter with base= so that it is checked and fitted."
                )

    def _forget_all(self, resident: Resident | None) -> None:
        for form in list(self._forms.values()):
            if resident is not None and form.tensor is not None:
                resident.forget(form)


class Swapped(Kept):
    """A parameter that points to its effective weight; the pristine one is its own memory."""

    def __init__(self, name: str, parameter: nn.Parameter, resident: Resident) -> None:
        super().__init__(name, parameter, parameter.detach())
        self._resident = resident
        self._address = parameter.data_ptr()

    def show(self, form: Form) -> bool:
        self._follow()
        if self.acting is form:
            return True
        if form.tensor is None:
            return False
        self._return()
        self._resident.lend(form)
        self.acting = form
        self._point(form.tensor)
        return True

    def make(self, form: Form) -> None:
        # What it shows now may have to make room.
        self.restore()
        memory = self._resident.room_for(self.pristine)
        # The budget holds all parameters of the component once, and only others' are in use.
        assert memory is not None
        self._resident.add(form, _effective(self.pristine, form.pairs, out=memory))
        self.show(form)

    def restore(self) -> None:
        self._follow()
        if self.acting is not None:
            self._point(self.pristine)
            self._return()

    def _point(self, tensor: Tensor) -> None:
        self._parameter.data = tensor
        self._address = tensor.data_ptr()

    def _return(self) -> None:
        if self.acting is not None:
            self._resident.returned(self.acting)
            self.acting = None

    def _follow(self) -> None:
        """Where the module was moved or cast, do so with the pristine weight; the kept ones are of no use."""
        if self._parameter.data_ptr() == self._address:
            return
        moved = self._parameter.detach()
        if self.acting is None:
            self.pristine = moved
        else:
            self.pristine = torch.empty_like(moved).copy_(self.pristine)
            self._return()
        self._forget_all(self._resident)
        self._point(self.pristine)


class Copied(Kept):
    """A parameter whose memory stays its own: effective weights are copied or formed into it."""

    def __init__(
        self, name: str, parameter: nn.Parameter, resident: Resident | None, storage: Storage
    ) -> None:
        super().__init__(name, parameter, _copy(parameter, storage))
        self._resident = resident
        self._dtype = parameter.dtype
        # Weights are kept where the parameter rests, also while an offloading hook has it elsewhere.
        self._home = parameter.device

    def show(self, form: Form) -> bool:
        self._follow()
        if self.acting is form:
            return True
        if self._resident is None or form.tensor is None:
            return False
        self.acting = form
        self._resident.used(form)
        # Out of the host's memory the copy need not be waited for.
        self._parameter.copy_(form.tensor, non_blocking=form.tensor.is_cpu)
        return True

    def make(self, form: Form) -> None:
        # Noted first: a failure in the midst of writing must be restored too.
        self.acting = form
        weight = self.pristine.to(device=self._parameter.device, dtype=self._dtype)
        room = None if self._resident is None else self._resident.room_for(self._parameter)
        if self._resident is None or room is None:
            _effective(weight, form.pairs, out=self._parameter)
            return
        self._parameter.copy_(_effective(weight, form.pairs, out=room))
        self._resident.add(form, room if room.device == self._home else _on_host(room))

    def restore(self) -> None:
        if self.acting is not None:
            self._parameter.copy_(self.pristine)
            self.acting = None

    def _follow(self) -> None:
        """Where the module was cast, what is kept would be rounded a second time: forget it."""
        if self._parameter.dtype == self._dtype:
            return
        self.restore()
        self._forget_all(self._resident)
        self._dtype = self._parameter.dtype


def _effective(weight: Tensor, pairs: Weighted, *, out: Tensor) -> Tensor:
    deltas: list[Delta] = []
    scales: list[float] = []
    for change, strength in pairs:
        delta = _compact(change)
        deltas.append(change.delta(weight, weight=strength) if delta is None else delta)
        scales.append(1.0 if delta is None else strength)
    return merged(weight, deltas, scales, out=out)


def _compact(change: Change) -> Delta | None:
    """Return a change that is linear in its weight in a form smaller than its parameter, or None."""
    if isinstance(change, SparseChange):
        return Sparse(change.indices, change.values)
    return change.low_rank()


def _copy(parameter: nn.Parameter, storage: Storage) -> Tensor:
    value = parameter.detach()
    if value.device.type != "cuda" or storage == "device":
        # "cpu" and an accelerator without pinned memory: a plain copy on the wanted side.
        return value.to("cpu" if storage == "cpu" else value.device, copy=True)
    if storage == "auto" and spare_memory(value.device) > value.nbytes:
        return value.clone()
    return _on_host(value)


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
