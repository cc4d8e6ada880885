"""Give parameters other values for a while, and their own back bit for bit."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Literal, Self

import torch
from torch import nn

from studio.adapters.kept import Copied, Form, Kept, Storage, Swapped, Weighted
from studio.adapters.parameters import find_parameter
from studio.adapters.resident import Resident, spare_memory
from studio.errors import AdapterError

Way = Literal["swap", "copy", "form"]
# Hooks of diffusers that replace parameters' data.
_MOVERS = ("group_offloading", "layerwise_casting")


class Recipe:
    """A weighting that a bank has checked; cheap to apply many times. Made by ``WeightBank.recipe``."""

    def __init__(self, bank: "WeightBank", forms: Mapping[Kept, Form]) -> None:
        self.bank = bank
        self.forms = forms


class WeightBank:
    """Effective weights for some parameters, formed from pristine ones and kept for a next time.

    Weights are formed out of place from the pristine ones: adding and subtracting in place would drift, this
    cannot. Usable as a context manager, which restores the parameters also after an exception. There are
    three ways to give a parameter its effective weight, which leave the same bits:

    - "swap": it points to the kept weight. Its own memory is what is pristine, and comes back.
    - "copy": the kept weight is copied into its own memory, so pointers stay valid (compiled and CUDA graphs)
      and others may move it between devices.
    - "form": nothing is kept; each weight is formed anew, into its own memory.

    Args:
        components: Modules by name, see ``components_of``, with torch.compile's wrapper if they have it.
        names: Canonical names of the parameters to keep.
        way: "auto" chooses for each component: "form" where the budget cannot hold all its parameters once,
            else "copy" where it is compiled or something else moves it, else "swap".
        budget: Bytes that kept weights may take, shared among the components by size; the least recently used
            go first. By default what leaves a quarter of each device's memory free.
        storage: Where the pristine copies of "copy" and "form" lie: "device" beside the parameter, "cpu"
            (pinned when there is a GPU), or "auto", beside the parameter unless GPU memory is tight.

    Raises:
        AdapterError: If a parameter does not exist, is named twice, or has no memory of its own (offloaded to
            meta), or the budget is too small for way "swap".
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        names: Iterable[str],
        *,
        way: Way | Literal["auto"] = "auto",
        budget: int | None = None,
        storage: Storage = "auto",
    ) -> None:
        parameters = {name: find_parameter(components, name) for name in names}
        _check_apart(parameters)
        sizes = _sizes(parameters)
        fixed = {component: _keeps_addresses(components[component]) for component in sizes}
        if budget is None:
            budgets = _spare(parameters, fixed)
        else:
            whole = sum(sizes.values()) or 1
            budgets = {component: budget * size // whole for component, size in sizes.items()}
        self._residents = {component: Resident(budgets[component]) for component in sizes}
        self.ways: dict[str, Way] = {
            component: "form" if budgets[component] < size else "copy" if fixed[component] else "swap"
            for component, size in sizes.items()
        }
        if way != "auto":
            if way == "swap" and "form" in self.ways.values():
                raise AdapterError(
                    f"way 'swap' needs {sum(sizes.values())} bytes for weights of its own, got "
                    f"{self.budget}. Raise the budget or choose another way."
                )
            self.ways = dict.fromkeys(sizes, way)
        self._kept: dict[str, Kept] = {}
        for name, parameter in parameters.items():
            component = _component(name)
            resident = self._residents[component]
            if self.ways[component] == "swap":
                self._kept[name] = Swapped(name, parameter, resident)
            else:
                keep = resident if self.ways[component] == "copy" else None
                self._kept[name] = Copied(name, parameter, keep, storage)

    @property
    def names(self) -> list[str]:
        """Canonical names of the parameters that the bank keeps."""
        return list(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory that copies of the pristine weights take."""
        return sum(kept.pristine.nbytes for kept in self._kept.values() if isinstance(kept, Copied))

    @property
    def budget(self) -> int:
        """Bytes that kept effective weights may take."""
        return sum(resident.budget for resident in self._residents.values())

    @property
    def resident_nbytes(self) -> int:
        """Bytes that kept effective weights take."""
        return sum(resident.nbytes for resident in self._residents.values())

    def recipe(self, changes: Mapping[str, Weighted]) -> Recipe:
        """Return a weighting to apply: pristine plus the sum of ``weight * change`` for each named parameter.

        A change with weight 0 does not touch its parameter, nor does the weighting a parameter that it does
        not name.

        Raises:
            AdapterError: If a parameter is not in the bank, a change does not fit it, or a weight is not
                finite.
        """
        forms: dict[Kept, Form] = {}
        for name, pairs in changes.items():
            kept = self._kept.get(name)
            if kept is None:
                raise AdapterError(f"the bank does not keep '{name}'. Make it with the names of all changes.")
            if pairs := [pair for pair in pairs if pair[1] != 0]:
                forms[kept] = kept.form(pairs)
        return Recipe(self, forms)

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, weighting: Recipe | Mapping[str, Weighted]) -> None:
        """Give the parameters a weighting; those that it does not name, or with weight 0, become pristine.

        Parameters that have it already are not touched. If anything fails, every parameter is restored first.

        Raises:
            AdapterError: As for ``recipe``.
            ValueError: If the recipe is of another bank.
        """
        try:
            recipe = weighting if isinstance(weighting, Recipe) else self.recipe(weighting)
            if recipe.bank is not self:
                raise ValueError("the recipe was made by another bank. Make it with this one.")
            for kept in self._kept.values():
                if kept.acting is not None and kept not in recipe.forms:
                    kept.restore()
            # What is kept is used before room is made for what is not.
            for kept, form in [item for item in recipe.forms.items() if not item[0].show(item[1])]:
                kept.make(form)
        except BaseException:
            self.restore()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Put every parameter back to its pristine bits."""
        for kept in self._kept.values():
            kept.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _component(name: str) -> str:
    return name.partition(".")[0]


def _sizes(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return how many bytes the parameters of each component take."""
    sizes: dict[str, int] = {}
    for name, parameter in parameters.items():
        sizes[_component(name)] = sizes.get(_component(name), 0) + parameter.nbytes
    return sizes


def _spare(parameters: Mapping[str, nn.Parameter], fixed: Mapping[str, bool]) -> dict[str, int]:
    """Return each component's part of its device's spare memory, what pristine copies take taken off."""
    sizes = _sizes(parameters)
    devices = {_component(name): parameter.device for name, parameter in parameters.items()}
    spare = {device: spare_memory(device) for device in set(devices.values())}
    for component, device in devices.items():
        spare[device] -= sizes[component] if fixed[component] else 0
    whole = {device: sum(sizes[part] for part in sizes if devices[part] == device) for device in spare}
    return {part: max(0, spare[devices[part]]) * sizes[part] // (whole[devices[part]] or 1) for part in sizes}


def _keeps_addresses(module: nn.Module) -> bool:
    """Say whether something relies on where parameters lie, or gives them other memory itself."""
    parts = [module]
    while parts:
        part = parts.pop()
        # Of modules' own attributes: those that are missing are looked for in vain for long elsewhere.
        own = vars(part)
        hooks = getattr(own.get("_diffusers_hook"), "hooks", ())
        # Compiled as a whole or in place; offloaded by accelerate; offloaded or cast by diffusers.
        if "_orig_mod" in part._modules or own.get("_compiled_call_impl") or "_hf_hook" in own:
            return True
        if any(name in _MOVERS for name in hooks):
            return True
        # Not by truth: a compiled module without a length has none.
        parts += [child for child in part._modules.values() if child is not None]
    return False


def _check_apart(parameters: Mapping[str, nn.Parameter]) -> None:
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise AdapterError(
                f"'{name}' is offloaded layer by layer and has no memory to write to. "
                "Use enable_model_cpu_offload() instead of sequential or group offload."
            )
        if (other := seen.setdefault(id(parameter), name)) != name:
            raise AdapterError(f"'{name}' and '{other}' are one parameter. Name it once.")
