"""Commands with words of any kind in the place of some: a sentence and exit code 2, or what was asked for."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_rebasin.cli import main

NETWORK = ["--model", "torch.nn.Linear", "--model.in_features", "3", "--model.out_features", "2", "--input", "3"]
COMMANDS = {
    "inspect": ["torch.nn.Linear", *NETWORK[2:]],
    "align": ["a.pt", "b.pt", *NETWORK, "--output", "m.pt", "--overwrite"],
    "merge": ["a.pt", "b.pt", *NETWORK, "--output", "m.pt", "--overwrite"],
    "report": ["."],
    # Without a backbone, so that nothing is ever trained.
    "fit": ["--data.benchmark=rotated-digits", "--output_dir=out"],
    "benchmark": ["--data.benchmark=rotated-digits", "--methods=average", "--seeds=0", "--output_dir=out"],
    "sweep": ["--data.benchmark=rotated-digits", "--vary", "merge.alpha=0.5", "--output_dir=out"],
}
OPTIONS = (
    *("alpha", "method", "methods", "seeds", "data", "layers", "input", "cost", "init", "options", "figure", "output"),
    *("checkpoint", "seed", "json", "config", "vary", "per_method", "ckpt_path", "model.bias", "model.optimizer"),
    *("data.n_tasks", "data.scenario", "data.replay_transform", "merge.alpha", "merge.options", "merge.margin"),
    *("trainer.precision", "trainer.callbacks", "trainer.devices", "trainer.logger", "trainer.max_time", "threads"),
)
VALUES = (
    *("", " ", "null", "[]", "{}", "-1", "0", "0.5", "1e309", "nan", "9999999999999999999", "1" * 400, "true", "a"),
    *("a=b", "a.b", "[1,2]", "{a: 1}", "[", "{", "'", '"', "~", "--", "-", "\t", "\n", "💥", "../..", "*a", "&a", ","),
    *("os.system", "!!python/object:os.system", "{class_path: os.system, init_args: {command: touch ran}}"),
    *("{class_path: 1}", "torch.nn.Linear", "lit_rebasin.RebasinMerge", "a.pt", ".", "1,2", "None"),
)


@st.composite
def commands(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    words = list(COMMANDS[command])
    for _ in range(draw(st.integers(1, 3))):
        place, value = draw(st.integers(0, len(words))), draw(st.sampled_from(VALUES))
        kind = draw(st.sampled_from(["joined", "apart", "removed", "in its place", "within"]))
        option = draw(st.sampled_from(OPTIONS))
        if kind == "joined":
            words.append(f"--{option}={value}")
        elif kind == "apart":
            words += [f"--{option}", value]
        elif words and place < len(words):
            word = words.pop(place)
            cut = draw(st.integers(0, len(word)))
            words[place:place] = {"in its place": [value], "within": [word[:cut] + value + word[cut:]]}.get(kind, [])
    return [command, *words]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    for number, name in enumerate("ab"):
        torch.save({"weight": torch.full((2, 3), float(number)), "bias": torch.ones(2)}, folder / f"{name}.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(commands())
def test_any_words_are_answered(networks, capsys, words):
    code = main(words)
    said = capsys.readouterr().err
    sentences = [line for line in said.splitlines() if line.startswith("lit-rebasin: error: ")]
    assert code in (0, 1, 2)
    assert len(sentences) == (code != 0), said
    assert "Traceback" not in said
    assert not (networks / "ran").exists()
    assert not list(networks.rglob("*.tmp"))
