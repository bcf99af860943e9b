"""The optimizer: parameter groups, their state, ``step()`` and checkpoints. It names no algorithm."""

import gc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from dion2_lightning.algorithms import ALGORITHMS
from dion2_lightning.algorithms.algorithm import (
    Algorithm,
    Member,
    Observer,
    StateTensor,
    StepContext,
    StepWork,
    default_working_memory,
)
from dion2_lightning.algorithms.hyperparameters import (
    StepSettings,
    check_values,
    checks_of,
    defaults_of,
    numbers,
    plain,
)
from dion2_lightning.capture import refuse_capture
from dion2_lightning.compiled import add_to_table, compilable, compilable_in_schedule
from dion2_lightning.compressed import (
    CompressedReplicas,
    compressed_parameters,
    is_compressing,
    refuse_without_replicas,
)
from dion2_lightning.distributed.clipping import clip_grad_norm_
from dion2_lightning.distributed.collectives import (
    RanksAround,
    check_agreement,
    place_gradients,
    refuse_unreachable,
)
from dion2_lightning.distributed.overlap import run_side_by_side
from dion2_lightning.distributed.replicas import compare_gradients
from dion2_lightning.kernels.fused import is_capturing
from dion2_lightning.kernels.gate import Gate
from dion2_lightning.kernels.selection import Selection
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.layout import is_dtensor, moved, number_of_parts
from dion2_lightning.matrices.views import ObservedParameter
from dion2_lightning.offload import Offloading, Visit, cut_into_visits, kept, offloaded_bytes
from dion2_lightning.parameter_groups import (
    Group,
    algorithm_of,
    check_names,
    check_parameters,
    labelled_parameters,
    parameter_names,
    refuse_misplaced_rates,
    tensor_rates,
    unique_name,
    unwrapped_names,
    warn_of_lost_decay,
    with_listed_parameters,
)
from dion2_lightning.state_dict import (
    carry_over_state,
    match_state_dict,
    restore_exactly,
    restore_in_place,
    shares_memory,
)
from dion2_lightning.step_checks import (
    check_gradients,
    check_kinds_of_gradients,
    check_placements,
    check_settings,
    creates_state_alone,
    descriptions_of,
    gradients_are_finite,
    settings_of,
)

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

NOT_COPIED: Final = {
    "process_group": "its process group, so it updates redundantly on every rank",
    "orthonormalize": "its custom orthonormalization, so it uses the package's own",
}
"""What a copy or an unpickled optimizer lacks: a process group cannot be copied, a callable not always."""

STEP_SETTINGS: Final = defaults_of(StepSettings)
"""Attributes that say how steps are taken, with their defaults; a copy or an unpickled optimizer has them too."""


class MatrixOptimizer(Optimizer):
    """An optimizer whose groups say which algorithm updates them.

    Args:
        params: Parameters, named parameters or groups of them, as for every ``torch.optim`` optimizer. A group's
            ``algorithm`` is one of ``dion2_lightning.algorithms.ALGORITHMS``; without one it is ``default_algorithm``.
        settings: By name: hyperparameters, for the groups whose algorithms have them and that do not say otherwise; and
            attributes of the optimizer, which are ``orthonormalize``, ``process_group`` and the fields of
            :class:`~dion2_lightning.algorithms.hyperparameters.StepSettings`.

    Raises:
        TypeError: An argument or a group's entry has the wrong type.
        ValueError: An argument or a group's entry is out of range or unknown, or a parameter cannot be updated by its
            algorithm.
    """

    default_algorithm: ClassVar[str]

    # Values are set on the instance: a framework's wrapper of an optimizer shows what is on the class as its own.
    orthonormalize: Callable[[Tensor], Tensor] | None
    process_group: "ProcessGroup | None"
    share_replicas: bool | None
    max_grad_norm: float | None
    working_memory: int | None
    kernels: Literal["auto", "torch", "triton"]
    offload: Literal["cpu"] | None
    grad_norm: Tensor | None
    """The norm of all gradients in the last step, before ``max_grad_norm`` clipped it; 0-d, on their device."""
    observer: Observer | None
    """Receives the events of every step; see :class:`~dion2_lightning.SelectionTracker`. A copy has none."""
    fallbacks: Counter[str]
    """How often a faster way of computing has failed and a slower one was taken, by the name of the faster one."""
    route_parameters: Callable[[list[Tensor], Mapping[str, Any]], list[Group]] | None
    """Splits parameters that are added later without ``algorithm`` into groups; set where the model is known."""

    def __init__(self, params: ParamsT, settings: Mapping[str, Any]) -> None:
        settings = dict(settings)
        for name, default in {**dict.fromkeys(NOT_COPIED), **STEP_SETTINGS}.items():
            setattr(self, name, settings.pop(name, default))
        self._check_attributes()
        for algorithm in ALGORITHMS.values():
            algorithm.check_settings(settings)
        self.grad_norm = None
        self.observer = None
        self.fallbacks = Counter()
        self.route_parameters = None
        self._settings = plain(settings)
        self._given: dict[str, Group] = {}
        self._selections: dict[tuple[Tensor, str], Selection] = {}
        self._skipped_steps: Tensor | int = 0
        self._left: dict[object, Tensor] = {}
        self._failure: str | None = None
        self._is_agreed = False
        self._compared: set[Tensor] = set()
        self._compressed = CompressedReplicas()
        self._offloading = Offloading()
        if isinstance(params, Tensor):
            raise TypeError("params must be parameters or groups in a list, got a single tensor")
        given: Any = params
        if isinstance(given, nn.Module) and not isinstance(given, nn.ParameterList):
            raise TypeError(
                f"params must be parameters or groups, got a {type(given).__name__}; build_optimizer(model, lr=...) "
                "makes groups of a model"
            )
        if isinstance(params, set):
            raise TypeError("params must be in a fixed order, got a set; pass a list")
        groups = list(cast(Iterable[Any], params))
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        groups = [
            {"algorithm": self.default_algorithm, **group} if isinstance(group, dict) else group for group in groups
        ]
        # Only what all algorithms have: schedulers that cycle momentum or betas look for them here, and refuse.
        lr = self._settings.get("lr", ALGORITHMS[self.default_algorithm].defaults()["lr"])
        super().__init__(groups, {"lr": lr})
        warn_of_lost_decay(self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, checked before anything changes.

        A group that does not say its ``algorithm`` is split by the rules that split the model, where
        :func:`~dion2_lightning.build_optimizer` made this optimizer. Its entries go to the parts whose algorithm has
        them, a weight decay to what decays, and the parts' names begin with its ``name``.

        Args:
            param_group: ``params``, and whatever differs from the constructor's settings.

        Raises:
            TypeError: An entry has the wrong type.
            ValueError: An entry is out of range or unknown, a parameter cannot be updated by the group's algorithm or
                is in a group already, or the algorithm is not said and the model not known.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = with_listed_parameters(param_group)
        checked = [self._checked(each) for each in ([group] if "algorithm" in group else self._route(group))]
        self._is_agreed = False
        self._compared.clear()
        for each in checked:
            name = unique_name(each, self.param_groups)
            given = numbers(each)  # as they are now: tensors change in place
            super().add_param_group({**each, "name": name, "given_lr": given["lr"]})
            self._given[name] = {setting: given[setting] for setting in algorithm_of(each).defaults()}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients enabled (default: None).

        Returns:
            What ``closure`` returned.

        Raises:
            FloatingPointError: A gradient holds NaN or Inf, where ``check_finite`` asks for the check.
            ValueError: A gradient is sparse, a parameter is sharded in a way that has no update, it is offloaded to
                where its ranks do not communicate, or it is on a device that has no float64, which its ranks or
                settings need; or settings ask for replicas that there are not.
            RuntimeError: Ranks that share a matrix disagree about its settings; or gradients have been averaged over
                replicas that must not be, or have not been that must; or an earlier step failed partway through; or a
                CUDA graph is captured that cannot hold the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
        with _collector_paused(), _without_autocast(devices):
            self._take_step()
        return loss

    def _take_step(self) -> None:
        """Update every parameter that has a gradient."""
        self._refuse_after_failure()
        if is_capturing():
            refuse_capture(self)
        groups = self.param_groups
        self._check_attributes()
        check_settings(groups)
        ranks = self._ranks()
        self._compressed.refuse_change(groups)
        check_placements(
            groups, self.state, is_offloaded=self.offload is not None, needs_triton=self.kernels == "triton"
        )
        check_kinds_of_gradients(groups)
        self._check_agreement()
        self._check_averaged()
        parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        place_gradients(parameters)
        check_gradients(groups, ranks)
        creates_state = not self.state and creates_state_alone(groups, ranks)
        if not creates_state:  # torch.distributed.checkpoint takes such a step with rates of its own
            for group in groups:
                refuse_misplaced_rates(group, f"group {group['name']!r}: ")
        if self.is_compressing and self.process_group is not None:
            self._compressed.average(list(labelled_parameters(groups)), groups, self.process_group)
        gates = self._gates()
        if self.max_grad_norm is not None:
            norm = clip_grad_norm_(parameters, self.max_grad_norm, replicas=self._compressed_parameters())
            self.grad_norm = self._left_in_place("grad_norm", norm)
        self._prepare_state()
        selections: dict[tuple[Tensor, str], Selection] = {}
        members = [] if creates_state else self._members()
        working_memory = self._working_memory()
        visits = [Visit(members, size=0)]
        if self.offload is not None and any(map(offloaded_bytes, members)):
            working_memory //= 2  # the other half is for the state of two visits
            visits = cut_into_visits(members, working_memory)
        context = StepContext(
            settings_checksum=zlib.crc32(repr([settings_of(group) for group in groups]).encode()),
            orthonormalize=self.orthonormalize,
            process_group=self.process_group,
            share_replicas=self.share_replicas,
            working_memory=working_memory,
            kernels=self.kernels,
            observer=None if creates_state else self.observer,
            selections=selections,
            fallbacks=self.fallbacks,
            gates=gates,
        )
        if context.observer is not None:
            context.observer.begin_step()
        plans = {visit: self._plan(visit.members, context) for visit in visits}
        self._failure = "step() failed"
        for visit in self._offloading.in_turn(visits, working_memory):
            work = plans.pop(visit)
            run_side_by_side(
                [step for each in work for step in each.waiting], [piece for each in work for piece in each.local]
            )
        self._selections = {
            key: Selection(axis, self._left_in_place(key, indices)) for key, (axis, indices) in selections.items()
        }
        if context.observer is not None:
            context.observer.end_step()
        self._compressed.momenta_differ |= bool(self._compressed_parameters()) and not creates_state
        self._failure = None

    def selection_of(self, parameter: Tensor, block: str = "") -> Selection | None:
        """Return what the last step selected of a parameter.

        Args:
            parameter: A parameter of whose matrices slices are selected.
            block: Name of the block of a parameter that is split, such as ``"q"`` (default: none, it is not).

        Returns:
            The selection, with indices on the parameter's device; None if there was no step since the start or the last
            load, or no gradient in it. With ``capturable`` a load keeps it, and the next step overwrites it.

        Raises:
            TypeError: It is no parameter.
            ValueError: The parameter is in no group whose algorithm selects slices, or has no block of that name.
        """
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameter must be a parameter of a group, got {type(parameter).__name__}")
        if (parameter, block) in self._selections:
            return self._selections[parameter, block]
        observed = [each.observed for each in self.observed_parameters() if each.parameter is parameter]
        blocks = [each.matrices.name for each in observed if each.selected]
        if not blocks:
            raise ValueError(
                f"parameter of shape {tuple(parameter.shape)} is in no group whose algorithm selects slices of matrices"
            )
        if block not in blocks:
            known = f"has the blocks {', '.join(map(repr, blocks))}; name one" if blocks != [""] else "is not split"
            raise ValueError(f"block={block!r}: the parameter of shape {tuple(parameter.shape)} {known}")
        return None

    @property
    def skipped_steps(self) -> int:
        """How many steps ``check_finite="skip"`` has skipped since the optimizer was made; waits for the device."""
        return int(self._skipped_steps)

    def observed_parameters(self) -> list[ObservedParameter]:
        """Return the parameters, and blocks of parameters, that statistics observe, in the order of the groups."""
        found = []
        for group in self.param_groups:
            given, names = group.get("param_names"), parameter_names(group)
            names = names if given is None else given
            for parameter, name in zip(group["params"], names, strict=True):
                for observed in ALGORITHMS[group["algorithm"]].observed(parameter, group):
                    block = observed.matrices.name
                    label = f"{name}[{block}]" if block else name
                    found.append(ObservedParameter(parameter, group["name"], label, given is not None, observed))
        return found

    @property
    def is_compressing(self) -> bool:
        """Whether replicas are to send less than the gradients of some groups, as with ``sync="compressed"``."""
        return is_compressing(self.param_groups)

    def replicas(self) -> "dict[Tensor, ProcessGroup]":
        """Return the parameters whose gradients differ between replicas when ``step()`` is called.

        Returns:
            Each with the ranks that hold its replicas, for :func:`~dion2_lightning.clip_grad_norm_`. Those that are
            compressed, and on meshes all others too, as ``step()`` averages their gradients.
        """
        if self.process_group is None or not self.is_compressing:
            return {}
        on_meshes = {
            each: self.process_group for group in self.param_groups for each in group["params"] if is_dtensor(each)
        }
        return {**on_meshes, **self._compressed_parameters()}

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average the momenta that replicas keep apart with ``sync="compressed"``: before a checkpoint, on every rank.

        Weights stay as they are, and so do the updates to come, up to rounding. Without such replicas, or where nothing
        has changed since the last call, it does nothing.
        """
        self._offloading.wait()
        self._compressed.synchronize(self.param_groups, self.state, self.process_group)

    @property
    def consolidate_state_dict(self) -> Callable[[], None]:
        """:meth:`synchronize`, by the name under which Lightning and Fabric call it on every rank before they save."""
        if not self.is_compressing:
            raise AttributeError("consolidate_state_dict: there is nothing to do before state_dict()")
        return self.synchronize

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore state and groups, exactly: a momentum wider than its parameter is not rounded.

        Parameters are matched by name where both sides know the names, else by position. The checkpoint's settings
        replace those that this optimizer was given, and a warning names the ones that differ; settings that the
        checkpoint does not know keep their present values. Rates that are tensors here stay these tensors and are
        filled; with ``capturable`` state is, too, so that captured graphs go on with what was loaded.

        Args:
            state_dict: What :meth:`state_dict` returned; ``state`` and ``params`` may hold names instead of numbers.

        Raises:
            ValueError: The checkpoint is of another model or optimizer; the error says what differs. Nothing has been
                loaded; where ``torch.distributed.checkpoint`` has read the file into this optimizer's state before it
                called this, ``step()`` refuses until something that fits is loaded.
        """
        self._load(state_dict, [self._given.get(group["name"], {}) for group in self.param_groups])

    def _load(self, state_dict: StateDict, given: Sequence[Mapping[str, Any]]) -> None:
        """Load it, and warn where its settings are not those that the groups were given."""
        matched: StateDict = {}

        def match(_: Optimizer, incoming: StateDict) -> StateDict:
            try:
                matched.update(match_state_dict(incoming, self.param_groups, given))
            except ValueError:
                if shares_memory(incoming, self.state):
                    self._failure = "load_state_dict() failed"
                raise
            if self.offload is None:
                return matched
            return {**matched, "state": {key: {} for key in matched["state"]}}  # torch would take it to the device

        self._offloading.wait()
        rates = [tensor_rates(group) for group in self.param_groups]
        before = {parameter: dict(state) for parameter, state in self.state.items() if isinstance(parameter, Tensor)}
        left = self._selections, self.grad_norm

        def restore(_: Optimizer) -> None:
            restore_exactly(self, matched, self._state_of)
            restore_in_place(self, rates, before, self._state_of)

        # The last of the hooks before sees what the others made of the input, the first one after comes before theirs.
        with (
            self.register_load_state_dict_pre_hook(match),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)
        if self.is_capturable:  # replays go on to write there
            self._selections, self.grad_norm = left
        self._compressed.momenta_differ = False
        self._failure = None

    def carry_over(self, state_dict: StateDict) -> None:
        """Go on with the state of a checkpoint that other algorithms have written, as far as it means the same.

        Where algorithms keep the same momentum, a run can change from one to another. What depends on settings, such as
        the neurons' variances, starts anew, and a warning says so; what the present algorithm has no use for is
        left out. The settings stay as they are, learning rates included. Parameters are matched by name where both
        sides know the names, else by position.

        A checkpoint that only a framework can read, or that is sharded in another way, is loaded into an optimizer of
        the algorithm that wrote it; then pass that optimizer's ``state_dict()``.

        Args:
            state_dict: As :meth:`load_state_dict` takes it.

        Raises:
            ValueError: The checkpoint is of another model, or an algorithm cannot go on with another one's state.
                Nothing has been loaded.
        """
        self._load(carry_over_state(state_dict, self.param_groups), [{} for _ in self.param_groups])

    def state_dict(self) -> StateDict:
        """Return state and groups, as every ``torch.optim`` optimizer does.

        Raises:
            RuntimeError: The last step failed partway through, so they may be half updated; or replicas have momenta of
                their own, which nobody has averaged.
        """
        self._refuse_after_failure()
        if self._compressed.momenta_differ:
            raise RuntimeError(
                "replicas have momenta of their own with sync='compressed', and a checkpoint holds those of one: call "
                "optimizer.synchronize() on every rank first. Under the Trainer SynchronizeCallback() does"
            )
        self._offloading.wait()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied, and remember that it was there."""
        self._offloading.wait()
        lost = [name for name in NOT_COPIED if getattr(self, name) is not None]
        kept = {
            name: getattr(self, name) for name in ("_given", "_settings", "_compressed", "_failure", *STEP_SETTINGS)
        }
        return {**super().__getstate__(), **kept, "_lost": lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's or a checkpoint's state; groups from an older version get the settings they lack."""
        state = dict(state)
        for name in state.pop("_lost", ()):
            warnings.warn(
                f"this copy of {type(self).__name__} has lost {NOT_COPIED[name]}; set its attribute {name!r} again",
                stacklevel=2,
            )
        super().__setstate__(state)
        self._selections, self.grad_norm, self._is_agreed, self._compared = {}, None, False, set()
        new = {
            **dict.fromkeys((*NOT_COPIED, "_failure", "observer", "route_parameters")),
            **STEP_SETTINGS,
            "fallbacks": Counter(),
            "_compressed": CompressedReplicas(),
            "_given": {},
            "_left": {},
            "_offloading": Offloading(),
            "_skipped_steps": 0,
        }
        for name, value in new.items():  # a load comes here too, with state and groups alone
            self.__dict__.setdefault(name, value)
        for group in self.param_groups:
            group.update(self._with_settings(ALGORITHMS[group["algorithm"]], group))

    def _patch_step_function(self) -> None:
        """Wrap ``step`` in its hooks, as torch does, and have ``torch.compile`` look into neither."""
        super()._patch_step_function()
        kind = type(self)
        if not hasattr(kind.step, "is_compilable"):
            kind.step = compilable(kind.step)  # type: ignore[method-assign]
        if "_name_in_table" not in self.__dict__:  # a load comes here too, and graphs are of a name
            self._name_in_table = add_to_table(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a capturable step stays compilable where a scheduler counts its steps."""
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched") and self.is_capturable:
            value = compilable_in_schedule(self, value)
        super().__setattr__(name, value)

    def _checked(self, group: Group) -> Group:
        """A group with all settings, checked with its parameters."""
        group = with_listed_parameters(group)
        prefix = f"group {group.get('name', len(self.param_groups))!r}: "
        algorithm = algorithm_of(group, prefix)
        check_names(group, algorithm, prefix)
        group = self._with_settings(algorithm, plain(group))
        algorithm.check_settings(group, prefix)
        check_parameters(group, {p for other in self.param_groups for p in other["params"]}, prefix)
        if self.param_groups and ("param_names" in group) != (are_named := "param_names" in self.param_groups[0]):
            wanted = "(name, parameter) pairs" if are_named else "parameters without names"
            raise ValueError(f"{prefix}params must be {wanted}, as in the other groups")
        return group

    def _with_settings(self, algorithm: Algorithm, group: Mapping[str, Any]) -> Group:
        """A group with what it does not say: the constructor's settings, then the algorithm's defaults."""
        defaults = algorithm.defaults()
        given = {name: value for name, value in self._settings.items() if name in defaults}
        return {**defaults, **given, **group}

    def _route(self, group: Group) -> list[Group]:
        if self.route_parameters is None:
            raise ValueError(
                "the added group does not say which algorithm updates it, and the model is not known; call "
                f"add_param_group({{'params': ..., 'algorithm': ...}}) with one of {', '.join(map(repr, ALGORITHMS))}"
            )
        options = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
        groups = self.route_parameters(group["params"], options)
        if "name" in group:
            groups = [{**each, "name": f"{group['name']}-{each['name']}"} for each in groups]
        return groups

    def _members(self) -> list[Member]:
        """The parameters of a step, also those without a gradient: other ranks may have it."""
        names = [name for group in self.param_groups for name in unwrapped_names(group)]
        return [
            Member(parameter, self.state[parameter], group, label, name)
            for (group, parameter, label), name in zip(labelled_parameters(self.param_groups), names, strict=True)
            if parameter.requires_grad
        ]

    def _plan(self, members: Sequence[Member], context: StepContext) -> list[StepWork]:
        """What each algorithm does with its parameters."""
        by_algorithm = group_by(members, lambda member: member.group["algorithm"])
        return [ALGORITHMS[name].step(its_members, context) for name, its_members in by_algorithm.items()]

    def _check_attributes(self) -> None:
        """Refuse attributes that say nothing; they may be set at any time."""
        orthonormalize, process_group = self.orthonormalize, self.process_group
        if orthonormalize is not None and not callable(orthonormalize):
            raise TypeError(f"orthonormalize must be callable or None, got {type(orthonormalize).__name__}")
        if isinstance(process_group, int):  # torch.distributed.GroupMember.NON_GROUP_MEMBER
            raise ValueError(
                f"this rank is not in process_group, for which new_group() has returned {process_group}; make the "
                "optimizer on the ranks that are, or pass None"
            )
        if process_group is not None and not callable(getattr(process_group, "size", None)):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}; of a "
                "mesh, pass mesh.get_group()"
            )
        check_values({name: getattr(self, name) for name in STEP_SETTINGS}, checks_of(StepSettings))

    def _gates(self) -> dict[torch.device, Gate]:
        """What lets the step through on each device, where ``check_finite`` asks to skip it for a bad gradient.

        All ranks decide alike, and all groups are skipped together.
        """
        is_open = gradients_are_finite(self.param_groups, self._ranks())
        if is_open is None:
            return {}
        self._skipped_steps = self._left_in_place("skipped_steps", self._skipped_steps + is_open.logical_not())
        devices = dict.fromkeys(parameter.device for group in self.param_groups for parameter in group["params"])
        return {device: Gate(is_open.to(device)) for device in devices}

    def _check_agreement(self) -> None:
        """Compare parameters and settings with the other ranks: at the first step, after loads and added groups."""
        if self._is_agreed:
            return
        labelled = list(labelled_parameters(self.param_groups))
        shared = [each for each in labelled if is_dtensor(each[1]) or self.process_group]
        for _, parameter, label in shared:
            refuse_unreachable(parameter, label, self._ranks())
        if self.is_compressing:
            group = refuse_without_replicas(labelled, self.process_group, self.share_replicas)
            self._compressed.refuse_other_weights(labelled, group)
        attributes = {name: getattr(self, name) for name in STEP_SETTINGS if name != "kernels"}
        steps = [self._steps_of(parameter, group) for group, parameter, _ in shared]
        descriptions = descriptions_of(shared, attributes, steps)
        check_agreement(descriptions, [parameter for _, parameter, _ in shared], self._ranks())
        self._is_agreed = True

    def _steps_of(self, parameter: Tensor, group: Mapping[str, Any]) -> int | None:
        """How many steps replicas have taken that share work, in which those differ that have loaded other files."""
        is_shared = ALGORITHMS[group["algorithm"]].shares_replicas(self.share_replicas) and not is_dtensor(parameter)
        return int(self.state.get(parameter, {}).get("step", 0)) if is_shared else None

    def _check_averaged(self) -> None:
        """Compare gradients where replicas share work, of each parameter once: no setting says what averages them."""
        if self.process_group is None or self.is_compressing:
            return
        new = {
            parameter
            for group in self.param_groups
            if ALGORITHMS[group["algorithm"]].shares_replicas(self.share_replicas)
            for parameter in group["params"]
            if parameter.requires_grad and parameter not in self._compared and not is_dtensor(parameter)
        }
        everything = labelled_parameters(self.param_groups) if new else ()
        labelled = [(parameter, label) for _, parameter, label in everything if parameter in new]
        # Zeros, as in the step by which torch.distributed.checkpoint loads, say nothing: once more at the next step.
        if labelled and compare_gradients(labelled, self.process_group):
            self._compared |= new

    def _working_memory(self) -> int:
        """How many bytes a step may take; the same on all ranks, which form the same batches and buckets."""
        if self.working_memory is not None:
            return self.working_memory
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        shared = parameters if self.process_group is not None else [*filter(is_dtensor, parameters)]
        held = sum(each.nbytes // number_of_parts(each) for each in shared or parameters)
        return default_working_memory(held)

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph may hold a step, as all groups say."""
        return all(group["capturable"] for group in self.param_groups)

    def _left_in_place(self, key: object, value: Tensor) -> Tensor:
        """Return what a step leaves; of a capturable one always in one tensor, into which replays of it write, too."""
        if not self.is_capturable or is_dtensor(value):
            return value
        known = self._left.setdefault((key, value.shape, value.device), value)
        return known if known is value else known.copy_(value)

    def _ranks(self) -> RanksAround:
        """The ranks that have a part or a replica of what this one has."""
        return RanksAround(self.process_group, of_meshes_too=self.is_compressing)

    def _compressed_parameters(self) -> "dict[Tensor, ProcessGroup]":
        """The parameters whose gradients are not averaged over replicas, each with the ranks that hold these."""
        if self.process_group is None:
            return {}
        return {parameter: self.process_group for _, parameter in compressed_parameters(self.param_groups)}

    def _prepare_state(self) -> None:
        """Create the state of every trainable parameter, gradient or not, and let what there is follow its parameter.

        A checkpoint that lacks some cannot be loaded by ``torch.distributed.checkpoint``. And ``model.to(...)`` moves
        and casts parameters, which leaves their state behind.
        """
        for group in self.param_groups:
            algorithm = ALGORITHMS[group["algorithm"]]
            # Asked for where device or dtype are others than the last parameter's: to compare is all that most need.
            device, dtype, expected = None, None, dict[str, StateTensor]()
            for parameter, name in zip(group["params"], unwrapped_names(group), strict=True):
                if not parameter.requires_grad:
                    continue
                state = self.state[parameter]
                if not state:
                    whole = self._state_of(parameter, group).items()
                    self.state[parameter] = {entry: tensor.start_for(parameter, name) for entry, tensor in whole}
                    continue
                if parameter.device != device or parameter.dtype != dtype:
                    device, dtype = parameter.device, parameter.dtype
                    expected = self._state_of(parameter, group)
                for entry in filter(
                    algorithm.depends_on_settings, state.keys() - expected.keys()
                ):  # asked for no longer
                    del state[entry]
                for entry, like in expected.items():
                    if entry not in state:  # a setting asks for it from now on
                        state[entry] = self._state_of(parameter, group)[entry].start_for(parameter, name)
                    tensor = state[entry]
                    if tensor.device != like.device or tensor.dtype != like.dtype:
                        self._offloading.wait()
                        state[entry] = moved(tensor, like.device, like.dtype)

    def _state_of(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, StateTensor]:
        """What the state of a parameter consists of, and where it is kept."""
        whole = ALGORITHMS[group["algorithm"]].state(parameter, group)
        return whole if self.offload is None else {entry: kept(tensor) for entry, tensor in whole.items()}

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            names = ", ".join(repr(group["name"]) for group in self.param_groups)
            raise RuntimeError(
                f"an earlier {self._failure} partway through, so weights and state of the groups {names} may be half "
                "updated; load model and optimizer from a checkpoint (load_state_dict) before going on"
            )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, for all threads of the process.

    A step makes some twenty objects for each matrix, which are freed without it. They would make it search all objects
    of the process, time and again: that took a sixth of a step of 210 small matrices.
    """
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _without_autocast(devices: Collection[str]) -> Iterator[None]:
    """Have nothing rounded by an autocast block that a step is taken in, as Lightning's manual optimization has it."""
    with ExitStack() as stack:
        for device in devices:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
