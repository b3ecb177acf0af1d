import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from torch.utils.data import DataLoader, TensorDataset

import lit_rebasin
from lit_rebasin.cli import main
from lit_rebasin.cli.app import ContinualCLI

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIT, FIT_A_TASK, *OTHERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_fits_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(FIT, "README.md", "exec"), names)
    assert names["monitor"].matrix.shape == (5, 5)
    assert names["merge"].n_tasks == 5
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 10, torch.zeros(20, dtype=torch.long))
    names["task_loaders"] = [DataLoader(data, batch_size=10)] * 2
    exec(compile(FIT_A_TASK, "README.md", "exec"), names)
    assert names["merge"].n_tasks == 2


@pytest.mark.parametrize("code", OTHERS, ids=range(len(OTHERS)))
def test_code_of_the_readme_runs_as_it_stands(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", ["align", "merge"])
def test_commands_of_the_readme_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, file in enumerate(("a.ckpt", "b.ckpt")):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18().state_dict(), file)
    np.savez("images.npz", x=np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32), y=np.arange(4))
    (command,) = [line for line in COMMANDS if line.startswith(f"lit-rebasin {name} ")]
    words = shlex.split(command)[1:]
    assert main(words) == 0
    assert (tmp_path / words[-1]).exists()


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
