"""docs/memory.md says what the command that it names counts."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import memory_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_tables_are_those_that_are_counted() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert memory_table.tables() in text and memory_table.insert(text) == text
