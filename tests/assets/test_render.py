"""The renders are exact functions of what they show, and every style and background can be told apart."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from studio.assets.builder.captions import caption
from studio.assets.builder.dataset import frame, render_many, texture_many
from studio.assets.builder.render import Placement, random_placement, render
from studio.assets.builder.sprites import SPRITES
from studio.assets.builder.subjects import DRAFT, FULL, VOCABULARIES, Vocabulary


def test_every_subject_has_a_committed_sprite() -> None:
    assert {path.stem for path in SPRITES.glob("*.png")} == {subject.name for subject in FULL.all_subjects}
    assert sum(path.stat().st_size for path in SPRITES.glob("*.png")) < 2_000_000


def test_enough_is_trained_and_enough_is_held_out() -> None:
    words = FULL
    assert len(words.subjects) >= 80 and len(words.styles) >= 6 and len(words.backgrounds) >= 8
    assert len(words.held_out_subjects) >= 12
    assert len(words.held_out_styles) >= 3 and len(words.held_out_backgrounds) >= 2


@pytest.mark.parametrize("words", VOCABULARIES.values(), ids=lambda words: words.name)
def test_what_is_held_out_is_not_trained_and_every_word_names_one_thing(words: Vocabulary) -> None:
    names = [name for subject in words.all_subjects for name in (subject.name, *subject.synonyms)]
    assert len(names) == len(set(names))
    assert not set(words.styles) & set(words.held_out_styles)
    assert not set(words.backgrounds) & set(words.held_out_backgrounds)


def test_the_full_vocabulary_holds_the_drafts() -> None:
    assert set(DRAFT.subjects) < set(FULL.subjects) and set(DRAFT.styles) < set(FULL.styles)
    assert set(DRAFT.held_out_subjects) < set(FULL.held_out_subjects)
    assert DRAFT.all_backgrounds.items() < FULL.all_backgrounds.items()


def test_some_pairs_are_held_out_but_every_subject_is_shown_plain_and_in_all_styles_but_one() -> None:
    held = FULL.held_out_pairs
    assert len(held) >= 24 and set(held).isdisjoint(FULL.shown_pairs)
    assert len(held) + len(FULL.shown_pairs) == len(FULL.subjects) * len(FULL.styles)
    assert {style for _, style in held} == set(FULL.styles) - {"plain"}
    assert max([subject for subject, _ in held].count(subject) for subject in FULL.subjects) == 1


@pytest.mark.parametrize("style", FULL.all_styles)
def test_the_same_request_gives_the_same_pixels(style: str) -> None:
    placement = random_placement(random.Random(3))
    first = render("fox", style, "blue", placement=placement)
    assert first.size == (128, 128)
    assert first.tobytes() == render("fox", style, "blue", placement=placement).tobytes()


def test_an_aligned_subject_is_the_same_patches_wherever_it_sits() -> None:
    rng = random.Random(1)
    found: dict[float, set[bytes]] = {}
    places = set()
    for _ in range(200):
        placement = random_placement(rng, cells=16)
        places.add(placement)
        picture = np.asarray(render("fox", "plain", "blue", placement=placement, size=128))
        moved = (-round(shift * 128) for shift in (placement.dy, placement.dx))
        centred = np.roll(picture, tuple(moved), axis=(0, 1))
        found.setdefault(placement.scale, set()).add(centred.tobytes())
        blue = np.array(FULL.backgrounds["blue"])
        assert all(
            (edge == blue).all() for edge in (picture[:8], picture[-8:], picture[:, :8], picture[:, -8:])
        )
    assert {len(patches) for patches in found.values()} == {1}
    assert set(found) == {0.875, 0.75}
    assert len(places) == 1 + 9 and not any(place.mirror for place in places)


def test_pictures_of_all_styles_differ() -> None:
    pictures = {render("owl", style, "red").tobytes() for style in FULL.all_styles}
    assert len(pictures) == len(FULL.all_styles)


def test_the_corner_of_a_plain_picture_is_the_background() -> None:
    for name, colour in FULL.all_backgrounds.items():
        assert render("apple", "plain", name).getpixel((0, 0)) == colour


def test_mirror_mirrors() -> None:
    plain = np.asarray(render("rocket", "plain", "white", placement=Placement(scale=0.75)))
    mirrored = np.asarray(render("rocket", "plain", "white", placement=Placement(scale=0.75, mirror=True)))
    assert np.abs(plain[:, ::-1].astype(int) - mirrored).mean() < 2  # resampling may round differently
    assert np.abs(plain.astype(int) - mirrored).mean() > 5


def test_renders_do_not_depend_on_the_number_of_workers() -> None:
    one, two = (render_many(520, seed=4, size=16, workers=workers) for workers in (1, 2))
    assert (one.pixels == two.pixels).all() and (one.labels == two.labels).all()


def test_training_renders_hold_nothing_that_is_held_out() -> None:
    renders = render_many(900, seed=5, size=16, vocabulary=FULL, workers=1)
    counts = torch.tensor([len(FULL.subjects), len(FULL.styles), len(FULL.backgrounds)])
    assert (renders.labels < counts).all() and (renders.labels.max(0).values == counts - 1).all()
    shown = {(FULL.subjects[s], FULL.styles[t]) for s, t, _ in renders.labels.tolist()}
    assert shown <= set(FULL.shown_pairs)
    assert (renders.time_ids == torch.tensor([16, 16, 0, 0, 16, 16])).all()


def test_the_evaluators_renders_hold_everything() -> None:
    labels = render_many(900, seed=5, size=16, vocabulary=FULL, held_out=True, workers=1).labels
    wanted = (FULL.all_subjects, FULL.all_styles, FULL.all_backgrounds)
    assert labels.max(0).values.tolist() == [len(names) - 1 for names in wanted]
    shown = {(FULL.all_subjects[s], FULL.all_styles[t]) for s, t, _ in labels.tolist()}
    assert shown & set(FULL.held_out_pairs)


def test_time_ids_are_true_of_framed_pictures() -> None:
    def ramp(size: int) -> Image.Image:
        return Image.fromarray(np.tile(np.arange(size, dtype=np.uint8), (size, 1))).convert("RGB")

    seen = set()
    for seed in range(60):
        picture, (height, width, top, left, *target) = frame(ramp, random.Random(seed), size=64, cells=16)
        row, column = (np.asarray(picture)[at][..., 0].astype(int) for at in (0, (slice(None), 63)))
        assert target == [64, 64] and picture.size == (64, 64)
        if height < 64:
            assert (top, left) == (0, 0) and row.max() < height == width
            seen.add("small")
        elif (top, left) == (0, 0):
            assert row.tolist() == list(range(64))
            seen.add("whole")
        else:
            # What was cut off at one side is missing at the other: background, here black, is there.
            assert (height - top, width - left) == (64, 64) and (top + left) % 4 == 0 and top * left == 0
            assert row.tolist() == [*range(left, 64), *[0] * left]
            assert left or column.tolist() == [63] * (64 - top) + [0] * top
            seen.add("cut")
    assert seen == {"small", "whole", "cut"}


def test_textures_are_reproducible_and_full_of_detail() -> None:
    first, second = (texture_many(6, seed=3, size=32, workers=1) for _ in range(2))
    assert (first == second).all() and len(set(first.flatten(1).sum(1).tolist())) == 6
    assert first.float().std((1, 2, 3)).min() > 5


@pytest.mark.parametrize("style", FULL.styles)
def test_a_caption_names_subject_and_background(style: str) -> None:
    rng = random.Random(1)
    for subject in FULL.subjects[:6]:
        for _ in range(20):
            text = caption(subject, style, "green", rng, strangers=("sks",))
            assert any(word in text for word in (subject.name, *subject.synonyms)), text
            assert "green" in text
