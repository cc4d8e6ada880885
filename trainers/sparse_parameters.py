"""Chosen entries of a network's own weights, trained in place as one vector and undone bit for bit.

The weights themselves stand in the forward pass, so it is exactly the base's. In the backward pass autograd
forms each weight's dense gradient; as soon as it is complete its chosen entries are added to the vector's
gradient and the rest is freed. That works with any number of backward passes and with checkpointing, and no
two dense gradients outlive each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapters.kinds.sparse import SparseChange
from studio.kernels.sparse_adamw import SparsePlan, gather, scatter_
from studio.trainers.selection import Selection


@dataclass
class _Part:
    """One weight and what undoing and exporting need to know of its chosen entries; all on the CPU.

    Attributes:
        name: Canonical name of the weight.
        weight: The network's own parameter.
        indices: Positions ``[n]`` int32 of all entries that were ever chosen.
        original: Their values in the base ``[n]``, in the weight's type.
        bound: Of the selection.
        remaining: Which of them are still trained, boolean ``[n]``; None for all.
        frozen: The values of all when the others were left, fp32 ``[n]``; None while all are trained.
    """

    name: str
    weight: nn.Parameter
    indices: Tensor
    original: Tensor
    bound: float
    remaining: Tensor | None = None
    frozen: Tensor | None = None

    def write(self, values: Tensor) -> None:
        """Write values over all entries that were ever chosen, ``[n]`` of any floating type."""
        device = self.weight.device
        scatter_(self.weight, self.indices.to(device), values.to(device))


class SparseParameters:
    """Chosen entries of one component's weights as one trainable fp32 vector, weight after weight.

    Nothing is changed before ``attach``. The vector is the master copy: where the weights have 16 bits they
    are rounded from it. On the device there are, per chosen entry, its value, its gradient and its index.

    Args:
        component: ``unet``, ``text_encoder`` or ``text_encoder_2``.
        parameters: Its parameters by canonical name, frozen.
        selection: Which entries are trained.

    Attributes:
        component: As given.
        values: The vector ``[N]``; its gradient is filled by backward passes.
        plan: The weights and the positions of the entries.
    """

    def __init__(self, component: str, parameters: Mapping[str, nn.Parameter], selection: Selection) -> None:
        self.component = component
        self._selection = selection
        self._parts: list[_Part] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        indices: list[Tensor] = []
        values: list[Tensor] = []
        for name, weight in parameters.items():
            chosen = selection.choose(weight, name=name)
            if not chosen.indices.numel():
                continue
            entries = weight.detach().flatten()[chosen.indices]
            self._parts.append(_Part(name, weight, chosen.indices.cpu(), entries.cpu(), chosen.bound))
            indices.append(chosen.indices)
            values.append(entries.float())
        self.values = nn.Parameter(torch.cat(values) if values else torch.empty(0))
        self.plan = SparsePlan([part.weight for part in self._parts], indices)

    @property
    def names(self) -> list[str]:
        """Canonical names of the weights of which an entry was chosen, in the order of the vector."""
        return [part.name for part in self._parts]

    @property
    def aside(self) -> list[Tensor]:
        """Where the entries are, on the device and on the CPU, and what they were in the base."""
        undo = (value for part in self._parts for value in (part.indices, part.original))
        return [*self.plan.indices, *undo]

    def attach(self) -> None:
        """Have the backward passes fill the vector's gradient."""
        for number, part in enumerate(self._parts):
            if self.plan.indices[number].numel():
                part.weight.requires_grad_(True)
                self._hooks.append(part.weight.register_post_accumulate_grad_hook(self._collector(number)))

    def narrow(self) -> int:
        """Train on only with the entries that the selection would choose still; return how many these are.

        The others stay in the weights as they are now. The vector and its gradient become shorter.
        Progressive parameter adjustment, arXiv:2409.06633, Sec. 3.4.
        """
        vector, grad = self.values.detach(), self.values.grad
        keep = torch.cat(
            [
                self._selection.holds(vector[segment], part.bound)
                for part, segment in zip(self._parts, self.plan.segments, strict=True)
            ]
        )
        for number, part in enumerate(self._parts):
            part.frozen = self.latest(number)
            kept = keep[self.plan.segments[number]].cpu()
            if part.remaining is None:
                part.remaining = kept
            else:
                part.remaining = part.remaining.masked_scatter(part.remaining, kept)
        indices = [
            positions[keep[segment]]
            for positions, segment in zip(self.plan.indices, self.plan.segments, strict=True)
        ]
        self._resize(vector[keep], grad if grad is None else grad[keep], indices)
        return self.values.numel()

    def state(self) -> dict[str, Tensor]:
        """Return what is left of the selection and where the others were left; empty before ``narrow``."""
        remaining = [part.remaining for part in self._parts if part.remaining is not None]
        frozen = [part.frozen for part in self._parts if part.frozen is not None]
        return {"remaining": torch.cat(remaining), "frozen": torch.cat(frozen)} if remaining else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Narrow the selection to what it was when ``state`` was asked for; values are set afterwards."""
        if not state:
            return
        lengths = [part.indices.numel() for part in self._parts]
        device = self.values.device
        for part, remaining, frozen in zip(
            self._parts, state["remaining"].split(lengths), state["frozen"].split(lengths), strict=True
        ):
            part.remaining, part.frozen = remaining.clone(), frozen.clone()
        self._resize(
            self.values.detach()[state["remaining"].to(device)],
            None,
            [part.indices[part.remaining].to(device) for part in self._parts],
        )

    def _resize(self, values: Tensor, grad: Tensor | None, indices: Sequence[Tensor]) -> None:
        # A gradient must have its parameter's length at every moment.
        self.values.grad = None
        self.values.data = values
        self.values.grad = grad
        self.plan = SparsePlan(self.plan.weights, list(indices))
        self._detach()
        self.attach()

    def latest(self, number: int) -> Tensor:
        """Return the values of all entries of one weight that were ever chosen, fp32 on the CPU, a copy."""
        part = self._parts[number]
        values = self.values.detach()[self.plan.segments[number]]
        if part.remaining is None or part.frozen is None:
            return values.to("cpu", copy=True)
        return part.frozen.masked_scatter(part.remaining, values.cpu())

    @torch.no_grad()
    def write_trained(self) -> None:
        """Write the values into the weights after a step: those that are no longer trained stand there."""
        for weight, positions, segment in zip(
            self.plan.weights, self.plan.indices, self.plan.segments, strict=True
        ):
            scatter_(weight, positions, self.values[segment])

    def write(self) -> None:
        """Write the values into the weights, for when they were changed by other than the optimizer."""
        for number, part in enumerate(self._parts):
            part.write(self.latest(number))

    def settle(self) -> None:
        """Round the values to what a difference to the base can express, and write them.

        Adding the fp32 difference to the base's value misses the trained value by a rounding where the two
        are of different size. Afterwards the exported change gives exactly the weights that stand here.
        """
        for number, part in enumerate(self._parts):
            original = part.original.float()
            settled = original + (self.latest(number) - original)
            trained = settled if part.remaining is None else settled[part.remaining]
            self.values.detach()[self.plan.segments[number]] = trained.to(self.values.device)
            part.frozen = None if part.frozen is None else settled
        self.write()

    def export(self) -> dict[str, SparseChange]:
        """Return the changes by canonical name, fp32 on the CPU."""
        return {
            part.name: SparseChange(
                part.indices, self.latest(number) - part.original.float(), tuple(part.weight.shape)
            )
            for number, part in enumerate(self._parts)
        }

    def matrix(self, number: int, *, of: str) -> Tensor:
        """Return one weight's entries as a matrix ``[out, in...]`` among zeros, fp32 on the device.

        Args:
            number: Of the weight.
            of: ``parameter`` for the trained values, ``delta`` for the change of all that were chosen.
        """
        part, positions = self._parts[number], self.plan.indices[number]
        dense = torch.zeros(part.weight.shape, device=self.values.device)
        if of == "parameter":
            scatter_(dense, positions, self.values.detach()[self.plan.segments[number]])
        else:
            change = (self.latest(number) - part.original.float()).to(dense.device)
            scatter_(dense, part.indices.to(dense.device), change)
        return dense.flatten(1)

    def add_gradient(self, number: int, dense: Tensor) -> None:
        """Add the trained entries of one weight's dense gradient, perhaps flattened, to the gradient."""
        gather(
            dense.reshape(self._parts[number].weight.shape),
            self.plan.indices[number],
            out=self._gradient()[self.plan.segments[number]],
            accumulate=True,
        )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the weights the base's values for the length of a block."""
        self._detach()
        self._undo()
        try:
            yield
        finally:
            self.write()
            self.attach()

    def release(self) -> None:
        """Give the weights the base's values bit for bit and stop listening to their gradients."""
        self._detach()
        self._undo()

    def _undo(self) -> None:
        for part in self._parts:
            part.write(part.original)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for part in self._parts:
            part.weight.grad = None
            part.weight.requires_grad_(False)

    def _gradient(self) -> Tensor:
        if self.values.grad is None:
            self.values.grad = torch.zeros_like(self.values)
        return self.values.grad

    def _collector(self, number: int) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            dense, weight.grad = weight.grad, None
            assert dense is not None
            self.add_gradient(number, dense)

        return collect
