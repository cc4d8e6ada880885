"""README.md and the guides are run as they stand.

A document's blocks run in order, in one folder and with one set of names. What runs: blocks of ``python``; in
blocks of ``console`` and ``sh`` the lines that start with ``studio`` (a ``$`` in front is fine). A block of
``toml NAME`` is written to the file NAME first. ``my_dog/`` is there from the start. Any block with
``no-test`` beside its language is left out. Numbers of steps, prompts and pictures at once are cut down, and
the steps that ``python`` draws in: the commands are tested, not the model.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from studio import cli
from studio.errors import BaseModelError
from studio.models.base import starter_path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()]
BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
DRAWN = re.compile(r"\b((?:num_inference_)?steps)=\d+")
# What is given besides to the commands that have these words.
SHORT = {
    ("train",): ["--steps", "2", "--batch-size", "1"],
    ("generate",): ["--steps", "2"],
    ("probe",): ["--pairs", "1", "--steps", "1"],
    ("zip",): ["--pictures", "1", "--sample-steps", "1", "--steps", "1"],
    ("compose", "--compare"): ["--steps", "2"],
}


@dataclass(frozen=True)
class Block:
    language: str
    words: tuple[str, ...]
    text: str
    line: int


def blocks(document: str) -> Iterator[Block]:
    for found in BLOCK.finditer(document):
        indent, language, words, text = found.groups()
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        line = document.count("\n", 0, found.start()) + 1
        yield Block(language, tuple(words.split()), "\n".join(lines), line)


def commands(block: Block) -> Iterator[list[str]]:
    joined = block.text.replace("\\\n", " ")
    for line in joined.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["studio"]:
            yield words[1:]


def shorter(command: list[str]) -> list[str]:
    return [word for words, more in SHORT.items() if {*words} <= {*command} for word in more]


def run(document: str, name: str) -> int:
    """Run a document's blocks and return how many there were."""
    names: dict[str, object] = {"__name__": "example"}
    ran = 0
    for block in blocks(document):
        place = f"{name}, line {block.line}"
        if "no-test" in block.words:
            continue
        if block.language == "python":
            exec(compile(DRAWN.sub(r"\1=2", block.text), place, "exec"), names)
        elif block.language in ("console", "sh"):
            for command in commands(block):
                assert cli.main([*command, *shorter(command)]) == 0, f"{place}: studio {shlex.join(command)}"
        elif block.language == "toml" and block.words:
            Path(block.words[0]).write_text(block.text, encoding="utf-8")
        else:
            continue
        ran += 1
    return ran


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder with the pictures that the documents speak of."""
    examples = sorted((ROOT / "assets" / "examples").glob("*/"))
    if examples:
        shutil.copytree(examples[0], tmp_path / "my_dog")
    else:
        (tmp_path / "my_dog").mkdir()
        Image.new("RGB", (64, 64), "brown").save(tmp_path / "my_dog" / "1.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_runs_as_it_stands(path: Path, folder: Path) -> None:
    try:
        starter_path()
    except BaseModelError:
        pytest.skip("the embedded base model is not built yet")
    run(path.read_text(encoding="utf-8"), path.name)


def test_blocks_run_in_order_and_share_names_and_files(folder: Path) -> None:
    document = """
```python
x = 1
```
- a list
  ```python
  x += 1
  ```
```python no-test
x = 1 / 0
```
```toml a.toml
y = 3
```
```text
nothing
```
```python
from pathlib import Path
assert x == 2 and Path("a.toml").read_text() == "y = 3" and Path("my_dog").is_dir()
```
```console
$ make demo
$ studio list   # names
```
"""
    assert run(document, "x") == 5


@pytest.mark.parametrize(
    "text",
    ["```python\nassert False\n```\n", "```sh\nstudio train \\\n  --rank 0\n```\n"],
    ids=["python", "command"],
)
def test_a_block_that_fails_fails_the_document(text: str) -> None:
    with pytest.raises(AssertionError):
        run(text, "x")
