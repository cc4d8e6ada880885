"""Emphasis, chunk ends, tags and settings are read as the programs that people come from write them."""

import pytest

from studio.errors import UsageError
from studio.models.prompt_syntax import AdapterTag, Piece, read_emphasis, take_flags, take_tags


def weights(prompt: str) -> list[tuple[str, float]]:
    (section,) = read_emphasis(prompt)
    return [(piece.text, round(piece.weight, 4)) for piece in section]


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("", []),
        ("a red fox", [("a red fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("((red)) fox", [("red", 1.21), (" fox", 1)]),
        ("[red] [[fox]]", [("red", 0.9091), (" ", 1), ("fox", 0.8264)]),
        ("(red:1.3) (fox: .5 )", [("red", 1.3), (" ", 1), ("fox", 0.5)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        ("(red:-1) (fox:0)", [("red", -1), (" ", 1), ("fox", 0)]),
        ("fox (red", [("fox ", 1), ("red", 1.1)]),
        ("([red", [("red", 1)]),
        ("fox) red] blue:1.2)", [("fox) red] blue:1.2)", 1)]),
        ("3:4, (a:b)", [("3:4, ", 1), ("a:b", 1.1)]),
        (r"\(red\) \[fox\] \\ \x", [("(red) [fox] \\ x", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
    ],
)  # fmt: skip
def test_brackets_weigh_words_as_in_the_web_ui(prompt: str, read: list[tuple[str, float]]) -> None:
    assert weights(prompt) == read


def test_break_ends_a_section_inside_of_brackets_too() -> None:
    assert read_emphasis("a fox BREAK in (snow BREAK deep:1.2)") == (
        (Piece("a fox"),),
        (Piece("in "), Piece("snow", 1.2)),
        (Piece("deep", 1.2),),
    )
    assert read_emphasis("BREAKFAST break") == ((Piece("BREAKFAST break"),),)


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5] runs", "[cat:10]", "[cat|dog]", "[cat::.3]"])
def test_words_that_change_over_the_steps_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"change over the steps.*write \\\["):
        read_emphasis(prompt)


def test_what_only_looks_like_a_schedule_is_words() -> None:
    assert weights(r"\[cat|dog\] a|b") == [("[cat|dog] a|b", 1)]


def test_a_weight_that_is_no_number_is_named() -> None:
    with pytest.raises(UsageError, match=r"'1\.2\.3' is no number"):
        read_emphasis("a (fox:1.2.3)")


def test_tags_are_taken_out_of_the_words() -> None:
    assert take_tags("a <lora:ink:0.8> fox, <lora:sub/dog><lyco: a b :-1>") == (
        "a fox,",
        (AdapterTag("ink", 0.8), AdapterTag("sub/dog", 1.0), AdapterTag("a b", -1.0)),
    )
    assert take_tags("a  <dog>") == ("a  <dog>", ())
    assert take_tags("<lora:ink:te=0.5:unet=.8>") == ("", (AdapterTag("ink", 0.8, 0.5),))


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("<lora:x:0.8:0.5>", r"got '0\.8:0\.5'. Write <lora:x:0.8> or <lora:x:unet=0.8:te=0.5>"),
        ("<lora:x:te=0.5>", "got 'te=0.5'"),
        ("<lora:x:0.8:te=0.5>", "got '0.8:te=0.5'"),
        ("<lora:x:unet=0.8:te=y>", "got 'unet=0.8:te=y'"),
        ("<lora::1>", "names no adapter"),
        ("<hypernet:x:1>", "hypernetworks are not read"),
    ],
)
def test_tags_that_mean_nothing_here_are_refused(prompt: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        take_tags(prompt)


def test_settings_are_taken_off_a_line() -> None:
    assert take_flags("a fox -- red --n bad, ugly --w 512 --h 768 --d 7 --S 20 --l 7.5") == (
        "a fox -- red",
        {
            "negative_prompt": "bad, ugly",
            "width": "512",
            "height": "768",
            "seed": "7",
            "steps": "20",
            "guidance_scale": "7.5",
        },
    )
    assert take_flags("a  fox--w 5 ") == ("a  fox--w 5 ", {})


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("a fox --x 5", r"'--x' in a prompt is not known. Known: --n \(negative_prompt\)"),
        ("a fox --w 5 --w 6", "'--w' stands twice"),
        ("a fox --w", "'--w' in a prompt has no value"),
    ],
)
def test_settings_that_mean_nothing_are_refused(line: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        take_flags(line)
