import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from lit_rebasin.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "symmetries.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """Run the page from top to bottom, and hold what each block prints to the comments at the start of a line."""
    found = {"__name__": "page"}
    for block in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "symmetries.md", "exec"), found)
        assert printed.getvalue().splitlines() == re.findall(r"^# (.*)", block, re.MULTILINE)
    return found


def test_code_of_the_page_prints_what_it_says(names):
    assert len(BLOCKS) == 7
    assert names["after"].coverage(names["sparse"]) > 0.9


def test_table_of_axes_is_true(names):
    rows = re.findall(
        r"^\| `([\w.]+)\[(\d)\]`(?: in group (\d))? \| (\d+), (\d+), (\d+)(?:, from `start` (\d+))? \|", PAGE, re.M
    )
    assert len(rows) == 4
    groups = list(names["spec"].groups.values())
    for tensor, dim, number, *layout, start in rows:
        group = groups[int(number or 1) - 1]
        (axis,) = (axis for axis in group.axes if (axis.tensor, axis.dim) == (tensor, int(dim)))
        assert [axis.before, group.size, axis.after] == [int(n) for n in layout]
        assert axis.start == int(start or 0)


def test_command_of_the_page_draws_its_picture(tmp_path, monkeypatch):
    (command,) = re.findall(r"```bash\nlit-rebasin (.*)\n```", PAGE)
    (tmp_path / "small.py").write_text(BLOCKS[0])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "symmetries.png").read_bytes().startswith(b"\x89PNG")
