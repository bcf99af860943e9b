"""Train a Vision Transformer to classify images, with Dion2 in the Hugging Face Trainer.

Without arguments: a small one from scratch, on scikit-learn's handwritten digits, without network or GPU.
`--algorithm adamw --learning_rate 2.8e-3 --output_dir runs/images-adamw` is the AdamW control.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets, load_dataset
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dion2_lightning import SelectionCallback
from recipes.trainer_arguments import OptimizerArguments


def argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """What the recipe adds to TrainingArguments."""

    model: str = argument("small-vit", "small-vit (0.2M parameters, from scratch), a name on the hub, or a folder.")
    dataset: str = argument("digits", "digits (scikit-learn's), a name on the hub, or a folder of images.")
    image_column: str = argument("image", "Column of the images.")
    label_column: str = argument("label", "Column of the labels.")
    validation_split: str | None = argument(None, "Split to validate on, such as test.")
    validation_rows: int = argument(397, "Rows of the training split to validate on, without a validation_split.")
    shift: float = argument(0.125, "Farthest random shift of a training image, as a share of its sides.")


class ImageTrainer(Trainer):
    """Shifts training images at random: in the step, because the Trainer restores random states as of the last step."""

    shift: float

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
        images = inputs["pixel_values"]  # n x channels x height x width
        movements = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
        movements[:, :, 2].uniform_(-2 * self.shift, 2 * self.shift)  # a side is 2 long here
        grid = functional.affine_grid(movements, list(images.shape), align_corners=False)
        inputs["pixel_values"] = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        loss: Tensor = super().training_step(model, inputs, *rest)
        return loss


def load_rows(recipe: RecipeArguments) -> tuple[Dataset, Dataset]:
    """Returns `image` and `label` of the rows to train and to validate on, whatever the seed; no image is in both."""
    train = load_split(recipe, "train")
    if recipe.validation_split:
        validation = load_split(recipe, recipe.validation_split)
    else:
        train, validation = train.train_test_split(recipe.validation_rows, seed=0).values()
    if not isinstance(train.features["label"], ClassLabel):
        rows = concatenate_datasets([train, validation]).class_encode_column("label")  # the same numbers in both
        train, validation = rows.select(range(len(train))), rows.select(range(len(train), len(rows)))
    seen = set(image_hashes(validation))
    kept = [row for row, image in enumerate(image_hashes(train)) if image not in seen]
    if len(kept) < len(train):
        logging.warning(f"{len(train) - len(kept)} training images are left out: they are validation images too")
    return train.select(kept), validation


def load_split(recipe: RecipeArguments, split: str) -> Dataset:
    if recipe.dataset == "digits":
        digits = load_digits()
        images = (digits.images * 255 / 16).astype("uint8")  # 8 x 8, white on black
        features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
        return Dataset.from_dict({"image": list(images), "label": digits.target}, features)
    rows = load_dataset(recipe.dataset, split=split).select_columns([recipe.image_column, recipe.label_column])
    return rows.rename_columns({recipe.image_column: "image", recipe.label_column: "label"})


def image_hashes(rows: Dataset) -> Iterator[bytes]:
    """Of the files, not the pixels: decoding all of a large dataset takes hours."""
    for image in rows.cast_column("image", Image(decode=False))["image"]:
        yield sha256(image["bytes"] or Path(image["path"]).read_bytes()).digest()


def load_model(model: str, classes: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Returns the model, with a new head unless it has one for as many classes, and its image processor."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    if model == "small-vit":
        config = ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.07,  # the default, 0.02, suits a width of 768
            **labels,
        )
        return ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    pretrained = AutoModelForImageClassification.from_pretrained(
        model, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
    )
    return pretrained, AutoImageProcessor.from_pretrained(model)


def accuracy_and_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Replaces the Trainer's `eval_loss`, which weights the last images wrongly on several processes."""
    logits, labels = torch.as_tensor(prediction.predictions).float(), torch.as_tensor(prediction.label_ids)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return {"accuracy": accuracy.item(), "loss": functional.cross_entropy(logits, labels).item()}


def main(arguments: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((TrainingArguments, RecipeArguments, OptimizerArguments), description=__doc__)
    has_gpu = torch.cuda.is_available()
    parser.set_defaults(output_dir="runs/images", use_cpu=not has_gpu, bf16=has_gpu and torch.cuda.is_bf16_supported())
    parser.set_defaults(num_train_epochs=14, per_device_train_batch_size=64, per_device_eval_batch_size=64)
    parser.set_defaults(
        learning_rate=8e-3, adamw_lr=2e-3, momentum=0.8, weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=0.1
    )
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, logging_steps=20)
    parser.set_defaults(remove_unused_columns=False)  # `prepare` makes the model's inputs of them
    args, recipe, optimizer = parser.parse_args_into_dataclasses(arguments)

    logging.basicConfig(format="%(message)s")
    logging.getLogger("dion2_lightning").setLevel(logging.INFO)  # which parameters Dion2 trains, and which AdamW

    set_seed(args.seed)
    train, validation = load_rows(recipe)
    # The Trainer alone does not restore all of a ViT: transformers 5.23 saves weights under other names than it has.
    model, processor = load_model(args.resume_from_checkpoint or recipe.model, train.features["label"].names)

    def prepare(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
        return {**images, "labels": rows["label"]}

    trainer = ImageTrainer(
        model,
        args,
        train_dataset=train.with_transform(prepare),
        eval_dataset=validation.with_transform(prepare),
        processing_class=processor,
        compute_metrics=accuracy_and_loss,
        callbacks=[SelectionCallback()] if optimizer.algorithm != "adamw" else [],
        optimizer_cls_and_kwargs=optimizer.factory(args),
    )
    trainer.shift = recipe.shift
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    selection = Path(args.output_dir, "dion2_selection.json")
    if selection.exists() and trainer.is_world_process_zero():
        print(f"What was selected: dion2-report {selection}")
    return trainer


if __name__ == "__main__":
    main()
