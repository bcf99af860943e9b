"""The argument ``overrides``: reading it, matching its patterns to parameters, and errors that say what to change."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dion2_lightning.algorithms import ALGORITHMS, has_setting
from dion2_lightning.algorithms.algorithm import STORAGE
from dion2_lightning.algorithms.hyperparameters import StepSettings, check_values, checks_of
from dion2_lightning.matrices.splits import check_splits
from dion2_lightning.parameter_groups import ENTRIES, check_parameters
from dion2_lightning.routing.model_tree import ModelTree, collapse_numbers


@dataclass(frozen=True)
class Override:
    """One entry of ``overrides``, or of ``splits``.

    Attributes:
        position: Its place among the overrides.
        pattern: Shell pattern of parameter names.
        algorithm: Name of an algorithm; None leaves it as it was.
        storage: How matrices are stored: entries of a group that :data:`STORAGE` has.
        options: Entries for a parameter group.
        kind: Of which argument it is an entry, for messages.
    """

    position: int
    pattern: str
    algorithm: str | None
    storage: Mapping[str, Any]
    options: Mapping[str, Any]
    kind: str = "override"

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.kind} {self.pattern!r}"

    def options_for(self, algorithm: str) -> dict[str, Any]:
        """Return the options that a group of an algorithm takes: all but the settings of other algorithms."""
        return {name: value for name, value in self.options.items() if has_setting(algorithm, name)}

    def check_options(self, algorithms: Collection[str]) -> None:
        """Refuse an option that none of the algorithms takes that train what it matches."""
        takes_storage = any(ALGORITHMS[algorithm].needs_matrices for algorithm in algorithms if algorithm in ALGORITHMS)
        for name in (*self.options, *self.storage):
            if not (takes_storage if name in self.storage else any(has_setting(each, name) for each in algorithms)):
                raise ValueError(
                    f"{self.label}: {name!r} has no effect on what it matches, which is trained by "
                    f"{', '.join(sorted(map(repr, algorithms)))}; remove it or change the pattern"
                )


def parse_overrides(overrides: Mapping[str, str | Mapping[str, Any]]) -> list[Override]:
    """Read the argument ``overrides``, and refuse unknown algorithms and what cannot be set."""
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a mapping from patterns of names, got {type(overrides).__name__}")
    return [_parse(position, pattern, value) for position, (pattern, value) in enumerate(overrides.items())]


def parse_splits(splits: Mapping[str, str]) -> list[Override]:
    """Read the argument ``splits``, and refuse what is no list of blocks."""
    if not isinstance(splits, Mapping):
        raise TypeError(f"splits must be a mapping from patterns of names, got {type(splits).__name__}")
    for pattern, text in splits.items():
        _check_pattern("splits", pattern)
        check_splits(f"splits {pattern!r}", text)
    return [
        Override(position, pattern, None, {"splits": text}, {}, kind="splits")
        for position, (pattern, text) in enumerate(splits.items())
    ]


def assign_overrides(
    overrides: Sequence[Override], tree: ModelTree, *, refuse_unmatched: bool
) -> dict[nn.Parameter, Override]:
    """Find the override of each parameter that has one: the first whose pattern matches one of its names.

    A pattern without an effect is an error, if it says so.
    """
    assigned: dict[nn.Parameter, Override] = {}
    for override in overrides:
        matched = [
            parameter
            for parameter, paths in tree.paths.items()
            if any(fnmatchcase(path.name, override.pattern) for path in paths)
        ]
        new = [parameter for parameter in matched if parameter.requires_grad and parameter not in assigned]
        if not new and refuse_unmatched:
            raise ValueError(f"{override.label} {_why_no_effect(override, matched, assigned, tree)}")
        assigned.update(dict.fromkeys(new, override))
    return assigned


def check_matrices(
    parameter: nn.Parameter, name: str, storage: Mapping[str, Any], override: Override, algorithm: str
) -> None:
    """Refuse an override that sends to an algorithm for matrices what holds none."""
    group = {**ALGORITHMS[algorithm].defaults(), "algorithm": algorithm, **storage}
    members = {"params": [parameter], "param_names": [name]}
    if parameter.ndim < 2:
        raise ValueError(
            f"{override.label} sends {name!r} of shape {tuple(parameter.shape)} to {algorithm!r}, which needs "
            f"matrices; have the pattern match matrices alone, or put {name!r}: 'adamw' before it"
        )
    check_parameters(group | members, (), f"{override.label}: ")


def _check_pattern(kind: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{kind}: a pattern of names must be a text, got {pattern!r}")


def _parse(position: int, pattern: str, value: object) -> Override:
    _check_pattern("overrides", pattern)
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
    if reserved := options.keys() & set(ENTRIES):
        raise ValueError(f"override {pattern!r}: {', '.join(sorted(reserved))} cannot be set, routing does that")
    if of_step := options.keys() & checks_of(StepSettings).keys():
        raise ValueError(
            f"override {pattern!r}: {', '.join(sorted(of_step))} is of a whole step; pass it to build_optimizer"
        )
    storage = {key: options.pop(key) for key in STORAGE if key in options}
    check_values(storage, {key: STORAGE[key][1] for key in storage}, f"override {pattern!r}: ")
    return Override(position, pattern, algorithm, storage, options)


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
    is_name = not set("*?[") & set(override.pattern)
    names = {
        path.name if is_name else collapse_numbers(path.name): None
        for parameter, paths in tree.paths.items()
        for path in paths
        if parameter.requires_grad
    }
    close = _close_names(override.pattern, list(names))
    hint = f" (close names: {', '.join(map(repr, close))})" if close else ""
    return (
        f"matches no parameter{hint}; a pattern has to cover the whole name, from the model's first module to "
        "'weight', and is case-sensitive; correct or remove it"
    )


def _close_names(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three names that have a part of a pattern, whatever its case, or else are like it."""
    longest = max(pattern.lower().removesuffix(".weight").replace("*", ".").split("."), key=len)
    of_parts = {part: name for name in reversed(names) for part in name.lower().split(".")}
    with_part = [part for part in of_parts if longest and longest in part]
    alike = difflib.get_close_matches(longest, list(of_parts), n=3, cutoff=0.7)
    whole = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    return ([of_parts[part] for part in with_part] or whole or [of_parts[part] for part in alike])[:3]
