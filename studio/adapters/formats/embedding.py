"""Files of one new token, as other tools read them: ``emb_params`` for SD 1 and 2, ``clip_l`` and ``clip_g``
for SDXL.

Which token it is the tensors do not say: most tools go by the file's name. Ours is in the metadata, too;
diffusers' own files have it as the only key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from studio.registry import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter

TOKEN = "studio.token"
"""Metadata entry that names the token."""
_ONE = "emb_params"
_TWO = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class Embedding:
    """One token with its vectors for each text encoder."""

    bound_to_base = False

    def recognises(self, keys: Collection[str]) -> bool:
        """Say whether these are the keys for SDXL, or one key alone that is no layer's."""
        return set(keys) == set(_TWO.values()) or (len(keys) == 1 and "." not in next(iter(keys)))

    def token(self, keys: Collection[str], metadata: Mapping[str, str], *, stem: str) -> str:
        """Return a file's token: what its metadata says, its only key, or else its stem."""
        key = next(iter(keys))
        return metadata.get(TOKEN, stem if len(keys) > 1 or key == _ONE else key)

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, stem: str
    ) -> tuple[str, dict[str, Tensor]]:
        """Return a file's token and its embeddings ``[vectors, width]`` by text encoder component.

        Args:
            tensors: The file's.
            metadata: The file's.
            stem: Of the file: the token where nothing in it says.

        Raises:
            ValueError: If a tensor is no embedding.
        """
        for key, tensor in tensors.items():
            if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
                raise ValueError(f"'{key}' is {tensor.dtype} {list(tensor.shape)}, vectors were expected")
        # A single vector may be written without the axis for several.
        rows = {key: tensor.reshape(-1, tensor.shape[-1]) for key, tensor in tensors.items()}
        token = self.token(rows, metadata, stem=stem)
        if len(rows) == len(_TWO):
            return token, {component: rows[key] for component, key in _TWO.items()}
        (only,) = rows.values()
        return token, {"text_encoder": only}

    def write(
        self, adapter: Adapter, *, family: str | None, names: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the vectors by key.

        Raises:
            ValueError: If the adapter is anything but one token.
        """
        if adapter.changes or len(adapter.tokens) != 1:
            raise ValueError(
                f"it holds one new token, got {len(adapter.tokens)} and {len(adapter.changes)} changes of "
                "layers; choose kohya for these"
            )
        (embeddings,) = adapter.tokens.values()
        if len(embeddings) == 1:
            return {_ONE: embeddings["text_encoder"]}, 1.0
        return {_TWO[component]: rows for component, rows in embeddings.items()}, 1.0


FORMATS.register("embedding")(Embedding())
