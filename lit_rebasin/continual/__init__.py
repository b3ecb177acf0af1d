"""Streams of tasks for Lightning."""

from lit_rebasin.continual.classifier import ContinualClassifier
from lit_rebasin.continual.datamodule import ContinualDataModule
from lit_rebasin.continual.rebasin_il import RebasinIL

__all__ = ["ContinualClassifier", "ContinualDataModule", "RebasinIL"]
