import importlib
import importlib.metadata
from pathlib import Path

import pytest

from studio import cli, doctor


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_it_tells_versions_devices_and_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "mine"))
    found = findings()
    assert found["torch"].text == importlib.metadata.version("torch")
    assert {"diffusers", "transformers", "peft", "gradio", "cpu", "hub models", "free disk"} <= found.keys()
    assert found["workspace"].text == str(tmp_path / "mine")
    assert found["adapters"].text.startswith(str(tmp_path / "mine"))


def test_a_missing_package_is_bad_and_a_wrong_version_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["no-such-package-here>=1", "pillow<1", "numpy>=1", "absent>=1; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    found = {finding.name: finding for finding in doctor._packages()}
    assert {name: finding.state for name, finding in found.items()} == {
        "no-such-package-here": "bad",
        "pillow": "warn",
        "numpy": "ok",
    }
    assert found["no-such-package-here"].remedy == "python -m pip install 'no-such-package-here>=1'"


def test_an_option_that_does_not_load_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")

    def broken(name: str) -> None:
        raise RuntimeError("built for another torch\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    (first, *_) = doctor._options()
    assert first.state == "warn" and first.text == "1.0 cannot be imported: built for another torch"


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {finding.name: finding.state for finding in doctor._devices()}["nvidia gpu"] == "warn"


def test_little_disk_is_a_warning_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK", 2**80)
    found = {finding.name: finding for finding in doctor._folders()}
    assert found["free disk"].state == "warn" and "free some space" in found["free disk"].remedy


def test_a_workspace_that_cannot_be_made_is_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "file" / "home"))
    (finding,) = doctor._folders()
    assert finding.state == "bad" and "STUDIO_HOME" in finding.remedy


def test_something_bad_is_marked_and_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = doctor.Finding("torch", "is not installed", "bad", "pip install torch")
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("studio", "1"), bad]))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "X torch" in text and "mend: pip install torch" in text and "1 thing to mend" in text
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("studio", "1")]))
    assert cli.main(["doctor"]) == 0
