"""Bytes that an optimizer step moves, and operations that it issues, by phase: counted from shapes, on any machine.

    python -m benchmarks.traffic --shapes smollm2-135m --layers 6

A step runs on fake CUDA tensors, so that it issues what a GPU would be given. Each operation is counted by one rule:

- Views and allocations cost nothing.
- Any other operation reads each tensor it is given once, and writes its results once. What is changed in place is read
  and written; what is only overwritten, as by ``copy_``, is written. Of expanded tensors only distinct memory counts.
- Where only some places are read or written, as by ``gather``, these count, and their indices.
- A sum or norm in another dtype than its tensor's begins with a conversion of all of it, an operation of its own: torch
  makes it inside, where neither dispatch modes nor fake tensors show it.
- A ``_foreach_`` operation is one operation where torch's multi-tensor kernels take its tensors, else one for each of
  them. A device may need several launches for one; so may a sort.
- Products, with the factorizations among them, are counted apart, without what torch copies inside them.
- Operators of the package's own kernels declare their bytes, and how many launches each is, see :func:`declared`.

What no rule knows is an error. Caches are left out, and so are memory transactions: a byte of a column counts as one,
though a GPU fetches 32 at a time.
"""

import argparse
import inspect
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import kernel_traffic
from benchmarks.fake_tensors import fake_tensors
from benchmarks.step import LAYERS, TRANSPOSED, Build, Sizes
from dion2_lightning import Dion2
from dion2_lightning.algorithms import low_rank, neurons, passes
from dion2_lightning.kernels import orthonormalize

FUNCTIONS: dict[Callable[..., Any], str] = {
    passes.accumulate: "accumulate",
    passes.accumulate_and_sum: "norms",
    passes._accumulate_at_once: "accumulate",
    passes.select: "select",
    passes.take: "take",
    passes.polar_factors: "normalize",
    orthonormalize._normalize: "normalize",
    passes.shrink: "weight decay",
    passes.apply: "apply",
    neurons.square_sums: "neurons",
    neurons.factors: "neurons",
    low_rank.orthonormal: "normalize",
    low_rank.column_norms: "normalize",
    low_rank.apply: "apply",
    _muon._zeropower_via_newtonschulz: "normalize",
}
"""The phase of what a function issues, itself or by calling others that are not here."""

OTHER, PRODUCTS = "other", "products"
PHASES = [*dict.fromkeys(FUNCTIONS.values()), OTHER]
"""All but the products, whose phase goes by the operation."""

NAME, WIDTHS = 27, [max(len(phase) + 1, 7) for phase in PHASES]
"""Widths of the columns that are printed."""

KERNELS = ("torch", "triton")
"""What goes over the memory of matrices."""

OWN_NAMESPACE = "dion2"
"""Operators of this namespace are looked up in kernel_traffic.py."""


class UnknownOperationError(NotImplementedError):
    """An operation without a rule."""


@dataclass(frozen=True)
class Traffic:
    """What some operations of a step came to, added up.

    Attributes:
        operations: How many.
        read: Bytes that they read.
        written: Bytes that they wrote.
    """

    operations: int = 0
    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.operations + other.operations, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        function: The operator's overload.
        arguments: By the names of its schema, in order, defaults included.
        result: What it returned.
        device: Where it counts; tensors elsewhere have no bytes here.
    """

    function: Any
    arguments: Mapping[str, Any]
    result: Any
    device: str

    def tensors(self, values: Any) -> list[Tensor]:
        """Return the tensors on the device among some values."""
        return [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.device.type == self.device]

    def bytes_of(self, values: Any) -> int:
        """Return the bytes of distinct memory of the tensors among some values."""
        return sum({_memory(each): _distinct_bytes(each) for each in self.tensors(values)}.values())


def _distinct_bytes(tensor: Tensor) -> int:
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0]
    return tensor.itemsize * math.prod(sizes)


def _memory(tensor: Tensor) -> object:
    """The same for a tensor and its transpose."""
    axes = sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride > 0
    )
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.itemsize, tuple(axes)


# Rules


def each_once(call: Call) -> Traffic:
    """Every tensor is read once, every result written once; what is changed in place is read and written."""
    schema = call.function._schema
    changed = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    outputs = {each.name for each in schema.arguments if each.is_out}
    read = [value for argument, value in call.arguments.items() if argument not in outputs]
    results = [call.result] if len(schema.returns) == 1 else call.result or []
    new = [value for value, each in zip(results, schema.returns, strict=True) if each.alias_info is None]
    written = call.bytes_of([call.arguments[name] for name in changed]) + call.bytes_of(new)
    return Traffic(_operations(call), call.bytes_of(read), written)


def overwritten(call: Call) -> Traffic:
    """The first argument is written, others are read."""
    target, *others = call.arguments.values()
    return Traffic(_operations(call), call.bytes_of(others), call.bytes_of(target))


def filled(call: Call) -> Traffic:
    """A new tensor is written; one that it is to be like is not read."""
    return Traffic(1, 0, call.bytes_of(call.result))


def reduced(call: Call) -> Traffic:
    """A sum or norm; in another dtype that of a converted copy, as in torch's ATen/native/ReduceOpsUtils.h."""
    source, result = call.arguments["self"], call.result
    reduction = each_once(call)
    is_half = source.dtype in (torch.bfloat16, torch.float16)
    if source.dtype == result.dtype or (is_half and result.dtype == torch.float32 and call.device == "cuda"):
        return reduction
    copied = source.numel() * result.itemsize
    return Traffic(1, call.bytes_of(source), copied) + Traffic(1, copied, reduction.written)


def taken(call: Call) -> Traffic:
    """What is taken is read and written, and indices are read."""
    written = call.bytes_of(call.result)
    return Traffic(1, written + call.bytes_of(call.arguments["index"]), written)


def placed(call: Call) -> Traffic:
    """Some places are overwritten by a number, or by a tensor that is read, at indices that are read."""
    arguments = call.arguments
    source = next(arguments[name] for name in ("source", "src", "value") if name in arguments)
    places = (source if "source" in arguments else arguments["index"]).numel()
    read = min(places * source.itemsize, call.bytes_of(source)) if isinstance(source, Tensor) else 0
    return Traffic(1, read + call.bytes_of(arguments["index"]), places * arguments["self"].itemsize)


def added(call: Call) -> Traffic:
    """The same, but the places are read too."""
    placing = placed(call)
    return Traffic(1, placing.read + placing.written, placing.written)


def fused_adamw(call: Call) -> Traffic:
    """Weights, gradients, moments and step counts are read; weights and moments are written.

    The schema says that gradients are written; they are only where the kernel unscales them.
    """
    changed = [call.arguments[name] for name in ("self", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")]
    if call.arguments["grad_scale"] is not None:
        changed.append(call.arguments["grads"])
    return Traffic(1, call.bytes_of(list(call.arguments.values())), call.bytes_of(changed))


def declared(call: Call) -> Traffic:
    """What an operator of the package's own kernels moves, given all its arguments."""
    name, arguments = _name(call.function), tuple(call.arguments.values())
    try:
        return Traffic(kernel_traffic.launches(name, arguments), *kernel_traffic.traffic(name, arguments))
    except KeyError as error:
        raise UnknownOperationError(f"{call.function} has no rule: add one to benchmarks/kernel_traffic.py") from error


FREE = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "prim::device",
}
"""What moves nothing, besides views."""

EACH_ONCE = {
    *("_local_scalar_dense", "_to_copy", "abs", "clone", "floor", "logical_not", "neg", "reciprocal", "sign", "sqrt"),
    *("add", "sub", "mul", "div", "pow", "lerp", "addcmul", "addcdiv", "clamp", "clamp_min", "copysign", "where"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift"),
    *("all", "any", "amax", "amin", "aminmax", "maximum"),
    *("cat", "stack", "sort"),
}
"""Operations of aten; the names stand for their forms in place and on lists too."""

PRODUCT_NAMES = {"addmm", "baddbmm", "bmm", "linalg_cholesky_ex", "linalg_qr", "linalg_solve_triangular", "mm"}
"""The same for products."""

RULES: dict[str, Callable[[Call], Traffic]] = {
    **dict.fromkeys(("arange", "eye", "full", "ones", "scalar_tensor", "zeros"), filled),
    **dict.fromkeys(("full_like", "ones_like", "zeros_like", "new_full", "new_ones", "new_zeros"), filled),
    **dict.fromkeys(("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"), overwritten),
    **dict.fromkeys(("linalg_vector_norm", "sum"), reduced),
    **dict.fromkeys(("gather", "index_select"), taken),
    **dict.fromkeys(("index_copy_", "scatter_"), placed),
    **dict.fromkeys(("index_add_", "scatter_add_"), added),
    "_foreach_norm": each_once,
    "_fused_adamw_": fused_adamw,
}
"""Operations of aten with a rule of their own."""


def rule_of(function: Any) -> Callable[[Call], Traffic] | None:
    """Return how to count an operator; None where it moves nothing.

    Raises:
        UnknownOperationError: None of the tables above has it.
    """
    if function.namespace == OWN_NAMESPACE:
        return declared
    if function._schema.name in FREE:
        return None
    if function.namespace == "aten":
        if function.is_view:
            return None
        if _name(function) in RULES:
            return RULES[_name(function)]
        if _base(function) in EACH_ONCE | PRODUCT_NAMES:
            return each_once
    raise UnknownOperationError(f"{function} has no rule: add one to the tables of benchmarks/traffic.py")


def _name(function: Any) -> str:
    name: str = function._schema.name.partition("::")[2]
    return name


def _base(function: Any) -> str:
    """The name of an operation whose form in place, or on lists, this may be."""
    return _name(function).removeprefix("_foreach_").removesuffix("_")


def is_product(function: Any) -> bool:
    """Return whether an operator is counted among the products."""
    return function.namespace == "aten" and _base(function) in PRODUCT_NAMES


# Counting


class TrafficCounter(TorchDispatchMode):
    """Counts what the operations of a ``with`` block move on a device.

    Args:
        device: Operations none of whose tensors are there are not counted.
        functions: The phases, see :data:`FUNCTIONS`.

    Attributes:
        by_phase: What was counted.
        flops: Of the products of matrices; factorizations have none here.

    Raises:
        UnknownOperationError: In the block, about an operation that no rule knows.
    """

    def __init__(self, device: str, functions: Mapping[Callable[..., Any], str] = FUNCTIONS) -> None:
        super().__init__()
        self.device = device
        self.by_phase: dict[str, Traffic] = defaultdict(Traffic)
        self.flops = 0
        self._phases: dict[CodeType, str] = {
            inspect.unwrap(function).__code__: phase for function, phase in functions.items()
        }

    @property
    def beside_products(self) -> Traffic:
        """The sum over all phases but the products."""
        return sum((each for phase, each in self.by_phase.items() if phase != PRODUCTS), Traffic())

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        call = Call(function, _by_name(function, arguments, keywords), result, self.device)
        if not call.tensors([arguments, keywords, result]):
            return result
        rule = rule_of(function)
        if rule is None:
            return result
        self.by_phase[PRODUCTS if is_product(function) else self._phase()] += rule(call)
        if is_product(function):
            formula = flop_registry.get(getattr(torch.ops.aten, _base(function)))
            self.flops += 0 if formula is None else formula(*arguments, **keywords, out_val=result)
        return result

    def _phase(self) -> str:
        """The phase of the innermost function on the stack that has one."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code in self._phases:
                return self._phases[frame.f_code]
            frame = frame.f_back
        return OTHER


def _by_name(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the schema, in its order, defaults included."""
    schema = function._schema.arguments
    given = dict(zip((each.name for each in schema), arguments, strict=False)) | dict(keywords)
    return {each.name: given.get(each.name, each.default_value) for each in schema}


def _operations(call: Call) -> int:
    """1; of lists that no multi-tensor kernel takes one for each tensor, as in torch's ATen/native/ForeachUtils.h.

    Copies may be from one dtype to another.
    """
    name = _name(call.function)
    if not name.startswith("_foreach_"):
        return 1
    lists = [value for value in call.arguments.values() if _is_list_of_tensors(value)]
    first = lists[0]
    is_fast = all(
        each.dtype == (others if name == "_foreach_copy_" else first)[0].dtype
        and (each.device, *_layout(each)) == (first[0].device, *_layout(same))
        and is_non_overlapping_and_dense_or_false(each)
        for others in lists
        for each, same in zip(others, first, strict=True)
    )
    return 1 if is_fast else len(first)


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def _layout(tensor: Tensor) -> tuple[torch.Size, list[int]]:
    return tensor.shape, [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


# A table of optimizers


def optimizers(
    shapes: str, kernels: Sequence[str] = KERNELS, working_memory: int | None = None
) -> Iterator[tuple[str, Build]]:
    """Yield what is compared, by name, each with its default weight decay.

    Args:
        shapes: A model of ``benchmarks.step.LAYERS``.
        kernels: Argument of the constructor; for each, there is a row of Dion2 and Dion3 (default: both).
        working_memory: Argument of the constructor.
    """

    def package(chosen: Any = "auto", **settings: Any) -> Build:
        constructor: dict[str, Any] = {"kernels": chosen, "working_memory": working_memory}
        return lambda params: Dion2([{"params": params, "transposed": TRANSPOSED[shapes], **settings}], **constructor)

    yield "torch.optim.AdamW, fused", lambda params: torch.optim.AdamW(params, fused=True)
    yield "torch.optim.AdamW, foreach", lambda params: torch.optim.AdamW(params, foreach=True)
    yield "torch.optim.Muon", lambda params: torch.optim.Muon(params, nesterov=False)
    for each in kernels:
        for name, fraction in (("1", 1.0), ("1/4", 0.25), ("1/8", 0.125)):
            yield f"Dion2 at {name}, {each}", package(each, fraction=fraction)
        yield f"Dion3 at 1/4, {each}", package(each, algorithm="dion3", fraction=0.25)
    yield "Dion at 1/4", package(algorithm="dion", rank_fraction=0.25)


def count_step(
    build: Build, sizes: Sizes, *, device: str = "cuda", dtype: torch.dtype = torch.float32
) -> TrafficCounter:
    """Count the second step of an optimizer on fake tensors; the first one creates its state.

    Args:
        build: Makes the optimizer.
        sizes: Of its parameters, (rows, columns) each.
        device: Whose operations to count; it need not be there.
        dtype: Of the parameters and gradients.
    """
    with fake_tensors():
        parameters: list[Tensor] = [nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) for size in sizes]
        for each in parameters:
            each.grad = torch.zeros_like(each)
        optimizer = build(parameters)
        optimizer.step()
        with TrafficCounter(device) as counter:
            optimizer.step()
    return counter


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=LAYERS, nargs="+", default=["smollm2-135m"], help="default: smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[6], help="decoder layers (default: 6)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        nargs="+",
        default=KERNELS,
        help="kernels of Dion2 and Dion3, a row for each (default: both)",
    )
    parser.add_argument("--working-memory", type=int, help="bytes that a step may take (default: that of the package)")
    parser.add_argument("--only", default="", help="only optimizers whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures to this file, bytes read and written apart")
    chosen = parser.parse_args(arguments)

    tables = [compare(shapes, layers, chosen) for shapes in chosen.shapes for layers in chosen.layers]
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(tables, indent=1) + "\n")


def compare(shapes: str, layers: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Count a step of every optimizer on one model's shapes, print a table, and return its figures."""
    sizes = LAYERS[shapes] * layers
    entries = sum(rows * columns for rows, columns in sizes)
    print(f"\n{shapes}, {layers} layers, {len(sizes)} matrices, {entries / 1e6:.1f}M parameters, {chosen.dtype}")
    print(f"torch {torch.__version__}, fake CUDA tensors; bytes read and written, per parameter")
    print(f"{'':{NAME}}{'bytes by phase, beside products':{sum(WIDTHS)}}{'together':>18}{'products':>17}")
    titles = "".join(f"{phase:>{width}}" for phase, width in zip(PHASES, WIDTHS, strict=True))
    print(f"{'':{NAME}}{titles}{'bytes':>8}{'operations':>11}{'bytes':>8}{'operations':>11}{'GFLOP':>8}")
    figures = {}
    for name, build in optimizers(shapes, chosen.kernels, chosen.working_memory):
        if chosen.only in name:
            counter = count_step(build, sizes, dtype=getattr(torch, chosen.dtype))
            print(f"{name:{NAME}}{_row(counter, entries)}")
            phases = {phase: asdict(counter.by_phase[phase]) for phase in (*PHASES, PRODUCTS)}
            figures[name] = {"phases": phases, "flops": counter.flops}
    settings = {"shapes": shapes, "layers": layers, "dtype": chosen.dtype}
    return {**settings, "torch": torch.__version__, "matrices": len(sizes), "entries": entries, "optimizers": figures}


def _row(counter: TrafficCounter, entries: int) -> str:
    columns = []
    for phase, width in zip(PHASES, WIDTHS, strict=True):
        its = counter.by_phase[phase]
        columns.append(f"{its.moved / entries:{width}.2f}" if its.operations else f"{'-':>{width}}")
    for each in (counter.beside_products, counter.by_phase[PRODUCTS]):
        columns.append(f"{each.moved / entries:8.2f}{each.operations:11}")
    return "".join(columns) + f"{counter.flops / 1e9:8.1f}"


if __name__ == "__main__":
    main()
