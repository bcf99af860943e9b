"""Reinforcement learning with a reward that is a rule (GRPO), with TRL.

By default the model writes docstrings, and the reward is the share of PEP 257's rules that their first line keeps.

python recipes/post_training/grpo.py --help
accelerate launch --config_file recipes/launch/ddp-8.yaml recipes/post_training/grpo.py
"""

from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

from dion2_lightning import SelectionCallback
from recipes.offline_data import read_conversations
from recipes.offline_models import SMOLLM2, model_folder
from recipes.trainer_arguments import OptimizerArguments

ON_GPU = torch.cuda.is_available()

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": SMOLLM2,
    "dtype": "float32",
    "output_dir": "runs/post_training/grpo",
    "max_steps": 10,
    "max_completion_length": 32,
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-4,
    "adamw_lr": 2e-5,
    "momentum": 0.8,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_total_limit": 1,
    "bf16": ON_GPU,
    "gradient_checkpointing": ON_GPU,
    "use_cpu": not ON_GPU,
}
"""What differs from TRL's defaults: a run of minutes that needs neither network nor GPU."""

LONGEST_PROMPT = 300
"""Characters."""


def reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """Return the share of four rules of PEP 257 that each completion keeps.

    Its first line is a sentence with a capital letter and a period, no longer than 72 characters, and no code.
    """
    scores = []
    for [message] in completions:
        summary = message["content"].strip().split("\n")[0].strip()
        rules = (summary[:1].isupper(), summary.endswith("."), 0 < len(summary) <= 72, not set("`(=_") & set(summary))
        scores.append(sum(rules) / len(rules))
    return scores


def load_prompts() -> Dataset:
    """Return functions of Python's library, each with the request for its docstring."""
    prompts = [row["prompt"] for row in read_conversations() if len(row["prompt"][0]["content"]) <= LONGEST_PROMPT]
    return Dataset.from_dict({"prompt": prompts})


def main() -> GRPOTrainer:
    parser = TrlParser((GRPOConfig, ModelConfig, OptimizerArguments))
    parser.set_defaults(**DEFAULTS)
    args, model, optimizer = parser.parse_args_and_config()
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    trainer = GRPOTrainer(
        model_folder(model.model_name_or_path),
        reward,
        args=args,
        train_dataset=load_prompts(),
        peft_config=get_peft_config(model),
        callbacks=[SelectionCallback(save_to=True)] if optimizer.algorithm != "adamw" else [],
    )
    trainer.optimizer_cls_and_kwargs = optimizer.factory(args)  # no argument of this trainer
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else it saves no model
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
