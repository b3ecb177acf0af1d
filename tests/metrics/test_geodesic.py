import copy
import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_rebasin.metrics import (
    LineShapeScore,
    OptimalTransportScore,
    line_shape_scores,
    optimal_transport_score,
    recorded,
    same_space,
    track_layers,
    tracks_figure,
    tracks_of,
)


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_straight_line_has_score_one_whatever_its_steps():
    start, direction = cloud(5, 4), cloud(5, 4, seed=1)
    track = [start + share * direction for share in (0, 0.1, 2, 2.5)]
    assert line_shape_scores(track).tolist() == pytest.approx([1.0] * 5)


def test_bent_tracks_have_the_known_scores():
    corner = [torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 0.5]])]
    assert line_shape_scores(corner).tolist() == pytest.approx(
        [2 / 2**0.5]
    )  # two steps at a right angle, of any length
    angle = math.radians(60)
    points = [torch.tensor([[0.0, 0.0]])]
    for turn in range(3):  # an arc of three unit steps that turns by 60 degrees twice ends two units away
        step = torch.tensor([[math.cos(turn * angle), math.sin(turn * angle)]])
        points.append(points[-1] + step * (turn + 1))
    assert line_shape_scores(points).tolist() == pytest.approx([3 / 2], rel=1e-6)


def test_a_way_back_and_a_stand():
    there_and_back = [torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2)]
    assert line_shape_scores(there_and_back).isinf().all()
    stands_once = [torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2)]
    assert line_shape_scores(stands_once).tolist() == pytest.approx([2.0])


@pytest.mark.parametrize("scale", [1e-100, 1e-9, 1e100])
def test_the_score_of_a_line_knows_no_size_of_the_steps(scale):
    direction = cloud(5, 4) * torch.tensor([[1.0], [1.0], [1.0], [1e-12], [1e12]])
    assert line_shape_scores([scale * share * direction for share in (0, 1, 1.5, 4)]).tolist() == pytest.approx([1] * 5)
    stands_once = [scale * share * direction for share in (0, 1, 1, 1 + 1e-12)]
    assert line_shape_scores(stands_once).tolist() == pytest.approx([3.0] * 5, rel=1e-3)
    assert line_shape_scores([direction] * 3).isinf().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 6), st.integers(1, 5), st.integers(0, 999))
def test_a_score_is_at_least_one_and_knows_no_frame_or_scale(layers, width, seed):
    track = [cloud(4, width, seed=seed + layer) for layer in range(layers)]
    scores = line_shape_scores(track)
    assert (scores >= 1 - 1e-9).all()
    turn = torch.linalg.qr(cloud(width, width, seed=seed + 99)).Q
    moved = [3 * points @ turn + 7 for points in track]
    assert line_shape_scores(moved).tolist() == pytest.approx(scores.tolist(), rel=1e-6)


def test_a_monotone_map_of_the_line_is_optimal_and_a_shuffled_one_is_not():
    x = cloud(50, 1)
    image = x.sort(0).values.exp()[x[:, 0].argsort().argsort()]  # each point goes to the image of its rank
    score, matched = optimal_transport_score(x, image)
    assert (score, matched) == (pytest.approx(1.0), pytest.approx(1.0))
    shuffled = image[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    score, matched = optimal_transport_score(x, shuffled)
    optimal = float((x.sort(0).values - image.sort(0).values).square().mean())
    assert score == pytest.approx(optimal / float((x - shuffled).square().mean()))
    assert score < 0.9
    assert matched < 0.2


def test_the_score_of_a_rotation_is_that_of_pot():
    x = cloud(20, 2)
    y = x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    cost = ot.emd2([], [], ot.dist(x.numpy(), y.numpy()))
    assert optimal_transport_score(x, y)[0] == pytest.approx(cost / float((x - y).square().sum(1).mean()))


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_of_equally_good_plans_the_one_that_sends_points_to_their_own_images_counts(far):
    twice = cloud(20, 2).repeat(2, 1)
    twice[0] += far  # an outlier, beside which the steps are small
    assert optimal_transport_score(twice, twice + 1) == (pytest.approx(1.0), 1.0)
    assert optimal_transport_score(twice, twice) == (1.0, 1.0)
    x = 1 + cloud(20, 1).abs()
    gathered = torch.where(x > x.median(), x, 0)
    assert optimal_transport_score(x, gathered) == (pytest.approx(1.0), 1.0)


def test_a_slightly_shorter_plan_is_not_given_up_for_the_points_own_images():
    x = torch.tensor([[0.0], [1e-3], [1e6]], dtype=torch.float64)
    score, matched = optimal_transport_score(x, x[[1, 0, 2]])
    assert (score, matched) == (0.0, pytest.approx(1 / 3))


def test_points_that_only_change_places_score_nothing():
    x = cloud(12, 2)
    assert optimal_transport_score(x, x.roll(1, 0)) == (0.0, 0.0)


def test_points_that_stay_are_where_they_belong():
    x = cloud(6, 2)
    assert optimal_transport_score(x, x) == (1.0, pytest.approx(1.0))


def test_metrics_over_batches_are_those_of_the_whole():
    track = [cloud(30, 3, seed=layer) for layer in range(4)]
    straight, optimal = LineShapeScore(), OptimalTransportScore()
    for part in (slice(0, 11), slice(11, 30)):
        straight.update([points[part] for points in track])
        optimal.update([points[part] for points in track])
    score, matched = optimal_transport_score(track[0], track[-1])
    assert float(straight.compute()) == pytest.approx(float(line_shape_scores(track).mean()))
    assert float(optimal.compute()) == pytest.approx(score)
    assert float(optimal.matched) == pytest.approx(matched)
    assert straight.higher_is_better is False
    assert optimal.higher_is_better is True
    for metric in (straight, optimal):
        _, axes = metric.plot()
        assert axes.lines or axes.collections


def test_what_several_processes_have_gathered_is_one_cloud():
    track = [cloud(30, 3, seed=layer) for layer in range(3)]
    metric = OptimalTransportScore()
    metric.update([points[:10] for points in track])
    metric.update([points[10:] for points in track])
    metric.start, metric.end = (
        torch.cat(metric.start),
        torch.cat(metric.end),
    )  # as torchmetrics leaves them after a sync
    assert float(metric.compute()) == pytest.approx(optimal_transport_score(track[0], track[-1])[0])


def test_scores_of_single_precision_far_from_the_origin():
    track = [(cloud(40, 3, seed=layer) + 1e4).float() for layer in range(3)]
    wide = [points.double() for points in track]
    assert line_shape_scores(track).tolist() == pytest.approx(line_shape_scores(wide).tolist(), rel=1e-9)
    assert optimal_transport_score(track[0], track[2])[0] == pytest.approx(optimal_transport_score(wide[0], wide[2])[0])
    assert optimal_transport_score(track[0], track[0] + 2**-7)[0] <= 1


def test_clouds_are_turned_each_onto_the_one_before():
    clouds = [cloud(30, 3), cloud(30, 5, seed=1), cloud(30, 4, seed=2), cloud(30, 5, seed=3)]
    joined = same_space(clouds)
    for index in range(1, 4):
        a, b = (points - points.mean(0) for points in clouds[index - 1 : index + 1])
        # No other orthogonal map brings a cloud nearer to the one before: the nuclear norm of their products is the bound.
        bound = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(b.T @ a).sum()
        assert float((joined[index] - joined[index - 1]).square().sum()) == pytest.approx(float(bound))


def test_clouds_of_several_widths_are_turned_onto_each_other():
    x = cloud(12, 3)
    turn = torch.linalg.qr(cloud(3, 3, seed=5)).Q
    wider = nn.functional.pad(x @ turn, (0, 2)) + 4
    joined = same_space([x, wider, 2 * x[:, :2]])
    assert torch.allclose(joined[0][:, :3], x - x.mean(0))
    assert torch.allclose(joined[1], joined[0], atol=1e-9)  # the same cloud but for a rigid motion
    assert joined[2].square().sum() == pytest.approx(float((2 * (x - x.mean(0))[:, :2]).square().sum()))


def test_more_dimensions_than_points_lose_nothing():
    x, y = cloud(6, 40), cloud(6, 9, seed=1)
    joined = same_space([x, y])
    for before, after in ((x, joined[0]), (y, joined[1])):
        assert torch.allclose(torch.cdist(before, before), torch.cdist(after, after), atol=1e-9)
    # No other orthogonal map brings them nearer: the nuclear norm of the cross products is the bound.
    a, b = (points - points.mean(0) for points in (x, y))
    bound = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a.T @ b).sum()
    assert float((joined[0] - joined[1]).square().sum()) == pytest.approx(float(bound))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.act(self.inner(x))


def calls_of(network, x):
    with torch.no_grad(), recorded(network) as calls:
        network(x)
    return calls


def test_a_track_goes_through_the_blocks_of_each_stage():
    network = nn.Sequential(nn.Linear(6, 4), Block(4), Block(4), nn.Linear(4, 3), Block(3), Block(3), Block(3))
    x = cloud(5, 6).float()
    tracks = tracks_of(calls_of(network, x))
    assert list(tracks) == ["1", "4"]
    with torch.no_grad():
        points = [x]
        for layer in network:
            points.append(layer(points[-1]))
    for found, wanted in ((tracks["1"], points[1:4]), (tracks["4"], points[4:])):
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_plain_network_is_followed_through_its_activations():
    layers = [part for _ in range(3) for part in (nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout())]
    network = nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 2)).eval()
    tracks = tracks_of(calls_of(network, cloud(5, 6).float()))
    assert list(tracks) == ["2"]
    assert len(tracks["2"]) == 3
    assert all((points >= 0).all() for points in tracks["2"])


def test_layers_of_several_widths_are_followed_from_the_input():
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x = cloud(5, 6).float().reshape(5, 2, 3)
    (track,) = tracks_of(calls_of(network, x)).values()
    assert [points.shape[1] for points in track] == [6, 4, 2]
    assert torch.equal(track[0], x.flatten(1))


def test_frozen_copies_and_second_calls_are_left_out():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    holder = nn.Module()
    holder.network, holder.teacher = network, copy.deepcopy(network).requires_grad_(False)
    x = cloud(5, 4).float()
    with recorded(holder) as calls:
        holder.teacher(x)
        holder.network(x)
        holder.network(2 * x)
    assert {call.name.split(".")[0] for call in calls} == {"network"}
    (track,) = tracks_of(calls).values()
    assert torch.equal(track[0], network[:2](x))
    assert not network[0]._forward_hooks


def test_modules_that_give_out_the_same_are_one_point():
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    x = cloud(5, 4).float()
    calls = calls_of(nn.Sequential(nn.Sequential(*stages), nn.Linear(4, 2)), x)
    chosen = tracks_of(calls, ["0.0", "0.1", "0.2"])["0.0"]
    (track,) = tracks_of(calls).values()
    assert len(track) == 4  # not the last one twice, as the stage and as what the stages are in
    assert all(torch.equal(a, b) for a, b in zip([x, *chosen], track, strict=True))


def test_of_modules_that_give_out_the_same_the_first_is_the_point():
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
    stages.append(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    assert track_layers(calls_of(nn.Sequential(*stages), cloud(5, 4).float())) == {"0": ["0", "1", "2.0"]}


def test_what_goes_into_a_block_is_recorded_before_the_block_works_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))

        def forward(self, x):
            return x + self.inner(x)

    x = cloud(5, 4).float()
    (track,) = tracks_of(calls_of(nn.Sequential(InPlace(), InPlace(), InPlace()), x.clone())).values()
    assert torch.equal(track[0], x)


def test_of_a_module_the_first_call_counts():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    first, second = cloud(5, 4).float(), cloud(5, 4).float() + 1
    with torch.no_grad(), recorded(network) as calls:
        network(first)
        network(second)
    assert [call.name for call in calls] == ["0", "1", "2"]
    assert torch.equal(calls[0].input, first)
    assert torch.equal(calls[0].output, network[0](first).detach())


def test_what_goes_in_by_keyword_is_no_point():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.second(self.first(input=x))

    with pytest.raises(ValueError, match="no three layers"):
        tracks_of(calls_of(ByKeyword(), cloud(5, 6).float()))


class Rectified(nn.Module):
    """A residual block whose output is that of its last part."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.act, self.end = nn.Linear(width, width), nn.Tanh(), nn.ReLU()

    def forward(self, x):
        return self.end(x + self.act(self.inner(x)))


@pytest.mark.parametrize(
    "block",
    [lambda: Rectified(4), lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)],
    ids=["rectified", "norms behind"],
)
def test_a_block_that_ends_with_the_output_of_its_last_part_is_a_block(block):
    network = nn.Sequential(block(), block(), block())  # in training: the fast path of the Transformer calls no parts
    x = cloud(5, 4).float() if isinstance(network[0], Rectified) else cloud(15, 4).float().reshape(5, 3, 4)
    calls = calls_of(network, x)
    assert track_layers(calls) == {"0": ["0", "1", "2"]}
    (track,) = tracks_of(calls).values()
    points = [x]
    for layer in network:
        points.append(layer(points[-1]).detach())
    assert all(torch.allclose(a, b.flatten(1), atol=1e-6) for a, b in zip(track, points, strict=True))


def test_a_stage_that_begins_at_another_width_has_no_point_for_its_input():
    class Down(nn.Module):
        def __init__(self, ins, outs):
            super().__init__()
            self.inner = nn.Linear(ins, outs)

        def forward(self, x):
            return self.inner(x).tanh() + 1

    network = nn.Sequential(Down(6, 4), Down(4, 4), Down(4, 4))
    (track,) = tracks_of(calls_of(network, cloud(5, 6).float())).values()
    assert [points.shape[1] for points in track] == [4, 4, 4]


def test_of_two_classes_of_as_many_points_the_later_one_is_taken():
    layers = [part for _ in range(3) for part in (nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid())]
    assert list(tracks_of(calls_of(nn.Sequential(*layers), cloud(5, 4).float()))) == ["2"]


def test_layers_that_work_in_place_do_not_write_to_what_was_recorded():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = cloud(5, 4).float()
    calls = {call.name: call.output for call in calls_of(network, x)}
    assert torch.equal(calls["0"], network[0](x))
    assert (calls["0"] < 0).any()


def test_only_what_is_wanted_is_recorded():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with torch.no_grad(), recorded(network, ["2"]) as calls:
        network(cloud(5, 4).float())
    assert [call.name for call in calls] == ["2"]


def test_named_layers():
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    calls = calls_of(network, cloud(5, 6).float())
    assert [points.shape[1] for points in tracks_of(calls, ["0", "2", "3"])["0"]] == [4, 4, 2]
    with pytest.raises(ValueError, match="layers names 'head', which was not called; these were: 0, 1, 2, 3"):
        tracks_of(calls, ["0", "head", "2"])
    with pytest.raises(ValueError, match="at least 3 modules"):
        tracks_of(calls, ["0", "2"])
    with pytest.raises(ValueError, match="no three layers"):
        tracks_of(calls_of(nn.Sequential(nn.Linear(6, 2)), cloud(5, 6).float()))


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ([torch.zeros(2, 2)], "at least t(hree|wo) layers"),
        ([torch.zeros(2, 2)] * 2 + [torch.zeros(3, 2)], "in place 2"),
        ([torch.zeros(0, 2)] * 3, "one B of at least 1"),
        ([torch.zeros(2)] * 3, r"must be \(B, width\) .* got \(2,\) in place 0"),
    ],
)
def test_tracks_that_do_not_fit(track, message):
    for metric in (LineShapeScore(), OptimalTransportScore()):
        with pytest.raises(ValueError, match=message):
            metric.update(track)


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (torch.zeros(3, 2, 2), "track must be a list of tensors .*, got a Tensor"),
        (None, "track must be a list of tensors .*, got a NoneType"),
        ("track", "track must be a list of tensors .*, got a str"),
        ({"a": torch.zeros(2, 2)}, "track must be a list of tensors .*, got a dict"),
        (
            [torch.zeros(2, 2), np.zeros((2, 2)), torch.zeros(2, 2)],
            r"track\[1\] must be .* got ndarray: torch.from_numpy",
        ),
        ([torch.zeros(2, 2), torch.zeros(2, 2), None], r"track\[2\] must be a tensor of real numbers, got NoneType"),
        (["a", "b", "c"], r"track\[0\] must be a tensor of real numbers, got str"),
        (
            [torch.zeros(2, 2).to_sparse()] * 3,
            r"track\[0\] must be a tensor of real numbers that is dense, got sparse_coo",
        ),
        ([torch.zeros(2, 2).cfloat()] * 3, r"track\[0\] must be a tensor of real numbers, got torch.complex64"),
    ],
)
def test_what_is_no_track(track, message):
    for measure in (line_shape_scores, LineShapeScore().update, OptimalTransportScore().update):
        with pytest.raises(TypeError, match=message):
            measure(track)


def test_tracks_of_half_precision_and_of_two_widths():
    track = [cloud(6, 3).half(), cloud(6, 2, seed=1).half(), cloud(6, 3, seed=2).half()]
    assert (line_shape_scores(track) >= 1).all()
    metric = OptimalTransportScore()
    metric.update(track[:2])
    assert 0 < float(metric.compute()) <= 1


def test_the_optimal_transport_score_takes_two_layers_and_the_line_shape_score_three():
    metric = OptimalTransportScore()
    metric.update([cloud(5, 2), cloud(5, 2, seed=1)])
    assert float(metric.compute()) == pytest.approx(optimal_transport_score(cloud(5, 2), cloud(5, 2, seed=1))[0])
    with pytest.raises(ValueError, match="at least three layers, for two points are on a line; got 2"):
        line_shape_scores([cloud(5, 2), cloud(5, 2, seed=1)])


@pytest.mark.parametrize(
    ("start", "end", "error", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(3, 2), ValueError, "one shape"),
        (torch.zeros(2), torch.zeros(2), ValueError, r"start must hold one point a row, \(n, d\), got shape \(2,\)"),
        (torch.zeros(2, 2), torch.full((2, 2), math.nan), ValueError, "end holds NaN or infinity"),
        (torch.zeros(2, 2), np.zeros((2, 2)), TypeError, "end must be a tensor of real numbers, got ndarray"),
        (None, torch.zeros(2, 2), TypeError, "start must be a tensor of real numbers, got NoneType"),
    ],
)
def test_clouds_that_do_not_fit(start, end, error, message):
    with pytest.raises(error, match=message):
        optimal_transport_score(start, end)


def test_updates_that_cannot_be_scored_together_are_refused_and_not_kept():
    metric = OptimalTransportScore()
    metric.update([cloud(5, 3), cloud(5, 3, seed=1)])
    score = metric.compute()
    with pytest.raises(ValueError, match=r"track\[0\] must have one width in all updates, got 2 after 3"):
        metric.update([cloud(5, 2), cloud(5, 3)])
    with pytest.raises(ValueError, match=r"track\[1\] must have one width in all updates, got 4 after 3"):
        metric.update([cloud(5, 3), cloud(5, 4)])
    with pytest.raises(ValueError, match=r"track\[1\] holds NaN or infinity"):
        metric.update([cloud(5, 3), cloud(5, 3) * math.nan])
    assert (len(metric.start), len(metric.end)) == (1, 1)
    assert metric.compute() == score
    metric([cloud(5, 4), cloud(5, 3)])  # forward begins with an empty state
    with pytest.raises(ValueError, match="The first layer must have one width in all updates"):
        metric.compute()


def test_scores_of_nothing_are_nan():
    for metric in (LineShapeScore(), OptimalTransportScore()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics says that it comes before the update
            assert metric.compute().isnan()
    assert OptimalTransportScore().matched.isnan()


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_over_sequences_are_recorded_with_samples_in_front(batch_first):
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=batch_first)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)

        def forward(self, x):
            hidden, _ = self.lstm(x)
            return self.attention(hidden, hidden, hidden)[0]

    network, x = Sequences(), torch.randn(5, 3, 4)
    gradients = {}
    with recorded(network, gradients=gradients) as calls:
        output = network(x if batch_first else x.transpose(0, 1))
        output.square().sum().backward()
    output = output if batch_first else output.transpose(0, 1)
    found = {call.name: call for call in calls}
    assert torch.equal(found["attention"].output, output)
    assert torch.equal(gradients["attention"], 2 * output)
    assert torch.equal(found["lstm"].input, x)
    assert found["lstm"].output.shape == gradients["lstm"].shape == (5, 3, 6)


def test_the_picture_has_a_line_a_sample():
    tracks = {name: [cloud(7, 5, seed=layer) for layer in range(4)] for name in ("a", "b")}
    figure = tracks_figure(tracks)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["from a, 3 steps", "from b, 3 steps"]
    lines = [c for c in panels[0].collections if len(c.get_paths()) == 3]
    assert len(lines) == 7


def test_the_picture_names_the_last_layer_where_it_is_known():
    tracks = {name: [cloud(7, 5, seed=layer) for layer in range(3)] for name in ("a_$1", "b", "net.blocks.0.first")}
    figure = tracks_figure(tracks, {"a_$1": "c_$2", "net.blocks.0.first": "net.blocks.11.second"})
    figure.draw_without_rendering()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    long = "from net.blocks.0.first\nto net.blocks.11.second, 2 steps"
    assert titles == ["from a_$1 to c_$2, 2 steps", "from b, 2 steps", long]


@pytest.mark.parametrize(
    ("tracks", "error", "message"),
    [
        ({}, ValueError, "tracks is empty, so there is nothing to draw"),
        ([torch.zeros(2, 2)] * 3, TypeError, "tracks must be a mapping of what is drawn, got a list"),
        ({"a": None}, TypeError, r"tracks\['a'\] must be a list of tensors .*, got a NoneType"),
        ({"a": []}, ValueError, r"tracks\['a'\] must have points of one shape in all layers, got \[\]"),
        ({"a": [np.zeros((2, 2))] * 3}, TypeError, r"tracks\['a'\]\[0\] must be a tensor of real numbers, got ndarray"),
        ({"a": [torch.zeros(2, 2), torch.zeros(2, 3)]}, ValueError, r"\[\(2, 2\), \(2, 3\)\]: same_space brings"),
        ({"a": [torch.full((2, 2), math.nan)] * 3}, ValueError, r"tracks\['a'\]\[0\] holds NaN"),
    ],
)
def test_tracks_that_cannot_be_drawn(tracks, error, message):
    with pytest.raises(error, match=message):
        tracks_figure(tracks)
