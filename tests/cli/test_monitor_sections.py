"""Event files are written here by torch's SummaryWriter and read by the report."""

import base64

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lit_rebasin import ConnectivityMonitor, FeatureLearningMonitor, GeodesicMonitor, SharpnessMonitor
from lit_rebasin.cli import main
from lit_rebasin.cli.event_files import RunLog, event_folders, read_log
from lit_rebasin.cli.monitor_sections import monitor_sections, panels_of

from ..callbacks.user_code import UserModule, loader, make_trainer
from .browser import CHROMIUM, seen_figures
from .page import Page

GROUPS = ("geodesic", "connectivity", "connectivity_reference", "sharpness", "feature_learning")


def write(folder, numbers, pictures=()):
    """Write numbers by tag and step, and pictures (tag, step, grey value)."""
    with SummaryWriter(folder) as writer:
        for tag, by_step in numbers.items():
            for step, value in by_step.items():
                writer.add_scalar(tag, value, step)
        for tag, step, grey in pictures:
            writer.add_image(tag, np.full((20, 30, 3), grey, np.uint8), step, dataformats="HWC")
    return folder


def report(folder):
    assert main(["report", str(folder)]) == 0
    return Page(folder / "report.html")


def test_every_monitor_has_its_curves_and_its_last_picture(tmp_path):
    numbers = {f"{group}/some/layer.{layer}": {3: 1.0, 6: 2.0} for group in GROUPS for layer in range(3)}
    pictures = [(f"{group}/drawn", step, step) for group in GROUPS for step in (3, 6)]
    page = report(write(tmp_path / "mine", numbers, pictures))
    kinds = [f"figure-curves-{group}-mine" for group in GROUPS]
    assert set(page.figures) == {*kinds, *(f"figure-picture-{group}-drawn-mine" for group in GROUPS)}
    assert page.text.count("at step 6: the last that the monitor drew.") == len(GROUPS)
    for group in GROUPS:
        shown = page.figures[f"figure-picture-{group}-drawn-mine"]
        assert (shown["width"], shown["height"]) == ("30", "20")
        (tmp_path / "a.png").write_bytes(base64.b64decode(shown["src"].removeprefix("data:image/png;base64,")))
        assert set(np.asarray(Image.open(tmp_path / "a.png")).flatten().tolist()) == {6}


def test_monitors_of_a_users_own_trainer_alone_make_a_page(tmp_path):
    monitors = [GeodesicMonitor(), ConnectivityMonitor(every_n_epochs=1), SharpnessMonitor(), FeatureLearningMonitor()]
    trainer = make_trainer(tmp_path, *monitors, logger=TensorBoardLogger(tmp_path, name="mine"))
    trainer.fit(UserModule(), loader(), loader(shuffle=False))
    page = report(tmp_path)
    groups = ("geodesic", "connectivity", "sharpness", "feature_learning")
    assert {f"figure-curves-{group}-mine" for group in groups} <= set(page.figures)
    assert {"figure-picture-geodesic-tracks-mine", "figure-picture-feature_learning-speed-mine"} <= set(page.figures)
    assert "No accuracies of mine: ContinualMonitor logs them." in page.text
    log = read_log(event_folders(tmp_path))
    for monitor in monitors:
        tags = {tag for entry in monitor.history for tag in entry if "/" in tag}
        for tag in tags:
            logged = [entry[tag] for entry in monitor.history if tag in entry]
            assert list(log.monitored[tag].values()) == pytest.approx(logged, rel=1e-6)


def test_a_run_without_monitors_has_no_such_section(tmp_path):
    assert monitor_sections({"mine": [RunLog(alphas={1: 0.5})]}) == ""


def test_quantities_are_panels_and_layers_are_curves():
    first = RunLog(monitored={"connectivity/barrier": {5: 1.0}, "connectivity/barrier_aligned": {5: 0.5}})
    second = RunLog(monitored={"connectivity/barrier": {5: 3.0, 9: 4.0}, "connectivity/energy/net.0": {9: 7.0}})
    panels = panels_of("connectivity", [first, second])
    assert {title: list(curves) for title, curves in panels.items()} == {
        "loss barrier": ["as trained", "aligned"],
        "energy distance of neurons": ["net.0"],
    }
    barrier = panels["loss barrier"]["as trained"]
    assert barrier.steps.tolist() == [5, 9]
    nan = float("nan")
    expected = torch.tensor([[1.0, nan], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(barrier.values, expected, equal_nan=True)
    assert not panels_of("connectivity_reference", [first, second])


def test_of_several_seeds_the_picture_is_that_of_the_first(tmp_path):
    for seed, grey in ((3, 30), (4, 40)):
        folder = tmp_path / "mine" / f"seed_{seed}" / "tensorboard" / "version_0"
        write(folder, {"sharpness/trace": {1: 1.0}}, [("geodesic/tracks", 9, grey)])
    page = report(tmp_path)
    assert "geodesic/tracks at step 9 of seed 3: the last that the monitor drew." in page.text
    assert "The mean over 2 seeds, the range as a band." in page.text
    assert list(page.figures) == ["figure-picture-geodesic-tracks-mine", "figure-curves-sharpness-mine"]


def test_a_version_goes_on_or_takes_the_place_of_the_one_before(tmp_path):
    write(tmp_path / "version_0", {"sharpness/trace": {2: 1.0, 4: 2.0}}, [("geodesic/tracks", 4, 1)])
    write(tmp_path / "version_1", {"sharpness/trace": {6: 3.0}}, [("geodesic/tracks", 6, 2)])
    log = read_log(event_folders(tmp_path))
    assert log.monitored == {"sharpness/trace": {2: 1.0, 4: 2.0, 6: 3.0}}
    assert [bool(picture) for picture in log.pictures["geodesic/tracks"].values()] == [False, True]
    write(tmp_path / "version_2", {"sharpness/eigenvalue": {2: 9.0}})
    log = read_log(event_folders(tmp_path))
    assert (log.monitored, log.pictures) == ({"sharpness/eigenvalue": {2: 9.0}}, {})


def test_steps_that_begin_anew_begin_a_curve_anew(tmp_path):
    """As those of one Trainer a task do, which write to one folder."""
    write(tmp_path, {"sharpness/trace": {2: 1.0, 4: 2.0}, "accuracy/task_00": {0: 0.5}})
    write(tmp_path, {"sharpness/trace": {2: 3.0}, "accuracy/task_01": {1: 0.5}})
    log = read_log(event_folders(tmp_path))
    assert log.monitored == {"sharpness/trace": {2: 3.0}}
    assert log.accuracies == {0: {0: 0.5}, 1: {1: 0.5}}


def test_monitors_of_the_first_task_outlive_the_first_merge(tmp_path):
    """One Trainer and one version a task: the first has monitors alone, the second the first merge."""
    write(tmp_path / "version_0", {"sharpness/trace": {2: 1.0}})
    write(tmp_path / "version_1", {"sharpness/trace": {4: 2.0}, "merge/alpha": {1: 0.5}})
    log = read_log(event_folders(tmp_path))
    assert log.monitored == {"sharpness/trace": {2: 1.0, 4: 2.0}}
    assert log.alphas == {1: 0.5}


def test_a_run_that_measures_tasks_takes_the_place_of_one_that_did_not(tmp_path):
    write(tmp_path / "version_0", {"sharpness/trace": {2: 1.0}})
    write(tmp_path / "version_1", {"sharpness/eigenvalue": {2: 2.0}, "accuracy/task_00": {0: 0.5}})
    assert read_log(event_folders(tmp_path)).monitored == {"sharpness/eigenvalue": {2: 2.0}}


def test_hostile_tags_are_shown_as_text(tmp_path):
    hostile = "sharpness/<script>alert(1)</script> $\\frac{$"
    page = report(write(tmp_path / "mine", {hostile: {1: float("nan"), 2: float("inf")}}, [(hostile, 3, 0)]))
    assert not {"script", "iframe"} & set(page.tags)
    assert len(page.figures) == 2
    assert "<script>alert(1)</script> $\\frac{$ at step 3" in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_curves_and_pictures(tmp_path):
    numbers = {"geodesic/line_shape_score/net.0": {3: 1.0, 6: 2.0}, "sharpness/trace": {3: 1.0}}
    page = report(write(tmp_path / "mine", numbers, [("geodesic/tracks", 6, 9)]))
    shown = {name: width for name, (width, _) in seen_figures(tmp_path / "mine" / "report.html", tmp_path).items()}
    assert set(shown) == set(page.figures)
    assert shown.pop("figure-picture-geodesic-tracks-mine") == 30
    assert len(shown) == 2
    assert all(width > 300 for width in shown.values())
