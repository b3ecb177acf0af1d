"""What a user adds to a Trainer."""

from lit_rebasin.callbacks.connectivity_monitor import ConnectivityMonitor
from lit_rebasin.callbacks.continual_monitor import ContinualMonitor
from lit_rebasin.callbacks.feature_learning_monitor import FeatureLearningMonitor
from lit_rebasin.callbacks.geodesic_monitor import GeodesicMonitor
from lit_rebasin.callbacks.mode_connectivity import ModeConnectivity
from lit_rebasin.callbacks.random_states import RandomStates
from lit_rebasin.callbacks.rebasin_merge import RebasinMerge
from lit_rebasin.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = [
    "ConnectivityMonitor",
    "ContinualMonitor",
    "FeatureLearningMonitor",
    "GeodesicMonitor",
    "ModeConnectivity",
    "RandomStates",
    "RebasinMerge",
    "SharpnessMonitor",
]
