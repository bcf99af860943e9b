"""Bad input: each error names the argument or parameter, says what was found and what to do; nothing has changed."""

import pytest
import torch
from torch import nn

from dion2_lightning import Dion2


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape or (4, 6), dtype=dtype), requires_grad=dtype.is_floating_point)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, r"lr must be at least 0 and finite, got -0\.001"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0 and finite, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be at least 0 and finite, got inf"),
        ({"lr": "3e-4"}, TypeError, "lr must be a number, got the str '3e-4'; pass a float"),
        ({"lr": torch.tensor(1e-3)}, TypeError, "lr must be a number, got a Tensor; pass a float"),
        ({"lr": True}, TypeError, "lr must be a number, got a bool"),
        ({"fraction": 0}, ValueError, r"fraction must lie in \(0, 1\], got 0"),
        ({"fraction": 1.5}, ValueError, r"fraction must lie in \(0, 1\], got 1\.5; 1 is the whole matrix"),
        ({"fraction": -0.25}, ValueError, r"fraction must lie in \(0, 1\], got -0\.25"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, ValueError, r"momentum must lie in \[0, 1\), got -0\.1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        (
            {"adjust_lr_fn": "moonlight"},
            ValueError,
            "adjust_lr_fn must be one of 'match_rms_adamw', .*, got 'moonlight'",
        ),
        ({"scale_lr_by_fraction": 1}, TypeError, "scale_lr_by_fraction must be True or False, got 1"),
        ({"select": "rows"}, ValueError, "select must be one of 'shorter', 'output', got 'rows'"),
        ({"orthonormalize": "svd"}, TypeError, "orthonormalize must be callable or None, got str"),
        (
            {"orthonormalize_dtype": torch.int8},
            ValueError,
            "orthonormalize_dtype must be None or one of .*got torch.int8",
        ),
        ({"state_dtype": "fp32"}, ValueError, "state_dtype must be None or one of bfloat16, float32, float64.*'fp32'"),
        ({"betas": (0.9,)}, TypeError, r"betas must be two numbers, got \(0\.9,\)"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must lie in \[0, 1\), got 1\.0"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"share_replicas": 1}, TypeError, "share_replicas must be True, False or None, got 1"),
        ({"check_finite": None}, ValueError, "check_finite must be one of True, False, 'skip', got None"),
        ({"check_finite": 1}, ValueError, "check_finite must be one of True, False, 'skip', got 1"),
        ({"fractoin": 0.5}, TypeError, r"Dion2\(\) has no argument 'fractoin'; did you mean 'fraction'\?"),
    ],
    ids=str,
)
def test_settings(settings, error, message):
    with pytest.raises(error, match=message):
        Dion2([matrix()], **settings)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"fractoin": 0.5}, ValueError, "group 'm': unknown entry 'fractoin'; did you mean 'fraction'?"),
        ({"dampening": 0.1}, ValueError, "group 'm': unknown entry 'dampening'; known are "),
        (
            {"algorithm": "dion3", "select": "output"},
            ValueError,
            "group 'm': unknown entry 'select' of algorithm 'dion3'; it belongs to 'dion2', remove it",
        ),
        ({"neuron_beta": 1.0}, ValueError, r"group 'm': neuron_beta must lie in \[0, 1\), got 1.0"),
        ({"normalize_neurons": "yes"}, TypeError, "group 'm': normalize_neurons must be True or False, got 'yes'"),
        (
            {"algorithm": "muon"},
            ValueError,
            "group 'm': algorithm must be one of 'dion2', 'dion3', 'dion', 'adamw', got 'muon'",
        ),
        ({"fraction": 2}, ValueError, r"group 'm': fraction must lie in \(0, 1\], got 2"),
        ({"batched": "yes"}, TypeError, "group 'm': batched must be True or False, got 'yes'"),
        ({"transposed": 1}, TypeError, "group 'm': transposed must be True or False, got 1"),
        ({"param_names": [1]}, TypeError, "group 'm': param_names must be strings, got 1"),
        ({"param_names": ["a", "b"]}, ValueError, "group 'm': param_names has 2 names for 1 parameters"),
    ],
    ids=str,
)
def test_entries_of_groups(entries, error, message):
    optimizer = Dion2([matrix()])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [matrix()], "name": "m", "algorithm": "dion2", **entries})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("parameter", "entries", "message"),
    [
        (matrix(6), {}, r"'w' of shape \(6,\) is not a matrix, .*algorithm='adamw', or let build_optimizer"),
        (nn.Parameter(torch.tensor(1.0)), {}, r"'w' of shape \(\) is not a matrix"),
        (matrix(3, 4, 6), {}, r"'w' of shape \(3, 4, 6\) is not a matrix.*; for a stack of matrices set batched=True"),
        (matrix(4, 6), {"batched": True}, r"'w' of shape \(4, 6\) is not a stack of matrices \(count, rows, columns\)"),
        (matrix(2, 3, 4, 6), {"batched": True}, "is not a stack of matrices"),
        (matrix(dtype=torch.complex64), {}, "'w' .* is in torch.complex64; only real parameters in float16"),
        (matrix(dtype=torch.int32), {}, "'w' .* is in torch.int32; only real parameters in float16"),
        (matrix(dtype=torch.int32), {"algorithm": "adamw"}, "'w' .* is in torch.int32"),
        (matrix(0, 6), {}, r"'w' of shape \(0, 6\) has no entries"),
        (matrix(0, 4, 6), {"batched": True}, "has no entries"),
        (nn.Parameter(torch.eye(4).to_sparse()), {}, "'w' .* is stored as torch.sparse_coo; only dense"),
    ],
)
def test_parameters(parameter, entries, message):
    with pytest.raises(ValueError, match=message):
        Dion2([{"params": [("w", parameter)], **entries}])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("_fsdp_flattened", True, "flattened by FSDP1.*fully_shard"), ("ds_id", 3, "DeepSpeed ZeRO.*fully_shard")],
)
def test_flattened_parameters(attribute, value, message):
    parameter = matrix()
    setattr(parameter, attribute, value)
    with pytest.raises(ValueError, match=message):
        Dion2([parameter])


def test_lists_of_parameters():
    shared = matrix()
    with pytest.raises(ValueError, match="empty parameter list"):
        Dion2([])
    with pytest.raises(ValueError, match="group 0: the parameter list is empty; leave the group out"):
        Dion2([{"params": []}])
    with pytest.raises(ValueError, match="'b' is in the group twice"):
        Dion2([("a", shared), ("b", shared)])
    with pytest.raises(ValueError, match="group 'second': parameter 0 is in another group already"):
        Dion2([{"params": [shared]}, {"params": [shared], "name": "second"}])
    with pytest.raises(TypeError, match="parameter 1 must be a tensor, got str"):
        Dion2([shared, "weight"])
    with pytest.raises(TypeError, match="params must be parameters or groups in a list, got a single tensor"):
        Dion2(shared)
    with pytest.raises(TypeError, match="params must be in a fixed order, got a set"):
        Dion2([{"params": {shared}}])
    with pytest.raises(ValueError, match="mixes named and unnamed"):
        Dion2([("a", shared), matrix()])
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        Dion2([matrix()]).add_param_group([matrix()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process_group": "ddp"}, "process_group must be a torch.distributed.ProcessGroup, got str"),
        ({"share_replicas": "yes"}, "share_replicas must be True, False or None, got 'yes'"),
    ],
    ids=str,
)
def test_how_ranks_share(settings, message):
    with pytest.raises(TypeError, match=message):
        Dion2([matrix()], **settings)


def test_one_row_and_one_column_are_matrices():
    row, column = matrix(1, 6), matrix(6, 1)
    optimizer = Dion2([row, column], lr=0.1)
    row.grad, column.grad = torch.ones(1, 6), torch.ones(6, 1)
    optimizer.step()
    assert optimizer.selection_of(row).indices.tolist() == [0]
    assert optimizer.selection_of(column).indices.tolist() == [0]
    assert row.count_nonzero() == column.count_nonzero() == 6


def test_two_parameters_of_one_name_are_refused() -> None:
    """As of two models in one group: a checkpoint would give both the state of one."""
    models = nn.Linear(4, 4), nn.Linear(4, 4)
    both = [pair for model in models for pair in model.named_parameters() if pair[0] == "weight"]
    message = "group 0: there are two of parameter 'weight', and checkpoints tell them by their names; put them in"
    with pytest.raises(ValueError, match=message):
        Dion2([{"params": both}])
    Dion2([{"params": both[:1]}, {"params": both[1:]}])


def test_names_of_a_group_without_a_name():
    group = {"params": [matrix()], "param_names": ["a", "b"]}
    with pytest.raises(ValueError, match="group 0: param_names has 2 names for 1 parameters"):
        Dion2([dict(group)])
    optimizer = Dion2([matrix()])
    with pytest.raises(ValueError, match="group 1: param_names has 2 names for 1 parameters"):
        optimizer.add_param_group({**group, "algorithm": "dion2"})
