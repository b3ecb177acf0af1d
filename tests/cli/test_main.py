import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rebasin.cli import main
from lit_rebasin.metrics import average_accuracy, forgetting

from .words import CONFIG, ROOT, SMALL


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = ["--methods", "rebasin,finetune", "--seeds", "3,4", "--output_dir", str(folder)]
    assert main(["benchmark", "--config", CONFIG, *SMALL, *words]) == 0
    return folder


def test_results_have_the_documented_form(output):
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"benchmark", "n_tasks", "protocol", "methods"}
    assert results["benchmark"] == "rotated-digits"
    assert results["n_tasks"] == 2
    assert results["protocol"]["seeds"] == [3, 4]
    assert results["protocol"]["data"]["replay_per_class"] == 1
    assert results["protocol"]["data"]["scenario"] == "domain"
    assert results["protocol"]["trainer"]["max_epochs"] == 2
    assert results["protocol"]["trainer"]["devices"] == 1
    assert results["protocol"]["missing"] == []
    assert {"torch", "lightning", "lit-rebasin"} <= set(results["protocol"]["versions"])
    assert list(results["methods"]) == ["finetune", "rebasin"]
    assert [len(moved) for moved in results["methods"]["rebasin"].pop("moved")] == [1, 1]
    assert results["methods"]["rebasin"].pop("refused") == [[], []]
    for found in results["methods"].values():
        assert set(found) == {
            "accuracy",
            "forgetting",
            "backward_transfer",
            "seconds",
            "cpu_seconds",
            "accuracy_matrix",
        }
        for seed in range(2):
            matrix = torch.tensor(found["accuracy_matrix"][seed], dtype=torch.float64)
            assert matrix.shape == (2, 2)
            assert found["accuracy"][seed] == pytest.approx(average_accuracy(matrix))
            assert found["forgetting"][seed] == pytest.approx(forgetting(matrix))
            assert found["backward_transfer"][seed] == -found["forgetting"][seed]
            assert 0 <= found["accuracy"][seed] <= 1
            assert found["seconds"][seed] > 0
            assert found["cpu_seconds"][seed] > 0


def test_table_and_pictures(output):
    table = (output / "results.md").read_text()
    assert "| rebasin |" in table
    assert "seeds 3, 4" in table
    for name in ("accuracy_matrix.png", "accuracy_over_tasks.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("*.tmp"))


def test_a_run_says_what_it_ran(output):
    folder = output / "rebasin" / "seed_4"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["method"] == "rebasin"
    assert config["trainer"]["max_epochs"] == 2
    hparams = yaml.safe_load((folder / "tensorboard" / "version_0" / "hparams.yaml").read_text())
    assert (hparams["method"], hparams["seed"]) == ("rebasin", 4)
    assert hparams["model"]["optimizer"]["init_args"]["lr"] == 0.001
    assert config["seed_everything"] == config["data"]["seed"] == config["merge"]["seed"] == 4
    assert yaml.safe_load((folder / "versions.yaml").read_text())["torch"] == torch.__version__.split("+")[0]
    assert yaml.safe_load((output / "finetune" / "seed_3" / "config.yaml").read_text())["data"]["replay_per_class"] == 0


def test_every_documented_tag_is_in_the_event_files(output):
    rows = re.findall(
        r"^\| `([^`]+)`.*?\| [\w-]+ \| (.*)\|$", (ROOT / "docs" / "tensorboard.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 20
    events = EventAccumulator(str(output / "rebasin" / "seed_3" / "tensorboard" / "version_0")).Reload()
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    for tag, what in rows:
        assert tag in (images if what.startswith("image:") else scalars), tag
    matrix = json.loads((output / "results.json").read_text())["methods"]["rebasin"]["accuracy_matrix"][0]
    last = events.Scalars("accuracy/task_00")[-1]
    assert last.step == 1
    assert last.value == pytest.approx(matrix[1][0])
    assert len(events.Scalars("accuracy/task_01")) == 1
    start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert all(name in start for name in (b"rebasin_merge/alpha", b"method", b"n_classes"))


def test_same_seed_same_result(output, tmp_path):
    assert (
        main(
            [
                "benchmark",
                "--config",
                CONFIG,
                *SMALL,
                "--methods",
                "rebasin",
                "--seeds",
                "3",
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 0
    )
    again = json.loads((tmp_path / "results.json").read_text())["methods"]["rebasin"]
    first = json.loads((output / "results.json").read_text())["methods"]["rebasin"]
    assert again["accuracy_matrix"][0] == first["accuracy_matrix"][0]


def test_task_incremental_stream_gets_a_head_a_task(tmp_path, fake_mnist):
    config = {
        "data": {
            "benchmark": "split-mnist",
            "n_tasks": 2,
            "scenario": "task",
            "epochs_per_task": 1,
            "replay_per_class": 1,
        },
        "model": {"backbone": {"class_path": "torch.nn.Flatten"}, "n_features": 784},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = ["--methods", "average", "--seeds", "0", "--data_dir", fake_mnist, "--output_dir", str(tmp_path / "out")]
    assert main(["benchmark", "--config", str(tmp_path / "c.yaml"), *words]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["n_tasks"] == 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        *[
            (["--data.epochs_per_task", "2", f"--trainer.{name}", value], f"trainer.{name} .*; leave it out")
            for name, value in (
                ("check_val_every_n_epoch", "4"),
                ("check_val_every_n_epoch", "null"),
                ("limit_val_batches", "0"),
                ("val_check_interval", "0.5"),
                ("max_steps", "3"),
                ("fast_dev_run", "true"),
                ("overfit_batches", "1"),
            )
        ],
        (["--methods", "rebasin,magic"], "no method 'magic'; choose from finetune, ewc, .*rebasin, cumulative, joint"),
        (["--methods", ""], "no method ''; choose from finetune"),
        (["--seeds", "a,b"], "seeds must be whole numbers"),
        (["--seeds", "1,1"], "seeds must be different"),
        (["--seeds", "-1"], "seeds must be different whole numbers from 0"),
        (["--seeds", "4294967296"], "seeds must be different whole numbers from 0 to 4294967295"),
        (["--threads", "0"], "threads must be from 1 to 1024"),
        (["--merge.alpha", "1.5"], r"alpha is the weight of the previous model and must lie in \[0, 1\], got 1.5"),
        (["--data.replay_per_class", "0"], "replays examples, but data.replay_per_class is 0"),
        (["--data.benchmark", "rotated-minst"], "benchmark must be one of rotated-digits"),
        (["--data.benchmark", "rotated-mnist", "--data_dir", "nowhere"], "MNIST was not found under nowhere"),
        (["--trainer.max_epochs", "3", "--data.epochs_per_task", "2"], "max_epochs 3 ends inside a task of 2 epochs"),
        (["--data.n_taks", "3"], "n_taks"),
        (["--output_dir", "/proc/nowhere"], "output_dir /proc/nowhere cannot be written to"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, words, match):
    output = [] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]
    only = [] if "--methods" in words else ["--methods", "rebasin"]
    assert main(["benchmark", "--config", CONFIG, *SMALL, *only, *output, *words]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(match, error[-1])
    assert error[-1].startswith("lit-rebasin: error: ")
    assert "Traceback" not in "".join(error)
    assert not (tmp_path / "out" / "results.json").exists()


def test_missing_and_unreadable_config(tmp_path, capsys):
    assert main(["benchmark", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("colour: blue\n")
    assert main(["fit", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "colour" in capsys.readouterr().err


def test_missing_config_is_found_before_the_slow_imports():
    check = (
        "import sys; from lit_rebasin.cli import main; main(['fit', '--config=no.yaml']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "lit-rebasin: error: there is no configuration file no.yaml"
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["benchmark", "--config", CONFIG, "--method", "replay"], "benchmark has no option --method; use --methods"),
        (["benchmark", "--config", CONFIG, "--method=replay"], "benchmark has no option --method; use --methods"),
        (["benchmark", "--seed_everything", "1"], "benchmark has no option --seed_everything; use --seeds"),
        (["benchmark", "--ckpt_path", "a.ckpt"], "benchmark has no option --ckpt_path; it belongs to fit"),
        (["fit", "--methods", "replay"], "fit has no option --methods; use --method"),
        (["fit", "--seeds", "1"], "fit has no option --seeds; use --seed_everything"),
        (["fit", "--config", CONFIG, "--metho", "replay"], "there is no option --metho; did you mean --method?"),
    ],
)
def test_options_of_the_other_command_and_abbreviations_are_refused(capsys, words, says):
    assert main(words) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"lit-rebasin: error: {says}"


@pytest.mark.parametrize("key", ["methods", "seeds"])
def test_null_in_the_yaml_file(tmp_path, capsys, key):
    (tmp_path / "c.yaml").write_text(f"{key}: null\n")
    words = ["--config", CONFIG, "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(["benchmark", *words]) == 2
    assert f"error: {key} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, 143, b"ended by SIGTERM")]
)
def test_a_signal_during_the_imports_is_one_line(number, code, says):
    script = (
        "import sys, signal; from lit_rebasin.cli import main; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "print(1, flush=True); sys.exit(main(['fit']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait() == code
        assert process.stderr.read() == b"lit-rebasin: error: " + says + b"\n"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "benchmark" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "statement",
    [
        "import lit_rebasin",
        "from lit_rebasin import weight_matching, SinkhornRebasin, LinearPath",
        "import lit_rebasin.cli",
    ],
)
def test_light_imports(statement):
    check = (
        f"import sys; {statement}; print([m for m in ('lightning', 'avalanche', 'torchmetrics') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("command", ["fit", "benchmark"])
def test_help_of_a_command_is_light_and_names_only_keys_that_exist(command, capsys):
    check = (
        f"import sys; from lit_rebasin.cli import main; main(['{command}', '--help']); print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False")
    keys = set(re.findall(r"^ --([\w.]+)", shown, re.MULTILINE)) - {"help_all", "trainer.KEY"}
    assert len(keys) > 15
    assert main([command, "--help_all"]) == 0
    everything = capsys.readouterr().out
    for key in keys:
        assert f"--{key}" in everything, key


@pytest.mark.parametrize(("error", "says"), [(MemoryError, "out of memory"), (RuntimeError, "RuntimeError")])
def test_an_error_without_words_is_named(monkeypatch, capsys, error, says):
    def run_fit(words):
        raise error

    monkeypatch.setattr("lit_rebasin.cli.fit.run_fit", run_fit)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"lit-rebasin: error: {says}"
