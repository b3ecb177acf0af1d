"""How fast is an epoch of fine-tuning through our data module, beside Avalanche's own loop on its own data set?

Both train the same MLP on one task of Rotated MNIST, batch by batch, on one thread; neither evaluates. Prints a table and writes
docs/results/data_throughput.md. Run:

    python benchmarks/data_throughput.py --data_dir DIR

DIR holds torchvision's MNIST, and may not be read-only, for Avalanche opens it with torchvision.
"""

import argparse
import logging
import warnings
from pathlib import Path
from statistics import median
from time import process_time

import lightning.pytorch as pl
import torch
from avalanche.benchmarks.classic import RotatedMNIST
from avalanche.models import SimpleMLP
from avalanche.training.supervised import Naive
from torch import nn

from lit_rebasin import ContinualClassifier, ContinualDataModule
from lit_rebasin.continual.baselines import run_baseline

ANGLE_TASKS = 20  # of which the second is trained: a rotation by 9.5 degrees
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def network():
    torch.manual_seed(0)
    return SimpleMLP(num_classes=10, input_size=784, hidden_size=256, drop_rate=0)


def ours(data_dir, batch_size, epochs):
    """A fit of our data module by Lightning, which turns all images once."""
    data = our_data(data_dir, batch_size, epochs)
    data.first_task = 1
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = ContinualClassifier(network())
    return lambda: trainer.fit(model, datamodule=data)


def our_data(data_dir, batch_size, epochs):
    options = {"n_tasks": ANGLE_TASKS, "epochs_per_task": epochs, "batch_size": batch_size}
    return ContinualDataModule("rotated-mnist", data_dir=data_dir, **options)


def our_baseline(data_dir, batch_size, epochs):
    """Avalanche's loop on our tensors, as the benchmark's baselines run; its task is the first, whose tensors are as large."""
    data = our_data(data_dir, batch_size, epochs)
    data.val_dataloader = list  # nothing is evaluated
    model = ContinualClassifier(network())
    return lambda: run_baseline("finetune", model, data, n_tasks=1)


def avalanches(data_dir, batch_size, epochs):
    """Avalanche's loop on its own benchmark, which turns every image whenever it is read."""
    benchmark = RotatedMNIST(2, rotations_list=[0, 180 / (ANGLE_TASKS - 1)], dataset_root=data_dir)
    model = network()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch_size,
        train_epochs=epochs,
        evaluator=None,
    )
    return lambda: strategy.train(benchmark.train_stream[1], eval_streams=[])


LOOPS = {"lit-rebasin": ours, "Avalanche on our tensors": our_baseline, "Avalanche on its own data": avalanches}


def measure(make, options, batch_size):
    """Return CPU seconds of a first epoch, with what is done once, and of one after it: several less one."""
    found = []
    for _ in range(options.turns):
        spent = []
        for epochs in (1, 1 + options.epochs):
            run = make(options.data_dir, batch_size, epochs)
            started = process_time()
            run()
            spent.append(process_time() - started)
        found.append((spent[0], (spent[1] - spent[0]) / options.epochs))
    return [median(column) for column in zip(*found, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--batch_sizes", default="10,500")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines = [
        "| batch | loop | CPU s, first epoch | times ours | CPU s, a later one | times ours |",
        "|---:|---|" + "---:|" * 4,
    ]
    for batch_size in map(int, options.batch_sizes.split(",")):
        base = []
        for name, make in LOOPS.items():
            found = measure(make, options, batch_size)
            base = base or found
            cells = [f"{spent:.2f} | {spent / own:.1f}" for spent, own in zip(found, base, strict=True)]
            lines.append(f"| {batch_size} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    text = (
        "# An epoch of fine-tuning\n\n"
        "One task of Rotated MNIST, 60,000 images, an MLP 784-256-10 with AdamW, one thread, no evaluation. The first epoch has what is done "
        f"once in a fit (our one rotation of all images). Medians of {options.turns} turns, CPU seconds.\n\n"
        f"Made by `python benchmarks/data_throughput.py --data_dir DIR --batch_sizes {options.batch_sizes}`.\n\n"
        + "\n".join(lines)
    )
    (RESULTS / "data_throughput.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
