"""Bad inputs of every kind, each tried in a folder of its own."""

import re
import resource

import pytest

from lit_rebasin.cli import main

from . import bad_checkpoints, bad_configurations, bad_data_sets, bad_places, bad_resumed, bad_runs
from .bad_inputs import BENCHMARK, FIT, Place

TABLES = [bad_configurations, bad_checkpoints, bad_resumed, bad_data_sets, bad_runs, bad_places]
ROWS = [row for table in TABLES for row in table.ROWS]
LONGEST = 400  # characters of a sentence


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished fit, a finished benchmark, and one that was stopped in its second task."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, words in {"fit": FIT, "done": BENCHMARK, "cut": BENCHMARK}.items():
        with pytest.MonkeyPatch.context() as patch:
            if kind == "cut":
                patch.setattr("lit_rebasin.cli.benchmark.write_results", _stopped)
            patch.chdir(folder)
            assert main([*words, f"--output_dir={folder / kind}"]) == (1 if kind == "cut" else 0)
    return folder


def _stopped(*_):
    raise RuntimeError("stopped")


@pytest.fixture
def place(folder, runs, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield Place(folder, runs, monkeypatch)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder):
    """Return what lies in a folder: the bytes of files, None for folders."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_bad_input_is_one_sentence_and_changes_nothing(place, row, capsys):
    row.prepare(place)
    before = contents(place.folder)
    code = main([*row.words])
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert code not in (0, None)
    assert "Traceback" not in "".join(lines)
    assert len([line for line in lines if line.startswith("lit-rebasin: error: ")]) == 1
    assert last.startswith("lit-rebasin: error: ")
    assert re.search(row.says, last.removeprefix("lit-rebasin: error: ")), last
    assert len(last) <= LONGEST, last
    after = contents(place.folder)
    assert after.keys() == before.keys()
    assert after == before


def test_every_row_has_a_name_of_its_own():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60
