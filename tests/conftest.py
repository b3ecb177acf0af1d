import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; torch reads it when it is imported

import lightning.pytorch as pl
import numpy as np
import pytest

os.environ.setdefault("WANDB_MODE", "disabled")  # Avalanche brings wandb along
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


def _write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fake_mnist(tmp_path):
    """A data folder with 300 + 100 random images in the place of MNIST and Fashion-MNIST."""
    draws = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        raw = tmp_path / "data" / name / "raw"
        raw.mkdir(parents=True)
        for part, n in (("train", 300), ("t10k", 100)):
            _write_idx(raw / f"{part}-images-idx3-ubyte", draws.integers(0, 256, (n, 28, 28)))
            _write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return str(tmp_path / "data")
