"""What a prompt asks for beside its words, as fields of its specification: adapters and kohya's settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from studio.errors import SpecError, UsageError
from studio.models.prompt_syntax import AdapterTag, read_emphasis, take_flags, take_tags
from studio.registry import nearest
from studio.specs import GenerateSpec, parse_spec
from studio.workspace import workspace

S = TypeVar("S", bound=GenerateSpec)


def settled(spec: S) -> S:
    """Return a specification whose prompt holds words and emphasis only.

    ``<lora:name:0.8>`` becomes an adapter, ``--s 30`` at the end the steps, and so on; what the prompt says
    wins. A raw prompt stays as it is.

    Raises:
        SpecError: If what a prompt asks for is not known, not found or has a wrong value.
    """
    if spec.raw_prompt:
        return spec
    try:
        words, settings = take_flags(spec.prompt)
        prompt, tags = take_tags(words)
        negative = settings.get("negative_prompt", spec.negative_prompt)
        if take_tags(negative)[1]:
            raise UsageError(
                "adapters are named in the prompt, not in the negative prompt. To steer away from what one "
                "draws, use the plan modifier 'negative'."
            )
        read_emphasis(prompt), read_emphasis(negative)
        uses = adapters_of(tags, spec)
    except UsageError as error:
        raise SpecError([f"prompt: {error}"]) from None
    if prompt == spec.prompt and not settings:
        return spec
    values = {name: getattr(spec, name) for name in type(spec).model_fields}
    return parse_spec(
        type(spec), {**values, **settings, "prompt": prompt, "adapters": (*spec.adapters, *uses)}
    )


def adapters_of(tags: Sequence[AdapterTag], spec: GenerateSpec) -> list[str]:
    """Return ``path:weight`` of the files that tags name, from the specification's folder and the workspace.

    Raises:
        UsageError: If there is none or more than one of a name, or it is in use already.
    """
    if not tags:
        return []
    folders = [folder for folder in (spec.adapter_folder, workspace().adapters) if folder is not None]
    known = _files(folders)
    used = {use.path.stem for use in spec.adapters}
    found = []
    for tag in tags:
        path = _file(tag.name, known, folders)
        if path.stem in used:
            raise UsageError(f"the adapter '{path.stem}' is named twice. Leave one out.")
        used.add(path.stem)
        weights = tag.weight if tag.text_weight is None else f"unet={tag.weight}:te={tag.text_weight}"
        found.append(f"{path}:{weights}")
    return found


def _files(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Return adapter files by each name they answer to: alone, and with the folders they lie in.

    Of the same name in several of the folders the first folder's counts.
    """
    known: dict[str, list[Path]] = {}
    for folder in folders:
        here: dict[str, list[Path]] = {}
        exact: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*.safetensors")):
            exact[path.relative_to(folder).with_suffix("").as_posix()] = [path]
            here.setdefault(path.stem, []).append(path)
        # One at the top is meant by its name alone, whatever lies in folders below.
        known = {**here, **exact, **known}
    return known


def _file(name: str, known: dict[str, list[Path]], folders: Sequence[Path]) -> Path:
    paths = known.get(name.removesuffix(".safetensors"), [])
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise UsageError(
            f"several adapters are called '{name}': {', '.join(map(str, paths))}. Name the folder, too, as "
            f"in <lora:{paths[0].parent.name}/{paths[0].stem}:1>."
        )
    raise UsageError(
        f"there is no adapter '{name}' in {' or '.join(map(str, folders))}.{nearest(name, list(known))} Put "
        "it there, or give its folder with --adapter-folder."
    )
