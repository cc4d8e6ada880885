"""The guide to the methods says what was measured."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
GUIDE = FOLDER.parents[1] / "docs" / "methods.md"

specification = importlib.util.spec_from_file_location("methods_tables", FOLDER / "methods_tables.py")
tables = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tables)

COURSE = {"steps": 300}


def line(method: str, others: str, *, task: str = "robot") -> dict:
    """Return a line of the results whose other prompts came out right (1) or wrong (0)."""
    right = [letter == "1" for letter in others]
    return {"method": method, "task": task, "seed": 0, "course": COURSE, "others": right}


def test_the_guide_holds_the_tables_that_the_results_give():
    made = tables.tables()
    assert set(made) == {"cost", "methods"}
    text = GUIDE.read_text()
    assert tables.filled(text, made) == text


def test_a_guide_without_the_mark_is_refused():
    with pytest.raises(ValueError, match="'<!-- cost -->'"):
        tables.filled("no table", {"cost": "a table"})


def test_lost_counts_what_was_right_without_the_adapter_only():
    lines = [line("base", "1101"), line("lora", "1010")]
    assert tables.lost(lines[1:], lines) == "2 of 3"


@pytest.mark.parametrize(
    ("sara", "lora", "says"),
    [
        # 2 (1 + 10) / 2^10 = 0.0215, and 2 (1 + 5) / 2^5 = 0.375.
        ("1000000000", "0111111111", "lora keeps more"),
        ("0111111111", "1000000000", "sara keeps more"),
        ("10000", "01111", "no difference"),
        ("1111", "1111", "no difference"),
    ],
)
def test_the_verdict_is_that_of_the_sign_test(sara: str, lora: str, says: str):
    (text,) = tables.verdict([line("sara", sara), line("lora", lora)])
    assert says in text


def test_the_verdict_compares_only_what_both_methods_did():
    lines = [line("sara", "11"), line("lora", "11"), line("lora", "00", task="koala")]
    assert "Of 2 pairs of pictures of other things (1 tasks)" in tables.verdict(lines)[0]


def test_there_is_no_verdict_on_what_was_not_measured():
    assert tables.verdict([line("sara", "11")]) == []
