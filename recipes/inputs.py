"""What the recipes do with arguments that cannot work: one kind of error, printed without a traceback."""

from typing import Any


class InputError(ValueError):
    """The user asked for something that cannot be done; the message names the argument and the fix."""


def check_positive(settings: Any, *names: str) -> None:
    """Refuses counts below one.

    Args:
        settings: A dataclass of arguments.
        names: Its attributes that are counts.

    Raises:
        InputError: If one is below 1.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"--{name} has to be 1 or more, got {getattr(settings, name)}.")
