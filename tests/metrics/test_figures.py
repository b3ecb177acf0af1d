import io

import torch

from lit_rebasin.metrics import accuracy_matrices_figure, accuracy_over_tasks_figure, path_figure


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


def test_path_shows_both_curves_and_where_it_was_merged():
    alphas = torch.linspace(0, 1, 5)
    figure = path_figure(alphas, alphas**2, alphas, 0.25, 3)
    lines = figure.axes[0].lines
    assert list(lines[0].get_ydata()) == (alphas**2).tolist()
    assert list(lines[1].get_ydata()) == alphas.tolist()
    assert set(lines[2].get_xdata()) == {0.25}
