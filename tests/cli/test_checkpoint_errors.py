import argparse
import re

import numpy as np
import pytest
import torch

from lit_rebasin.cli import main

from .networks import MODEL, SHAPE, drawn, save, save_examples

ALIGN = ["align", "a.pt", "b.pt", *MODEL, *SHAPE]
MERGE = ["merge", "a.pt", "b.pt", *MODEL, *SHAPE, "--output", "m.pt"]
THREE = ["merge", "a.pt", "b.pt", "a.pt", *MODEL, *SHAPE, "--output", "m.pt"]
PAIR = ["merge", "a.pt", "b.pt", "--model", "aligned_by_test.pair", "--output", "m.pt", "--statistics", "none"]
LABELS, INPUTS = ["--data", "d.npz"], ["--data", "x.npz"]


@pytest.fixture(autouse=True)
def files(folder):
    """Good files and bad ones."""
    state = drawn(0).state_dict()
    save(state, folder / "a.pt")
    save(drawn(1).state_dict(), folder / "b.pt")
    save(drawn(1, width=9).state_dict(), folder / "wide.pt")
    save({**state, "2.weight": torch.full((12, 12), torch.nan)}, folder / "nan.safetensors")
    save({**state, "0.bias": torch.full((12,), torch.inf)}, folder / "inf.pt")
    save({name: tensor for name, tensor in state.items() if name != "2.bias"}, folder / "less.pt")
    save({**state, "9.bias": torch.ones(2)}, folder / "more.pt")
    save({f"{p}.{name}": tensor for name, tensor in state.items() for p in ("model", "ema")}, folder / "twice.pt")
    save({"words": "no tensors", "0.weight": 3}, folder / "words.pt")
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=1)}, folder / "code.ckpt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt").write_text("hello\n")
    (folder / "text.safetensors").write_text("hello\n")
    (folder / "there.pt").write_text("something else")
    (folder / "drawn.png").write_text("a picture")
    save_examples(folder / "d.npz")
    save_examples(folder / "x.npz", labels=False)
    draws = np.random.default_rng(0)
    good, labels = draws.normal(size=(5, 6)), np.arange(5) % 3
    for name, arrays in {
        "none": {"inputs": good},
        "shape": {"x": draws.normal(size=(5, 7))},
        "nan": {"x": good * np.nan},
        "objects": {"x": np.array([{}, {}])},
        "empty": {"x": good[:0]},
        "short": {"x": good, "y": labels[:3]},
        "floats": {"x": good, "y": labels / 2},
        "classes": {"x": good, "y": labels + 1},
        "columns": {"x": good, "y": np.stack([labels, labels], 1)},
    }.items():
        np.savez(folder / f"bad_{name}.npz", **arrays)


CASES = [
    # checkpoints
    (["align", "a.pt", *MODEL, *SHAPE], 2, "align takes two checkpoints, A and the reference B, got 1"),
    (["merge", "a.pt", *MODEL, *SHAPE, "--output", "m.pt"], 2, "merge takes two checkpoints or more, got 1"),
    (["align", "a.pt", "no.pt", *MODEL, *SHAPE], 2, "checkpoint no.pt cannot be read: No such file"),
    (["align", "no.safetensors", "b.pt", *MODEL, *SHAPE], 2, "checkpoint no.safetensors cannot be read: No such file"),
    (["align", "text.pt", "b.pt", *MODEL, *SHAPE], 2, "text.pt is no file of tensors that torch.load.weights_only"),
    (["align", "text.safetensors", "b.pt", *MODEL, *SHAPE], 2, "text.safetensors is no safetensors file"),
    (["align", "list.pt", "b.pt", *MODEL, *SHAPE], 2, "list.pt holds a list, not a state dict"),
    (["align", "code.ckpt", "b.pt", *MODEL, *SHAPE], 2, "code.ckpt holds the Python object argparse.Namespace, which"),
    (
        ["align", "a.pt", "wide.pt", *MODEL, *SHAPE],
        2,
        r"wide.pt .*'0.weight' has shape \(9, 6\) in it and \(12, 6",
    ),
    (["align", "nan.safetensors", "b.pt", *MODEL, *SHAPE], 2, "'2.weight' of checkpoint nan.safetensors holds a NaN"),
    (["align", "a.pt", "inf.pt", *MODEL, *SHAPE], 2, "'0.bias' of checkpoint inf.pt holds a NaN or an infinity"),
    (["align", "less.pt", "b.pt", *MODEL, *SHAPE], 2, "less.pt does not hold the weights of .*lacks '2.bias'$"),
    (["align", "a.pt", "more.pt", *MODEL, *SHAPE], 2, "more.pt .*it has '9.bias', which the network lacks"),
    (
        ["align", "twice.pt", "b.pt", *MODEL, *SHAPE],
        2,
        "twice.pt holds the network more than once, under 'ema.', 'model.'",
    ),
    (["align", "words.pt", "b.pt", *MODEL, *SHAPE], 2, "words.pt does not hold the weights of"),
    (["align", "a.pt", "b.pt", "--model", "torch.nn.ReLU", *SHAPE], 2, "a.pt does not hold the weights of ReLU"),
    # the network and its input
    (["align", "a.pt", "b.pt", *SHAPE], 2, "align needs the import path of a network, such as --model torchvision"),
    (
        ["merge", "a.pt", "b.pt", *MODEL, "--output", "m.pt"],
        2,
        "merge needs the shape of an example input, .* or --data",
    ),
    (
        ["align", "a.pt", "b.pt", *MODEL, "--input", "2,7"],
        1,
        "does not run on this input: check the shape, type and name",
    ),
    ([*ALIGN, "--model.wide", "3"], 2, "wide"),
    # methods
    ([*ALIGN, "--method", "magic"], 2, "--method must be one of identity, weights, covariance, .*, got magic"),
    ([*MERGE, "--method", "merge-many"], 2, "--method must be one of identity, weights, .*, got merge-many"),
    (
        [*THREE, "--method", "weights"],
        2,
        "--method must be one of cycle-consistent, merge-many, barycenter, got weights",
    ),
    ([*ALIGN, "--method", "covariance"], 2, "method covariance needs data: give --data FILE.npz with the array x"),
    ([*ALIGN, "--init", "activations"], 2, "init activations needs data"),
    ([*ALIGN, "--init", "magic"], 2, "--init must be one of identity, weights"),
    ([*ALIGN, "--cost", "l2"], 2, "--cost is for sinkhorn and straight-through; weights has one of its own"),
    ([*ALIGN, "--method", "sinkhorn", "--cost", "l3"], 2, "--cost must be one of l1, l2, cosine, midpoint"),
    (
        [*ALIGN, "--method", "sinkhorn", "--cost", "midpoint"],
        2,
        "the midpoint cost of sinkhorn needs labels: give --data",
    ),
    ([*ALIGN, "--method", "sinkhorn", *INPUTS], 2, "the midpoint cost of sinkhorn needs labels: .*, or --cost l2"),
    (
        [*ALIGN, "--options.magic", "1"],
        2,
        "method weights has no option --options.magic; it has --options.normalize, --op",
    ),
    ([*ALIGN, "--options.seed", "1"], 2, "method weights has no option --options.seed"),
    ([*THREE, "--options.magic=1"], 2, "cycle-consistent has no option --options.magic; .*--options.max_steps"),
    ([*ALIGN, "--options.restarts", "many"], 2, "options.restarts must be a whole number, got many"),
    ([*ALIGN, "--options.restarts", "-1"], 1, "restarts must be a whole number of at least 0"),
    # data
    ([*ALIGN, "--data", "no.npz"], 2, "there is no file no.npz for --data"),
    ([*ALIGN, "--data", "text.pt"], 2, "--data text.pt is not a readable .npz"),
    ([*ALIGN, "--data", "bad_objects.npz"], 2, "--data bad_objects.npz is not a readable .npz of numbers"),
    ([*ALIGN, "--data", "bad_none.npz"], 2, "bad_none.npz lacks the array x; it holds inputs"),
    ([*ALIGN, "--data", "bad_shape.npz"], 2, r"does not run on x of bad_shape.npz, here \(5, 7\) of torch.float32"),
    ([*ALIGN, "--data", "bad_nan.npz"], 2, "bad_nan.npz: x must hold finite numbers"),
    ([*ALIGN, "--data", "bad_empty.npz"], 2, "bad_empty.npz: x holds no examples"),
    ([*ALIGN, "--data", "bad_short.npz"], 2, "y must hold one class index for each of the 5 examples of x"),
    ([*ALIGN, "--data", "bad_floats.npz"], 2, "y must hold one class index for each"),
    ([*ALIGN, "--data", "bad_classes.npz"], 2, "y of bad_classes.npz names the class 3, but .*mlp has 3 classes"),
    ([*ALIGN, "--data", "bad_columns.npz"], 2, r"of shape \(2, 3\), which is not logits for y of bad_columns.npz"),
    ([*ALIGN, *LABELS, "--batch_size", "0"], 2, "--batch_size must be at least 1"),
    ([*ALIGN, *LABELS, "--points", "2"], 2, "--points at least 3"),
    # alpha and statistics
    ([*MERGE, "--alpha", "1.5"], 2, r"--alpha must be a number in \[0, 1\], line-search or fisher, got 1.5"),
    ([*MERGE, "--alpha", "best"], 2, "--alpha must be a number .*, got best"),
    ([*MERGE, "--alpha", "line-search", *INPUTS], 2, "--alpha line-search needs data: give .* the arrays x and y"),
    ([*MERGE, "--alpha", "fisher"], 2, "--alpha fisher needs data: give .* the array x"),
    (
        [*PAIR, *INPUTS, "--alpha", "fisher"],
        2,
        "--alpha fisher cannot be had for aligned_by_test.pair: .* no tensor of",
    ),
    ([*PAIR, *LABELS], 2, "the output of aligned_by_test.pair is a tuple, which is not logits for y of d.npz"),
    ([*MERGE, "--statistics", "magic"], 2, "--statistics must be one of none, repair, rescale, reestimate, data-free"),
    ([*MERGE, "--statistics", "repair"], 2, "--statistics repair needs data"),
    ([*MERGE, "--statistics", "data-free"], 2, "--statistics data-free is for BatchNorm, and .*mlp has none"),
    ([*THREE, *INPUTS, "--statistics", "data-free"], 2, "--statistics data-free is for two checkpoints, got 3"),
    ([*THREE, "--alpha", "0.5"], 2, "--alpha is for two checkpoints, got 3"),
    # files to write
    (["merge", "a.pt", "b.pt", *MODEL, *SHAPE], 2, "merge needs the file to write, such as --output"),
    (
        [*ALIGN, "--output", "there.pt"],
        2,
        "--output there.pt is there already; choose another name, or pass --overwrite",
    ),
    ([*THREE[:-1], "there.pt"], 2, "--output there.pt is there already"),
    ([*MERGE[:-1], "m.onnx"], 2, "--output must be a .safetensors, .pt, .pth or .ckpt file, got m.onnx"),
    ([*MERGE[:-1], "no/m.pt"], 2, "--output no/m.pt cannot be written"),
    ([*ALIGN, *LABELS, "--figure", "drawn.png"], 2, "--figure drawn.png is there already"),
    ([*MERGE[:-1], "drawn.pt", *LABELS], 2, "--figure drawn.png is there already"),
    ([*MERGE, *LABELS, "--figure", "f.gif"], 2, "--figure must be a .png, .svg or .pdf file"),
    ([*MERGE, "--figure", "f.png"], 2, "--figure draws the loss along the path, which needs --data FILE.npz"),
    ([*MERGE, *INPUTS, "--figure", "f.png"], 2, "--figure .* needs the labels y in x.npz"),
    # words
    ([*ALIGN, "--alpha", "0.5"], 2, "align has no option --alpha; see lit-rebasin align --help"),
    ([*ALIGN, "--seed", "one"], 2, "--seed: invalid int value: 'one'"),
]


@pytest.mark.parametrize(("words", "code", "match"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_input_is_one_sentence_and_changes_nothing(folder, words, code, match, capsys):
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert main(words) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    (error,) = shown.err.strip().splitlines()
    assert re.search(f"^lit-rebasin: error: .*{match}", error), error
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch, capsys):
    def full(content, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    before = (folder / "there.pt").read_bytes()
    assert main([*MERGE[:-1], "there.pt", "--overwrite"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (folder / "there.pt").read_bytes() == before
    assert not list(folder.glob("*.tmp"))
