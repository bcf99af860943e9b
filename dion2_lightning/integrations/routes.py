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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dion2_lightning.algorithms import ALGORITHMS, CHOICES
from dion2_lightning.costs import Layout, Placed, adamw_state_bytes, gradient_bytes, state_bytes, step_costs
from dion2_lightning.factory import Dion2
from dion2_lightning.routing.router import LORA_ROLES, Routing, route_parameters
from dion2_lightning.routing.rules import Role

FRACTIONS: Final = (1.0, 0.5, 0.25, 0.125)
"""Those that are compared."""

LENGTH: Final = 2048
"""Tokens of a sequence, of models with as many positions."""

_AUTO_CLASSES = ("Seq2SeqLM", "SpeechSeq2Seq", "CausalLM", "MaskedLM", "ImageClassification")
_POSITIONS = ("max_target_positions", "n_positions", "max_position_embeddings")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_LISTED_EXPERT = re.compile(r"(?<!shared_)experts\.(?:expert_)?(\d+)\.")
_OF_ENCODER = re.compile(r"(encoder_attn|EncDecAttention|crossattention)\.([kv]|key|value)")
_WITHOUT_PRODUCT = frozenset({Role.EMBEDDING, Role.VECTOR, Role.OTHER, Role.LORA_OTHER})


@dataclass(frozen=True)
class ForwardBackward:
    """What a forward and a backward pass over a batch take.

    Attributes:
        products: FLOPs of products with weights.
        attention: FLOPs of attention, between tokens.
        tokens: Tokens of the batch; of an encoder and a decoder those of the decoder.
        active: Parameters that a token meets in products.
        notes: What was assumed, and may be wrong.
    """

    products: int
    attention: int
    tokens: int
    active: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.products + self.attention


def load_config(name: str) -> Any:
    """Return the config of a folder, a ``config.json`` file, a model type such as ``"llama"``, or a model of the hub.

    Raises:
        ImportError: transformers is missing.
        ValueError: It is none of them.
    """
    AutoConfig, model_types = _transformers().AutoConfig, _model_types()
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"folder {name} has no config.json; give the folder of a saved model, or a model type")
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            model_type = content.pop("model_type", None) if isinstance(content, dict) else None
            if model_type not in model_types:
                raise ValueError(f"{name} has the model_type {model_type!r}, which transformers does not know")
            return AutoConfig.for_model(model_type, **content)
        if not path.is_dir() and name in model_types:
            return AutoConfig.for_model(name)
        return AutoConfig.from_pretrained(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON file: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{name!r} is no folder, no file, no model type such as 'llama', and neither in the cache nor to be had "
            "from the hub; check the name, unset HF_HUB_OFFLINE to reach the hub, or give the model's config.json"
        ) from error


def build_model(config: Any, dtype: str | None = None) -> nn.Module:
    """Return the model of a config on the meta device: of the class that it names, or else with a head, where one is.

    Args:
        config: Of transformers.
        dtype: Of its weights, ``"float32"`` or ``"bfloat16"`` (default: None, the config's, or else float32).
    """
    transformers = _transformers()
    named = [getattr(transformers, each, None) for each in config.architectures or ()]
    known = [getattr(transformers, f"AutoModelFor{each}") for each in _AUTO_CLASSES]
    automatic = next((each for each in known if type(config) in each._model_mapping), transformers.AutoModel)
    wanted = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    with torch.device("meta"):
        model: nn.Module = named[0]._from_config(config) if named and named[0] else automatic.from_config(config)
    return model.to(wanted)


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


def forward_backward(
    model: nn.Module, config: Any, routing: Routing, batch: int, length: int | None = None
) -> ForwardBackward:
    """Return what a forward and a backward pass take, computed from shapes and the config.

    A product with a weight takes 2 FLOPs an entry and token, and in the backward pass 2 for the gradient of its input
    and 2 for its own, where it is trained. Embeddings are looked up; where a head is tied to one, that is a product.

    Args:
        model: On any device; it says which weights are trained.
        config: Its config.
        routing: Of the same parameters, all trained, which says what they are.
        batch: Sequences, or images.
        length: Tokens of each (default: None, 2048, or as many as there are positions for).
    """
    text, notes = config.get_text_config(), list[str]()
    length, source = _lengths(config, length, notes)
    heads = {id(each) for each in _parameters_of(model, "get_output_embeddings")}
    encoder = {id(each) for each in _parameters_of(model, "get_encoder")} if config.is_encoder_decoder else set()
    trained = {id(each): each.requires_grad for each in model.parameters()}
    experts = [int(found[1]) for each in routing.decisions if (found := _LISTED_EXPERT.search(each.name))]
    per_token = next((value for name in _ACTIVE_EXPERTS if isinstance(value := getattr(text, name, None), int)), None)
    has_experts = bool(experts) or any(each.batched for each in routing.decisions)
    if has_experts and per_token is None:
        notes.append("its config does not say how many experts a token goes to; all were counted as active")

    products, active, of_convolutions = 0, 0, 0
    adapters = [each for name, each in model.named_parameters() if "lora_" in name and each.ndim == 2]
    for decision, parameter in [(each, each.parameter) for each in routing.decisions] + [(None, x) for x in adapters]:
        its_tokens, size = batch * length, parameter.numel()
        if decision is not None:
            if decision.role in _WITHOUT_PRODUCT and id(parameter) not in heads:
                continue
            if id(parameter) in encoder or _OF_ENCODER.search(decision.name):
                its_tokens = batch * source
            if per_token is not None and (decision.batched or _LISTED_EXPERT.search(decision.name)):
                count = parameter.shape[0] if decision.batched else max(experts) + 1
                size = size * min(per_token, count) // count
        of_weight = (6 if trained[id(parameter)] else 4) * size * its_tokens
        products, active = products + of_weight, active + size
        of_convolutions += of_weight * (decision is not None and decision.role == Role.CONVOLUTION)
    if of_convolutions > products / 20:
        notes.append("convolutions were counted at one position a token; a convolutional network has others")
    if getattr(config, "sub_configs", None) and not config.is_encoder_decoder:
        notes.append(f"its parts were all counted at {length:,} tokens; images and sound have lengths of their own")
    if isinstance(getattr(config, "depths", None), list | tuple):
        notes.append("its stages were all counted at the positions of the first; later ones have fewer")
    attention = _attention(model, config, batch, length, source)
    return ForwardBackward(products, attention, batch * length, active, tuple(notes))


def _lengths(config: Any, length: int | None, notes: list[str]) -> tuple[int, int]:
    """Tokens of a sequence, and those that an encoder sees in front of a decoder; adds to the notes."""
    text = config.get_text_config()
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if image is not None and patch is not None and not hasattr(config, "vocab_size"):
        height, width = (image, image) if isinstance(image, int) else tuple(image)[-2:]
        side, other = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
        return (tokens := (height // side) * (width // other) + 1), tokens
    positions = next((value for name in _POSITIONS if isinstance(value := getattr(text, name, None), int)), None)
    if length is not None and positions is not None and length > positions:
        notes.append(f"a length of {length:,} is more than the {positions:,} positions of its config")
    chosen = length or min(LENGTH, positions or LENGTH)
    source = getattr(text, "max_source_positions", None)
    return chosen, source if isinstance(source, int) else chosen


def _attention(model: nn.Module, config: Any, batch: int, length: int, source: int) -> int:
    """FLOPs between tokens: 12 a layer, a hidden unit, a token and a token that it sees."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(text, "hidden_size", None), int):
        return 0
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "qk_head_dim", None) or head
    width: float = heads * (keys + (getattr(text, "v_head_dim", None) or head)) / 2
    layers = text.num_hidden_layers
    if config.is_encoder_decoder:
        decoder = getattr(text, "decoder_layers", None) or getattr(text, "num_decoder_layers", None) or layers
        of_encoder = (getattr(text, "encoder_layers", None) or layers) * source * source
        pairs: float = of_encoder + decoder * length * (length / 2 + source)
        return round(12 * width * batch * pairs)
    is_causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    seen = length / 2 if is_causal else length
    window = getattr(text, "sliding_window", None) or seen
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    attends = [kind for kind in kinds if kind.endswith("attention") and "linear" not in kind]
    reach: float = sum(min(window, seen) if "sliding" in kind else seen for kind in attends)
    return round(12 * width * batch * length * reach)


def costs_of(
    model: nn.Module,
    config: Any,
    *,
    algorithm: str = "dion2",
    fraction: float | None = None,
    batch: int = 8,
    length: int | None = None,
    layout: Layout | None = None,
    lora: str | None = None,
    lora_rank: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Routing, dict[str, Any]]:
    """Return how the optimizer of a model is made, and what a step of it takes, as plain data.

    Args:
        model: Of transformers, on any device.
        config: Its config.
        algorithm: As ``build_optimizer`` takes it (default: ``"dion2"``).
        fraction: Of the slices to select; of Dion, of the rank (default: None, 0.25).
        batch: Sequences of each rank, or of all together under TP (default: 8).
        length: Tokens of a sequence (default: None, 2048, or as many as there are positions for).
        layout: Of the ranks (default: None, one rank).
        lora: Which LoRA factors are matrices, with ``lora_rank`` (default: None, ``"both"``).
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
    if lora is not None and lora_rank is None:
        raise ValueError(f"--lora {lora} has no effect without adapters; add them by --lora-rank 16")
    if min(batch, length or 1, lora_rank or 1) < 1:
        raise ValueError("--batch, --length and --lora-rank must be positive")
    if layout.kind == "tp" and (lora_rank or not getattr(model, "tp_plan", None)):
        raise ValueError(
            f"--layout tp={layout.shards}: transformers has no plan of tensor parallelism for "
            f"{'adapters' if lora_rank else type(model).__name__}; choose fsdp2, hsdp or ddp"
        )
    whole = route_parameters(model)
    if lora_rank is not None:
        model = add_adapters(model, lora_rank)
    passes = forward_backward(model, config, whole, batch, length)
    routing = route_parameters(
        model, overrides=overrides, lora=lora or "both", matrices=choice.matrices, control=choice.control
    )

    def placed_at(value: float | None) -> list[Placed]:
        given: dict[str, Any] = dict(choice.settings) if setting is None else {**choice.settings, setting: value}
        name_of = {id(each.parameter): each.name for each in routing.decisions}
        plan = getattr(model, "tp_plan", None) or {}
        return [
            Placed(each, group, _sharded_dim(each, name_of[id(each)], layout, plan))
            for group in Dion2(routing.param_groups(), **given).param_groups
            for each in group["params"]
        ]

    chosen = None if setting is None else fraction or ALGORITHMS[choice.matrices].defaults()[setting]
    placed, one = placed_at(chosen), Layout()
    trainable = sum(each.parameter.numel() for each in placed)
    per_rank = max(1.0, passes.flops * layout.batches / layout.ranks)
    rows = []
    for value in [chosen] if chosen is None else sorted({*FRACTIONS, chosen}, reverse=True):
        members = placed_at(value)
        step = step_costs(members, layout)
        rows.append(
            {
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
    algorithms = dict.fromkeys(each.group["algorithm"] for each in placed)
    return routing, {
        "model": type(model).__name__,
        "parameters": sum(each.numel() for each in model.parameters()),
        "trainable_parameters": trainable,
        "active_parameters": passes.active,
        "dtype": str(placed[0].parameter.dtype).removeprefix("torch."),
        "algorithm": algorithm,
        "fraction": chosen,
        "layout": {"kind": layout.kind, "ranks": layout.ranks, "replicas": layout.replicas, "shards": layout.shards},
        "batch": batch,
        "tokens": passes.tokens,
        "groups": [_group_row(group) for group in routing.param_groups()],
        "state_bytes": {
            name: state_bytes([each for each in placed if each.group["algorithm"] == name], layout)
            for name in algorithms
        },
        "forward_backward": {
            "products_flops": passes.products,
            "attention_flops": passes.attention,
            "flops": passes.flops,
            "flops_per_rank": round(per_rank),
        },
        "steps": rows,
        "adamw": {
            "state_bytes": adamw_state_bytes(placed, layout),
            "state_bytes_per_parameter": adamw_state_bytes(placed, one) / trainable,
            "flops": control.flops,
            "share_of_forward_backward": control.flops / per_rank,
            "bytes_sent": 0,
        },
        "gradients_bytes_sent": gradient_bytes(placed, layout),
        "notes": list(passes.notes),
    }


_ADAMW_GROUP: Final = {"algorithm": "adamw", **ALGORITHMS["adamw"].defaults()}


def _group_row(group: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [parameter.numel() for _, parameter in group["params"]]
    entries = {name: value for name, value in group.items() if name != "params"}
    return {**entries, "tensors": len(sizes), "parameters": sum(sizes)}


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
    state = ", ".join(f"{name} {_bytes(number)}" for name, number in figures["state_bytes"].items())
    lines = [
        routing.report(),
        "",
        f"{figures['model']}: {figures['parameters']:,} parameters, {figures['trainable_parameters']:,} trained, in "
        f"{figures['dtype']}; a token meets {figures['active_parameters']:,}",
        f"{figures['algorithm']}{at} on {on}" + (f", {figures['tokens']:,} tokens" if ranks == 1 else ""),
        "",
        f"State of a rank: {state}; torch's AdamW {_bytes(adamw['state_bytes'])}",
        f"Forward and backward, of a rank: {_flops(passes['flops_per_rank'])}; of a batch: products with weights "
        f"{_flops(passes['products_flops'])}, attention {_flops(passes['attention_flops'])}",
        f"Sent by a rank to average gradients, whatever the optimizer: {_bytes(figures['gradients_bytes_sent'])}",
        "",
        "A step of one rank, the one with the most:",
        "",
        _fractions_table(figures),
        *(f"\nNote: {note}." for note in figures["notes"]),
    ]
    return "\n".join(lines)


def _fractions_table(figures: Mapping[str, Any]) -> str:
    header = ["", "state", "bytes a parameter", "FLOPs", "of forward and backward", "sent", "of it sums"]
    rows = [
        [
            figures["algorithm"] if step["fraction"] is None else f"{figures['algorithm']} at {step['fraction']:g}",
            _bytes(step["state_bytes"]),
            f"{step['state_bytes_per_parameter']:.2f}",
            _flops(step["flops"]),
            f"{step['share_of_forward_backward']:.2%}",
            _bytes(step["bytes_sent"]),
            _bytes(step["sums_bytes_sent"]),
        ]
        for step in figures["steps"]
    ]
    adamw = figures["adamw"]
    share = f"{adamw['share_of_forward_backward']:.2%}"
    per_parameter = f"{adamw['state_bytes_per_parameter']:.2f}"
    rows.append(
        ["torch's AdamW", _bytes(adamw["state_bytes"]), per_parameter, _flops(adamw["flops"]), share, _bytes(0), "-"]
    )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)][1:] for row in (header, *rows)]
    first = [f"{row[0]:{widths[0]}}" for row in (header, *rows)]
    return "\n".join("  ".join([name, *row]) for name, row in zip(first, cells, strict=True))


def _bytes(number: float) -> str:
    return _unit(number, "B")


def _flops(number: float) -> str:
    return _unit(number, "FLOP")


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
        raise ImportError("dion2-routes needs transformers: pip install 'dion2-lightning[transformers]'") from error
    return transformers


def _model_types() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


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
    parser.add_argument("--lora", choices=LORA_ROLES, help="which LoRA factors are matrices (default: both)")
    parser.add_argument("--overrides", type=_overrides, help="as build_optimizer takes them, in JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = vars(parser.parse_args(arguments))
    name, dtype, as_json = (options.pop(each) for each in ("model", "dtype", "json"))
    try:
        config = load_config(name)
        routing, figures = costs_of(build_model(config, dtype), config, **options)
    except (ImportError, ValueError, TypeError) as error:
        print(f"dion2-routes: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2) if as_json else render(routing, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
