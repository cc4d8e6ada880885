import pytest

from studio.progress import Progress
from studio.specs import Event


def test_a_run_has_one_bar_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("drawing", print) as show:
        for step in range(1, 6):
            show(Event(kind="progress", step=step, total=5))
        bar = show._bar
        assert (bar.n, bar.desc) == (5, "drawing")
        show(Event(kind="finished"))
    # A bar is drawn at 0 once, when it is made.
    assert capsys.readouterr().err.count("0/5") == 1


def test_another_label_or_total_is_another_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", print) as show:
        show(Event(kind="progress", step=1, total=2))
        show(Event(kind="progress", step=1, total=3))
        show(Event(kind="progress", step=2, total=3, message="drawing"))
    shown = capsys.readouterr().err
    assert "training" in shown and "drawing" in shown and shown.count("0/3") == 2
