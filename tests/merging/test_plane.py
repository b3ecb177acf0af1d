import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_rebasin.merging import PlaneLosses, loss_plane
from lit_rebasin.metrics import plane_figure


def weights(seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    return {"a": values[:4].reshape(2, 2), "b": values[4:], "steps": torch.tensor(seed)}


def flat(one):
    return torch.cat([one["a"].flatten(), one["b"]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500))
def test_the_grid_is_the_plane_through_the_three(seed):
    corners = [weights(seed + k) for k in range(3)]
    points = []
    plane = loss_plane(*corners, lambda one: points.append(one) or flat(one).square().sum(), points=4, margin=0.3)
    vectors = torch.stack([flat(point) for point in points]).reshape(4, 4, -1)
    # Distances in the picture are those of the weights, also to the three networks.
    places = torch.cartesian_prod(plane.y, plane.x).flip(1).reshape(4, 4, 2)
    for corner, place in zip(corners, plane.corners, strict=True):
        wanted = (vectors - flat(corner)).norm(dim=2)
        assert torch.allclose((places - place).norm(dim=2), wanted, atol=1e-8)
    assert torch.allclose(plane.losses, vectors.square().sum(2))
    assert all(point["steps"] == seed for point in points)


def test_losses_are_those_of_the_networks_at_their_corners():
    corners = [weights(k) for k in range(3)]
    plane = loss_plane(*corners, lambda one: flat(one).sum(), points=3, margin=0)
    # A linear loss is linear on the plane: three values fix it.
    x, y = plane.corners.T
    design = torch.stack([torch.ones(3, dtype=torch.float64), x, y], 1)
    slope = torch.linalg.solve(design, torch.stack([flat(corner).sum() for corner in corners]))
    wanted = slope[0] + slope[1] * plane.x[None, :] + slope[2] * plane.y[:, None]
    assert torch.allclose(plane.losses, wanted)
    assert (plane.x[0], plane.x[-1]) == (x.min(), x.max())


def test_three_networks_on_a_line():
    first, second = weights(0), weights(1)
    middle = {name: (first[name] + second[name]) / 2 for name in first}
    for third in (middle, first, second):
        with pytest.raises(ValueError, match="lie on a line"):
            loss_plane(first, second, third, lambda one: flat(one).sum())
    with pytest.raises(ValueError, match="lie on a line"):
        loss_plane(first, first, second, lambda one: flat(one).sum())


def test_what_is_not_finite_is_the_first_networks():
    corners = [weights(k) for k in range(3)]
    for corner in corners:
        corner["mask"] = torch.tensor([0.0, float("-inf")])
    seen = []
    loss_plane(*corners, lambda one: seen.append(one["mask"]) or flat(one).sum(), points=3)
    assert all(mask.tolist() == [0.0, float("-inf")] for mask in seen)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="The first network has a tensor 'b' that the third network lacks"):
        loss_plane(weights(0), weights(1), {"a": weights(2)["a"]}, lambda one: 0.0)
    with pytest.raises(ValueError, match="The third network holds NaN or infinity in 'a'"):
        loss_plane(weights(0), weights(1), {**weights(2), "a": weights(2)["a"] * float("nan")}, lambda one: 0.0)
    with pytest.raises(ValueError, match="The first network holds NaN or infinity in 'a', which the others do not"):
        loss_plane({**weights(0), "a": weights(0)["a"] * float("nan")}, weights(1), weights(2), lambda one: 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": 1}, ValueError, "points must be a whole number of at least 2, got 1"),
        ({"points": 2.5}, ValueError, "points must be a whole number of at least 2, got 2.5"),
        ({"margin": -0.1}, ValueError, r"margin must be at least 0 and finite, got -0\.1"),
        ({"margin": float("inf")}, ValueError, "margin must be at least 0 and finite, got inf"),
        ({"margin": "wide"}, TypeError, "margin must be a number, got a str"),
        ({"loss": None}, TypeError, "loss must be a function of weights by name, got a NoneType"),
        ({"loss": lambda one: torch.ones(3)}, ValueError, r"loss must return one number, .* got shape \(3,\)"),
        ({"loss": lambda one: None}, TypeError, "loss must return a number, or a tensor of one, got a NoneType"),
        ({"first": nn.Linear(2, 3)}, TypeError, r"first must be tensors by name, .*state_dict\(\), got a Linear"),
        ({"third": None}, TypeError, "third must be tensors by name, .* got a NoneType"),
        ({"second": {"a": np.zeros(3)}}, TypeError, "second must be tensors by name, got a ndarray for 'a'"),
    ],
)
def test_arguments_of_another_type_or_size(change, error, message):
    networks = dict(zip(("first", "second", "third"), (weights(k) for k in range(3)), strict=True))
    with pytest.raises(error, match=message):
        loss_plane(**({**networks, "loss": lambda one: 0.0} | change))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.2, 1.2005),
        (1.2, 1.200003),
        (1.2, 1.25),
        (0.4, 2.3),
        (0.3, 7),
        (1.0, 19.0),
        (0.9, 90),
        (1e-3, 3),
        (1e-9, 1e4),
        (2e-12, 1e-11),
        (0, 1e-7),
        (-3.00001, -3),
        (-3, 4),
        (-1e6, 2),
        (3e5, 3.1e5),
    ],
)
def test_losses_on_the_colour_bar_differ_and_are_where_they_say(low, high):
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    shares = (x[:, None] + x[None, :]) / 2
    losses = low * (high / low) ** shares if low > 0 else low + (high - low) * shares
    figure = plane_figure(PlaneLosses(x, x, losses, torch.rand(3, 2)), ("a", "b", "c"))
    figure.draw_without_rendering()
    bar = figure.axes[1].yaxis
    places, labels = bar.get_majorticklocs(), [label.get_text() for label in bar.get_ticklabels()]
    assert 3 <= len(set(labels)) == len(labels) <= 10
    assert all(low <= place <= high for place in places)
    assert max(abs(float(label) - place) for label, place in zip(labels, places, strict=True)) < 0.01 * (high - low)
    assert all(len(label) < 12 for label in labels)
    marks = torch.tensor([low, *places, high], dtype=torch.float64)
    spread = (marks.log() if low > 0 else marks).diff()  # as the bar shows them
    assert spread.max() < 0.5 * spread.sum()
    assert not bar.get_minorticklocs().size


def test_the_picture_marks_the_three():
    plane = loss_plane(*[weights(k) for k in range(3)], lambda one: flat(one).square().sum(), points=5)
    axes = plane_figure(plane, ("previous", "new", "aligned")).axes[0]
    assert [text.get_text() for text in axes.texts] == ["previous", "new", "aligned"]
    assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [tuple(corner) for corner in plane.corners.tolist()]
    wide, high = plane.x[-1] - plane.x[0], plane.y[-1] - plane.y[0]
    assert (axes.get_xlim()[1] - axes.get_xlim()[0], axes.get_ylim()[1] - axes.get_ylim()[0]) == (
        pytest.approx(float(wide)),
        pytest.approx(float(high)),
    )
    nearly = PlaneLosses(plane.x, plane.y, 1 + 1e-15 * plane.losses, plane.corners)
    broken = PlaneLosses(plane.x, plane.y, plane.losses - 3, plane.corners)
    broken.losses[0, 0] = float("nan")
    assert len(plane_figure(nearly, ("a", "b", "c")).axes) == 1
    assert len(plane_figure(broken, ("a", "b", "c")).axes) == 2  # losses below 0 and NaN are drawn around
    flat_plane = loss_plane(*[weights(k) for k in range(3)], lambda one: 1.0, points=3)
    assert len(plane_figure(flat_plane, ("a", "b", "c")).axes) == 1  # nothing to colour, and no error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_plane_without_a_finite_loss_says_so(value):
    plane = loss_plane(*[weights(k) for k in range(3)], lambda one: value, points=3)
    figure = plane_figure(plane, ("a", "b", "c"))
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == ["no loss of this plane is finite"]
    assert figure.axes[0].get_xlim() == (plane.x[0], plane.x[-1])  # and leaves room for the names


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (("a", "b"), ValueError, "names must be three, one for each network, got 2"),
        ("abc", TypeError, "names must be a list of three, one a network, got a str"),
        (None, TypeError, "names must be a list of three, one a network, got a NoneType"),
    ],
)
def test_three_networks_have_three_names(names, error, message):
    plane = loss_plane(*[weights(k) for k in range(3)], lambda one: 1.0, points=3)
    with pytest.raises(error, match=message):
        plane_figure(plane, names)


def test_what_is_no_plane():
    with pytest.raises(TypeError, match="plane must be what loss_plane gives, PlaneLosses, got a Tensor"):
        plane_figure(torch.zeros(3, 3), ("a", "b", "c"))
