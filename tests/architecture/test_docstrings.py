"""Examples in docstrings are run as they stand, those marked to be skipped too: the reader runs them as well.

``dog`` is an adapter of the embedded base model.
"""

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

from studio.errors import BaseModelError
from studio.models.base import load_base, starter_path

ROOT = Path(__file__).resolve().parents[2]
HOMES = {"studio": "studio"} | {
    folder: f"studio.{folder}" for folder in ("assets", "composition", "kernels", "trainers", "ui")
}


def modules_with_examples() -> list[str]:
    found = []
    for folder, package in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                rest = path.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join([package, *rest]).removesuffix(".__init__"))
    return found


def adapter_of_the_starter() -> Any:
    import torch

    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange
    from studio.adapters.parameters import canonical_names, components_of

    names = canonical_names(components_of(load_base("starter")))
    name = next(name for name in names if name.endswith("attn2.to_q.weight"))
    rows, columns = names[name]
    return Adapter("dog", "lora", {name: LoraChange(torch.zeros(2, columns), torch.zeros(rows, 2), 2.0)})


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    if any("starter" in example.source for test in tests for example in test.examples):
        try:
            starter_path()
        except BaseModelError:
            pytest.skip("the embedded base model is not built yet")
    for test in tests:
        for example in test.examples:
            example.options.pop(doctest.SKIP, None)
            if "dog" in example.source and "dog" not in test.globs:
                test.globs["dog"] = adapter_of_the_starter()
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0 and result.attempted > 0
