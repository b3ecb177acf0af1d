"""The command ``lit-rebasin``."""

from lit_rebasin.cli.main import main

__all__ = ["main"]
