"""The renders are exact functions of what they show, and every style and background can be told apart."""

import random

import numpy as np
import pytest

from studio.assets.builder.captions import caption
from studio.assets.builder.dataset import render_many
from studio.assets.builder.render import Placement, random_placement, render
from studio.assets.builder.sprites import SPRITES
from studio.assets.builder.subjects import (
    ALL_BACKGROUNDS,
    ALL_STYLES,
    ALL_SUBJECTS,
    BACKGROUNDS,
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_STYLES,
    HELD_OUT_SUBJECTS,
    STYLES,
    SUBJECTS,
)


def test_every_subject_has_a_committed_sprite() -> None:
    assert {path.stem for path in SPRITES.glob("*.png")} == {subject.name for subject in ALL_SUBJECTS}


def test_enough_is_trained_and_enough_is_held_out() -> None:
    assert len(SUBJECTS) >= 24 and len(STYLES) >= 4 and len(BACKGROUNDS) >= 6
    assert len(HELD_OUT_SUBJECTS) >= 4 and len(HELD_OUT_STYLES) >= 2 and len(HELD_OUT_BACKGROUNDS) >= 2


@pytest.mark.parametrize("style", ALL_STYLES)
def test_the_same_request_gives_the_same_pixels(style: str) -> None:
    placement = random_placement(random.Random(3))
    first = render("fox", style, "blue", placement=placement)
    assert first.size == (64, 64)
    assert first.tobytes() == render("fox", style, "blue", placement=placement).tobytes()


def test_pictures_of_all_styles_differ() -> None:
    pictures = {render("owl", style, "red").tobytes() for style in ALL_STYLES}
    assert len(pictures) == len(ALL_STYLES)


def test_the_corner_of_a_plain_picture_is_the_background() -> None:
    for name, colour in ALL_BACKGROUNDS.items():
        assert render("apple", "plain", name).getpixel((0, 0)) == colour


def test_mirror_mirrors() -> None:
    plain = np.asarray(render("rocket", "plain", "white", placement=Placement(scale=0.75)))
    mirrored = np.asarray(render("rocket", "plain", "white", placement=Placement(scale=0.75, mirror=True)))
    assert np.abs(plain[:, ::-1].astype(int) - mirrored).mean() < 2  # resampling may round differently
    assert np.abs(plain.astype(int) - mirrored).mean() > 5


def test_renders_do_not_depend_on_the_number_of_workers() -> None:
    one, two = (render_many(600, seed=4, size=16, workers=workers) for workers in (1, 2))
    assert (one.pixels == two.pixels).all() and one.captions == two.captions


def test_training_renders_hold_nothing_that_is_held_out() -> None:
    labels = render_many(600, seed=5, size=16, workers=1).labels
    assert (labels.max(0).values.tolist()) == [len(SUBJECTS) - 1, len(STYLES) - 1, len(BACKGROUNDS) - 1]


@pytest.mark.parametrize("style", STYLES)
def test_a_caption_names_subject_and_background(style: str) -> None:
    rng = random.Random(1)
    for subject in SUBJECTS[:6]:
        for _ in range(20):
            text = caption(subject, style, "green", rng, strangers=("sks",))
            assert any(word in text for word in (subject.name, *subject.synonyms)), text
            assert "green" in text
