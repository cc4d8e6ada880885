from itertools import permutations

import pytest

from studio.assets.builder.subjects import BACKGROUNDS, STYLES, SUBJECTS
from studio.block_probe.prompt_pairs import COMMON_WORDS, STARTER_WORDS, Words, prompt_pairs


@pytest.mark.parametrize("words", [STARTER_WORDS, COMMON_WORDS], ids=["starter", "common"])
def test_pairs_differ_in_one_thing_alone(words: Words) -> None:
    pairs = prompt_pairs(40, words=words, seed=3)
    assert [pair.kind for pair in pairs] == ["content"] * 40 + ["style"] * 40
    for pair in pairs:
        own, other = pair.own, pair.other
        assert (own.subject != other.subject, own.style != other.style) == (
            (True, False) if pair.kind == "content" else (False, True)
        )
        # One and the same wording, but for the thing that differs.
        assert own.prompt.startswith(f"{words.styles[own.style]} a") and own.subject in own.prompt
        rest = [
            scene.prompt.removeprefix(words.styles[scene.style]).partition(scene.subject)[2]
            for scene in (own, other)
        ]
        assert rest[0] == rest[1] and rest[0] in words.endings


def test_both_kinds_have_the_same_seeds_and_another_seed_other_words() -> None:
    pairs, again, others = (prompt_pairs(9, words=STARTER_WORDS, seed=seed) for seed in (5, 5, 6))
    assert [pair.seed for pair in pairs] == [*range(5, 14), *range(5, 14)]
    assert pairs == again
    assert [pair.own for pair in pairs] != [pair.own for pair in others]


def test_every_change_of_style_comes_before_any_comes_twice() -> None:
    pairs = prompt_pairs(60, words=STARTER_WORDS, seed=0)[60:]
    changes = [(pair.own.style, pair.other.style) for pair in pairs]
    assert set(changes[:30]) == set(permutations(STYLES, 2)) and changes[30:] == changes[:30]


def test_the_starters_words_are_what_they_were_taught() -> None:
    assert list(STARTER_WORDS.subjects) == [subject.name for subject in SUBJECTS]
    assert list(STARTER_WORDS.styles) == list(STYLES)
    assert all(any(ground in ending for ending in STARTER_WORDS.endings) for ground in BACKGROUNDS)
