"""Bad checkpoints that a run goes on from, or is compared with."""

import torch

from .bad_inputs import (
    BENCHMARK,
    CUT,
    FIT,
    LAST,
    BadInput,
    all_of,
    begun,
    changed,
    directory,
    flipped,
    networks,
    planted,
    removed,
    text,
    truncated,
)
from .networks import drawn


def _resumed(name, prepare, says):
    return BadInput(
        f"a checkpoint to go on from that is {name}", all_of(begun("fit"), prepare), [*FIT, f"--ckpt_path={LAST}"], says
    )


def _without(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return changed(LAST, change)


def _nan(checkpoint):
    next(iter(checkpoint["state_dict"].values())).fill_(torch.nan)


def _record(checkpoint, value):
    checkpoint["callbacks"]["MethodRecord"]["config"] = value


def _first_weight(checkpoint, change):
    name, tensor = next((name, tensor) for name, tensor in checkpoint["state_dict"].items() if tensor.ndim == 2)
    checkpoint["state_dict"][name] = change(tensor)


def _path_of_a_saver(checkpoint):
    for name, state in checkpoint["callbacks"].items():
        if name.startswith("ModelCheckpoint"):
            state["last_model_path"] = 5


ROWS = [
    _resumed("truncated", truncated(LAST), "last.ckpt is no file of tensors"),
    _resumed("empty", text(LAST, ""), "last.ckpt is no file of tensors"),
    _resumed("text", text(LAST), "last.ckpt is no file of tensors"),
    _resumed(
        "changed in its bytes", flipped(LAST), "last.ckpt is damaged: what it holds of '.*' is not what was written"
    ),
    _resumed("a folder", directory(LAST), "last.ckpt cannot be read: Is a directory"),
    _resumed("missing", removed(LAST), "there is no checkpoint .*last.ckpt"),
    _resumed(
        "a pickle with code", planted(LAST), "last.ckpt holds the Python object posix.mkdir, which could run code"
    ),
    _resumed(
        "a state dict",
        lambda place: torch.save(drawn(0).state_dict(), place.folder / LAST),
        "last.ckpt is not a checkpoint of `lit-rebasin`",
    ),
    _resumed("a list", lambda place: torch.save([1], place.folder / LAST), "last.ckpt holds a list, not a state dict"),
    _resumed("without the random states", _without("callbacks", "RandomStates"), "for it lacks 'RandomStates'"),
    _resumed(
        "with numbers for random states",
        changed(LAST, lambda held: held["callbacks"]["RandomStates"].update(torch=torch.zeros(3))),
        "The state of RandomStates is damaged",
    ),
    _resumed(
        "with a word for its progress",
        changed(LAST, lambda held: held["loops"]["fit_loop"].update(epoch_progress="junk")),
        "epoch_progress of fit_loop is of type str in it, not dict",
    ),
    *(
        _resumed(
            f"with {value!r} for a count of its progress",
            changed(LAST, lambda held, v=value: held["loops"]["fit_loop"]["epoch_progress"]["current"].update(ready=v)),
            "ready of fit_loop is of type .* in it, not int",
        )
        for value in ("x", [], None)
    ),
    _resumed(
        "with a word for its optimizer's state",
        changed(LAST, lambda held: held["optimizer_states"][0]["state"].update({0: "junk"})),
        "last.ckpt is damaged, or of another version .*; begin the run anew",
    ),
    *(
        BadInput(
            f"going on with another {key}",
            begun("fit"),
            [*FIT, f"--ckpt_path={LAST}", f"--{key}={value}"],
            f"last.ckpt is of a run with {key.replace('lr', 'init_args.lr')}=.*, not {value}; go on with what it was begun with",
        )
        for key, value in (("model.optimizer.lr", 0.9), ("data.batch_size", 7), ("merge.alpha", 0.1))
    ),
    *(
        _resumed(f"with {name} for its configuration", changed(LAST, lambda held, v=value: _record(held, v)), says)
        for name, value, says in (
            ("a list", [1], "it lacks a configuration"),
            ("a word", "junk", "it lacks a configuration"),
            ("a tensor within", {"method": torch.ones(2)}, "it lacks a configuration"),
            ("nothing", {}, "last.ckpt is of a run with .*, not"),
        )
    ),
    _resumed("without its configuration", _without("callbacks", "MethodRecord", "config"), "it lacks 'config'"),
    *(
        _resumed(f"with a weight that is {name}", changed(LAST, lambda held, of=kind: _first_weight(held, of)), says)
        for name, kind, says in (
            ("sparse", torch.Tensor.to_sparse, "is sparse_coo in it"),
            ("without numbers", lambda tensor: tensor.to("meta"), "holds no numbers in it"),
            ("a list", torch.Tensor.tolist, "is a list in it, and no tensor"),
        )
    ),
    _resumed(
        "with nothing for an accuracy",
        changed(LAST, lambda held: held["callbacks"]["ContinualMonitor"]["rows"][0].__setitem__(0, None)),
        "The state of ContinualMonitor is damaged: task .* with rows",
    ),
    _resumed(
        "with a number for a path of its own",
        changed(LAST, _path_of_a_saver),
        "last_model_path of ModelCheckpoint is of type int in it, not str",
    ),
    _resumed("NaN", changed(LAST, _nan), "last.ckpt.*NaN"),
    _resumed("without its weights", _without("state_dict"), "last.ckpt is not a checkpoint of `lit-rebasin`"),
    _resumed("without its optimizer", _without("optimizer_states"), "last.ckpt is not a checkpoint of `lit-rebasin`"),
    _resumed("without its loops", _without("loops"), "last.ckpt is not a checkpoint of `lit-rebasin`"),
    _resumed(
        "without the stream",
        _without("ContinualDataModule", "stream"),
        "last.ckpt is not a checkpoint of `lit-rebasin`",
    ),
    _resumed(
        "of another version",
        _without("ContinualDataModule", "stream", "benchmark"),
        "last.ckpt is not a checkpoint of `lit-rebasin`",
    ),
    BadInput(
        "a checkpoint of another width",
        begun("fit"),
        [*FIT, "--model.backbone.hidden_size=9", f"--ckpt_path={LAST}"],
        "last.ckpt.*shape",
    ),
    BadInput(
        "a checkpoint of another stream",
        begun("fit"),
        [*FIT, "--data.n_tasks=3", f"--ckpt_path={LAST}"],
        "n_tasks=2, not 3",
    ),
    BadInput(
        "a checkpoint of another method",
        begun("fit"),
        [*FIT, "--method=average", f"--ckpt_path={LAST}"],
        "method replay, not average",
    ),
    BadInput(
        "a checkpoint of another optimizer",
        begun("fit"),
        [*FIT, "--model.optimizer=torch.optim.SGD", f"--ckpt_path={LAST}"],
        "last.ckpt is of another run: its optimizer has .*amsgrad",
    ),
    BadInput(
        "the last checkpoint truncated",
        all_of(begun("fit"), truncated(LAST)),
        [*FIT, "--ckpt_path=last"],
        "last.ckpt is no file",
    ),
    BadInput(
        "the last checkpoint with code",
        all_of(begun("fit"), planted(LAST)),
        [*FIT, "--ckpt_path=last"],
        "last.ckpt holds the Python object",
    ),
    BadInput(
        "the last checkpoint of another stream",
        begun("fit"),
        [*FIT, "--data.n_tasks=3", "--ckpt_path=last"],
        "n_tasks=2, not 3",
    ),
    BadInput(
        "a checkpoint of a benchmark truncated",
        all_of(begun("cut"), truncated(f"{CUT}/checkpoints/last.ckpt")),
        [*BENCHMARK, "--resume"],
        "last.ckpt is no file of tensors",
    ),
    BadInput(
        "a checkpoint of a benchmark empty",
        all_of(begun("cut"), text(f"{CUT}/checkpoints/last.ckpt", "")),
        [*BENCHMARK, "--resume"],
        "last.ckpt is no file of tensors",
    ),
    BadInput(
        "a checkpoint of a benchmark with code",
        all_of(begun("cut"), planted(f"{CUT}/checkpoints/last.ckpt")),
        [*BENCHMARK, "--resume"],
        "last.ckpt holds the Python object",
    ),
    BadInput(
        "a checkpoint of a benchmark of another version",
        all_of(begun("cut"), changed(f"{CUT}/checkpoints/last.ckpt", lambda held: held.pop("callbacks"))),
        [*BENCHMARK, "--resume"],
        "last.ckpt is not a checkpoint of `lit-rebasin`, or one of another version, for it lacks 'callbacks'",
    ),
    BadInput(
        "a reference that is truncated",
        all_of(networks, truncated("a.pt")),
        [*FIT, "--trainer.callbacks+=lit_rebasin.ConnectivityMonitor", "--trainer.callbacks.reference=a.pt"],
        "^checkpoint a.pt is no file of tensors",
    ),
    BadInput(
        "a reference with code",
        planted("a.pt"),
        [*FIT, "--trainer.callbacks+=lit_rebasin.ConnectivityMonitor", "--trainer.callbacks.reference=a.pt"],
        "^checkpoint a.pt holds the Python object posix.mkdir",
    ),
    BadInput(
        "a reference of another architecture",
        networks,
        [*FIT, "--trainer.callbacks+=lit_rebasin.ConnectivityMonitor", "--trainer.callbacks.reference=a.pt"],
        "reference does not hold the weights of ContinualClassifier: it lacks 'backbone",
    ),
]
