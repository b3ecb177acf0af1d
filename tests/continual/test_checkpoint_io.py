import pickle

import pytest
import torch

from lit_rebasin.continual.checkpoint_io import WholeCheckpointIO
from lit_rebasin.merging.checkpoint_file import CheckpointError

HELD = {"state_dict": {"weight": torch.arange(3.0)}, "epoch": 4}


class Bomb:
    def __reduce__(self):
        return print, ("run",)


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    return str(tmp_path / "a.ckpt") if request.param == "local" else f"memory://{tmp_path.name}/a.ckpt"


def test_what_is_written_is_read(place):
    plugin = WholeCheckpointIO()
    plugin.save_checkpoint(HELD, place)
    found = plugin.load_checkpoint(place)
    assert found.keys() == HELD.keys()
    assert found["epoch"] == 4
    assert torch.equal(found["state_dict"]["weight"], torch.arange(3.0))


def test_what_would_run_code_is_refused(place, capsys):
    plugin = WholeCheckpointIO()
    plugin.save_checkpoint({"state_dict": Bomb()}, place)
    with pytest.raises(CheckpointError, match=r"a\.ckpt holds the Python object .*print, which could run code"):
        plugin.load_checkpoint(place)
    assert not capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    plugin, path = WholeCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint(HELD, path)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        plugin.save_checkpoint({"epoch": lambda: 4}, path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["a.ckpt"]
