"""A small model that chats, and no accelerator of another test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.offline_models import SMOLLM2, model_folder
from tests.recipes.colours import ROWS, forget_accelerators, talk


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two random layers, tied like SmolLM2, and a tokenizer like SmolLM2's with few words."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(SMOLLM2))
    texts = [tokenizer.apply_chat_template(talk(number), tokenize=False) for number in range(ROWS)]
    tokenizer = tokenizer.train_new_from_iterator(texts, 400)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test() -> Iterator[None]:
    forget_accelerators()
    yield
    forget_accelerators()
