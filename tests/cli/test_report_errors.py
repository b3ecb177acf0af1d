import json

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rebasin.cli import main

from ..callbacks.user_code import UserModule, loader, make_trainer


def change(folder, *keys, value):
    results = json.loads((folder / "results.json").read_text())
    place = results
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (["protocol"], None, "protocol is missing"),
        (["protocol", "command"], None, "protocol.command is missing"),
        (["protocol", "missing"], [3], "protocol.missing is not a list of texts"),
        (["n_tasks"], "3", "n_tasks is not a whole number"),
        (["n_tasks"], 2, "accuracy_matrix is not a list of matrices, 2 x 2"),
        (["methods"], {}, "methods has no method"),
        (["methods"], [], "methods is not a mapping"),
        (["methods", "average"], 3, "methods.average is not a mapping"),
        (["methods", "average", "forgetting"], ["a", 1], "methods.average.forgetting is not a list of numbers"),
        (["methods", "average", "accuracy"], [0.5], "methods.average.accuracy has 1 entries for 2 finished seeds"),
        (["methods", "average", "accuracy_matrix", 0], [[0.1]], "accuracy_matrix is not a list of matrices, 3 x 3"),
        (["methods", "average", "accuracy_matrix", 0, 0, 0], "x", "accuracy_matrix is not a list of matrices, 3 x 3"),
        (["benchmark"], "\ud800", "surrogates not allowed"),
        (["methods", "average", "seconds", 0], float("nan"), "methods.average.seconds is not a list of numbers"),
    ],
)
def test_results_that_were_changed_by_hand(copy, capsys, keys, value, says):
    change(copy, *keys, value=value)
    assert main(["report", str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lit-rebasin: error: {copy / 'results.json'} is not as a benchmark writes it: ")
    assert says in line
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"benchmark": "rot', "\x00\x01", "[" * 100_000])
def test_results_that_are_cut_off(copy, capsys, text):
    (copy / "results.json").write_text(text)
    assert main(["report", str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(copy / "results.json") in line
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "report needs the folder of a run"),
        (["nowhere"], "there is no folder nowhere; name the output folder of a benchmark or a fit"),
        (["empty"], "empty is no run: it has neither results.json nor TensorBoard event files"),
        (["a.txt"], "report takes a folder, and a.txt is a file"),
        (
            ["RUN", "--output", "nowhere/a.html"],
            "nowhere/a.html cannot be written; pass --output FILE.html in a folder",
        ),
        (["RUN", "--output", "a.txt/b.html"], "a.txt/b.html cannot be written"),
        (["RUN", "--output", "a.html"], "a.html cannot be written"),
        (["RUN", "--output", "a.txt"], "--output must be a .html or .htm file, got a.txt"),
        (["RUN", "--output"], "expected one argument"),
        (
            ["RUN", "--colour", "blue"],
            "report takes one folder and --output FILE, and nothing else, but got --colour",
        ),
        (["RUN", "other"], "nothing else, but got other"),
    ],
)
def test_wrong_words_are_one_sentence(benchmarked, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.html").mkdir()
    (tmp_path / "a.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *[str(benchmarked) if word == "RUN" else word for word in words]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lit-rebasin: error: ")
    assert says in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "file",
    ["results.json", "accuracy_matrix.png", "rebasin/seed_3/config.yaml", "rebasin/seed_3/tensorboard/version_0/*"],
)
def test_a_file_of_a_benchmark_is_answered_with_its_folder(copy, capsys, monkeypatch, file):
    monkeypatch.chdir(copy.parent)
    name = f"copy/{next(copy.glob(file)).relative_to(copy)}"
    assert main(["report", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"lit-rebasin: error: report takes a folder, and {name} is a file: try report copy"
    assert main(["report", line.rpartition(" ")[2]]) == 0


@pytest.mark.parametrize("file", ["config.yaml", "tensorboard/version_0/events.out.tfevents.1"])
def test_a_file_of_a_fit_is_answered_with_its_run(tmp_path, capsys, monkeypatch, file):
    run = tmp_path / "a b" / "seed_0"
    (run / "tensorboard" / "version_0").mkdir(parents=True)
    (run / "tensorboard" / "version_0" / "events.out.tfevents.1").touch()
    (run / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run / file)]) == 2
    assert capsys.readouterr().err.endswith(f"{run / file} is a file: try report 'a b/seed_0'\n")


def test_a_file_of_no_run_is_answered_without_a_guess(tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    assert main(["report", str(tmp_path / "a.txt")]) == 2
    assert capsys.readouterr().err.endswith("a.txt is a file\n")


def test_logs_of_others_are_no_run(tmp_path, capsys):
    trainer = make_trainer(tmp_path, logger=TensorBoardLogger(tmp_path))
    trainer.fit(UserModule(), loader(), loader())
    assert main(["report", str(tmp_path)]) == 2
    assert (
        "but nothing in them that RebasinMerge, ContinualMonitor or another monitor has logged"
        in capsys.readouterr().err
    )
