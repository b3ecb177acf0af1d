import sys

import pytest

from .networks import CODE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the code of a network in it, and a terminal that is wide enough for every line."""
    (tmp_path / "aligned_by_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("aligned_by_test", None)
