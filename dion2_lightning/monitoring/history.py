"""The course of a run's selection, small enough to keep and to send around; what plots.py draws.

A file of it is JSON: the figures at every step that had some, and how often each part of each parameter was selected
from one such step to the next.
"""

import base64
import ctypes
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dion2_lightning.monitoring.metrics import MEANINGS, Figures, Kind

BINS: Final = 64
"""Slices of a parameter are counted in so many bins."""

MAX_POINTS: Final = 256
"""Points in time that are kept; with more, two neighbours become one."""

FORMAT: Final = "dion2 selection history"
VERSION: Final = 1


class SelectionHistory:
    """The figures of a run, and how often each part of each parameter was selected.

    Args:
        window: Steps that ``coverage`` looks back (default: 100).

    Attributes:
        window: The same.
        steps: At which steps there were figures; at most ``MAX_POINTS`` of them, evenly over the run.
        overall: At each of them the figures of all matrices, by name.
        groups: The same by group.
        parameters: The same by parameter, in the order of ``kinds``, to six digits.
        kinds: The parameters.
        counts: How often slices were selected until the last step: of each parameter ``BINS`` of them, from the least
            to the most; of a stack the sum over its matrices, each sorted by itself; float64 (parameters, bins).
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.steps: list[int] = []
        self.overall: list[dict[str, float]] = []
        self.groups: list[dict[str, dict[str, float]]] = []
        self.parameters: list[list[dict[str, float]]] = []
        self.kinds: list[Kind] = []
        self._shares: list[Tensor] = []
        self._sizes: Tensor | None = None
        self._shown: Tensor | None = None
        self.counts = torch.zeros((0, BINS), dtype=torch.float64)
        self._hits = torch.zeros((0, BINS), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def shares(self) -> Tensor:
        """How often each part was selected, uint8 (steps, parameters, bins).

        In the interval that ends at each step: the share of its steps in which the slices of each bin of each parameter
        were selected; 255 is all of them.
        """
        return torch.stack(self._shares) if self._shares else torch.zeros((0, 0, BINS), dtype=torch.uint8)

    def append(self, figures: Figures, kinds: Sequence[Kind], hits: Tensor, counts: Tensor) -> None:
        """Add what is known at a step.

        Args:
            figures: Of the step.
            kinds: The parameters; others than before may have come or gone.
            hits: How often the slices of each bin were selected since the start, (parameters, bins).
            counts: See the attribute.
        """
        self._take_over(kinds)
        assert self._sizes is not None
        assert self._shown is not None
        steps = figures.step - (self.steps[-1] if self.steps else 0)
        shares = ((hits - self._hits) / (self._sizes * steps).clamp(min=1)).clamp(0, 1)
        shares = shares.gather(1, self._shown).mul(255).round().to(torch.uint8)
        self.steps.append(figures.step)
        self.overall.append(dict(figures.overall))
        self.groups.append({name: dict(each) for name, each in figures.groups.items()})
        self.parameters.append([_in_six_digits(figures.parameters[kind.group, kind.name]) for kind in kinds])
        self._shares.append(shares)
        # They come in float32 from a device without float64.
        self.counts, self._hits = (each.to(torch.float64, copy=True) for each in (counts, hits))
        self.thin_out(MAX_POINTS)

    def thin_out(self, points: int) -> None:
        """Keep so many points at most: of neighbours that are closest together the later one's figures, shares of both.

        So points stay about evenly spread, however long the run.
        """
        while len(self.steps) > points:
            lengths = [stop - start for start, stop in itertools.pairwise([0, *self.steps])]
            first = min(range(len(lengths) - 1), key=lambda i: lengths[i] + lengths[i + 1])
            weighted = [self._shares[i].double() * lengths[i] for i in (first, first + 1)]
            both = (weighted[0] + weighted[1]) / (lengths[first] + lengths[first + 1])
            self._shares[first + 1] = both.round().to(torch.uint8)
            for values in (self.steps, self.overall, self.groups, self.parameters, self._shares):
                del values[first]

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **to_plain(self.state_dict())}, allow_nan=False)
        # A run that is killed in between leaves the file of before.
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
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file, or not all of it: {error}") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"{path} is no file of selection statistics; SelectionHistory.save writes such files")
        if saved.get("version") != VERSION:
            raise ValueError(f"{path} is of version {saved.get('version')!r}, this release reads version {VERSION}")
        history = cls()
        try:
            history.load_state_dict(from_plain(saved))
            history._check()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
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
            "kinds": [list(kind) for kind in self.kinds],
            "shares": self.shares,
            "counts": self.counts.clone(),
            "hits": self._hits.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.window = state_dict["window"]
        for name in ("steps", "overall", "groups", "parameters"):
            setattr(self, name, list(state_dict[name]))
        self.kinds = [Kind(*kind) for kind in state_dict["kinds"]]
        self._shares = [each.clone() for each in state_dict["shares"]]
        self.counts, self._hits = state_dict["counts"].clone(), state_dict["hits"].clone()
        self._sizes = None

    def _check(self) -> None:
        """Refuse what does not fit together."""
        if not isinstance(self.window, int):
            raise ValueError(f"window is {self.window!r}")
        if self.steps != sorted({int(step) for step in self.steps if step > 0}):
            raise ValueError("steps do not count up from 1 or later")
        if any(kind.axis not in (0, 1) or kind.slices < 1 or kind.matrices < 1 for kind in self.kinds):
            raise ValueError("a kind has an axis other than 0 and 1, or no slices")
        for figures in [*self.overall, *(each for point in self.groups for each in point.values())]:
            if not {"selected_fraction"} <= figures.keys() <= MEANINGS.keys():
                raise ValueError(f"figures are {sorted(figures)}")
        if any(not figures.keys() <= MEANINGS.keys() for point in self.parameters for figures in point):
            raise ValueError("a parameter has figures of other names")
        points, kinds = len(self.steps), len(self.kinds)
        for name in ("overall", "groups", "parameters"):
            if len(getattr(self, name)) != points:
                raise ValueError(f"{name} has {len(getattr(self, name))} points, steps has {points}")
        if any(len(point) != kinds for point in self.parameters):
            raise ValueError(f"parameters and kinds differ in number, {kinds} kinds")
        if points and self.shares.shape != (points, kinds, BINS):
            raise ValueError(f"shares has shape {tuple(self.shares.shape)} instead of {(points, kinds, BINS)}")
        for name, tensor in {"counts": self.counts, "hits": self._hits}.items():
            if tensor.shape != (kinds, BINS):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} instead of {(kinds, BINS)}")

    def _take_over(self, kinds: Sequence[Kind]) -> None:
        """Make what is there refer to ``kinds``; of a parameter that is new it says it was never selected."""
        if self._sizes is not None and self.kinds == list(kinds):
            return
        known = {kind: position for position, kind in enumerate(self.kinds)}
        nothing = len(self.kinds)
        index = torch.tensor([known.get(kind, nothing) for kind in kinds], dtype=torch.int64)
        self._shares = [torch.cat([each, each.new_zeros((1, BINS))])[index] for each in self._shares]
        self._hits = torch.cat([self._hits, self._hits.new_zeros((1, BINS))])[index]
        self.parameters = [[(*point, {})[position] for position in index.tolist()] for point in self.parameters]
        self.kinds = list(kinds)
        self._sizes = torch.stack(
            [torch.bincount(bin_of(kind.slices), minlength=BINS) * kind.matrices for kind in kinds]
        )
        # With fewer slices than bins, bins between two slices show the one before.
        self._shown = torch.stack([bin_of(kind.slices)[torch.arange(BINS) * kind.slices // BINS] for kind in kinds])


def _in_six_digits(figures: Mapping[str, float]) -> dict[str, float]:
    """As precise as pictures and tables need them: files and checkpoints are half as large."""
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def bin_of(slices: int, device: torch.device | None = None) -> Tensor:
    """Return the bin that each slice falls into."""
    return torch.arange(slices, device=device) * BINS // slices


def to_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict for JSON, which knows no tensors and no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            stored = value.cpu().contiguous()
            # Tensor.numpy() would need NumPy, which torch comes without.
            raw = base64.b64encode(ctypes.string_at(stored.data_ptr(), stored.nbytes)).decode()
            return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "base64": raw}
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {key: plain(value) for key, value in state.items()}


def from_plain(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of which :func:`to_plain` made ``saved``."""

    def tensor(value: Any) -> Any:
        if isinstance(value, dict) and "base64" in value:
            dtype = getattr(torch, value["dtype"])
            raw = bytearray(base64.b64decode(value["base64"]))
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(0, dtype=dtype)
            return flat.view(value["shape"]).clone()
        if isinstance(value, dict):
            return {key: tensor(each) for key, each in value.items()}
        if isinstance(value, list):
            return [tensor(each) for each in value]
        return math.nan if value is None else value

    return {key: tensor(value) for key, value in saved.items()}
