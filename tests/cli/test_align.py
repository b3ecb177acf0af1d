import re
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from lit_rebasin.cli import main
from lit_rebasin.merging import LinearPath, loss_barrier

from .networks import CODE, MODEL, SHAPE, drawn, save, save_examples, shuffled


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "aligned_by_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("aligned_by_test", None)


def loaded(file):
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    return torch.load(file, weights_only=True)


def table(shown):
    """Return the cells of a printed table by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
def test_a_planted_permutation_is_found_in_every_format(folder, suffix, capsys):
    reference = drawn(0)
    a, b = save(shuffled(reference), folder / f"a{suffix}"), save(reference.state_dict(), folder / f"b{suffix}")
    out = folder / f"aligned{suffix}"
    assert main(["align", a, b, *MODEL, *SHAPE, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    found = loaded(out)
    assert list(found) == list(reference.state_dict()) or suffix == ".safetensors"
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.state_dict().items())
    before, after = table(shown)["squared distance of weights"]
    assert float(before) > 0.001
    assert float(after) == 0
    assert re.search(r"weights: \d+ of 24 neurons in 2 groups moved", shown)


def examples(file):
    arrays = np.load(file)
    return torch.tensor(arrays["x"]).float(), torch.tensor(arrays["y"])


def test_with_labels_the_barrier_is_printed_and_the_path_drawn(folder, capsys):
    reference, twin = drawn(1), drawn(1)
    twin.load_state_dict(shuffled(reference))
    a, b = save(twin.state_dict(), folder / "a.pt"), save(reference.state_dict(), folder / "b.pt")
    file = save_examples(folder / "d.npz")
    assert main(["align", a, b, *MODEL, "--data", file, "--batch_size", "40"]) == 0
    rows = table(capsys.readouterr().out)
    naive = loss_barrier(LinearPath(reference, twin), [examples(file)])
    barrier, aligned = map(float, rows["loss barrier"])
    assert barrier == pytest.approx(naive.barrier, rel=1e-3)
    assert barrier > 0.05
    assert aligned == pytest.approx(0, abs=1e-6)
    assert float(rows["loss area"][0]) == pytest.approx(naive.area, rel=1e-3)
    assert float(rows["accuracy barrier %"][0]) == pytest.approx(100 * naive.accuracy_barrier, abs=0.06)
    assert float(rows["loss of A"][0]) == pytest.approx(float(naive.losses[0]), rel=1e-3)
    assert rows["loss of A"][0] == rows["loss of A"][1] == rows["loss of B"][0]
    assert (folder / "path.png").read_bytes().startswith(b"\x89PNG")
