"""Places where nothing can be written."""

import errno
import resource

from .bad_inputs import (
    ALIGN,
    BENCHMARK,
    FIT,
    INSPECT,
    LAST,
    MERGE,
    SWEEP,
    BadInput,
    all_of,
    begun,
    directory,
    failing,
    networks,
    nothing,
    text,
)

REPORT = ["report", "out"]
RESULTS = "out/results.json"

_OUTPUTS = {"fit": FIT, "benchmark": BENCHMARK, "sweep": SWEEP}
OUTPUTS = [
    BadInput(
        f"an output folder of {name} {where}",
        prepare,
        [*words, f"--output_dir={folder}"],
        f"output_dir {folder} cannot be written to .{says}",
    )
    for name, words in _OUTPUTS.items()
    for where, prepare, folder, says in [
        ("that is a file", text("out"), "out", "File exists"),
        ("under a file", text("out"), "out/a", "Not a directory"),
        ("where none can be", nothing, "/proc/out", "No such file"),
        ("of a name that is too long", nothing, "a" * 300, "File name too long"),
        ("of a name with a NUL", nothing, "a\0b", ".*embedded null"),
    ]
]
READ_ONLY = [
    BadInput(
        f"a read-only folder for {name}",
        all_of(directory("out"), failing("pathlib.Path.touch", OSError(errno.EROFS, "Read-only file system"))),
        words,
        "output_dir out cannot be written to .Read-only file system.; choose another",
    )
    for name, words in _OUTPUTS.items()
]
TARGETS = [
    BadInput(
        "a file in the place of a method's folder", text("out/average"), BENCHMARK, "out/average.*Not a directory", 1
    ),
    BadInput("a file in the place of a fit", text("out/fit"), FIT, "out/fit.*Not a directory", 1),
    BadInput("a folder in the place of results", directory(RESULTS), BENCHMARK, "out holds results already"),
    BadInput(
        "a folder in the place of a merge",
        all_of(networks, directory("m.pt")),
        [*MERGE, "--overwrite"],
        "--output m.pt cannot be written",
    ),
    BadInput(
        "a merge that is there already",
        all_of(networks, text("m.pt")),
        MERGE,
        "m.pt is there already; choose another name, or pass --overwrite",
    ),
    BadInput(
        "a merge in a folder that is missing", networks, [*MERGE[:-1], "no/m.pt"], "--output no/m.pt cannot be written"
    ),
    BadInput("a merge in a format that is none", networks, [*MERGE[:-1], "m.onnx"], "--output must be a .safetensors"),
    BadInput(
        "a picture in a folder that is missing",
        nothing,
        [*INSPECT, "--figure", "no/a.png"],
        "no/a.png cannot be written",
    ),
    BadInput(
        "a picture in the place of a folder",
        directory("a.png"),
        [*INSPECT, "--figure", "a.png"],
        "a.png cannot be written",
    ),
    BadInput(
        "a report in the place of a folder",
        all_of(begun("done"), directory("a.html")),
        [*REPORT, "--output", "a.html"],
        "a.html cannot be written",
    ),
    BadInput(
        "a report in a folder that is missing",
        begun("done"),
        [*REPORT, "--output", "no/a.html"],
        "no/a.html cannot be written",
    ),
]


def full_disk(place):
    """Let no file grow beyond some bytes, as on a disk that is full; the test lifts the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FULL = [
    BadInput(f"a full disk for {name}", all_of(prepare, full_disk), words, f"{says}cannot be written", 1)
    for name, prepare, words, says in [
        ("fit", nothing, FIT, "a file "),
        ("a fit that goes on", begun("fit"), [*FIT, f"--ckpt_path={LAST}"], "a file "),
        ("benchmark", nothing, BENCHMARK, "a file "),
        ("a benchmark of Avalanche's", nothing, [*BENCHMARK, "--methods=finetune"], "out/finetune/seed_0/config.yaml "),
        ("a benchmark that goes on", begun("cut"), [*BENCHMARK, "--resume"], "a file "),
        ("sweep", nothing, SWEEP, "out/trials.json "),
        ("align", networks, ALIGN, "m.pt "),
        ("merge", networks, MERGE, "m.pt "),
        ("merge over another file", all_of(networks, text("m.pt")), [*MERGE, "--overwrite"], "m.pt "),
        ("merge to safetensors", networks, [*MERGE[:-1], "m.safetensors"], "m.safetensors "),
        ("the picture of inspect", nothing, [*INSPECT, "--figure", "a.png"], "a.png "),
        ("the picture of inspect over another", text("a.svg"), [*INSPECT, "--figure", "a.svg"], "a.svg "),
        ("report", begun("done"), REPORT, "out/report.html "),
        ("report over another", all_of(begun("done"), text("out/report.html")), REPORT, "out/report.html "),
    ]
]
_IO, _QUOTA = OSError(errno.EIO, "Input/output error"), OSError(errno.EDQUOT, "Disk quota exceeded")
_NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
FLUSHES = [
    BadInput(
        "a full disk for the logs",
        failing("tensorboard.summary.writer.event_file_writer.EventFileWriter.add_event", _NO_SPACE),
        FIT,
        "^the disk is full: No space left on device",
        1,
    ),
    BadInput(
        "a disk that fails as it is flushed",
        all_of(networks, text("m.pt"), failing("os.fsync", _IO)),
        [*MERGE, "--overwrite"],
        "m.pt cannot be written .Input/output error",
        1,
    ),
    BadInput(
        "a quota that is reached",
        all_of(networks, failing("os.fsync", _QUOTA)),
        ALIGN,
        "m.pt cannot be written .Disk quota exceeded",
        1,
    ),
    BadInput(
        "a quota that is reached by a report",
        all_of(begun("done"), failing("os.fsync", _QUOTA)),
        REPORT,
        "out/report.html cannot be written .Disk quota exceeded",
        1,
    ),
    BadInput(
        "a file that cannot be renamed",
        all_of(networks, text("m.pt"), failing("os.replace", _IO)),
        [*MERGE, "--overwrite"],
        "m.pt cannot be written .Input/output error",
        1,
    ),
]

ROWS = [*OUTPUTS, *READ_ONLY, *TARGETS, *FULL, *FLUSHES]
