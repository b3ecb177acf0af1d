import json
import re
import subprocess
import sys

import pytest
import torch
from matplotlib.colors import to_hex

from lit_rebasin import Axis, PermutationSpec
from lit_rebasin.cli import main
from lit_rebasin.cli.inspect import describe
from lit_rebasin.cli.symmetry_figure import symmetry_figure

USER_CODE = """
import torch
from torch import nn

def mlp(width=5):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

instance = mlp()

class Reader(nn.Module):
    def __init__(self, width: int, vocabulary: int = 7):
        super().__init__()
        self.embedding, self.scale = nn.Embedding(vocabulary, width), nn.Linear(4, width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids, extra):
        return self.head(self.embedding(ids).mean(1) * self.scale(extra))

class Saved(nn.Sequential):
    def __init__(self, width: int, name: str, other: int | None = 3):
        assert (name, other) != ("fine", 0)
        super().__init__(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

class Restless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x + torch.rand_like(x))

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 2)

    def forward(self, x):
        return self.module(x)

class Broken(nn.Linear):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Failing(nn.Module):
    def __init__(self):
        raise KeyError("colour")
"""
CODE_OF_THIS_TEST = "inspected_by_test"
FOUR = ["--model.in_features", "4", "--model.out_features", "4"]


@pytest.fixture(autouse=True)
def user_code(tmp_path, monkeypatch):
    (tmp_path / f"{CODE_OF_THIS_TEST}.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in (CODE_OF_THIS_TEST, "imported"):
        sys.modules.pop(name, None)


def inspect(capsys, name, *words):
    assert main(["inspect", f"{CODE_OF_THIS_TEST}.{name}", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_spec_and_what_was_measured(capsys):
    found = inspect(capsys, "mlp", "--input", "6,3", "--model.width", "8")
    assert found["model"] == f"{CODE_OF_THIS_TEST}.mlp"
    assert found["parameters"] == 3 * 8 + 8 + 8 * 2 + 2
    assert found["coverage"] == pytest.approx(1 - 2 / found["parameters"])  # all but the last bias
    assert 0 < found["invariance_error"] < 1e-5
    assert found["unchecked"] is None
    assert set(found["seconds"]) == {"spec", "check"}
    spec = PermutationSpec.from_json(json.dumps(found))
    (group,) = spec.groups.values()
    assert group.size == 8
    assert set(group.axes) == {Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1)}
    assert set(spec.fixed) == {"0.weight[1]", "2.weight[0]", "2.bias[0]"}


def test_table_names_groups_axes_and_reasons(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", "--model", f"{CODE_OF_THIS_TEST}.mlp", "--input=6,3"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"│ 1 +│ 0 +│ +5 +│ 0.weight\[0\], 0.bias\[0\], 2.weight\[1\] ", shown)
    assert re.search(r"the network's input +│ 1 +│ 0.weight\[1\] ", shown)
    assert re.search(r"the network's output +│ 2 +│ 2.weight\[0\], 2.bias\[0\] ", shown)
    assert "Coverage: 93.75 % of 32 parameters lie" in shown
    assert "Checked: random permutations change the output by" in shown


def test_a_class_with_inputs_of_other_types_and_by_name(capsys):
    words = ["--model.width", "6", "--input", "extra=3,4", "--input", "3,4:int64"]
    (group,) = inspect(capsys, "Reader", *words)["groups"].values()
    assert group["size"] == 6
    assert {(axis["tensor"], axis["dim"]) for axis in group["axes"]} == {
        ("embedding.weight", 1),
        ("scale.weight", 0),
        ("scale.bias", 0),
        ("head.weight", 1),
    }


def by_workers(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "epoch": 3},
        by_workers,
        lambda state: {"model": by_workers(state)},
    ],
)
def test_weights_of_a_checkpoint_are_taken(wrap, capsys, tmp_path):
    state = {
        "0.weight": torch.rand(5, 3),
        "0.bias": torch.rand(5),
        "2.weight": torch.rand(2, 5),
        "2.bias": torch.rand(2),
    }
    torch.save(wrap(state), tmp_path / "w.pt")
    inspect(capsys, "instance", "--input", "6,3", "--checkpoint", "w.pt")
    held = sys.modules[CODE_OF_THIS_TEST].instance.state_dict()
    assert all(torch.equal(held[name], value) for name, value in state.items())


def test_a_part_named_module_keeps_its_name(capsys, tmp_path):
    torch.save({"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)}, tmp_path / "w.pt")
    found = inspect(capsys, "Outer", "--input", "6,3", "--checkpoint", "w.pt")
    assert set(found["fixed"]) == {"module.weight[0]", "module.weight[1]", "module.bias[0]"}


def test_arguments_that_a_lightning_module_saved_are_taken(capsys, tmp_path):
    inspect(capsys, "Saved", "--input", "6,3", "--model.width", "9", "--model.name", "fine")
    saved = sys.modules[CODE_OF_THIS_TEST].Saved(9, "fine")
    checkpoint = {"state_dict": saved.state_dict(), "hyper_parameters": {"width": 9, "name": "fine", "other": None}}
    torch.save(checkpoint, tmp_path / "saved.ckpt")
    (group,) = inspect(capsys, "Saved", "--input", "6,3", "--checkpoint", "saved.ckpt")["groups"].values()
    assert group["size"] == 9
    words = ["--input", "6,3", "--checkpoint", "saved.ckpt", "--model.width", "4"]
    assert main(["inspect", f"{CODE_OF_THIS_TEST}.Saved", *words]) == 2
    assert "saved.ckpt does not hold the weights of Saved" in capsys.readouterr().err


def test_a_network_that_cannot_be_compared_is_shown_unchecked(capsys):
    found = inspect(capsys, "Restless", "--input", "2,3")
    assert found["invariance_error"] is None
    assert "runs twice" in found["unchecked"]
    assert main(["inspect", f"{CODE_OF_THIS_TEST}.Restless", "--input", "2,3"]) == 0
    shown = capsys.readouterr().out
    assert "Not checked: Restless gives outputs that differ" in shown
    assert "let it draw no random numbers there.\n" in shown


def test_wrong_permutations_are_an_error(capsys, monkeypatch):
    wrong = PermutationSpec.from_axes({"0.weight": ("h", None)}, {"0.weight": torch.zeros(5, 3)})
    monkeypatch.setattr("lit_rebasin.cli.network.permutation_spec", lambda *args, **kwargs: wrong)
    assert main(["inspect", f"{CODE_OF_THIS_TEST}.mlp", "--input", "6,3"]) == 1
    assert "Permuting changes the output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        ([], 2, "needs the import path of a network, such as"),
        (["--input", "1,3"], 2, "needs the import path of a network, such as"),
        (["--model"], 2, "--model: expected one argument"),
        (["nowhere.Net", "--input", "1,3"], 2, "there is no network 'nowhere.Net' .*No module named 'nowhere'"),
        (["CODE.Nat", "--input", "1,3"], 2, "no network .*has no attribute 'Nat'"),
        (["resnet50", "--input", "1,3"], 2, "there is no network 'resnet50' .*import path such as"),
        (["math.pi", "--input", "1,3"], 2, "math.pi is of type float, not a torch.nn.Module"),
        (["os.getcwd", "--input", "1,3"], 2, "os.getcwd makes a str, not a torch.nn.Module"),
        (["CODE.mlp"], 2, "needs the shape of an example input, such as --input 1,3,224,224"),
        (["CODE.mlp", "--input", "1x3"], 2, r"--input must be \[NAME=\]SHAPE\[:DTYPE\], .*got '1x3'"),
        (["CODE.mlp", "--input", "1,3:float31"], 2, "--input must be"),
        (["CODE.mlp", "--input", "1,3", "--model.wide", "4"], 2, "wide"),
        (["CODE.Reader", "--input", "1,3"], 2, "width"),
        (["torch.nn.Linear", "--input", "1,3", "--model.in_features", "x"], 2, "in_features"),
        (
            ["./CODE.py", "--input", "1,3"],
            2,
            "import path of a network, such as mine.Net for Net in mine.py, not ./insp",
        ),
        (["CODE.py", "--input", "1,3"], 2, "such as mine.Net for Net in mine.py, not inspected_by_test.py"),
        ([".CODE.instance", "--input", "1,3"], 2, "such as mine.Net for Net in mine.py, not .inspected"),
        (["CODE.Failing", "--input", "1,3"], 2, "inspected_by_test.Failing cannot be made: KeyError: 'colour'"),
        (["torch.nn.ReLU", "--input", "1,3"], 1, "torch.nn.ReLU has no parameters"),
        (["CODE.mlp", "--input", "0,3"], 2, "--input 0,3 is empty"),
        (
            ["CODE.mlp", "--input", "1,4"],
            1,
            "exported .*Linear.* does not run on this input: check the shape, .*--input$",
        ),
        (["CODE.mlp", "--input", "y=1,3"], 1, "'input'. inspected_by_test.mlp does not run on this input: .*--input$"),
        (["CODE.mlp", "--input", "1,3:int64"], 1, "same dtype.*inspected_by_test.mlp does not run on this input"),
        (["CODE.Broken", "--input", "1,4", *FOUR], 1, "cannot be exported .*Broken.*PermutationSpec.from_axes$"),
        (["CODE.mlp", "--input", "1,3", "--figure", "spec.gif"], 2, "--figure must be a .png, .svg or .pdf file"),
        (["CODE.mlp", "--input", "1,3", "--figure", "no/spec.png"], 2, "no/spec.png cannot be written"),
        (["CODE.mlp", "--input", "1,3", "--checkpoint", "no.pt"], 2, "checkpoint no.pt cannot be read: .*No such file"),
        (["CODE.mlp", "--input", "1,3", "--checkpoint", "CODE.py"], 2, "inspected_by_test.py is no file of tensors"),
    ],
)
def test_wrong_input_is_one_sentence(words, code, match, capsys):
    assert main(["inspect", *[word.replace("CODE", CODE_OF_THIS_TEST) for word in words]]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    (error,) = shown.err.strip().splitlines()
    assert re.search(f"^lit-rebasin: error: .*{match}", error), error


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("import not_there", "importing imported failed: ModuleNotFoundError: No module named 'not_there'$"),
        ("import imported.part", "importing imported failed: ModuleNotFoundError: No module named 'imported.part'"),
        (
            "x = 1\ndef f(:\n    pass",
            r"importing imported failed: SyntaxError: invalid syntax \(imported.py, line 2\)$",
        ),
        ("raise KeyError('colour')", "importing imported failed: KeyError: 'colour'$"),
        ("raise SystemExit", "importing imported failed: SystemExit$"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named(code, match, capsys, tmp_path):
    (tmp_path / "imported.py").write_text(code)
    assert main(["inspect", "imported.Net", "--input", "1,3"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(match, error), error


@pytest.mark.parametrize(
    ("code", "exit_code", "match"),
    [
        ("def Net():\n    raise SystemExit(0)", 2, "imported.Net cannot be made: SystemExit: 0$"),
        (
            "import torch\n\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(3, 3)\n\n"
            "    def forward(self, x):\n        raise SystemExit(0)",
            1,
            "imported.Net does not run on this input",
        ),
    ],
)
def test_a_network_that_ends_the_program_is_named(code, exit_code, match, capsys, tmp_path):
    (tmp_path / "imported.py").write_text(code)
    assert main(["inspect", "imported.Net", "--input", "1,3"]) == exit_code
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(match, error), error


def test_the_summary_comes_before_the_tables(capsys):
    assert main(["inspect", f"{CODE_OF_THIS_TEST}.mlp", "--input", "6,3"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("Coverage: 93.75 %")
    assert second.startswith("Checked: ")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_closes_the_pipe_is_no_error(words, tmp_path):
    check = (
        f"from lit_rebasin.cli import main; main(['inspect', '{CODE_OF_THIS_TEST}.mlp', '--input', '2,3', *{words}])"
    )
    done = subprocess.Popen(
        [sys.executable, "-c", check], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    done.stdout.close()
    assert done.stderr.read() == ""
    done.wait()


def test_help_is_light_and_names_only_keys_that_exist(capsys):
    check = "import sys; from lit_rebasin.cli import main; main(['inspect', '--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False")
    keys = set(re.findall(r"^ --([\w.]+)", shown, re.MULTILINE))
    assert keys == {"model.NAME", "input", "checkpoint", "json", "figure", "help_all"}
    assert main(["inspect", f"{CODE_OF_THIS_TEST}.mlp", "--help_all"]) == 0
    assert "--model.width" in capsys.readouterr().out


def test_inspecting_loads_neither_lightning_nor_avalanche(tmp_path):
    words = ["inspect", f"{CODE_OF_THIS_TEST}.mlp", "--input", "2,3"]
    check = f"import sys; from lit_rebasin.cli import main; main({words}); print({{'lightning', 'avalanche'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (Axis("w", 1), "w[1]"),
        (Axis("w", 0, before=3, after=8), "w[0] as 3 x 4 x 8"),
        (Axis("w", 0, start=4, length=12), "w[0] from 4"),
        (Axis("w", 0, start=1, step=2, length=12), "w[0] from 1 step 2"),
    ],
)
def test_an_axis_in_words(axis, words):
    assert describe(axis, 4) == words


def test_figure_colours_each_axis_by_its_group():
    spec = PermutationSpec.from_axes(
        {"a": ("x", "y"), "b": (None, "x")}, {"a": torch.zeros(4, 6), "b": torch.zeros(2, 4)}
    )
    figure = symmetry_figure(spec, {"a": (4, 6), "b": (2, 4)})
    axes = figure.axes[0]
    numbers = {(text.get_position()[1], int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "1", (0, 1): "2", (1, 1): "1"}
    colours = {(bar.get_y() > 0.5, bar.get_x() > 1): to_hex(bar.get_facecolor()) for bar in axes.patches}
    assert len(axes.patches) == 4
    assert colours[False, False] == colours[True, True] != colours[False, True]
    assert colours[True, False] == "#dddddd"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1  x (4)", "2  y (6)", "fixed"]


def test_figure_shows_heads_above_what_is_inside_them(capsys, tmp_path):
    words = ["--model.embed_dim", "8", "--model.num_heads", "2", "--figure", "spec.svg"]
    inputs = [word for name in ("query", "key", "value") for word in ("--input", f"{name}=3,2,8")]
    assert main(["inspect", "torch.nn.MultiheadAttention", *words, *inputs, "--json"]) == 0
    spec = PermutationSpec.from_json(capsys.readouterr().out)
    assert (tmp_path / "spec.svg").read_text().startswith("<?xml")
    axes = symmetry_figure(spec, {"in_proj_weight": (24, 8)}).axes[0]
    rows = sorted({round(bar.get_y(), 2) for bar in axes.patches if bar.get_x() < 1})
    heads = next(k for k, group in enumerate(spec.groups.values(), start=1) if group.size == 2)
    top = [text.get_text() for text in axes.texts if text.get_position()[1] < 0]
    assert len(rows) == 2
    assert top == [str(heads)]
