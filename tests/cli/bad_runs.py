"""Bad folders of runs: results, event files, trials of a sweep."""

import json
import struct

from .bad_inputs import (
    BENCHMARK,
    SWEEP,
    BadInput,
    all_of,
    begun,
    directory,
    nothing,
    planted,
    text,
    truncated,
)

REPORT = ["report", "out"]
RESULTS = "out/results.json"


def _result(**other):
    """Change results by the dotted names of what they hold."""

    def prepare(place):
        path = place.folder / RESULTS
        results = json.loads(path.read_text())
        for name, value in other.items():
            *above, last = name.split("__")
            held = results
            for key in above:
                held = held[key]
            held[last] = value
        path.write_text(json.dumps(results))

    return prepare


_DAMAGES = {
    "truncated": (truncated(RESULTS), "out/results.json is no JSON .*cut off"),
    "empty": (text(RESULTS, ""), "out/results.json is no JSON"),
    "text": (text(RESULTS), "out/results.json is no JSON"),
    "not UTF-8": (text(RESULTS, b"\xff\xfe{}"), "out/results.json is no JSON"),
    "a list": (text(RESULTS, "[1]"), "out/results.json is not as a benchmark writes it: it is no mapping"),
    "nested a hundred thousand times": (text(RESULTS, "[" * 100_000), "out/results.json is no JSON"),
    "without methods": (_result(methods={}), "methods has no method"),
    "of refused merges in words": (
        _result(methods__average__refused=["a"]),
        "methods.average.refused is not a list of refused",
    ),
    "of refused merges without a reason": (
        _result(methods__average__refused=[[{"task": 1, "kept": "trained"}]]),
        "methods.average.refused is not a list of refused",
    ),
    "of a number beyond all": (
        _result(methods__average__accuracy=[10**400]),
        "methods.average.accuracy is not a list of numbers",
    ),
    "of a seed in words": (_result(protocol__seeds=["a"]), "protocol.seeds is not a list of whole numbers"),
    "of matrices of another size": (_result(n_tasks=5), "accuracy_matrix is not a list of matrices, 5 x 5"),
    "a pickle with code": (planted(RESULTS), "out/results.json is no JSON"),
}
RESULTS_ROWS = [
    BadInput(f"results for {words[0]} that are {name}", all_of(begun("done"), prepare), words, says)
    for name, (prepare, says) in _DAMAGES.items()
    for words in (REPORT, [*BENCHMARK, "--resume"])
]
RUNS = [
    BadInput(
        "results that are there already",
        begun("done"),
        BENCHMARK,
        "out holds results already; choose another --output_dir",
    ),
    BadInput(
        "results of another alpha",
        begun("done"),
        [*BENCHMARK, "--merge.alpha=0.25", "--resume"],
        "merge.alpha=0.8, not 0.25",
    ),
    BadInput(
        "results of another seed",
        begun("done"),
        [*BENCHMARK, "--seeds=7", "--resume"],
        "out holds average with seed 0, which",
    ),
    BadInput(
        "results without the seconds of processors",
        all_of(begun("done"), _result(methods__average__cpu_seconds=[])),
        [*BENCHMARK, "--resume"],
        "another version",
    ),
    BadInput(
        "results that are a folder",
        all_of(begun("done"), directory(RESULTS)),
        [*BENCHMARK, "--resume"],
        "out/results.json cannot be read",
    ),
    BadInput(
        "results that are a folder for a report",
        all_of(begun("done"), directory(RESULTS)),
        REPORT,
        "out/results.json cannot be read",
    ),
    BadInput(
        "a run of another configuration",
        begun("cut"),
        [*BENCHMARK, "--model.optimizer.lr=0.5", "--resume"],
        "seed_0 holds a run with model.optimizer.init_args.lr=0.001, not 0.5",
    ),
    BadInput("to go on and to begin anew", begun("done"), [*BENCHMARK, "--resume", "--overwrite"], "choose one"),
    BadInput("a report of nothing", nothing, REPORT, "there is no folder out"),
    BadInput("a report of an empty folder", directory("out"), REPORT, "out is no run"),
    BadInput("a report of a file", text("out"), REPORT, "report takes a folder, and out is a file"),
]

_EVENTS = "out/events.out.tfevents.1"
EVENT_FILES = [
    BadInput(f"event files that are {name}", all_of(directory("out"), prepare), REPORT, says)
    for name, prepare, says in [
        (
            "text",
            text(_EVENTS),
            "out has event files, but nothing in them .*events.out.tfevents.1 .*damaged|breaks off",
        ),
        ("empty", text(_EVENTS, ""), "out has event files, but nothing in them"),
        ("a folder", directory(_EVENTS), "out is no run"),
        (
            "of a record of a million million bytes",
            text(_EVENTS, struct.pack("<QI", 10**12, 0) + bytes(99)),
            "out has event files, but nothing in them .*damaged",
        ),
        ("a pickle with code", planted(_EVENTS), "out has event files, but nothing in them"),
    ]
]

_TRIALS = "out/trials.json"
_TRIAL = "out/trial_000/results.json"
SWEEPS = [
    BadInput(
        "trials that are truncated",
        text(_TRIALS, '{"run": {"meth'),
        SWEEP,
        "out/trials.json is not as a sweep writes it",
    ),
    BadInput("trials that are empty", text(_TRIALS, ""), SWEEP, "out/trials.json is not as a sweep writes it"),
    BadInput("trials that are a list", text(_TRIALS, "[1]"), SWEEP, "out/trials.json is not as a sweep writes it"),
    BadInput(
        "trials of another version",
        text(_TRIALS, '{"run": {"method": "average"}}'),
        SWEEP,
        "out/trials.json is not as a sweep writes it",
    ),
    BadInput(
        "trials of another sweep",
        text(_TRIALS, '{"run": {"method": "ewc"}, "settings": []}'),
        SWEEP,
        "trials of a sweep with other method",
    ),
    BadInput("trials that are a folder", directory(_TRIALS), SWEEP, "out/trials.json is not as a sweep writes it"),
]

ROWS = [*RESULTS_ROWS, *RUNS, *EVENT_FILES, *SWEEPS]
