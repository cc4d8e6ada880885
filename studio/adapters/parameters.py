"""Find parameters of a pipeline by their canonical names, whatever wraps or flattens the modules."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from studio.errors import AdapterError
from studio.models.quantization import weight_shape
from studio.registry import nearest

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# peft keeps the layer that it wraps in the first, torch.compile the module in the second.
_WRAPPERS = ("base_layer", "_orig_mod")


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the adaptable modules of a pipeline by name: the UNet and the text encoders that it has."""
    found = {name: getattr(pipe, name, None) for name in _COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def canonical_names(components: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the canonical name and shape of every parameter; layers that peft added are left out."""
    names = {}
    for component, module in components.items():
        root = f"{component}.text_model" if _flattened(component, module) else component
        for path, parameter in _parameters(module, root):
            names[path] = weight_shape(parameter)
    return names


def find_parameter(components: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    """Return the parameter with a canonical name, the live object itself.

    Args:
        components: Modules by the names that :func:`components_of` gives them.
        name: "unet.<path>.weight", "text_encoder.text_model.<path>.weight"; "text_model." may be missing.

    Raises:
        AdapterError: If there is none; names the most similar parameter.
    """
    component, *path = name.split(".")
    module: nn.Module | None = components.get(component)
    if module is not None and component.startswith("text_encoder"):
        if path[:1] == ["text_model"] and _flattened(component, module):
            path = path[1:]
        elif path[:1] in (["encoder"], ["embeddings"], ["final_layer_norm"]) and not _flattened(
            component, module
        ):
            path = ["text_model", *path]
    for part in path[:-1]:
        if module is None:
            break
        module = _unwrapped(module)._modules.get(part)
    found = _unwrapped(module)._parameters.get(path[-1]) if module is not None and path else None
    if found is None:
        if component not in components:
            raise AdapterError(
                f"the pipeline has no '{component}' for '{name}'; it has {', '.join(components)}."
            )
        raise AdapterError(
            f"the model has no parameter '{name}'.{nearest(name, list(canonical_names(components)))}"
        )
    return found


def _flattened(component: str, module: nn.Module) -> bool:
    """Say whether this is a text encoder without the ``text_model`` child that files name."""
    return component.startswith("text_encoder") and "text_model" not in _unwrapped(module)._modules


def _unwrapped(module: nn.Module) -> nn.Module:
    for wrapper in _WRAPPERS:
        inner = module._modules.get(wrapper)
        if inner is not None:
            return _unwrapped(inner)
    return module


def _parameters(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Parameter]]:
    module = _unwrapped(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{path}.{name}", parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _parameters(child, f"{path}.{name}")
