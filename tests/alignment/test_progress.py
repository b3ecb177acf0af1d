import io

import pytest
from rich.console import Console

from lit_rebasin.alignment import progress
from lit_rebasin.alignment.progress import shown


@pytest.mark.parametrize(
    ("patience", "terminal", "seen"), [(0.0, True, True), (60.0, True, False), (0.0, False, False)]
)
def test_a_bar_shows_on_a_terminal_once_it_takes_long(monkeypatch, patience, terminal, seen):
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80)
    assert list(shown(range(5), "Matching", 5, console)) == [0, 1, 2, 3, 4]
    assert ("Matching" in text.getvalue()) == seen
    assert seen or not text.getvalue()


def test_the_bar_goes_when_its_reader_leaves(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    for item in shown(range(5), "Matching", None, console):
        if item == 2:
            break
    assert list(shown(range(2), "Again", 2, console)) == [0, 1]  # rich has one live display at a time


def test_a_search_inside_another_leaves_the_bar_to_it(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    for _ in shown(range(3), "Outer", 3, console):
        assert list(shown(range(2), "Inner", 2, console)) == [0, 1]
    assert "Outer" in text.getvalue()
    assert "Inner" not in text.getvalue()
