"""Who may import whom, and what must load without torch."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "studio": "studio",
    "assets": "studio.assets",
    "composition": "studio.composition",
    "kernels": "studio.kernels",
    "trainers": "studio.trainers",
    "ui": "studio.ui",
}
SHARED = ("studio.errors", "studio.registry", "studio.specs", "studio.whole_file")
CORE = ("studio.adapters", "studio.data", "studio.models")
# From each part to the parts that it may import, itself apart.
ALLOWED = {
    "studio.kernels": (),
    "studio.errors": (),
    "studio.registry": ("studio.errors",),
    "studio.workspace": ("studio.errors",),
    "studio.whole_file": ("studio.errors",),
    "studio.specs": ("studio.errors", "studio.registry"),
    **dict.fromkeys(CORE, (*SHARED, *CORE, "studio.kernels")),
    "studio.assets": (*SHARED, *CORE, "studio.kernels"),
    "studio.trainers": (*SHARED, *CORE, "studio.kernels"),
    "studio.composition": (*SHARED, *CORE, "studio.kernels", "studio.workspace"),
}
PARTS = (*ALLOWED, "studio.ui", "studio.commands", "studio")
TORCH_FREE = (
    "studio",
    "studio.cli",
    "studio.composing.document",
    "studio.errors",
    "studio.flags",
    "studio.inspection",
    "studio.jobs",
    "studio.png",
    "studio.progress",
    "studio.registry",
    "studio.specs",
    "studio.workspace",
    "studio.worker",
)
TORCH_FREE_FOLDERS = (
    "studio/commands",
    "ui",
    "trainers/methods",
    "composition/methods",
    "composition/modifiers",
    "studio/adapters/kinds",
    "studio/adapters/formats",
    "studio/adapters/merging",
)


def module_of(path: Path) -> str:
    """Return the installed name of a file of the checkout."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def part_of(module: str) -> str:
    """Return the longest part that a module lies in; the top modules of the core are the part ``studio``."""
    return max((part for part in PARTS if module == part or module.startswith(part + ".")), key=len)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if not node.level and node.module == "studio":
                yield from (f"studio.{alias.name}" for alias in node.names)


def forbidden(module: str, name: str) -> bool:
    """Say whether a module of ours may not import that name."""
    top = name.partition(".")[0]
    if name.startswith(".") or (top in FOLDERS and top != "studio"):
        return True
    own = part_of(module)
    if own == "studio.kernels":
        standard = top in sys.stdlib_module_names
        return not (standard or top in ("torch", "triton") or name.startswith("studio.kernels"))
    if top != "studio" or name == "studio":
        # The package itself offers only lazy names: the parts below must not reach up through it.
        return name == "studio" and own in ALLOWED
    other = part_of(name)
    if own in ALLOWED:
        return other not in (own, *ALLOWED[own])
    # Only the command line starts the page, and only the page uses the page.
    return other == "studio.ui" and own not in ("studio.ui", "studio.commands")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    module = module_of(path)
    found = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
    assert sorted(name for name in found if forbidden(module, name)) == []


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        ("studio.trainers.loop", "studio.composition.engine", True),
        ("studio.composition.engine", "studio.trainers", True),
        ("studio.composition.engine", "studio.kernels.merge_bank", False),
        ("studio.adapters.bank", "studio.api", True),
        ("studio.kernels.merge_bank", "studio.errors", True),
        ("studio.kernels.merge_bank", "numpy", True),
        ("studio.kernels.merge_bank", "torch.nn", False),
        ("studio.specs.train", "studio.adapters.files", True),
        ("studio.api", "studio.trainers.loop", False),
        ("studio.api", "studio.ui.app", True),
        ("studio.commands.ui", "studio.ui.app", False),
        ("studio.ui.app", "kernels", True),
        ("studio.ui.app", ".forms", True),
        ("studio.models.base", "studio", True),
    ],
)
def test_the_rule_itself(module: str, name: str, wrong: bool) -> None:
    assert forbidden(module, name) is wrong


def torch_free_modules() -> list[str]:
    found = [path for folder in TORCH_FREE_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return [*TORCH_FREE, *(module_of(path) for path in found)]


COMMANDS = (
    "--help",
    "train --help",
    "generate --help",
    "compose --help",
    "compose --plan --help",
    "compose --compare x --help",
    "compose --bake --help",
    "compose --profile --help",
    "merge --help",
    "list",
    "jobs",
    "inspect x.safetensors",
)
PAGE = "the page is built"
# Runs in a fresh process; prints a JSON object: the first heavy module loaded by each act, or null.
ACTS = """
import contextlib, importlib, io, json, sys
from studio.cli import main
modules, commands, page = json.loads(sys.argv[1])
def build():
    from studio.ui.app import build
    build("home")
acts = {name: lambda name=name: importlib.import_module(name) for name in modules}
acts |= {words: lambda words=words: main(words.split()) for words in commands} | {page: build}
found = {}
for name, act in acts.items():
    with contextlib.redirect_stdout(io.StringIO()):
        code = act()
    heavy = [module for module in ("torch", "diffusers", "transformers") if module in sys.modules]
    found[name] = heavy[0] if heavy else f"exit code {code}" if name in commands and code else None
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Return what each act of a light process loaded that is heavy."""
    folder = tmp_path_factory.mktemp("light")
    entry = {"lora_unet_x.lora_down.weight": {"dtype": "F16", "shape": [1, 2], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode()
    (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    command = [sys.executable, "-c", ACTS, json.dumps([torch_free_modules(), COMMANDS, PAGE])]
    environment = os.environ | {"STUDIO_HOME": str(folder / "home")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def test_light_modules_load_without_torch(loaded: dict[str, str | None]) -> None:
    assert {name: loaded[name] for name in torch_free_modules() if loaded[name]} == {}


@pytest.mark.parametrize("act", [*COMMANDS, PAGE])
def test_light_commands_and_the_page_load_no_torch(act: str, loaded: dict[str, str | None]) -> None:
    assert loaded[act] is None


def test_the_package_offers_what_it_names_and_nothing_else() -> None:
    import studio

    assert all(hasattr(studio, name) for name in studio.__all__) and not hasattr(studio, "x")
