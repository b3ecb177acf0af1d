import gc
import warnings
import weakref

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rebasin import ContinualMonitor, RebasinMerge
from lit_rebasin.callbacks.log_figure import log_figure

from .user_code import UserModule, loader, make_trainer


class Silent(pl.loggers.logger.Logger):
    """A logger that takes numbers and drops them."""

    name, version = "silent", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


class Album(Silent):
    """A logger that takes images as WandbLogger does."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def log_image(self, key, images, step=None, **kwargs):
        self.taken.append((key, images, step))


class Broken(Silent):
    def log_image(self, key, images, step=None):
        raise ConnectionError("no line to the server")


class Pen:
    """Draws, and counts how often."""

    def __init__(self):
        self.figures = []

    def __call__(self):
        figure = Figure(figsize=(2, 1), dpi=100, facecolor="red")
        self.figures.append(weakref.ref(figure))
        return figure


def images(logger):
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def test_tensorboard_gets_the_figure_at_its_step(tmp_path):
    logger, pen = TensorBoardLogger(tmp_path), Pen()
    log_figure([logger], "merge/path", pen, 7)
    logger.finalize("success")
    (image,) = images(logger).Images("merge/path")
    assert (image.step, image.width, image.height) == (7, 200, 100)


def test_a_logger_with_log_image_gets_rgb_pixels():
    album = Album()
    log_figure([album], "merge/path", Pen(), 7)
    ((key, (image,), step),) = album.taken
    assert (key, step) == ("merge/path", 7)
    assert (image.shape, image.dtype) == ((100, 200, 3), np.uint8)
    assert (image == [255, 0, 0]).all()


def test_one_drawing_serves_all_and_none_is_made_for_nobody(tmp_path):
    pen = Pen()
    log_figure([CSVLogger(tmp_path), Silent(), pl.loggers.logger.DummyLogger()], "a", pen, 0)
    log_figure([], "a", pen, 0)
    assert not pen.figures
    first, second = Album(), Album()
    log_figure([first, Silent(), TensorBoardLogger(tmp_path), second], "a", pen, 0)
    assert len(pen.figures) == len(first.taken) == len(second.taken) == 1


def test_only_the_first_process_draws(monkeypatch):
    album, pen = Album(), Pen()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_figure([album], "a", pen, 0)
    assert not pen.figures
    assert not album.taken


def test_figures_are_forgotten(tmp_path):
    pen = Pen()
    log_figure([TensorBoardLogger(tmp_path), Album()], "a", pen, 0)
    gc.collect()
    assert [figure() for figure in pen.figures] == [None]
    assert not plt.get_fignums()


def test_a_logger_that_fails_is_warned_of_once_and_the_others_get_theirs():
    album, broken = Album(), Broken()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            log_figure([broken, album], "merge/path", Pen(), step)
    (message,) = [str(warning.message) for warning in caught]
    assert message == "Broken did not take the picture merge/path: ConnectionError: no line to the server"
    assert len(album.taken) == 3
    with pytest.warns(UserWarning, match="Broken did not take"):
        log_figure([Broken()], "a", Pen(), 0)  # another one


def fit_two_tasks(tmp_path, loggers):
    merge, monitor, module = RebasinMerge(start="fresh"), ContinualMonitor(), UserModule()
    for task in range(2):
        trainer = make_trainer(tmp_path, merge, monitor, logger=loggers)
        trainer.fit(module, loader(shift=task), [loader(shift=seen, shuffle=False) for seen in range(2)])
    return merge


def test_every_picture_of_a_fit_reaches_all_loggers_that_take_some(tmp_path):
    album, board = Album(), TensorBoardLogger(tmp_path / "logs", version=0)
    fit_two_tasks(tmp_path, [album, board, Silent(), CSVLogger(tmp_path)])
    expected = [("accuracy/matrix", 0), ("merge/path", 1), ("merge/displacement", 1), ("accuracy/matrix", 1)]
    assert [(key, step) for key, _, step in album.taken] == expected
    events = images(board)
    assert sorted((tag, e.step) for tag in events.Tags()["images"] for e in events.Images(tag)) == sorted(expected)


@pytest.mark.filterwarnings("ignore:Broken did not take")
def test_a_logger_that_takes_no_picture_does_not_end_the_training(tmp_path):
    merge = fit_two_tasks(tmp_path, [Broken(), Silent()])
    assert merge.n_tasks == 2


def test_the_path_and_the_displacement_are_logged_as_numbers(tmp_path):
    board = TensorBoardLogger(tmp_path / "logs", version=0)
    merge = fit_two_tasks(tmp_path, [board])
    (entry,) = merge.history
    events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0}).Reload()
    before, after = events.Scalars("path/before_task_01"), events.Scalars("path/after_task_01")
    assert [point.step for point in before] == [point.step for point in after] == list(range(0, 101, 5))
    for points, barrier in ((before, entry["barrier_before"]), (after, entry["barrier_after"])):
        losses = torch.tensor([point.value for point in points], dtype=torch.float64)
        chord = losses[0] + (losses[-1] - losses[0]) * torch.linspace(0, 1, 21, dtype=torch.float64)
        assert float((losses - chord)[1:-1].max()) == pytest.approx(barrier, abs=1e-4)
    assert before[-1].value == pytest.approx(entry["loss_previous"], rel=1e-5)
    assert entry["moved"] > 0
    shares = entry["displacement"]
    assert list(shares) == list(merge.spec.groups)
    assert sum(shares[name] * group.size for name, group in merge.spec.groups.items()) == pytest.approx(entry["moved"])
    for name, share in shares.items():
        (point,) = events.Scalars(f"displacement/{name}")
        assert (point.step, point.value) == (1, pytest.approx(share))
