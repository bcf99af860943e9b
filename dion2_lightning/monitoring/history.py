"""The history of a run's metrics, small enough to keep in a checkpoint. plots.py draws it.

It holds the metrics of every step with metrics, and how often each part of each parameter was selected between two
such steps. Its file is JSON.
"""

import base64
import ctypes
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dion2_lightning.monitoring.metrics import MEANINGS, ParameterInfo, SelectionMetrics

BINS: Final = 64
"""The slices of a parameter are counted in this many bins."""

MAX_POINTS: Final = 256
"""Steps that are kept; beyond it, two neighbours are merged."""

FORMAT: Final = "dion2 selection history"
VERSION: Final = 1


class SelectionHistory:
    """The metrics of a run, and how often each part of each parameter was selected.

    Args:
        window: Steps that ``coverage`` looks back (default: 100).

    Attributes:
        window: The same.
        steps: The steps with metrics; at most ``MAX_POINTS`` of them, spread evenly over the run.
        overall: The metrics of all matrices at each of these steps, by name.
        groups: The same by group.
        parameters: The same by parameter, in the order of ``infos``, to six digits.
        infos: The parameters.
        counts: How often slices were selected until the last step: ``BINS`` of each parameter's slices, from the least
            to the most selected; of a stack the sum over its matrices, each sorted by itself; float64
            (parameters, bins).
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.steps: list[int] = []
        self.overall: list[dict[str, float]] = []
        self.groups: list[dict[str, dict[str, float]]] = []
        self.parameters: list[list[dict[str, float]]] = []
        self.infos: list[ParameterInfo] = []
        self._shares: list[Tensor] = []
        self.counts = torch.zeros((0, BINS), dtype=torch.float64)
        self._hits = torch.zeros((0, BINS), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def shares(self) -> Tensor:
        """How often each bin was selected in the interval that ends at each step, uint8 (steps, parameters, bins).

        255 means in every step of the interval.
        """
        return torch.stack(self._shares) if self._shares else torch.zeros((0, 0, BINS), dtype=torch.uint8)

    def append(self, metrics: SelectionMetrics, infos: Sequence[ParameterInfo], hits: Tensor, counts: Tensor) -> None:
        """Add a step.

        Args:
            metrics: Of the step.
            infos: The parameters; some may have come or gone since the last step.
            hits: How often the slices of each bin were selected since the start, (parameters, bins).
            counts: How often slices were selected since the start, sorted; see the attribute.
        """
        self._set_infos(infos)
        steps = metrics.step - (self.steps[-1] if self.steps else 0)
        sizes = torch.stack([_bin_sizes(info.slices) * info.matrices for info in infos])
        shares = ((hits - self._hits) / (sizes * steps).clamp(min=1)).clamp(0, 1)
        shown = torch.stack([_shown_bins(info.slices) for info in infos])
        self._shares.append(shares.gather(1, shown).mul(255).round().to(torch.uint8))
        self.steps.append(metrics.step)
        self.overall.append(dict(metrics.overall))
        self.groups.append({name: dict(each) for name, each in metrics.groups.items()})
        # Six digits are enough for pictures and tables, and halve files and checkpoints.
        values = [metrics.parameters[info.key] for info in infos]
        self.parameters.append([{name: float(f"{value:.6g}") for name, value in each.items()} for each in values])
        # They come in float32 from a device without float64.
        self.counts, self._hits = (each.to(torch.float64, copy=True) for each in (counts, hits))
        self.thin_out(MAX_POINTS)

    def thin_out(self, points: int) -> None:
        """Keep at most this many steps, about evenly spread: merge the two shortest neighbouring intervals at a time.

        The metrics of the later step stay; shares are averaged.
        """
        while len(self.steps) > points:
            lengths = [stop - start for start, stop in itertools.pairwise([0, *self.steps])]
            first = min(range(len(lengths) - 1), key=lambda i: lengths[i] + lengths[i + 1])
            selected = [self._shares[i].double() * lengths[i] for i in (first, first + 1)]
            share = (selected[0] + selected[1]) / (lengths[first] + lengths[first + 1])
            self._shares[first + 1] = share.round().to(torch.uint8)
            for values in (self.steps, self.overall, self.groups, self.parameters, self._shares):
                del values[first]

    def part(self, is_in: Callable[[ParameterInfo], bool]) -> "SelectionHistory":
        """Return the history of some of the parameters; the metrics of groups and of all matrices stay what they are.

        Args:
            is_in: Whether a parameter is one of them.
        """
        members = [member for member, info in enumerate(self.infos) if is_in(info)]
        groups = {self.infos[member].group for member in members}
        part = SelectionHistory()
        part.load_state_dict(
            {
                **self.state_dict(),
                "groups": [{name: each for name, each in point.items() if name in groups} for point in self.groups],
                "parameters": [[point[member] for member in members] for point in self.parameters],
                "kinds": [self.infos[member] for member in members],
                "shares": [each[members] for each in self._shares],
                "counts": self.counts[members],
                "hits": self._hits[members],
            }
        )
        return part

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **to_plain(self.state_dict())}, allow_nan=False)
        # A run that is killed while writing leaves the previous file whole.
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "SelectionHistory":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The file holds something else; the message says what.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path} is no JSON file, or not all of it: {error}") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"{path} is no file of selection statistics; SelectionHistory.save writes such files")
        if saved.get("version") != VERSION:
            raise ValueError(f"{path} is of version {saved.get('version')!r}, this release reads version {VERSION}")
        history = cls()
        try:
            history.load_state_dict(from_plain(saved))
            history._check()
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); take another copy of it") from error
        return history

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain data and tensors."""
        return {
            "window": self.window,
            "steps": list(self.steps),
            "overall": [dict(each) for each in self.overall],
            "groups": [{name: dict(each) for name, each in point.items()} for point in self.groups],
            "parameters": [[dict(each) for each in point] for point in self.parameters],
            "kinds": [list(info) for info in self.infos],
            "shares": self.shares,
            "counts": self.counts.clone(),
            "hits": self._hits.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.window = state_dict["window"]
        for name in ("steps", "overall", "groups", "parameters"):
            setattr(self, name, list(state_dict[name]))
        self.infos = [ParameterInfo(*info) for info in state_dict["kinds"]]
        self._shares = [each.clone() for each in state_dict["shares"]]
        self.counts, self._hits = state_dict["counts"].clone(), state_dict["hits"].clone()

    def _check(self) -> None:
        """Raise an error where a file holds what no run leaves, or its parts do not fit together."""
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window is {self.window!r}")
        if self.steps != sorted({int(step) for step in self.steps if step > 0}):
            raise ValueError("steps do not count up from 1 or later")
        if any(info.axis not in (0, 1) or info.slices < 1 or info.matrices < 1 for info in self.infos):
            raise ValueError("a kind has an axis other than 0 and 1, or no slices or matrices")
        points = {name: len(getattr(self, name)) for name in ("steps", "overall", "groups", "parameters", "_shares")}
        if len(set(points.values())) > 1:
            raise ValueError("numbers of points differ: " + ", ".join(f"{name} {n}" for name, n in points.items()))
        if any(len(point) != len(self.infos) for point in self.parameters):
            raise ValueError(f"parameters and kinds differ in number, {len(self.infos)} kinds")
        for name, tensors in {"shares": self._shares, "counts": [self.counts], "hits": [self._hits]}.items():
            if any(each.shape != (len(self.infos), BINS) for each in tensors):
                raise ValueError(f"{name} has another shape than {len(self.infos)} kinds of {BINS} bins")
        of_groups = [metrics for point in self.groups for metrics in point.values()]
        of_parameters = [metrics for point in self.parameters for metrics in point if metrics]  # {} before it came
        for metrics in (*self.overall, *of_groups, *of_parameters):
            if unknown := metrics.keys() - MEANINGS.keys():
                raise ValueError(f"there is no metric {min(unknown)!r}")
            if "coverage" in metrics and "selected_fraction" not in metrics:
                raise ValueError(f"selected_fraction is missing beside {sorted(metrics)}")

    def _set_infos(self, infos: Sequence[ParameterInfo]) -> None:
        """Bring everything into the order of these parameters; a new one was never selected before."""
        if self.infos == list(infos):
            return
        # Not by what a step selects: a changed fraction leaves slices and counts what they are.
        known = {(info.key, info.matrices, info.slices, info.axis): place for place, info in enumerate(self.infos)}
        index = torch.tensor(
            [known.get((info.key, info.matrices, info.slices, info.axis), len(self.infos)) for info in infos],
            dtype=torch.int64,
        )
        self._shares = [torch.cat([each, each.new_zeros((1, BINS))])[index] for each in self._shares]
        self._hits = torch.cat([self._hits, self._hits.new_zeros((1, BINS))])[index]
        self.parameters = [[(*point, {})[position] for position in index.tolist()] for point in self.parameters]
        self.infos = list(infos)


def bin_of(slices: int, device: torch.device | None = None) -> Tensor:
    """Return the bin that each slice falls into."""
    return torch.arange(slices, device=device) * BINS // slices


@cache
def _bin_sizes(slices: int) -> Tensor:
    """Return how many slices fall into each bin."""
    return torch.bincount(bin_of(slices), minlength=BINS)


@cache
def _shown_bins(slices: int) -> Tensor:
    """Return which bin is shown for each: with fewer slices than bins, those between two slices show the one before."""
    return bin_of(slices)[torch.arange(BINS) * slices // BINS]


def to_plain(value: Any) -> Any:
    """Return a state dict as data for JSON, which has no tensors and no NaN."""
    if isinstance(value, Tensor):
        stored = value.cpu().contiguous()
        # Tensor.numpy() would need NumPy, which torch comes without.
        raw = base64.b64encode(ctypes.string_at(stored.data_ptr(), stored.nbytes)).decode()
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "base64": raw}
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(value: Any) -> Any:
    """Return the state dict that :func:`to_plain` was given."""
    if isinstance(value, dict) and "base64" in value:
        dtype, raw = getattr(torch, value["dtype"]), bytearray(base64.b64decode(value["base64"]))
        return (torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(0, dtype=dtype)).view(value["shape"])
    if isinstance(value, dict):
        return {key: from_plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [from_plain(each) for each in value]
    return math.nan if value is None else value
