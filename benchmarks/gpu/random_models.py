"""Models with random weights and files of texts for the recipes, made without a network."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.section import Options
from recipes.offline_data import read_docstrings

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 2048

DECODER, ENCODER, VISION_TRANSFORMER = "decoder", "encoder", "vision-transformer"
TEXTS, CONVERSATIONS = "texts.txt", "conversations.jsonl"


def shared_files(options: Options) -> Path:
    """Return a folder of models and texts for all sections; the first section that calls this writes it.

    Returns:
        The folder. It holds DECODER, ENCODER and, unless tiny, VISION_TRANSFORMER, as ``save_pretrained`` writes them,
        with their tokenizer or processor; TEXTS, with blank lines between documents; and CONVERSATIONS, prompts and
        completions.
    """
    folder = options.folder.parent / "shared"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sections may run side by side
        if not folder.exists():
            unfinished = folder.with_name("unfinished")
            unfinished.mkdir(exist_ok=True)
            texts = read_docstrings()[: 200 if options.tiny else None]
            _save_texts(texts, unfinished)
            _save_models(options, unfinished)
            _save_tokenizer([text for text, _ in texts], options, unfinished)
            unfinished.rename(folder)
    return folder


def _save_texts(texts: list[tuple[str, str]], folder: Path) -> None:
    documents = (text.replace("\n\n", "\n") for text, _ in texts)
    (folder / TEXTS).write_text("\n\n".join(documents), encoding="utf-8")
    answers = {f"{module}: {text.splitlines()[0]}": text for text, module in texts}
    rows = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in answers.items())
    (folder / CONVERSATIONS).write_text("\n".join(rows), encoding="utf-8")


def _save_models(options: Options, folder: Path) -> None:
    """Save a Llama of SmolLM2-135M's size, a BERT of MiniLM-L6's and a vision transformer of DeiT-small's."""
    import torch
    from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

    from benchmarks.gpu.training import TINY, make_model

    sizes = {"hidden_size": 384, "intermediate_size": 1536}
    bert = {**sizes, "num_hidden_layers": 6, **(TINY if options.tiny else {})}
    decoder = make_model("smollm2-135m", replace(options, device="cpu"), MAX_LENGTH, torch.float32)
    decoder.save_pretrained(folder / DECODER)
    BertModel(BertConfig(**bert, max_position_embeddings=MAX_LENGTH)).save_pretrained(folder / ENCODER)
    if not options.tiny:  # the recipe has its own small model
        vit = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=6))
        vit.save_pretrained(folder / VISION_TRANSFORMER)
        processor = {"image_processor_type": "ViTImageProcessor"}
        (folder / VISION_TRANSFORMER / "preprocessor_config.json").write_text(json.dumps(processor))


def _save_tokenizer(texts: list[str], options: Options, folder: Path) -> None:
    """Train and save a byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|im_end|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=256 if options.tiny else 8192, special_tokens=["<|im_start|>", end], show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, model_max_length=MAX_LENGTH, chat_template=CHAT
    )
    for model in (DECODER, ENCODER):
        fast.save_pretrained(folder / model)
