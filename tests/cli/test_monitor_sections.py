"""What monitors have logged, on the page of a run."""

import base64
from io import BytesIO

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lit_rebasin import ConnectivityMonitor, GeodesicMonitor, RebasinMerge, SharpnessMonitor
from lit_rebasin.cli import main
from lit_rebasin.cli.event_files import event_folders, read_log
from lit_rebasin.cli.monitor_sections import panels_of

from ..callbacks.monitored import Plain, whole
from ..callbacks.user_code import make_trainer
from .browser import CHROMIUM, seen_figures
from .page import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The logs of a Trainer of one's own, with monitors and no ContinualMonitor."""
    folder = tmp_path_factory.mktemp("runs")
    monitors = [GeodesicMonitor(), SharpnessMonitor(), ConnectivityMonitor(), ConnectivityMonitor(reference=Plain(3))]
    module = Plain()
    for _ in range(2):
        logger = TensorBoardLogger(folder, name="mine", version=0)
        make_trainer(folder, *monitors, RebasinMerge(alpha=0.5), max_epochs=3, logger=logger).fit(module, whole())
    assert main(["report", str(folder)]) == 0
    return folder, monitors


def test_curves_and_pictures_of_monitors_are_on_the_page(run):
    folder, _ = run
    figures = Page(folder / "report.html").figures
    groups = ("geodesic", "sharpness", "connectivity", "connectivity_reference")
    assert {f"figure-curves-{group}-mine" for group in groups} <= set(figures)
    events = EventAccumulator(str(folder / "mine" / "version_0"), size_guidance={"images": 0}).Reload()
    for tag in ("geodesic/tracks", "connectivity/path", "connectivity_reference/path"):
        shown = figures[f"figure-picture-{tag.replace('/', '-')}-mine"]["src"].removeprefix("data:image/png;base64,")
        assert base64.b64decode(shown) == events.Images(tag)[-1].encoded_image_string


def test_curves_are_what_the_monitors_measured(run):
    folder, (geodesic, _, connectivity, given) = run
    logs = [read_log(event_folders(folder))]
    for monitor, group, tag, title, name in (
        (geodesic, "geodesic", "geodesic/line_shape_score/net.1", "line shape score", "net.1"),
        (connectivity, "connectivity", "connectivity/barrier_aligned", "loss barrier", "aligned"),
        (given, "connectivity_reference", "connectivity_reference/barrier", "loss barrier", "as trained"),
    ):
        curve = panels_of(group, logs)[title][name]
        measured = [entry[tag] for entry in monitor.history if tag in entry]
        assert curve.values[0].tolist() == pytest.approx(measured, rel=1e-5)
        assert len(curve.steps) == len(set(curve.steps.tolist())) == len(measured)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_monitors(run, tmp_path):
    folder, _ = run
    shown = seen_figures(folder / "report.html", tmp_path)
    assert set(shown) == set(Page(folder / "report.html").figures)
    assert all(width > 200 and height > 100 for width, height in shown.values())


def test_a_monitor_alone_makes_a_page(tmp_path):
    with SummaryWriter(str(tmp_path / "a")) as writer:
        for step in range(4):
            writer.add_scalar("sharpness/eigenvalue", 2.0 - step, step)
    assert main(["report", str(tmp_path)]) == 0
    assert set(Page(tmp_path / "report.html").figures) == {"figure-curves-sharpness-a"}


def test_seeds_are_means_and_the_picture_is_of_the_first(tmp_path):
    picture = BytesIO()
    for seed in range(2):
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([0, seed])
        with SummaryWriter(str(tmp_path / "rebasin" / f"seed_{seed}" / "tensorboard" / "version_0")) as writer:
            for step in range(3):
                writer.add_scalar("sharpness/trace", seed + step, step)
            writer.add_figure("geodesic/tracks", figure, 2)
        if not seed:
            figure.savefig(picture)
    logs = [read_log(event_folders(tmp_path / "rebasin" / f"seed_{seed}")) for seed in range(2)]
    assert torch.equal(
        panels_of("sharpness", logs)["trace"][""].values, torch.tensor([[0.0, 1, 2], [1, 2, 3]]).double()
    )
    assert main(["report", str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert "The mean over 2 seeds, the range as a band." in page.text
    assert "geodesic/tracks at step 2 of seed 0: the last that the monitor drew." in page.text
