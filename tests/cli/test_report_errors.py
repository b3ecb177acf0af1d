import json
import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rebasin.cli import main

from ..callbacks.user_code import UserModule, loader, make_trainer
from .page import Page


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


def test_a_damaged_event_file_is_named_and_the_rest_is_shown(copy):
    file = sorted((copy / "rebasin" / "seed_3").rglob("*tfevents*"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    named = re.escape(str(file.relative_to(copy)))
    assert main(["report", str(copy)]) == 0
    page = Page(copy / "report.html")
    assert re.search(
        rf"The event file {named} is damaged after \d+ of its records, and no more of it is read", page.text
    )
    assert "figure-paths-rebasin" in page.figures
    file.write_bytes(b"no events at all, but a letter")
    assert main(["report", str(copy)]) == 0
    assert "is damaged after 0 of its records" in Page(copy / "report.html").text


@pytest.mark.parametrize("inner", ["results.json", "rebasin/seed_3/config.yaml"])
def test_a_file_of_a_run_in_place_of_its_folder(copy, inner, capsys):
    assert main(["report", str(copy / inner)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{inner} is a file: try report {copy}" in line


def test_logs_of_others_are_no_run(tmp_path, capsys):
    trainer = make_trainer(tmp_path, logger=TensorBoardLogger(tmp_path))
    trainer.fit(UserModule(), loader(), loader())
    assert main(["report", str(tmp_path)]) == 2
    assert (
        "but nothing in them that RebasinMerge, ContinualMonitor or another monitor has logged"
        in capsys.readouterr().err
    )
