"""What is compared: the methods, and what a search may change of each."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to train the matrices of a model.

    Attributes:
        name: What records and tables call it.
        algorithm: For `build_optimizer`.
        fraction: Of each matrix.
        lora: Which LoRA factors count as matrices.
        like: The name of a method whose best settings its search begins with; it then looks for the learning rate of
            the matrices alone.
        every_momentum: Whether all its momenta get all seeds, not the best alone.
    """

    name: str
    algorithm: str
    fraction: float = 1.0
    lora: str = "adamw"
    like: str | None = None
    every_momentum: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return {"algorithm": self.algorithm, "fraction": self.fraction, "lora": self.lora}

    @property
    def momenta(self) -> dict[str, float]:
        """The momenta to search, by the rule they follow; AdamW's is its first beta."""
        if self.algorithm == "adamw":
            return {"0.9": 0.9, "0.8": 0.8}
        if self.algorithm == "muon":
            return {"0.95": 0.95, "0.9": 0.9}
        horizon = 1 / self.fraction
        return {"0.95^(n/k)": 0.95**horizon, "0.95": 0.95, "0.9^(n/k)": 0.9**horizon}


@dataclass(frozen=True)
class Candidate:
    """What is tuned.

    Attributes:
        lr: Peak learning rate of the matrices.
        adamw_lr: Peak learning rate of everything else.
        momentum: The rule for the momentum, one of the method's.
    """

    lr: float
    adamw_lr: float
    momentum: str = ""

    def settings(self, method: Method, betas: tuple[float, float]) -> dict[str, Any]:
        """Returns arguments of `build_optimizer`, for a task's betas of AdamW."""
        momentum = method.momenta[self.momentum]
        rates = {"lr": self.lr, "adamw_lr": self.adamw_lr}
        if method.algorithm == "adamw":
            return {**rates, "betas": (momentum, betas[1])}
        return {**rates, "betas": betas, "momentum": momentum}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


ADAMW = Method("AdamW", "adamw")
MUON = Method("Muon", "muon")
DION2_HALF = Method("Dion2 1/2", "dion2", 1 / 2, like="Dion2 1/4")
DION2_QUARTER = Method("Dion2 1/4", "dion2", 1 / 4, every_momentum=True)
DION2_EIGHTH = Method("Dion2 1/8", "dion2", 1 / 8, like="Dion2 1/4")
