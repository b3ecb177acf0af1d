"""Choose alpha, the weight of the previous model in a merge."""

from lit_rebasin.merging.path import PathLosses


def line_search(losses: PathLosses) -> float:
    """Return the alpha with the lowest loss along a path; the largest of equals, which keeps most of the previous model.

    Raises:
        ValueError: If a loss is NaN.
    """
    if losses.losses.isnan().any():
        raise ValueError("A loss along the path is NaN, so no alpha can be chosen by line search.")
    lowest = (losses.losses == losses.losses.min()).nonzero()[-1]
    return float(losses.alphas[lowest])
