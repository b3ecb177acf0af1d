"""Streams of tasks for Lightning."""

from lit_rebasin.continual.classifier import ContinualClassifier

__all__ = ["ContinualClassifier"]
