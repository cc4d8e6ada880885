"""Train the starter's tokenizer: a CLIP-style byte-level BPE of 8,192 entries that can encode any text."""

import json
import pydoc_data.topics
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from studio.assets.builder.captions import caption
from studio.assets.builder.subjects import SHIPPED, Vocabulary

VOCABULARY = 8192
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's rule for cutting text into words, in the regular expressions of the tokenizers library.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def caption_texts(vocabulary: Vocabulary = SHIPPED) -> list[str]:
    """Return captions of every subject in every style on every background, each worded in eight ways.

    Held-out subjects have words too: an adapter's prompt names what it shows.
    """
    rng = random.Random(0)
    return [
        caption(subject, style, ground, rng)
        for _ in range(8)
        for subject in vocabulary.all_subjects
        for style in vocabulary.styles
        for ground in vocabulary.backgrounds
    ]


def prose_texts() -> list[str]:
    """Return English prose that every Python carries: the articles of its ``help``."""
    return [re.sub(r"[^A-Za-z' .,]+", " ", text) for text in pydoc_data.topics.topics.values()]


def stranger_words(count: int, vocabulary: Vocabulary = SHIPPED) -> tuple[str, ...]:
    """Return words of the prose that name nothing in the captions, as stand-ins for unknown words."""
    known = {word for text in caption_texts(vocabulary) for word in text.split()}
    words = sorted({w for text in prose_texts() for w in re.findall(r"[a-z]{3,9}", text)} - known)
    return tuple(random.Random(0).sample(words, min(count, len(words))))


def train_tokenizer(vocabulary: Vocabulary = SHIPPED) -> CLIPTokenizer:
    """Return a trained ``CLIPTokenizer`` with 77 positions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(letters),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(caption_texts(vocabulary) + prose_texts(), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    entries = letters + [letter + "</w>" for letter in letters]
    seen = set(entries)
    kept = []
    for left, right in merges:
        if len(entries) == VOCABULARY - 2:
            break
        kept.append((left, right))
        if left + right not in seen:
            seen.add(left + right)
            entries.append(left + right)
    numbered = {entry: index for index, entry in enumerate([*entries, START, END])}
    return CLIPTokenizer(vocab=numbered, merges=kept, model_max_length=77)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json and, for older readers, vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
