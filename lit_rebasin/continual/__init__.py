"""Streams of tasks for Lightning."""

from lit_rebasin.continual.classifier import ContinualClassifier
from lit_rebasin.continual.datamodule import ContinualDataModule

__all__ = ["ContinualClassifier", "ContinualDataModule"]
