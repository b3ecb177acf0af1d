"""Is one network merged from five better than the five? MNIST MLPs, by every method of `merge_many`, with and without statistics of its own.

Writes docs/results/merging_many.md. Run: python benchmarks/merging_many.py --data_dir DIR
"""

import argparse
import copy
from pathlib import Path

import torch
from connectivity_methods import mlp
from connectivity_widths import BATCH, EPOCHS, images, trained
from torch.nn.functional import cross_entropy

from lit_rebasin import merge_many, permutation_spec, permute, repair_many

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "merging_many.md"
# Seeds that nothing was chosen on.
SEEDS, WIDTH, SHOWN = (20, 21, 22, 23, 24), 512, 10_000
METHODS = ("as they are", "cycle-consistent", "merge-many", "barycenter")


def measured(model, inputs, targets):
    with torch.no_grad():
        outputs = model(inputs)
    return float(cross_entropy(outputs, targets)), 100 * float((outputs.argmax(1) == targets).float().mean())


def members_and_merge(models, spec, method):
    """Return the members in one frame, and their average."""
    if method == "as they are":
        members = [dict(model.state_dict()) for model in models]
        weights = {name: torch.stack([member[name] for member in members]).mean(0) for name in members[0]}
    else:
        found = merge_many(models, spec, method=method)
        members = [
            permute(model.state_dict(), spec, own) for model, own in zip(models, found.permutations, strict=True)
        ]
        weights = found.weights
    merged = mlp(WIDTH).eval()
    merged.load_state_dict(weights)
    return members, merged


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with torchvision's MNIST")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = images(options.data_dir, train=True), images(options.data_dir, train=False)
    models = [trained(WIDTH, seed, *train) for seed in SEEDS]
    ends = [measured(model, *test) for model in models]
    losses, accuracies = zip(*ends, strict=True)
    mean = sum(losses) / len(losses)
    spec = permutation_spec(models[0], train[0][:2])
    rows = [
        "| merge | statistics | test loss | test accuracy % |",
        "|---|---|---:|---:|",
        f"| mean of the five | | {mean:.4f} | {sum(accuracies) / len(accuracies):.2f} |",
        f"| best of the five | | {min(losses):.4f} | {max(accuracies):.2f} |",
    ]
    for method in METHODS:
        members, merged = members_and_merge(models, spec, method)
        for statistics in ("averaged", "RESCALE", "REPAIR"):
            network = copy.deepcopy(merged)
            if statistics != "averaged":
                repair_many(network, members, network, [train[0][:SHOWN]], mean=statistics == "REPAIR")
            loss, accuracy = measured(network, *test)
            shown = f"**{loss:.4f}**" if loss < mean else f"{loss:.4f}"
            rows.append(f"| {method} | {statistics} | {shown} | {accuracy:.2f} |")
            print(rows[-1], flush=True)
    about = (
        "# One network from five\n\n"
        f"MNIST, 784-{WIDTH}-{WIDTH}-{WIDTH}-10, {EPOCHS} epochs AdamW 1e-3, batch {BATCH}, seeds {', '.join(map(str, SEEDS))}, trained "
        f"independently; "
        f"the merge is their even average in one frame. REPAIR and RESCALE see {SHOWN:,} training images, without labels. Bold: below the "
        f"mean of the "
        "members' losses. Made by `python benchmarks/merging_many.py --data_dir DIR`.\n\n"
    )
    RESULTS.write_text(about + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
