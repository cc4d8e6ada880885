"""docs/composing-cost.md and docs/composing-results.md say what their commands have measured."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import bench_compose
import bench_composition

DOCUMENT = Path(__file__).parents[2] / "docs" / "composing-cost.md"


def test_the_tables_are_those_of_the_results() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    results = json.loads(bench_compose.RESULTS.read_text())
    assert {"random cpu", "random cpu scaling"} <= results.keys()
    assert bench_compose.insert(text, results) == text
    assert bench_compose.methods_table(results["random cpu"]) in text


def test_what_methods_keep_is_that_of_the_results() -> None:
    text = (DOCUMENT.parent / "composing-results.md").read_text(encoding="utf-8")
    assert bench_composition.insert(text, bench_composition.RESULTS) == text
