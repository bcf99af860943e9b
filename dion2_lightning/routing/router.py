"""Which parameter goes to which algorithm, as which matrices, and why.

The rules say what a parameter is (its role), a table which roles are trained as matrices, and overrides come last.
Parameters with the same outcome share a group.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.routing.model_tree import ModelTree, ModulePath, read_model
from dion2_lightning.routing.overrides import (
    Override,
    assign_overrides,
    check_matrices,
    check_options,
    options_for,
    parse_overrides,
)
from dion2_lightning.routing.report import decision_table, notes, total_table
from dion2_lightning.routing.rules import Role, classify, is_bias, storage_of

MATRIX_ROLES: Final = frozenset({Role.MATRIX, Role.EXPERTS})
"""The roles that are trained as matrices. All others are trained with the rest."""

LORA_ROLES: Final[dict[str, frozenset[Role]]] = {
    "adamw": frozenset(),
    "B": frozenset({Role.LORA_B}),
    "both": frozenset({Role.LORA_A, Role.LORA_B}),
}
"""The LoRA factors that are trained as matrices too, by the argument ``lora``."""


@dataclass(frozen=True)
class Decision:
    """Where one parameter goes, and why.

    Attributes:
        name: Name in the model, without the prefixes of wrappers. A tied parameter goes by the first of its names.
        shape: Shape of the whole parameter, also where it is sharded.
        role: What it is; an override does not change that.
        as_matrices: Whether it is trained as a matrix or a stack of them, by its role or an override.
        algorithm: Name of the algorithm, such as ``"dion2"`` or ``"adamw"``; ``"frozen"`` for one that is left out.
        reason: A few words for the report.
        group: Name of its parameter group, None where frozen.
        transposed: Whether a matrix is stored as (in, out).
        batched: Whether the leading axis counts matrices.
        parameter: The parameter itself.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    as_matrices: bool
    algorithm: str
    reason: str
    group: str | None
    transposed: bool
    batched: bool
    parameter: nn.Parameter = field(repr=False, compare=False)


@dataclass(frozen=True)
class Routing:
    """The decisions for every parameter of a model.

    Attributes:
        decisions: One for each parameter, in the order of ``model.named_parameters()``.
        groups: The entries of each parameter group but its parameters, by name, in the order of the groups.
        notes: What a user should know about how the model was read.
        matrices: Algorithm of what is trained as matrices.
        rest: Algorithm of the rest.
    """

    decisions: tuple[Decision, ...]
    groups: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    matrices: str
    rest: str

    def param_groups(
        self, only: Iterable[Tensor] | None = None, *, rest: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The parameter groups for the optimizer.

        Args:
            only: Parameters to keep; groups that hold none of them are left out (default: None, all parameters).
            rest: Entries for the groups of what is not trained as matrices, where they have none of that name
                (default: None).

        Returns:
            One new dictionary a group, the matrices first: ``params`` as (name, parameter) pairs in model order, a
            unique ``name``, ``algorithm``, ``batched`` and ``transposed`` where they are true, a zero ``weight_decay``
            where the parameters must not decay, and the options of an override.
        """
        kept = None if only is None else {id(parameter) for parameter in only}
        members: dict[str, list[Decision]] = {name: [] for name in self.groups}
        for each in self.decisions:
            if each.group is not None and (kept is None or id(each.parameter) in kept):
                members[each.group].append(each)
        return [
            {
                **({} if decisions[0].as_matrices else rest or {}),
                "params": [(each.name, each.parameter) for each in decisions],
                "name": name,
                **self.groups[name],
            }
            for name, decisions in members.items()
            if decisions
        ]

    def report(self) -> str:
        """The decisions as a table, with layer numbers collapsed to ``*``, then totals and notes.

        Returns:
            Lines of text without a final newline.
        """
        sections = [decision_table(self.decisions), total_table(self.decisions, [self.matrices, self.rest])]
        sections += [f"Note: {note}" for note in self.notes]
        return "\n\n".join(sections)


def route_parameters(
    model: nn.Module,
    *,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    lora: str = "adamw",
    matrices: str = "dion2",
    rest: str = "adamw",
) -> Routing:
    """Decide for every parameter of a model which algorithm trains it.

    Weights of linear modules, attention projections and stacks of experts are trained as matrices. Embeddings, output
    embeddings, heads, routers, convolutions, biases, norms and all other parameters are the rest. In a transformers
    model the head is what lies outside its ``base_model``; in a plain module no head is guessed.

    Args:
        model: The model, wrapped or not, on any device. It may hold DTensor parameters.
        overrides: What to do with the parameters whose full name, without the prefixes of wrappers, matches a pattern
            (``fnmatch``, case-sensitive): the name of an algorithm, or a mapping of group options such as ``lr`` or
            ``weight_decay``, with ``algorithm``, ``transposed`` and ``batched`` to correct the routing itself. The
            first matching pattern wins, and a tied parameter is matched by any of its names. Every pattern must match
            a trainable parameter that no earlier one has taken (default: None).
        lora: Which LoRA factors are trained as matrices: ``"adamw"`` for none, ``"B"``, or ``"both"``. Factors of
            embeddings and magnitude vectors never are (default: ``"adamw"``).
        matrices: Algorithm of what is trained as matrices. With one that needs no matrices, ``"adamw"``, the routing is
            that of a control: the same groups, here named ``adamw-matrices``, ..., and whatever overrides send to an
            algorithm that needs matrices is trained by this one instead (default: ``"dion2"``).
        rest: Algorithm of the rest (default: ``"adamw"``).

    Returns:
        The decisions, from which come the parameter groups and a report.

    Raises:
        ValueError: If an argument is invalid, a pattern has no effect, an override sends what holds no matrix to an
            algorithm that needs one, nothing is trainable, or the parameters are uninitialized or flattened by FSDP1 or
            DeepSpeed ZeRO.
        TypeError: If an override is neither a string nor a mapping.
    """
    check_lora(lora)
    _check_choice("matrices", matrices, ALGORITHMS)
    _check_choice("rest", rest, [name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_matrices])
    parsed = parse_overrides(overrides or {})
    tree = read_model(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameter; call requires_grad_() on some")

    override_of = assign_overrides(parsed, tree)
    decisions: list[Decision] = []
    groups: dict[str, _Group] = {}
    for parameter in tree.paths:
        decision, group = _decide(parameter, tree, override_of.get(parameter), lora, matrices, rest)
        decisions.append(decision)
        if group is not None:
            groups.setdefault(group.name, group)
    _check_coverage(model, decisions)
    if ALGORITHMS[matrices].needs_matrices:  # a control ignores the settings of what it stands for
        check_options(parsed, [(group.override, group.algorithm) for group in groups.values()])

    ordered = sorted(groups.values(), key=lambda group: group.rank(parsed))
    return Routing(
        tuple(decisions),
        {group.name: group.entries() for group in ordered},
        notes(decisions, tree.backbone, matrices, rest, lora_as_matrices=bool(LORA_ROLES[lora])),
        matrices,
        rest,
    )


def check_lora(lora: object) -> None:
    """Check an argument ``lora``.

    Raises:
        ValueError: It is none of those that are known.
    """
    _check_choice("lora", lora, LORA_ROLES)


@dataclass(frozen=True)
class _Group:
    """What parameters must have in common to share a group. ``override`` is set where it brings options."""

    algorithm: str
    as_matrices: bool
    batched: bool
    transposed: bool
    decays: bool
    override: Override | None

    @property
    def needs_matrices(self) -> bool:
        return ALGORITHMS[self.algorithm].needs_matrices

    @property
    def name(self) -> str:
        flags = {
            # In a control one algorithm trains the matrices and the rest, so its name does not tell them apart.
            "matrices": self.as_matrices and not self.needs_matrices,
            "experts": self.batched,
            "transposed": self.transposed,
            "no-decay": not self.decays,
        }
        base = "-".join([self.algorithm, *(flag for flag, is_set in flags.items() if is_set)])
        return base if self.override is None else f"{base} [{self.override.pattern}]"

    def rank(self, overrides: Sequence[Override]) -> tuple[bool, int, bool, bool, bool]:
        """Sort key: matrices first, then groups without options, then the plainest storage."""
        position = -1 if self.override is None else overrides.index(self.override)
        return not self.as_matrices, position, self.batched, self.transposed, not self.decays

    def entries(self) -> dict[str, Any]:
        flags = {"batched": self.batched, "transposed": self.transposed} if self.needs_matrices else {}
        entries: dict[str, Any] = {
            "algorithm": self.algorithm,
            **{name: True for name, is_set in flags.items() if is_set},
        }
        if not self.decays:
            entries["weight_decay"] = 0.0
        return entries if self.override is None else entries | options_for(self.algorithm, self.override)


def _decide(
    parameter: nn.Parameter, tree: ModelTree, override: Override | None, lora: str, matrices: str, rest: str
) -> tuple[Decision, _Group | None]:
    path, shape = tree.paths[parameter][0], tuple(parameter.shape)
    role, reason = classify(parameter, tree)
    if role is Role.FROZEN:
        return Decision(path.name, shape, role, False, "frozen", reason, None, False, False, parameter), None

    as_matrices = role in MATRIX_ROLES | LORA_ROLES[lora]
    algorithm = matrices if as_matrices else rest
    if role in LORA_ROLES[lora]:
        reason = f'LoRA factor, lora="{lora}"'
    transposed, batched = storage_of(parameter, path)
    if override is not None:
        by = f"override `{override.pattern}`"
        if override.algorithm is None:
            reason = f"{reason}; {by}"
        else:
            as_matrices, algorithm, reason = ALGORITHMS[override.algorithm].needs_matrices, override.algorithm, by
        transposed = transposed if override.transposed is None else override.transposed
        batched = batched if override.batched is None else override.batched
        if as_matrices:
            check_matrices(parameter, path.name, batched, override, algorithm, rest)
            if not ALGORITHMS[matrices].needs_matrices:
                algorithm = matrices  # a control trains all matrices by one algorithm, also those of an override
    if not as_matrices:
        transposed = batched = False

    options = override if override is not None and override.options else None
    decays = _decays(parameter, path) or (options is not None and "weight_decay" in options.options)
    group = _Group(algorithm, as_matrices, batched, transposed, decays, options)
    decision = Decision(
        path.name, shape, role, as_matrices, algorithm, reason, group.name, transposed, batched, parameter
    )
    return decision, group


def _decays(parameter: nn.Parameter, path: ModulePath) -> bool:
    # Mamba marks parameters that must not decay with this attribute.
    marked = getattr(parameter, "_no_weight_decay", False)
    return parameter.ndim >= 2 and not is_bias(path) and not marked


def _check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    if value not in list(choices):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_coverage(model: nn.Module, decisions: Sequence[Decision]) -> None:
    routed = Counter(id(each.parameter) for each in decisions if each.group is not None)
    trainable = Counter(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if routed != trainable:
        raise RuntimeError(
            f"{len(trainable)} trainable parameters became {routed.total()} in the groups; this is a bug in "
            f"dion2_lightning, please report it with the class of the model, {type(model).__name__}"
        )
