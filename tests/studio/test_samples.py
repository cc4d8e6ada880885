"""Sample pictures of training: what their files say of a new token whose file may not be there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.adapters.files import save_adapter
from studio.adapters.header import file_hash, tensor_hash
from studio.png import read_spec
from studio.samples import draw_samples
from studio.specs import GenerateSpec, parse_spec


def test_a_new_token_is_named_and_its_file_where_it_is_written(
    short_sd: Callable[[], Any], tmp_path: Path
) -> None:
    token = Adapter("toy", "textual-inversion", {}, {"<toy>": {"text_encoder": torch.ones(1, 32)}})
    file, path = tmp_path / "toy.safetensors", tmp_path / "0.png"
    given = {"base": "b", "prompt": "a <toy>", "adapters": str(file), "steps": 1, "raw_prompt": True}

    def drawn(hashes: dict[str, str]) -> str:
        spec = parse_spec(GenerateSpec, given | {"expected_hashes": {"b": "ab" * 32, **hashes}})
        draw_samples(short_sd(), token, [spec], [path])
        assert read_spec(path).expected_hashes == spec.expected_hashes
        text: str = Image.open(path).info["parameters"]
        return text

    text = drawn({})
    assert text.startswith("a <toy>\nSteps: 1") and "TI hashes" not in text and "Lora hashes" not in text
    save_adapter(token, file, format="embedding")
    text = drawn({str(file): tensor_hash(file)})
    assert f'TI hashes: "<toy>: {file_hash(file)[:12]}"' in text and "Lora hashes" not in text
