import re
import subprocess
import sys
from importlib import import_module

import lightning.pytorch as pl
import pytest
import torch

from lit_rebasin import align, permutation_spec, permute
from lit_rebasin.cli import main
from lit_rebasin.cli.examples import read_examples
from lit_rebasin.merging import LinearPath, loss_barrier

from .networks import MODEL, SHAPE, drawn, examples, loaded, save, save_examples, shuffled, table, tied


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
    before, after = table(shown)["mean squared distance"]
    assert float(before) > 0.001
    assert float(after) == 0
    assert re.search(r"weights: \d+ of 24 neurons in 2 groups moved", shown)


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


def test_what_a_lightning_module_saved_makes_the_network(folder, capsys):
    """All of the saved arguments are the network's own, so they are taken; a word of the command line wins."""
    for name, seed in (("a", 0), ("b", 1)):
        state = drawn(seed, width=7).state_dict()
        saved = {"width": 7, "norm": False, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
        torch.save({"state_dict": state, "hyper_parameters": saved}, f"{name}.ckpt")
    assert main(["align", "a.ckpt", "b.ckpt", *MODEL, *SHAPE]) == 0
    assert "of 14 neurons" in capsys.readouterr().out
    assert main(["align", "a.ckpt", "b.ckpt", *MODEL, *SHAPE, "--model.width", "8"]) == 2
    assert "'0.weight' has shape (7, 6) in it and (8, 6) in the network" in capsys.readouterr().err


LIT = """
import lightning.pytorch as pl
from aligned_by_test import mlp

class Lit(pl.LightningModule):
    def __init__(self, width: int, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.network = mlp(width)

    def forward(self, x):
        return self.network(x)
"""


@pytest.mark.parametrize("words", [["--model", "lit_by_test.Lit"], [*MODEL, "--model.width", "7"]])
def test_checkpoints_of_a_trainer_fit_the_module_and_the_network_in_it(folder, words, monkeypatch, capsys):
    (folder / "lit_by_test.py").write_text(LIT)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "lit_by_test", raising=False)
    reference = drawn(3, width=7)
    for name, state in (("a", shuffled(reference)), ("b", reference.state_dict())):
        module = import_module("lit_by_test").Lit(width=7)
        module.network.load_state_dict(state)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(f"{name}.ckpt")
    assert main(["align", "a.ckpt", "b.ckpt", *words, *SHAPE, "--output", "o.pt"]) == 0
    found = {name.removeprefix("network."): tensor for name, tensor in loaded(folder / "o.pt").items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.state_dict().items())
    sys.modules.pop("lit_by_test")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_types_of_the_file_are_kept(folder, dtype, capsys):
    state = {name: tensor.to(dtype) for name, tensor in drawn(0).state_dict().items()}
    network = drawn(0).to(dtype)
    a, b = save(shuffled(network), folder / "a.pt"), save(state, folder / "b.pt")
    assert main(["align", a, b, *MODEL, *SHAPE, "--output", "out.safetensors"]) == 0
    found = loaded(folder / "out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("weights", {"options.restarts": 2}),
        ("frank-wolfe", {"options.max_steps": 50}),
        ("covariance", {"options.power": 0.5}),
        ("activations", {"options.similarity": "cosine"}),
        ("sinkhorn", {"cost": "l2", "init": "identity", "options.steps": 10}),
        ("straight-through", {"init": "activations", "options.steps": 2}),
        ("identity", {}),
    ],
)
def test_the_command_finds_what_the_function_finds(folder, method, options, capsys):
    """The output is A, moved by the permutations of `align` on the same batches."""
    model, reference = drawn(2), drawn(3)
    a, b = save(model.state_dict(), folder / "a.pt"), save(reference.state_dict(), folder / "b.pt")
    data = save_examples(folder / "d.npz")
    words = ["--data", data, "--seed", "5", "--output", "o.pt", "--method", method]
    words += [f"--{name}={value}" for name, value in options.items()]
    assert main(["align", a, b, *MODEL, *words]) == 0
    given = {name.removeprefix("options."): value for name, value in options.items()}
    spec = permutation_spec(reference, torch.randn(2, 6))
    batches = read_examples(data, 500, torch.float32, 5).batches
    expected = align(model, reference, method=method, spec=spec, data=batches, seed=5, **given)
    moved = permute(model, spec, expected.permutations).state_dict()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in loaded(folder / "o.pt").items())
    assert f"{method}: {expected.moved} of 24 neurons" in capsys.readouterr().out


def test_inputs_without_labels_serve_methods_but_measure_no_barrier(folder, capsys):
    a, b = save(drawn(0).state_dict(), folder / "a.pt"), save(drawn(1).state_dict(), folder / "b.pt")
    data = save_examples(folder / "d.npz", labels=False)
    assert main(["align", a, b, *MODEL, "--data", data, "--method", "covariance"]) == 0
    assert "loss barrier" not in capsys.readouterr().out
    assert not (folder / "path.png").exists()


def test_options_may_stand_anywhere(folder):
    a, b = save(drawn(0).state_dict(), folder / "a.pt"), save(drawn(1).state_dict(), folder / "b.pt")
    words = ["--model.width", "12", a, "--input=2,6", "--options.restarts", "1", b, "--output", "o.pt", *MODEL]
    assert main(["align", *words]) == 0
    assert (folder / "o.pt").exists()


def test_a_network_with_batch_norm_moves_its_statistics(folder):
    reference = drawn(0, norm=True)
    a, b = save(shuffled(reference), folder / "a.pt"), save(reference.state_dict(), folder / "b.pt")
    assert main(["align", a, b, *MODEL, "--model.norm", "true", *SHAPE, "--output", "o.pt"]) == 0
    found = loaded(folder / "o.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize("left_out", ["2", "4"])
def test_tied_weights_may_be_in_a_file_once_and_are_written_under_both_names(folder, left_out):
    network = tied()
    state = {name: t.clone() for name, t in network.state_dict().items() if not name.startswith(left_out)}
    a, b = save(network.state_dict(), folder / "a.pt"), save(state, folder / "b.safetensors")
    words = ["--model", "aligned_by_test.tied", *SHAPE, "--output", "o.safetensors"]
    assert main(["align", a, b, *words]) == 0
    found = loaded(folder / "o.safetensors")
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in network.state_dict().items())


def test_only_the_arguments_of_the_network_are_listed_on_request(folder, capsys):
    assert main(["align", *MODEL, "--help_all"]) == 0
    assert "--model.width" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["align", "merge"])
def test_help_is_light_and_names_only_keys_that_exist(folder, command, capsys):
    check = (
        f"import sys; from lit_rebasin.cli import main; main(['{command}', '--help']); print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False")
    keys = set(re.findall(r"^ --([\w.]+)", shown, re.MULTILINE)) - {"help_all", "model", "model.NAME", "options.NAME"}
    assert {"method", "seed", "figure"} < keys
    for key in keys - {"overwrite"}:
        assert main([command, *MODEL, f"--{key}"]) == 2
        assert f"--{key}: expected one argument" in capsys.readouterr().err


def test_aligning_loads_neither_lightning_nor_avalanche(folder):
    a, b = save(drawn(0).state_dict(), folder / "a.pt"), save(drawn(1).state_dict(), folder / "b.pt")
    words = ["align", a, b, *MODEL, *SHAPE]
    check = f"import sys; from lit_rebasin.cli import main; main({words}); print({{'lightning', 'avalanche'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")
