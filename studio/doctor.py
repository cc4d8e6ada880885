"""What is installed, where things live, and what is wrong: each finding with the way to mend it."""

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from studio import __version__
from studio.errors import StudioError
from studio.workspace import workspace

DISTRIBUTION = "diffusion-studio"
OPTIONAL = {
    "xformers": "faster attention on NVIDIA GPUs: pip install 'diffusion-studio[xformers]'",
    "triton": "faster kernels on NVIDIA GPUs: pip install 'diffusion-studio[gpu]'",
    "bitsandbytes": "8-bit optimizers on NVIDIA GPUs: pip install 'diffusion-studio[gpu]'",
}
LOW_DISK = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        text: How it is.
        state: ``bad`` keeps something from working, ``warn`` may, ``none`` is an option that is not
            installed.
        remedy: How to mend it.
    """

    name: str
    text: str
    state: Literal["ok", "none", "warn", "bad"] = "ok"
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Yield findings about the program, its packages, the devices and the folders, in this order."""
    yield Finding(
        "studio", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    )
    yield from _packages()
    yield from _options()
    yield from _devices()
    yield from _models()
    yield from _folders()


def _packages() -> Iterator[Finding]:
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(DISTRIBUTION, "is not installed", "bad", "python -m pip install -e . in the checkout")
        return
    for wanted in map(Requirement, lines):
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        mend = f"python -m pip install '{wanted.name}{wanted.specifier}'"
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "is not installed", "bad", mend)
            continue
        if wanted.specifier.contains(found, prereleases=True):
            yield Finding(wanted.name, found)
        else:
            yield Finding(wanted.name, f"{found}, wanted {wanted.specifier}", "warn", mend)


def _options() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, f"not installed ({use})", "none")
            continue
        try:
            importlib.import_module(name)
        # A package built for another torch or CUDA fails in whatever way its libraries fail.
        except Exception as error:
            text = f"{found} cannot be imported: {_first_line(error)}"
            yield Finding(
                name, text, "warn", f"python -m pip uninstall {name}, or install the one for your torch"
            )
        else:
            yield Finding(name, found)


def _devices() -> Iterator[Finding]:
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        mend = "python -m pip install --force-reinstall torch"
        yield Finding("torch", f"cannot be imported: {_first_line(error)}", "bad", mend)
        return
    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_memory()}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{facts.name}, {_size(facts.total_memory)}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple GPU")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch cannot use it"
        mend = "python -m pip install --force-reinstall torch, and a driver that is new enough for its CUDA"
        yield Finding("nvidia gpu", f"there is one, but {why}", "warn", mend)


def _models() -> Iterator[Finding]:
    from studio.models.base import starter_path

    try:
        place = starter_path()
    except StudioError as error:
        yield Finding(
            "starter", str(error), "bad", "python -m pip install --force-reinstall diffusion-studio"
        )
    else:
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        if (place / "model_index.json").is_file():
            yield Finding("starter", f"{place} ({_size(size)})")
        else:
            mend = "python -m pip install --force-reinstall diffusion-studio"
            yield Finding("starter", f"is missing from {place}", "bad", mend)
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    cache = Path(HF_HUB_CACHE)
    names = sorted(
        folder.name.removeprefix("models--").replace("--", "/")
        for folder in (cache.glob("models--*") if cache.is_dir() else ())
    )
    offline = ", offline: nothing will be downloaded (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else ""
    yield Finding("hub models", f"{cache} ({', '.join(names) or 'none yet'}{offline})")


def _folders() -> Iterator[Finding]:
    try:
        space = workspace()
    except StudioError as error:
        yield Finding("workspace", str(error), "bad", "set STUDIO_HOME to a folder that you may write to")
        return
    writable = os.access(space.root, os.W_OK)
    yield Finding(
        "workspace",
        f"{space.root}{'' if writable else ' cannot be written to'}",
        "ok" if writable else "bad",
        "" if writable else "set STUDIO_HOME to a folder that you may write to",
    )
    for name, path in (("adapters", space.adapters), ("pictures", space.pictures), ("queue", space.database)):
        yield Finding(name, str(path))
    free = shutil.disk_usage(space.root).free
    low = free < LOW_DISK
    yield Finding(
        "free disk",
        _size(free),
        "warn" if low else "ok",
        "free some space: a downloaded base model takes 2 to 7 GB, for the CPU twice that" if low else "",
    )


def _memory() -> str:
    try:
        return f"{_size(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
