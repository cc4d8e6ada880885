"""Prompt embeddings of weighted words and of prompts of any length, by the pipeline's own ``encode_prompt``.

A prompt is cut into chunks of as many tokens as the text encoder reads, start and end included (75 + 2 for
CLIP). Each is encoded alone and their embeddings follow one another. All prompts of a call, positive and
negative, get as many chunks, empty ones at the end. What is pooled (SDXL) is that of the first chunk. A chunk
that is too long ends at its last comma if that is at most 20 tokens back. So does A1111, and ComfyUI but for
the comma.

A word's embeddings are multiplied by its weight, and nothing else is changed (A1111's emphasis "No norm"):

    e'_t = w_t e_t

A1111's default then multiplies all by mean(e) / mean(e'). Such means lie near 0, so that factor can be huge
or negative, and the words that are not weighted would depend on those that are.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studio.errors import UsageError
from studio.models.prompt_syntax import Piece, Section, read_emphasis
from studio.models.prompts import tokens_read
from studio.models.shadow import shadowed
from studio.models.tokens import text_encoders, tokenizer_of

_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_COMMA_BACK = 20  # tokens, as in A1111


@dataclass(frozen=True)
class Chunk:
    """Tokens of one pass of the text encoder, start and end left out, and their weights."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def factors(self, length: int) -> list[float]:
        """Return the weight of each of ``length`` tokens, with start, end and padding."""
        return [1.0, *self.weights] + [1.0] * (length - 1 - len(self.weights))


class PromptEncoder:
    """Takes the place of a pipeline's ``encode_prompt`` and reads what `prompt_syntax` describes.

    Prompts of one chunk without weights are encoded by the pipeline as they are, to the same bits.

    Args:
        pipe: The pipeline.
        raw: Take brackets, backslashes and BREAK as characters.
        max_tokens: The most tokens of a prompt that are read, start and end not counted; None for all.
    """

    def __init__(self, pipe: Any, *, raw: bool = False, max_tokens: int | None = None) -> None:
        self._pipe, self._raw, self._max_tokens = pipe, raw, max_tokens
        self._encode: Callable[..., Any] = pipe.encode_prompt
        self.__signature__ = inspect.signature(self._encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``encode_prompt`` returns.

        Raises:
            UsageError: If the syntax of a prompt is wrong, or it needs what given embeddings do not have.
        """
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments.get("prompt") is None:
            return self._encode(**bound.arguments)
        arguments = _as_lists(bound.arguments)
        texts = {name: arguments[name] for name in _TEXTS if arguments.get(name) is not None}
        read = {text: self.sections(text) for each in texts.values() for text in each}
        if all(self._is_plain(sections) for sections in read.values()):
            words = {text: "".join(piece.text for piece in sections[0]) for text, sections in read.items()}
            own = {name: [words[text] for text in each] for name, each in texts.items()}
            return self._encode(**{**arguments, **own})
        if any(arguments.get(name) is not None for name in ("prompt_embeds", "negative_prompt_embeds")):
            raise UsageError(
                "weights, BREAK and prompts of several chunks cannot be mixed with embeddings that were made "
                "elsewhere. Give all prompts as text."
            )
        return self._chunkwise(arguments)

    def sections(self, prompt: str) -> tuple[Section, ...]:
        """Return a prompt's words with their weights.

        Raises:
            UsageError: If its syntax is wrong.
        """
        return ((Piece(prompt),),) if self._raw else read_emphasis(prompt)

    def num_chunks(self, prompt: str) -> int:
        """Return how many chunks a prompt takes alone."""
        sections = self.sections(prompt)
        return max(len(self._chunks(component, sections)) for component in text_encoders(self._pipe))

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, start and end not counted, whatever is read of it."""
        return self._num_tokens(self.sections(prompt))

    def num_rows(self, prompt: str) -> int:
        """Return how many rows of its embedding stand before the padding of its last chunk."""
        component = next(iter(text_encoders(self._pipe)))
        chunks = self._chunks(component, self.sections(prompt))
        return (len(chunks) - 1) * tokens_read(self._pipe, component) + len(chunks[-1].ids) + 2

    def _is_plain(self, sections: Sequence[Section]) -> bool:
        return (
            len(sections) == 1
            and all(piece.weight == 1 for piece in sections[0])
            and all(len(self._chunks(component, sections)) == 1 for component in text_encoders(self._pipe))
            and (self._max_tokens is None or self._num_tokens(sections) <= self._max_tokens)
        )

    def _num_tokens(self, sections: Sequence[Section]) -> int:
        return max(
            sum(map(len, self._tokens(tokenizer_of(self._pipe, component), sections)))
            for component in text_encoders(self._pipe)
        )

    def _chunkwise(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Encode chunk after chunk, put their embeddings together and weigh them."""
        if not arguments["do_classifier_free_guidance"]:
            arguments |= {name: None for name in arguments if name in _TEXTS and "negative" in name}
        elif arguments["negative_prompt"] is None and not self._gives_zeros:
            arguments["negative_prompt"] = [""] * len(arguments["prompt"])
        texts = {name: arguments[name] for name in _TEXTS if arguments.get(name) is not None}
        rows = {
            text: row for row, text in enumerate({text: None for each in texts.values() for text in each})
        }
        numbered = {name: [str(rows[text]) for text in each] for name, each in texts.items()}
        chunks = {
            name: [self._chunks(name, self.sections(text)) for text in rows]
            for name in text_encoders(self._pipe)
        }
        count = max(len(each) for known in chunks.values() for each in known)
        for each in (each for known in chunks.values() for each in known):
            each.extend([Chunk()] * (count - len(each)))
        parts = [self._encoded({**arguments, **numbered}, chunks, place) for place in range(count)]
        found = [
            None if each[0] is None else torch.cat(each, dim=1) for each in list(zip(*parts, strict=True))[:2]
        ]
        for place, kind in enumerate(("prompt", "negative_prompt")):
            # One that is not given is embedded as zeros, or not at all.
            embeddings = found[place]
            if kind in texts and embeddings is not None:
                spoken = (texts[kind], texts.get(f"{kind}_2", texts[kind]))
                found[place] = self._weighed(
                    embeddings,
                    [
                        [known[rows[text]] for text in each]
                        for known, each in zip(chunks.values(), spoken, strict=False)
                    ],
                )
        # Of what is pooled that of the first chunk.
        return (*found, *parts[0][2:])

    def _encoded(
        self, arguments: Mapping[str, Any], chunks: Mapping[str, Sequence[Sequence[Chunk]]], place: int
    ) -> Any:
        """Return what the pipeline makes of one chunk of prompts that are given as their numbers."""
        readers = {
            component.replace("text_encoder", "tokenizer"): _Reader(
                tokenizer_of(self._pipe, component),
                [each[place] for each in known],
                tokens_read(self._pipe, component),
            )
            for component, known in chunks.items()
        }
        with shadowed(self._pipe, readers):
            return self._encode(**arguments)

    @property
    def _gives_zeros(self) -> bool:
        """Whether a negative prompt that is not given is embedded as zeros."""
        return bool(self._pipe.config.get("force_zeros_for_empty_prompt", False))

    def _weighed(self, embeddings: Tensor, chunks: Sequence[Sequence[Sequence[Chunk]]]) -> Tensor:
        """Return embeddings ``[B * n, tokens, width]``, each token's multiplied by its weight, rounded once.

        Args:
            embeddings: Those of each prompt n times in a row; encoders side by side.
            chunks: By encoder and prompt.
        """
        factors = []
        for (name, encoder), prompts in zip(text_encoders(self._pipe).items(), chunks, strict=True):
            length = tokens_read(self._pipe, name)
            rows = [[weight for chunk in prompt for weight in chunk.factors(length)] for prompt in prompts]
            factors.append(torch.tensor(rows)[..., None].expand(-1, -1, encoder.config.hidden_size))
        together = torch.cat(factors, dim=-1).to(embeddings.device)
        repeated = together.repeat_interleave(len(embeddings) // len(together), dim=0)
        return (embeddings.float() * repeated).to(embeddings.dtype)

    def _chunks(self, component: str, sections: Sequence[Section]) -> list[Chunk]:
        tokenizer = tokenizer_of(self._pipe, component)
        size = tokens_read(self._pipe, component) - 2
        comma = _ids(self._pipe, tokenizer, ",")[-1]
        followers = _followers(tokenizer)
        found, room = [], self._max_tokens
        for tokens in self._tokens(tokenizer, sections):
            if room is not None:
                tokens = tokens[: _whole(tokens, room, followers)]
                room -= len(tokens)
            found += _cut(tokens, size, comma, followers)
        return found

    def _tokens(self, tokenizer: Any, sections: Sequence[Section]) -> list[list[tuple[int, float]]]:
        """Return the tokens of each section with their weights."""
        return [
            [(token, piece.weight) for piece in section for token in _ids(self._pipe, tokenizer, piece.text)]
            for section in sections
        ]


class _Reader:
    """Stands for a tokenizer while its pipeline encodes chunks: reads their numbers, gives their tokens."""

    def __init__(self, tokenizer: Any, chunks: Sequence[Chunk], length: int) -> None:
        self._tokenizer = tokenizer
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        rows = [[start, *chunk.ids, end] for chunk in chunks]
        self._ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows])
        self._mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])

    def __call__(self, texts: Sequence[str], **_: Any) -> Any:
        from transformers import BatchEncoding

        rows = [int(text) for text in texts]
        return BatchEncoding({"input_ids": self._ids[rows], "attention_mask": self._mask[rows]})

    def tokenize(self, text: str) -> list[str]:
        """Return no tokens: what is to be written out, is."""
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextmanager
def reading_prompts(pipe: Any, *, raw: bool = False) -> Iterator[PromptEncoder]:
    """Have a pipeline read emphasis, BREAK and prompts of any length for the length of a block.

    Composing inside of it reads the same in every prompt.

    Args:
        pipe: A pipeline of SD 1.x, SD 2.x or SDXL.
        raw: Take brackets, backslashes and BREAK as characters; long prompts are read all the same.

    Example:
        with studio.reading_prompts(pipe), studio.compose(pipe, {"dog": dog}):
            image = pipe("a (red:1.3) dog").images[0]
    """
    encoder = PromptEncoder(pipe, raw=raw)
    with shadowed(pipe, {"encode_prompt": encoder}):
        yield encoder


def _as_lists(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with every text as a list, one for each prompt."""
    prompts = arguments["prompt"]
    count = 1 if isinstance(prompts, str) else len(prompts)
    return {
        name: [value] * count if name in _TEXTS and isinstance(value, str) else value
        for name, value in arguments.items()
    }


def _ids(pipe: Any, tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens, new ones of several vectors written out."""
    expanded = pipe.maybe_convert_prompt(text, tokenizer) if _followers(tokenizer) else text
    ids: list[int] = tokenizer(expanded, truncation=False, verbose=False, add_special_tokens=False).input_ids
    return ids


def _followers(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that are further vectors of one before them, which no chunk's end may part."""
    added = tokenizer.added_tokens_encoder
    return frozenset(
        number
        for name, number in added.items()
        if name.rpartition("_")[2].isdigit() and name.rpartition("_")[0] in added
    )


def _cut(
    tokens: Sequence[tuple[int, float]], size: int, comma: int, followers: frozenset[int]
) -> list[Chunk]:
    """Return tokens in chunks of at most ``size``; at least one, which may be empty."""
    found = []
    start = 0
    while len(tokens) - start > size:
        end = start + size
        commas = [
            place for place in range(end - _COMMA_BACK, end) if place >= start and tokens[place][0] == comma
        ]
        if commas:
            end = commas[-1] + 1
        end = max(_whole(tokens, end, followers), start + 1)
        found.append(tokens[start:end])
        start = end
    return [
        Chunk(tuple(token for token, _ in part), tuple(weight for _, weight in part))
        for part in (*found, tokens[start:])
    ]


def _whole(tokens: Sequence[tuple[int, float]], end: int, followers: frozenset[int]) -> int:
    """Return the end of the tokens before a place without one whose further vectors lie behind it."""
    while 0 < end < len(tokens) and tokens[end][0] in followers:
        end -= 1
    return min(end, len(tokens))
