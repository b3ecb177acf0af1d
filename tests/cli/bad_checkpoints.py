"""Bad checkpoints, and bad data beside them."""

import argparse
import json
import os
import zipfile

import numpy as np
import torch

from .bad_inputs import (
    ALIGN,
    INSPECT,
    MERGE,
    BadInput,
    Planted,
    all_of,
    arrays,
    directory,
    flipped,
    networks,
    planted,
    removed,
    text,
    truncated,
)
from .networks import drawn, save, save_examples


def _held(content):
    return lambda place: torch.save(content, place.folder / "a.pt")


def _state(**other):
    """Write a network with other tensors in the place of some."""
    return lambda place: save(
        {**drawn(0).state_dict(), **{name.replace("_", "."): t for name, t in other.items()}}, place.folder / "a.pt"
    )


def _pipe(place):
    """Put a pipe in the place of a file, which nobody writes to."""
    (place.folder / "a.pt").unlink()
    os.mkfifo(place.folder / "a.pt")


_BAD = {
    "truncated": (truncated("a.pt"), "a.pt is no file of tensors"),
    "empty": (text("a.pt", ""), "a.pt is no file of tensors"),
    "text": (text("a.pt"), "a.pt is no file of tensors"),
    "a folder": (directory("a.pt"), "a.pt cannot be read: Is a directory"),
    "a pipe": (_pipe, "a.pt cannot be read: it is no file"),
    "changed in its bytes": (flipped("a.pt"), "a.pt is damaged: what it holds of 'a/data/.*' is not what was written"),
    "missing": (removed("a.pt"), "a.pt cannot be read: No such file"),
    "of another architecture": (_held(drawn(0, width=9).state_dict()), r"a.pt .*'0.weight' has shape \(9, 6\)"),
    "a pickle with code": (planted("a.pt"), "a.pt holds the Python object posix.mkdir, which could run code"),
    "of integers": (_state(**{"0_weight": torch.ones(12, 6, dtype=torch.int64)}), "'0.weight' .*int64"),
    "of complex numbers": (_state(**{"0_weight": torch.ones(12, 6, dtype=torch.complex64)}), "'0.weight' .*complex64"),
}
_COMMANDS = {"align": ALIGN, "merge": MERGE, "inspect": [*INSPECT, "--checkpoint", "a.pt"]}

FORMATS = [
    BadInput(f"a checkpoint for {command} that is {name}", all_of(networks, prepare), words, says)
    for name, (prepare, says) in _BAD.items()
    for command, words in _COMMANDS.items()
]


def _header(content, length=None):
    header = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header


def _safetensors(name, content):
    return BadInput(
        f"safetensors with {name}",
        all_of(networks, text("a.safetensors", content)),
        ["align", "a.safetensors", *ALIGN[2:]],
        "a.safetensors is no safetensors file",
    )


_WEIGHT = {"dtype": "F32", "shape": [12, 6], "data_offsets": [0, 288]}
SAFETENSORS = [
    _safetensors("nothing", b""),
    _safetensors("text", b"hello\n"),
    _safetensors("a header longer than the file", _header(b"{}", length=2**40)),
    _safetensors("a header that is no JSON", _header(b"{{{{{{{{")),
    _safetensors("a header of a list", _header(b"[1, 2]  ")),
    _safetensors("data beyond its end", _header({"0.weight": _WEIGHT}) + bytes(8)),
    _safetensors("a shape of another size", _header({"0.weight": {**_WEIGHT, "shape": [2**40, 6]}}) + bytes(288)),
    _safetensors("an unknown type", _header({"0.weight": {**_WEIGHT, "dtype": "X9"}}) + bytes(288)),
    _safetensors("a pickle", b"\x80\x02cposix\nmkdir\nX\x03\x00\x00\x00ran\x85R."),
]


def _hyper(**arguments):
    """Write a Lightning checkpoint that says how its network is made."""
    return _held({"state_dict": drawn(0).state_dict(), "hyper_parameters": arguments})


CONTENTS = [
    BadInput("a list for a checkpoint", all_of(networks, _held([1, 2])), MERGE, "a.pt holds a list"),
    BadInput("a tensor for a checkpoint", all_of(networks, _held(torch.ones(3))), MERGE, "a.pt holds a Tensor"),
    BadInput(
        "a checkpoint of nothing", all_of(networks, _held({})), MERGE, "a.pt does not hold the weights of Sequential"
    ),
    BadInput(
        "a checkpoint of numbers by number", all_of(networks, _held({1: 2})), MERGE, "a.pt does not hold the weights of"
    ),
    BadInput(
        "a checkpoint with a word for a weight",
        all_of(networks, _state(**{"0_weight": "no"})),
        MERGE,
        "'0.weight' is a str in it",
    ),
    BadInput(
        "a sparse weight",
        all_of(networks, _state(**{"0_weight": torch.ones(12, 6).to_sparse()})),
        MERGE,
        "'0.weight'.*sparse",
    ),
    BadInput(
        "a weight without its data",
        all_of(networks, _state(**{"0_weight": torch.ones(12, 6, device="meta")})),
        MERGE,
        "'0.weight' holds no numbers in it",
    ),
    BadInput(
        "a weight of a million million numbers",
        all_of(networks, _state(**{"0_weight": torch.ones(1).expand(10**6, 10**6)})),
        MERGE,
        r"'0.weight' has shape \(1000000, 1000000\)",
    ),
    BadInput(
        "NaN in a checkpoint",
        all_of(networks, _state(**{"2_bias": torch.full((12,), torch.nan)})),
        MERGE,
        "'2.bias' of checkpoint a.pt holds a NaN",
    ),
    BadInput(
        "infinity in a checkpoint",
        all_of(networks, _state(**{"2_bias": torch.full((12,), -torch.inf)})),
        ALIGN,
        "'2.bias' of checkpoint a.pt holds a NaN or an infinity",
    ),
    BadInput(
        "a Python object in a checkpoint",
        all_of(networks, _held({"state_dict": {}, "hyper_parameters": argparse.Namespace(a=1)})),
        MERGE,
        "argparse.Namespace, which could run code",
    ),
    BadInput(
        "a whole module for a checkpoint",
        all_of(networks, lambda place: torch.save(drawn(0), place.folder / "a.pt")),
        MERGE,
        "a.pt holds the Python object torch.nn.*, which could run code",
    ),
    BadInput(
        "a plain pickle for a checkpoint",
        all_of(networks, planted("a.bin")),
        ["merge", "a.bin", *MERGE[2:]],
        "a.bin is a plain pickle, which could run code",
    ),
    BadInput(
        "an .npz for a checkpoint",
        all_of(networks, arrays("a.npz", x=np.ones(3))),
        ["merge", "a.npz", *MERGE[2:]],
        "a.npz is no file of tensors",
    ),
    BadInput(
        "a network too large for any machine",
        all_of(networks, _hyper(width=10**15)),
        MERGE,
        "aligned_by_test.mlp cannot be made",
    ),
    BadInput("a network of a width in words", all_of(networks, _hyper(width="wide")), MERGE, "width|cannot be made"),
]


def _damaged(place):
    """Change bytes of what is compressed."""
    path = place.folder / "d.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 6)))
    content = bytearray(path.read_bytes())
    content[55] = 0xFF  # behind the names; no block of deflate begins so
    path.write_bytes(content)


def _member(content):
    """Write an archive with something for x."""

    def prepare(place):
        with zipfile.ZipFile(place.folder / "d.npz", "w") as archive:
            archive.writestr("x.npy", content)

    return prepare


def _header_of(shape):
    said = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(1007) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(said).to_bytes(2, "little") + said


DATA = [
    BadInput(
        f"examples for merge that are {name}",
        all_of(networks, lambda place: save_examples(place.folder / "d.npz"), prepare),
        [*MERGE, "--data", "d.npz"],
        says,
    )
    for name, prepare, says in [
        ("truncated", truncated("d.npz"), "--data d.npz is not a readable .npz"),
        ("empty", text("d.npz", ""), "--data d.npz is not a readable .npz"),
        ("text", text("d.npz"), "--data d.npz is not a readable .npz"),
        ("a folder", directory("d.npz"), "there is no file d.npz for --data"),
        ("missing", removed("d.npz"), "there is no file d.npz for --data"),
        (
            "objects with code",
            arrays("d.npz", x=np.array([Planted()], dtype=object)),
            "d.npz is not a readable .npz of numbers",
        ),
        ("a plain pickle with code", planted("d.npz"), "d.npz is not a readable .npz"),
        ("NaN", arrays("d.npz", x=np.full((5, 6), np.nan)), "d.npz: x must hold finite numbers"),
        (
            "words",
            arrays("d.npz", x=np.array(["a", "b"])),
            "d.npz is not a readable .npz of numbers: x must hold numbers",
        ),
        ("damaged within", _damaged, "d.npz is not a readable .npz of numbers: Error -3 while decompressing"),
        ("a text for an array", _member(b"hello"), "d.npz is not a readable .npz of numbers: x must hold numbers"),
        ("nothing for an array", _member(b""), "d.npz is not a readable .npz of numbers"),
        ("an array without end", _member(_header_of(f"({10**22}, 6)")), "d.npz is not a readable .npz of numbers"),
        ("an array beyond memory", _member(_header_of(f"({10**12}, 6)")), "d.npz is not a readable .npz of numbers"),
        ("a header without end", _member(_header_of("(" * 900)), "d.npz is not a readable .npz of numbers"),
        (
            "labels beyond int64",
            arrays("d.npz", x=np.ones((5, 6)), y=np.array([2**64 - 1] * 5, np.uint64)),
            "y must hold finite numbers, whole ones up to 9223372036854775807",
        ),
        (
            "numbers beyond float32",
            arrays("d.npz", x=np.full((5, 6), 1e300)),
            "numbers that torch.float32 of the network does not",
        ),
        ("of another shape", arrays("d.npz", x=np.ones((5, 7))), "does not run on x of d.npz"),
        (
            "labels of another count",
            arrays("d.npz", x=np.ones((5, 6)), y=np.arange(4)),
            "y must hold one class index for each",
        ),
        ("a single number", arrays("d.npz", x=np.array(3.0)), "x holds no examples"),
    ]
]


def _times(factor, dtype=torch.float32):
    """Write two networks with large weights, of either sign."""

    def prepare(place):
        for name, sign in {"a.pt": 1, "b.pt": -1}.items():
            save(
                {key: torch.full_like(t, sign * factor, dtype=dtype) for key, t in drawn(0).state_dict().items()},
                place.folder / name,
            )

    return prepare


LARGE = [
    BadInput(
        f"checkpoints whose merge is {name}",
        all_of(networks, prepare),
        MERGE,
        "comes to NaN or infinity in torch.float32",
        1,
    )
    for name, prepare in {
        "infinite": _times(3e38),
        "beyond the numbers of one": all_of(
            _times(1e300, torch.float64), lambda place: save(drawn(1).state_dict(), place.folder / "b.pt")
        ),
    }.items()
]

ROWS = [*LARGE, *FORMATS, *SAFETENSORS, *CONTENTS, *DATA]
