"""Selection histories like those of thousands of steps, made fast and without a model."""

from collections.abc import Sequence

import torch

from dion2_lightning.monitoring.history import BINS, SelectionHistory, bin_of
from dion2_lightning.monitoring.metrics import ParameterInfo, SelectionMetrics

LLAMA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def infos_of(
    names: Sequence[str], *, matrices: int = 1, slices: int = 128, group: str = "dion2"
) -> list[ParameterInfo]:
    return [ParameterInfo(group, name, matrices, slices, 0) for name in names]


def llama(layers: int, roles: Sequence[str] = LLAMA) -> list[str]:
    return [f"model.layers.{layer}.{role}.weight" for layer in range(layers) for role in roles]


def extend(
    history: SelectionHistory,
    infos: Sequence[ParameterInfo],
    points: int,
    *,
    every: int = 10,
    fraction: float = 0.25,
    seed=0,
) -> SelectionHistory:
    """Append points with random selections, which bias low slices more the later the parameter comes."""
    generator = torch.Generator().manual_seed(seed)
    start = history.steps[-1] if history.steps else 0
    known = {info: index for index, info in enumerate(history.infos)}
    count = {info: torch.zeros(info.slices) for info in infos}
    hits = torch.stack([history._hits[known[k]] if k in known else torch.zeros(BINS).double() for k in infos])
    for point in range(1, points + 1):
        step = start + point * every
        parameters = {}
        for index, info in enumerate(infos):
            bias = torch.linspace(1.0, -1.0, info.slices) * index / len(infos)
            selected_count = max(1, round(fraction * info.slices))
            for _ in range(every):
                scores = bias + torch.randn(info.slices, generator=generator)
                selected = scores.topk(selected_count).indices
                count[info][selected] += 1
                hits[index].index_add_(
                    0, bin_of(info.slices)[selected], torch.full((selected_count,), float(info.matrices)).double()
                )
            counts = count[info].sort().values
            ranks = torch.arange(1 - info.slices, info.slices, 2)
            parameters[info.group, info.name] = {
                "selected_fraction": selected_count / info.slices,
                "coverage": (count[info] > 0).double().mean().item(),
                "staleness_mean": 3.0 + index / 10,
                "staleness_max": float(min(step, 40 + index)),
                "turnover": 0.75 - 0.5 * index / len(infos),
                "captured_mass": 0.3 + 0.5 * index / len(infos),
                "imbalance": ((ranks * counts).sum() / (info.slices * counts.sum())).item(),
                "update_rms": 1e-4,
            }
        groups = {
            group: _mean([parameters[k.group, k.name] for k in infos if k.group == group])
            for group in dict.fromkeys(info.group for info in infos)
        }
        quantiles = {k: torch.linspace(0, k.slices - 1, BINS).round().long() for k in infos}
        counts = torch.stack([count[k].sort().values[quantiles[k]].double() * k.matrices for k in infos])
        history.append(
            SelectionMetrics(step, _mean(list(parameters.values())), groups, parameters), infos, hits, counts
        )
    return history


def _mean(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}


def make_history(names: Sequence[str], points: int = 6, *, every: int = 10) -> SelectionHistory:
    return extend(SelectionHistory(), infos_of(names), points, every=every)


def low_rank_history(names: Sequence[str], points: int = 6, *, every: int = 10, rank: int = 32) -> SelectionHistory:
    """A history of updates of low rank, in which less is captured the later the parameter comes."""
    generator = torch.Generator().manual_seed(0)
    infos = [ParameterInfo("dion", name, 1, 128, 0, selects=False, rank=rank) for name in names]
    nothing = torch.zeros(len(infos), BINS, dtype=torch.float64)
    history = SelectionHistory()
    for point in range(1, points + 1):
        noise = torch.rand(len(infos), 3, generator=generator).tolist()
        parameters = {
            info.key: {
                "captured_energy": 0.8 - 0.4 * index / len(infos) + 0.1 * first,
                "subspace_turn": 0.1 + 0.1 * second,
                "rank_use": 0.4 + 0.2 * third,
                "update_rms": 1e-4,
            }
            for index, (info, (first, second, third)) in enumerate(zip(infos, noise, strict=True))
        }
        mean = _mean(list(parameters.values()))
        history.append(SelectionMetrics(point * every, mean, {"dion": mean}, parameters), infos, nothing, nothing)
    return history
