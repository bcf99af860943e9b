"""The argument ``overrides``: reading it, matching its patterns to parameters, and errors that say what to change."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.routing.model_tree import ModelTree, collapse_numbers


@dataclass(frozen=True)
class Override:
    """One entry of ``overrides``. None leaves a property as it was.

    Attributes:
        pattern: Shell pattern of parameter names.
        algorithm: Name of an algorithm.
        transposed: Whether a matrix is stored as (in, out).
        batched: Whether the leading axis counts matrices.
        options: Entries for a parameter group.
    """

    pattern: str
    algorithm: str | None = None
    transposed: bool | None = None
    batched: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_overrides(overrides: Mapping[str, str | Mapping[str, Any]]) -> list[Override]:
    """Read the argument ``overrides``.

    Raises:
        ValueError: If a value names an unknown algorithm, or sets what cannot be set.
        TypeError: If a value is neither a string nor a mapping.
    """
    return [_parse(pattern, value) for pattern, value in overrides.items()]


def options_for(algorithm: str, override: Override) -> dict[str, Any]:
    """Return the options that a group of an algorithm takes: all but the settings of other algorithms."""
    return {name: value for name, value in override.options.items() if not _belongs_elsewhere(name, algorithm)}


def check_options(overrides: Sequence[Override], groups: Sequence[tuple[Override | None, str]]) -> None:
    """Refuse an option that no group of its override takes.

    Args:
        overrides: All of them.
        groups: The override and the algorithm of every parameter group.

    Raises:
        ValueError: An option has no effect.
    """
    for override in overrides:
        algorithms = [algorithm for its_override, algorithm in groups if its_override is override]
        for name in override.options:
            if all(_belongs_elsewhere(name, algorithm) for algorithm in algorithms):
                trained_by = ", ".join(sorted(set(map(repr, algorithms))))
                raise ValueError(
                    f"override {override.pattern!r}: {name!r} has no effect on what it matches, which is trained by "
                    f"{trained_by}; remove it or change the pattern"
                )


def _belongs_elsewhere(name: str, algorithm: str) -> bool:
    """Return whether a setting is another algorithm's, and not this one's."""
    if name in ALGORITHMS[algorithm].defaults():
        return False
    return any(name in other.defaults() for other in ALGORITHMS.values())


def assign_overrides(overrides: Sequence[Override], tree: ModelTree) -> dict[nn.Parameter, Override]:
    """Find the override of each parameter that has one: the first whose pattern matches one of its names.

    Raises:
        ValueError: If a pattern has no effect.
    """
    assigned: dict[nn.Parameter, Override] = {}
    for override in overrides:
        matched = [
            parameter
            for parameter, paths in tree.paths.items()
            if any(fnmatchcase(path.name, override.pattern) for path in paths)
        ]
        new = [parameter for parameter in matched if parameter.requires_grad and parameter not in assigned]
        if not new:
            raise ValueError(f"override {override.pattern!r} {_why_no_effect(override, matched, assigned, tree)}")
        assigned.update(dict.fromkeys(new, override))
    return assigned


def check_matrices(
    parameter: nn.Parameter, name: str, batched: bool, override: Override, algorithm: str, rest: str
) -> None:
    """Check that a parameter holds matrices, where an override sends it to an algorithm that needs them.

    Raises:
        ValueError: If it holds none, or their number of axes does not fit ``batched``.
    """
    subject = f"override {override.pattern!r} sends {name!r} of shape {tuple(parameter.shape)} to {algorithm}, but"
    if not parameter.is_floating_point():
        raise ValueError(f"{subject} its dtype {parameter.dtype} is not real; send it to {rest}")
    if batched and parameter.ndim != 3:
        raise ValueError(f"{subject} batched=True needs 3 axes, the first one to count matrices; remove it")
    if parameter.ndim == 3 and not batched:
        raise ValueError(f"{subject} it has 3 axes; add batched=True if the first one counts matrices, or use {rest}")
    if parameter.ndim not in (2, 3):
        raise ValueError(f"{subject} it is not a matrix; narrow the pattern or send it to {rest}")


def _parse(pattern: str, value: object) -> Override:
    if not isinstance(value, str | Mapping):
        known = ", ".join(map(repr, ALGORITHMS))
        raise TypeError(f"override {pattern!r}: expected {known} or a mapping of group options, got {value!r}")
    options: dict[str, Any] = {"algorithm": value} if isinstance(value, str) else dict(value)
    algorithm = options.pop("algorithm", None)
    if algorithm is not None and algorithm not in list(ALGORITHMS):
        raise ValueError(
            f"override {pattern!r}: the algorithm must be {' or '.join(map(repr, ALGORITHMS))}, got {algorithm!r}; "
            "to leave parameters out, call requires_grad_(False) on them"
        )
    if reserved := options.keys() & {"params", "param_names", "name"}:
        raise ValueError(f"override {pattern!r}: {', '.join(sorted(reserved))} cannot be set, routing does that")
    flags = {key: options.pop(key, None) for key in ("transposed", "batched")}
    for key, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise ValueError(f"override {pattern!r}: {key} must be True or False, got {flag!r}")
    return Override(pattern, algorithm, **flags, options=options)


def _why_no_effect(
    override: Override, matched: list[nn.Parameter], assigned: dict[nn.Parameter, Override], tree: ModelTree
) -> str:
    """The end of an error that begins with the pattern: what it matches, and what to do about it."""
    taken = sorted({assigned[parameter].pattern for parameter in matched if parameter in assigned})
    if taken:
        return (
            f"has no effect: earlier patterns ({', '.join(map(repr, taken))}) take every trainable parameter that it "
            "matches, and the first match wins; move it up or remove it"
        )
    if matched:
        return (
            f"matches frozen parameters only, such as {tree.paths[matched[0]][0].name!r}; unfreeze them before "
            "building the optimizer, or remove the pattern"
        )
    names = {
        collapse_numbers(path.name): None
        for parameter, paths in tree.paths.items()
        for path in paths
        if parameter.requires_grad
    }
    close = difflib.get_close_matches(override.pattern, list(names), n=3, cutoff=0.4)
    hint = f" (close names: {', '.join(map(repr, close))})" if close else ""
    return (
        f"matches no parameter{hint}; a pattern has to cover the whole name, as '*.q_proj.weight' does, and is "
        "case-sensitive; correct or remove it"
    )
