"""Whether a prompt fits the text encoders, told before anything is cut."""

from typing import Any

from studio.errors import UsageError


def check_prompt(pipe: Any, text: str) -> None:
    """Return if every tokenizer of the pipeline takes the whole text.

    Raises:
        UsageError: If the text is too long; says how many tokens it has, the limit, and the words that would
            be lost.
    """
    problems: dict[str, None] = {}
    for suffix in ("", "_2"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        if tokenizer is None:
            continue
        added = tokenizer.added_tokens_encoder
        # A trained token with several vectors ("<dog>", "<dog>_1") counts as many; the pipeline writes them
        # out.
        expanded = (
            pipe.maybe_convert_prompt(text, tokenizer)
            if any(f"{name}_1" in added for name in added)
            else text
        )
        problem = _problem(tokenizer, expanded, tokens_read(pipe, f"text_encoder{suffix}"))
        if problem:
            problems[problem] = None
    if problems:
        raise UsageError("\n".join(problems))


def tokens_read(pipe: Any, component: str) -> int:
    """Return how many tokens a text encoder reads at once, start and end included."""
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
    limits = [int(tokenizer.model_max_length)]
    encoder = getattr(pipe, component, None)
    if encoder is not None:
        limits.append(int(encoder.config.max_position_embeddings))
    return min(limits)


def _problem(tokenizer: Any, text: str, limit: int) -> str | None:
    tokens = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(tokens) <= limit:
        return None
    return (
        f"the prompt has {len(tokens)} tokens (start and end included), the base model takes {limit}: "
        f'"{_lost(tokenizer, text, limit - 2)}" would be lost. Shorten the prompt by {len(tokens) - limit} '
        "tokens."
    )


def _lost(tokenizer: Any, text: str, kept: int) -> str:
    """Return the text from the first word of which a token would be lost."""
    if not getattr(tokenizer, "is_fast", False):
        tokens = tokenizer(text, truncation=False, verbose=False, add_special_tokens=False).input_ids
        return str(tokenizer.decode(tokens[kept:])).strip()
    places = tokenizer(
        text, truncation=False, verbose=False, add_special_tokens=False, return_offsets_mapping=True
    ).offset_mapping
    start = places[kept][0]
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    return text[start:].strip()
