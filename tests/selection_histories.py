"""Histories of selection, made fast: what some thousand steps of a model leave, without the model."""

from collections.abc import Sequence

import torch

from dion2_lightning.monitoring.history import BINS, SelectionHistory, bin_of
from dion2_lightning.monitoring.metrics import Figures, Kind

LLAMA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def kinds_of(names: Sequence[str], *, matrices: int = 1, slices: int = 128, group: str = "dion2") -> list[Kind]:
    return [Kind(group, name, matrices, slices, 0) for name in names]


def llama(layers: int, roles: Sequence[str] = LLAMA) -> list[str]:
    return [f"model.layers.{layer}.{role}.weight" for layer in range(layers) for role in roles]


def extend(
    history: SelectionHistory, kinds: Sequence[Kind], points: int, *, every: int = 10, fraction: float = 0.25, seed=0
) -> SelectionHistory:
    """Append points in which slices are drawn at random, low ones more often the later the parameter comes."""
    generator = torch.Generator().manual_seed(seed)
    start = history.steps[-1] if history.steps else 0
    known = {kind: place for place, kind in enumerate(history.kinds)}
    count = {kind: torch.zeros(kind.slices) for kind in kinds}
    hits = torch.stack([history._hits[known[k]] if k in known else torch.zeros(BINS).double() for k in kinds])
    for point in range(1, points + 1):
        step = start + point * every
        parameters = {}
        for place, kind in enumerate(kinds):
            favour = torch.linspace(1.0, -1.0, kind.slices) * place / len(kinds)
            taken = max(1, round(fraction * kind.slices))
            for _ in range(every):
                scores = favour + torch.randn(kind.slices, generator=generator)
                chosen = scores.topk(taken).indices
                count[kind][chosen] += 1
                hits[place].index_add_(
                    0, bin_of(kind.slices)[chosen], torch.full((taken,), float(kind.matrices)).double()
                )
            counts = count[kind].sort().values
            ranks = torch.arange(1 - kind.slices, kind.slices, 2)
            parameters[kind.group, kind.name] = {
                "selected_fraction": taken / kind.slices,
                "coverage": (count[kind] > 0).double().mean().item(),
                "staleness_mean": 3.0 + place / 10,
                "staleness_max": float(min(step, 40 + place)),
                "turnover": 0.75 - 0.5 * place / len(kinds),
                "captured_mass": 0.3 + 0.5 * place / len(kinds),
                "imbalance": ((ranks * counts).sum() / (kind.slices * counts.sum())).item(),
                "update_rms": 1e-4,
            }
        groups = {
            group: _mean([parameters[k.group, k.name] for k in kinds if k.group == group])
            for group in dict.fromkeys(kind.group for kind in kinds)
        }
        quantiles = {k: torch.linspace(0, k.slices - 1, BINS).round().long() for k in kinds}
        counts = torch.stack([count[k].sort().values[quantiles[k]].double() * k.matrices for k in kinds])
        history.append(Figures(step, _mean(list(parameters.values())), groups, parameters), kinds, hits, counts)
    return history


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}


def make_history(names: Sequence[str], points: int = 6, *, every: int = 10) -> SelectionHistory:
    return extend(SelectionHistory(), kinds_of(names), points, every=every)
