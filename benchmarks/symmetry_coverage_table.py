"""The tables of symmetry_coverage.py."""

from collections import Counter

INTRODUCTION = """# Permutation symmetries of torchvision's classification models

`lit_rebasin.permutation_spec` on every model of `torchvision.models` that classifies, with `weights=None` and then every constant weight,
layer scale and statistic drawn at random, so that nothing hides. Two images of 224 x 224 (299 x 299 for inception_v3).

* **coverage**: share of the parameter elements that lie on at least one movable axis.
* **error**: largest difference of an output after all groups are permuted at random, relative to the largest output, in float32 and
  evaluation mode.
* **control**: the same where the first group is reversed in one of its tensors only, which is wrong: it must be far above the error.
* **spec**: seconds of `permutation_spec(check=False)`, which holds an export of its own (two where a weight is used in training mode only);
  **spec / export**: the same divided by the seconds of `torch.export.export`, timed in turns after a warm-up.
* **check**: seconds of `check_invariance`, which also holds BatchNorm's running statistics in training mode to the permutation.

Every time was measured beside other work on the same machine, and once unless said: compare the ratios, not the seconds.
"""

PEERS = """## Peers

The same question to the packages `sinkhorn-rebasin` and `rebasin` (snimu), on small models of most families, in the environment above
but with images of 64 x 64 (75 x 75 for inception_v3, 224 x 224 for vit_b_16 and maxvit_t), which makes their work lighter. Each has at most
{seconds} s a model, of wall clock beside other work: to need more says nothing about being right. Each draws its own random permutations and
applies them to its own copy of the same randomised weights; [symmetry_peers.py](../../benchmarks/symmetry_peers.py) is the code.

* **Same function**: the relative difference of the outputs, in parentheses, is at most 1e-3. "With batch statistics" repeats it in float64 with
  BatchNorm on the statistics of the batch: snimu's package leaves the running statistics where they are and asks for them to be estimated anew.
* **Coverage**, in percent: parameter elements in tensors that changed, whether or not the function survived.
"""


def write_table(found, path):
    models, protocol = found["models"], found["protocol"]
    versions = ", ".join(f"{package} {number}" for package, number in protocol["versions"].items())
    lines = [
        INTRODUCTION,
        f"Made by `{protocol['command']}` with {versions}, {protocol['threads']} thread.\n",
        _summary(models, protocol["models"]),
        "",
        "| model | parameters (M) | groups | coverage % | error | control | spec s | spec / export | check s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(name, row) for name, row in sorted(models.items())),
        "",
        *_notes(models),
    ]
    if found["peers"]:
        lines += [
            PEERS.format(seconds=protocol["peer_seconds"]),
            *_peers(found),
        ]
    path.write_text("\n".join(lines).rstrip() + "\n")


def _summary(models, total):
    good = [row for row in models.values() if "failure" not in row]
    if not good:
        return "No model was exported."
    right = sum(row["error"] <= 1e-4 for row in good)
    covered = sum(row["coverage"] >= 0.95 for row in good)
    checked = [row["check_error"] for row in good if row["check_error"] is not None]
    control = min(row["control"] / max(row["error"], 1e-12) for row in good)
    sentences = [
        f"**{len(models)} of {total} models measured: {len(good)} exported, {right} with an error of at most 1e-4,",
        f"{covered} with a coverage of at least 95 %.**",
        f"Largest error {max(row['error'] for row in good):.1e}, smallest coverage {100 * min(row['coverage'] for row in good):.2f} %;",
        f"the control is nowhere less than {control:.0f} times the error.",
        f"`check_invariance` passed on all {len(checked)} that it ran on, with errors up to {max(checked, default=0.0):.1e}.",
    ]
    for name, row in models.items():
        if row.get("repeats", 1) > 1:
            sentences.append(
                f"{name}: spec / export {row['spec_over_export']:.2f}, the median of {row['repeats']} turns."
            )
    return " ".join(sentences)


def _row(name, row):
    if "failure" in row:
        return f"| {name} | {row['failure']} | | | | | | | |"
    check = "not run" if row["check_seconds"] is None else f"{row['check_seconds']:.1f}"
    return (
        f"| {name} | {row['parameters'] / 1e6:.1f} | {row['groups']} | {100 * row['coverage']:.2f} | {row['error']:.0e} | "
        f"{row['control']:.0e} | {row['spec_seconds']:.2f} | {row['spec_over_export']:.2f} | {check} |"
    )


def _notes(models):
    skipped = [name for name, row in models.items() if row.get("check_seconds", 0) is None]
    reasons = Counter(reason for row in models.values() for reason in row.get("fixed", []))
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    lines = [f"Why axes are fixed, with the number of models in which it is a reason: {listed}.\n"]
    if skipped:
        lines.append(
            f"Check not run on {', '.join(skipped)}: it holds up to ten times the weights, more than the machine had free. The error "
            "beside it is measured all the same.\n"
        )
    return lines


def _peers(found):
    peers = found["protocol"]["peers"]
    lines = [
        f"| model | lit-rebasin: error, coverage % | {' | '.join(peers.values())} |",
        f"|---|---|{'---|' * len(peers)}",
    ]
    names = [name for name in found["models"] if any(name in rows for rows in found["peers"].values())]
    for name in sorted(names):
        ours = found["models"][name]
        cells = [f"{ours['error']:.0e}, {100 * ours['coverage']:.1f}" if "error" in ours else ours["failure"]]
        cells += [_peer_cell(found["peers"].get(peer, {}).get(name)) for peer in peers]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *(_count(title, found["peers"].get(peer, {})) for peer, title in peers.items())]


def _verdict(row):
    if row is None:
        return "not run"
    if "failure" in row:
        return "no result"
    if row["error"] <= 1e-3:
        return "same function"
    again = row.get("error_with_batch_statistics")
    return "same with batch statistics only" if again is not None and again <= 1e-3 else "another function"


def _peer_cell(row):
    verdict = _verdict(row)
    if verdict == "not run":
        return verdict
    if verdict == "no result":
        return f"{verdict}: {row['failure']}".replace("|", "/")
    return f"{verdict} ({row['error']:.0e}), {100 * row['coverage']:.1f} %, {row['seconds']:.1f} s of CPU"


def _count(title, rows):
    verdicts = [_verdict(row) for row in rows.values()]
    kinds = ("same function", "same with batch statistics only", "another function", "no result")
    return f"* {title}: " + ", ".join(f"{kind} {verdicts.count(kind)}" for kind in kinds) + f", of {len(rows)}."
