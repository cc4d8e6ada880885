"""Files of sparse changes know the base that they were trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.origin import origin_facts
from studio.errors import AdapterError
from studio.models.base import load_base
from studio.models.fingerprint import fingerprint

Factory = Callable[[], Any]


def _file(folder: Path, pipe: Any, adapter: Adapter, *, form: str = "sara") -> Path:
    path = folder / "style.safetensors"
    return save_adapter(replace(adapter, metadata=origin_facts(pipe)), path, format=form, base=pipe)


@pytest.fixture
def style(tiny_sd: Factory, everywhere: Callable[..., Adapter]) -> Adapter:
    return everywhere(tiny_sd(), kind="sparse", components=("unet.mid_block",))


@pytest.mark.parametrize("trained", [torch.float32, torch.float16, torch.bfloat16], ids=["32", "16", "b16"])
@pytest.mark.parametrize("used", [torch.float32, torch.float16, torch.bfloat16], ids=["32", "16", "b16"])
def test_base_is_known_again_in_another_precision(
    tmp_path: Path, tiny_sd: Factory, style: Adapter, trained: torch.dtype, used: torch.dtype
) -> None:
    path = _file(tmp_path, tiny_sd().to(trained), style)
    if {trained, used} == {torch.float16, torch.bfloat16}:
        # Neither was rounded from the other, and what they were rounded from is not at hand.
        with pytest.raises(AdapterError, match="was trained on another base model"):
            load_adapter(path, base=tiny_sd().to(used))
    else:
        assert load_adapter(path, base=tiny_sd().to(used)).changes


def test_a_base_that_was_loaded_in_bf16_is_known_in_every_precision(
    tmp_path: Path, one_block_sd: Factory, everywhere: Callable[..., Adapter]
) -> None:
    pipe = one_block_sd()
    pipe.save_pretrained(tmp_path / "base")
    loaded = [load_base(tmp_path / "base", device="cpu", precision=name) for name in ("bf16", "fp16", "fp32")]
    style = everywhere(pipe, kind="sparse", components=("unet.mid_block",))
    for trained, used in ((0, 1), (0, 2), (1, 0), (2, 0)):
        path = _file(tmp_path / f"{trained}{used}", loaded[trained], style)
        assert load_adapter(path, base=loaded[used]).changes


def test_another_base_is_refused_unless_any_will_do(tmp_path: Path, tiny_sd: Factory, style: Adapter) -> None:
    other = tiny_sd()
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 0.5
    path = _file(tmp_path, tiny_sd(), style)
    names = f"names '{fingerprint(tiny_sd())[:12]}', this one is '{fingerprint(other)[:12]}'"
    with pytest.raises(
        AdapterError, match=f"style.safetensors was trained on another base model.*{names}.*any_base=True"
    ):
        load_adapter(path, base=other)
    assert load_adapter(path, base=other, any_base=True).changes.keys() == style.changes.keys()


def test_only_own_files_ask_for_their_base_and_only_if_they_name_one(
    tmp_path: Path, tiny_sd: Factory, style: Adapter
) -> None:
    other = tiny_sd()
    with torch.no_grad():
        other.unet.conv_in.weight.zero_()
    assert load_adapter(_file(tmp_path / "kohya", tiny_sd(), style, form="kohya"), base=other).changes
    unnamed = save_adapter(style, tmp_path / "unnamed.safetensors", format="sara")
    assert load_adapter(unnamed, base=other).changes


def test_fingerprint_in_a_type_is_that_of_the_base_in_that_type(tiny_sd: Factory) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert (
            fingerprint(tiny_sd(), dtypes=[dtype])
            == fingerprint(tiny_sd().to(dtype))
            != fingerprint(tiny_sd())
        )
