"""What a picture's file says about how it was made: text for other programs, and all that makes it again.

Two text chunks. ``parameters`` is the format that A1111 started and most programs and sites read. ``studio``
is JSON ``{"format": 1, "spec": {...}, "facts": {...}}`` with everything that decides the picture.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from studio import __version__
from studio.errors import SpecError, UsageError
from studio.models.prompt_syntax import escaped
from studio.specs import GenerateSpec, parse_spec
from studio.whole_file import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
MAX_CHUNK = 256 * 1024
# Where a picture goes and on what machine it is made is the affair of who makes it again, never of the file.
MACHINE = frozenset({"device", "attention", "offload", "compile"})
NOT_OF_THE_PICTURE = MACHINE | {
    "output", "overwrite", "batch_size", "count", "expected_hashes", "adapter_folder",
}  # fmt: skip
SAMPLERS = {
    "ddim": "DDIM",
    "dpm++2m": "DPM++ 2M",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "pndm": "PLMS",
    "unipc": "UniPC",
}


@dataclass(frozen=True)
class EmbeddingFile:
    """An adapter's file that holds a new token and nothing else.

    Attributes:
        token: By which a prompt names it.
        file_hash: SHA-256 of the whole file, by which other programs look embeddings up, hexadecimal; empty
            where it is not written.
    """

    token: str
    file_hash: str


@dataclass(frozen=True)
class Facts:
    """What a picture's specification does not say.

    Attributes:
        width: Pixels.
        height: Pixels.
        sampler: Class of the solver that ran.
        model: Name of the base model.
        model_hash: Fingerprint of the base model, hexadecimal.
        adapter_hashes: SHA-256 of each adapter's tensors by its name, hexadecimal, in the adapters' order;
            empty where its file is not written.
        embeddings: Of the adapters those that are embeddings, by path as in the specification.
        version: Of this program.
        macs: Multiply-accumulates of the denoiser for this picture, where they are not the base's alone.
        cached_share: Share of its evaluations with deep features of an earlier step, where a cache took part.
    """

    width: int
    height: int
    sampler: str = ""
    model: str = ""
    model_hash: str = ""
    adapter_hashes: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingFile] = field(default_factory=dict)
    version: str = __version__
    macs: int | None = None
    cached_share: float | None = None


def infotext(spec: GenerateSpec, facts: Facts) -> str:
    """Return the picture's settings in the form that A1111 reads.

    An embedding stands in the prompt as its token, and among the hashes where a prompt names it; the other
    adapters stand behind the prompt.
    """
    changing = [str(use.path) not in facts.embeddings for use in spec.adapters]
    uses = compress(spec.adapters, changing)
    lora_hashes = compress(facts.adapter_hashes.items(), changing)
    prompt, negative = (
        escaped(text) if spec.raw_prompt else text for text in (spec.prompt, spec.negative_prompt)
    )
    named = [
        found
        for found in facts.embeddings.values()
        if found.file_hash and found.token in f"{spec.prompt}\n{spec.negative_prompt}"
    ]
    lines = [" ".join([prompt, *(f"<lora:{use.path.stem}:{use.weight:g}>" for use in uses)])]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    settings = {
        "Steps": spec.steps,
        "Sampler": SAMPLERS.get(spec.scheduler, facts.sampler),
        "CFG scale": f"{spec.guidance_scale:g}",
        "Seed": spec.seed,
        "Size": f"{facts.width}x{facts.height}",
        "Model hash": facts.model_hash[:10],
        "Model": facts.model,
        "Clip skip": spec.clip_skip if spec.clip_skip > 1 else "",
        "Lora hashes": ", ".join(f"{name}: {digest[:12]}" for name, digest in lora_hashes if digest),
        "TI hashes": ", ".join(f"{found.token}: {found.file_hash[:12]}" for found in named),
        "Version": f"diffusion-studio {facts.version}",
    }
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value != ""))
    return "\n".join(lines)


def write_png(image: "Image", path: Path, spec: GenerateSpec, facts: Facts) -> str:
    """Write one picture with its settings, whole or not at all, and return its infotext.

    Args:
        image: The picture.
        path: The file; its folder exists.
        spec: What made it, with the picture's own seed.
        facts: What the specification does not say.

    Raises:
        OutputError: If it cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    text = infotext(spec, facts)
    document = {
        "format": FORMAT,
        "spec": spec.model_dump(mode="json", exclude=set(NOT_OF_THE_PICTURE)),
        "facts": asdict(facts),
    }
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    chunks.add_text("studio", json.dumps(document))
    with whole_file(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=chunks)
    return text


def read_spec(path: str | Path) -> GenerateSpec:
    """Return what makes the picture again: its seed, one picture, the reader's own output folder and device.

    The hashes of the base and the adapters that drew it are the expected ones.

    Raises:
        UsageError: If it is no PNG, or says nothing, or what it says is too long or malformed.
    """
    document = _document(Path(path))
    spec = document.get("spec")
    if document.get("format") != FORMAT or not isinstance(spec, dict):
        raise UsageError(
            f"'{path}' was written by another version of this program: format {document.get('format')!r}, "
            f"this one reads {FORMAT}. Its settings as text are in its 'parameters' chunk."
        )
    foreign = sorted(NOT_OF_THE_PICTURE & spec.keys())
    try:
        if foreign:
            raise SpecError([f"{name}: does not belong into a picture." for name in foreign])
        read = parse_spec(GenerateSpec, spec)
        return read.model_copy(update={"expected_hashes": _hashes(document.get("facts"), read)})
    except SpecError as error:
        raise SpecError([f"the settings in '{path}' are not valid:", *error.problems]) from None


def _hashes(facts: Any, spec: GenerateSpec) -> dict[str, str]:
    """Return the hashes that a picture's facts name, by base and path of adapter as in its specification."""
    try:
        known = TypeAdapter(Facts).validate_python(facts)
        paths = [str(use.path) for use in spec.adapters]
        adapters = dict(zip(paths, known.adapter_hashes.values(), strict=True))
    except ValueError:
        raise SpecError(["facts: are not those of a picture with these settings."]) from None
    return {name: digest for name, digest in {spec.base: known.model_hash, **adapters}.items() if digest}


def _document(path: Path) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        # Opening reads the chunks before the pixels and bounds their length; no pixel is decoded.
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("studio")
    except FileNotFoundError:
        raise UsageError(f"there is no file '{path}'.") from None
    except UnidentifiedImageError:
        raise UsageError(f"'{path}' is not a PNG picture.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}.") from None
    if not isinstance(text, str):
        raise UsageError(
            f"'{path}' holds no settings of this program. Only pictures it drew, unedited, hold them."
        )
    if len(text) > MAX_CHUNK:
        raise UsageError(
            f"the settings in '{path}' have {len(text)} characters, at most {MAX_CHUNK} are read. "
            "Choose a picture that this program drew."
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"the settings in '{path}' are damaged: not JSON.") from None
    if not isinstance(document, dict):
        raise UsageError(f"the settings in '{path}' are damaged: not an object.")
    return document


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
