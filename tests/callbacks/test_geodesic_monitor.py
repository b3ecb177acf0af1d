"""Geodesics against the functions that define them."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_rebasin import (
    GeodesicMonitor,
    OptimalTransportScore,
    line_shape_scores,
    optimal_transport_score,
)

from .monitored import Plain, X, fit, whole
from .user_code import make_trainer


def test_geodesic_scores_are_those_of_the_trained_network(tmp_path):
    module, monitor = Plain(), GeodesicMonitor(examples=40)
    fit(tmp_path, monitor, module)
    track = [X[:40]]
    with torch.no_grad():
        for layer in module.net:
            track.append(layer(track[-1]))
    through = track[2::2]  # the three tanh layers
    assert monitor.tracks == {"net.1": ["net.1", "net.3", "net.5"]}
    score, matched = optimal_transport_score(through[0], through[-1])
    found = monitor.history[-1]
    assert found["geodesic/line_shape_score/net.1"] == pytest.approx(float(line_shape_scores(through).mean()), rel=1e-5)
    assert found["geodesic/optimal_transport_score/net.1"] == pytest.approx(score, rel=1e-5)
    assert found["geodesic/matched/net.1"] == pytest.approx(matched, abs=1e-6)


def test_geodesic_layers_are_chosen_by_name(tmp_path):
    monitor = GeodesicMonitor(layers=["net.0", "net.2", "head"])
    fit(tmp_path, monitor, Plain())
    assert "geodesic/line_shape_score/net.0" in monitor.history[0]
    assert monitor.tracks == {"net.0": ["net.0", "net.2", "head"]}
    with pytest.raises(MisconfigurationException, match=r"names 'nat', which Plain does not have; it has net, net\.0"):
        fit(tmp_path, GeodesicMonitor(layers=["net.0", "nat", "head"]), Plain())


def test_frozen_layers_are_a_track_where_they_are_named(tmp_path):
    module, monitor = Plain(), GeodesicMonitor(layers=["net.1", "net.3", "net.5"])
    module.net.requires_grad_(False)
    fit(tmp_path, monitor, module)
    assert monitor.tracks == {"net.1": ["net.1", "net.3", "net.5"]}
    assert len(monitor.history) == 2


def test_of_several_widths_the_score_is_that_of_the_metric(tmp_path):
    module, names, metric = Plain(), ["net.0", "net.2", "head"], OptimalTransportScore()
    module.net[2], module.net[4] = nn.Linear(5, 7), nn.Linear(7, 5)
    monitor = GeodesicMonitor(layers=names, examples=40)
    fit(tmp_path, monitor, module)
    with torch.no_grad():
        points = [module.net[:1](X[:40]), module.net[:3](X[:40]), module.head(module.net(X[:40]))]
    metric.update(points)
    assert monitor.history[-1]["geodesic/optimal_transport_score/net.0"] == pytest.approx(
        float(metric.compute()), rel=1e-4
    )


def test_a_trainer_watches_two_tracks(tmp_path):
    monitors = [GeodesicMonitor(), GeodesicMonitor(layers=["net.0", "net.2", "head"])]
    make_trainer(tmp_path, *monitors).fit(Plain(), whole())
    assert list(monitors[0].tracks) == ["net.1"]
    assert list(monitors[1].tracks) == ["net.0"]


def test_a_network_without_a_track_is_trained_all_the_same(tmp_path):
    class Linear(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()
            self.head = nn.Linear(6, 3)

    with pytest.warns(UserWarning, match="no three layers"):
        assert fit(tmp_path, GeodesicMonitor(), Linear()).current_epoch == 2


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("head", TypeError, "layers must be a list of names of modules, got 'head'"),
        ({"a", "b", "c"}, TypeError, "layers must be a list of names of modules, got {"),
        ([], ValueError, r"layers must name at least 3 modules, for two points lie on a line; got \[\]"),
        (["net.0", "head", "net.0"], ValueError, "layers names 'net.0' twice"),
    ],
)
def test_layers_that_make_no_track(layers, error, message):
    with pytest.raises(error, match=message):
        GeodesicMonitor(layers=layers)
