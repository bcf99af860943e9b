"""`python -m recipes.text_classification --help`."""

import sys

from jsonargparse import auto_cli

from recipes.inputs import InputError
from recipes.text_classification.settings import Settings

COMMAND = "python -m recipes.text_classification"


def main(arguments: list[str] | None = None) -> None:
    try:
        settings = auto_cli(Settings, args=arguments, prog=COMMAND)
        # Imported late: help and wrong arguments should not wait for torch.
        from recipes.text_classification.train import fine_tune

        fine_tune(settings)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
