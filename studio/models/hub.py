"""Base models of the Hugging Face hub: the files that are needed of one, downloaded once."""

import json
from collections.abc import Mapping
from pathlib import Path

from studio.errors import BaseModelError
from studio.models.folder_files import by_part, check_class, check_files, files_in, needed
from studio.specs.events import Event, OnEvent


def fetched(name: str, *, sixteen_bit: bool, on_event: OnEvent) -> Path:
    """Return the folder that holds a hub model here; what it lacks is downloaded.

    Without a network it is what was downloaded before.

    Args:
        name: Such as owner/name.
        sixteen_bit: Whether files of 16 bits are better than others.
        on_event: Told before a download begins.

    Raises:
        BaseModelError: If the hub does not give the model, or it is of another kind.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        index = Path(hf_hub_download(name, "model_index.json"))
        config = json.loads(index.read_text(encoding="utf-8"))
    except Exception as error:
        raise BaseModelError(
            f"base model '{name}' is not a folder here, and the hub did not give it ({first_line(error)}). "
            "Check the spelling and, for a gated model, 'hf auth login'; without a network only models "
            "fetched before can be used."
        ) from error
    check_class(name, config)
    try:
        listed = HfApi().model_info(name, files_metadata=True).siblings or []
    # The libraries below have errors of their own for each way in which there is no network.
    except Exception as error:
        return _complete(name, index.parent, error, sixteen_bit=sixteen_bit)
    sizes = {file.rfilename: file.size for file in listed}
    files = by_part(sizes)
    wanted = set(needed(config, files, check_files(name, config, files, sixteen_bit=sixteen_bit)))
    missing = [path for path in wanted if not (index.parent / path).is_file()]
    if not missing:
        return index.parent
    on_event(Event(kind="message", message=f"Downloading {name} from the hub{_size(sizes, missing)}."))
    try:
        return Path(snapshot_download(name, allow_patterns=sorted(wanted)))
    except Exception as error:
        raise BaseModelError(
            f"the download of '{name}' failed ({first_line(error)}). What came is kept: start it again."
        ) from error


def _complete(name: str, folder: Path, reason: Exception, *, sixteen_bit: bool) -> Path:
    """Return a folder of what was downloaded before if it holds all that is needed."""
    config = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    try:
        check_files(name, config, files_in(folder), sixteen_bit=sixteen_bit)
    except BaseModelError:
        raise BaseModelError(
            f"base model '{name}' is here in part only, and the hub did not give the rest "
            f"({first_line(reason)}). Try again with a network."
        ) from reason
    return folder


def _size(sizes: Mapping[str, int | None], paths: list[str]) -> str:
    known = [size for path in paths if (size := sizes[path]) is not None]
    return f", {sum(known) / 1e9:.1f} GB" if len(known) == len(paths) else ""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
