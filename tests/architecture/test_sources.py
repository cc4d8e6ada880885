"""Rules that every file of the repository keeps."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("assets", "composition", "kernels", "studio", "trainers", "ui")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES = 400


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_a_file_is_short_and_only_the_command_line_prints(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    printing = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not printing or names(path).startswith(("studio/cli.py", "studio/commands/", "assets/builder/"))


def test_no_file_names_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    # Written in pieces, so that this file does not find itself.
    machine = re.compile(
        "(?<![A-Za-z0-9_.])/(?:" + "|".join(["wo" + "rk", "op" + "t", "ro" + "ot", "ho" + "me"]) + ")/"
    )
    kinds = {".py", ".md", ".toml", ".txt", ".json", ""}
    paths = [ROOT / name for name in tracked.stdout.splitlines()]
    texts = [
        path for path in paths if path.suffix in kinds and path.is_file() and path.stat().st_size < 500_000
    ]
    assert [
        names(path) for path in texts if machine.search(path.read_text(encoding="utf-8", errors="ignore"))
    ] == []


def test_every_folder_with_modules_is_a_listed_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    homes = settings["package-dir"]
    found = set()
    for path in SOURCES:
        folder, *rest = path.parent.relative_to(ROOT).parts
        package = next(name for name, home in homes.items() if home == folder)
        found.add(".".join([package, *rest]))
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py"
    assert sorted(found) == sorted(settings["packages"])


def test_dependencies_have_both_bounds_and_the_constraints_keep_them() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for wanted in map(Requirement, project["dependencies"]):
        operators = {part.operator for part in wanted.specifier}
        assert operators == {">=", "<"}, wanted
        assert wanted.specifier.contains(pins[wanted.name]), wanted
    for wanted in map(Requirement, project["optional-dependencies"]["dev"]):
        assert wanted.specifier.contains(pins[wanted.name]), wanted
