"""The launch configurations: Accelerate knows every key, and what it makes of them trains like one process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

import recipes
from recipes.pretraining import train as recipe
from recipes.pretraining.train import Settings, make_accelerator
from tests.recipes.pretraining import (
    alone,
    assert_alike,
    assert_same,
    logged,
    run,
    run_launcher,
    run_on_ranks,
    run_until_power_cut,
    saved_model,
    tiny_settings,
)

FOLDER = Path(recipes.__file__).parent
CONFIGURATIONS = {path.stem: path for path in sorted((FOLDER / "launch").glob("*.yaml"))}

FEWER = {
    "ddp-8": (2, ()),
    "fsdp2-8": (2, ()),
    "hsdp-2x8": (4, ("--num_machines=1", "--parallelism_config_dp_shard_size=2")),
}
"""With how many ranks a configuration is tried, and what else has to change for it."""


def environment_of(name: str, ranks: int, *changes: str) -> dict[str, str]:
    """What Accelerate's launcher adds to the environment of every rank, for this configuration."""
    file = f"--config_file={CONFIGURATIONS[name]}"
    changes = ("--mixed_precision=no", *changes, f"--num_processes={ranks}", "--main_process_port=0")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([file, *changes, "train.py"]))
    assert arguments.multi_gpu or arguments.use_fsdp, "it would start one process"
    environment: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE", "FSDP", "PARALLELISM"))}


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "kind", "processes", "machines"),
        [
            ("cpu", "MULTI_GPU", 2, 1),
            ("gpu-1", "NO", 1, 1),
            ("ddp-8", "MULTI_GPU", 8, 1),
            ("fsdp2-8", "FSDP", 8, 1),
            ("hsdp-2x8", "FSDP", 16, 2),
        ],
    )
    def test_what_each_asks_for(self, name: str, kind: str, processes: int, machines: int) -> None:
        configuration = load_config_from_file(str(CONFIGURATIONS[name]))
        assert isinstance(configuration, ClusterConfig)
        assert configuration.distributed_type == DistributedType(kind)
        assert (configuration.num_processes, configuration.num_machines) == (processes, machines)
        assert configuration.mixed_precision == ("no" if name == "cpu" else "bf16")
        sizes = configuration.parallelism_config.values()
        assert not sizes or torch.tensor(list(sizes)).prod() == processes
        # Accelerate checks the outermost keys alone, and takes the others over without a look.
        known = vars(launch_command_parser().parse_args(["train.py"])).keys()
        assert {**configuration.fsdp_config, **configuration.parallelism_config}.keys() <= known
        assert configuration.fsdp_config.get("fsdp_version", 2) == 2
        text = CONFIGURATIONS[name].read_text(encoding="utf-8")
        assert f"#   accelerate launch --config_file recipes/launch/{name}.yaml" in text

    def test_all_are_tested(self) -> None:
        assert CONFIGURATIONS.keys() == {*FEWER, "cpu", "gpu-1"}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """What every layout has to come out at."""
    return run(tiny_settings(tmp_path_factory.mktemp("launch")))


class TestLayouts:
    @pytest.mark.parametrize("name", FEWER)
    def test_trains_like_one_process(self, name: str, one_process: Settings) -> None:
        ranks, changes = FEWER[name]
        output = one_process.output.parent / name
        settings = run_on_ranks(ranks, one_process, environment_of(name, ranks, *changes), output=output)
        assert_alike(settings, one_process)
        assert {weight.dtype for weight in saved_model(settings).parameters()} == {torch.float32}

    def test_resumes_bit_for_bit_under_fsdp2(self, one_process: Settings) -> None:
        """Also with parts of batches, of which the last alone brings gradients together."""
        environment = environment_of("fsdp2-8", 2)
        settings = replace(one_process, micro_batch_size=2, output=one_process.output.parent / "whole")
        whole = run_on_ranks(2, settings, environment)
        assert_alike(whole, one_process)
        cut = run_on_ranks(2, settings, environment, output=one_process.output.parent / "cut", killed=True)
        assert_same(run_on_ranks(2, cut, environment, resume=True), whole)

    def test_two_processes_resume_what_one_began(self, one_process: Settings) -> None:
        settings = run_until_power_cut(replace(one_process, output=one_process.output.parent / "grown"))
        run_on_ranks(2, settings, environment_of("ddp-8", 2))
        assert_alike(settings, one_process)

    def test_losses_under_fsdp2_are_not_rounded_to_the_precision_of_products(self, one_process: Settings) -> None:
        """Two of bfloat16 have a mean that is a multiple of 1/64, from 4 to 8."""
        environment = environment_of("fsdp2-8", 2, "--mixed_precision=bf16")
        settings = run_on_ranks(2, one_process, environment, output=one_process.output.parent / "bf16", steps=2)
        losses = logged(settings, "train_loss")
        assert len(losses) == 2
        assert all(4 < loss < 8 and loss * 64 % 1 for loss in losses)


class TestLauncher:
    @pytest.mark.timeout(300)
    def test_accelerate_launch_starts_two_processes(self, one_process: Settings) -> None:
        """The real launcher, and the script by its path, as the documentation says."""
        settings = replace(one_process, output=one_process.output.parent / "launched")
        file = settings.output.parent / "settings.yaml"
        values = {name: value for name, value in asdict(settings).items() if value is not None}
        file.write_text(json.dumps(values, default=str))
        printed = run_launcher(
            [
                *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port=0"),
                *(f"--config_file={CONFIGURATIONS['cpu']}", str(FOLDER / "pretraining" / "train.py")),
                f"--config={file}",
            ],
            seconds=240,
            PYTHONPATH=str(FOLDER.parent),
            HF_DATASETS_CACHE=str(settings.output.parent / "cache"),
        )
        assert "parameters on 2 ranks" in printed
        assert printed.count("step      4  val_loss") == 1, "printed once"
        assert_alike(settings, one_process)

    def test_ranks_end_with_a_launcher_that_does_not(self, tmp_path: Path) -> None:
        """Ranks have sessions of their own, as torch's launcher gives them, and its pipes: one left is awaited."""
        began, ended = tmp_path / "began", tmp_path / "ended"
        rank = f"import time; open({str(began)!r}, 'w'); time.sleep(20); open({str(ended)!r}, 'w')"
        launch = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
        with pytest.raises(subprocess.TimeoutExpired):
            run_launcher([sys.executable, "-c", launch, rank], seconds=3)
        assert began.exists() and not ended.exists()


class TestRefused:
    @pytest.fixture(autouse=True)
    def alone(self, tmp_path: Path) -> Iterator[None]:
        with alone(tmp_path):
            yield

    def test_fsdp_that_accelerate_would_not_turn_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for key, value in environment_of("fsdp2-8", 2).items():
            monkeypatch.setenv(key, value)
        with pytest.raises(ValueError, match="which Accelerate turns on for several GPUs only; it would train by NO"):
            make_accelerator(Settings())

    def test_tensor_parallelism(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under FSDP Accelerate would leave the layers whole, and give two ranks the same windows."""
        for size, message in ((2, "Tensor, context and sequence parallelism are not done here"), (1, "")):
            sizes = SimpleNamespace(non_data_parallel_size=size)
            made = SimpleNamespace(parallelism_config=sizes, log_with=[], state=SimpleNamespace())
            monkeypatch.setattr(recipe, "Accelerator", lambda *_, made=made, **__: made)
            with pytest.raises(ValueError, match=message) if message else nullcontext():
                make_accelerator(Settings())
