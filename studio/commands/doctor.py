"""``studio doctor``."""

from collections.abc import Sequence

from studio.flags import Parser


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Show versions, devices and folders, what is wrong and how to mend it."""
    parser.parse_args(argv)
    from studio.doctor import examine

    marks = {"ok": "  ", "none": "- ", "warn": "! ", "bad": "X "}
    bad = 0
    for finding in examine():
        print(f"{marks[finding.state]}{finding.name:<18} {finding.text}", flush=True)
        if finding.remedy:
            print(f"  {'':<18} mend: {finding.remedy}")
        bad += finding.state == "bad"
    print("everything needed is there" if not bad else f"{bad} thing{'s' * (bad > 1)} to mend, marked X")
    return 1 if bad else 0
