import base64
import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lit_rebasin import ContinualMonitor, RebasinMerge
from lit_rebasin.cli import main

from ..callbacks.user_code import UserModule, loader, make_trainer
from .browser import CHROMIUM, seen_figures
from .page import Page
from .words import CONFIG, METHODS, ROOT, SMALL, STREAM


def png(figure):
    return base64.b64decode(figure["src"].removeprefix("data:image/png;base64,"))


@pytest.fixture(scope="module")
def page(benchmarked):
    assert main(["report", str(benchmarked)]) == 0
    return Page(benchmarked / "report.html")


def report(folder, *words):
    assert main(["report", str(folder), *words]) == 0
    return Page(folder / "report.html")


def test_every_figure_is_in_the_page(page):
    expected = {"accuracy-over-tasks", "accuracy-matrix", "displacement-rebasin"}
    expected |= {f"{kind}-{method}" for kind in ("paths", "alpha") for method in METHODS[1:]}
    assert set(page.figures) == {f"figure-{name}" for name in expected}
    for figure in page.figures.values():
        assert png(figure).startswith(b"\x89PNG")
        assert int(figure["width"]) > 200
        assert len(figure["alt"]) > 20
    assert (
        len({figure["src"] for figure in page.figures.values()}) == len(page.figures) - 1
    )  # one alpha for two methods
    assert "In the permutation groups" not in page.text
    assert "backbone.features.0" in page.figures["figure-displacement-rebasin"]["alt"]


def test_the_table_says_what_the_results_say(benchmarked, page):
    results = json.loads((benchmarked / "results.json").read_text())
    header, *rows = page.rows
    assert header == ["method", "avg accuracy %", "forgetting %", "backward transfer %", "seconds"]
    lines = (benchmarked / "results.md").read_text().splitlines()
    assert [row[0] for row in rows] == list(results["methods"]) == METHODS
    for row in rows:
        assert f"| {' | '.join(row)} |" in lines
        found = results["methods"][row[0]]
        assert float(row[1].split(" ± ")[0]) == pytest.approx(50 * sum(found["accuracy"]), abs=0.06)


def test_the_page_says_how_it_was_made(benchmarked, page):
    protocol = json.loads((benchmarked / "results.json").read_text())["protocol"]
    assert protocol["command"] == """lit-rebasin benchmark --merge.options '{"restarts": 1}' 'a b'"""
    assert protocol["command"] in page.text
    assert f"torch {protocol['versions']['torch']}" in page.text
    source = (benchmarked / "report.html").read_text()
    (shown,) = re.findall(r"<details.*?<pre>(.*?)</pre>", source, re.DOTALL)
    config = yaml.safe_load(
        shown.replace("&#x27;", "'").replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">")
    )
    assert config["merge"] == protocol["merge"]
    assert config["data"] == protocol["data"]
    assert "rotated-digits, 3 tasks" in page.text
    assert "seeds 3, 4" in page.text


def test_what_a_method_does_not_do_is_said(benchmarked, page):
    assert "No merges, for they do without RebasinMerge: finetune." in page.text
    _, *sections = (benchmarked / "report.html").read_text().split("<h3>")
    assert [section.split("<", 1)[0] for section in sections] == METHODS[1:]
    remarks = [re.findall("<p>(.*?)</p>", section.split("<figure")[0]) for section in sections]
    assert remarks == [
        ["Nothing is merged: alpha is 0 throughout, so the network stays as it was trained."],
        ["No neuron is moved: the networks are merged as they are, without an alignment."],
        [],
    ]
    assert "What is missing" not in page.text


def test_nothing_is_loaded_from_anywhere_and_nothing_runs(benchmarked, page):
    sources = [
        value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert len(sources) == len(page.figures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    (style,) = re.findall(r"<style>(.*?)</style>", (benchmarked / "report.html").read_text(), re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_the_same_run_makes_the_same_page(copy):
    report(copy)
    first = (copy / "report.html").read_bytes()
    report(copy)
    assert (copy / "report.html").read_bytes() == first
    assert not list(copy.rglob("*.tmp"))


def test_the_page_goes_where_it_is_told(benchmarked, tmp_path, capsys):
    assert main(["report", str(benchmarked), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'page.html'}\n"
    assert Page(tmp_path / "page.html").figures
    assert not list(tmp_path.glob("*.tmp"))


HOSTILE = '<script>alert("1")</script> & </pre><img src=x onerror=alert(2)> $\\frac{$'


def test_hostile_text_is_shown_as_text(copy):
    results = json.loads((copy / "results.json").read_text())
    results["benchmark"] = HOSTILE
    results["methods"][HOSTILE] = results["methods"].pop("rebasin")
    results["methods"]["../x"] = results["methods"].pop("average")
    results["protocol"]["data"]["benchmark"] = results["protocol"]["command"] = HOSTILE
    results["protocol"]["versions"][HOSTILE] = HOSTILE
    results["protocol"]["missing"] = [HOSTILE]
    (copy / HOSTILE).parent.mkdir(parents=True)
    shutil.move(copy / "rebasin", copy / HOSTILE)
    (copy / "results.json").write_text(json.dumps(results))
    page = report(copy)
    assert not {"script", "iframe"} & set(page.tags)
    assert page.tags.count("img") == len(page.figures)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 7
    assert len([name for name in page.figures if name.startswith("figure-paths")]) == 2
    assert HOSTILE in [row[0] for row in page.rows]


def events_of(folder, method, seed=3):
    return sorted((folder / method / f"seed_{seed}").rglob("*tfevents*"))


def test_an_event_file_that_was_cut_off_counts_as_far_as_it_goes(copy):
    file = events_of(copy, "rebasin", 3)[0]
    file.write_bytes(file.read_bytes()[:-7])
    page = report(copy)
    assert "figure-paths-rebasin" in page.figures
    name = file.relative_to(copy)
    assert (
        f"The event file {name} breaks off within its last record, as of a run that was stopped or goes on."
        in page.text
    )


@pytest.mark.parametrize("damage", ["a byte", "no events", "no event"])
def test_a_damaged_event_file_is_named_and_the_page_is_made(copy, damage):
    file = events_of(copy, "rebasin", 3)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    letter = b"no events at all, but a letter"
    record = struct.pack("<Q", len(letter))
    record += struct.pack("<I", masked_crc32c(record)) + letter + struct.pack("<I", masked_crc32c(letter))
    file.write_bytes({"a byte": content, "no events": letter, "no event": record}[damage])
    page = report(copy)
    (said,) = re.findall(
        r"The event file (\S+) is damaged after (\d+) of its records, and no more of it is read\.", page.text
    )
    assert said[0] == str(file.relative_to(copy))
    assert (int(said[1]) > 10) == (damage == "a byte")
    assert {"figure-paths-rebasin", "figure-paths-average", "figure-accuracy-matrix"} <= set(page.figures)
    assert ("nothing is known of the merges: rebasin seed 3" in page.text) == (damage != "a byte")


def test_runs_without_event_files_are_named(copy):
    for place in (copy / "rebasin" / "seed_3", copy / "average"):
        shutil.rmtree(place)
    page = report(copy)
    missing = "No event files, so nothing is known of the merges: average seed 3, average seed 4, rebasin seed 3."
    assert missing in page.text
    assert "figure-paths-rebasin" in page.figures
    assert "figure-paths-average" not in page.figures
    assert [row[0] for row in page.rows[1:]] == METHODS


def test_results_alone_make_a_page_that_says_what_is_missing(tmp_path):
    shutil.copy(ROOT / "docs" / "results" / "rotated_mnist" / "results.json", tmp_path)
    page = report(tmp_path)
    assert set(page.figures) == {"figure-accuracy-over-tasks", "figure-accuracy-matrix"}
    assert "No run has event files here, so nothing is known of the merges." in page.text
    assert "Nothing is logged of any merge." in page.text


def test_a_benchmark_that_is_not_finished_lists_the_missing_runs(copy):
    results = json.loads((copy / "results.json").read_text())
    results["protocol"]["missing"] = ["rebasin seed 3", "rebasin seed 4", "average seed 4"]
    del results["methods"]["rebasin"]
    shutil.rmtree(copy / "average" / "seed_4")
    results["methods"]["average"] = {name: values[:1] for name, values in results["methods"]["average"].items()}
    (copy / "results.json").write_text(json.dumps(results))
    page = report(copy)
    assert "Not finished: rebasin seed 3, rebasin seed 4, average seed 4." in page.text
    assert [row[0] for row in page.rows[1:]] == METHODS[:-1]
    assert "No event files" not in page.text
    assert "figure-paths-average" in page.figures
    assert "figure-paths-rebasin" not in page.figures


def test_null_in_the_results_is_a_dash(copy):
    results = json.loads((copy / "results.json").read_text())
    results["methods"]["average"]["forgetting"] = [None, None]
    (copy / "results.json").write_text(json.dumps(results))
    (row,) = [row for row in report(copy).rows if row[0] == "average"]
    assert row[2] == "-"


def test_results_that_replaced_others_are_shown_with_their_own_logs(benchmarked, tmp_path):
    words = ["--methods", "rebasin", "--seeds", "3", "--output_dir", str(tmp_path)]
    assert main(["benchmark", "--config", CONFIG, *STREAM, *words]) == 0
    assert "task 2" in report(tmp_path).figures["figure-alpha-rebasin"]["alt"]
    again = ["--overwrite", "--data.n_tasks", "2", "--merge.alpha", "0.25"]
    assert main(["benchmark", "--config", CONFIG, *STREAM, *words, *again]) == 0
    assert report(tmp_path).figures["figure-alpha-rebasin"]["alt"] == "Alpha of every merge of rebasin: task 1 0.25."


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit-rebasin", "fit", "--config", "my config.yaml"])
        assert main(["fit", "--config", CONFIG, *STREAM, *quiet, "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("place", ["", "fit", "fit/rebasin", "fit/rebasin/seed_0", "fit/rebasin/seed_0/tensorboard"])
def test_a_fit_from_any_of_its_folders(fitted, tmp_path, place, capsys):
    assert main(["report", str(fitted / place), "--output", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    kinds = ("accuracy-over-tasks", "accuracy-matrix", "paths-rebasin", "displacement-rebasin", "alpha-rebasin")
    assert set(page.figures) == {f"figure-{kind}" for kind in kinds}
    assert "lit-rebasin fit --config 'my config.yaml'" in page.text
    assert "Configuration of rebasin seed 0" in page.text
    assert "n_tasks: 3" in page.text
    assert re.search(r"torch \d+\.\d+", page.text)
    assert page.rows[0] == ["method", "avg accuracy %", "forgetting %", "backward transfer %"]
    assert page.rows[1][0] == "rebasin"


def test_the_numbers_of_a_fit_are_those_that_it_printed(tmp_path, capsys):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", "--config", CONFIG, *SMALL, *quiet, "--output_dir", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("average accuracy")]
    accuracy, forgetting = (100 * float(word) for word in re.findall(r"-?\d\.\d+", line))
    row = report(tmp_path).rows[1]
    assert float(row[1]) == pytest.approx(accuracy, abs=0.11)
    assert float(row[2]) == pytest.approx(forgetting, abs=0.11)


def test_a_fit_that_went_on_is_one_run(tmp_path):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    words = ["fit", "--config", CONFIG, *STREAM, *quiet, "--output_dir", str(tmp_path)]
    assert main([*words, "--trainer.max_epochs", "2"]) == 0
    assert "task 1 0.50." in report(tmp_path).figures["figure-alpha-rebasin"]["alt"]
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert "task 1 0.50; task 2 0.50." in report(tmp_path).figures["figure-alpha-rebasin"]["alt"]
    assert len(list(tmp_path.rglob("version_*"))) == 2


def fit_tasks(folder, tasks, merge, monitor, logger):
    module = UserModule()
    for task in tasks:
        trainer = make_trainer(folder, merge, *monitor, logger=logger())
        trainer.fit(module, loader(shift=task), [loader(shift=seen, shuffle=False) for seen in range(3)])


@pytest.mark.parametrize("one_version", [True, False])
def test_the_folder_of_a_users_own_trainers(tmp_path, one_version):
    """One fit a task, into one version of the logs or each into its own."""
    folder = tmp_path / "runs"
    version = 0 if one_version else None
    fit_tasks(
        tmp_path,
        range(3),
        RebasinMerge(alpha=0.3),
        [ContinualMonitor()],
        lambda: TensorBoardLogger(folder, name="mine", version=version),
    )
    page = report(folder)
    assert page.figures["figure-alpha-mine"]["alt"] == "Alpha of every merge of mine: task 1 0.30; task 2 0.30."
    kinds = ("accuracy-over-tasks", "accuracy-matrix", "paths-mine", "displacement-mine", "alpha-mine")
    assert set(page.figures) == {f"figure-{kind}" for kind in kinds}
    assert "rebasin_merge/alpha: 0.3" in page.text
    assert "No command: `lit-rebasin benchmark` and `lit-rebasin fit` write it down." in page.text


def test_merges_alone_make_a_page(tmp_path):
    fit_tasks(tmp_path, range(2), RebasinMerge(), [], lambda: TensorBoardLogger(tmp_path, name="a", version=0))
    page = report(tmp_path)
    assert set(page.figures) == {"figure-paths-a", "figure-displacement-a", "figure-alpha-a"}
    assert "No accuracies of a: ContinualMonitor logs them." in page.text
    assert not page.rows


def test_help_names_the_command_and_is_light():
    check = "import sys; from lit_rebasin.cli import main; main(['report', '--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert "--output FILE.html" in shown
    assert shown.strip().endswith("False")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("night", [False, True])
def test_a_browser_shows_every_figure(benchmarked, page, tmp_path, night):
    shown = seen_figures(benchmarked / "report.html", tmp_path, night)
    assert set(shown) == set(page.figures)
    assert all(width > 300 and height > 100 for width, height in shown.values())
