"""What the command says when it is used wrongly."""


class UsageError(ValueError):
    """A wrong word on the command line or in the YAML file."""
