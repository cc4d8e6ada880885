"""A plan laid out along its steps: which adapter acts when and where, and what each step costs."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from studio.composition.cost import plan_passes
from studio.composition.executor import Passes
from studio.composition.plan import Branch, Plan, Rows, Step

_PER_LINE = 15
_ROWS: tuple[Rows, Rows] = ("conditional", "unconditional")


@dataclass(frozen=True)
class Lane:
    """An adapter's weight along the run: mean of the layers, sum over the branches.

    Attributes:
        name: The adapter's.
        conditional: Weight at each step in the rows of the prompt.
        unconditional: The same in the rows of the negative prompt; None at steps without guidance.
        regions: Names of the regions that it is limited to.
    """

    name: str
    conditional: tuple[float, ...]
    unconditional: tuple[float | None, ...]
    regions: tuple[str, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether it acts in the same way in both rows, wherever there are both."""
        pairs = zip(self.conditional, self.unconditional, strict=True)
        return all(other is None or other == one for one, other in pairs)


@dataclass(frozen=True)
class LayerLane:
    """What acts on a layer along the run.

    Attributes:
        name: The layer's, a dotted prefix of canonical parameter names.
        weights: Weight at each step in the rows of the prompt, for each adapter that layers tell apart.
    """

    name: str
    weights: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Timeline:
    """A plan along its steps.

    Attributes:
        total: Number of steps.
        lanes: One for each adapter.
        passes: What the denoiser evaluates in each step for one picture with guidance, in rows.
        layers: In the order in which the denoiser computes them; empty where no weight depends on the layer.
    """

    total: int
    lanes: tuple[Lane, ...]
    passes: tuple[Passes, ...]
    layers: tuple[LayerLane, ...]

    @property
    def relative_cost(self) -> float:
        """Rows evaluated, whole or not, as a multiple of what the base with guidance evaluates."""
        evaluated = sum(each.full + each.shallow for each in self.passes)
        return evaluated / sum(each.asked for each in self.passes)

    @property
    def cached(self) -> float:
        """Share of the rows that take their deep features from an earlier step."""
        shallow = sum(each.shallow for each in self.passes)
        return shallow / sum(each.full + each.shallow for each in self.passes)

    def lines(self) -> list[str]:
        """Return the table adapter x step, some steps below the others, and what the run costs."""
        rows = [(lane.name, [f"{weight:.2f}" for weight in lane.conditional]) for lane in self.lanes]
        rows += [
            (
                f"{lane.name}, unconditional",
                ["-" if value is None else f"{value:.2f}" for value in lane.unconditional],
            )
            for lane in self.lanes
            if not lane.alike
        ]
        rows.append(("rows", [str(each.full + each.shallow) for each in self.passes]))
        if any(each.shallow for each in self.passes):
            rows.append(("of them cached", [str(each.shallow) for each in self.passes]))
        width = max(len("step"), *(len(title) for title, _ in rows))
        lines: list[str] = []
        for start in range(0, self.total, _PER_LINE):
            steps = range(start, min(start + _PER_LINE, self.total))
            lines.append(f"{'step':<{width}}" + "".join(f"{step + 1:>7}" for step in steps))
            lines += [
                f"{title:<{width}}" + "".join(f"{cells[step]:>7}" for step in steps) for title, cells in rows
            ]
            lines.append("")
        shallow = f", {self.cached:.0%} of it with cached deep features" if self.cached else ""
        return [*lines, f"evaluations: {self.relative_cost:.2f} x the base's{shallow}"]


def timeline(plan: Plan, total: int) -> Timeline:
    """Return a plan along a full run of ``total`` steps.

    Raises:
        CompositionError: If such a run cannot do what the plan is for.
    """
    plan.check(total)
    steps = [tuple(plan.at(Step(index, total, index / total))) for index in range(total)]
    names = list(plan.adapters)
    # An adapter that no row of the prompt meets has no row in the plan's own table.
    names += [
        name
        for branches in steps
        for branch in branches
        for name, weight in branch.weights.items()
        if name not in plan.adapters and weight
    ]
    names = list(dict.fromkeys(names))
    return Timeline(
        total,
        tuple(_lane(name, steps) for name in names),
        tuple(plan_passes(plan, total)),
        _layers(steps),
    )


def mean_weight(name: str, branches: Sequence[Branch], rows: Rows) -> float | None:
    """Return an adapter's weight in a step, or None if no branch answers for these rows."""
    acting = [branch for branch in branches if branch.answers_for(rows)]
    return sum(branch.share * branch.mean_weight(name) for branch in acting) if acting else None


def _lane(name: str, steps: Sequence[Sequence[Branch]]) -> Lane:
    conditional, unconditional = (
        tuple(mean_weight(name, branches, rows) for branches in steps) for rows in _ROWS
    )
    regions = dict.fromkeys(
        branch.region
        for branches in steps
        for branch in branches
        if branch.region is not None and branch.weights.get(name)
    )
    return Lane(name, tuple(weight or 0.0 for weight in conditional), unconditional, tuple(regions))


def _layers(steps: Sequence[Sequence[Branch]]) -> tuple[LayerLane, ...]:
    # Plans name layers or their parameters; one adapter's may be named this way and another's that way.
    layers: dict[str, dict[str, str]] = {}
    for branches in steps:
        for branch in branches:
            for name, weight in branch.weights.items():
                if isinstance(weight, Mapping):
                    own = layers.setdefault(name, {})
                    for layer in weight:
                        own.setdefault(layer.removesuffix(".bias").removesuffix(".weight"), layer)
    known: dict[Hashable, dict[str, dict[str, float]]] = {}
    columns: list[dict[str, dict[str, float]]] = []
    for branches in steps:
        acting = [branch for branch in branches if branch.answers_for("conditional")]
        key = tuple((branch.share, branch.weighting) for branch in acting)
        if key not in known:
            known[key] = {name: _by_layer(name, acting, own.values()) for name, own in layers.items()}
        columns.append(known[key])
    every = {layer for own in layers.values() for layer in own}
    return tuple(
        LayerLane(
            layer,
            {
                name: tuple(column[name][own[layer]] for column in columns)
                for name, own in layers.items()
                if layer in own
            },
        )
        for layer in sorted(every, key=_place)
    )


def _by_layer(name: str, acting: Sequence[Branch], layers: Collection[str]) -> dict[str, float]:
    """Return an adapter's weight on each of its layers."""
    totals = dict.fromkeys(layers, 0.0)
    for branch in acting:
        weight = branch.weights.get(name, 0.0)
        for layer in layers:
            if not isinstance(weight, Mapping):
                totals[layer] += branch.share * weight
            else:
                own = weight[layer] if layer in weight else branch.weight(name, layer)
                totals[layer] += branch.share * own
    return totals


def _place(layer: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Return a key that sorts layers as the denoiser computes them; numbers in names count as numbers."""
    _, _, path = layer.partition(".")
    stage = path.partition(".")[0]
    order = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3}
    last = 4 if stage in ("conv_norm_out", "conv_out") else 0
    parts: list[tuple[int, int | str]] = [
        (0, int(part)) if part.isdigit() else (1, part) for part in path.split(".")
    ]
    return order.get(stage, last), parts
