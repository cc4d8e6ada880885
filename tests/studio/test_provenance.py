"""A picture that is drawn again from its settings says when base or adapters are not those that drew it."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from studio import api
from studio.adapters.files import save_adapter
from studio.adapters.header import tensor_hash
from studio.cli import main
from studio.png import read_spec
from studio.specs import AdapterUse, Event, GenerateSpec, adapter_names


@pytest.fixture(scope="module")
def drawn(tiny_base: str, tiny_sd: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a picture, drawn with a base and an adapter that lie beside it as files."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(tiny_base, folder / "base")
    _write_adapter(folder / "dog.safetensors", seed=1)
    spec = GenerateSpec(
        base=str(folder / "base"),
        prompt="a dog",
        adapters=(AdapterUse(path=folder / "dog.safetensors", weight=0.5),),
        steps=1,
        output=folder,
    )
    (result,) = api.generate(spec)
    assert result.path
    return result.path


def _write_adapter(path: Path, *, seed: int) -> None:
    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange

    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    change = LoraChange.sample((32, 32), generator=torch.Generator().manual_seed(seed))
    save_adapter(Adapter("dog", "lora", {name: change}), path, overwrite=True)


def messages(picture: Path, output: Path, **changed: Any) -> list[str]:
    """Draw a picture again with some settings changed and return what is said."""
    events: list[Event] = []
    spec = read_spec(picture).model_copy(update={"output": output, **changed})
    api.generate(spec, on_event=events.append)
    return [event.message for event in events if event.kind == "message"]


def test_nothing_is_said_where_base_and_adapter_are_the_same(drawn: Path, tmp_path: Path) -> None:
    assert messages(drawn, tmp_path) == []


def test_an_adapter_file_that_was_replaced_is_said(drawn: Path, tmp_path: Path) -> None:
    path = drawn.parent / "dog.safetensors"
    before = path.read_bytes()
    _write_adapter(path, seed=2)
    try:
        (said,) = messages(drawn, tmp_path)
    finally:
        path.write_bytes(before)
    assert said.startswith(f"adapter '{path}' is not the expected one, so pictures will differ")
    assert "Choose the right file" in said


def test_a_base_of_other_weights_or_number_type_is_said(drawn: Path, tmp_path: Path) -> None:
    (said,) = messages(drawn, tmp_path, precision="bf16")
    assert said.startswith(f"base model '{drawn.parent / 'base'}' is not the expected one")
    assert "or the precision it had" in said


def test_a_base_that_was_chosen_anew_is_no_surprise(drawn: Path, tiny_base: str, tmp_path: Path) -> None:
    assert messages(drawn, tmp_path, base=tiny_base, adapters=()) == []


def test_a_hash_can_be_asked_for_without_a_picture(tiny_base: str, tmp_path: Path) -> None:
    events: list[Event] = []
    spec = GenerateSpec(
        base=tiny_base, prompt="x", steps=1, output=tmp_path, expected_hashes={tiny_base: "0" * 64}
    )
    api.generate(spec, on_event=events.append)
    assert events[0].kind == "message"
    assert "wanted 000000000000" in events[0].message


def test_a_picture_drawn_with_an_embedding_names_its_token_and_draws_the_same_again(
    tiny_base: str, tmp_path: Path
) -> None:
    from studio.adapters.adapter import Adapter

    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    toy = Adapter("toy", "textual-inversion", {}, {"<robot>": {"text_encoder": rows}})
    path = save_adapter(toy, tmp_path / "toy.safetensors", format="embedding")
    _write_adapter(tmp_path / "dog.safetensors", seed=1)
    spec = GenerateSpec(
        base=tiny_base,
        prompt="a <robot>",
        adapters=(AdapterUse(path=path), AdapterUse(path=tmp_path / "dog.safetensors", weight=0.5)),
        steps=1,
        output=tmp_path / "first",
    )
    (first,) = api.generate(spec)
    assert first.infotext.startswith("a <robot> <lora:dog:0.5>\n")
    # Other programs look an embedding up by its whole file, a LoRA by its tensors.
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f'TI hashes: "<robot>: {whole[:12]}"' in first.infotext
    assert first.path and "Lora hashes: " in first.infotext and whole[:12] not in tensor_hash(path)

    arguments = ["generate", "--from", str(first.path), "--output", str(tmp_path / "again")]
    assert main(arguments) == 0
    again = (tmp_path / "again" / first.path.name).read_bytes()
    assert again == first.path.read_bytes()


def test_adapters_of_the_same_name_get_names_of_their_own() -> None:
    uses = [AdapterUse(path=Path(folder) / "dog.safetensors") for folder in "abc"]
    assert adapter_names(uses) == ["dog", "dog-2", "dog-3"]
