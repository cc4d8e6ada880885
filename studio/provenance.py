"""What pictures are drawn with: names and hashes of base and adapters, and whether those are expected."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studio.adapters.header import read_header
from studio.models.fingerprint import fingerprint
from studio.png import Facts
from studio.specs import AdapterUse, GenerateSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SHOWN = 12  # digits of a hash in a message, as many as other programs show of an adapter's


def adapter_names(uses: Sequence[AdapterUse]) -> list[str]:
    """Return a name for each adapter: its file's stem, numbered where two are alike."""
    names: list[str] = []
    for use in uses:
        stem, number = use.path.stem, 2
        name = stem
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def facts_of(pipe: "DiffusionPipeline", spec: GenerateSpec, *, sampler: str) -> Facts:
    """Return what a picture's file says beside its specification, all but its size.

    Args:
        pipe: The base as it was loaded; while adapters are composed on it, its fingerprint would be another.
        spec: The request.
        sampler: Class name of the solver.

    Raises:
        AdapterError: If an adapter's file cannot be read.
    """
    names = adapter_names(spec.adapters)
    return Facts(
        width=0,
        height=0,
        sampler=sampler.removesuffix("Scheduler"),
        model=Path(spec.base).name.removesuffix(".safetensors"),
        model_hash=fingerprint(pipe),
        adapter_hashes={name: tensor_hash(use.path) for name, use in zip(names, spec.adapters, strict=True)},
    )


def tensor_hash(path: Path) -> str:
    """Return the SHA-256 of a file's tensors, by which other programs look adapters up.

    Raises:
        AdapterError: If it is no adapter file.
    """
    digest, start = hashlib.sha256(), read_header(path).data_start
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(spec: GenerateSpec, facts: Facts) -> list[str]:
    """Return a line for the base and each adapter whose hash is another than the specification expects."""
    base, adapters = "Choose the right one, or the precision it had.", "Choose the right file."
    found = [("base model", spec.base, facts.model_hash, base)]
    found += [
        ("adapter", str(use.path), digest, adapters)
        for use, digest in zip(spec.adapters, facts.adapter_hashes.values(), strict=True)
    ]
    return [
        f"{kind} '{name}' is not the expected one, so pictures will differ: its hash begins with "
        f"{digest[:_SHOWN]}, wanted {wanted[:_SHOWN]}. {remedy}"
        for kind, name, digest, remedy in found
        if (wanted := spec.expected_hashes.get(name, digest)) != digest
    ]
