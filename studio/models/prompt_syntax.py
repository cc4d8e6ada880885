"""What may stand in a prompt beside its words: emphasis, chunk ends, adapters, settings. Text only, no torch.

Emphasis is that of A1111's web UI: ``(x)`` weighs x 1.1 times, ``[x]`` 1 / 1.1 times, ``(x:1.3)`` 1.3 times.
Brackets in brackets multiply. What is not closed ends with the prompt; what closes nothing is a character. A
backslash makes the bracket or backslash behind it a character. ``BREAK`` ends a chunk. Differs: it does so
inside of brackets, too.
"""

import re
from dataclasses import dataclass

from studio.errors import UsageError
from studio.specs.composition import read_weights

EMPHASIS = 1.1
_PARTS = re.compile(r"\\[()\[\]\\]|\\|:\s*[+-]?[.\d]+\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_SCHEDULE = re.compile(r"(?<!\\)\[[^\[\]]*(?:\||:\s*\d*\.?\d+\s*\])[^\[\]]*\]?")
_TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]*)(?::([^<>]*))?>")
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance_scale",
}
"""Fields of a specification by what kohya's sample prompts call them."""


@dataclass(frozen=True)
class Piece:
    """Some words and how much they weigh; 1 is neither more nor less than without emphasis."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]
"""The pieces between two chunk ends that the prompt asks for."""


@dataclass(frozen=True)
class AdapterTag:
    """``<lora:name:weight>`` or ``<lora:name:unet=weight:te=text_weight>``.

    Attributes:
        name: Of the adapter's file.
        weight: The strength, where there are two that in the UNet.
        text_weight: That in the text encoders; None for the same.
    """

    name: str
    weight: float
    text_weight: float | None = None


def read_emphasis(prompt: str) -> tuple[Section, ...]:
    """Return a prompt's words with their weights, section by section.

    Raises:
        UsageError: If a weight is no number, or words are to change over the steps.
    """
    _refuse_schedules(prompt)
    pieces: list[Piece | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [piece and Piece(piece.text, piece.weight * factor) for piece in pieces[start:]]

    for part in _PARTS.findall(prompt):
        if part[0] == "\\":
            pieces.append(Piece(part[1:]))
        elif part in opened:
            opened[part].append(len(pieces))
        elif part[0] == ":" and len(part) > 1 and opened["("]:
            close("(", _number(part[1:-1].strip(), prompt))
        elif part == ")" and opened["("]:
            close("(", EMPHASIS)
        elif part == "]" and opened["["]:
            close("[", 1 / EMPHASIS)
        else:
            for place, words in enumerate(_BREAK.split(part)):
                pieces += [None, Piece(words)] if place else [Piece(words)]
    for bracket, factor in (("(", EMPHASIS), ("[", 1 / EMPHASIS)):
        while opened[bracket]:
            close(bracket, factor)
    return _sections(pieces)


def escaped(text: str) -> str:
    """Return a prompt that is read as this text, brackets and backslashes included."""
    return "".join(f"\\{character}" if character in "()[]\\" else character for character in text)


def take_tags(prompt: str) -> tuple[str, tuple[AdapterTag, ...]]:
    """Return a prompt without its adapter tags, and the tags.

    Raises:
        UsageError: If a tag has no name, no number for a weight, or names a hypernetwork.
    """
    tags = []
    for kind, name, weight in _TAG.findall(prompt):
        if kind == "hypernet":
            raise UsageError(f"'<hypernet:{name}>': hypernetworks are not read. Leave it out.")
        if not name.strip():
            raise UsageError(f"a tag '<{kind}:...>' names no adapter. Write <{kind}:name:0.8>.")
        try:
            tags.append(AdapterTag(name.strip(), *read_weights(weight or "1")))
        except ValueError:
            raise UsageError(
                f"'<{kind}:{name}:{weight}>': the weight is a number, or one for the UNet and one for the "
                f"text encoders by their names, got '{weight}'. Write <{kind}:{name}:0.8> or "
                f"<{kind}:{name}:unet=0.8:te=0.5>."
            ) from None
    return (re.sub(r"\s+", " ", _TAG.sub("", prompt)).strip() if tags else prompt), tuple(tags)


def take_flags(line: str) -> tuple[str, dict[str, str]]:
    """Return the prompt of a line as kohya's sample prompts are written, and its settings by field as text.

    Raises:
        UsageError: If a setting is not known, stands twice or has no value.
    """
    prompt, *settings = _FLAG.split(line)
    found: dict[str, str] = {}
    for setting in settings:
        flag, _, value = setting.strip().partition(" ")
        field = FLAGS.get(flag.lower())
        if field is None:
            known = ", ".join(f"--{name} ({meant})" for name, meant in FLAGS.items())
            raise UsageError(f"'--{flag}' in a prompt is not known. Known: {known}.")
        if field in found:
            raise UsageError(f"'--{flag}' stands twice in a prompt. Leave one out.")
        if not value.strip():
            raise UsageError(f"'--{flag}' in a prompt has no value. Write --{flag} VALUE.")
        found[field] = value.strip()
    return prompt.strip() if settings else line, found


def _refuse_schedules(prompt: str) -> None:
    if found := _SCHEDULE.search(prompt):
        raise UsageError(
            f"'{found[0]}' asks for words that change over the steps, which is not read. Choose one of them, "
            "or write \\[ and \\] for the characters."
        )


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"'{text}' is no number, where the prompt '{prompt}' weighs words. Write it like (words:1.2)."
        ) from None


def _sections(pieces: list[Piece | None]) -> tuple[Section, ...]:
    """Return pieces split at None, without empty ones, neighbours of one weight as one."""
    sections: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1].weight == piece.weight:
            sections[-1][-1] = Piece(sections[-1][-1].text + piece.text, piece.weight)
        elif piece.text:
            sections[-1].append(piece)
    return tuple(tuple(section) for section in sections)
