import csv

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rebasin.cli import main

from .words import CONFIG, SMALL

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
FIT = ["fit", "--config", CONFIG, *SMALL, *QUIET]


def test_fit_trains_one_method_and_saves_the_merged_model(tmp_path, capsys):
    words = [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_model_summary",
        "false",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(["fit", "--config", CONFIG, *SMALL, *words, "--merge.alpha", "0.5"]) == 0
    assert "average accuracy" in capsys.readouterr().out
    folder = tmp_path / "fit" / "rebasin" / "seed_0"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["RebasinMerge"]
    assert state["n_tasks"] == 2
    assert state["history"][0]["alpha"] == 0.5
    assert all(torch.equal(checkpoint["state_dict"][name], tensor) for name, tensor in state["previous"].items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    assert main([*FIT, "--method", "replay", "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.n_tasks", "3"], "n_tasks=2, not 3"),
        (["--data.epochs_per_task", "2"], "epochs_per_task=1, not 2"),
        (["--data.replay_per_class", "2"], "replay_per_class=1, not 2"),
        (["--data.validation_fraction", "0.5"], "validation_fraction=0.0, not 0.5"),
        (["--seed_everything", "1"], "seed 0, not 1"),
        (["--method", "average"], "method replay, not average"),
    ],
)
def test_resume_of_another_run_is_refused_before_anything_is_written(finished, capsys, words, says):
    folder = finished / "fit" / "replay" / "seed_0"
    before = (folder / "config.yaml").read_text()
    resume = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--output_dir", str(finished)]
    assert main([*FIT, "--method", "replay", *words, *resume]) in (1, 2)
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "config.yaml").read_text() == before


CSV = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir"]


def test_a_logger_of_the_configuration_gets_the_numbers_beside_tensorboard(tmp_path):
    assert main([*FIT, *CSV, str(tmp_path / "csv"), "--output_dir", str(tmp_path / "out")]) == 0
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    (folder,) = (tmp_path / "out").rglob("tensorboard/version_0")
    events = EventAccumulator(str(folder)).Reload()
    for tag in ("merge/alpha", "accuracy/average"):
        logged = [float(row[tag]) for row in rows if row.get(tag)]
        assert logged == pytest.approx([event.value for event in events.Scalars(tag)])
        assert logged


def test_a_logger_that_cannot_begin_is_named_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    def without_a_key(self):
        raise KeyError("no key of the service")

    monkeypatch.setattr(CSVLogger, "experiment", property(without_a_key))
    assert main([*FIT, *CSV, str(tmp_path / "csv"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "CSVLogger of trainer.logger cannot begin: 'no key" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_resume_ends_as_the_uninterrupted_run(finished, tmp_path, capsys):
    """The checkpoint after the first task, then the second one."""
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_top_k": -1, "monitor": "step"},
    }
    saver["init_args"] |= {"dirpath": str(tmp_path / "all"), "filename": "{epoch}"}
    (tmp_path / "saver.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [saver]}}))
    words = ["--config", str(tmp_path / "saver.yaml"), "--method", "replay", "--output_dir", str(tmp_path)]
    assert main([*FIT, *words]) == 0
    assert main([*FIT, *words, "--ckpt_path", str(tmp_path / "all" / "epoch=0.ckpt")]) == 0
    whole, resumed = (line for line in capsys.readouterr().out.splitlines() if line.startswith("average accuracy"))
    assert whole == resumed
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in (tmp_path / "all").glob("epoch=1*.ckpt")]
    assert len(weights) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_file_that_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "a.ckpt").write_text("hello\n")
    for name, says in (("a.ckpt", "is no file of tensors"), ("b.ckpt", "there is no checkpoint")):
        assert main([*FIT, "--ckpt_path", str(tmp_path / name), "--output_dir", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


def test_table_of_twenty_tasks_fits_the_screen(tmp_path, capsys):
    assert main([*FIT, "--method", "finetune", "--data.n_tasks", "20", "--output_dir", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(lines) == 20
    assert max(map(len, lines)) <= 100
    learned, end, forgotten = (float(cell) for cell in lines[0].split("│")[2:5])
    assert forgotten == pytest.approx(learned - end, abs=0.11)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer.max_epochs", "2", "--trainer.max_steps", "9"], "1 of 2 tasks are measured"),
        (["--trainer.fast_dev_run", "true", "--data.epochs_per_task", "2"], "0 of 1 tasks are measured"),
        (["--trainer.enable_checkpointing", "false"], "average accuracy"),
        (["--trainer.max_epochs", "1"], "average accuracy"),
    ],
)
def test_fits_that_are_cut_short_or_not_saved_end_well(tmp_path, capsys, words, says):
    assert main([*FIT, *words, "--output_dir", str(tmp_path)]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer.overfit_batches", "1"], "limit_train_batches"),
        (["--trainer.max_steps", "9"], "pass max_epochs=2 for the whole stream"),
        (["--seed_everything", "4294967296"], "seed_everything: 4294967296 is not in bounds"),
        (["--model.backbone.num_classes", "7"], "shape (2, 7), but the stream has n_classes=10"),
    ],
)
def test_wrong_input_of_fit_is_one_sentence(tmp_path, capsys, words, says):
    assert main([*FIT, *words, "--output_dir", str(tmp_path)]) in (1, 2)
    assert says in capsys.readouterr().err.splitlines()[-1]
