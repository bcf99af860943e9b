"""The sections of the check, in the order they are run: what has to be right first, then what is measured."""

from typing import Final

from benchmarks.gpu.section import Section

SECTIONS: Final = (
    Section("machine", "What the machine can do", "benchmarks.gpu.machine:measure", minutes=0.5),
    Section("correct", "Correct on the device", "benchmarks.gpu.correct:run_tests", minutes=2.5, needs=("pytest",)),
)
