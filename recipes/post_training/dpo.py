"""Preference optimization (DPO) with TRL.

By default the model learns to prefer a function's docstring to that of another function.

python recipes/post_training/dpo.py --help
accelerate launch --config_file recipes/launch/ddp-8.yaml recipes/post_training/dpo.py
"""

from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from dion2_lightning import SelectionCallback
from recipes.offline_data import read_conversations
from recipes.offline_models import SMOLLM2, model_folder
from recipes.trainer_arguments import OptimizerArguments

ON_GPU = torch.cuda.is_available()

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": SMOLLM2,
    "dtype": "float32",
    "dataset_name": "functions",
    "output_dir": "runs/post_training/dpo",
    "max_steps": 16,
    "max_length": 192,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-4,
    "adamw_lr": 2e-5,
    "momentum": 0.8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 16,
    "save_total_limit": 1,
    "bf16": ON_GPU,
    "gradient_checkpointing": ON_GPU,
    "use_cpu": not ON_GPU,
}
"""What differs from TRL's defaults: a run of minutes that needs neither network nor GPU."""

LONGEST_PROMPT = 400
"""Characters, of the default data."""

VALIDATION_PAIRS = 32


def load_pairs(name: str, config: str | None) -> DatasetDict:
    """Return prompts with a chosen and a rejected answer: of the hub, or of Python's library."""
    if name != "functions":
        return load_dataset(name, config)
    by_prompt = {row["prompt"][0]["content"]: row for row in read_conversations()}  # each prompt once
    rows = [row for prompt, row in by_prompt.items() if len(prompt) <= LONGEST_PROMPT]
    splits = Dataset.from_list(rows).train_test_split(VALIDATION_PAIRS, seed=0)
    return DatasetDict({split: Dataset.from_list(_pairs(list(splits[split]))) for split in splits})


def _pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    others = [*rows[1:], rows[0]]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, others, strict=True)
        if row["completion"] != other["completion"]
    ]


def main() -> DPOTrainer:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, OptimizerArguments))
    parser.set_defaults(**DEFAULTS)
    script, args, model, optimizer = parser.parse_args_and_config()
    pairs = load_pairs(script.dataset_name, script.dataset_config)
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    trainer = DPOTrainer(
        model_folder(model.model_name_or_path),
        args=args,
        train_dataset=pairs[script.dataset_train_split],
        eval_dataset=pairs[script.dataset_test_split],
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
