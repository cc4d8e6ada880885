"""Read checkpoints of SaRA's reference program, which name neither places nor parameters.

They are pickles: ``{"threshold": t, 0: values, 1: values, ...}``. A number counts the UNet's parameters in
their order in the model, the values are those of the entries with ``|w| < t`` in the base, row-major. So a
file means something only beside the very base that it was trained on, in fp32.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.adapters.adapter import Adapter, Change
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.origin import origin_facts
from studio.adapters.parameters import canonical_names, find_parameter
from studio.errors import AdapterError


@torch.no_grad()
def read_reference(path: str | Path, pipe: Any) -> Adapter:
    """Return the sparse changes of a reference checkpoint (``unet.pt``).

    Opened with ``weights_only=True``, which runs no code of the file.

    Args:
        path: The checkpoint.
        pipe: The base that it was trained on, its UNet in fp32.

    Raises:
        AdapterError: If it is no such checkpoint, or the base selects other entries than it holds.
    """
    path = Path(path)
    threshold, values = _content(path)
    names = list(canonical_names({"unet": pipe.unet}))
    if strays := sorted(values.keys() - set(range(len(names)))):
        raise _misfit(path, f"it holds parameter {strays[0]}, the base has {len(names)}")
    changes: dict[str, Change] = {}
    for number, name in enumerate(names):
        weight = find_parameter({"unet": pipe.unet}, name).detach().cpu()
        if weight.dtype != torch.float32:
            raise AdapterError(
                f"{path.name} selects entries by their fp32 values, '{name}' is {weight.dtype}. Load the "
                "base with precision='fp32'."
            )
        places = (weight.flatten().abs() < threshold).nonzero().squeeze(1)
        after = values.get(number, weight.new_empty(0))
        if after.shape != places.shape:
            raise _misfit(
                path, f"of '{name}' it holds {after.numel()} values, the base selects {places.numel()}"
            )
        difference = after.float() - weight.flatten()[places]
        moved = difference.nonzero().squeeze(1)
        if moved.numel():
            changes[name] = SparseChange(places[moved].int(), difference[moved], tuple(weight.shape))
    metadata = {**origin_facts(pipe), "studio.sara": f'{{"threshold": {threshold:g}}}'}
    return Adapter(path.stem, "sparse", changes, metadata=metadata)


def _content(path: Path) -> tuple[float, dict[int, Tensor]]:
    """Return threshold and values by number, checked."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(
            f"{path.name} cannot be read as a checkpoint of SaRA's reference program: {reason[:200]}. Choose "
            "its unet.pt."
        ) from None
    threshold = content.pop("threshold", None) if isinstance(content, dict) else None
    if not isinstance(threshold, float) or not all(
        isinstance(key, int)
        and isinstance(tensor, Tensor)
        and tensor.ndim == 1
        and tensor.is_floating_point()
        for key, tensor in content.items()
    ):
        raise AdapterError(
            f"{path.name} is no checkpoint of SaRA's reference program, a threshold and numbered vectors. "
            "Choose its unet.pt."
        )
    if broken := [key for key, tensor in content.items() if not torch.isfinite(tensor).all()]:
        raise AdapterError(
            f"{path.name} holds NaN or infinite values for parameter {broken[0]}. Train it again."
        )
    return threshold, content


def _misfit(path: Path, what: str) -> AdapterError:
    return AdapterError(
        f"{path.name} does not fit this base: {what}. Choose the base that it was trained on, the same file "
        "in the same precision: these checkpoints find their places by the base's values."
    )
