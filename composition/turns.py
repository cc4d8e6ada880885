"""Plans of turns: one adapter acts at a time, and the next one takes over along the steps."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from studio.composition.plan import Branch, Plan, Step

SolverHistory = Literal["keep", "drop"]
SOLVER_HISTORY = (
    "What multistep solvers (dpm++2m, unipc, pndm) do at a change of adapters with the answers of the one "
    "before: keep combines them, drop takes a step of first order."
)
"""Description of the option."""


@dataclass(frozen=True)
class TurnsPlan(Plan):
    """One adapter at each step.

    Attributes:
        weights: By adapter.
        solver_history: Whether the solver still combines what the adapter before answered ("keep") or starts
            anew with each turn ("drop").
    """

    weights: Mapping[str, float]
    solver_history: SolverHistory

    @abstractmethod
    def active(self, step: Step) -> str:
        """Return the adapter that acts at a step."""

    def idle(self, total: int) -> list[str]:
        """Return the adapters that have no turn in a run of ``total`` steps."""
        acting = {self.active(Step(index, total, index / total)) for index in range(total)}
        return [name for name in self.adapters if name not in acting]

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the one branch, in which one adapter acts."""
        name = self.active(step)
        return (Branch({name: self.weights[name]}),)

    def restarts(self, step: Step) -> bool:
        """Return whether the solver starts anew: at the first step of a turn, if history is dropped."""
        if self.solver_history == "keep" or step.index == 0:
            return False
        return self.active(step) != self.active(replace(step, index=step.index - 1))
