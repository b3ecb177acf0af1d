import shutil
import sys

import pytest

from lit_rebasin.cli import main

from .networks import CODE
from .words import CONFIG, METHODS, STREAM


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the code of a network in it, and a terminal that is wide enough for every line."""
    (tmp_path / "aligned_by_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("aligned_by_test", None)


@pytest.fixture(scope="session")
def benchmarked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = ["--methods", ",".join(METHODS), "--seeds", "3,4", "--output_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit-rebasin", "benchmark", "--merge.options", '{"restarts": 1}', "a b"])
        assert main(["benchmark", "--config", CONFIG, *STREAM, *words]) == 0
    return folder


@pytest.fixture
def copy(benchmarked, tmp_path):
    """The folder of the benchmark, to be damaged."""
    return shutil.copytree(benchmarked, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html"))
