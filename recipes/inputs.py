"""What the recipes do with arguments that cannot work: one kind of error, printed without a traceback."""

from typing import Any, TypeVar

from jsonargparse import auto_cli

Settings = TypeVar("Settings")


class InputError(ValueError):
    """The user asked for something that cannot be done; the message names the argument and the fix."""


def read_settings(kind: type[Settings], arguments: list[str] | None = None, **options: Any) -> Settings:
    """Reads a dataclass of arguments from the command line.

    Args:
        kind: The dataclass; one of its arguments may be `optimizer`, whose settings check themselves.
        arguments: In the place of the command line's (default: None).
        options: More for jsonargparse's `auto_cli`.

    Raises:
        InputError: If a value cannot be; what is no argument at all ends the program with its usage.
    """
    try:
        settings: Settings = auto_cli(kind, args=arguments, **options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer.{error}") from error
    return settings


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


def check_below_one(settings: Any, *names: str) -> None:
    """Refuses shares and betas that are not from 0 to below 1.

    Args:
        settings: A dataclass of arguments.
        names: Its attributes that have to be.

    Raises:
        InputError: If one is not.
    """
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f"--{name} has to be from 0 to below 1, got {getattr(settings, name)}.")
