import copy

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath, align, merge_many, permutation_spec, permute
from lit_rebasin.cli import main
from lit_rebasin.cli.examples import read_examples
from lit_rebasin.merging import (
    diagonal_fisher,
    fisher_alpha,
    line_search,
    loss_barrier,
    reestimate_batch_norm,
    repair,
    repair_many,
    reset_batch_norm,
)

from .networks import MODEL, SHAPE, drawn, examples, loaded, save, save_examples, shuffled, table

NORM = ["--model.norm", "true"]


def pair(folder, norm=False, suffix=".pt"):
    """Save two networks, and return them with the path from the aligned first to the second, by the library."""
    model, reference = drawn(4, norm=norm), drawn(5, norm=norm)
    files = [save(model.state_dict(), folder / f"a{suffix}"), save(reference.state_dict(), folder / f"b{suffix}")]
    spec = permutation_spec(reference, torch.randn(2, 6))
    moved = permute(model, spec, align(model, reference, spec=spec).permutations)
    return files, model, reference, LinearPath(reference, moved)


def batches(folder, seed=0):
    return read_examples(str(folder / "d.npz"), 500, torch.float32, seed).batches


def loss_of(network, file):
    inputs, labels = examples(file)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network(inputs), labels))


def equal(found, network):
    """Whether weights load into the architecture and are those of a network, up to rounding."""
    twin = copy.deepcopy(network)
    twin.load_state_dict(found)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, msg=name)
    return True


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
def test_the_merge_is_the_point_of_the_path_in_every_format(folder, suffix, capsys):
    files, _, _, path = pair(folder, suffix=suffix)
    assert main(["merge", *files, *MODEL, *SHAPE, "--output", f"m{suffix}", "--alpha", "0.3"]) == 0
    assert equal(loaded(folder / f"m{suffix}"), path.module_at(0.3))
    shown = capsys.readouterr().out
    assert "alpha, the weight of B: 0.3\n" in shown
    assert "statistics: none\n" in shown


@pytest.mark.parametrize(("alpha", "end"), [("1", "previous"), ("0", "new")])
def test_alpha_is_the_weight_of_the_reference(folder, alpha, end):
    files, _, _, path = pair(folder)
    save_examples(folder / "d.npz")
    assert main(["merge", *files, *MODEL, "--data", "d.npz", "--output", "m.pt", "--alpha", alpha]) == 0
    expected = getattr(path, end)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded(folder / "m.pt").items())


def corrected(name, path, alpha, inputs):
    merged = path.module_at(alpha)
    if name in ("repair", "rescale"):
        repair(merged, path, alpha, merged, inputs, mean=name == "repair")
    if name == "reestimate":
        merged.train()
        reestimate_batch_norm(merged, merged, inputs)
        merged.eval()
    if name == "data-free":
        reset_batch_norm(merged, path, alpha, merged, torch.zeros(2, 6))
    return merged


@pytest.mark.parametrize(
    ("norm", "data", "words", "used"),
    [
        (False, True, [], "repair"),
        (False, False, [], "none"),
        (True, True, [], "repair"),
        (True, False, [], "data-free"),
        (False, True, ["--statistics", "rescale"], "rescale"),
        (False, True, ["--statistics", "none"], "none"),
        (True, True, ["--statistics", "reestimate"], "reestimate"),
        (True, True, ["--statistics", "data-free"], "data-free"),
    ],
)
def test_statistics_fit_the_network_and_the_data_unless_told(folder, norm, data, words, used, capsys):
    files, _, _, path = pair(folder, norm)
    save_examples(folder / "d.npz")
    given = ["--data", "d.npz"] if data else SHAPE
    assert main(["merge", *files, *MODEL, *(NORM if norm else []), *given, *words, "--output", "m.pt"]) == 0
    expected = corrected(used, path, 0.5, [batch[0] for batch in batches(folder)])
    assert equal(loaded(folder / "m.pt"), expected)
    shown = capsys.readouterr().out
    assert f"statistics: {used}\n" in shown
    if data:
        loss = loss_of(expected, folder / "d.npz")
        assert float(table(shown)["loss of the merge"][-1]) == pytest.approx(loss, rel=1e-3)


def test_line_search_takes_the_lowest_point_of_the_corrected_path(folder, capsys):
    files, model, reference, path = pair(folder)
    save_examples(folder / "d.npz")
    words = ["--alpha", "line-search", "--points", "7", "--figure", "f.svg"]
    assert main(["merge", *files, *MODEL, "--data", "d.npz", "--output", "m.pt", *words]) == 0
    held = batches(folder)

    def statistics(merged, alpha):
        repair(merged, path, alpha, merged, [batch[0] for batch in held])

    after = loss_barrier(path, held, 7, statistics=statistics)
    alpha = line_search(after)
    shown = capsys.readouterr().out
    assert f"alpha, the weight of B: {alpha:.4g}, by line-search\n" in shown
    rows = table(shown)
    naive = loss_barrier(LinearPath(reference, model), held, 7)
    assert [float(cell) for cell in rows["loss barrier"]] == pytest.approx(
        [naive.barrier, loss_barrier(path, held, 7).barrier, after.barrier], rel=1e-3
    )
    assert float(rows["loss of the merge"][-1]) == pytest.approx(float(after.losses.min()), rel=1e-3)
    assert (folder / "f.svg").read_text().startswith("<?xml")
    assert not (folder / "m.png").exists()


def test_fisher_weighs_the_ends_by_their_curvature(folder, capsys):
    files, _, reference, path = pair(folder)
    save_examples(folder / "d.npz", labels=False)
    words = ["--alpha", "fisher", "--statistics", "none", "--seed", "3"]
    assert main(["merge", *files, *MODEL, "--data", "d.npz", "--output", "m.pt", *words]) == 0
    inputs = [batch[0] for batch in batches(folder, seed=3)]
    alpha = fisher_alpha(
        path, diagonal_fisher(reference, inputs, seed=3), diagonal_fisher(path.network, inputs, seed=3)
    )
    assert 0 < alpha < 1
    assert f"the weight of B: {alpha:.4g}, by fisher\n" in capsys.readouterr().out
    assert equal(loaded(folder / "m.pt"), path.module_at(alpha))


def test_merging_with_its_own_shuffled_copy_is_harmless(folder, capsys):
    reference = drawn(7)
    a, b = save(shuffled(reference), folder / "a.ckpt"), save(reference.state_dict(), folder / "b.safetensors")
    data = save_examples(folder / "d.npz")
    assert main(["merge", a, b, *MODEL, "--data", data, "--output", "m.pt"]) == 0
    assert equal(loaded(folder / "m.pt"), reference)
    loss, *_, merged = table(capsys.readouterr().out)["loss of the merge"]
    assert float(merged) == pytest.approx(loss_of(reference, data), rel=1e-3)
    assert float(loss) != pytest.approx(float(merged), rel=1e-2)
    assert (folder / "m.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["cycle-consistent", "merge-many", "barycenter"])
def test_three_checkpoints_meet_in_the_frame_of_the_first(folder, method, capsys):
    networks = [drawn(seed) for seed in range(3)]
    files = [save(network.state_dict(), folder / f"{k}.pt") for k, network in enumerate(networks)]
    words = ["--method", method, "--seed", "2", "--options.max_steps", "30", "--statistics", "none"]
    data = save_examples(folder / "d.npz")
    assert main(["merge", *files, *MODEL, "--data", data, "--output", "m.safetensors", *words]) == 0
    spec = permutation_spec(networks[0], torch.randn(2, 6))
    expected = merge_many(networks, spec, method=method, seed=2, max_steps=30)
    found = loaded(folder / "m.safetensors")
    assert found.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.items())
    rows = table(capsys.readouterr().out)
    for name, network in zip("ABC", networks, strict=True):
        assert float(rows[f"loss of {name}"][0]) == pytest.approx(loss_of(network, data), rel=1e-3)
    average = drawn(0)
    average.load_state_dict({name: sum(n.state_dict()[name] for n in networks) / 3 for name in average.state_dict()})
    assert float(rows["loss of the merge"][0]) == pytest.approx(loss_of(average, data), rel=1e-3)
    spread = [expected.history[0], min(expected.history)]
    assert [float(cell) for cell in rows["spread of the weights"]] == pytest.approx(spread, rel=1e-3)


def test_three_checkpoints_with_batch_norm_have_its_statistics_estimated(folder, capsys):
    networks = [drawn(seed, norm=True) for seed in range(3)]
    files = [save(network.state_dict(), folder / f"{k}.pt") for k, network in enumerate(networks)]
    data = save_examples(folder / "d.npz")
    assert main(["merge", *files, *MODEL, *NORM, "--data", data, "--statistics", "reestimate", "--output", "m.pt"]) == 0
    assert "statistics: reestimate\n" in capsys.readouterr().out
    found = loaded(folder / "m.pt")
    inputs = examples(folder / "d.npz")[0]
    fed = inputs @ found["0.weight"].T + found["0.bias"]
    torch.testing.assert_close(found["1.running_mean"], fed.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["1.running_var"], fed.var(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [None, "repair", "rescale"])
def test_three_checkpoints_are_repaired_unless_told(folder, name, capsys):
    networks = [drawn(seed) for seed in range(3)]
    files = [save(network.state_dict(), folder / f"{k}.pt") for k, network in enumerate(networks)]
    words = [] if name is None else ["--statistics", name]
    data = save_examples(folder / "d.npz")
    assert main(["merge", *files, *MODEL, "--data", data, "--output", "m.pt", *words]) == 0
    assert f"statistics: {name or 'repair'}\n" in capsys.readouterr().out
    spec, inputs = permutation_spec(networks[0], torch.randn(2, 6)), examples(folder / "d.npz")[0]
    expected = merge_many(networks, spec)
    merged = drawn(0)
    merged.load_state_dict(expected.weights)
    members = [permute(network, spec, own) for network, own in zip(networks, expected.permutations, strict=True)]
    repair_many(merged, members, merged, [inputs], mean=name != "rescale")
    found = loaded(folder / "m.pt")
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_an_existing_file_is_replaced_on_request(folder):
    files, _, _, path = pair(folder)
    (folder / "m.pt").write_text("old")
    assert main(["merge", *files, *MODEL, *SHAPE, "--output", "m.pt", "--overwrite"]) == 0
    assert equal(loaded(folder / "m.pt"), path.module_at(0.5))
