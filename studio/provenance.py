"""What pictures are drawn with: names and hashes of base and adapters, and whether those are expected."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studio.adapters.files import detect_format
from studio.adapters.formats.embedding import Embedding
from studio.adapters.header import file_hash, read_header, tensor_hash
from studio.models.fingerprint import fingerprint
from studio.png import EmbeddingFile, Facts
from studio.registry import FORMATS
from studio.specs import GenerateSpec, adapter_names
from studio.specs.composition import Ingredients

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SHOWN = 12  # digits of a hash in a message, as many as other programs show of an adapter's


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
        embeddings={str(use.path): found for use in spec.adapters if (found := embedding_file(use.path))},
    )


def embedding_file(path: Path) -> EmbeddingFile | None:
    """Return token and hash of a file that holds a new token and nothing else, or None for other adapters.

    Raises:
        AdapterError: If it is no adapter file.
    """
    header = read_header(path)
    form = FORMATS[detect_format(header, path.name)]
    if not isinstance(form, Embedding):
        return None
    token = form.token(header.tensors.keys(), header.metadata, stem=path.stem)
    return EmbeddingFile(token, file_hash(path))


def differences(spec: GenerateSpec, facts: Facts) -> list[str]:
    """Return a line for the base and each adapter whose hash is another than the specification expects."""
    base = {spec.base: facts.model_hash}
    return [
        *_unexpected("base model", base, spec, "Choose the right one, or the precision it had."),
        *adapter_differences(spec, list(facts.adapter_hashes.values())),
    ]


def adapter_differences(spec: Ingredients, hashes: Sequence[str]) -> list[str]:
    """Return a line for each adapter whose hash is another than the specification expects.

    Args:
        spec: Its adapters and what is expected of them.
        hashes: SHA-256 of the adapters' tensors, in their order.
    """
    found = {str(use.path): digest for use, digest in zip(spec.adapters, hashes, strict=True)}
    return _unexpected("adapter", found, spec, "Choose the right file.")


def _unexpected(kind: str, found: Mapping[str, str], spec: Ingredients, remedy: str) -> list[str]:
    return [
        f"{kind} '{name}' is not the expected one, so pictures will differ: its hash begins with "
        f"{digest[:_SHOWN]}, wanted {wanted[:_SHOWN]}. {remedy}"
        for name, digest in found.items()
        if (wanted := spec.expected_hashes.get(name, digest)) != digest
    ]
