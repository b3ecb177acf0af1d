"""What a user adds to an Avalanche strategy."""

from lit_rebasin.plugins.rebasin_plugin import RebasinPlugin

__all__ = ["RebasinPlugin"]
