"""Supervised fine-tuning with TRL's SFTTrainer.

python recipes/supervised_fine_tuning/with_trainer.py --help
accelerate launch --config_file recipes/launch/fsdp2-8.yaml recipes/supervised_fine_tuning/with_trainer.py
"""

from typing import Any

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from dion2_lightning import SelectionCallback
from recipes.offline_models import SMOLLM2, model_folder
from recipes.precision import sum_in_float32
from recipes.supervised_fine_tuning.data import DataSettings, load_conversations
from recipes.supervised_fine_tuning.model import check_packing, pad_rows, validation_loss
from recipes.trainer_arguments import OptimizerArguments

ON_GPU = torch.cuda.is_available()

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": SMOLLM2,
    "dtype": "float32",
    "dataset_name": "functions",
    "dataset_test_split": None,
    "output_dir": "runs/supervised_fine_tuning/trainer",
    "max_steps": 24,
    "max_length": 256,
    "packing": True,
    "shuffle_dataset": True,
    "train_sampling_strategy": "sequential",  # shuffled already; so the three programs train on the same rows
    "per_device_train_batch_size": 2,
    "learning_rate": 4e-4,
    "adamw_lr": 9e-5,
    "momentum": 0.81,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 12,
    "eval_on_start": True,
    "save_total_limit": 1,
    "bf16": ON_GPU,
    "gradient_checkpointing": False,
    "use_cpu": not ON_GPU,
}
"""What differs from TRL's defaults: a run of minutes that needs neither network nor GPU."""


class FineTuner(SFTTrainer):
    """SFTTrainer with a validation loss that is the mean over all tokens, not over batches."""

    control: Any

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = {"eval_loss": validation_loss(self.model_wrapped, self.get_eval_dataloader(), self.accelerator)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, OptimizerArguments))
    parser.set_defaults(**DEFAULTS)
    script, args, model, optimizer = parser.parse_args_and_config()
    train, validation = load_conversations(
        DataSettings(script.dataset_name, script.dataset_config, script.dataset_train_split, script.dataset_test_split)
    )
    args.assistant_only_loss = "messages" in train.column_names
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    trainer = FineTuner(
        model_folder(model.model_name_or_path),
        args,
        train_dataset=train,
        eval_dataset=validation,
        peft_config=get_peft_config(model),
        optimizer_cls_and_kwargs=optimizer.factory(args),
        callbacks=[SelectionCallback(save_to=True)] if optimizer.algorithm != "adamw" else [],
    )
    sum_in_float32(trainer.accelerator)
    trainer.eval_dataset = pad_rows(trainer.eval_dataset, args.world_size * args.per_device_eval_batch_size)
    if args.packing:
        with trainer.accelerator.autocast():
            check_packing(trainer.model)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else it saves no model
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.print(f"The model is in {args.output_dir}.")


if __name__ == "__main__":
    main()
