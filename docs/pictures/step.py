"""Draw step.png, the picture in README: one real step of Dion2 on a small linear layer.

python docs/pictures/step.py
"""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2

matplotlib.use("agg")
import matplotlib.pyplot as plt

INK, QUIET = "#22303c", "#c9d1d8"


def one_step() -> tuple[Tensor, Tensor, list[int]]:
    """Train a (16, 32) layer; return its momentum before the last step, the change of its weight, and the rows."""
    torch.manual_seed(7)
    layer = nn.Linear(32, 16, bias=False)
    teacher = torch.randn(16, 32) * torch.linspace(0.2, 1.6, 16)[torch.randperm(16), None]
    optimizer = Dion2(layer.parameters(), lr=0.05, fraction=0.25, weight_decay=0.0)
    for _ in range(12):
        optimizer.zero_grad()
        inputs = torch.randn(64, 32)
        (layer(inputs) - inputs @ teacher.T).square().mean().backward()
        before = layer.weight.detach().clone()
        state = optimizer.state.get(layer.weight, {"momentum": torch.zeros(16, 32)})
        momentum = state["momentum"] + layer.weight.grad
        optimizer.step()
    selection = optimizer.selection_of(layer.weight)
    assert selection is not None
    return momentum, layer.weight.detach() - before, selection.indices.tolist()


def draw(path: Path) -> None:
    """Draw momentum, norms of its rows and the change of the weight side by side."""
    momentum, change, rows = one_step()
    norms = momentum.abs().sum(dim=1)
    colors = [INK if row in rows else QUIET for row in range(len(norms))]
    widths = {"width_ratios": [2.2, 0.9, 2.2], "wspace": 0.12}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), gridspec_kw=widths, layout="constrained")
    for axes, matrix in ((left, momentum), (right, change)):
        limit = matrix.abs().max().item()
        axes.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks([])
    middle.barh(range(len(norms)), norms, color=colors, height=0.8)
    middle.set_ylim(len(norms) - 0.5, -0.5)
    middle.spines[["top", "right", "bottom"]].set_visible(False)
    middle.set_xticks([])
    for axes in (left, middle, right):
        axes.set_yticks(rows, [f"{row}" for row in rows] if axes is left else [], color=INK)
    left.set_title("momentum: gradients accumulate in every row", fontsize=10, color=INK)
    middle.set_title("norms: the top quarter", fontsize=10, color=INK)
    right.set_title("update: those rows, orthonormalized", fontsize=10, color=INK)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
