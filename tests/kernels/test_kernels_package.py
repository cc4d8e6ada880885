"""The folder's bare name, which belongs to another package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_diffusers_imports_from_the_root_of_the_checkout() -> None:
    done = _python(
        "import studio, diffusers; diffusers.StableDiffusionPipeline; import kernels; print(kernels.__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "kernels"


@pytest.mark.parametrize("code", ["import kernels; kernels.get_kernel", "from kernels import get_kernel"])
def test_bare_package_offers_nothing(code: str) -> None:
    done = _python(code)
    assert done.returncode == 1
    assert "Error" in done.stderr and "get_kernel" in done.stderr
    assert (
        "AttributeError: this is the folder of studio.kernels" in done.stderr or "ImportError" in done.stderr
    )
