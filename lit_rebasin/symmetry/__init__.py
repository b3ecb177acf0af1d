"""What may be permuted in a network."""

from lit_rebasin.symmetry.calls import spec_of_calls
from lit_rebasin.symmetry.features import FeatureReader, Features
from lit_rebasin.symmetry.invariance import Trial, check_invariance
from lit_rebasin.symmetry.join import join
from lit_rebasin.symmetry.keep import attributes_kept, contents_kept, use_batch_statistics
from lit_rebasin.symmetry.permute import compose, invert, neurons, permute
from lit_rebasin.symmetry.registry import rule
from lit_rebasin.symmetry.spec import Axis, Group, PermutationSpec
from lit_rebasin.symmetry.tracing import permutation_spec

__all__ = [
    "Axis",
    "FeatureReader",
    "Features",
    "Group",
    "PermutationSpec",
    "Trial",
    "attributes_kept",
    "check_invariance",
    "compose",
    "contents_kept",
    "invert",
    "join",
    "neurons",
    "permutation_spec",
    "permute",
    "rule",
    "spec_of_calls",
    "use_batch_statistics",
]
