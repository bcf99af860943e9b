"""Selection and momenta on the device equal a short CPU reference bit for bit, at the sizes of real models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion2_lightning import Dion2

STEPS = {"cpu": 2, "cuda": 6}
FRACTION, MOMENTUM = 0.25, 0.95

LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "q_proj": ((576, 576), {}),  # of SmolLM2-135M, as up to down_proj
    "o_proj": ((576, 576), {}),
    "k_proj": ((192, 576), {}),
    "up_proj": ((1536, 576), {}),
    "down_proj": ((576, 1536), {}),
    "c_attn": ((768, 2304), {"transposed": True}),  # GPT-2's Conv1D
    "mlp.c_proj": ((3072, 768), {"transposed": True}),
    "experts": ((8, 512, 256), {"batched": True}),
    "experts stored (in, out)": ((8, 512, 256), {"batched": True, "transposed": True}),
    "adapter": ((2048, 8), {}),
}


def plain(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Slices of different sizes along both axes."""
    scale = torch.rand(shape[-2], 1, generator=generator) + torch.rand(1, shape[-1], generator=generator)
    return torch.randn(shape, generator=generator) * scale


def tied(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Small whole numbers: many sums of absolute values are equal."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def mostly_zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Fewer rows and columns are nonzero than are selected."""
    gradient = torch.zeros(shape)
    gradient[..., 3::16, 5::16] = torch.randn(gradient[..., 3::16, 5::16].shape, generator=generator)
    return gradient


class ReferenceMatrix:
    """The momentum of one (out, in) matrix, and which of its slices a step selects."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.momentum = torch.zeros(shape)
        self.axis = 0 if shape[0] <= shape[1] else 1
        self.selected: list[int] = []

    def step(self, gradient: Tensor) -> None:
        self.momentum += gradient
        slices = self.momentum if self.axis == 0 else self.momentum.T
        norms = slices.double().abs().sum(1).float().tolist()
        count = -(-len(norms) // 4)
        self.selected = sorted(sorted(range(len(norms)), key=lambda index: (-norms[index], index))[:count])
        slices[self.selected] *= MOMENTUM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draw", [plain, tied, mostly_zero], ids=lambda draw: draw.__name__)
def test_selection_and_momenta_of_real_sizes(draw: Any, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for name, (shape, _) in LAYERS.items()
    }
    groups = [{"params": [parameters[name]], "name": name, **settings} for name, (_, settings) in LAYERS.items()]
    optimizer = Dion2(groups, fraction=FRACTION, momentum=MOMENTUM)

    def matrices(name: str, tensor: Tensor) -> list[Tensor]:
        """As (out, in), on the CPU."""
        stack = tensor.cpu() if tensor.ndim == 3 else tensor.cpu()[None]
        return list(stack.mT if LAYERS[name][1].get("transposed") else stack)

    expected = {
        name: [ReferenceMatrix(tuple(each.shape)) for each in matrices(name, p)] for name, p in parameters.items()
    }
    for _ in range(STEPS[device]):
        for name, parameter in parameters.items():
            gradient = draw(parameter.shape, generator).to(dtype)
            parameter.grad = gradient.to(device)
            for matrix, matrix_gradient in zip(expected[name], matrices(name, gradient), strict=True):
                matrix.step(matrix_gradient.float())
        optimizer.step()
        for name, parameter in parameters.items():
            selection = optimizer.selection_of(parameter)
            momenta = matrices(name, optimizer.state[parameter]["momentum"])
            for matrix, indices, momentum in zip(
                expected[name], selection.indices.cpu().view(len(momenta), -1), momenta, strict=True
            ):
                assert (selection.axis, indices.tolist()) == (matrix.axis, matrix.selected), name
                assert torch.equal(momentum, matrix.momentum), name


def test_gradients_have_ties_and_zeros_at_the_threshold() -> None:
    """The last selected slice ties with the first that is not; and some selected slices are zero."""
    generator = torch.Generator().manual_seed(0)
    norms = tied((1536, 576), generator).abs().sum(0).sort(descending=True).values
    assert norms[143] == norms[144]
    norms = mostly_zero((1536, 576), generator).abs().sum(0).sort(descending=True).values
    assert norms[0] > norms[143] == 0
