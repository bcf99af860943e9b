"""The optimizer: parameter groups, their state, ``step()`` and checkpoints.

The updates themselves are in update.py and adamw.py.
"""

import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from dion2_lightning.adamw import adamw_state, adamw_update
from dion2_lightning.checkpoint import match_state_dict, restore_exactly, shares_memory
from dion2_lightning.exchange import check_agreement, on_any_rank, place_gradients, refuse_unreachable
from dion2_lightning.groups import (
    check_names,
    check_parameters,
    check_settings,
    parameter_names,
    plain_dtype,
    refuse_flattened,
    refuse_float64,
)
from dion2_lightning.layout import Layouts, is_dtensor, local_gradient, refuse_misplaced, zeros_like
from dion2_lightning.orthonormalize import default_dtype
from dion2_lightning.selection import Selection
from dion2_lightning.sharing import update_matrices
from dion2_lightning.update import MatrixUpdate, Observer

if TYPE_CHECKING:  # some builds of torch have no process groups
    from torch.distributed import ProcessGroup

Group = dict[str, Any]

HALF_PRECISION: Final = (torch.bfloat16, torch.float16)
NOT_SETTINGS: Final = ("params", "param_names", "initial_lr")
"""Entries of groups that say nothing about the update."""

LEFT_BEHIND: Final = {
    "process_group": "its process group, so it updates redundantly on every rank",
    "orthonormalize": "its custom orthonormalization, so it uses the package's own",
}
"""What a copy or an unpickled optimizer lacks: a process group cannot be copied, a callable not always."""


class Dion2(Optimizer):
    r"""Dion2 for matrices and AdamW for everything else, in one optimizer.

    Each step selects from every matrix the ``fraction`` of rows or columns of its momentum with the largest L1 norms,
    orthonormalizes only those, decays their momentum and updates only those; weight decay touches every entry
    (Dion2, arXiv 2512.16928). With ``fraction=1`` this is Muon without Nesterov momentum.

    .. math::
        M \leftarrow M + G, \quad
        K = \operatorname{top}_k \lVert M_i \rVert_1, \quad
        O = \operatorname{polar}(M_K), \quad
        M_K \leftarrow \mu M_K, \quad
        X \leftarrow (1 - \eta\lambda) X, \quad
        X_K \leftarrow X_K - \eta\, s\, \sqrt{n/k}\; O

    A selected slice alone decays, so ``momentum`` :math:`\mu` remembers about :math:`1/((1-\mu)\cdot\text{fraction})`
    steps: 0.95 at a quarter is 80. A short fine-tuning wants less; :math:`\mu^{n/k}`, 0.81 here, has Muon's horizon.

    A group says by ``algorithm`` what updates it, ``"dion2"`` (the default) or ``"adamw"``, and may override every
    setting below but ``orthonormalize`` and ``process_group``. A ``"dion2"`` group holds matrices, stored (out, in), or
    (in, out) if it says ``transposed=True``; with ``batched=True`` it holds stacks of matrices, whose first axis counts
    them. :func:`~dion2_lightning.build_optimizer` makes such groups from a model.

    Args:
        params: Parameters, named parameters or groups of them, as for every ``torch.optim`` optimizer.
        lr: Learning rate, a float (default: 3e-4).
        fraction: Share of the slices to select, in (0, 1]; k = max(1, ceil(fraction n)) of n (default: 0.25).
        momentum: Decay rate of the selected slices' momentum, in [0, 1) (default: 0.95).
        weight_decay: Decoupled: every step multiplies all weights by 1 - lr * weight_decay (default: 0.01).
        adjust_lr_fn: The scale s of a matrix's update. ``"match_rms_adamw"``: 0.2 sqrt(max(out, in)), AdamW's learning
            rates carry over (arXiv 2502.16982); ``"original"`` or None: sqrt(max(1, out/in)), as in torch.optim.Muon;
            ``"spectral"``: sqrt(out/in), as in the authors' code; ``"none"``: 1 (default: ``"match_rms_adamw"``).
        scale_lr_by_fraction: Multiply the orthonormal update, not the weight decay, by sqrt(n/k), so that one learning
            rate fits every fraction (Dion3, arXiv 2608.11612). False is the Dion2 paper's literal rule: users of the
            authors' code keep their learning rate with False (default: True).
        select: ``"shorter"`` selects along the shorter axis of (out, in), output slices at a tie; ``"output"`` always
            selects output slices (default: ``"shorter"``).
        orthonormalize: A callable (batch, k, m) -> the same shape instead of Polar Express (default: None).
        orthonormalize_dtype: Precision of the orthonormalization, ``"bfloat16"``, ``"float32"`` or ``"float64"``. None
            chooses what the hardware multiplies fastest: bfloat16 on CUDA and on CPUs built for it, else float32
            (default: None).
        state_dtype: Precision of the matrices' momentum. None: float32 for bfloat16 and float16 parameters, else the
            parameter's own (default: None).
        betas: AdamW's decay rates (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator (default: 1e-8).
        check_finite: Raise an error that names the parameter when a gradient holds NaN or Inf, before any weight or
            state is touched. Costs one synchronisation with the device every step (default: False).
        process_group: The ranks that hold replicas of the plain parameters, with the same gradients, as under DDP. They
            share the work. Without it every rank updates its replicas by itself, with the same result. DTensors need
            none: their mesh says who shares them (default: None).
        share_replicas: Whether ranks that hold replicas, as under DDP and HSDP, share the work on them: True, False, or
            None, where it saves more than sending the results costs (default: None).

    Raises:
        TypeError: An argument or a group's entry has the wrong type.
        ValueError: An argument or a group's entry is out of range or unknown, or a parameter has no update under its
            algorithm.

    Example::

        optimizer = Dion2(
            [
                {"params": matrices},
                {"params": embeddings, "algorithm": "adamw", "lr": 1e-3},
                {"params": biases_and_norms, "algorithm": "adamw", "weight_decay": 0.0},
            ],
            lr=3e-4,
        )
    """

    # Values are set on the instance: a framework's wrapper of an optimizer shows what is on the class as its own.
    orthonormalize: Callable[[Tensor], Tensor] | None
    process_group: "ProcessGroup | None"
    share_replicas: bool | None
    observer: Observer | None
    """What looks on at every step; see :class:`~dion2_lightning.SelectionStatistics`. A copy has none."""
    route_parameters: Callable[[list[Tensor]], list[Group]] | None
    """Splits parameters that are added later without ``algorithm`` into groups; set where the model is known."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        *,
        fraction: float = 0.25,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adjust_lr_fn: str | None = "match_rms_adamw",
        scale_lr_by_fraction: bool = True,
        select: str = "shorter",
        orthonormalize: Callable[[Tensor], Tensor] | None = None,
        orthonormalize_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        check_finite: bool = False,
        process_group: "ProcessGroup | None" = None,
        share_replicas: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "fraction": fraction,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn,
            "scale_lr_by_fraction": scale_lr_by_fraction,
            "select": select,
            "orthonormalize_dtype": orthonormalize_dtype,
            "state_dtype": state_dtype,
            "betas": betas,
            "eps": eps,
            "check_finite": check_finite,
        }
        check_settings(defaults)
        if orthonormalize is not None and not callable(orthonormalize):
            raise TypeError(f"orthonormalize must be callable or None, got {type(orthonormalize).__name__}")
        if process_group is not None and not callable(getattr(process_group, "size", None)):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}; of a "
                "mesh, pass mesh.get_group()"
            )
        check_settings({"share_replicas": share_replicas})
        self.orthonormalize = orthonormalize
        self.process_group = process_group
        self.share_replicas = share_replicas
        self.observer = None
        self.route_parameters = None
        self._selections: dict[Tensor, Selection] = {}
        self._failure: str | None = None
        self._is_agreed = False
        if isinstance(params, Tensor):
            raise TypeError("params must be parameters or groups in a list, got a single tensor")
        groups = list(cast(Iterable[Any], params))
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        groups = [{"algorithm": "dion2", **group} if isinstance(group, dict) else group for group in groups]
        super().__init__(groups, _plain(defaults))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, checked before anything changes.

        A group that does not say its ``algorithm`` is split by the rules that split the model, where
        :func:`~dion2_lightning.build_optimizer` made this optimizer.

        Args:
            param_group: ``params``, and whatever differs from the constructor's settings.

        Raises:
            TypeError: An entry has the wrong type.
            ValueError: An entry is out of range or unknown, a parameter has no update under the group's algorithm or is
                in a group already, or the algorithm is not said and the model not known.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = _named(param_group)
        if "algorithm" not in group:
            for routed in self._route(group):
                self.add_param_group(routed)
            return
        where = f"group {group.get('name', len(self.param_groups))!r}: "
        check_names(group, self.defaults, where)
        check_settings(group, where)
        group = {"batched": False, "transposed": False, **_plain(group)}
        check_parameters({**self.defaults, **group}, {p for other in self.param_groups for p in other["params"]}, where)
        group["name"] = self._unique_name(group)
        self._is_agreed = False
        super().add_param_group(group)

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
                settings need.
            RuntimeError: Ranks that share a matrix disagree about its settings, or an earlier step failed in between.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_after_failure()
        self._refuse_without_update()
        self._agree()
        self._check_gradients()
        is_first = not self.state
        self._create_state()
        self._selections = {}
        left_out = self._rehearsed() if is_first and not any(group["lr"] for group in self.param_groups) else set()
        observer = None if left_out else self.observer
        if observer is not None:
            observer.begin_step()
        updates = list(self._matrix_updates(left_out, observer))
        self._failure = "step() failed"
        self._selections = update_matrices(
            updates,
            self.orthonormalize,
            self.share_replicas,
            self._fingerprint(),
            meanwhile=lambda: self._update_others(left_out),
        )
        if observer is not None:
            observer.end_step()
        self._failure = None
        return loss

    def _matrix_updates(self, left_out: Collection[Tensor], observer: Observer | None) -> Iterator[MatrixUpdate]:
        """What each matrix parameter brings to the step, also without a gradient: other ranks may have it."""
        layouts: Layouts = {}
        for group, parameter, what in self._parameters("dion2"):
            if parameter not in left_out and parameter.requires_grad:
                momentum = self.state[parameter]["momentum"]
                yield MatrixUpdate.of(parameter, what, momentum, group, self.process_group, observer, layouts)

    def _fingerprint(self) -> int:
        """A number made of the settings of all groups, which ranks that share matrices must have in common."""
        settings = [[(k, v) for k, v in group.items() if k not in NOT_SETTINGS] for group in self.param_groups]
        return zlib.crc32(repr(settings).encode())

    def _update_others(self, left_out: Collection[Tensor]) -> None:
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                present = [p for p in group["params"] if p.grad is not None and p.requires_grad and p not in left_out]
                adamw_update(present, self.state, group)

    def selection_of(self, parameter: Tensor) -> Selection | None:
        """Return what the last step selected of a parameter.

        Args:
            parameter: A parameter of a ``"dion2"`` group.

        Returns:
            The selection, with indices on the parameter's device; None if there was no step since the start or the last
            load, or no gradient in it.

        Raises:
            ValueError: The parameter is in no ``"dion2"`` group of this optimizer.
        """
        if parameter in self._selections:
            return self._selections[parameter]
        matrices = (p for group in self.param_groups if group["algorithm"] == "dion2" for p in group["params"])
        if not any(parameter is matrix for matrix in matrices):
            raise ValueError(
                f"parameter of shape {tuple(parameter.shape)} is in no group with algorithm='dion2', so nothing is "
                "selected of it"
            )
        return None

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore state and groups, exactly: a momentum wider than its parameter is not rounded.

        Parameters are matched by name where both sides know the names, else by position. Settings that the checkpoint
        does not know keep their present values.

        Args:
            state_dict: What :meth:`state_dict` returned; ``state`` and ``params`` may hold names instead of numbers.

        Raises:
            ValueError: The checkpoint is of another model or optimizer; the error says what differs. Nothing has been
                loaded; where ``torch.distributed.checkpoint`` has read the file into this optimizer's state before it
                called this, ``step()`` refuses until something that fits is loaded.
        """
        matched: StateDict = {}

        def match(_: Optimizer, incoming: StateDict) -> StateDict:
            try:
                matched.update(match_state_dict(incoming, self.param_groups))
            except ValueError:
                if shares_memory(incoming, self.state):
                    self._failure = "load_state_dict() failed"
                raise
            return matched

        # As the last hook it sees what the other hooks made of the input.
        with self.register_load_state_dict_pre_hook(match):
            super().load_state_dict(state_dict)
        restore_exactly(self, matched)
        self._selections = {}
        self._failure = None

    def state_dict(self) -> StateDict:
        """Return state and groups, as every ``torch.optim`` optimizer does.

        Raises:
            RuntimeError: The last step failed in between, so they may be half updated.
        """
        self._refuse_after_failure()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied, and remember that it was there."""
        left_behind = [name for name in LEFT_BEHIND if getattr(self, name) is not None]
        kept = {"_failure": self._failure, "share_replicas": self.share_replicas}
        return {**super().__getstate__(), **kept, "_left_behind": left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's or a checkpoint's state; groups from an older version get the settings they lack."""
        state = dict(state)
        for name in state.pop("_left_behind", ()):
            warnings.warn(
                f"this copy of Dion2 has lost {LEFT_BEHIND[name]}; set its attribute {name!r} again", stacklevel=2
            )
        super().__setstate__(state)
        self._selections = {}
        self._is_agreed = False
        for name in ("_failure", "orthonormalize", "process_group", "share_replicas", "observer", "route_parameters"):
            self.__dict__.setdefault(name, None)
        for group in self.param_groups:
            for name, default in {**self.defaults, "algorithm": "dion2", "batched": False, "transposed": False}.items():
                if name != "differentiable":
                    group.setdefault(name, default)

    def _route(self, group: Group) -> list[Group]:
        if self.route_parameters is None:
            raise ValueError(
                "the added group does not say which algorithm updates it, and the model is not known; call "
                "add_param_group({'params': ..., 'algorithm': 'dion2'}) for matrices, and with 'adamw' for the rest"
            )
        options = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
        return [{**routed, **options} for routed in self.route_parameters(group["params"])]

    def _unique_name(self, group: Mapping[str, Any]) -> str:
        taken = [other["name"] for other in self.param_groups]
        name = str(group.get("name", group["algorithm"]))
        candidates = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
        return next(candidate for candidate in candidates if candidate not in taken)

    def _parameters(self, *algorithms: str) -> Iterator[tuple[Group, Tensor, str]]:
        """Every parameter of the algorithms' groups with its group and what to call it in an error."""
        for group in self.param_groups:
            if group["algorithm"] in algorithms:
                for parameter, name in zip(group["params"], parameter_names(group), strict=True):
                    yield group, parameter, f"group {group['name']!r}: {name}"

    def _refuse_without_update(self) -> None:
        """Refuse parameters that cannot be updated as they are placed now, before ranks talk to each other."""
        for _, parameter, what in self._parameters("dion2", "adamw"):
            refuse_flattened(parameter, what)
            refuse_misplaced(parameter, what)
        for group, parameter, what in self._parameters("dion2"):
            refuse_float64(parameter, what, group)

    def _check_gradients(self) -> None:
        """Refuse gradients that have no update, before weights or state are touched."""
        everything = list(self._parameters("dion2", "adamw"))
        for _, parameter, what in everything:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(f"{what} has a gradient stored as {parameter.grad.layout}; use sparse=False")
        place_gradients(parameter for _, parameter, _ in everything)
        checked = [
            (what, parameter, ~_everywhere(parameter, torch.isfinite).all())
            for group, parameter, what in everything
            if group["check_finite"]
        ]
        if not checked:
            return
        names, parameters, flags = zip(*checked, strict=True)
        for what, is_broken in zip(names, on_any_rank(flags, parameters, self.process_group), strict=True):
            if is_broken:
                raise FloatingPointError(f"{what} has a gradient with NaN or Inf; no weight and no state was changed")

    def _agree(self) -> None:
        """Once, before anything is shared: every rank must have the same parameters and settings."""
        if self._is_agreed:
            return
        shared = [each for each in self._parameters("dion2", "adamw") if is_dtensor(each[1]) or self.process_group]
        for _, parameter, what in shared:
            refuse_unreachable(parameter, what, self.process_group)
        plain = {id(group): [(k, v) for k, v in group.items() if k not in NOT_SETTINGS] for group in self.param_groups}
        descriptions = [
            repr((tuple(p.shape), p.dtype, default_dtype(p.device), self.share_replicas, plain[id(group)]))
            for group, p, _ in shared
        ]
        check_agreement(descriptions, [parameter for _, parameter, _ in shared], self.process_group)
        self._is_agreed = True

    def _create_state(self) -> None:
        """Create the state of every trainable parameter, gradient or not.

        A checkpoint that lacks some cannot be loaded by ``torch.distributed.checkpoint``.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter, group)

    def _rehearsed(self) -> set[Tensor]:
        """What a first step leaves out: everything, where every gradient is zero and lr is 0, on every rank.

        By such a step ``torch.distributed.checkpoint`` makes an optimizer create its state; no more may come of it.
        """
        parameters = [parameter for _, parameter, _ in self._parameters("dion2", "adamw")]
        flags = [_everywhere(parameter, torch.Tensor.bool).any() for parameter in parameters]
        moving = on_any_rank(flags, parameters, self.process_group)
        return set() if any(moving) else set(parameters)

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            names = ", ".join(repr(group["name"]) for group in self.param_groups)
            raise RuntimeError(
                f"an earlier {self._failure} in between, so weights and state of the groups {names} may be half "
                "updated; load model and optimizer from a checkpoint (load_state_dict) before going on"
            )


def _everywhere(parameter: Tensor, test: Callable[[Tensor], Tensor]) -> Tensor:
    """What a test says of every entry of a gradient, zero where there is none."""
    gradient = local_gradient(parameter)
    return test(torch.zeros((1,), device=parameter.device) if gradient is None else gradient)


def _new_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    if group["algorithm"] == "adamw":
        return adamw_state(parameter)
    dtype = torch.float32 if parameter.dtype in HALF_PRECISION else parameter.dtype
    if group["state_dtype"] is not None:
        dtype = getattr(torch, group["state_dtype"])
    return {"momentum": zeros_like(parameter, dtype)}


def _plain(settings: Mapping[str, Any]) -> Group:
    """Settings as plain data, which every checkpoint format and ``weights_only`` loading take."""
    dtypes = {name: plain_dtype(settings[name]) for name in ("orthonormalize_dtype", "state_dtype") if name in settings}
    return {**settings, **dtypes}


def _named(param_group: Group) -> Group:
    """A copy of a group with its parameters in a list, and their names, if given, in another."""
    group = dict(param_group)
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("params must be in a fixed order, got a set; pass a list")
    group["params"] = [params] if isinstance(params, Tensor) else list(params)
    pairs = [entry for entry in group["params"] if isinstance(entry, tuple)]
    if pairs:
        if len(pairs) < len(group["params"]):
            raise ValueError("params mixes named and unnamed parameters; name all or none")
        group["param_names"] = [name for name, _ in pairs]
        group["params"] = [parameter for _, parameter in pairs]
    return group
