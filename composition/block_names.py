"""Blocks of a UNet by the names of the web UI's block weights: IN00, M00, OUT00.

They number the blocks of the original implementation. LoRA Block Weight, an extension of the web UI, takes a
list of values in this order, that of the text encoders (BASE) first: for all blocks (26 values for SD 1.5, 20
for SDXL) or for those with attention only (17 and 12).
"""

from collections.abc import Collection, Mapping, Sequence

from studio.adapters.names import layout_of, modules_of, sgm_name

BASE = "BASE"
_STAGES = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}
_OTHER_SPELLINGS = {"MID": "M00"}


def numbered_blocks(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return, in the order of the lists, each block's layers as dotted prefixes of canonical names.

    Args:
        names: Of the base's parameters.
    """
    layout = layout_of(names)
    found: dict[str, dict[str, None]] = {}
    for module in modules_of(names):
        component, _, path = module.partition(".")
        stage, *rest = (sgm_name(path, layout) or "").split(".")
        if component != "unet" or stage not in _STAGES:
            continue
        number = 0 if stage == "middle_block" else int(rest[0])
        parts = path.split(".")
        # "down_blocks.1.attentions.0" and "mid_block.resnets.1"; a module outside of blocks as it is.
        prefix = ".".join(parts[: 3 if parts[0] == "mid_block" else 4])
        found.setdefault(f"{_STAGES[stage]}{number:02}", {})[f"unet.{prefix}"] = None
    stages = list(_STAGES.values())
    order = sorted(found, key=lambda label: (stages.index(label.rstrip("0123456789")), label))
    return {label: tuple(found[label]) for label in order}


def with_attention(blocks: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the labels of the blocks that hold attention."""
    return [
        label for label, prefixes in blocks.items() if any(".attentions." in prefix for prefix in prefixes)
    ]


def block_label(name: str) -> str:
    """Return a block's name in the spelling of :func:`numbered_blocks`."""
    return _OTHER_SPELLINGS.get(name.upper(), name.upper())


def listed(values: Sequence[float], blocks: Mapping[str, Sequence[str]]) -> tuple[float, dict[str, float]]:
    """Return the text encoders' value and the blocks' by label; blocks without a value get 0.

    Raises:
        ValueError: If there are not as many values as one of the two lists has.
    """
    some, every = with_attention(blocks), list(blocks)
    for labels in (every, some):
        if len(values) == 1 + len(labels):
            return values[0], {**dict.fromkeys(every, 0.0), **dict(zip(labels, values[1:], strict=True))}
    raise ValueError(
        f"{len(values)} values were given; this base has {1 + len(some)} ({BASE}, {', '.join(some)}) or "
        f"{1 + len(every)} ({BASE}, {', '.join(every)})"
    )
