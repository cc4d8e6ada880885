"""Which base an adapter was trained on: written into its file, and compared before it is used."""

from collections.abc import Mapping
from typing import Any

import torch

from studio.errors import AdapterError
from studio.models.fingerprint import fingerprint

_KEY = "studio.base"
# A base may be used in another type than it was trained in, and rounding changes the values that name it;
# ``load_base`` comes to bf16 by way of fp16.
_ROUNDED = {
    f"{_KEY}.fp16": (torch.float16,),
    f"{_KEY}.bf16": (torch.bfloat16,),
    f"{_KEY}.fp16.bf16": (torch.float16, torch.bfloat16),
}


def origin_facts(pipe: Any) -> dict[str, str]:
    """Return metadata that names a base: its fingerprint as it is, and rounded in the ways that are usual."""
    rounded = {key: fingerprint(pipe, dtypes=dtypes) for key, dtypes in _ROUNDED.items()}
    return {_KEY: fingerprint(pipe), **rounded}


def check_origin(metadata: Mapping[str, str], pipe: Any, *, file: str) -> None:
    """Refuse a base that is not the one a file names; a file that names none fits every base.

    Raises:
        AdapterError: If the base is another one; says how to use the file all the same.
    """
    known = {metadata[key] for key in (_KEY, *_ROUNDED) if key in metadata}
    own = origin_facts(pipe)
    if not known or known & set(own.values()):
        return
    named = metadata.get(_KEY, min(known))[:12]
    raise AdapterError(
        f"{file} was trained on another base model: its metadata names {named!r}, this one is "
        f"'{own[_KEY][:12]}'. Choose that base. To add its changes to this one all the same, load it with "
        "any_base=True, or convert it with 'studio convert --any-base'."
    )
