"""The tables of docs/methods.md, from what ``bench_train_cost`` and ``bench_methods`` measured.

python tests/benchmarks/methods_tables.py --into docs/methods.md
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
COST, METHODS = FOLDER / "train_cost.json", FOLDER / "methods.jsonl"
STYLES = ("neon", "mosaic")
MIB = 2**20
BARS = (
    ("studio sara, 15 %", "time_ratio", 0.75, "floor: both passes, no update"),
    ("studio sara, 15 %", "memory_ratio", 0.65, "floor: both passes, no update"),
    ("studio lora, rank 16", "time_ratio", 0.55, "floor: both passes, frozen"),
    ("studio lora, rank 16", "memory_ratio", 0.40, "floor: both passes, frozen"),
)
"""What was aimed at: provider, figure, at most, and whose figure no method of the kind can be below."""

Line = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def state_bytes(row: Mapping[str, int]) -> int:
    """Return what is kept on the device between steps beside the base, copies to go back to apart."""
    return sum(row[part] for part in ("values", "gradients", "moments", "index"))


def cost_table(facts: Mapping[str, Any]) -> str:
    """Return what a step costs, one row for each provider."""
    head = (
        "provider",
        "CPU s a step (p20 to p80)",
        "time",
        "memory above forward, MiB",
        "memory",
        "trained",
        "state, bytes each",
    )
    rows = []
    for name, row in facts["rows"].items():
        trained = row.get("trained", 0)
        rows.append(
            (
                name,
                f"{row['median_s']:.2f} ({row['p20_s']:.2f} to {row['p80_s']:.2f})",
                f"{row['time_ratio']:.2f}",
                f"{row['peak_above_forward'] / MIB:.0f}",
                f"{row['memory_ratio']:.2f}",
                f"{trained:,}" if trained else "",
                f"{state_bytes(row) / trained:.1f}" if trained else "",
            )
        )
    return "\n\n".join([markdown(head, rows), measured_on(facts), bars_table(facts["rows"])])


def bars_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what was aimed at beside what was measured."""
    made = []
    for name, figure, bar, floor in BARS:
        if name in rows and floor in rows:
            found, least = rows[name][figure], rows[floor][figure]
            kind = figure.removesuffix("_ratio")
            verdict = "met" if found <= bar else "missed" if least <= bar else "missed; below the floor"
            made.append((f"{name}: {kind}", f"{bar:.2f}", f"{found:.2f}", f"{least:.2f}", verdict))
    for name in dict.fromkeys(name for name, *_ in BARS if "sara" in name and name in rows):
        row = rows[name]
        each, index = ((state_bytes(row) - row["index"]) / row["trained"], row["index"] / row["trained"])
        verdict = "met" if each <= 16 and index <= 4 else "missed"
        made.append((f"{name}: bytes a number + index", "16 + 4", f"{each:.1f} + {index:.1f}", "", verdict))
    return markdown(("aim", "at most", "measured", "floor", ""), made)


def measured_on(facts: Mapping[str, Any]) -> str:
    """Return where and with what something was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    # A copy of the sources outside of version control has no commit.
    commit = f" at {facts['commit']}" if facts["commit"] else ""
    return f"Measured {facts['date']}{commit} on {facts['machine']}; {versions}."


def newest(lines: Iterable[Line]) -> list[Line]:
    """Return the last line of each cell."""
    return list({line["cell"]: line for line in lines}.values())


def methods_table(lines: Sequence[Line]) -> str:
    """Return what each method wins and costs, one row each."""
    cells = [line for line in lines if "hits" in line]
    if not cells:
        return "Nothing has been measured yet."
    costs = next((line["rows"] for line in reversed(lines) if "rows" in line), {})
    head = (
        "method",
        "rate",
        "trained",
        "state, KiB",
        "time",
        "memory",
        "robot found",
        "subjects found",
        "styles found",
        "others lost, robot",
        "others lost, all",
        "change, robot",
    )
    rows = []
    for method in dict.fromkeys(line["method"] for line in cells):
        own = [line for line in cells if line["method"] == method]
        robot = [line for line in own if line["task"] == "robot"]
        cost = costs.get(method)
        rows.append(
            (
                method if method != "base" else "no adapter",
                f"{own[0]['learning_rate']:g}" if "learning_rate" in own[0] else "",
                f"{cost['trained']:,}" if cost else "-",
                f"{state_bytes(cost) / 1024:,.0f}" if cost else "-",
                f"{cost['time_ratio']:.2f}" if cost else "-",
                f"{cost['memory_ratio']:.2f}" if cost else "-",
                found(robot),
                found([line for line in own if line["task"] not in STYLES]),
                found([line for line in own if line["task"] in STYLES]),
                lost(robot, lines),
                lost(own, lines),
                f"{sum(line.get('change', 0) for line in robot) / len(robot):.0f}" if robot else "-",
            )
        )
    return "\n\n".join([markdown(head, rows), *verdict(lines), measured_on(cells[-1])])


def found(cells: Sequence[Line]) -> str:
    """Return in how many pictures the evaluator finds what was learned, and of how many tasks."""
    if not cells:
        return "-"
    tasks = len({line["task"] for line in cells})
    hits, pictures = (sum(line[key] for line in cells) for key in ("hits", "pictures"))
    return f"{hits} of {pictures}" + (f" ({tasks} tasks)" if tasks > 1 else "")


def lost(cells: Sequence[Line], lines: Sequence[Line]) -> str:
    """Return how many other prompts came out right without the adapter and come out wrong with it."""
    if not cells:
        return "-"
    pairs = [pair for line in cells for pair in zip(without(line, lines), line["others"], strict=True)]
    return f"{sum(one and not other for one, other in pairs)} of {sum(one for one, _ in pairs)}"


def without(line: Line, lines: Sequence[Line]) -> list[bool]:
    """Return which other prompts come out right without an adapter."""
    right: list[bool] = next(
        one["others"]
        for one in lines
        if one.get("method") == "base" and one["task"] == line["task"] and one["course"] == line["course"]
    )
    return right


def verdict(lines: Sequence[Line], one: str = "sara", other: str = "lora") -> list[str]:
    """Say which of two methods keeps more of the base's other subjects, by the sign test over pairs."""
    of = {(line["method"], line["task"], line["seed"]): line for line in lines if "others" in line}
    shared = [key[1:] for key in of if key[0] == one and (other, *key[1:]) in of]
    pairs = [
        pair
        for key in shared
        for pair in zip(of[one, *key]["others"], of[other, *key]["others"], strict=True)
    ]
    only, only_other = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    apart = only + only_other
    tail = sum(math.comb(apart, number) for number in range(min(only, only_other) + 1)) / 2**apart
    chance = min(1.0, 2 * tail)
    if chance >= 0.05:
        says = f"no difference between {one} and {other} is shown"
    else:
        says = f"{one if only > only_other else other} keeps more of the base's other subjects"
    text = (
        f"Of {len(pairs)} pairs of pictures of other things ({len(shared)} tasks), {only} are right with "
        f"{one} alone and {only_other} with {other} alone (sign test, p = {chance:.2g}): **{says}**, at "
        "these rates."
    )
    return [text] if pairs else []


def tables() -> dict[str, str]:
    """Return each table by the mark under which the guide holds it."""
    made = {}
    if COST.is_file():
        made["cost"] = cost_table(json.loads(COST.read_text()))
    if METHODS.is_file():
        made["methods"] = methods_table(newest(map(json.loads, METHODS.read_text().splitlines())))
    return made


def filled(text: str, made: Mapping[str, str]) -> str:
    """Return a guide with its tables between their marks replaced.

    Raises:
        ValueError: If a mark is missing.
    """
    for mark, table in made.items():
        first, last = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"the guide must hold '{first.strip()}' and '{last}', each once and on a line")
        before, rest = text.split(first)
        text = f"{before}{first}{table}\n{last}{rest.split(last)[1]}"
    return text


def main() -> None:
    """Print the tables, or put them into the guide."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, help="the guide whose tables to replace")
    args = parser.parse_args()
    made = tables()
    if args.into:
        args.into.write_text(filled(args.into.read_text(), made))
    else:
        print("\n\n".join(made.values()))


if __name__ == "__main__":
    main()
