"""Methods of `benchmark` by name, and what differs between them."""

import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rebasin.callbacks import ModeConnectivity, RebasinMerge
from lit_rebasin.callbacks.refusal import WorseMergeError
from lit_rebasin.cli import main
from lit_rebasin.cli.app import ContinualCLI
from lit_rebasin.cli.build import build_run, merge_settings
from lit_rebasin.cli.methods import METHODS, names_of

SMALL = [
    "benchmark",
    "--data.benchmark=rotated-digits",
    "--data.n_tasks=3",
    "--data.epochs_per_task=2",
    "--data.replay_per_class=2",
    "--model.backbone=avalanche.models.SimpleMLP",
    "--model.backbone.input_size=64",
    "--model.backbone.hidden_size=16",
    "--trainer.accelerator=cpu",
    "--seeds=0",
]


def run(folder, *words):
    code = main([*SMALL, "--output_dir", str(folder), *words])
    results = folder / "results.json"
    return code, json.loads(results.read_text()) if results.is_file() else None


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    code, found = run(folder, "--methods", ",".join(names_of("benchmark")))
    assert code == 0
    return folder, found


def test_every_method_runs_and_is_in_the_table(results):
    folder, found = results
    assert list(found["methods"]) == list(METHODS)
    for name, numbers in found["methods"].items():
        assert numbers["accuracy"][0] > 0.2, name
        matrix = torch.tensor(
            [[float("nan") if a is None else a for a in row] for row in numbers["accuracy_matrix"][0]]
        )
        assert matrix.shape == (3, 3)
        assert bool(matrix[:-1].isnan().all()) == (name == "joint")
    table = (folder / "results.md").read_text()
    (joint,) = [line for line in table.splitlines() if line.startswith("| joint")]
    assert joint.split("|")[3].strip() == "-"
    assert "NaN" not in (folder / "results.json").read_text()


def test_joint_training_is_best_and_finetuning_forgets_most(results):
    _, found = results
    accuracy = {name: numbers["accuracy"][0] for name, numbers in found["methods"].items()}
    lost = {name: numbers["forgetting"][0] for name, numbers in found["methods"].items() if name != "joint"}
    assert accuracy["joint"] >= accuracy["finetune"]
    assert lost["finetune"] == max(lost[name] for name in ("finetune", "replay", "der", "rebasin", "cumulative"))


def test_baselines_leave_curves_in_tensorboard(results):
    folder, _ = results
    assert list((folder / "ewc" / "seed_0").rglob("events.out.tfevents*"))


def test_what_differs_for_a_method(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "per_method:\n  average: {merge.alpha: 0.0}\n  rebasin: {merge.alpha: 1.0, data.replay_per_class: 1}\n  ewc: {ewc_lambda: 1000000.0}\n"
    )
    words = ["--config", str(tmp_path / "c.yaml"), "--methods", "finetune,ewc,average,rebasin"]
    code, found = run(tmp_path / "out", *words)
    assert code == 0
    stays = torch.tensor(found["methods"]["rebasin"]["accuracy_matrix"][0])
    assert torch.equal(stays[0], stays[2])  # the previous network is kept, whatever was trained
    moves = torch.tensor(found["methods"]["average"]["accuracy_matrix"][0])
    assert not torch.equal(moves[0], moves[2])
    ewc, free = (torch.tensor(found["methods"][name]["accuracy_matrix"][0]) for name in ("ewc", "finetune"))
    assert ewc[2, 2] < free[2, 2] - 0.05  # with the usual strength it learns as well
    kept = (tmp_path / "out" / "rebasin" / "seed_0" / "config.yaml").read_text()
    assert "replay_per_class: 1" in kept


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("magic: {}", "there is no method 'magic'"),
        (
            "rebasin: {alpha: 0.5}",
            "there is no key 'alpha'; name it in full, as in merge.alpha",
        ),
        ("rebasin: {merge.alpha: 2}", "per_method of 'rebasin'"),
        ("ewc: {lamda: 1}", "per_method of 'ewc': Avalanche's strategy for 'ewc' does not take these options"),
        ("mc-sgd: {stepps: 1}", "unexpected keyword argument 'stepps'"),
        ("mc-sgd: {points: 0}", "per_method of 'mc-sgd': points"),
        ("rebasin: {data.n_tasks: 2}", "data.n_tasks is the same for all methods of a benchmark; set it outside"),
        ("rebasin: {data.replay_per_class: 0}", "method 'rebasin' replays examples"),
    ],
)
def test_wrong_settings_of_a_method_are_refused_before_any_run(line, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"per_method:\n  {line}\n")
    words = ["--config", str(tmp_path / "c.yaml"), "--methods", "finetune,ewc,mc-sgd,rebasin"]
    code, found = run(tmp_path / "out", *words)
    assert code != 0
    assert found is None
    assert message in capsys.readouterr().err


def built(tmp_path, method, *words, seed=0):
    cli = ContinualCLI("benchmark", [*SMALL[1:], *words])
    return build_run(cli.for_method(method), method, seed, tmp_path, [])


def merges(run):
    return [one for one in run.trainer.callbacks if isinstance(one, RebasinMerge | ModeConnectivity)]


def test_what_each_of_our_methods_is_made_of(tmp_path):
    words = ["--merge.alpha=0.9", "--merge.start=fresh", "--merge.statistics=none", "--merge.method=frank-wolfe"]
    (clewi,) = merges(built(tmp_path, "clewi", *words))
    kept = (
        clewi.settings.alpha,
        clewi.settings.method,
        clewi.settings.statistics,
        clewi.settings.start,
        clewi.examples,
    )
    assert kept == (0.5, "activations", "reestimate", "previous", "kept")
    (average,) = merges(built(tmp_path, "average", *words))
    assert (average.settings.method, average.settings.alpha, average.settings.start) == ("identity", 0.9, "fresh")
    (rebasin,) = merges(built(tmp_path, "rebasin", *words))
    assert (rebasin.settings.method, rebasin.settings.alpha, rebasin.settings.start) == ("frank-wolfe", 0.9, "fresh")
    own = 'per_method={"mc-sgd": {"points": 3}, "rebasin-il": {"alpha": 0.6}, "clewi": {"merge.alpha": 0.4}}'
    run = built(tmp_path, "mc-sgd", f"--{own}")
    assert merges(run)[0].points == 3
    assert [merges(built(tmp_path, "mc-sgd", seed=seed))[0].seed for seed in (0, 7)] == [0, 7]
    assert [built(tmp_path, "rebasin-il", seed=seed).model.seed for seed in (0, 7)] == [0, 7]
    run = built(tmp_path, "rebasin-il", f"--{own}")
    assert run.model.alpha == 0.6
    assert not merges(run)
    assert merges(built(tmp_path, "clewi", f"--{own}"))[0].settings.alpha == 0.4


def test_without_merge_and_without_alignment(tmp_path):
    """Beside a trained residual the ablation of the alignment is the same residual at the identity."""
    options = {"steps": 3, "residual_learning_rate": 0.5}
    words = ["--merge.method=sinkhorn", f"--merge.options={json.dumps(options)}", "--merge.start=fresh"]
    (average,) = merges(built(tmp_path, "average", *words))
    assert (average.settings.method, average.settings.init, average.settings.start) == ("sinkhorn", "identity", "fresh")
    assert average.settings.options == {**options, "learning_rate": 0.0}
    none = f"--merge.options={json.dumps({**options, 'residual_learning_rate': 0.0})}"
    for without in ([words[0], none], [*words, "--merge.cost=l2", "--merge.options=null"]):
        (plain,) = merges(built(tmp_path, "average", *without))
        assert (plain.settings.method, plain.settings.cost, plain.settings.options) == ("identity", None, {})
    (without,) = merges(built(tmp_path, "no-merge", *words, "--merge.alpha=0.7", "--merge.combine=regmean"))
    assert (without.settings.method, without.settings.alpha, without.settings.start) == ("identity", 0.0, "fresh")
    assert (without.settings.combine, without.settings.statistics) == ("average", "none")


def test_average_moves_nothing_where_a_residual_is_trained(tmp_path):
    options = {"steps": 20, "residual_learning_rate": 1.0}
    words = ["--merge.method=sinkhorn", f"--merge.options={json.dumps(options)}", "--merge.start=fresh"]
    _, found = run(tmp_path / "with", *words, "--merge.alpha=0.5", "--methods=no-merge,average,rebasin")
    moved = {name: numbers["moved"][0] for name, numbers in found["methods"].items()}
    assert moved["no-merge"] == moved["average"] == [0, 0]
    assert min(moved["rebasin"]) > 0
    _, plain = run(tmp_path / "without", "--merge.start=fresh", "--merge.alpha=0.5", "--methods=no-merge,average")
    matrices = [[one["methods"][name]["accuracy_matrix"] for one in (found, plain)] for name in ("no-merge", "average")]
    assert matrices[0][0] == matrices[0][1]
    assert matrices[1][0] != matrices[1][1]


def test_no_merge_is_training_alone(tmp_path):
    _, found = run(tmp_path, "--methods=no-merge,average", "--merge.alpha=0.0")
    assert found["methods"]["no-merge"]["accuracy_matrix"] == found["methods"]["average"]["accuracy_matrix"]


def test_what_does_not_concern_a_method_is_said_and_changes_nothing(tmp_path, capsys):
    words = ["--model.distillation=2", "--model.weighting=tasks"]
    names = "--methods=replay,mc-sgd,average"
    _, found = run(tmp_path / "with", names, *words)
    said = capsys.readouterr().err
    assert "model.distillation does not concern replay, mc-sgd." in said
    assert "model.weighting does not concern replay, mc-sgd." in said
    _, plain = run(tmp_path / "without", names)
    assert "concern" not in capsys.readouterr().err
    same = {
        name: one["accuracy_matrix"] == plain["methods"][name]["accuracy_matrix"]
        for name, one in found["methods"].items()
    }
    assert same == {"replay": True, "mc-sgd": True, "average": False}


def test_fit_reads_what_differs_for_its_method(tmp_path):
    own = json.dumps({"rebasin": {"merge.alpha": 0.25, "model.distillation": 0.5}})
    words = [*SMALL[1:-1], "--data.epochs_per_task=1", "--method=rebasin", f"--per_method={own}"]
    assert main(["fit", *words, "--trainer.enable_progress_bar=false", f"--output_dir={tmp_path}"]) == 0
    config = yaml.safe_load((tmp_path / "fit" / "rebasin" / "seed_0" / "config.yaml").read_text())
    assert (config["merge"]["alpha"], config["model"]["distillation"]) == (0.25, 0.5)


def test_a_method_may_have_an_optimizer_of_its_own(tmp_path):
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25, "momentum": 0.5}}
    own = f"--per_method={json.dumps({'mc-sgd': {'model.optimizer': optimizer}})}"
    made = built(tmp_path, "mc-sgd", own).model.optimizer([torch.nn.Parameter(torch.ones(1))])
    assert (type(made), made.defaults["lr"], made.defaults["momentum"]) == (torch.optim.SGD, 0.25, 0.5)
    other = built(tmp_path, "rebasin", own).model.optimizer([torch.nn.Parameter(torch.ones(1))])
    assert type(other) is torch.optim.AdamW


def test_long_values_of_a_method_are_read_whole(tmp_path):
    options = {"steps": 3, "learning_rate": 0.125, "sharpness": 2.5, "noise": 0.0625, "residual_learning_rate": 0.03125}
    own = {"rebasin": {"merge.method": "sinkhorn", "merge.options": options}}
    (merge,) = merges(built(tmp_path, "rebasin", f"--per_method={json.dumps(own)}"))
    assert {name: merge.settings.options[name] for name in options} == options


def test_arguments_that_avalanches_loops_do_not_heed_are_refused(tmp_path, capsys):
    code, _ = run(tmp_path / "out", "--methods", "replay,average", "--trainer.limit_train_batches=2")
    assert code == 2
    assert "trainer.limit_train_batches 2 would not concern replay, which Avalanche runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods=replay,average", "--trainer.callbacks=DeviceStatsMonitor"], "trainer.callbacks "),
        (["--methods=replay", "--trainer.limit_train_batches=1"], "trainer.limit_train_batches 1 would not concern"),
        (["--methods=average", "--trainer.limit_val_batches=1"], "trainer.limit_val_batches 1 would leave tasks"),
        (["--methods=finetune", "--trainer.max_epochs=3"], "trainer.max_epochs 3 ends inside a task of 2 epochs"),
        (["--methods=finetune", "--trainer.max_epochs=8"], "n_tasks=4, but the stream has 3"),
    ],
)
def test_arguments_of_the_trainer_that_would_make_methods_unequal(words, message, tmp_path, capsys):
    code, found = run(tmp_path / "out", *words)
    assert code != 0
    assert found is None
    assert message in capsys.readouterr().err


def test_an_optimizer_is_tried_before_anything_is_written(tmp_path, capsys):
    words = ["--methods=replay", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=-1"]
    assert run(tmp_path / "out", *words)[0] == 2
    assert "model.optimizer: Invalid learning rate: -1.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_goes_before_the_file_wherever_it_stands(tmp_path):
    (tmp_path / "c.yaml").write_text("merge: {alpha: 0.5}\ndata: {n_tasks: 5}\n")
    for file in ([f"--config={tmp_path / 'c.yaml'}"], ["--config", str(tmp_path / "c.yaml")]):
        cli = ContinualCLI(
            "benchmark", [*SMALL[5:], "--merge.alpha=0.25", "--data.n_tasks", "2", *file, "--data.batch_size=7"]
        )
        chosen = (cli.config.merge.alpha, cli.config.data.n_tasks, cli.config.data.batch_size)
        assert chosen == (0.25, 2, 7)


def test_clewi_is_not_trained_in_parallel(tmp_path, capsys):
    code, _ = run(tmp_path / "out", "--methods", "clewi", "--merge.start=fresh", "--parallel_tasks=2")
    assert code == 2
    assert "trains the tasks of 'clewi' apart" in capsys.readouterr().err


def test_fit_names_what_it_cannot_run(tmp_path, capsys):
    words = ["fit", *SMALL[1:-1], "--method", "ewc", "--output_dir", str(tmp_path)]
    assert main(words) == 2
    assert "'ewc' is for benchmark; choose from finetune, replay, no-merge, average, rebasin" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_figures_of_runs_in_turn(tmp_path):
    words = [
        "--methods",
        "replay,rebasin",
        "--seeds=0,1",
        "--threads=1",
        '--per_method={"rebasin": {"merge.alpha": 0.3}}',
    ]
    found = [run(tmp_path / str(n), *words, f"--processes={n}")[1] for n in (1, 2)]
    for results in found:
        assert results["protocol"]["missing"] == []
        for key in ("processes", "command"):
            results["protocol"].pop(key)
        for numbers in results["methods"].values():
            assert len(numbers.pop("seconds")) == len(numbers.pop("cpu_seconds")) == 2
    assert found[0] == found[1]
    for place in ("rebasin/seed_1/config.yaml", "replay/seed_0/tensorboard"):
        assert (tmp_path / "2" / place).exists()
    assert "alpha: 0.3" in (tmp_path / "2" / "rebasin" / "seed_1" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_run_that_fails_in_a_process_of_its_own_is_told(tmp_path, capsys):
    code, _ = run(tmp_path / "out", "--methods", "finetune,rebasin", "--processes=2", "--model.backbone.input_size=60")
    assert code == 2
    assert "model.backbone does not take images of 1 x 8 x 8" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_beside_others_loses_none_that_is_finished(tmp_path, capsys):
    """The first of those planned fails, after the second has long been finished."""
    fails = json.dumps({"mc-sgd": {"learning_rate": 1e6, "points": 20, "epochs": 600}})
    code, found = run(tmp_path / "out", "--methods=mc-sgd,average", "--processes=2", f"--per_method={fails}")
    assert code == 1
    assert "missing: mc-sgd seed 0" in capsys.readouterr().err
    assert list(found["methods"]) == ["average"]


def test_processes_for_runs_or_for_tasks(tmp_path, capsys):
    words = ["--methods", "rebasin", "--parallel_tasks=2", "--processes=2", "--merge.start=fresh"]
    assert run(tmp_path / "out", *words)[0] == 2
    assert "choose one" in capsys.readouterr().err
    assert run(tmp_path / "out", "--processes=0")[0] == 2
    assert "processes must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tasks_in_parallel_give_the_figures_of_tasks_in_turn(tmp_path):
    words = ["--methods", "average,rebasin", "--merge.start=fresh", "--model.backbone.drop_rate=0"]
    words += ["--model.lr_decay=0.7", "--model.lr_schedule=linear"]
    # A merge that reads batches, which must be those of the last epoch.
    words += ["--merge.method=covariance", "--merge.combine=regmean", "--merge.alpha=0.5"]
    found = [run(tmp_path / str(n), *words, f"--parallel_tasks={n}", "--threads=1")[1]["methods"] for n in (1, 2)]
    for name in ("average", "rebasin"):
        torch.testing.assert_close(
            torch.tensor(found[0][name]["accuracy_matrix"]),
            torch.tensor(found[1][name]["accuracy_matrix"]),
            rtol=0,
            atol=0,
        )
    assert found[0]["average"]["accuracy"] != found[0]["rebasin"]["accuracy"]


@pytest.mark.slow
def test_a_refused_merge_of_tasks_in_parallel_is_in_the_log(tmp_path, monkeypatch):
    def refused(*_):
        raise WorseMergeError("far worse")

    monkeypatch.setattr("lit_rebasin.callbacks.task_merger.check_loss", refused)
    words = ["--methods=rebasin", "--merge.start=fresh", "--parallel_tasks=2", "--threads=1"]
    code, found = run(tmp_path, *words)
    assert code == 0
    assert [entry["task"] for entry in found["methods"]["rebasin"]["refused"][0]] == [1, 2]
    (events,) = (tmp_path / "rebasin" / "seed_0").rglob("events.out.*")
    log = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in log.Scalars("merge/refused")] == [(1, 1.0), (2, 1.0)]


def test_tasks_that_depend_on_each_other_are_not_trained_in_parallel(tmp_path, capsys):
    code, _ = run(tmp_path / "out", "--methods", "rebasin", "--parallel_tasks=2")
    assert code == 2
    assert "needs --merge.start fresh" in capsys.readouterr().err


def test_tasks_in_parallel_have_no_network_before_them(tmp_path, capsys):
    words = ["--methods", "rebasin", "--parallel_tasks=2", "--merge.start=fresh", "--model.distillation=0.1"]
    code, _ = run(tmp_path / "out", *words)
    assert code == 2
    assert "set model.distillation to 0" in capsys.readouterr().err


def test_a_baseline_has_its_own_loss(tmp_path, capsys):
    code, _ = run(tmp_path / "out", "--methods", "replay", '--per_method={"replay": {"model.lr_decay": 0.5}}')
    assert code == 2
    assert (
        "per_method of 'replay': model.lr_decay would not concern a method that Avalanche runs"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("replay", "merge.alpha", 0.5),
        ("mc-sgd", "merge.combine", "regmean"),
        ("mc-sgd", "model.weighting", "tasks"),
        ("mc-sgd", "model.distillation", 1.0),
        ("average", "merge.method", "weights"),
        ("rebasin-il", "model.distillation", 1.0),
        ("rebasin-il", "merge.method", "weights"),
    ],
)
def test_what_would_not_concern_a_method_is_refused(tmp_path, capsys, method, key, value):
    code, found = run(tmp_path / "out", "--methods", method, f"--per_method={json.dumps({method: {key: value}})}")
    assert code == 2
    assert found is None
    assert f"per_method of '{method}': {key} would not concern" in capsys.readouterr().err


def test_clewi_is_an_average_whatever_the_others_are():
    cli = ContinualCLI("benchmark", [*SMALL[1:], "--merge.combine=regmean", "--merge.alpha=0.8"])
    found = merge_settings(cli, "clewi")
    assert (found["combine"], found["alpha"], found["method"]) == ("average", 0.5, "activations")
    assert merge_settings(cli, "rebasin")["combine"] == "regmean"


def test_a_method_may_have_a_class_of_its_own(tmp_path):
    own = (
        '{"rebasin": {"data.replay_transform": {"class_path": "lit_rebasin.RandomShift", "init_args": {"pixels": 2}}}}'
    )
    code, _ = run(tmp_path / "out", "--methods", "average,rebasin", f"--per_method={own}")
    assert code == 0
    written = [
        yaml.safe_load((tmp_path / f"out/{name}/seed_0/config.yaml").read_text()) for name in ("average", "rebasin")
    ]
    assert written[0]["data"].get("replay_transform") is None
    assert written[1]["data"]["replay_transform"]["init_args"] == {"pixels": 2}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"model.distillation": -1}, "distillation must be a number of at least 0, got -1"),
        (
            {"data.replay_transform": {"class_path": "lit_rebasin.RandomShift", "init_args": {"pixels": 0}}},
            "pixels must be",
        ),
    ],
)
def test_what_a_class_refuses_of_one_method_is_said_before_another_runs(tmp_path, capsys, own, message):
    words = ["--methods", "average,rebasin", f"--per_method={json.dumps({'rebasin': own})}"]
    code, found = run(tmp_path / "out", *words)
    error = capsys.readouterr().err
    assert code == 2
    assert found is None
    assert "per_method of 'rebasin'" in error
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.optimizer.lr=0.1"], ("AdamW", 0.1, 0.01)),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"], ("SGD", 0.1, 0.0)),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.weight_decay=0.3"], ("SGD", 0.001, 0.3)),
    ],
)
def test_an_optimizer_of_another_class_has_its_own_defaults(tmp_path, words, expected):
    cli = ContinualCLI("benchmark", [*SMALL[1:], *words])
    optimizer = build_run(cli, "finetune", 0, tmp_path, []).model.configure_optimizers()
    group = optimizer.param_groups[0]
    assert (type(optimizer).__name__, group["lr"], group["weight_decay"]) == expected
