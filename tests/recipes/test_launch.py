"""The launch configurations: Accelerate knows every key, and what it makes of them trains like one process."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

import recipes
from recipes.inputs import InputError
from recipes.pretraining import train as recipe
from recipes.pretraining.settings import Settings
from recipes.pretraining.train import pretrain
from recipes.versions import DIVIDES_MODELS
from tests.recipes.pretraining import logged, run_on_ranks, saved_logits, saved_weights, tiny_settings

FOLDER = Path(recipes.__file__).parent
CONFIGURATIONS = {path.stem: path for path in sorted((FOLDER / "launch").glob("*.yaml"))}

FEWER = {
    "ddp-8": (2, ()),
    "fsdp2-8": (2, ()),
    "hsdp-2x8": (4, ("--num_machines=1", "--parallelism_config_dp_shard_size=2")),
    "fsdp2-tp": (4, ("--parallelism_config_dp_shard_size=2",)),
}
"""With how many ranks a configuration is tried, and what else has to change for it."""


def environment_of(name: str, ranks: int, *changes: str) -> dict[str, str]:
    """What Accelerate's launcher adds to the environment of every rank, for this configuration."""
    file = f"--config_file={CONFIGURATIONS[name]}"
    changes = (f"--num_processes={ranks}", "--mixed_precision=no", "--main_process_port=0", *changes)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([file, *changes, "train.py"]))
    assert arguments.multi_gpu or arguments.use_fsdp, "it would start one process"
    environment: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE", "FSDP", "PARALLELISM"))}


class TestFiles:
    @pytest.mark.parametrize("name", CONFIGURATIONS)
    def test_accelerate_knows_every_key(self, name: str) -> None:
        configuration = load_config_from_file(str(CONFIGURATIONS[name]))
        assert isinstance(configuration, ClusterConfig)
        # Accelerate checks the outermost keys alone, and takes the others over without a look.
        known = vars(launch_command_parser().parse_args(["train.py"])).keys()
        nested = {**configuration.fsdp_config, **configuration.parallelism_config}
        assert nested.keys() <= known
        assert configuration.fsdp_config.get("fsdp_version", 2) == 2

    @pytest.mark.parametrize(
        ("name", "kind", "processes", "machines"),
        [
            ("cpu", "MULTI_GPU", 2, 1),
            ("gpu-1", "NO", 1, 1),
            ("ddp-8", "MULTI_GPU", 8, 1),
            ("fsdp2-8", "FSDP", 8, 1),
            ("hsdp-2x8", "FSDP", 16, 2),
            ("fsdp2-tp", "MULTI_GPU", 8, 1),
        ],
    )
    def test_what_each_asks_for(self, name: str, kind: str, processes: int, machines: int) -> None:
        configuration = load_config_from_file(str(CONFIGURATIONS[name]))
        assert configuration.distributed_type == DistributedType(kind)
        assert (configuration.num_processes, configuration.num_machines) == (processes, machines)
        assert configuration.mixed_precision == ("no" if name == "cpu" else "bf16")
        sizes = configuration.parallelism_config.values()
        assert not sizes or torch.tensor(list(sizes)).prod() == processes

    def test_all_are_tested(self) -> None:
        assert CONFIGURATIONS.keys() == {*FEWER, "cpu", "gpu-1"}

    @pytest.mark.parametrize("name", CONFIGURATIONS)
    def test_each_says_how_to_start_it(self, name: str) -> None:
        text = CONFIGURATIONS[name].read_text(encoding="utf-8")
        assert f"#   accelerate launch --config_file recipes/launch/{name}.yaml" in text


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """What every layout has to come out at."""
    settings = tiny_settings(tmp_path_factory.mktemp("launch"))
    on_one_process(settings)
    return settings


def on_one_process(settings: Settings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", settings.output.parent / "cache")
        try:
            pretrain(settings)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def assert_alike(settings: Settings, expected: Settings) -> None:
    for name in ("train_loss", "gradient_norm", "held_out_loss", "learning_rate"):
        assert logged(settings, name) == pytest.approx(logged(expected, name), abs=1e-4), name
    # The first selections are the same; later ones may differ where norms are equal but for rounding.
    for name in ("dion2/coverage", "dion2/captured_mass"):
        assert logged(settings, name)[:2] == pytest.approx(logged(expected, name)[:2], abs=1e-4), name
    torch.testing.assert_close(saved_logits(settings), saved_logits(expected), rtol=0, atol=1e-4)


DIVIDED = ("fsdp2-tp",)
"""Where transformers divides the model."""

needs_division = pytest.mark.skipif(not DIVIDES_MODELS, reason="this transformers cannot divide models so")


class TestLayouts:
    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[needs_division] if name in DIVIDED else []) for name in FEWER]
    )
    def test_trains_like_one_process(self, name: str, one_process: Settings) -> None:
        """And leaves a checkpoint from which one process goes on to the same end."""
        ranks, changes = FEWER[name]
        settings = replace(one_process, output=one_process.output.parent / name)
        run_on_ranks(ranks, settings, environment_of(name, ranks, *changes))
        assert_alike(settings, one_process)
        model = saved_weights(settings)
        assert {weight.dtype for weight in model.values()} == {torch.float32}
        shutil.rmtree(settings.output / "checkpoints" / "step-00000004")
        on_one_process(replace(settings, resume=True))
        assert_alike(settings, one_process)

    def test_losses_under_fsdp2_are_not_rounded_to_the_precision_of_products(self, one_process: Settings) -> None:
        """Two of bfloat16 have a mean that is a multiple of 1/64, from 4 to 8."""
        ranks, changes = FEWER["fsdp2-8"]
        settings = replace(one_process, output=one_process.output.parent / "bf16", precision="bf16", steps=2)
        run_on_ranks(ranks, settings, environment_of("fsdp2-8", ranks, *changes))
        losses = logged(settings, "train_loss")
        assert all(4 < loss < 8 for loss in losses)
        assert all(loss * 64 % 1 for loss in losses)

    def test_resumes_bit_for_bit_under_fsdp2(self, one_process: Settings) -> None:
        """Also with parts of batches, of which the last alone brings gradients together."""
        ranks, changes = FEWER["fsdp2-8"]
        environment = environment_of("fsdp2-8", ranks, *changes)
        settings = replace(one_process, output=one_process.output.parent / "resumed", micro_batch_size=2)
        run_on_ranks(ranks, settings, environment)
        assert_alike(settings, one_process)
        uninterrupted = saved_weights(settings)
        figures = [logged(settings, name) for name in ("train_loss", "gradient_norm", "dion2/turnover")]
        shutil.rmtree(settings.output / "checkpoints" / "step-00000004")
        shutil.rmtree(settings.output / "model")
        run_on_ranks(ranks, replace(settings, resume=True), environment)
        resumed = saved_weights(settings)
        assert all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())
        assert [logged(settings, name) for name in ("train_loss", "gradient_norm", "dion2/turnover")] == figures

    @needs_division
    def test_one_process_is_resumed_under_fsdp2_over_tensor_parallelism(self, one_process: Settings) -> None:
        ranks, changes = FEWER["fsdp2-tp"]
        settings = replace(one_process, output=one_process.output.parent / "grown", resume=True)
        shutil.copytree(one_process.output, settings.output)
        shutil.rmtree(settings.output / "checkpoints" / "step-00000004")
        run_on_ranks(ranks, settings, environment_of("fsdp2-tp", ranks, *changes))
        assert_alike(settings, one_process)


class TestLauncher:
    def test_accelerate_launch_starts_two_processes(self, one_process: Settings) -> None:
        """The real launcher, and the script by its path, as the documentation says."""
        output = one_process.output.parent / "launched"
        settings = replace(one_process, output=output)
        names = ("hidden_size", "layers", "heads", "length", "dataset", "held_out_windows", "steps", "batch_size")
        line = [f"--{name}={getattr(settings, name)}" for name in (*names, "log_every", "checkpoint_every", "output")]
        for name in ("lr", "momentum", "weight_decay", "orthonormalize_dtype"):
            line.append(f"--optimizer.{name}={getattr(settings.optimizer, name)}")
        line += ["--optimizer.adamw_lr=null", "--optimizer.betas=[0.9,0.999]"]
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port=0"]
        found = subprocess.run(
            [*launcher, f"--config_file={CONFIGURATIONS['cpu']}", str(FOLDER / "pretraining" / "train.py"), *line],
            env={**os.environ, "PYTHONPATH": str(FOLDER.parent), "HF_DATASETS_CACHE": str(output.parent / "cache")},
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert found.returncode == 0, found.stderr
        assert "2 ranks on cpu" in found.stdout
        assert found.stdout.count("step      4  held_out_loss") == 1, "printed once"
        assert_alike(settings, one_process)


class TestRefused:
    @pytest.fixture(autouse=True)
    def alone(self) -> Any:
        yield
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def test_fsdp_that_accelerate_would_not_turn_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for key, value in environment_of("fsdp2-8", 2).items():
            monkeypatch.setenv(key, value)
        with pytest.raises(InputError, match="FSDP, which Accelerate turns on for several GPUs only; it found NO"):
            recipe.make_accelerator(Settings())

    @pytest.mark.parametrize(
        ("sizes", "under_fsdp", "message"),
        [
            (
                {"cp_enabled": True, "sp_enabled": False},
                False,
                "context or sequence parallelism, which is not supported",
            ),
            ({"cp_enabled": False, "sp_enabled": False, "tp_enabled": True}, True, "Let distributed_type be MULTI_GPU"),
        ],
    )
    def test_parallelism(self, sizes: dict[str, bool], under_fsdp: bool, message: str) -> None:
        class Asked:
            parallelism_config = type("Sizes", (), sizes)
            is_fsdp2 = under_fsdp

        with pytest.raises(InputError, match=message):
            recipe.tensor_parallel_size(Asked())

    def test_a_batch_that_the_ranks_cannot_share(self) -> None:
        with pytest.raises(InputError, match="--batch_size 16 cannot be divided over 3 ranks that read 5 windows at"):
            recipe.share_of_batch(Settings(), 3)
        assert recipe.share_of_batch(Settings(), 4) == (4, 1)
        assert recipe.share_of_batch(replace(Settings(), micro_batch_size=2), 4) == (2, 2)
