"""What is kept of batches."""

import torch

from lit_rebasin.callbacks.kept_examples import KeptExamples, first_examples


def test_only_what_is_of_the_examples_is_cut():
    batch = {"x": torch.arange(10.0)[:, None], "y": torch.arange(10), "class_weights": torch.ones(3), "epoch": 4}
    cut = first_examples(batch, 4)
    batch["x"] += 1
    assert cut["x"].tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert len(cut["y"]) == 4
    assert cut["class_weights"].tolist() == [1.0, 1.0, 1.0]
    assert cut["epoch"] == 4


def kept(wanted, *batches):
    examples = KeptExamples(wanted)
    for batch in batches:
        examples.add(batch)
    return examples.batch


def test_batches_that_are_alike_are_joined():
    first = {"x": torch.arange(8.0).view(4, 2), "weights": torch.ones(3), "name": "a"}
    second = {"x": torch.arange(8.0, 12.0).view(2, 2), "weights": torch.ones(3), "name": "a"}
    third = {"x": torch.full((4, 2), 7.0), "weights": torch.ones(3), "name": "a"}
    batch = kept(7, first, second, third, third)
    first["x"] += 1
    assert torch.equal(batch["x"], torch.cat([torch.arange(12.0).view(6, 2), torch.full((1, 2), 7.0)]))
    assert batch["weights"].tolist() == [1.0] * 3
    assert batch["name"] == "a"
    assert kept(3, second, second)["x"].tolist() == [[8.0, 9.0], [10.0, 11.0], [8.0, 9.0]]


def test_the_first_batch_is_all_where_others_are_unlike():
    x = torch.zeros(4, 2)
    unlike = [
        ((x,), (torch.zeros(4, 3),)),  # as of sentences of other lengths
        ((x,), (x, x)),
        ((x,), (x.double(),)),
        ((x, torch.ones(3)), (x, torch.zeros(3))),
        ((x, ["a", "b"]), (x, ["c", "d"])),
        ((x, 1), (x, 2)),
    ]
    for first, second in unlike:
        assert len(kept(6, first, second, first)[0]) == 4
    assert len(kept(6, (x, 1), (x, 1))[0]) == 6


def test_batches_without_tensors_are_kept_whole():
    assert kept(5, ["a", "b"], ["c"]) == ["a", "b"]
