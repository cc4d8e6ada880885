"""Checkpoints of SaRA's reference program, written here as its description says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.parameters import components_of
from studio.adapters.reference_sara import read_reference
from studio.errors import AdapterError

THRESHOLD = 0.02


def _trained(pipe: Any) -> dict[Any, Any]:
    """Change the UNet's small entries in place and return the checkpoint of it."""
    generator = torch.Generator().manual_seed(0)
    content: dict[Any, Any] = {"threshold": THRESHOLD}
    with torch.no_grad():
        for number, parameter in enumerate(pipe.unet.parameters()):
            mask = parameter.abs() < THRESHOLD
            parameter[mask] = torch.randn(int(mask.sum()), generator=generator) * THRESHOLD
            content[number] = parameter[mask].clone()
    return content


def test_checkpoint_gives_the_weights_that_it_was_taken_from(
    tmp_path: Path, short_sd: Callable[[], Any]
) -> None:
    trained, pipe = short_sd(), short_sd()
    torch.save(_trained(trained), tmp_path / "unet.pt")
    adapter = read_reference(tmp_path / "unet.pt", pipe)
    path = save_adapter(adapter, tmp_path / "style.safetensors", format="sara")
    adapter = load_adapter(path, base=pipe)
    assert adapter.kind == "sparse" and adapter.metadata["studio.sara"] == '{"threshold": 0.02}'
    WeightBank(components_of(pipe), adapter.changes).apply(
        {name: [(change, 1.0)] for name, change in adapter.changes.items()}
    )
    plain = dict(short_sd().unet.named_parameters())
    for name, wanted in trained.unet.named_parameters():
        got = dict(pipe.unet.named_parameters())[name]
        # value - base is rounded once, and the sum once more.
        assert (got - wanted).abs().max() <= 2 * THRESHOLD * 2**-23 * 4, name
        small = plain[name].abs() < THRESHOLD
        assert torch.equal(got[~small], plain[name][~small]), name


def test_entries_that_did_not_move_and_parameters_without_any_are_left_out(
    tmp_path: Path, short_sd: Callable[[], Any]
) -> None:
    pipe = short_sd()
    content: dict[Any, Any] = {"threshold": THRESHOLD}
    for number, (name, parameter) in enumerate(pipe.unet.named_parameters()):
        small = parameter.detach().flatten()[parameter.detach().flatten().abs() < THRESHOLD]
        if name == "conv_in.weight":
            small[1] += 0.5
        if small.numel():
            content[number] = small
    torch.save(content, tmp_path / "unet.pt")
    changes = read_reference(tmp_path / "unet.pt", pipe).changes
    assert list(changes) == ["unet.conv_in.weight"]
    change = changes["unet.conv_in.weight"]
    assert isinstance(change, SparseChange) and change.values.tolist() == pytest.approx([0.5], abs=1e-7)


def test_what_is_no_checkpoint_of_this_base_is_refused(tmp_path: Path, short_sd: Callable[[], Any]) -> None:
    pipe, path = short_sd(), tmp_path / "unet.pt"
    good = _trained(short_sd())

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    contents: list[tuple[Any, str]] = [
        (torch.ones(3), "is no checkpoint of SaRA's reference program"),
        ({**good, "threshold": "0.1"}, "is no checkpoint of SaRA's"),
        ({**good, "extra": 1}, "is no checkpoint of SaRA's"),
        ({**good, 0: torch.ones(2, 2)}, "is no checkpoint of SaRA's"),
        ({**good, 0: good[0] * float("nan")}, "holds NaN or infinite values for parameter 0"),
        ({**good, 9999: torch.ones(1)}, "it holds parameter 9999, the base has"),
        ({**good, 0: good[0][:-1]}, "of 'unet.conv_in.weight' it holds .* values, the base selects"),
        ({**good, "evil": Evil()}, "cannot be read as a checkpoint"),
    ]
    for content, words in contents:
        torch.save(content, path)
        with pytest.raises(AdapterError, match=words):
            read_reference(path, pipe)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(AdapterError, match="cannot be read as a checkpoint"):
        read_reference(path, pipe)
    with pytest.raises(AdapterError, match="cannot be read as a checkpoint"):
        read_reference(tmp_path / "missing.pt", pipe)
    torch.save(good, path)
    with pytest.raises(AdapterError, match=r"is torch.float16. Load the base with precision='fp32'"):
        read_reference(path, pipe.to(torch.float16))


def test_sparse_adapter_is_named_after_its_file(tmp_path: Path, short_sd: Callable[[], Any]) -> None:
    torch.save(_trained(short_sd()), tmp_path / "expedition.pt")
    adapter = read_reference(tmp_path / "expedition.pt", short_sd())
    assert isinstance(adapter, Adapter) and adapter.name == "expedition"
