"""Which parameter is trained as matrices, which with the rest, in which group, and why.

The rules say what a parameter is (its role), and two tables which roles are trained as matrices; overrides come last.
Which algorithm trains the matrices, and which the rest, is what the caller says.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from torch import Tensor, nn

from dion2_lightning.algorithms import ALGORITHMS, DEFAULT_MATRICES, DEFAULT_REST, has_setting
from dion2_lightning.algorithms.algorithm import STORAGE
from dion2_lightning.algorithms.hyperparameters import flag, one_of
from dion2_lightning.matrices.splits import WHOLE, blocks_of
from dion2_lightning.parameter_groups import unique_name
from dion2_lightning.routing.fused import find_splits
from dion2_lightning.routing.model_tree import ModulePath, read_model
from dion2_lightning.routing.overrides import (
    Override,
    assign_overrides,
    check_matrices,
    parse_overrides,
    parse_splits,
)
from dion2_lightning.routing.report import decision_table, notes, total_line, total_table, why_no_matrices
from dion2_lightning.routing.rules import (
    FEW_SLICES,
    MATRIX_ROLES,
    Role,
    Verdict,
    classify,
    has_two_axes,
    is_bias,
    lora_rank_of,
    storage_of,
    what_it_lies_beside,
    why_groups_hold_no_matrix,
)

LORA_ROLES: Final[dict[str, frozenset[Role]]] = {
    DEFAULT_REST: frozenset(),
    "B": frozenset({Role.LORA_B}),
    "both": frozenset({Role.LORA_A, Role.LORA_B}),
}
"""The LoRA factors that are trained as matrices too, by the argument ``lora``."""

SHARES: Final = ("fraction", "rank_fraction")
"""Settings that say which share of a matrix a step updates; 1 for LoRA factors of a rank under 16."""


@dataclass(frozen=True)
class Decision:
    """Where one parameter goes, and why.

    Attributes:
        name: Name in the model, without the prefixes of wrappers. A tied parameter goes by the first of its names.
        parameter: The parameter itself.
        role: What it is; an override does not change that.
        reason: A few words for the report.
        algorithm: Name of the algorithm that trains it; ``"frozen"`` for a parameter that is left out.
        as_matrices: Whether it is trained as a matrix or a stack of them, by its role or an override.
        transposed: Whether a matrix is stored as (in, out).
        batched: Whether the leading axis counts matrices.
        convolution: Whether the axes from the third on are those of a kernel.
        splits: Which matrices lie side by side in it, as a text: see matrices/splits.py.
        low_rank: Whether it is a LoRA factor of so low a rank that a step updates all of it.
        decays: Whether its group's weight decay applies to it.
        override: The override that brings options for its group, None without one.
    """

    name: str
    parameter: nn.Parameter = field(repr=False, compare=False)
    role: Role
    reason: str
    algorithm: str = "frozen"
    as_matrices: bool = False
    transposed: bool = False
    batched: bool = False
    convolution: bool = False
    splits: str = WHOLE
    low_rank: bool = False
    decays: bool = False
    override: Override | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, also where it is sharded."""
        return tuple(self.parameter.shape)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the matrices that lie side by side in it; empty where it is one."""
        return tuple(block.name for block in blocks_of(self.splits))

    @property
    def group(self) -> str | None:
        """Name of its parameter group, None where frozen."""
        if self.role is Role.FROZEN:
            return None
        flags = {
            # An algorithm for any shape may train the rest too, so the group name says "matrices".
            "matrices": self.as_matrices and not ALGORITHMS[self.algorithm].needs_matrices,
            "experts": self.batched,
            "convolutions": self.convolution,
            "-".join(self.blocks): bool(self.blocks),
            "transposed": self.transposed,
            "low-rank": self.low_rank,
            "no-decay": not self.decays,
        }
        name = "-".join([self.algorithm, *(flag for flag, is_set in flags.items() if is_set)])
        return name if self.override is None else f"{name} [{self.override.pattern}]"


@dataclass(frozen=True)
class Routing:
    """The decisions for every parameter of a model.

    Attributes:
        decisions: One for each parameter, in the order of ``model.named_parameters()``.
        notes: What a user should know about how the model was read.
        algorithms: Those that the report gives totals of, also where they train nothing.
        why_no_matrices: Where no parameter is trained as a matrix: why, and what changes that. None where some are.
    """

    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]
    algorithms: tuple[str, ...]
    why_no_matrices: str | None = None

    def param_groups(
        self,
        only: Iterable[Tensor] | None = None,
        *,
        rest: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """The parameter groups for the optimizer.

        Args:
            only: Parameters to keep; groups that hold none of them are left out (default: None, all parameters).
            rest: Entries for the groups of what is not trained as matrices, where they have none of that name
                (default: None).
            options: Entries for all groups whose algorithm has them, whatever they had before, but that no weight
                decay reaches parameters that must not decay (default: None).

        Returns:
            One new dictionary a group, the matrices first: ``params`` as (name, parameter) pairs in model order,
            ``name``, ``algorithm``, ``batched``, ``transposed`` and ``convolution`` where they are true, ``splits``
            where a weight is several matrices, a fraction of 1 for LoRA factors of low rank, a zero ``weight_decay``
            where the parameters must not decay, and the options of an override. Names are unique: those of groups with
            the same blocks in other sizes end in a number.
        """
        kept = None if only is None else {id(parameter) for parameter in only}
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        members = [
            (each.group, each)
            for each in sorted(self.decisions, key=_rank)
            if each.group is not None and (kept is None or id(each.parameter) in kept)
        ]
        algorithms = {each.algorithm for _, each in members}
        decay = (options or {}).get("weight_decay")
        if decay and members and not any(each.decays for _, each in members):
            raise ValueError(
                f"weight_decay={decay} has no effect on biases, norms and single rows, which never "
                f"decay, such as {members[0][1].name!r}; remove it"
            )
        for name, each in members:
            key = name, each.splits
            if key not in groups:
                common = {} if each.as_matrices else rest or {}
                own = _options_for(each, options or {}, algorithms)
                group = {**common, "params": [], "name": name, **_group_entries(each), **own}
                groups[key] = group | {"name": unique_name(group, list(groups.values()))}
            groups[key]["params"].append((each.name, each.parameter))
        return list(groups.values())

    def report(self) -> str:
        """The decisions as a table, with layer numbers collapsed to ``*``, then totals and notes.

        Returns:
            Lines of text without a final newline.
        """
        tables = [decision_table(self.decisions), total_table(self.decisions, self.algorithms)]
        reasons = [] if self.why_no_matrices is None else [self.why_no_matrices]
        return "\n\n".join([*tables, *(f"Note: {note}" for note in (*self.notes, *reasons))])

    def summary(self) -> str:
        """The totals in one line, then the notes, each in a line of its own.

        Returns:
            Lines of text without a final newline.
        """
        totals = total_line(self.decisions, self.algorithms)
        return "\n".join([totals, *(f"Note: {note}" for note in self.notes)])


def route_parameters(
    model: nn.Module,
    *,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    lora: Literal["adamw", "B", "both"] = "both",
    splits: Mapping[str, str] | None = None,
    per_head: bool = False,
    matrices: str = DEFAULT_MATRICES,
    rest: str = DEFAULT_REST,
    control: bool = False,
    refuse_unmatched: bool = True,
) -> Routing:
    """Decide for every parameter of a model whether it is trained as matrices or with the rest.

    Weights of linear modules, attention projections, stacks of experts and convolutions, but for depthwise ones and
    those in small groups, are trained as matrices. Embeddings, of patches too, output embeddings, heads, routers,
    biases, norms and all other parameters are the rest. In a transformers model a head is what lies outside its
    ``base_model`` and is no network of its own; in a plain module no head is guessed.

    Args:
        model: The model, wrapped or not, on any device. It may hold DTensor parameters.
        overrides: What to do with the parameters whose full name, without the prefixes of wrappers, matches a pattern
            (``fnmatch``, case-sensitive): the name of an algorithm, or a mapping of group options such as ``lr`` or
            ``weight_decay``, with ``algorithm``, ``transposed``, ``batched``, ``convolution`` and ``splits`` to
            correct the routing itself. The first matching pattern wins, and a tied parameter is matched by any of its
            names. Every pattern must match a trainable parameter that no earlier one has taken (default: None).
        lora: Which LoRA factors are trained as matrices: ``"both"``, ``"B"``, or ``"adamw"`` for none. Factors of
            embeddings and magnitude vectors never are. Where the rank is under 16, a step updates all of a factor,
            unless an override sets the fraction (default: ``"both"``).
        splits: Which matrices lie side by side in the weights whose names match a pattern, as ``{"*.qkv.weight":
            "q 2048 | k 512 | v 512"}``, or ``"whole"``, instead of what is found by itself. The first matching pattern
            wins, every one must match a weight that is trained as matrices, and an override's ``splits`` comes before
            them. docs/routing.md has the notation (default: None).
        per_head: Whether each attention head is a matrix of its own, in the weights of q, k and v, and in that of the
            output, whose inputs are heads (default: False).
        matrices: Algorithm of what is trained as matrices (default: ``"dion2"``).
        rest: Algorithm of the rest, one that needs no matrices (default: ``"adamw"``).
        control: Whether ``rest`` trains the matrices too, whatever overrides send to ``matrices`` included: the same
            groups, named ``adamw-matrices``, ..., to compare ``matrices`` with (default: False).
        refuse_unmatched: Whether a pattern of ``overrides`` or ``splits`` that matches nothing trainable is an error.
            Later it may match nothing any more, as when a head has been frozen (default: True).

    Returns:
        The decisions, from which come the parameter groups and a report.

    Raises:
        ValueError: If an argument is invalid, a pattern has no effect, an override sends what holds no matrix to an
            algorithm that needs one, blocks do not fit a weight or heads do not divide it, nothing is trainable, or the
            parameters are uninitialized or flattened by FSDP1 or DeepSpeed ZeRO.
        TypeError: If an override is neither a string nor a mapping, or blocks are no text.
    """
    one_of(LORA_ROLES)("lora", lora)
    flag("per_head", per_head)
    one_of(ALGORITHMS)("matrices", matrices)
    one_of(name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_matrices)("rest", rest)
    parsed = parse_overrides({} if overrides is None else overrides)
    given_splits = parse_splits({} if splits is None else splits)
    tree = read_model(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameter; call requires_grad_() on some")

    override_of, splits_of = (
        assign_overrides(each, tree, refuse_unmatched=refuse_unmatched) for each in (parsed, given_splits)
    )
    decisions: list[Decision] = []
    for parameter, verdict in classify(tree).items():
        if verdict.role in LORA_ROLES[lora]:
            verdict = verdict._replace(reason=f'LoRA factor, lora="{lora}"')
        as_matrices = verdict.role in MATRIX_ROLES | LORA_ROLES[lora]
        algorithm = matrices if as_matrices else rest
        override, blocks = override_of.get(parameter), splits_of.get(parameter)
        path = tree.paths[parameter][0]
        decisions.append(_decide(parameter, path, verdict, as_matrices, algorithm, override, blocks, per_head))
    _check_coverage(model, decisions)
    if refuse_unmatched:
        _check_splits_used(given_splits, splits_of, override_of, decisions)
    if control:
        decisions = [replace(each, algorithm=rest) if each.as_matrices else each for each in decisions]
    else:  # a control ignores the settings of what it stands for
        for override in parsed:
            matched = [each for each in decisions if override_of.get(each.parameter) is override]
            if matched:
                override.check_options({each.algorithm for each in matched})
    paths = {parameter: path for parameter, (path, *_) in tree.paths.items()}
    outside = {each: beside for each, path in paths.items() if (beside := what_it_lies_beside(path, tree.backbone))}
    return Routing(
        tuple(decisions),
        notes(decisions, tree.backbone, outside, matrices, rest, per_head),
        (rest if control else matrices, rest),
        why_no_matrices(decisions, matrices, rest),
    )


def _decide(
    parameter: nn.Parameter,
    path: ModulePath,
    verdict: Verdict,
    as_matrices: bool,
    algorithm: str,
    override: Override | None,
    blocks: Override | None,
    per_head: bool,
) -> Decision:
    """Decide about one parameter; ``as_matrices`` and ``algorithm`` follow from its role."""
    role, reason = verdict
    if role is Role.FROZEN:
        return Decision(path.name, parameter, role, reason)
    storage = storage_of(parameter, path)
    given: Mapping[str, Any] = {}
    if override is not None:
        by, given = f"override `{override.pattern}`", override.storage
        if override.algorithm is None:
            reason = f"{reason}; {by}"
        else:
            as_matrices, algorithm, reason = ALGORITHMS[override.algorithm].needs_matrices, override.algorithm, by
    storage |= given
    if as_matrices and role not in LORA_ROLES["both"]:
        if blocks is not None and "splits" not in given:
            storage |= blocks.storage
            reason = f"{reason}; {storage['splits']} by splits `{blocks.pattern}`"
        elif "splits" not in storage and (shape := _shape_of_matrices(parameter, storage)) is not None:
            storage["splits"], found = find_splits(path, shape, per_head)
            reason = f"{reason}; {found}" if found else reason
    for source in (override, blocks):
        if as_matrices and source is not None:
            wrong = why_groups_hold_no_matrix(parameter, path)
            if wrong is not None and blocks is None and "splits" not in given:
                label = f"parameter {path.name!r} of shape {tuple(parameter.shape)}"
                raise ValueError(f"{source.label}: {label} {wrong}")
            check_matrices(parameter, path.name, storage, source, algorithm)
    if override is not None and not override.options:
        override = None
    rank, share = lora_rank_of(role, parameter, path), _share_of(algorithm)
    is_set = override is not None and share in override.options
    low_rank = as_matrices and rank is not None and rank < FEW_SLICES and share is not None and not is_set
    if low_rank:
        reason = f"{reason}; rank {rank}: {share} 1"
    return Decision(
        path.name,
        parameter,
        role,
        reason,
        algorithm,
        as_matrices,
        **(storage if as_matrices else {}),
        low_rank=low_rank,
        decays=_decays(parameter, path, verdict) or (override is not None and "weight_decay" in override.options),
        override=override,
    )


def _shape_of_matrices(parameter: nn.Parameter, storage: Mapping[str, Any]) -> tuple[int, int] | None:
    """(out, in) of a weight, or of each in a stack of them; None for a transposed kernel and for what is no matrix."""
    if storage.get("convolution"):
        return None if storage.get("transposed") else (parameter.shape[0], math.prod(parameter.shape[1:]))
    if parameter.ndim != 2 + bool(storage.get("batched")):
        return None
    rows, columns = parameter.shape[-2:]
    return (columns, rows) if storage.get("transposed") else (rows, columns)


def _decays(parameter: nn.Parameter, path: ModulePath, verdict: Verdict) -> bool:
    # Mamba marks parameters that must not decay with this attribute.
    marked = getattr(parameter, "_no_weight_decay", False)
    return has_two_axes(parameter) and not is_bias(path) and verdict.role is not Role.VECTOR and not marked


def _share_of(algorithm: str) -> str | None:
    return next((name for name in SHARES if has_setting(algorithm, name)), None)


def _rank(decision: Decision) -> tuple[Any, ...]:
    """Sort key of groups: matrices first, then groups without options, then the plainest storage."""
    position = -1 if decision.override is None else decision.override.position
    storage = decision.convolution, decision.batched, decision.transposed, decision.blocks, decision.low_rank
    return not decision.as_matrices, position, *storage, not decision.decays


def _group_entries(member: Decision) -> dict[str, Any]:
    """The entries of a member's group, as far as they follow from the decision."""
    entries: dict[str, Any] = {"algorithm": member.algorithm}
    if ALGORITHMS[member.algorithm].needs_matrices:
        stored = {name: getattr(member, name) for name in STORAGE}
        entries |= {name: value for name, value in stored.items() if value != STORAGE[name][0]}
    if member.low_rank and (share := _share_of(member.algorithm)) is not None:
        entries[share] = 1.0
    if not member.decays:
        entries["weight_decay"] = 0.0
    return entries if member.override is None else entries | member.override.options_for(member.algorithm)


def _options_for(member: Decision, options: Mapping[str, Any], algorithms: Collection[str]) -> dict[str, Any]:
    """The options that a member's algorithm has, or that none has, so that they are refused."""
    return {
        name: value
        for name, value in options.items()
        if (member.decays or name != "weight_decay")
        and (has_setting(member.algorithm, name) or not any(has_setting(each, name) for each in algorithms))
    }


def _check_splits_used(
    given: Sequence[Override],
    splits_of: Mapping[nn.Parameter, Override],
    override_of: Mapping[nn.Parameter, Override],
    decisions: Sequence[Decision],
) -> None:
    """Refuse an entry of ``splits`` that matches no matrix, or only what overrides split."""
    split_by_overrides = {each for each, override in override_of.items() if "splits" in override.storage}
    for entry in given:
        matched = [each for each in decisions if splits_of.get(each.parameter) is entry]
        others = [each for each in matched if each.parameter not in split_by_overrides]
        if not others:
            raise ValueError(f"{entry.label} has no effect: overrides split all that it matches; remove it")
        if not any(each.as_matrices and each.role not in LORA_ROLES["both"] for each in others):
            raise ValueError(
                f"{entry.label} matches nothing that could be split, but for example {others[0].name!r}, which is "
                f"trained by {others[0].algorithm} ({others[0].reason}); correct the pattern or remove it"
            )


def _check_coverage(model: nn.Module, decisions: Sequence[Decision]) -> None:
    routed = Counter(id(each.parameter) for each in decisions if each.group is not None)
    trainable = Counter(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if routed != trainable:
        raise RuntimeError(
            f"{len(trainable)} trainable parameters became {routed.total()} in the groups; this is a bug in "
            f"dion2_lightning, please report it with the class of the model, {type(model).__name__}"
        )
