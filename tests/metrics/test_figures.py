import io

import numpy as np
import pytest
import torch

from lit_rebasin.metrics import (
    MergePaths,
    accuracy_matrices_figure,
    accuracy_matrix_figure,
    accuracy_over_tasks_figure,
    alpha_figure,
    displacement_figure,
    path_figure,
    paths_figure,
)


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_matrices_share_a_scale_and_small_ones_show_numbers():
    figure = accuracy_matrices_figure({"a": torch.full((3, 3), 0.5), "b": torch.full((20, 20), 0.25)})
    first, second, _ = figure.axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in first.texts] == ["50"] * 9
    assert not second.texts
    assert drawn(figure).startswith(b"\x89PNG")


def test_curves_are_means_over_seeds_of_the_tasks_seen():
    seeds = [torch.tensor([[0.9, 0.0], [0.5, 0.7]]), torch.tensor([[0.7, 0.0], [0.3, 0.5]])]
    (line,) = accuracy_over_tasks_figure({"replay": seeds}).axes[0].lines
    torch.testing.assert_close(torch.tensor(line.get_ydata(), dtype=torch.float32), torch.tensor([0.8, 0.5]))
    assert list(line.get_xdata()) == [1, 2]


def test_one_method_without_a_name_has_no_legend_and_a_task_that_was_not_measured_a_gap():
    matrix = torch.tensor([[0.9, 0.1, 0.1], [float("nan")] * 3, [0.5, 0.6, 0.7]])
    axes = accuracy_over_tasks_figure({"": [matrix]}).axes[0]
    assert axes.get_legend() is None
    assert [round(value, 3) for value in axes.lines[0].get_ydata() if value == value] == [0.9, 0.6]
    assert accuracy_over_tasks_figure({"replay": [matrix]}).axes[0].get_legend() is not None


def test_one_task_alone_is_on_a_whole_number():
    for figure in (
        accuracy_over_tasks_figure({"": [torch.tensor([[0.9]])]}),
        accuracy_matrices_figure({"": torch.tensor([[0.9]])}),
        alpha_figure({"": {1: torch.tensor([0.5])}}),
    ):
        assert all(place == round(place) for place in figure.axes[0].xaxis.get_majorticklocs())


def test_path_shows_both_curves_and_where_it_was_merged():
    alphas = torch.linspace(0, 1, 5)
    figure = path_figure(alphas, alphas**2, alphas, 0.25, 3)
    (axes,) = figure.axes
    lines = axes.lines
    assert list(lines[0].get_ydata()) == (alphas**2).tolist()
    assert list(lines[1].get_ydata()) == alphas.tolist()
    assert set(lines[2].get_xdata()) == {0.25}
    assert axes.get_xlabel() == "alpha, weight of the previous model"
    assert figure.get_suptitle() == "Linear path to the previous model, after task 3"


def test_path_to_another_model_with_accuracies_beside_the_loss():
    alphas = torch.linspace(0, 1, 5)
    figure = path_figure(alphas, alphas, alphas, None, 0, "reference", (1 - alphas, 1 - alphas**2))
    loss, accuracy = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [(1 - alphas).tolist(), (1 - alphas**2).tolist()]
    assert {axes.get_xlabel() for axes in figure.axes} == {"alpha, weight of the reference model"}
    assert "previous" not in figure.get_suptitle()
    assert [text.get_text() for text in loss.get_legend().texts] == ["as trained", "aligned"]


def test_matrices_wrap_into_rows_and_what_was_not_measured_has_no_number():
    figure = accuracy_matrices_figure({str(n): torch.full((2, 2), 0.5) for n in range(5)}, columns=3)
    tops = [round(axes.get_subplotspec().rowspan.start) for axes in figure.axes[:5]]
    assert tops == [0, 0, 0, 1, 1]
    assert [axes.get_title() for axes in figure.axes[:5]] == list("01234")
    lower = torch.tensor([[0.5, float("nan")], [0.25, 1.0]])
    assert [text.get_text() for text in accuracy_matrices_figure({"": lower}).axes[0].texts] == ["50", "25", "100"]


def paths(before, after, merged_at=(0.25, 0.25)):
    return MergePaths(torch.linspace(0, 1, 3), torch.tensor(before), torch.tensor(after), torch.tensor(merged_at))


def test_paths_are_means_over_seeds_with_alpha_marked_in_every_panel():
    before, after = [[1.0, 3.0, 2.0], [1.0, 5.0, 2.0]], [[1.0, 1.5, 2.0], [1.0, 2.5, 2.0]]
    figure = paths_figure({1: paths(before, after), 2: paths(before, before, (0.25, 0.75))})
    first, second = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["task 1", "task 2"]
    assert [list(line.get_ydata()) for line in first.lines[1:]] == [[1, 4, 2], [1, 2, 2]]
    assert [set(line.get_xdata()) for line in second.lines[:2]] == [{0.25}, {0.75}]
    assert first.get_ylim() == second.get_ylim()
    assert {text.get_text() for text in figure.legends[0].texts} == {"merged here", "as trained", "aligned"}
    assert drawn(figure).startswith(b"\x89PNG")


def test_paths_without_alignment_are_one_curve():
    same = [[1.0, float("nan"), 2.0]]
    figure = paths_figure({3: paths(same, same, (0.5,))})
    assert {text.get_text() for text in figure.legends[0].texts} == {"merged here", "as trained"}


def test_displacement_is_a_heat_map_of_groups_and_tasks():
    figure = displacement_figure({2: {"b": 1.0}, 1: {"a": 0.25, "b": 0.5}})
    axes, _ = figure.axes
    values = axes.images[0].get_array().filled(-1).tolist()
    assert values == [[0.25, -1], [0.5, 1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert sorted(text.get_text() for text in axes.texts) == ["100", "25", "50"]


def test_alpha_is_the_mean_over_the_seeds_that_merged():
    (line,) = (
        alpha_figure({"rebasin": {1: torch.tensor([0.2, 0.4]), 2: torch.tensor([0.5, float("nan")])}}).axes[0].lines
    )
    torch.testing.assert_close(torch.tensor(line.get_ydata(), dtype=torch.float32), torch.tensor([0.3, 0.5]))
    assert list(line.get_xdata()) == [1, 2]


EYE, LINE = torch.eye(2), torch.linspace(0, 1, 5)


@pytest.mark.parametrize(
    "figure", [accuracy_matrices_figure, accuracy_over_tasks_figure, paths_figure, displacement_figure, alpha_figure]
)
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "is empty, so there is nothing to draw"),
        (None, TypeError, "must be a mapping of what is drawn, got a NoneType"),
        (EYE, TypeError, "must be a mapping of what is drawn, got a Tensor"),
        ("abc", TypeError, "must be a mapping of what is drawn, got a str"),
    ],
)
def test_what_holds_nothing_to_draw(figure, given, error, message):
    with pytest.raises(error, match=message):
        figure(given)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: accuracy_matrix_figure(np.eye(2)), TypeError, "matrix must be a tensor of real numbers, got ndarray"),
        (
            lambda: accuracy_matrix_figure(torch.ones(2, 3)),
            ValueError,
            r"matrix must be .* square .* got shape \(2, 3\)",
        ),
        (lambda: accuracy_matrices_figure({"ours": None}), TypeError, r"matrices\['ours'\] must be a tensor"),
        (
            lambda: accuracy_matrices_figure({"ours": EYE}, 0),
            ValueError,
            "columns must be a whole number of at least 1",
        ),
        (
            lambda: accuracy_over_tasks_figure({"ours": EYE}),
            TypeError,
            r"matrices\['ours'\] must be a list .* got a Tensor",
        ),
        (lambda: accuracy_over_tasks_figure({"ours": [EYE, None]}), TypeError, r"\['ours'\]\[1\] must be a tensor"),
        (lambda: accuracy_over_tasks_figure({"ours": []}), ValueError, "must hold at least one accuracy matrix"),
        (lambda: accuracy_over_tasks_figure({"ours": [EYE, torch.eye(3)]}), ValueError, "all of as many tasks"),
        (lambda: paths_figure({1: LINE}), TypeError, r"merges\[1\] must be MergePaths, got a Tensor"),
        (lambda: displacement_figure({1: {}}), ValueError, r"shares\[1\] is empty"),
        (lambda: alpha_figure({"ours": {}}), ValueError, r"alphas\['ours'\] is empty"),
        (lambda: alpha_figure({"ours": {1: 0.5}}), TypeError, r"alphas\['ours'\]\[1\] must be a tensor .* got float"),
        (lambda: path_figure(LINE, LINE.numpy(), LINE, None, 1), TypeError, "before must be a tensor .* got ndarray"),
        (
            lambda: path_figure(LINE, LINE, LINE[1:], None, 1),
            ValueError,
            r"after must be \(points,\), as many as alphas",
        ),
        (lambda: path_figure(LINE, LINE, LINE, "half", 1), TypeError, "alpha must be a number, got a str"),
        (
            lambda: path_figure(LINE, LINE, LINE, 0.5, 1, accuracies=(LINE,)),
            ValueError,
            "accuracies must be those without alignment and those with it, got 1",
        ),
        (
            lambda: path_figure(LINE, LINE, LINE, 0.5, 1, accuracies=(LINE, None)),
            TypeError,
            r"accuracies\[1\] must be a tensor of real numbers, got NoneType",
        ),
    ],
)
def test_what_cannot_be_drawn(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
