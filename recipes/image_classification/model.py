"""The model and its image processor: pretrained, or a small Vision Transformer from nothing."""

from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from recipes.image_classification.settings import SMALL_VIT
from recipes.inputs import InputError

SIZE, PATCH, WIDTH = 32, 8, 64


def load_model(name: str, classes: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Returns a model with a new head for the classes, ready to train, and its image processor.

    Args:
        name: "small-vit", a name on the hub, or a folder.
        classes: Their names, in the order of their numbers.

    Raises:
        InputError: If either cannot be loaded.
    """
    names = dict(enumerate(classes))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if name == SMALL_VIT:
        return _small_vit(labels)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModelForImageClassification.from_pretrained(
            name,
            dtype=torch.float32,
            **labels,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
        )
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model {name!r} could not be loaded: {reason} Give {SMALL_VIT!r}, a folder with a model for image "
            "classification and its image processor, or a name on the hub."
        ) from error
    return model.train(), processor


def _small_vit(labels: dict[str, Any]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.02 * (768 / WIDTH) ** 0.5,  # 0.02 is meant for the width of ViT-B
        **labels,
    )
    # Without torchvision, ViTImageProcessor is a placeholder; this one needs Pillow alone and is saved as the same.
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return ViTForImageClassification(config).train(), processor
