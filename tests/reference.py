"""Dion2 and its family, and Dion, written a second time, from the papers alone, to test against.

One matrix at a time, in (out, in) whatever the storage, by plain loops and an explicit iteration. The momentum is kept
in the state's dtype, as the optimizer promises for Dion2; everything else is float64.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

POLYNOMIALS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def polar(matrix: Tensor) -> Tensor:
    """The five polynomials of Polar Express applied to the singular values themselves."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    norm = values.square().sum().sqrt()
    if norm == 0:
        return torch.zeros_like(matrix, dtype=torch.float64)
    values = values / (1.02 * norm)
    for a, b, c in POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def scale_of(rule: str | None, out_size: int, in_size: int) -> float:
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out_size, in_size))
    if rule in ("original", None):
        return math.sqrt(max(1, out_size / in_size))
    if rule == "spectral":
        return math.sqrt(out_size / in_size)
    return 1.0


def cautiously_decayed(weight: Tensor, directions: Tensor, factor: float) -> Tensor:
    """The weight after a decay of the entries that are not pushed away from zero."""
    entries = zip(weight.flatten().tolist(), directions.flatten().tolist(), strict=True)
    decayed = [x * factor if x * u >= 0 else x for x, u in entries]
    return torch.tensor(decayed, dtype=torch.float64).view_as(weight)


@dataclass
class Reference:
    """One matrix in (out, in), its momentum, and the rule."""

    weight: Tensor
    momentum: Tensor
    lr: float = 3e-4
    fraction: float = 0.25
    mu: float = 0.95
    weight_decay: float = 0.01
    rule: str | None = "match_rms_adamw"
    scale_by_fraction: bool = True
    select: str = "shorter"
    normalize_neurons: bool = False
    neuron_beta: float = 0.95
    nesterov: bool = False
    cautious_weight_decay: bool = False
    variance: Tensor = field(init=False)
    axis: int = field(init=False, default=0)
    selected: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.variance = torch.zeros(len(self.weight), dtype=torch.float64)

    def normalize(self, update: Tensor) -> Tensor:
        """NorMuon's and Dion3's rule, one neuron at a time; ``update`` has a row for each slice."""
        neurons = update if self.axis == 0 else update.T
        result = torch.zeros_like(neurons)
        for row, neuron in enumerate(neurons):
            i = self.selected[row] if self.axis == 0 else row
            mean = sum(x * x for x in neuron.tolist()) / len(neuron)
            self.variance[i] = self.neuron_beta * self.variance[i] + (1 - self.neuron_beta) * mean
            result[row] = neuron / (self.variance[i].sqrt() + 1e-8)
        result *= torch.linalg.norm(neurons) / torch.linalg.norm(result)
        return result if self.axis == 0 else result.T

    def decayed(self, momentum: Tensor, update: Tensor) -> Tensor:
        """The weight after its decay, entry by entry where that is cautious; both arguments have slices as rows."""
        factor = 1 - self.lr * self.weight_decay
        if not self.cautious_weight_decay:
            return self.weight * factor
        directions = momentum.double().clone()
        for row, i in zip(update, self.selected, strict=True):
            directions[i] = row
        return cautiously_decayed(self.weight, directions if self.axis == 0 else directions.T, factor)

    def step(self, gradient: Tensor) -> None:
        out_size, in_size = self.weight.shape
        self.axis = 1 if self.select == "shorter" and in_size < out_size else 0
        n = self.weight.shape[self.axis]
        k = max(1, math.ceil(self.fraction * n - 1e-9))
        self.momentum = (self.momentum.float() + gradient).to(self.momentum.dtype)
        rows = self.momentum if self.axis == 0 else self.momentum.T
        norms = [torch.tensor(sum(abs(x) for x in row.tolist()), dtype=torch.float32).item() for row in rows]
        self.selected = sorted(sorted(range(n), key=lambda i: (-norms[i], i))[:k])
        if self.nesterov:
            gradient_rows = gradient.double() if self.axis == 0 else gradient.double().T
            update = polar(torch.stack([gradient_rows[i] + self.mu * rows[i].double() for i in self.selected]))
        else:
            update = polar(torch.stack([rows[i] for i in self.selected]))
        if self.normalize_neurons:
            update = self.normalize(update)
        c = math.sqrt(n / k) if self.scale_by_fraction else 1.0
        size = self.lr * scale_of(self.rule, out_size, in_size) * c
        self.weight = self.decayed(rows, update)
        momentum, weight = self.momentum.clone(), self.weight.clone()
        for row, i in zip(update, self.selected, strict=True):
            place = (i, slice(None)) if self.axis == 0 else (slice(None), i)
            momentum[place] = self.momentum[place] * self.mu
            weight[place] = self.weight[place] - size * row
        self.momentum, self.weight = momentum, weight


@dataclass
class DionReference:
    """One matrix in (out, in), its momentum and its Q, of shape (shorter, rank), and the rule; all float64.

    With compressed synchronisation every replica has a momentum, which loses what P captures of it; P before its
    orthonormalization, and the R that Q is made of, are means.
    """

    weight: Tensor
    q: Tensor
    lr: float = 3e-4
    mu: float = 0.95
    weight_decay: float = 0.01
    rule: str | None = "match_rms_adamw"
    scale_by_fraction: bool = True
    cautious_weight_decay: bool = False
    replicas: int = 1
    momenta: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.momenta = [torch.zeros_like(self.weight) for _ in range(self.replicas)]

    @property
    def momentum(self) -> Tensor:
        return sum(self.momenta, torch.zeros_like(self.weight)) / self.replicas

    def step(self, *gradients: Tensor) -> None:
        out_size, in_size = self.weight.shape
        is_wide = out_size < in_size
        bs = [momentum + gradient for momentum, gradient in zip(self.momenta, gradients, strict=True)]
        if is_wide:
            bs = [b.T for b in bs]
        p = gram_schmidt(torch.stack([b @ self.q for b in bs]).mean(0))
        rs = [b.T @ p for b in bs]
        bs = [b - (1 - self.mu) * p @ r.T for b, r in zip(bs, rs, strict=True)]
        r = torch.stack(rs).mean(0)
        self.q = torch.stack([column / (column.square().sum().sqrt() + 1e-8) for column in r.T], dim=1)
        update = p @ self.q.T
        self.momenta, update = ([b.T for b in bs], update.T) if is_wide else (bs, update)
        c = math.sqrt(min(out_size, in_size) / self.q.shape[1]) if self.scale_by_fraction else 1.0
        size = self.lr * scale_of(self.rule, out_size, in_size) * c
        factor = 1 - self.lr * self.weight_decay
        decayed = (
            cautiously_decayed(self.weight, update, factor) if self.cautious_weight_decay else factor * self.weight
        )
        self.weight = decayed - size * update


def gram_schmidt(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns, each made orthogonal to those before it, twice."""
    basis: list[Tensor] = []
    for column in matrix.T:
        for _ in range(2):
            for earlier in basis:
                column = column - (earlier @ column) * earlier
        basis.append(column / column.square().sum().sqrt())
    return torch.stack(basis, dim=1)
