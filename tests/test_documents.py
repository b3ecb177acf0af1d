import re
from pathlib import Path

import pytest
import yaml

import lit_rebasin
from lit_rebasin.cli.app import ContinualCLI

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_code_of_the_readme_runs_as_it_stands(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(BLOCKS[index], "README.md", "exec"), names)
    if "monitor" in names:
        assert names["monitor"].matrix.shape == (5, 5)
        assert names["merge"].n_tasks == 5


PAGES = [
    "transport.md",
    "merging.md",
    "alignment.md",
    "geodesic.md",
    "connectivity.md",
    "curvature.md",
    "feature_learning.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_prints_what_it_says(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), page, "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        line.removeprefix("# ") for block in blocks for line in block.splitlines() if line.startswith("# ")
    ]


def test_links_of_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_every_public_name_is_in_the_reference_once():
    listed = re.findall(r"auto(?:class|function):: (\w+)", (ROOT / "docs" / "reference.md").read_text())
    assert sorted(listed) == sorted(set(lit_rebasin.__all__) - {"__version__"})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses_for_both_commands(path):
    for command in ("fit", "benchmark"):
        config = ContinualCLI(command, ["--config", str(path)]).config
        assert config.data.benchmark == yaml.safe_load(path.read_text())["data"]["benchmark"]
