"""The sections of the check, in the order they are run: what has to be right first, then what is measured."""

from typing import Final

from benchmarks.gpu.section import Section

FRAMEWORKS: Final = (
    "transformers",
    "accelerate",
    "lightning",
    "peft",
    "datasets",
    "jsonargparse",
    "torchdata",
    "trl",
)
"""Packages that the recipes need."""

SECTIONS: Final = (
    Section("machine", "What the machine can do", "benchmarks.gpu.machine:measure", minutes=0.5),
    Section(
        "correct",
        "Correct on the device",
        "benchmarks.gpu.correct:run_tests",
        minutes=4,
        needs=("pytest", "pytest_timeout", "xdist", "transformers", "accelerate", "lightning", "peft"),
    ),
    *(
        Section(
            f"step-{shapes}",
            f"A step of the matrices: {title}; each step begins on an idle device",
            "benchmarks.gpu.step:time_steps",
            minutes=0.75,
            arguments={"shapes": shapes, "layers": layers},
        )
        for shapes, layers, title in (
            ("smollm2-135m", 30, "SmolLM2-135M"),
            ("gpt2", 12, "GPT-2"),
            ("llama-1b", 16, "Llama of 1B parameters"),
            ("llama-8b", 2, "two layers of a Llama of 8B parameters"),
        )
    ),
    Section(
        "rounding",
        "A step of weights in bfloat16, rounded to nearest and stochastically",
        "benchmarks.gpu.step:time_rounding",
        minutes=0.5,
        arguments={"shapes": "llama-1b", "layers": 16},
    ),
    Section(
        "offload",
        "State on the host: bits, memory and time of a step, with offloading and without",
        "benchmarks.gpu.offload:compare",
        minutes=2,
        arguments={"shapes": "llama-1b", "layers": 8},
    ),
    *(
        Section(
            f"train-{name}",
            f"Whole training steps: {title}, {rows} rows of {length} tokens",
            "benchmarks.gpu.training:train",
            minutes=1,
            arguments={"name": name, "rows": rows, "length": length},
            needs=("transformers", "lightning"),
        )
        for name, title, rows, length in (
            ("smollm2-135m", "SmolLM2-135M's shapes", 16, 1024),
            ("llama-1b", "a Llama of 1.2B parameters", 8, 1024),
        )
    ),
    Section(
        "statistics",
        "What statistics of the selection add",
        "benchmarks.gpu.training:measure_statistics",
        minutes=0.5,
        arguments={"name": "smollm2-135m", "rows": 16, "length": 1024},
        needs=("transformers", "lightning"),
    ),
    Section(
        "compiled",
        "Compiled training steps, CUDA graphs among them: two models in turn, at changing learning rates",
        "benchmarks.gpu.compiled:compare",
        minutes=3,
    ),
    Section(
        "captured",
        "Steps in a CUDA graph, replayed at changing rates: the bits of steps as they are",
        "benchmarks.gpu.captured:compare",
        minutes=0.5,
    ),
    Section("attention", "Attentions on packed rows", "benchmarks.gpu.attention:compare", 1.5, needs=FRAMEWORKS),
    *(
        Section(
            f"recipe-{name}",
            f"Recipe: {title}",
            "benchmarks.gpu.recipes:run_recipe",
            minutes=1.5,
            arguments={"recipe": name},
            needs=(*FRAMEWORKS, *more),
        )
        for name, title, more in (
            ("pretraining", "pretraining", ()),
            ("sft-trainer", "supervised fine-tuning with the Trainer", ()),
            ("sft-lightning", "supervised fine-tuning with Lightning", ()),
            ("sft-accelerate", "supervised fine-tuning with Accelerate", ()),
            ("dpo", "preferences (DPO)", ()),
            ("grpo", "reinforcement (GRPO)", ()),
            ("text", "text classification", ()),
            ("images", "image classification", ("PIL", "sklearn")),
        )
    ),
    Section(
        "pretraining",
        "Pretraining at GPT-2-small's size: validation loss, the same time for every method",
        "benchmarks.gpu.pretraining:pretrain",
        minutes=10,  # or what is left
        arguments={"rows": 64, "length": 1024},
        needs=("transformers", "lightning"),
        min_seconds=75,  # 35 s of them are not training
    ),
)
