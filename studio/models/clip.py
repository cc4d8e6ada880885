"""How alike pictures and texts are to a CLIP model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from studio.errors import BaseModelError

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipSimilarity:
    """A CLIP model with its processor, in fp32. CLIP, arXiv:2103.00020.

    Args:
        name: Folder or hub id of a transformers CLIP model.
        device: Where it runs.

    Raises:
        BaseModelError: If it cannot be loaded.
    """

    def __init__(self, name: str, *, device: torch.device) -> None:
        from transformers import AutoProcessor, CLIPModel

        try:
            self._model: Any = CLIPModel.from_pretrained(name, use_safetensors=True).to(device).eval()
            self._processor: Any = AutoProcessor.from_pretrained(name)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise BaseModelError(
                f"the CLIP model '{name}' cannot be loaded ({reason}). Give a folder or a hub id of a "
                "transformers CLIP model with its processor, such as openai/clip-vit-large-patch14."
            ) from error
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: "Sequence[Image]", texts: Sequence[str]) -> Tensor:
        """Return the cosine of each picture with its text, ``[N]`` fp32 on the CPU."""
        inputs = self._processor(
            text=list(texts), images=list(pictures), return_tensors="pt", padding=True, truncation=True
        ).to(self._device)
        outputs = self._model(**inputs)
        cosines: Tensor = torch.nn.functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
        return cosines.float().cpu()
