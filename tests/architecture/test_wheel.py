"""What is installed elsewhere is what is in the checkout."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in (
        "studio",
        "trainers",
        "composition",
        "ui",
        "kernels",
        "assets",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    ):
        if (ROOT / name).exists():
            (copy / name).symlink_to(ROOT / name)
    command = [
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(folder),
        str(copy),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def expected() -> set[str]:
    """Return the names that the wheel must hold, from the folders themselves."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = {"studio/py.typed", "studio/assets/builder/card.md"}
    for package, home in settings["package-dir"].items():
        place = ROOT / home
        for path in place.rglob("*.py"):
            files.add(f"{package.replace('.', '/')}/{path.relative_to(place).as_posix()}")
    for folder in ("starter", "evaluator", "examples", "presets", "sprites"):
        for path in (ROOT / "assets" / folder).rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                files.add(f"studio/assets/{path.relative_to(ROOT / 'assets').as_posix()}")
    return files


def test_the_wheel_holds_every_module_and_asset_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    wanted = expected()
    assert sorted(wanted - inside) == []
    assert sorted(inside - wanted) == []


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import studio, studio.cli, studio.trainers, studio.kernels;"
        "assert all(m.__file__.startswith(sys.argv[1]) for m in (studio, studio.trainers, studio.kernels));"
        "sys.exit(studio.cli.main(['list']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "lora" in done.stdout and "kohya" in done.stdout


def test_the_wheel_says_what_it_needs_and_offers_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    assert "studio = studio.cli:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    assert "Requires-Dist: torch<2.14,>=2.8" in text["METADATA"]
    assert "Apache License" in text["LICENSE"]
