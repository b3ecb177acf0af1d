"""Streams of tasks for Lightning."""

from lit_rebasin.continual.backbones import slim_resnet18
from lit_rebasin.continual.checkpoint_io import WholeCheckpointIO
from lit_rebasin.continual.classifier import ContinualClassifier
from lit_rebasin.continual.datamodule import ContinualDataModule
from lit_rebasin.continual.rebasin_il import RebasinIL
from lit_rebasin.continual.transforms import RandomShift

__all__ = [
    "ContinualClassifier",
    "ContinualDataModule",
    "RandomShift",
    "RebasinIL",
    "WholeCheckpointIO",
    "slim_resnet18",
]
