"""Choose alpha, the weight of the previous model in a merge."""

from lit_rebasin.merging.path import PathLosses


class NoFiniteLossError(ValueError):
    """Every loss along a path is NaN or infinite."""


def line_search(losses: PathLosses) -> float:
    """Return the alpha with the lowest loss along a path; the largest of equals, which keeps most of the previous model.

    Points whose loss is NaN or infinite are never chosen.

    Raises:
        NoFiniteLossError: If no loss is finite; a ValueError.
    """
    finite = losses.losses.isfinite()
    if not finite.any():
        raise NoFiniteLossError(
            "Every loss along the path is NaN or infinite, so no alpha can be chosen by line search."
        )
    lowest = (losses.losses == losses.losses[finite].min()).nonzero()[-1]
    return float(losses.alphas[lowest])
