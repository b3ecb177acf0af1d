"""One short function per operator, or family of operators: how permutations pass through it."""

from lit_rebasin.symmetry.rules import arithmetic, norms, products, recurrent, shapes

__all__ = ["arithmetic", "norms", "products", "recurrent", "shapes"]
