import gc
import json
import warnings
import weakref
import zipfile

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger
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


class MlflowStandIn(MLFlowLogger):
    """An MLFlowLogger without MLflow: its client has the signature of MlflowClient.log_figure."""

    def __init__(self):
        self.taken = []

    @property
    def experiment(self):
        return self

    @property
    def run_id(self):
        return "run"

    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        self.taken.append((run_id, figure, artifact_file))


class CometStandIn(CometLogger):
    """A CometLogger without Comet: its experiment has the signature of Experiment.log_figure."""

    def __init__(self):
        self.taken = []

    @property
    def experiment(self):
        return self

    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None, metadata=None, format="auto"):
        self.taken.append((figure_name, figure, overwrite, step))


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


def test_mlflow_gets_an_artifact_named_by_tag_and_step():
    logger, pen = MlflowStandIn(), Pen()
    log_figure([logger], "connectivity/path", pen, 120)
    ((run, figure, file),) = logger.taken
    assert (run, file) == ("run", "connectivity/path/step_00000120.png")
    assert figure is pen.figures[0]()


def test_comet_gets_the_figure_at_its_step():
    logger, pen = CometStandIn(), Pen()
    log_figure([logger], "connectivity/path", pen, 120)
    ((name, figure, overwrite, step),) = logger.taken
    assert (name, overwrite, step) == ("connectivity/path", False, 120)
    assert figure is pen.figures[0]()


def test_a_way_that_a_user_gave_a_logger_is_taken():
    class Own(MlflowStandIn, Album):
        pass

    logger = Own()
    log_figure([logger], "a", Pen(), 0)
    ((key, _, _),) = logger.taken
    assert key == "a"


def test_mlflow_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/store.db", artifact_location=(tmp_path / "files").as_uri()
    )
    fit_two_tasks(tmp_path, [logger])
    root = tmp_path / "files" / logger.run_id / "artifacts"
    found = {file.relative_to(root).as_posix(): file for file in root.rglob("*.png")}
    assert set(found) == {f"{tag}/step_{step:08d}.png" for tag, step in OF_TWO_TASKS}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in found.values())


def test_comet_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    pytest.importorskip("comet_ml")
    logger = CometLogger(project="tests", offline_directory=str(tmp_path))
    fit_two_tasks(tmp_path, [logger])
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = [json.loads(line) for line in files.read("messages.json").splitlines()]
    uploads = [
        m["payload"]["additional_params"] for m in messages if m["payload"].get("upload_type") == "visualization"
    ]
    assert sorted((upload["figName"], upload["step"]) for upload in uploads) == sorted(OF_TWO_TASKS)


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


# Pictures of the fits below, each at its step.
OF_TWO_TASKS = [
    ("accuracy/matrix", 0),
    ("accuracy/over_tasks", 0),
    ("merge/path", 1),
    ("merge/displacement", 1),
    ("merge/alpha_over_tasks", 1),
    ("accuracy/matrix", 1),
    ("accuracy/over_tasks", 1),
]


def fit_two_tasks(tmp_path, loggers):
    merge, monitor, module = RebasinMerge(start="fresh"), ContinualMonitor(), UserModule()
    for task in range(2):
        trainer = make_trainer(tmp_path, merge, monitor, logger=loggers)
        trainer.fit(module, loader(shift=task), [loader(shift=seen, shuffle=False) for seen in range(2)])
    return merge


def test_every_picture_of_a_fit_reaches_all_loggers_that_take_some(tmp_path):
    album, board = Album(), TensorBoardLogger(tmp_path / "logs", version=0)
    fit_two_tasks(tmp_path, [album, board, Silent(), CSVLogger(tmp_path)])
    assert [(key, step) for key, _, step in album.taken] == OF_TWO_TASKS
    events = images(board)
    assert sorted((tag, e.step) for tag in events.Tags()["images"] for e in events.Images(tag)) == sorted(OF_TWO_TASKS)


@pytest.mark.filterwarnings("ignore:Broken did not take")
def test_a_logger_that_takes_no_picture_does_not_end_the_training(tmp_path):
    merge = fit_two_tasks(tmp_path, [Broken(), Silent()])
    assert merge.n_tasks == 2


def test_the_pictures_over_tasks_are_of_all_so_far(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lit_rebasin.callbacks.report.log_figure", lambda _, tag, draw, step: drawn.append((tag, draw()))
    )
    merge, monitor, module = RebasinMerge(alpha="line-search", start="fresh"), ContinualMonitor(), UserModule()
    for task in range(3):
        trainer = make_trainer(tmp_path, merge, monitor, logger=Silent())
        trainer.fit(module, loader(shift=task), [loader(shift=seen, shuffle=False) for seen in range(3)])
    first, figures = dict(reversed(drawn)), dict(drawn)
    assert list(first["accuracy/over_tasks"].axes[0].lines[0].get_xdata()) == [1]
    (alphas,) = figures["merge/alpha_over_tasks"].axes[0].lines
    assert list(alphas.get_xdata()) == [1, 2]
    assert list(alphas.get_ydata()) == pytest.approx([entry["alpha"] for entry in merge.history])
    axes = figures["accuracy/over_tasks"].axes[0]
    means = [float(monitor.matrix[task, : task + 1].mean()) for task in range(3)]
    assert list(axes.lines[0].get_ydata()) == pytest.approx(means)
    assert axes.get_legend() is None


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
