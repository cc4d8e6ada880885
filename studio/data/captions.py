"""Captions: read from files, taken apart into tags, and drawn for a sample."""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from studio.data.picture import Picture, Treatment
from studio.errors import DataError

TEXT_SUFFIXES = (".txt", ".caption", ".cap", ".tags", ".prompt")
"""Endings of caption files that a pattern such as ``.*`` is matched with."""

_LETTER = r"[^\W_]"


def caption_file(picture: Path, extension: str) -> Path | None:
    """Return the file beside a picture that holds its caption, or None.

    Args:
        picture: The picture's file.
        extension: Ending of caption files, or a pattern such as ``.*`` for whichever there is.

    Raises:
        DataError: If several match the pattern.
    """
    if not any(letter in extension for letter in "*?["):
        file = picture.with_suffix(extension)
        return file if file.is_file() else None
    matching = [suffix for suffix in TEXT_SUFFIXES if fnmatch.fnmatch(suffix, extension)]
    found = [file for suffix in matching if (file := picture.with_suffix(suffix)).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{picture.name}: several captions, {', '.join(file.name for file in found)}. Remove all but "
            "one, or give one ending as caption_extension (--caption-extension)"
        )
    return found[0] if found else None


def read_caption(file: Path) -> str:
    """Return the text of a caption file as one line.

    Raises:
        DataError: If it is not text.
    """
    try:
        # A byte order mark, as some editors write, is not part of the caption.
        return one_line(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{file.name}: the caption is not UTF-8 text") from None


def one_line(text: str) -> str:
    """Return a text with every run of blanks and line ends as one space."""
    return " ".join(text.split())


def tags(caption: str, separator: str) -> list[str]:
    """Return the parts of a caption between separators, without empty ones."""
    return [tag for part in caption.split(separator) if (tag := part.strip())]


def full_caption(picture: Picture) -> str:
    """Return a picture's caption with the trigger word, nothing shuffled or dropped."""
    return with_trigger(picture.caption, picture.treatment)


def varies(treatment: Treatment) -> bool:
    """Say whether a picture's caption differs from sample to sample, caption dropout apart."""
    return treatment.shuffle_tags or treatment.tag_dropout > 0


def draw_caption(picture: Picture, generator: torch.Generator) -> str:
    """Return the caption of one sample: tags dropped, then shuffled, then the trigger word in front."""
    treatment = picture.treatment
    if not varies(treatment):
        return full_caption(picture)
    found = tags(picture.caption, treatment.tag_separator)
    kept, loose = found[: treatment.keep_tags], found[treatment.keep_tags :]
    # Both are drawn whether used or not, so that one option leaves the choices of the other as they are.
    lots = torch.rand(len(loose), generator=generator, dtype=torch.float64).tolist()
    order: list[int] = torch.randperm(len(loose), generator=generator).tolist()
    places: Iterable[int] = order if treatment.shuffle_tags else range(len(loose))
    kept += [loose[place] for place in places if lots[place] >= treatment.tag_dropout]
    return with_trigger(_joined(kept, treatment), treatment)


def tag_frequency(pictures: Sequence[Picture]) -> Counter[str]:
    """Return how many samples of an epoch hold each tag, the trigger word included."""
    counted: Counter[str] = Counter()
    for picture in pictures:
        for tag in dict.fromkeys(tags(full_caption(picture), picture.treatment.tag_separator)):
            counted[tag] += picture.repeats
    return counted


def with_trigger(caption: str, treatment: Treatment) -> str:
    """Return a caption with the treatment's trigger word in front, unless it holds it already."""
    trigger = treatment.trigger
    if trigger is None or _holds(caption, trigger):
        return caption
    return _joined([trigger, caption], treatment) if caption else trigger


def _holds(caption: str, trigger: str) -> bool:
    """Say whether a caption holds the trigger with its marks, such as ``<``, and not within a longer word.

    Case does not count.
    """
    wanted, text = one_line(trigger.casefold()), one_line(caption.casefold())
    # At a mark nothing longer can begin or end.
    before = rf"(?<!{_LETTER})" if wanted[:1].isalnum() else ""
    after = rf"(?!{_LETTER})" if wanted[-1:].isalnum() else ""
    return re.search(before + re.escape(wanted) + after, text) is not None


def _joined(parts: Sequence[str], treatment: Treatment) -> str:
    return f"{treatment.tag_separator.strip()} ".join(parts)
