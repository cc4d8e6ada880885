"""No path leaves the workspace."""

from pathlib import Path

import pytest

from studio.errors import OutputError
from studio.workspace import inside_workspace, workspace


def test_the_home_comes_from_the_argument_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "environment"))
    assert workspace().root == tmp_path / "environment"
    assert workspace(tmp_path / "argument").root == tmp_path / "argument"
    monkeypatch.delenv("STUDIO_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert workspace().root == tmp_path / "user" / ".studio"


def test_all_folders_exist_below_the_root(tmp_path: Path) -> None:
    space = workspace(tmp_path)
    assert {folder.name for folder in space.folders} == {"uploads", "adapters", "pictures", "runs"}
    assert all(folder.is_dir() and folder.parent == tmp_path for folder in space.folders)


@pytest.mark.parametrize("path", ["adapters/dog.safetensors", "pictures/a/../b/1.png", "."])
def test_paths_below_the_root_are_accepted(tmp_path: Path, path: str) -> None:
    assert workspace(tmp_path).inside(path) == (tmp_path / path).resolve()


@pytest.mark.parametrize("path", ["..", "../other/dog.safetensors", "adapters/../../x", "/etc/passwd"])
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(OutputError, match="outside the workspace"):
        inside_workspace(path, home=tmp_path / "home")


def test_a_link_out_of_the_workspace_is_refused(tmp_path: Path) -> None:
    space = workspace(tmp_path / "home")
    (space.adapters / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="outside the workspace"):
        space.inside("adapters/link/dog.safetensors")


def test_a_sibling_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="outside the workspace"):
        workspace(tmp_path / "home").inside(tmp_path / "home-other" / "x.png")


def test_a_home_that_cannot_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Set STUDIO_HOME"):
        workspace(tmp_path / "file" / "home")
