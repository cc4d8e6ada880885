"""The text entries of an adapter file: kohya's ``ss_*``, ``modelspec.*``, hashes, and our own ``studio.*``.

Every value is a string. No path, prompt or host name is written unless the caller passes it.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from studio.adapters.families import ARCHITECTURES, IMPLEMENTATIONS, KOHYA_VERSIONS
from studio.adapters.header import encode_header
from studio.errors import OutputError

FORMAT_VERSION = "1"
# Facts of one file that the next one must not inherit. diffusers refuses `lora_adapter_metadata` in a file of
# kohya's names, and in its own it would override the scale that is folded into the tensors.
_NOT_INHERITED = {
    "lora_adapter_metadata",
    "format",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
}
# What LyCORIS calls the kinds that kohya's own network does not know.
_LYCORIS: Mapping[str, Mapping[str, str]] = {
    "dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "oft": {"algo": "diag-oft"},
    "full": {"algo": "full"},
    "sparse": {"algo": "full"},
}
_LEGACY_OFFSET, _LEGACY_BYTES = 0x100000, 0x10000


def now() -> float:
    """Return the time in seconds since 1970; SOURCE_DATE_EPOCH stands in for the clock where it is set.

    Raises:
        OutputError: If SOURCE_DATE_EPOCH is not a number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        seconds = time.time() if given is None else float(int(given))
        datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise OutputError(
            f"SOURCE_DATE_EPOCH must be a number of seconds, got '{given}'. Correct or unset it."
        ) from None
    return seconds


def timestamp() -> str:
    """Return the same time in ISO 8601, UTC.

    Raises:
        OutputError: If SOURCE_DATE_EPOCH is not a number of seconds.
    """
    return datetime.fromtimestamp(now(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe(
    inherited: Mapping[str, str],
    given: Mapping[str, str],
    *,
    title: str,
    kind: str,
    family: str | None,
    ranks: set[int],
    alpha: float,
) -> dict[str, str]:
    """Return the metadata of a file to be written, all but the hashes.

    Args:
        inherited: What the adapter carries; descriptions stay, facts of its former file do not.
        given: What the caller wants; wins over everything.
        title: The file's stem.
        kind: Of adapter, or several joined by "+"; the suffix of ``modelspec.architecture``.
        family: "sd1", "sd2", "sdxl" or None for a base that is none of them.
        ranks: All that occur.
        alpha: The one alpha of the file.
    """
    version = inherited.get("ss_base_model_version") or KOHYA_VERSIONS.get(family or "")
    architecture = "sd2-v" if version == KOHYA_VERSIONS["sd2-v"] else family or "sd1"
    described = {
        "ss_output_name": title,
        "modelspec.title": title,
        "modelspec.date": timestamp(),
        **({"ss_base_model_version": version} if version else {}),
        # Custom models are built like the family whose names the file uses; some readers need these two
        # entries.
        "modelspec.architecture": f"{ARCHITECTURES[architecture]}/{kind}",
        "modelspec.implementation": IMPLEMENTATIONS[family or "sd1"],
    }
    # A token is no network.
    network = (
        {}
        if kind == "textual-inversion"
        else {
            "ss_network_module": "networks.lora" if kind == "lora" else "lycoris.kohya",
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{alpha:g}",
            "ss_network_args": json.dumps(_LYCORIS.get(kind, {})),
        }
    )
    facts = {
        "format": "pt",
        "ss_v2": str(family == "sd2"),
        **network,
        "modelspec.sai_model_spec": "1.0.1",
        "studio.format_version": FORMAT_VERSION,
    }
    kept = {key: value for key, value in inherited.items() if key not in _NOT_INHERITED}
    if kept.get("modelspec.architecture", "").rpartition("/")[2] != kind:
        # Of a file that was of another kind.
        kept.pop("modelspec.architecture", None)
    wanted = {key: value for key, value in given.items() if key not in _NOT_INHERITED}
    return {**described, **kept, **facts, **wanted}


def hashes(tensors: Mapping[str, object], data: memoryview, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the three hashes of a file's contents.

    Args:
        tensors: The tensors' entries of the header.
        data: Everything that follows the header.
        metadata: The file's other entries; of these only ``ss_*`` counts, and only for the legacy hash.
    """
    digest = hashlib.sha256(data).hexdigest()
    header = encode_header(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    # The legacy hash is of one stretch of the file as it would be with kohya's own entries alone.
    start, end = (max(0, offset - len(header)) for offset in (_LEGACY_OFFSET, _LEGACY_OFFSET + _LEGACY_BYTES))
    stretch = header[_LEGACY_OFFSET : _LEGACY_OFFSET + _LEGACY_BYTES] + bytes(data[start:end])
    return {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(stretch).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }
