"""What a user adds to a Trainer."""

from lit_rebasin.callbacks.continual_monitor import ContinualMonitor
from lit_rebasin.callbacks.mode_connectivity import ModeConnectivity
from lit_rebasin.callbacks.rebasin_merge import RebasinMerge

__all__ = ["ContinualMonitor", "ModeConnectivity", "RebasinMerge"]
