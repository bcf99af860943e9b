"""Decisions as text: a table of parameters, a table of totals, a line of totals, and notes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from dion2_lightning.matrices.splits import blocks_of
from dion2_lightning.routing.model_tree import collapse_numbers
from dion2_lightning.routing.rules import MATRIX_ROLES, OUTSIDE_BACKBONE, Role

if TYPE_CHECKING:
    from dion2_lightning.routing.router import Decision

_WHAT_CHANGES_IT: Final[Mapping[str, tuple[frozenset[Role], str]]] = {
    "LoRA factors": (
        frozenset({Role.LORA_A, Role.LORA_B}),
        'lora="both", the default, sends them to {matrices}, unless an override does not',
    ),
    "Weights of linear layers": (frozenset({Role.MATRIX, Role.EXPERTS}), "overrides send them elsewhere"),
    "Weights of heads": (frozenset({Role.HEAD}), 'if they are inner layers, pass overrides={{"{name}": "{matrices}"}}'),
    "Dense convolutions": (frozenset({Role.CONVOLUTION}), "overrides send them elsewhere"),
    "Routers": (frozenset({Role.ROUTER}), 'if they are none, pass overrides={{"{name}": "{matrices}"}}'),
    "Convolutions without a matrix": (frozenset({Role.CONVOLUTION_OTHER}), "the report says of each why it has none"),
    "Parameters of no known layer": (frozenset({Role.OTHER}), 'if linear, pass overrides={{"{name}": "{matrices}"}}'),
    "Frozen weights": (frozenset({Role.FROZEN}), "unfreeze what should train before the optimizer is built"),
}
"""What could have been trained as matrices: its roles, and why it is not or how it would be."""


def decision_table(decisions: Sequence["Decision"]) -> str:
    """Make one row of all decisions that differ in layer numbers only, in the order of their first layer."""
    rows: dict[tuple[Any, ...], list[Decision]] = {}
    for each in decisions:
        rows.setdefault((each.group, collapse_numbers(each.name), each.shape, each.reason), []).append(each)
    cells = []
    for (_, pattern, shape, reason), row in rows.items():
        group = row[0].group or row[0].algorithm
        name = pattern if len(row) > 1 else row[0].name
        size = sum(each.parameter.numel() for each in row)
        cells.append([group, name, " x ".join(map(str, shape)) or "-", f"{len(row):,}", f"{size:,}", reason])
    return _table(["group", "parameter", "shape", "tensors", "parameters", "why"], cells, "<<>>><")


def total_table(decisions: Sequence["Decision"], algorithms: Sequence[str]) -> str:
    """Make one row an algorithm, always one for each of ``algorithms``, and one for frozen parameters."""
    sizes, frozen = _sizes(decisions, algorithms)
    trainable = max(sum(map(sum, sizes.values())), 1)
    cells = [
        [algorithm, f"{len(each):,}", f"{sum(each):,}", f"{sum(each) / trainable:.1%}"]
        for algorithm, each in sizes.items()
    ]
    cells.append(["frozen", f"{len(frozen):,}", f"{sum(frozen):,}", "-"])
    return _table(["algorithm", "tensors", "parameters", "of trainable"], cells, "<>>>")


def total_line(decisions: Sequence["Decision"], algorithms: Sequence[str]) -> str:
    """Return the totals as one line."""
    sizes, frozen = _sizes(decisions, algorithms)
    trainable = max(sum(map(sum, sizes.values())), 1)
    shares = [
        f"{algorithm} {sum(each) / trainable:.1%} ({len(each):,} tensor{'s' * (len(each) != 1)})"
        for algorithm, each in sizes.items()
    ]
    line = f"of {trainable:,} trainable parameters {', '.join(shares)}"
    return f"{line}; {sum(frozen):,} frozen" if frozen else line


def notes(
    decisions: Sequence["Decision"],
    backbone: str | None,
    outside: Mapping[nn.Parameter, str],
    matrices: str,
    rest: str,
    per_head: bool,
) -> tuple[str, ...]:
    """Say what a user should know about how the model was read.

    Args:
        decisions: All of them.
        backbone: Name of the transformers model in it; None where there is none.
        outside: What each parameter lies beside, of those in no transformers model, or in one beside its base model.
        matrices: Algorithm of what is trained as matrices.
        rest: Algorithm of the rest.
        per_head: Whether heads were to be matrices.
    """
    lines = []
    as_matrices = [each for each in decisions if each.as_matrices]
    a_matrix_goes_elsewhere = any(
        each.role in (Role.MATRIX, Role.CONVOLUTION) and not each.as_matrices for each in decisions
    )
    has_head = a_matrix_goes_elsewhere or any(each.role is Role.HEAD for each in decisions)  # as an override says
    layers = [each for each in as_matrices if each.parameter in outside and each.role in MATRIX_ROLES]
    if layers and not has_head:
        last = ([each for each in layers if each.role is not Role.EXPERTS] or layers)[-1]
        beside = f"a network beside {outside[last.parameter]} was found"
        found = "no transformers model was found" if backbone is None else beside
        lines.append(
            f"{found}, so no head was guessed. An output layer belongs to {rest}: if `{last.name}` is one, pass "
            f'overrides={{"{last.name}": "{rest}"}}.'
        )
    if backbone and any(each.reason.startswith(OUTSIDE_BACKBONE) for each in decisions):
        lines.append(
            f"weights outside `{backbone}` were taken for heads. If one is an inner layer, pass "
            f'overrides={{"<its name>": "{matrices}"}}.'
        )
    has_heads = any(
        block.matrices > 1 for each in as_matrices if each.role is Role.MATRIX for block in blocks_of(each.splits)
    )
    if per_head and not has_heads:
        lines.append(
            f"per_head=True cuts nothing: no attention of several heads was found in what {matrices} trains. Pass "
            'splits={"<name of a weight>": "head <heads>*<size>"}.'
        )
    return tuple(lines)


def why_no_matrices(decisions: Sequence["Decision"], matrices: str, rest: str) -> str | None:
    """Say why no parameter is trained as a matrix, and what changes that; None where some are."""
    if any(each.as_matrices for each in decisions):
        return None
    reasons = []
    for kind, (roles, change) in _WHAT_CHANGES_IT.items():
        found = [each.name for each in decisions if each.role in roles and len(each.shape) > 1]
        if found:
            reasons.append(f"{kind} ({len(found):,}): {change.format(name=found[0], matrices=matrices)}.")
    return " ".join([f"{matrices} trains nothing, {rest} everything.", *(reasons or ["It has no linear layers."])])


def _sizes(decisions: Sequence["Decision"], algorithms: Sequence[str]) -> tuple[dict[str, list[int]], list[int]]:
    """The sizes of what each algorithm trains, also where it trains nothing, and of what is frozen."""
    sizes: dict[str, list[int]] = {algorithm: [] for algorithm in algorithms}
    for each in decisions:
        sizes.setdefault(each.algorithm, []).append(each.parameter.numel())
    return sizes, sizes.pop(Role.FROZEN, [])


def _table(header: list[str], rows: list[list[str]], alignment: str) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    underline = ["-" * width for width in widths]
    lines = [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, alignment, widths, strict=True))
        for row in (header, underline, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
