"""Blocks: weights that differ from block to block and from layer to layer."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from studio.composition.block_names import BASE, block_label, listed, numbered_blocks
from studio.composition.plan import BaseInfo, Modifier, Plan, Request, covers, layers_over
from studio.composition.policies import known
from studio.composition.shaped import Curve, ShapedPlan, curve_text, read_curve
from studio.errors import CompositionError
from studio.registry import MODIFIERS, nearest
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter

BlockWeights = tuple[float, ...] | Mapping[str, Curve]
"""The values of the web UI's list, or curves by block."""


def read_blocks(given: Any) -> BlockWeights:
    """Return block weights from a list of values, a table, or text of either: ``"1,0,0.5"``, ``"IN04:0.5"``.

    Raises:
        ValueError: If it is none; the text says why.
    """
    if isinstance(given, str):
        items = [item.strip() for item in given.split(",") if item.strip()]
        given = dict(item.split(":", 1) for item in items) if all(":" in item for item in items) else items
    if isinstance(given, Mapping):
        return {str(block): read_curve(curve) for block, curve in given.items()}
    if not isinstance(given, (list, tuple)):
        raise ValueError("block weights are a list of values or a table from block to weight")
    values = tuple(read_curve(value) for value in given)
    if not all(isinstance(value, float) for value in values):
        raise ValueError("values of a list are numbers; name the blocks to give them curves")
    return tuple(value for value in values if isinstance(value, float))


def blocks_text(given: BlockWeights) -> str:
    """Return block weights as the text that :func:`read_blocks` reads them from."""
    if isinstance(given, Mapping):
        return ", ".join(f"{block}:{curve_text(curve)}" for block, curve in given.items())
    return ", ".join(map(str, given))


_Given = Annotated[Any, BeforeValidator(read_blocks), PlainSerializer(blocks_text)]


@MODIFIERS.register("blocks")
class Blocks(Modifier):
    """Multiply adapters' weights by one for each block or layer, convolutions included, under any method.

    Blocks that are not named keep the adapter's weight. A list in the web UI's order names all blocks of the
    UNet: those without a value get 0, what is in no block keeps the adapter's weight. Adapters that a method
    makes one of have these weights before it does.
    """

    # After pinned adapters have joined.
    outermost = 2

    class Options(MethodOptions):
        """Options of block weights."""

        weights: Mapping[str, _Given] = Field(
            description="By adapter: weights or curves by block ('up_blocks.1', 'mid_block.resnets.0.conv1', "
            "'IN04', 'BASE' for the text encoders), or the web UI's list of values."
        )

    def factors(
        self, adapters: "Mapping[str, Adapter]", base: BaseInfo | None = None
    ) -> Mapping[str, Mapping[str, Curve]]:
        """Return the weights by parameter, those of the text encoders included."""
        found: dict[str, Mapping[str, Curve]] = {}
        for name, given in self.options.weights.items():
            if name in adapters:
                spoken, shape = _shape(name, given, adapters[name], base)
                found[name] = {
                    parameter: shape.get(parameter, spoken) for parameter in adapters[name].changes
                }
        return found

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with these weights by block.

        Raises:
            CompositionError: If weights are for an adapter that is not there, for a block that it does not
                change, of another number than the base has blocks, or the text encoders', which run once,
                change over the steps.
        """
        given: Mapping[str, BlockWeights] = self.options.weights
        known("blocks", list(given), list(adapters))
        spoken, shapes = {}, {}
        for name, blocks in given.items():
            spoken[name], shapes[name] = _shape(name, blocks, adapters[name], base)
        return ShapedPlan.around(
            plan,
            shapes=shapes,
            text_weights=_times(plan.text_weights, spoken),
            texts={
                name: replace(text, weights=_times(text.weights, spoken)) for name, text in plan.texts.items()
            },
        )


def _times(weights: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    return {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}


def _shape(
    name: str, given: BlockWeights, adapter: "Adapter", base: BaseInfo | None
) -> tuple[float, dict[str, Curve]]:
    """Return the factor of the adapter's text-encoder parts, and the curve of each parameter of the UNet."""
    spoken, layers = _layers(name, given, adapter, base)
    return spoken, {
        parameter: next((layers[each] for each in layers_over(parameter) if each in layers), 1.0)
        for parameter in adapter.changes
        if parameter.startswith("unet.")
    }


def _layers(
    name: str, given: BlockWeights, adapter: "Adapter", base: BaseInfo | None
) -> tuple[float, dict[str, Curve]]:
    """Return the factor of the adapter's text-encoder parts, and curves by dotted prefix."""
    blocks = numbered_blocks(base.shapes) if base else {}
    if not isinstance(given, Mapping):
        if not blocks:
            raise CompositionError(
                f"blocks: a list of values for '{name}' needs a base to count its blocks. Name the blocks."
            )
        try:
            spoken, by_label = listed(given, blocks)
        except ValueError as error:
            raise CompositionError(f"blocks: '{name}': {error}.") from None
        return spoken, {prefix: by_label[label] for label in blocks for prefix in blocks[label]}
    found: dict[str, Curve] = {}
    factor: Curve = 1.0
    for block, curve in given.items():
        label = block_label(block)
        if label == BASE:
            factor = curve
            continue
        prefixes = blocks.get(label) or (_canonical(block),)
        # The UNet as a whole may be named of any adapter: two weights, for it and the text encoders, do so.
        there = any(covers(prefix, parameter) for prefix in prefixes for parameter in adapter.changes)
        if not there and block != "unet":
            raise CompositionError(_nothing_there(name, block, adapter.changes))
        found.update(dict.fromkeys(prefixes, curve))
    if isinstance(factor, tuple):
        raise CompositionError(
            f"blocks: the text encoders run once, before the first step, so {BASE} of '{name}' is one number."
        )
    return factor, found


def _canonical(block: str) -> str:
    return block if covers("unet", block) else f"unet.{block}"


def _nothing_there(name: str, block: str, parameters: Collection[str]) -> str:
    known = list(dict.fromkeys(".".join(each.split(".")[1:3]) for each in parameters if each[:5] == "unet."))
    return (
        f"blocks: '{name}' changes nothing in '{block}'.{nearest(block, known)} It changes "
        f"{', '.join(known) or 'nothing'} in the denoiser; {BASE} stands for the text encoders."
    )
