import numpy as np
import pytest
import torch
from avalanche.benchmarks.classic import PermutedMNIST, RotatedMNIST, SplitMNIST

from lit_rebasin.continual.streams import make_stream


def stream(benchmark, n_tasks=None, scenario=None, data_dir=None, seed=0):
    return make_stream(benchmark, n_tasks, scenario, data_dir, False, seed)


def avalanche_task(benchmark, task, part="train"):
    experience = getattr(benchmark, f"{part}_stream")[task]
    dataset = experience.dataset.train() if part == "train" else experience.dataset.eval()
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


def assert_same_task(ours, theirs):
    # Avalanche groups the examples of a task by class.
    ours, theirs = ((x[y.argsort(stable=True)], y.sort().values) for x, y in (ours, theirs))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("part", ["train", "test"])
def test_rotated_mnist_is_avalanches(fake_mnist, part):
    angles = np.linspace(0, 180, 4).tolist()
    theirs = RotatedMNIST(4, rotations_list=angles, dataset_root=fake_mnist)
    ours = stream("rotated-mnist", 4, data_dir=fake_mnist)
    for task in range(4):
        assert_same_task(getattr(ours, part)(task), avalanche_task(theirs, task, part))


def test_permuted_mnist_is_avalanches(fake_mnist):
    theirs = PermutedMNIST(3, seed=7, dataset_root=fake_mnist)
    ours = stream("permuted-mnist", 3, data_dir=fake_mnist, seed=7)
    for task in range(3):
        assert_same_task(ours.train(task), avalanche_task(theirs, task))


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_split_mnist_is_avalanches(fake_mnist, scenario):
    theirs = SplitMNIST(5, seed=3, class_ids_from_zero_in_each_exp=scenario == "task", dataset_root=fake_mnist)
    ours = stream("split-mnist", 5, scenario, data_dir=fake_mnist, seed=3)
    for task in range(5):
        assert_same_task(ours.train(task), avalanche_task(theirs, task))
        assert_same_task(ours.test(task), avalanche_task(theirs, task, "test"))
    assert ours.n_classes == (2 if scenario == "task" else 10)


def test_rotated_digits_need_nothing_and_do_not_depend_on_the_seed():
    first, second = stream("rotated-digits", seed=0), stream("rotated-digits", seed=5)
    assert len(first.recipes) == 5
    assert first.input_shape == (1, 8, 8)
    assert torch.equal(first.test(3)[0], second.test(3)[0])
    assert len(first.base.y_train) + len(first.base.y_test) == 1797
    x, _ = first.train(0)
    assert float(x.mean()) == pytest.approx(0, abs=1e-4)
    half_turn = stream("rotated-digits", 2).train(1)[0]
    torch.testing.assert_close(half_turn, x.flip(2, 3), atol=1e-4, rtol=1e-4)


def test_rotation_is_counter_clockwise():
    base = stream("rotated-digits", 3)
    quarter = base.train(1)[0]
    torch.testing.assert_close(quarter, base.train(0)[0].rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)


def write_npz(path, n_classes=5, per_class=12, shape=(6, 6), dtype=np.uint8):
    draws = np.random.default_rng(0)
    y = np.arange(n_classes * per_class) % n_classes
    x = draws.integers(0, 255, (len(y), *shape)).astype(dtype)
    np.savez(path, x_train=x, y_train=y, x_test=x[: 2 * n_classes], y_test=y[: 2 * n_classes])
    return str(path)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_arrays_split_drops_no_class(tmp_path, scenario):
    path = write_npz(tmp_path / "a.npz")
    ours = stream("arrays", 3, scenario, path)
    sizes = [len(set(ours.base.y_train[recipe.train].tolist())) for recipe in ours.recipes]
    assert sizes == [1, 2, 2]
    kept = torch.cat([recipe.train for recipe in ours.recipes]).sort().values
    assert torch.equal(kept, torch.arange(60))
    labels = [sorted(set(ours.train(task)[1].tolist())) for task in range(3)]
    assert (labels == [[0], [0, 1], [0, 1]]) == (scenario == "task")


def write_labels(path, train, test):
    x = np.random.default_rng(0).random((max(len(train), len(test)), 4, 4)).astype(np.float32)
    np.savez(path, x_train=x[: len(train)], y_train=train, x_test=x[: len(test)], y_test=test)
    return str(path)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_labels_that_skip_make_no_task_without_examples(tmp_path, scenario):
    path = write_labels(tmp_path / "a.npz", np.array([3, 7, 40, 3]), np.array([40, 7, 3]))
    ours = stream("arrays", 3, scenario, path)
    found = [(ours.train(task)[1].unique().tolist(), ours.test(task)[1].tolist()) for task in range(3)]
    expected = [0, 0, 0] if scenario == "task" else [3, 7, 40]
    assert sorted(found) == [([label], [label]) for label in expected]
    assert ours.n_classes == (1 if scenario == "task" else 41)
    with pytest.raises(ValueError, match=r"has 3 classes, which cannot be split over n_tasks=4: pass 3 or fewer"):
        stream("arrays", 4, scenario, path)


def test_a_class_of_the_test_alone_is_of_no_task(tmp_path):
    path = write_labels(tmp_path / "a.npz", np.array([0, 1, 3]), np.array([0, 2, 3]))
    with pytest.raises(ValueError, match="y_test holds class 2, which y_train lacks"):
        stream("arrays", 2, "class", path)
    assert len(stream("arrays", 2, "domain", path).recipes) == 2


def test_a_single_pixel_is_normalised_to_a_number(tmp_path):
    images = np.full((1, 1, 1), 0.5, np.float32)
    labels = np.array([0])
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert stream("arrays", 1, "class", str(tmp_path / "a.npz")).train(0)[0].tolist() == [[[[0.0]]]]


def test_arrays_as_domains_share_no_example(tmp_path):
    ours = stream("arrays", 4, "domain", write_npz(tmp_path / "a.npz"))
    kept = torch.cat([recipe.train for recipe in ours.recipes]).sort().values
    assert torch.equal(kept, torch.arange(60))
    assert ours.n_classes == 5


def test_arrays_take_channels_last_and_are_normalised(tmp_path):
    ours = stream("arrays", 1, "class", write_npz(tmp_path / "a.npz", shape=(6, 7, 3)))
    assert ours.input_shape == (3, 6, 7)
    x, _ = ours.train(0)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_cifar_is_read_whole(monkeypatch, tmp_path):
    draws = np.random.default_rng(0)

    class Fake:
        base_folder = "cifar"

        def __init__(self, root, train, download):
            n = 200 if train else 100
            self.data = draws.integers(0, 255, (n, 32, 32, 3)).astype(np.uint8)
            self.targets = [i % 100 for i in range(n)]

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Fake)
    with pytest.raises(FileNotFoundError, match="CIFAR100 was not found"):
        stream("split-cifar100", data_dir=str(tmp_path))
    (tmp_path / "cifar").mkdir()
    ours = stream("split-cifar100", data_dir=str(tmp_path))
    assert len(ours.recipes) == 20
    assert ours.train(0)[0].shape == (10, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("rotated-minst",), ValueError, "one of rotated-digits, rotated-mnist"),
        (("rotated-digits", 0), ValueError, "n_tasks must be at least 1"),
        (("rotated-digits", 5, "class"), ValueError, "scenario of rotated-digits must be one of domain"),
        (
            ("rotated-mnist", 5, None, "nowhere"),
            FileNotFoundError,
            r"MNIST was not found under nowhere.*nowhere/MNIST/raw.*download=True",
        ),
        (("arrays",), ValueError, "needs data_dir"),
        (("arrays", 2, None, "nowhere.npz"), FileNotFoundError, "no file nowhere.npz"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        stream(*arguments)


def test_too_many_tasks(fake_mnist):
    with pytest.raises(ValueError, match=r"10 classes, which cannot be split over n_tasks=11"):
        stream("split-mnist", 11, data_dir=fake_mnist)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x_train": None}, "lacks x_train"),
        ({"y_train": np.zeros((60, 2), int)}, "y_train must be class indices"),
        ({"y_train": np.zeros(60)}, "y_train must be class indices"),
        ({"y_train": np.zeros(59, int)}, "x_train has 60 examples and y_train 59"),
        ({"y_test": np.full(10, 9)}, "y_test holds class 9, beyond the largest of y_train, 4"),
        ({"x_test": np.zeros((10, 5, 5), np.uint8)}, "different shapes"),
        ({"x_train": np.zeros((60, 36), np.uint8)}, "x_train must be images"),
        ({"x_train": np.zeros((60, 6, 6))}, "x_train is float64 and x_test uint8"),
        ({"x_train": np.full((60, 6, 6), np.nan)}, "x_train holds NaN or infinity"),
        ({"x_train": np.array([None] * 60)}, "x_train is an array of Python objects"),
    ],
)
def test_bad_arrays(tmp_path, change, match):
    path = write_npz(tmp_path / "a.npz")
    content = {**dict(np.load(path)), **change}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=match):
        stream("arrays", 2, "class", path)


def test_damaged_files_are_one_clear_error(tmp_path, fake_mnist):
    (tmp_path / "a.npz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="not a readable"):
        stream("arrays", 2, "class", str(tmp_path / "a.npz"))
    (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is damaged"):
        stream("rotated-mnist", data_dir=fake_mnist)


def test_download_without_a_network_is_one_sentence(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST.__init__", refuse)
    with pytest.raises(ConnectionError, match=r"MNIST could not be downloaded to .* get its files elsewhere") as caught:
        make_stream("rotated-mnist", 2, None, str(tmp_path), True, 0)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
