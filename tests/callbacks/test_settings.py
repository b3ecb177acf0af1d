"""Wrong arguments are refused at construction."""

import pytest

from lit_rebasin import RebasinMerge


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"alpha": -0.1}, r"alpha .* must lie in \[0, 1\]"),
        ({"alpha": 1.5}, r"alpha .* must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, r"alpha .* must lie in \[0, 1\]"),
        ({"alpha": "best"}, "line-search"),
        ({"alpha": True}, "must lie in .*, got True"),
        ({"margin": True}, "margin must be a number of at least 0, got True"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"alpha": "best"}, "line-search, fisher, layer-fisher, got 'best'"),
        ({"method": "hungarian"}, "method must be one of identity, weights, covariance"),
        ({"method": "sinkhorn", "cost": "l3"}, "cost must be one of"),
        ({"method": "weights", "cost": "l2"}, "method 'weights' takes no cost"),
        ({"alpha": None}, "alpha must be a number in"),
        ({"batches": "3"}, "batches must be a whole number"),
        ({"batches": 1.5}, "batches must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"options": {"normalize": "no"}}, "'normalize' of method 'weights' must be True or False"),
        ({"method": "identity", "init": "weights"}, "starts nowhere; leave init out"),
        ({"init": {"0": [1]}}, "init must be one of"),
        ({"method": "sinkhorn", "options": {"schedule": "cosine"}}, "schedule must be a Schedule"),
        ({"init": "random"}, "init must be one of identity, weights"),
        ({"statistics": "batch"}, "statistics must be one of reestimate, repair"),
        ({"batches": 0}, "batches must be a whole number of at least 1"),
        ({"options": {"steps": 3}}, "method 'weights' has no option 'steps'; it has normalize, restarts"),
        ({"method": "sinkhorn", "options": {"steps": -1}}, "steps must be a whole number of at least 0"),
        ({"method": "sinkhorn", "options": {"learning_rate": -1.0}}, "learning_rate, residual_learning_rate and"),
        (
            {"method": "sinkhorn", "options": {"learning_rate": "fast"}},
            "'learning_rate' of method 'sinkhorn' must be a number, got 'fast'",
        ),
        ({"method": "sinkhorn", "options": {"residual_learning_rate": -1.0}}, "residual_learning_rate"),
        ({"method": "sinkhorn", "cost": "l2", "options": {"residual_clip": 1.0}}, "has no option 'residual_clip'"),
        ({"method": "sinkhorn", "options": {"schedule": {"kapa": 1}}}, "unexpected keyword argument 'kapa'"),
        ({"method": "straight-through", "options": {"learning_rate": 0.0}}, "learning_rate must be above 0"),
        ({"method": "covariance", "options": {"power": 2.0}}, "power must lie between 0 and 1"),
        ({"options": [1]}, r"options must be a mapping of what the method takes, got \[1\]"),
        ({"method": "frank-wolfe", "options": {"max_steps": -1}}, "max_steps must be a whole number"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        RebasinMerge(**arguments)
