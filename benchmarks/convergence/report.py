"""Tables and pictures of the runs, made from the records alone.

    python -m benchmarks.convergence.report

writes them into benchmarks/results/README.md, and the tables of README.md and docs/fine-tuning.md; with --full it
prints those of the runs at full size instead.
"""

import argparse
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from benchmarks.convergence.methods import Candidate, Method
from benchmarks.convergence.search import SEARCH_SEED, TIMING, last_loss, read_records, time_ratios
from benchmarks.convergence.tasks import FULL, SMALL, Task
from benchmarks.convergence.training import Record

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "AdamW"
BEGIN, END = "<!-- {name}: written by benchmarks.convergence -->", "<!-- {name}: end -->"


@dataclass(frozen=True)
class Outcome:
    """The runs of one method with the same settings, over the seeds.

    Attributes:
        method: What was run.
        candidate: Its settings.
        steps: Of a run.
        records: One a seed.
        time_ratio: Time of its training step over the baseline's, measured in turn; None if it was not.
        is_best: Whether these are all of the task's steps with the lowest mean loss of what the method ran over all
            seeds; other rows show another momentum, or another number of steps.
    """

    method: Method
    candidate: Candidate
    steps: int
    records: tuple[Record, ...]
    time_ratio: float | None
    is_best: bool

    def last(self, measure: str) -> list[float]:
        """Returns a measure at the end of each run, in the order of the seeds."""
        return [_known(record["curve"][-1][measure]) for record in self.records]

    def curve(self) -> list[tuple[int, float]]:
        """Returns the mean held-out loss over the seeds, by step."""
        points = zip(*(record["curve"] for record in self.records), strict=True)
        return [(each[0]["step"], statistics.fmean(_known(point["loss"]) for point in each)) for each in points]

    def steps_to(self, loss: float) -> float | None:
        """Returns the step at which the mean curve reaches a loss, between two measured ones by a straight line."""
        before: tuple[int, float] | None = None
        for step, value in self.curve():
            if value <= loss:
                if before is None:
                    return step
                share = (before[1] - loss) / (before[1] - value)
                return before[0] + share * (step - before[0])
            before = step, value
        return None


def main() -> None:
    """Writes tables and pictures of all tasks that have been run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence.report", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the runs at full size, on the terminal")
    full = parser.parse_args().full
    studies = read_studies(RESULTS, full)
    if full:
        for name, (task, records) in studies.items():
            draw(task, records, RESULTS / f"{name}-full.png")
            print(f"{section(f'{name}-full', task, records)}\n")
        return
    page = RESULTS / "README.md"
    for name, (task, records) in studies.items():
        draw(task, records, RESULTS / f"{name}.png")
        replace_block(page, name, section(name, task, records))
    replace_block(ROOT / "README.md", "convergence", summary(compared(studies)))
    replace_block(ROOT / "docs" / "fine-tuning.md", "fused", table(*studies["fused"]))


def read_studies(folder: Path, full: bool = False) -> dict[str, tuple[Task, list[Record]]]:
    """Returns the tasks that have been run at a size, with their records; only those whose steps have been timed."""
    tasks, end = (FULL, "-full") if full else (SMALL, "")
    studies = {name: (task, read_records(folder / f"{name}{end}.jsonl")) for name, task in tasks.items()}
    return {name: study for name, study in studies.items() if time_ratios(study[1])}


def compared(studies: dict[str, tuple[Task, list[Record]]]) -> dict[str, tuple[Task, list[Record]]]:
    """Returns the tasks that compare methods: all but the one that compares ways to split a weight."""
    return {name: study for name, study in studies.items() if name != "fused"}


def section(name: str, task: Task, records: list[Record]) -> str:
    """Returns the Markdown of a task: how it was run, the picture, the table, and every candidate of the search."""
    counted = [record for record in records if record["method"] != TIMING]
    dates = sorted({record["date"] for record in records})
    machines = {f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] > 1)}, torch {r['torch']}" for r in records}
    call = name.replace("-full", " --full")
    runs = f"{len(counted)} runs, {sum(record['seconds'] for record in counted) / 60:.0f} minutes of training"
    return "\n".join(
        [
            f"`python -m benchmarks.convergence {call}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
            f"{'; '.join(sorted(machines))}; {runs}.\n",
            f"![Held-out loss against steps and against time]({name}.png)\n",
            table(task, records),
            "\n<details><summary>Every candidate of the search</summary>\n",
            search_table(task, records),
            "\n</details>",
        ]
    )


def outcomes(task: Task, records: list[Record]) -> list[Outcome]:
    """Returns the outcomes of a task in the order of its methods, the best settings of each first."""
    ratios = time_ratios(records)
    found = []
    for method in task.methods:
        runs = [r for r in records if r["method"] == method.name and r["seed"] != SEARCH_SEED]
        kinds: dict[tuple[Candidate, int], list[Record]] = {}
        for run in sorted(runs, key=lambda run: int(run["seed"])):
            kinds.setdefault((_candidate(run), run["steps"]), []).append(run)
        ratio = ratios.get(method.name)
        own = [Outcome(method, *kind, tuple(kind_runs), ratio, is_best=False) for kind, kind_runs in kinds.items()]
        whole = [each for each in own if each.steps == task.steps]
        seeds = max((len(each.records) for each in whole), default=0)
        # The best in the search, by one seed, need not be the best over all seeds.
        best = min(
            (each for each in whole if len(each.records) == seeds),
            key=lambda each: statistics.fmean(each.last("loss")),
            default=None,
        )
        found += [replace(best, is_best=True)] if best is not None else []
        found += [each for each in own if each is not best]
    return found


def table(task: Task, records: list[Record]) -> str:
    """Returns the Markdown table of the final runs."""
    rows = outcomes(task, records)
    measures = [name for name in rows[0].records[0]["curve"][-1] if name != "step"]
    target = best_loss(rows)
    heads = ["", "lr", "adamw_lr", "momentum", *(f"held-out {name}" for name in measures)]
    heads += [f"steps to {BASELINE}'s best loss", "time of a step", "time to that loss"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        name = row.method.name if row.steps == task.steps else f"{row.method.name}, {row.steps} steps"
        cells = [name, f"{row.candidate.lr:g}", _adamw_lr(row.method, row.candidate.adamw_lr), _momentum(row)]
        cells += [_seeds(row.last(name), percent=name == "accuracy") for name in measures]
        cells += _cost(row, target, task)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def search_table(task: Task, records: list[Record]) -> str:
    """Returns the Markdown table of every candidate that the search ran."""
    lines = ["| | momentum | lr | adamw_lr | held-out loss |", "|---|---|---|---|---|"]
    methods = {method.name: method for method in task.methods}
    for record in records:
        if record.get("seed") == SEARCH_SEED:
            adamw_lr = _adamw_lr(methods[record["method"]], record["adamw_lr"])
            cells = [record["method"], record["momentum"], f"{record['lr']:g}", adamw_lr, f"{last_loss(record):.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_loss(rows: list[Outcome]) -> float:
    """Returns the lowest mean held-out loss that the baseline's best settings reach."""
    [baseline] = [row for row in rows if row.method.name == BASELINE and row.is_best]
    return min(loss for _, loss in baseline.curve())


def draw(task: Task, records: list[Record], file: Path) -> None:
    """Draws the held-out loss against steps and against time, in units of the baseline's run."""
    rows = [row for row in outcomes(task, records) if row.is_best]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for row, color in zip(rows, plt.get_cmap("tab20").colors, strict=False):  # type: ignore[attr-defined]
        steps = [point["step"] for point in row.records[0]["curve"]]
        losses = [[_known(point["loss"]) for point in record["curve"]] for record in row.records]
        mean = [statistics.fmean(each) for each in zip(*losses, strict=True)]
        for axis, scale in zip(axes, (1.0, (row.time_ratio or float("nan")) / task.steps), strict=True):
            axis.plot([step * scale for step in steps], mean, color=color, label=row.method.name)
            low, high = ([pick(each) for each in zip(*losses, strict=True)] for pick in (min, max))
            axis.fill_between([step * scale for step in steps], low, high, color=color, alpha=0.2, lw=0)
    for axis in axes:
        axis.axhline(best_loss(rows), color="grey", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="step", ylabel="held-out loss", ylim=_view(rows))
    axes[1].set(xlabel=f"time, in runs of {BASELINE}")
    columns = min(6, 110 // max(len(row.method.name) for row in rows))  # as many as the width holds
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{task.title} (mean of {len(rows[0].records)} seeds, from lowest to highest)", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)


def summary(tasks: dict[str, tuple[Task, list[Record]]]) -> str:
    """Returns the Markdown table for README: every task, the best settings of every method."""
    lines = [
        f"| | | held-out loss | accuracy | steps to {BASELINE}'s best loss | time to it |",
        "|---|---|---|---|---|---|",
    ]
    for task, records in tasks.values():
        rows = [row for row in outcomes(task, records) if row.is_best]
        target = best_loss(rows)
        for row in rows:
            steps, _, total = _cost(row, target, task)
            right = _spread(row.last("accuracy"), percent=True) if "accuracy" in row.records[0]["curve"][-1] else ""
            title = task.title if row is rows[0] else ""
            cells = [title, row.method.name, _spread(row.last("loss")), right, steps, total]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_block(file: Path, name: str, text: str) -> None:
    """Puts text between the two marks of a name in a file.

    Raises:
        ValueError: If the marks are not there.
    """
    begin, end = BEGIN.format(name=name), END.format(name=name)
    content = file.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{file} has to hold the lines {begin!r} and {end!r} once")
    head, rest = content.split(begin)
    _, tail = rest.split(end)
    file.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def _candidate(record: Record) -> Candidate:
    return Candidate(record["lr"], record["adamw_lr"], record["momentum"])


def _momentum(row: Outcome) -> str:
    rule, value = row.candidate.momentum, row.method.momenta[row.candidate.momentum]
    if row.method.algorithm == "adamw":
        return f"beta1 {rule}"
    return rule if "^" not in rule else f"{rule} = {value:.2f}"


def _adamw_lr(method: Method, rate: float) -> str:
    return f"{rate:g}" if method.has_rest else "-"


def _seeds(values: list[float], percent: bool = False) -> str:
    return f"{_spread(values, percent)} ({', '.join(_number(value, percent) for value in values)})"


def _known(value: float | None) -> float:
    """What is not finite is recorded as None."""
    return math.inf if value is None else float(value)


def _spread(values: list[float], percent: bool = False) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = _number(statistics.fmean(values), percent)
    return f"{mean} ± {_number(statistics.stdev(values), percent)}" if len(values) > 1 else mean


def _number(value: float, percent: bool) -> str:
    if not math.isfinite(value):
        return "diverged"
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _cost(row: Outcome, target: float, task: Task) -> list[str]:
    ratio = "" if row.time_ratio is None else f"{row.time_ratio:.2f}"
    steps = row.steps_to(target)
    if steps is None:
        return ["not reached", ratio, ""]
    share = steps / task.steps
    return [f"{share:.0%}", ratio, "" if row.time_ratio is None else f"{share * row.time_ratio:.0%}"]


def _view(rows: list[Outcome]) -> tuple[float, float]:
    """The lower part of the curves, where the methods differ."""
    curves = [[loss for _, loss in row.curve()] for row in rows]
    ends = [curve[-1] for curve in curves if math.isfinite(curve[-1])]
    middles = [curve[len(curve) // 4] for curve in curves if math.isfinite(curve[len(curve) // 4])]
    return min(ends) - 0.05 * (max(middles) - min(ends)), max(middles)


if __name__ == "__main__":
    main()
