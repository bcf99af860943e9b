"""The command ``dion2-routes``: what a step of the optimizer takes of a Hugging Face model, before anything is rented.

    dion2-routes llama --layout fsdp2=8
    dion2-routes Qwen/Qwen3-8B --algorithm dion3 --dtype bfloat16 --batch 4 --length 4096 --json

The model is built from its config on the meta device: no weight is downloaded or made. Every figure is computed from
shapes. A forward and a backward pass are counted as products with weights, 6 FLOPs an active parameter and token, and
of attention 12 a layer, a hidden unit, a token and a token that it sees, half of all where attention is causal.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import torch
from torch import Tensor, nn

from dion2_lightning.algorithms import ALGORITHMS, CHOICES
from dion2_lightning.costs import Layout, Placed, adamw_state_bytes, gradient_bytes, state_bytes, step_costs
from dion2_lightning.factory import Dion2
from dion2_lightning.lists import group_by
from dion2_lightning.matrices.splits import blocks_of
from dion2_lightning.routing.model_tree import number_of
from dion2_lightning.routing.router import Decision, Routing, route_parameters
from dion2_lightning.routing.rules import Role

FRACTIONS: Final = (1.0, 0.5, 0.25, 0.125)
"""Those that are compared."""

LENGTH: Final = 2048
"""Tokens of a sequence, of models with as many positions."""

_AUTO_CLASSES = ("Seq2SeqLM", "SpeechSeq2Seq", "CausalLM", "MaskedLM", "ImageClassification")
_POSITIONS = ("max_target_positions", "n_positions", "max_position_embeddings")
_POSITION_TABLES = ("position_embeddings", "position_embedding")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_LISTED_EXPERT = re.compile(r"(?<!shared_)experts\.(?:expert_)?(\d+)\.")
_OF_ENCODER = re.compile(r"(encoder_attn|EncDecAttention|crossattention)\.([kv]|key|value)")
_WITHOUT_PRODUCT = frozenset({Role.EMBEDDING, Role.VECTOR, Role.OTHER, Role.LORA_OTHER})
_CONVOLUTIONS = frozenset({Role.CONVOLUTION, Role.CONVOLUTION_OTHER})  # and not an embedding of patches
_ATTENDS_TO_ALL = frozenset({"full_attention", "attention", "hybrid"})
_ATTENDS_TO_NONE = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"})
_OF_ATTENTION = (
    *("num_attention_heads", "hidden_size", "num_hidden_layers", "head_dim", "attention_head_dim", "qk_head_dim"),
    *("v_head_dim", "sliding_window", "attention_chunk_size", "layer_types"),
)
_NOT_ONE_NUMBER = "its config does not give one number of heads, or of layers"
_OTHER_WINDOWS = ("attention_window", "window_size")


def load_config(name: str) -> Any:
    """Return the config of a folder, a ``config.json`` file, a model type such as ``"llama"``, or a model of the hub.

    Raises:
        ImportError: transformers is missing.
        ValueError: It is none of them, or transformers refuses it.
    """
    transformers, path = _transformers(), Path(name)
    content: Any = {"model_type": name}
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ValueError(f"folder {name} has no config.json; give the folder of a saved model, or a model type")
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from None
    model_type = content.pop("model_type", None) if isinstance(content, dict) else None
    try:
        with _in_few_words():
            if model_type in transformers.CONFIG_MAPPING:
                return transformers.AutoConfig.for_model(model_type, **content)
            if not path.is_file():
                return transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"{name!r} is not a folder, a file or a model type such as 'llama', and was not found in the cache or on "
            "the hub; check the name, unset HF_HUB_OFFLINE to reach the hub, or give the model's config.json"
        ) from error
    raise ValueError(f"{path} has the model_type {model_type!r}, which transformers does not know")


def build_model(config: Any, dtype: str | None = None) -> nn.Module:
    """Return the model of a config on the meta device: of the class that it names, or else with a head, where one is.

    Args:
        config: Of transformers.
        dtype: Of its weights, ``"float32"`` or ``"bfloat16"`` (default: None, the config's, or else float32).

    Raises:
        ValueError: transformers refuses the config.
    """
    transformers = _transformers()
    named = [getattr(transformers, each, None) for each in config.architectures or ()]
    wanted = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    with torch.device("meta"), _in_few_words():
        if named and named[0]:
            return named[0]._from_config(config).to(wanted)  # type: ignore[no-any-return]
        preferred = [*(f"AutoModelFor{each}" for each in _AUTO_CLASSES), "AutoModel"]
        others = [each for each in dir(transformers) if each.startswith("AutoModelFor") and each not in preferred]
        automatic = [getattr(transformers, each) for each in (*preferred, *others)]
        failed: list[tuple[str, Exception]] = []
        for each in (each for each in automatic if type(config) in each._model_mapping):
            found = each._model_mapping[type(config)]
            build, kind = each.from_config, found
            if isinstance(found, tuple):
                build, kind = found[0]._from_config, found[0]
            try:
                model: nn.Module = build(config).to(wanted)
            except Exception as error:  # MusicGen's decoder cannot be built of the config of all its parts
                failed.append((kind.__name__, error))
                continue
            if failed:
                why = shorten(f"{type(failed[0][1]).__name__}: {failed[0][1]}", 200, placeholder=" ...")
                warnings.warn(f"{kind.__name__} stands for {failed[0][0]}, which cannot be built: {why}", stacklevel=2)
            return model
        if failed:
            raise failed[0][1]
    raise ValueError(f"transformers has no model class for {type(config).__name__}; give the config of a model")


@contextmanager
def _in_few_words() -> Iterator[None]:
    """Turn what transformers raises, of any class and up to a page long, into one line."""
    try:
        yield
    except OSError:  # a name that is not to be had
        raise
    except Exception as error:
        words = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise ValueError(f"transformers cannot build this config: {words}") from error


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with LoRA adapters of a rank on every linear layer but the head, all else frozen.

    Raises:
        ImportError: peft is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("--lora-rank needs peft: pip install peft") from error
    with torch.device("meta"):
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    return adapted


def forward_backward(model: Any, routing: Routing, batch: int, length: int | None = None) -> dict[str, Any]:
    """Return what a forward and a backward pass take, from shapes and the config, and notes on what was assumed.

    A product with a weight takes 2 FLOPs an entry and token, and in the backward pass 2 for the gradient of its input
    and 2 for its own, where it is trained. Embeddings are looked up; where a head is tied to one, that is a product.

    Args:
        model: Of transformers, on any device; it says which weights are trained.
        routing: Of the same parameters, all trained, which says what they are.
        batch: Sequences, or images.
        length: Tokens of each (default: None, 2048, or as many as there are positions for).
    """
    built = {type(module.config) for module in model.modules() if hasattr(module, "config")}
    parts = [each for each in _nested(model.config) if type(each) in built]
    notes = list[str]()
    try:
        config = model.config.get_text_config()
    except ValueError:  # it has one for each of two texts
        config = model.config.get_text_config(decoder=True)
    if parts and type(config) not in built:  # a tower of images, of a model that has one of text too
        config = parts[0]
    length, source = _lengths(model, config, length, notes)
    has_encoder = model.config.is_encoder_decoder
    if any(each is not config for each in parts) and not has_encoder:
        notes.append(f"its parts were all counted at {length:,} tokens; images and sound have lengths of their own")
    if isinstance(getattr(config, "depths", None), list | tuple):
        notes.append("its stages were all counted at the positions of the first; later ones have fewer")

    heads = {id(each) for each in _parameters_of(model, "get_output_embeddings")}
    encoder = {id(each) for each in _parameters_of(model, "get_encoder")} if has_encoder else set()
    convolutions = [each for each in model.modules() if isinstance(each, nn.modules.conv._ConvNd)]
    strides = {id(each): module.stride for module in convolutions for each in module.parameters() if each.ndim > 2}
    of_kernels = [strides.get(id(each.parameter), ()) for each in routing.decisions if each.role in _CONVOLUTIONS]
    if any(len(stride) > 1 or max(stride, default=1) > 1 for stride in of_kernels):
        notes.append("convolutions were counted at one position a token; they may have others")
    decisions = {id(each.parameter): each for each in routing.decisions}
    listed = [int(found[1]) for each in routing.decisions if (found := _LISTED_EXPERT.search(each.name))]
    per_token = next(filter(None, (number_of(each, *_ACTIVE_EXPERTS) for each in (config, *_nested(config)))), None)
    if per_token is None and (listed or any(map(_experts_in, routing.decisions))):
        notes.append("its config does not say how many experts a token goes to; all were counted as active")

    products = active = 0
    for name, parameter in model.named_parameters():
        decision, size = decisions.get(id(parameter)), parameter.numel()
        count = 0
        if decision is not None:  # None of an adapter
            if decision.role in _WITHOUT_PRODUCT and id(parameter) not in heads | strides.keys():
                continue
            count = _experts_in(decision) or (max(listed) + 1 if _LISTED_EXPERT.search(name) else 0)
        if count and per_token is not None:
            size = size * min(per_token, count) // count
        its_tokens = batch * (source if id(parameter) in encoder or _OF_ENCODER.search(name) else length)
        products, active = products + (6 if parameter.requires_grad else 4) * size * its_tokens, active + size
    return {
        "tokens": batch * length,  # of an encoder and a decoder those of the decoder
        "active_parameters": active,  # that a token meets in products
        "products_flops": products,
        "attention_flops": _attention(model, config, batch, length, source, notes),
        "notes": notes,
    }


def _nested(config: Any) -> list[Any]:
    """The configs that a config holds."""
    return [each for each in vars(config).values() if hasattr(each, "to_dict")]


def _differing(config: Any, names: Sequence[str]) -> list[str]:
    """Which entries of a config transformers does not tell, as its layers differ in them."""
    found = []
    for name in names:
        try:
            getattr(config, name, None)
        except Exception:
            found.append(name)
    return found


def _experts_in(decision: Decision) -> int:
    """How many experts a stack of them holds; 0 of any other parameter."""
    if decision.role != Role.EXPERTS:
        return 0
    return decision.shape[0] if decision.batched else sum(each.matrices for each in blocks_of(decision.splits))


def _lengths(model: nn.Module, config: Any, length: int | None, notes: list[str]) -> tuple[int, int]:
    """Tokens of a sequence, and those that an encoder sees in front of a decoder; adds to the notes."""
    positions = number_of(config, *_POSITIONS)
    if positions is not None and length is not None and length > positions:
        notes.append(f"a length of {length:,} is more than the {positions:,} positions of its config")
    default = min(LENGTH, positions or LENGTH)
    vocabulary = getattr(config, "vocab_size", None)
    if not any(isinstance(each, nn.Embedding) and each.num_embeddings == vocabulary for each in model.modules()):
        default = _patches(model, config, notes) or default
    chosen = default if length is None else length
    return chosen, number_of(config, "max_source_positions") or chosen


def _patches(model: nn.Module, config: Any, notes: list[str]) -> int | None:
    """Tokens of images or sound: the rows of the table of positions, or else the patches and one; adds to the notes."""
    tables = [getattr(module, name, None) for module in model.modules() for name in _POSITION_TABLES]
    tables = [each.weight[None] if isinstance(each, nn.Embedding) else each for each in tables]
    rows = [each.shape[1] for each in tables if isinstance(each, Tensor) and each.ndim == 3 and len(each) == 1]
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        return rows[0] if rows else None
    (height, width), (side, other) = (
        tuple(each)[-2:] if isinstance(each, list | tuple) else (each, each) for each in (image, patch)
    )
    patches = (height // side) * (width // other) + 1
    tokens, frames = rows[0] if rows else patches, number_of(config, "num_frames")
    if frames is not None and tokens <= patches:
        notes.append(f"one of its {frames} frames was counted")
    return tokens


def _attention(model: Any, config: Any, batch: int, length: int, source: int, notes: list[str]) -> int:
    """FLOPs between tokens: 12 a layer, a hidden unit, a token and a token that it sees; adds to the notes."""
    differing = _differing(config, _OF_ATTENTION)
    heads, hidden, layers = (number_of(config, each) for each in _OF_ATTENTION[:3])
    if differing or heads is None or hidden is None or layers is None:
        if any("attention" in type(module).__name__.lower() for module in model.modules()):
            why = f"its layers differ in {' and '.join(differing)}" if differing else _NOT_ONE_NUMBER
            notes.append(f"its attention was not counted: {why}")
        return 0
    head = number_of(config, "head_dim", "attention_head_dim") or hidden // heads
    width = heads * ((number_of(config, "qk_head_dim") or head) + (number_of(config, "v_head_dim") or head)) / 2
    if model.config.is_encoder_decoder:
        decoder = number_of(config, "decoder_layers", "num_decoder_layers") or layers
        of_encoder = (number_of(config, "encoder_layers") or layers) * source * source
        return round(12 * width * batch * (of_encoder + decoder * length * (length / 2 + source)))
    is_causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    everything = length / 2 if is_causal else length
    window, chunk = number_of(config, "sliding_window"), number_of(config, "attention_chunk_size")
    in_window = in_chunk = everything
    if window is not None and window < length:  # the first tokens have fewer before them
        in_window = window - window**2 / (2 * length) if is_causal else min(2 * window, length)
    if chunk is not None:
        in_chunk = everything * min(chunk / length, 1)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    reach: float = 0
    for kind in kinds or ["full_attention" if window is None else "sliding_attention"] * layers:
        if kind not in _ATTENDS_TO_NONE:
            reach += in_window if "sliding" in kind else in_chunk if "chunked" in kind else everything
    others = {each for each in kinds or () if "sliding" not in each and "chunked" not in each}
    if others := others - _ATTENDS_TO_NONE - _ATTENDS_TO_ALL:
        notes.append(f"layers of {' and '.join(sorted(others))} were counted as if each token saw all")
    if window is None and any(getattr(config, name, None) for name in _OTHER_WINDOWS):
        notes.append("its windows of attention were not counted: each token sees all")
    return round(12 * width * batch * length * reach)


def costs_of(
    model: nn.Module,
    *,
    algorithm: str = "dion2",
    fraction: float | None = None,
    batch: int = 8,
    length: int | None = None,
    layout: Layout | None = None,
    lora_rank: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Routing, dict[str, Any]]:
    """Return how the optimizer of a model is made, and what a step of it takes, as plain data.

    Args:
        model: Of transformers, on any device.
        algorithm: As ``build_optimizer`` takes it (default: ``"dion2"``).
        fraction: Of the slices to select; of Dion, of the rank (default: None, 0.25).
        batch: Sequences of each rank, or of all together under TP (default: 8).
        length: Tokens of a sequence (default: None, 2048, or as many as there are positions for).
        layout: Of the ranks (default: None, one rank).
        lora_rank: Of the adapters to train instead of the model (default: None, no adapters).
        overrides: As ``build_optimizer`` takes them (default: None).

    Raises:
        ValueError: An argument that has no effect, or is out of range.
    """
    choice, layout = CHOICES[algorithm], layout or Layout()
    known = [name for name in ("fraction", "rank_fraction") if name in ALGORITHMS[choice.matrices].defaults()]
    setting = None if choice.control else next((name for name in known if name not in choice.settings), None)
    if fraction is not None and setting is None:
        raise ValueError(f"--fraction {fraction:g} has no effect with --algorithm {algorithm}; leave it out")
    for name, number in {"batch": batch, "length": length, "lora-rank": lora_rank}.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    model_class, dtype, plan = type(model).__name__, model.dtype, getattr(model, "tp_plan", None) or {}
    whole = route_parameters(model)
    if lora_rank is not None:
        model = add_adapters(model, lora_rank)
    passes = forward_backward(model, whole, batch, length)
    passes["flops"] = passes["products_flops"] + passes["attention_flops"]
    routing = route_parameters(model, overrides=overrides, matrices=choice.matrices, control=choice.control)
    name_of = {id(each.parameter): each.name for each in routing.decisions}

    def groups_at(value: float | None) -> list[dict[str, Any]]:
        given: dict[str, Any] = dict(choice.settings) if setting is None else {**choice.settings, setting: value}
        return Dion2(routing.param_groups(), **given).param_groups

    def place(groups: Iterable[dict[str, Any]]) -> list[Placed]:
        return [
            Placed(each, group, _sharded_dim(each, name_of[id(each)], layout, plan))
            for group in groups
            for each in group["params"]
        ]

    if setting is not None and any(each.low_rank for each in routing.decisions):
        passes["notes"].append(f"factors of rank {lora_rank} are trained at {setting} 1, whatever the row says")
    if setting is not None and fraction is None:
        fraction = ALGORITHMS[choice.matrices].defaults()[setting]
    groups, one = groups_at(fraction), Layout()
    placed = place(groups)
    matrices = {id(each.parameter) for each in routing.decisions if each.as_matrices}
    if layout.kind == "tp" and all(each.dim is None for each in placed if id(each.parameter) in matrices):
        raise ValueError(
            f"--layout tp={layout.shards}: transformers' plan of tensor parallelism for {model_class} cuts none of the "
            "matrices that are trained; choose fsdp2, hsdp or ddp"
        )
    trainable = sum(each.parameter.numel() for each in placed)
    passes["flops_per_rank"] = per_rank = max(1, round(passes["flops"] * layout.batches / layout.ranks))
    rows = []
    for value in [fraction] if fraction is None else sorted({*FRACTIONS, fraction}, reverse=True):
        members = place(groups_at(value))
        step = step_costs(members, layout)
        rows.append(
            {
                "label": algorithm if value is None else f"{algorithm} at {value:g}",
                "fraction": value,
                "state_bytes": step.state,
                "state_bytes_per_parameter": state_bytes(members, one) / trainable,
                "products_flops": step.products,
                "factorizations_flops": step.factorizations,
                "elementwise_flops": step.elementwise,
                "flops": step.flops,
                "share_of_forward_backward": step.flops / per_rank,
                "sums_bytes_sent": step.sums,
                "submatrices_bytes_sent": step.submatrices,
                "bytes_sent": step.sent,
            }
        )
    control = step_costs([Placed(each.parameter, _ADAMW_GROUP, each.dim) for each in placed], layout)
    by_algorithm = group_by(placed, lambda each: each.group["algorithm"])
    return routing, {
        "model": model_class,
        "parameters": sum(each.numel() for each in model.parameters()),
        "trainable_parameters": trainable,
        "active_parameters": passes.pop("active_parameters"),
        "dtype": str(dtype).removeprefix("torch."),
        "algorithm": algorithm,
        "fraction": fraction,
        "layout": {**asdict(layout), "ranks": layout.ranks},
        "batch": batch,
        "tokens": passes.pop("tokens"),
        "notes": passes.pop("notes"),
        "groups": [_group_row(group) for group in groups],
        "state_bytes": {name: state_bytes(members, layout) for name, members in by_algorithm.items()},
        "forward_backward": passes,
        "steps": rows,
        "adamw": {
            "label": "torch's AdamW",
            "state_bytes": adamw_state_bytes(placed, layout),
            "state_bytes_per_parameter": adamw_state_bytes(placed, one) / trainable,
            "flops": control.flops,
            "share_of_forward_backward": control.flops / per_rank,
            "sums_bytes_sent": 0,
            "bytes_sent": 0,
        },
        "gradients_bytes_sent": gradient_bytes(placed, layout),
    }


_ADAMW_GROUP: Final = {"algorithm": "adamw", **ALGORITHMS["adamw"].defaults()}


def _group_row(group: Mapping[str, Any]) -> dict[str, Any]:
    entries = {name: value for name, value in group.items() if name not in ("params", "param_names", "given_lr")}
    return {**entries, "tensors": len(group["params"]), "parameters": sum(each.numel() for each in group["params"])}


def _sharded_dim(parameter: nn.Parameter, name: str, layout: Layout, plan: Mapping[str, str]) -> int | None:
    """Along which dimension ranks hold parts of a parameter; None where each has it whole."""
    if layout.shards == 1 or parameter.ndim == 0:
        return None
    if layout.kind != "tp":
        return 0
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    style = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    if "embedding" in style or ("colwise" in style and parameter.ndim == 1):
        return 0
    if parameter.ndim == 1:
        return None
    return parameter.ndim - 2 if "colwise" in style else parameter.ndim - 1 if "rowwise" in style else None


def render(routing: Routing, figures: Mapping[str, Any]) -> str:
    """Return the report and the figures as text, without a final newline."""
    layout, passes, adamw = figures["layout"], figures["forward_backward"], figures["adamw"]
    ranks = layout["ranks"]
    at = "" if figures["fraction"] is None else f" at {figures['fraction']:g}"
    each = "together" if layout["kind"] == "tp" else "of each"
    on = "one rank" if ranks == 1 else f"{ranks} ranks ({layout['kind']}), {figures['tokens']:,} tokens {each}"
    state = ", ".join(f"{name} {_unit(number, 'B')}" for name, number in figures["state_bytes"].items())
    lines = [
        routing.report(),
        "",
        f"{figures['model']}: {figures['parameters']:,} parameters, {figures['trainable_parameters']:,} trained, in "
        f"{figures['dtype']}; a token meets {figures['active_parameters']:,}",
        f"{figures['algorithm']}{at} on {on}" + (f", {figures['tokens']:,} tokens" if ranks == 1 else ""),
        "",
        f"State of a rank: {state}; torch's AdamW {_unit(adamw['state_bytes'], 'B')}",
        f"Forward and backward, of a rank: {_unit(passes['flops_per_rank'], 'FLOP')}; of a batch: products with "
        f"weights {_unit(passes['products_flops'], 'FLOP')}, attention {_unit(passes['attention_flops'], 'FLOP')}",
        f"Sent by a rank to average gradients, whatever the optimizer: {_unit(figures['gradients_bytes_sent'], 'B')}",
        "",
        "A step of one rank, the one with the most:",
        "",
        _fractions_table(figures),
        *(f"\nNote: {note}." for note in figures["notes"]),
    ]
    return "\n".join(lines)


def _fractions_table(figures: Mapping[str, Any]) -> str:
    cells = [["", "state", "bytes a parameter", "FLOPs", "of forward and backward", "sent", "of it sums"]]
    for step in (*figures["steps"], figures["adamw"]):
        cells.append(
            [
                step["label"],
                _unit(step["state_bytes"], "B"),
                f"{step['state_bytes_per_parameter']:.2f}",
                _unit(step["flops"], "FLOP"),
                f"{step['share_of_forward_backward']:.2%}",
                _unit(step["bytes_sent"], "B"),
                _unit(step["sums_bytes_sent"], "B"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(
        "  ".join([f"{row[0]:{widths[0]}}", *right[1:]]) for row, right in zip(cells, aligned, strict=True)
    )


def _unit(number: float, unit: str) -> str:
    """Three digits and a prefix: 12.3 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or prefix == "P":
            break
        number /= 1000
    return f"{number:.3g} {prefix}{unit}"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("dion2-routes needs transformers: pip install transformers") from error
    return transformers


def _parameters_of(model: nn.Module, method: str) -> list[nn.Parameter]:
    """The parameters of what a method of a transformers model returns; none where it has none."""
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return []
    return list(module.parameters()) if isinstance(module, nn.Module) and module is not model else []


def _overrides(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object; write \'{{"*.q_proj.*": "adamw"}}\'')
    return value


def _layout(text: str) -> Layout:
    try:
        return Layout.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 if the model cannot be read or is not to be had. Wrong arguments exit with 2."""
    parser = argparse.ArgumentParser(
        prog="dion2-routes",
        description="Say what each parameter of a model is trained by, and what a step takes: bytes of state, FLOPs, "
        "bytes sent. Computed from the model's config; no weight is loaded.",
    )
    parser.add_argument("model", help="name on the hub, folder, config.json file, or model type such as llama")
    parser.add_argument("--algorithm", choices=CHOICES, default="dion2", help="default: dion2")
    parser.add_argument("--fraction", type=float, help="share of the slices, or of Dion's rank (default: 0.25)")
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences of each rank, of all together under tp (default: 8)"
    )
    parser.add_argument(
        "--length", type=int, help=f"tokens of a sequence (default: {LENGTH}, or the model's positions)"
    )
    parser.add_argument(
        "--layout", type=_layout, default=Layout(), help="fsdp2=8, ddp=8, hsdp=4x8 or tp=8 (default: one)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: the config's)")
    parser.add_argument("--lora-rank", type=int, help="train LoRA adapters of this rank on every linear layer")
    parser.add_argument("--overrides", type=_overrides, help="as build_optimizer takes them, in JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = vars(parser.parse_args(arguments))
    name, dtype, as_json = (options.pop(each) for each in ("model", "dtype", "json"))
    try:
        routing, figures = costs_of(build_model(load_config(name), dtype), **options)
    except (ImportError, ValueError, TypeError) as error:
        print(f"dion2-routes: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2) if as_json else render(routing, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
