from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.errors import UsageError
from studio.models.blocks import attention_blocks, choose_blocks


def test_blocks_of_sd1_come_in_the_order_in_which_the_unet_runs_them(tiny_sd: Callable[[], Any]) -> None:
    unet = tiny_sd().unet
    blocks = attention_blocks(unet)
    ran: list[str] = []
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 7, 32))
    assert ran == list(blocks)
    assert len(blocks) == 6 + 1 + 9


def test_blocks_of_sdxl_are_those_of_its_paper(tiny_sdxl: Callable[[], Any]) -> None:
    blocks = attention_blocks(tiny_sdxl().unet)
    assert list(blocks) == [
        *(f"down_blocks.{level}.attentions.{place}" for level in (1, 2) for place in (0, 1)),
        "mid_block.attentions.0",
        *(f"up_blocks.{level}.attentions.{place}" for level in (0, 1) for place in (0, 1, 2)),
    ]


NAMES = ["down_blocks.1.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]


@pytest.mark.parametrize(
    ("prefixes", "chosen"),
    [
        (["up_blocks.1.attentions.1"], NAMES[2:]),
        (["up_blocks.1"], NAMES[1:]),
        (["up_blocks.1.attentions"], NAMES[1:]),
        (["up_blocks.1.attentions.1", "down_blocks"], [NAMES[0], NAMES[2]]),
        ([], []),
    ],
)
def test_prefixes_choose_whole_names(prefixes: list[str], chosen: list[str]) -> None:
    assert choose_blocks(NAMES, prefixes, setting="groups") == chosen


@pytest.mark.parametrize("prefix", ["up", "up_blocks.10", "up_blocks.1.attentions.1.norm"])
def test_a_prefix_that_holds_no_block_is_refused_with_all_names(prefix: str) -> None:
    with pytest.raises(
        UsageError, match=rf"groups: the base has no attention block '{prefix}'\..* It has down"
    ):
        choose_blocks(NAMES, [prefix], setting="groups")
