"""New tokens in a pipeline for a while: known to its tokenizers, with embeddings in its text encoders.

Nothing of the pipeline's own is written to: an embedding of ours takes the place of the encoder's and asks it
for the tokens that it knows, and the tokenizer gets the state of a copy of itself that knows the new ones.
Textual inversion, arXiv:2208.01618.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.errors import AdapterError, UsageError

Tokens = Mapping[str, Mapping[str, Tensor]]
"""Embeddings ``[vectors, width]`` by token and text encoder component."""
# transformers takes the pooled output of encoders with this mark where the largest token id stands, which
# would be a new token instead of the end of the text.
_LEGACY_END = 2


class TokenEmbedding(nn.Module):
    """A text encoder's token embedding with further rows.

    Args:
        base_layer: The encoder's own.
        rows: ``[vectors, width]``, floating; becomes the parameter ``new.weight`` in its own type.
        first: Token id of the first row; the others follow.
    """

    def __init__(self, base_layer: nn.Embedding, rows: Tensor, *, first: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.new = nn.Embedding.from_pretrained(rows, freeze=True)
        self._first = first

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings ``[..., width]`` of token ids, in the type of the encoder's own."""
        place = ids - self._first
        known: Tensor = self.base_layer(ids.clamp(max=self.base_layer.num_embeddings - 1))
        added: Tensor = self.new(place.clamp(0, self.new.num_embeddings - 1)).to(known.dtype)
        is_new = (place >= 0) & (place < self.new.num_embeddings)
        return torch.where(is_new[..., None], added, known)


class AddedTokens:
    """New tokens that a pipeline has between ``attach`` and ``detach``, or inside a ``with`` block.

    A token of several vectors is known as ``<t>``, ``<t>_1``, ...; diffusers' pipelines write it out so.

    Args:
        pipe: A pipeline of SD 1.x, SD 2.x or SDXL.
        tokens: What to add; each with an embedding for every text encoder of the pipeline.

    Raises:
        UsageError: If a token exists already or cannot be one.
        AdapterError: If a token lacks an embedding, or one is of another width than the encoder's.
    """

    def __init__(self, pipe: Any, tokens: Tokens) -> None:
        self._pipe = pipe
        self._undo: list[Callable[[], None]] = []
        encoders = text_encoders(pipe)
        check_embeddings(pipe, tokens)
        words = [word for token in tokens for word in _words(token, _vectors(tokens[token]))]
        self._tokenizers: dict[str, Any] = {}
        self.embeddings: dict[str, TokenEmbedding] = {}
        """What is put in the place of the encoders' own, by component."""
        for component, encoder in encoders.items():
            taught = _taught(tokenizer_of(pipe, component), tokens, words)
            rows = torch.cat([tokens[token][component].detach() for token in tokens])
            first = taught.convert_tokens_to_ids(words[0])
            self._tokenizers[component] = taught
            self.embeddings[component] = TokenEmbedding(encoder.get_input_embeddings(), rows, first=first)

    def attach(self) -> None:
        """Make the tokens known."""
        for component, encoder in text_encoders(self._pipe).items():
            tokenizer = tokenizer_of(self._pipe, component)
            self._undo.append(_put_attributes(tokenizer, vars(self._tokenizers[component])))
            own = encoder.get_input_embeddings()
            self.embeddings[component].new.to(own.weight.device)
            encoder.set_input_embeddings(self.embeddings[component])
            self._undo.append(partial(encoder.set_input_embeddings, own))
            for module in encoder.modules():
                if getattr(module, "eos_token_id", None) == _LEGACY_END:
                    self._undo.append(partial(setattr, module, "eos_token_id", _LEGACY_END))
                    module.eos_token_id = tokenizer.eos_token_id

    def detach(self) -> None:
        """Leave tokenizers and encoders as they were; may be called at any time."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take the tokens away for the length of a block."""
        self.detach()
        try:
            yield
        finally:
            self.attach()


def text_encoders(pipe: Any) -> dict[str, Any]:
    """Return a pipeline's text encoders by component, without what torch.compile wraps around them."""
    found = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: getattr(part, "_orig_mod", part) for name, part in found.items() if part is not None}


def tokenizer_of(pipe: Any, component: str) -> Any:
    """Return the tokenizer of a text encoder."""
    return getattr(pipe, component.replace("text_encoder", "tokenizer"))


def _words(token: str, vectors: int) -> list[str]:
    """Return what the vectors of a token are called, as diffusers does."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def _vectors(embeddings: Mapping[str, Tensor]) -> int:
    return len(next(iter(embeddings.values())))


def _taught(tokenizer: Any, tokens: Tokens, words: list[str]) -> Any:
    """Return a copy of a tokenizer that knows the words.

    Raises:
        UsageError: If it knows one already, or does not read a token as one.
    """
    from transformers import AddedToken

    # The copy is asked, too: a tokenizer keeps the length that it last cut texts to.
    taught = copy.deepcopy(tokenizer)
    for word in words:
        if word in taught.get_vocab() or len(taught.tokenize(word)) == 1:
            raise UsageError(
                f"the token '{word}' exists already in the base model's vocabulary. Choose one that it does "
                f"not know, such as '<{word.strip('<>')}-1>'; an embedding file that names no token goes by "
                "its file name, so rename it."
            )
    # Matched as written: CLIP's tokenizer would make a token lower case, and diffusers' pipelines then do not
    # find its spelling in the prompt, and leave all vectors but the first out.
    taught.add_tokens([AddedToken(word, normalized=False) for word in words])
    for token in tokens:
        if taught.tokenize(f"a {token}")[1:] != [token]:
            raise UsageError(
                f"'{token}' cannot be a token: the tokenizer does not read it as one. Choose another, such "
                "as '<dog>'."
            )
    return taught


def _put_attributes(target: Any, attributes: Mapping[str, Any]) -> Callable[[], None]:
    """Give an object other attributes and return what gives it back its own."""
    own = dict(vars(target))

    def put(values: Mapping[str, Any]) -> None:
        vars(target).clear()
        vars(target).update(values)

    put(attributes)
    return lambda: put(own)


def check_embeddings(pipe: Any, tokens: Tokens) -> None:
    """Check that tokens have an embedding for every text encoder, of its width.

    Raises:
        AdapterError: If one does not.
    """
    encoders = text_encoders(pipe)
    for token, embeddings in tokens.items():
        if embeddings.keys() != encoders.keys():
            raise AdapterError(
                f"the token '{token}' has embeddings for {' and '.join(embeddings)}, the base model has "
                f"{' and '.join(encoders)}. Choose the base that it was trained on."
            )
        for component, rows in embeddings.items():
            width = encoders[component].get_input_embeddings().embedding_dim
            if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
                raise AdapterError(
                    f"the token '{token}' has embeddings {list(rows.shape)} for {component}, the base "
                    f"model's are {width} wide. Choose the base that it was trained on."
                )
        if len({len(rows) for rows in embeddings.values()}) > 1:
            raise AdapterError(
                f"the token '{token}' has another number of vectors for each text encoder. Export it again."
            )
