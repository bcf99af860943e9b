"""AdamW, Muon and Dion2 next to each other, each tuned by the same rule, on real text.

    python -m benchmarks.convergence pretraining classification

Every run is appended to a file in --results as soon as it ends and never repeated, so an interrupted call resumes.
Several calls can train different tasks at once.
"""

import argparse
from pathlib import Path

import datasets
import torch
import transformers

from benchmarks.convergence.search import Study
from benchmarks.convergence.tasks import FULL, SMALL

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    """Makes the runs that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tasks", choices=SMALL, nargs="+", help="what to train")
    parser.add_argument("--methods", nargs="+", help='default: all; such as "AdamW" "Dion2 1/4"')
    parser.add_argument("--full", action="store_true", help="the size for one GPU instead of two cores of a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a file for each task")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="default: a CUDA GPU where there is one, else the CPU",
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in arguments.tasks:
        task = (FULL if arguments.full else SMALL)[name]
        file = arguments.results / f"{name}{'-full' if arguments.full else ''}.jsonl"
        try:
            Study(task, file, arguments.device).run(arguments.methods)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
