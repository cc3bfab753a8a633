"""What a watched run shows."""

import sys
from types import SimpleNamespace

import pytest

from vestige.training.tracking import Event, notebook
from vestige.training.tracking.notebook import as_table, shown
from vestige.training.tracking.position import Position


def round_event(number: int, step: int, rounds: int = 4, loop: str = "distill") -> Event:
    data = {"loop": loop, "round": number, "rounds": rounds, "step": step, "seconds": 1.0}
    return Event("round", {**data, "agreement": 0.5})


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now[0])
    return now


def test_a_table_tells_terms_agreement_scores_and_warnings():
    position = Position()
    position.follow(round_event(1, 10))
    position.follow(Event("step", {"step": 12, "terms": {"student": {"distance": 0.25}}}))
    position.follow(Event("evaluation", {"step": 12, "scores": {"accuracy": 0.8125}}))
    position.follow(Event("warning", {"message": "a <b> & c"}))
    shown_table = as_table(position)
    for text in ("1 of 4", "distance 0.25", "50.0%", "0.8125", "a &lt;b&gt; &amp; c", "12"):
        assert text in shown_table
    assert "<b>" not in shown_table


class FakeDisplay:
    """IPython.display as far as it is used."""

    def __init__(self):
        self.pages = []

    def HTML(self, text):
        return text

    def display(self, page, display_id):
        assert display_id is True
        self.pages.append(page)
        return SimpleNamespace(update=self.pages.append)


@pytest.fixture
def notebook_display(monkeypatch):
    display = FakeDisplay()
    shell = SimpleNamespace(kernel=object())
    fake = SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    return display


def test_a_notebook_gets_one_table_that_is_updated(notebook_display, clock):
    with shown(None) as (follow,):
        for step in range(100):
            follow(Event("step", {"step": step, "terms": {}}))
            clock[0] += 0.1
        follow(Event("end", {"step": 100, "seconds": 1.0}))
    assert "100" in notebook_display.pages[-1]
    assert 15 < len(notebook_display.pages) < 25, "at most two pages a second"
    with shown(False) as callbacks:
        assert callbacks == ()


def test_ipython_on_a_terminal_is_no_notebook(monkeypatch):
    fake = SimpleNamespace(get_ipython=object)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert not notebook.in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not notebook.in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.in_notebook()


def test_a_bar_is_shown_on_stderr_where_it_is_asked_for(capsys):
    with shown(None) as callbacks:
        assert callbacks == ()  # captured, so no terminal
    with shown(True) as (follow,):
        follow(Event("start", {"resumed": False, "step": 0}))
        follow(round_event(2, 10))
        follow(Event("evaluation", {"step": 10, "scores": {"accuracy": 0.75}}))
        follow(Event("end", {"step": 20, "seconds": 1.0}))
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err
    assert "accuracy 0.75" in err
