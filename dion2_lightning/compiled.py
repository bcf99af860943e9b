"""``torch.compile`` of a step: one operator in its graph, into which it does not look.

The step itself runs as it is. The graph passes it parameters, gradients, state and rates, which in a graph without
mutations are other tensors than the optimizer's, and learns which of them it changes.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dion2_lightning.matrices.layout import is_dtensor
from dion2_lightning.parameter_groups import tensor_rates

NOT_COMPILED: Final = (
    "step() of Dion2 runs as it is, with a graph break: it reads groups and placements anew and may wait for other "
    "ranks; with capturable=True, no closure, no offload and no DTensors it is an operator of the graph, else compile "
    "without fullgraph=True"
)
"""What torch.compile says of a step where it was asked for one graph."""

_OPTIMIZERS: Final = weakref.WeakValueDictionary[str, Any]()
_NUMBERS: Final = itertools.count()


def add_to_table(optimizer: Optimizer) -> str:
    """Return a name by which the operator finds an optimizer as long as that lives."""
    name = f"{type(optimizer).__name__} {next(_NUMBERS)}"
    _OPTIMIZERS[name] = optimizer
    return name


def compilable(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method ``step`` that dynamo takes for the operator where that can be, else for a break of the graph.

    What is compiled inside of it, such as the model that a closure calls, stays compiled.
    """
    uncompiled = torch.compiler.disable(step, reason=NOT_COMPILED)
    torch.compiler.assume_constant_result(_prepare)  # not a decorator: it imports dynamo, which takes seconds

    @functools.wraps(step)
    def compilable_step(self: Any, *args: Any, **keywords: Any) -> Any:
        if (
            torch.compiler.is_dynamo_compiling()
            and all(each is None for each in (*args, *keywords.values()))  # closure=None is none
            and self.offload is None  # a step would replace the state, and the graph keep what was there
            and _prepare(self._name_in_table)
        ):
            return _call_operator(self)
        return uncompiled(self, *args, **keywords)

    compilable_step.is_compilable = True  # type: ignore[attr-defined]
    return compilable_step


def compilable_in_schedule(optimizer: Optimizer, step: Callable[..., Any]) -> Callable[..., Any]:
    """Make a step compilable that a learning rate scheduler has wrapped: dynamo refuses to look into the wrapper."""
    reference = weakref.ref(optimizer)

    def step_of_optimizer(_: Any, *args: Any, **keywords: Any) -> Any:
        return step(*args, **keywords)

    compilable_step = compilable(step_of_optimizer)

    @functools.wraps(step)
    def compilable_scheduled_step(*args: Any, **keywords: Any) -> Any:
        return compilable_step(reference(), *args, **keywords)

    return compilable_scheduled_step


def _prepare(name: str) -> bool:
    """Return whether a step can be an operator, and create the state, while dynamo traces: the graph gets it passed."""
    optimizer = _OPTIMIZERS[name]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not optimizer.is_capturable or any(is_dtensor(parameter) for parameter in parameters):
        return False
    with torch.no_grad():
        optimizer._prepare_state()
    return True


def _call_operator(optimizer: Any) -> None:
    """Pass the operator what a step reads and changes; dynamo traces this, and guards it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    state = [tensor for parameter in parameters for tensor in optimizer.state.get(parameter, {}).values()]
    rates = [tensor for group in optimizer.param_groups for tensor in tensor_rates(group).values()]
    have_gradients = [parameter.grad is not None for parameter in parameters]
    with torch.no_grad():
        torch.ops.dion2.step(parameters, gradients, have_gradients, state, rates, optimizer._name_in_table)


# Inductor's own CUDA graphs leave it out: a replay of them would run no hooks, and keep floats as they were.
@torch.library.custom_op(
    "dion2::step", mutates_args=("parameters", "gradients", "state"), tags=(torch.Tag.cudagraph_unsafe,)
)
def _step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    have_gradients: Sequence[bool],
    state: Sequence[Tensor],
    rates: Sequence[Tensor],
    name: str,
) -> None:
    """Take a step of an optimizer on what a graph passes.

    What a compiled function assigns to ``grad`` is there only after its graph has run.
    """
    optimizer = _OPTIMIZERS[name]
    present = iter(gradients)
    of_parameters = [next(present) if has_gradient else None for has_gradient in have_gradients]
    with _replaced(optimizer, iter(parameters), iter(of_parameters), iter(state), iter(rates)):
        optimizer.step()


_step.register_fake(lambda *_: None)  # it returns nothing, whatever it is given


@contextlib.contextmanager
def _replaced(
    optimizer: Any,
    parameters: Iterator[Tensor],
    gradients: Iterator[Tensor | None],
    state: Iterator[Tensor],
    rates: Iterator[Tensor],
) -> Iterator[None]:
    """Have parameters, gradients, state and rates of an optimizer be other tensors, in the order they are passed in.

    Raises:
        RuntimeError: State was replaced meanwhile; the graph would go on with what it was before.
    """
    placed = []
    undo = contextlib.ExitStack()
    with undo:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = next(parameters).detach()
                undo.callback(setattr, parameter, "grad", parameter.grad)
                gradient = next(gradients)
                parameter.grad = None if gradient is None else gradient.detach()
                entries = optimizer.state.get(parameter, {})  # of a frozen one there are none
                undo.callback(entries.update, dict(entries))
                entries.update({entry: next(state) for entry in entries})
                placed.append((entries, dict(entries)))
            its_rates = tensor_rates(group)
            undo.callback(group.update, its_rates)
            group.update({name: next(rates) for name in its_rates})
        yield
        if any(entries.get(name) is not tensor for entries, its in placed for name, tensor in its.items()):
            optimizer._failure = "compiled step() failed"
            raise RuntimeError(
                "a compiled step of Dion2 has replaced state that its graph has, as where a hook changes settings or "
                "state; do so outside of it, and load a checkpoint before going on"
            )
