"""How high is the barrier between independently trained networks after each way of aligning them, and what does it cost?

Three parts, each with a page and a figure in docs/results: MNIST networks of several widths (`widths`), convolutional networks on CIFAR-100
with and without statistics of the merge's own (`cifar`), and Ferbach et al.'s experiment over learning rates (`rates`). Run:

    python benchmarks/linear_mode_connectivity.py --data_dir DIR --cifar FILE.npz --peer sinkhorn=FOLDER --peer snimu=FOLDER

The peers' folders are made as peers.md says; one that is not named is left out. FILE.npz holds x_train, y_train, x_test, y_test.
"""

import argparse
from pathlib import Path

import connectivity_cifar
import connectivity_rates
import connectivity_widths
import torch
from cifar_networks import NETWORKS

PARTS = {"widths": connectivity_widths.run, "cifar": connectivity_cifar.run, "rates": connectivity_rates.run}
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run")
    parser.add_argument("--data_dir", help="folder with torchvision's MNIST, for widths and rates")
    parser.add_argument("--cifar", help="file with the arrays of CIFAR-100, for cifar")
    parser.add_argument("--networks", type=Path, help="folder where trained CIFAR networks are kept and looked for")
    parser.add_argument(
        "--kinds", default=";".join(NETWORKS), help="which CIFAR networks are run; results of others stay"
    )
    parser.add_argument("--peer", action="append", default=[], help="sinkhorn=FOLDER or snimu=FOLDER")
    parser.add_argument("--widths", default="128,512", help="widths at which every method is run")
    parser.add_argument("--figure_widths", default="32,64,256,1024", help="more widths for the figure")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    options.peers = dict(peer.split("=", 1) for peer in options.peer)
    torch.set_num_threads(1)
    for part in options.parts.split(","):
        PARTS[part](options)


if __name__ == "__main__":
    main()
