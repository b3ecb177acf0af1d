from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "rotated_digits.yaml")
SMALL = [
    "--data.n_tasks",
    "2",
    "--data.epochs_per_task",
    "1",
    "--data.batch_size",
    "200",
    "--trainer.log_every_n_steps",
    "1",
]

# What a report is made of.
METHODS = ["finetune", "no-merge", "average", "rebasin"]
STREAM = [*SMALL, "--data.n_tasks", "3", "--merge.start", "fresh"]
