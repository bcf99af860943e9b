"""The search, the records and the tables, with a task so small that whole studies run; the real tasks for a step."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.convergence import data, search, training
from benchmarks.convergence.methods import (
    ADAMW,
    DION2_EIGHTH,
    DION2_HALF,
    DION2_QUARTER,
    DION2_QUARTER_LORA,
    DION2_QUARTER_LORA_B,
    MUON,
    Candidate,
    Method,
)
from benchmarks.convergence.report import (
    RESULTS,
    ROOT,
    compared,
    draw,
    outcomes,
    read_studies,
    replace_block,
    search_table,
    section,
    summary,
    table,
)
from benchmarks.convergence.search import SEARCH_SEED, TIMING, Study, last_loss, moved_rate
from benchmarks.convergence.tasks import FULL, SMALL, Batch, Task
from benchmarks.convergence.training import Record, time_steps, train

CPU = torch.device("cpu")
STUDIES = read_studies(RESULTS)


@dataclass(frozen=True)
class Regression(Task):
    """A linear map is learned."""

    name = "regression"
    title = "Regression"
    methods: ClassVar[tuple[Method, ...]] = (ADAMW, MUON, DION2_HALF, DION2_QUARTER)
    starts: ClassVar[dict[str, Candidate]] = dict.fromkeys(("adamw", "muon", "dion2"), Candidate(0.01, 0.01))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield {"input_ids": torch.randn(self.batch_size, 8, generator=generator)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = batch["input_ids"]
        return functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {"loss": self.loss(model, next(self.batches(7, 1))).item(), "accuracy": 0.5}


@pytest.fixture
def task() -> Regression:
    return Regression(
        steps=6, search_steps=4, short_steps=3, long_steps=8, measure_every=2, batch_size=4, weight_decay=0.0
    )


@pytest.fixture
def study(task: Regression, tmp_path: Path) -> Study:
    return Study(task, tmp_path / "results" / "regression.jsonl", CPU)


def record_of(method: str, seed: int, losses: list[float], momentum: str = "0.9", accuracy: float = 0.5) -> Record:
    """A record with a measurement every two steps."""
    curve = [{"step": 2 * n, "loss": loss, "accuracy": accuracy} for n, loss in enumerate(losses, start=1)]
    settings = {"lr": 0.01, "adamw_lr": 0.02, "momentum": momentum}
    return {"method": method, **settings, "seed": seed, "steps": 6, "curve": curve, "seconds": 30.0, **MACHINE}


MACHINE = {"device": "a CPU", "threads": 1, "torch": "2", "date": "2026-01-02"}


class TestMethods:
    @pytest.mark.parametrize(
        ("method", "momenta"),
        [
            (ADAMW, [0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0]),
            (MUON, [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0]),
            (DION2_HALF, [0.95, 0.95**2, 0.9**2, 0.8**2, 0.7**2, 0.6**2, 0.5**2, 0.3**2, 0]),
            (DION2_QUARTER, [0.95, 0.95**4, 0.9**4, 0.8**4, 0.7**4, 0.6**4, 0.5**4, 0.3**4, 0]),
            (DION2_EIGHTH, [0.95, 0.95**8, 0.9**8, 0.8**8, 0.7**8, 0.6**8, 0.5**8, 0.3**8, 0]),
        ],
        ids=lambda value: value.name if isinstance(value, Method) else "",
    )
    def test_momenta(self, method: Method, momenta: list[float]) -> None:
        assert list(method.momenta.values()) == pytest.approx(momenta)

    def test_settings_reach_the_optimizer(self, task: Regression, monkeypatch: pytest.MonkeyPatch) -> None:
        optimizer = training._optimizer(task, DION2_QUARTER, Candidate(0.1, 0.2, "0.9^(n/k)"), task.model())
        matrices, rest, *_ = optimizer.param_groups
        assert (matrices["algorithm"], matrices["fraction"], matrices["lr"]) == ("dion2", 0.25, 0.1)
        assert matrices["momentum"] == pytest.approx(0.9**4)
        assert (rest["algorithm"], rest["lr"], rest["betas"]) == ("adamw", 0.2, task.betas)
        optimizer = training._optimizer(task, ADAMW, Candidate(0.1, 0.2, "0.8"), task.model())
        assert [group["algorithm"] for group in optimizer.param_groups] == ["adamw"] * len(optimizer.param_groups)
        assert {group["betas"] for group in optimizer.param_groups} == {(0.8, task.betas[1])}

    @pytest.mark.parametrize("method", SMALL["fused"].methods, ids=lambda method: method.name)
    def test_every_method_of_a_fused_weight_says_how_it_is_divided(self, method: Method) -> None:
        """The whole too: it is not to depend on what is found by itself."""
        task: Any = SMALL["fused"]
        texts = {"whole": "whole", "split": "q 128 | k 128 | v 128", "per head": "q 4*32 | k 4*32 | v 4*32"}
        model = replace(task, layers=1).model()
        optimizer = training._optimizer(task, method, task.starts[method.algorithm], model)
        [group] = [
            each for each in optimizer.param_groups if "transformer.h.0.attn.c_attn.weight" in each["param_names"]
        ]
        assert group.get("splits") == texts.get(method.blocks)

    @pytest.mark.parametrize("method", SMALL["lora"].methods[1:], ids=lambda method: method.name)
    def test_adapters_of_low_rank_have_the_fraction_of_their_method(self, method: Method) -> None:
        config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        adapters = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), adapters)
        optimizer = training._optimizer(SMALL["lora"], method, Candidate(1.0, 2.0, "0.95"), model)
        assert {group["fraction"] for group in optimizer.param_groups if group["algorithm"] == "dion2"} == {
            method.fraction
        }


class TestTraining:
    def test_every_method_starts_with_the_same_weights_and_sees_the_same_batches(
        self, task: Regression, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, list[Tensor]] = {}

        def spy(self: Regression, model: nn.Module, batch: Batch) -> Tensor:
            if model.training:
                seen[name].append(batch["input_ids"])
            if model.training and len(seen[name]) == 1:
                seen[name].insert(0, torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
            return loss(self, model, batch)

        loss = Regression.loss
        monkeypatch.setattr(Regression, "loss", spy)
        for method in (ADAMW, MUON, DION2_QUARTER):
            name = method.name
            seen[name] = []
            train(task, method, Candidate(0.01, 0.01, next(iter(method.momenta))), 3, 4, 2, CPU)
        for name in ("Muon", "Dion2 1/4"):
            assert len(seen[name]) == 5
            assert all(torch.equal(*pair) for pair in zip(seen["AdamW"], seen[name], strict=True))

    def test_a_repeated_run_is_identical(self, task: Regression) -> None:
        runs = [train(task, DION2_QUARTER, Candidate(0.01, 0.01, "0.95"), 3, 4, 2, CPU) for _ in range(2)]
        assert runs[0]["curve"] == runs[1]["curve"]
        assert [point["step"] for point in runs[0]["curve"]] == [2, 4]

    def test_a_run_that_diverges_comes_last(self, task: Regression, study: Study) -> None:
        record = train(task, ADAMW, Candidate(1e30, 1e30, "0.9"), 0, 4, 4, CPU)
        assert record["curve"][-1]["loss"] is None
        assert last_loss(record) == math.inf
        json.loads(json.dumps(record, allow_nan=False))

    def test_ratios_of_step_times_are_to_the_first_method(self, task: Regression) -> None:
        candidates = {method: Candidate(0.01, 0.01, next(iter(method.momenta))) for method in (ADAMW, MUON)}
        timing = time_steps(task, candidates, CPU, rounds=2, steps=1)
        assert list(timing["milliseconds"]) == list(timing["ratios"]) == ["AdamW", "Muon"]
        assert timing["ratios"]["AdamW"] == 1.0
        assert timing["ratios"]["Muon"] > 0


class TestSearch:
    def test_it_climbs_to_the_lowest_loss(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        def loss(self: Study, method: Method, candidate: Candidate) -> float:
            tried.add(candidate.momentum)
            losses = {"0.95": 0.0, "0.95^(n/k)": -0.1, "0.9^(n/k)": 0.0, "0.8^(n/k)": -0.2}
            losses |= {"0.7^(n/k)": -0.1, "0.6^(n/k)": -0.2 - search.MARGIN / 2, "0.5^(n/k)": -9.0}
            rates = math.log(candidate.lr / 0.05) ** 2 + math.log(candidate.adamw_lr / 0.003) ** 2
            return rates + losses[candidate.momentum]

        tried: set[str] = set()
        monkeypatch.setattr(Study, "loss", loss)
        best, *others = study.search(DION2_QUARTER)
        assert best.momentum == "0.8^(n/k)"
        assert "0.5^(n/k)" not in tried, "two before it were no better"
        assert abs(math.log(best.lr / 0.05)) <= math.log(search.FACTOR) / 2 + 0.05
        assert abs(math.log(best.adamw_lr / 0.003)) <= math.log(search.FACTOR) / 2 + 0.05
        assert [each.momentum for each in others] == ["0.95", "0.95^(n/k)"]
        assert {each.adamw_lr for each in others} == {best.adamw_lr}
        [half] = study.search(DION2_HALF)
        assert half == best

    def test_only_rates_with_an_effect_are_searched(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        """With adapters alone, A and B leave nothing for `adamw_lr`; where B is alone, A still needs a rate."""

        def loss(self: Study, method: Method, candidate: Candidate) -> float:
            tried[method.name].add(candidate.adamw_lr)
            return math.log(candidate.lr / 0.05) ** 2 + math.log(candidate.adamw_lr / 0.003) ** 2

        tried: dict[str, set[float]] = defaultdict(set)
        monkeypatch.setattr(Study, "loss", loss)
        monkeypatch.setattr(Regression, "methods", (DION2_QUARTER_LORA, DION2_QUARTER_LORA_B))
        [both] = study.search(DION2_QUARTER_LORA)
        [alone] = study.search(DION2_QUARTER_LORA_B)
        assert tried[DION2_QUARTER_LORA.name] == {both.adamw_lr}
        assert alone.lr == both.lr
        assert abs(math.log(alone.adamw_lr / 0.003)) <= math.log(search.FACTOR) / 2 + 0.05

    @pytest.mark.parametrize("method", SMALL["lora"].methods, ids=lambda method: method.name)
    def test_adapters_are_trained_with_the_rates_that_are_searched(self, method: Method) -> None:
        """The rest is trained at `adamw_lr`, if there is one."""
        model: Any = SMALL["lora"].model()
        optimizer = training._optimizer(SMALL["lora"], method, Candidate(1.0, 2.0, next(iter(method.momenta))), model)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        by_name = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
        assert {rate for name, rate in by_name.items() if "lora_B" in name} == {1.0}
        assert {rate for name, rate in by_name.items() if "lora_A" in name} == {2.0 if method.has_rest else 1.0}

    def test_where_the_task_gives_a_momentum_one_rate_is_searched(
        self, study: Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def loss(self: Study, method: Method, candidate: Candidate) -> float:
            tried.append(candidate)
            return math.log(candidate.lr / 0.02) ** 2

        tried: list[Candidate] = []
        start = Candidate(0.01, 0.02, "0.8")
        monkeypatch.setattr(Study, "loss", loss)
        monkeypatch.setattr(Regression, "starts", {"adamw": start})
        assert study.search(ADAMW) == [replace(start, lr=moved_rate(0.01, 2, 0.01))]
        assert {(each.adamw_lr, each.momentum) for each in tried} == {(0.02, "0.8")}

    def test_common_momenta_get_all_seeds_besides_the_best(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second of them may be no better than the first, and a shorter one better than both."""
        losses = {"0.95": 0.0, "0.95^(n/k)": 1.0, "0.9^(n/k)": -1.0, "0.8^(n/k)": -2.0, "0.7^(n/k)": 1.0}
        monkeypatch.setattr(Study, "loss", lambda self, method, each: losses.get(each.momentum, 9.0))
        best, *others = study.search(DION2_QUARTER)
        assert best.momentum == "0.8^(n/k)"
        assert [each.momentum for each in others] == ["0.95"]

    def test_a_study_has_every_run_and_an_interrupted_one_resumes(
        self, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        study.run()
        whole = study.results.read_text().splitlines()
        records = study.records
        for method in study.task.methods:
            runs = [r for r in records if r["method"] == method.name and r["seed"] != SEARCH_SEED]
            kinds = [(r["lr"], r["adamw_lr"], r["momentum"], r["steps"]) for r in runs if r["steps"] != 8]
            assert len(set(kinds)) in ((3, 4) if method is DION2_QUARTER else (1,))
            assert all(kinds.count(kind) == 3 for kind in kinds)
            longer = [r["seed"] for r in runs if r["steps"] == 8]
            candidates = {kind[:3] for kind in kinds}
            assert longer == ([0, 1] * len(candidates) if method.like is None else [])
            points = {6: [2, 4, 6], 3: [2, 3], 8: [2, 4, 6, 8]}
            assert all([point["step"] for point in r["curve"]] == points[r["steps"]] for r in runs)
        assert records[-1]["method"] == TIMING
        assert len(capsys.readouterr().out.splitlines()) == len(records)

        study.results.write_text("\n".join(whole[:-4]) + "\n")
        study.run()
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 4
        again = study.records
        assert [r.get("curve") for r in again] == [r.get("curve") for r in records]

        monkeypatch.setattr(search, "train", lambda *_: pytest.fail("a run was made again"))
        monkeypatch.setattr(search, "time_steps", lambda *_: pytest.fail("times were taken again"))
        study.run()

    def test_methods_can_be_run_separately(self, study: Study) -> None:
        study.run(["Muon"])
        assert {record["method"] for record in study.records} == {"Muon"}
        study.run(["AdamW", "Muon"])
        assert {record["method"] for record in study.records} == {"Muon", "AdamW", TIMING}
        assert list(study.records[-1]["ratios"]) == ["AdamW", "Muon"]

    def test_unknown_methods_are_refused(self, study: Study) -> None:
        with pytest.raises(ValueError, match=r"--methods: regression has no \['Lion'\], but \['AdamW', "):
            study.run(["Lion", "Muon"])
        assert not study.results.exists()

    def test_a_method_needs_the_search_of_the_one_it_begins_with(self, study: Study) -> None:
        with pytest.raises(ValueError, match="Dion2 1/2 begins with the settings of Dion2 1/4; run that first"):
            study.run(["Dion2 1/2"])
        assert not study.results.exists()

    def test_climbing_up_and_down_meets_the_same_rates(self) -> None:
        below = moved_rate(2e-3, -1, start=2e-3)
        assert below == 0.0013
        assert moved_rate(below, 1, start=2e-3) == 2e-3
        assert moved_rate(below, -1, start=2e-3) == moved_rate(2e-3, -2, start=2e-3) == 0.00089


class TestTables:
    @pytest.fixture
    def records(self) -> list[Record]:
        adamw = [record_of("AdamW", seed, [5.0, 4.0, 2.0 + seed], accuracy=0.5) for seed in (0, 1)]
        searched = {**record_of("AdamW", SEARCH_SEED, [9.0]), "steps": 4}
        dion2 = [record_of("Dion2 1/4", seed, [4.0, 3.0, 1.0], "0.95^(n/k)", 0.75) for seed in (1, 0)]
        other = [record_of("Dion2 1/4", seed, [4.0, 3.5, 3.0], "0.95") for seed in (0, 1)]
        short = [{**record_of("Dion2 1/4", seed, [4.0, 2.4], "0.95^(n/k)"), "steps": 4} for seed in (0, 1)]
        timing = {"method": TIMING, "ratios": {"AdamW": 1.0, "Dion2 1/4": 1.5}, "milliseconds": {}, **MACHINE}
        return [searched, *adamw, *other, *dion2, *short, timing]

    def test_outcomes(self, task: Regression, records: list[Record]) -> None:
        found = outcomes(task, records)
        assert [(o.method.name, o.candidate.momentum, o.is_best) for o in found] == [
            ("AdamW", "0.9", True),
            ("Dion2 1/4", "0.95^(n/k)", True),
            ("Dion2 1/4", "0.95", False),
            ("Dion2 1/4", "0.95^(n/k)", False),
        ]
        assert found[0].last("loss") == [2.0, 3.0]
        assert found[0].curve() == [(2, 5.0), (4, 4.0), (6, 2.5)]

    @pytest.mark.parametrize(("loss", "steps"), [(5.0, 2), (4.5, 3.0), (4.0, 4), (3.25, 5.0), (2.5, 6), (2.4, None)])
    def test_steps_to_a_loss(self, loss: float, steps: float | None, task: Regression, records: list[Record]) -> None:
        [adamw, *_] = outcomes(task, records)
        assert adamw.steps_to(loss) == steps

    def test_table(self, task: Regression, records: list[Record]) -> None:
        *_, adamw, dion2, other, short = table(task, records).splitlines()
        assert adamw == (
            "| AdamW | 0.01 | 0.02 | beta1 0.9 | 2.500 ± 0.707 (2.000, 3.000) | 50.0 ± 0.0 (50.0, 50.0) "
            "| 100% | 1.00 | 100% |"
        )
        # 2.5 lies a quarter of the way from 3.0 at step 4 to 1.0 at step 6.
        assert dion2.endswith("| 1.000 ± 0.000 (1.000, 1.000) | 75.0 ± 0.0 (75.0, 75.0) | 75% | 1.50 | 112% |")
        assert other.startswith("| Dion2 1/4 | 0.01 | 0.02 | 0.95 |")
        assert other.endswith("| not reached | 1.50 |  |")
        # 2.5 lies 15/16 of the way from 4.0 at step 2 to 2.4 at step 4.
        assert short.startswith("| Dion2 1/4, 4 steps | 0.01 | 0.02 | 0.95^(n/k) = 0.81 |")
        assert short.endswith("| 65% | 1.50 | 97% |")

    def test_runs_that_diverged(self, task: Regression, records: list[Record], tmp_path: Path) -> None:
        diverged = [{**record_of("Muon", seed, [4.0, 3.0, 1.0])} for seed in (0, 1)]
        diverged[1]["curve"] = [{**point, "loss": None} for point in diverged[1]["curve"]]
        for record in diverged:
            record["momentum"] = "0.9"
        rows = table(task, [*records, *diverged]).splitlines()
        [row] = [row for row in rows if row.startswith("| Muon")]
        assert "| diverged (1.000, diverged) |" in row
        assert "| not reached |" in row
        draw(task, [*records, *diverged], tmp_path / "picture.png")
        assert (tmp_path / "picture.png").exists()

    def test_search_table(self, task: Regression, records: list[Record]) -> None:
        assert search_table(task, records).splitlines()[2:] == ["| AdamW | 0.9 | 0.01 | 0.02 | 9.000 |"]

    def test_summary_has_the_best_of_each(self, task: Regression, records: list[Record]) -> None:
        _, _, adamw, dion2 = summary({"regression": (task, records)}).splitlines()
        assert adamw.startswith("| Regression | AdamW | 2.500 ± 0.707 | 50.0 ± 0.0 | 100% |")
        assert dion2 == "|  | Dion2 1/4 | 1.000 ± 0.000 | 75.0 ± 0.0 | 75% | 112% |"

    def test_section_says_how_it_was_run(self, task: Regression, records: list[Record]) -> None:
        first, *_ = section("regression", task, records).splitlines()
        assert first == (
            "`python -m benchmarks.convergence regression`, 2026-01-02; a CPU, 1 thread, torch 2; "
            "9 runs, 4 minutes of training."
        )

    def test_blocks_are_replaced_between_their_marks(self, tmp_path: Path) -> None:
        file = tmp_path / "page.md"
        file.write_text("a\n<!-- x: written by benchmarks.convergence -->\nold\n<!-- x: end -->\nb\n")
        replace_block(file, "x", "new")
        replace_block(file, "x", "newer")
        assert file.read_text() == "a\n<!-- x: written by benchmarks.convergence -->\nnewer\n<!-- x: end -->\nb\n"
        with pytest.raises(ValueError, match=r"page.md has to hold the lines '<!-- y"):
            replace_block(file, "y", "new")


class TestCommittedResults:
    """README and the page of results show what the committed runs give."""

    def test_all_tasks_have_results(self) -> None:
        assert STUDIES.keys() == SMALL.keys()

    def test_rates_without_effect_are_not_shown(self) -> None:
        task, records = STUDIES["lora"]
        assert "| AdamW | 0.9 | 0.001 | - | 3.005 |" in search_table(task, records)
        assert "| AdamW | 0.0023 | - | beta1 0 |" in table(task, records)
        assert "| Dion2 1/4, B alone | 0.0045 | 0.001 |" in table(task, records)

    @pytest.mark.parametrize("name", STUDIES)
    def test_section(self, name: str) -> None:
        task, records = STUDIES[name]
        assert section(name, task, records) in (RESULTS / "README.md").read_text()
        assert (RESULTS / f"{name}.png").stat().st_size > 10_000

    def test_guide(self) -> None:
        assert table(*STUDIES["fused"]) in (ROOT / "docs" / "fine-tuning.md").read_text()

    def test_readme(self) -> None:
        assert summary(compared(STUDIES)) in (ROOT / "README.md").read_text()

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_method_has_all_seeds(self, name: str) -> None:
        task, records = STUDIES[name]
        for outcome in outcomes(task, records):
            assert [record["seed"] for record in outcome.records] == (
                [0, 1] if outcome.steps == task.long_steps else [0, 1, 2]
            )

    @pytest.mark.parametrize("name", STUDIES)
    def test_no_search_ended_at_its_lowest_or_highest_rate(self, name: str) -> None:
        """Momenta are not checked: they are tried down to 0, if need be."""
        task, records = STUDIES[name]
        for method in task.methods:
            own = [r for r in records if r["method"] == method.name and r["seed"] == SEARCH_SEED]
            best = min(own, key=last_loss)
            rates = {r["lr"] for r in own if r["momentum"] == best["momentum"]}
            assert min(rates) < best["lr"] < max(rates)

    @pytest.mark.parametrize("name", STUDIES)
    def test_the_best_of_the_search_has_been_run_with_all_seeds(self, name: str) -> None:
        task, records = STUDIES[name]
        for method in task.methods:
            own = [r for r in records if r["method"] == method.name and r["seed"] == SEARCH_SEED]
            run = {outcome.candidate for outcome in outcomes(task, records) if outcome.method is method}
            lowest = min(last_loss(r) for r in own if Candidate(r["lr"], r["adamw_lr"], r["momentum"]) in run)
            assert lowest <= min(map(last_loss, own)) + search.MARGIN


class TestData:
    def test_rows_hold_whole_conversations_and_padding(self) -> None:
        sizes = (5, 6, 3, 8, 2, 1)
        conversations = [data.Encoded([size] * size, [data.IGNORED, *[size] * (size - 1)]) for size in sizes]
        packed = list(data.pack(conversations, length=8))
        # The 3 fits beside the 5, the 8 fills a row, the 2 beside the 6; of the 1 nothing can be trained on.
        assert [[len(each.tokens) for each in row] for row in packed] == [[5, 3], [8], [6, 2]]
        row = data._row(packed[0][:1], length=8)
        assert row["input_ids"].tolist() == [5] * 5 + [0] * 3
        assert row["labels"].tolist() == [data.IGNORED] + [5] * 4 + [data.IGNORED] * 3
        assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]

    def test_each_pass_has_all_rows_in_another_order(self) -> None:
        first, second = data.shuffled_batches(rows=9, batch_size=9, steps=2, seed=0)
        assert sorted(first) == sorted(second) == list(range(9))
        assert first != second
        assert data.shuffled_batches(rows=9, batch_size=9, steps=1, seed=1) != [first]

    def test_functions_to_train_on_share_neither_source_nor_docstring_with_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        functions = [
            data.Function(f"def f{n % 20}():{' ' * n}...", f"Docstring {n % 30} of at least forty characters.")
            for n in range(60)
        ]
        monkeypatch.setattr(data, "read_functions", lambda: functions)
        train, validation = data.load_functions(20)
        assert len(validation) == 20
        assert len(train) < 40
        for text in (lambda each: "".join(each.source.split()), lambda each: each.docstring):
            assert {text(each) for each in train}.isdisjoint(text(each) for each in validation)


class TestRealTasks:
    @pytest.mark.parametrize(
        ("name", "smaller"),
        [
            ("fused", {"validation_windows": 4}),  # pretraining on the same text
            ("classification", {}),
            ("lora", {"length": 128, "validation_size": 8}),  # a fine-tuning task with adapters
        ],
    )
    def test_trains_a_step(self, name: str, smaller: dict[str, int]) -> None:
        task: Any = SMALL[name]
        task = replace(task, batch_size=2, **smaller)
        method = task.methods[-1]
        candidate = replace(task.starts[method.algorithm], momentum="0.95")
        record = train(task, method, candidate, 0, 1, 2, CPU)
        assert record["curve"][-1]["step"] == 1
        assert 0 < record["curve"][-1]["loss"] < 8

    @pytest.mark.parametrize("name", SMALL)
    def test_the_full_size_is_the_same_task_scaled_up(self, name: str) -> None:
        assert type(FULL[name]) is type(SMALL[name])
        assert FULL[name].steps > SMALL[name].steps

    def test_the_full_pretraining_reads_a_data_set_of_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def load(*arguments: str, **options: str) -> dict[str, list[str]]:
            calls.append((arguments, options))
            return {"text": ["a line of text, " * 20, "", "another, " * 40]}

        monkeypatch.setattr(data, "load_dataset", load)
        whole: Any = FULL["pretraining"]
        task = replace(whole, batch_size=2, length=16, hidden_size=16, layers=1, heads=2)
        record = train(task, ADAMW, Candidate(1e-3, 1e-3, "0.9"), 0, 1, 1, CPU)
        assert calls == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {"split": "train"})]
        assert 0 < record["curve"][-1]["loss"] < 8
