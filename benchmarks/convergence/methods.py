"""The methods that are compared, and the hyperparameters that are searched for each."""

from dataclasses import asdict, dataclass, replace
from typing import Any

SHORTER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0)
"""Memories to try, down to none; few searches get that far."""


@dataclass(frozen=True)
class Method:
    """A way to train the matrices of a model.

    Attributes:
        name: In records and tables.
        algorithm: For `build_optimizer`.
        fraction: Of each matrix; of Dion its rank, as a share of the shorter axis.
        select: Which slices Dion2 selects from; None where the algorithm says it.
        lora: Which LoRA factors count as matrices.
        has_rest: Whether there is anything that is no matrix, so that `adamw_lr` has an effect.
        blocks: How a fused weight is trained, "whole", "split" or "per head"; None where a task has none.
        like: The name of a method whose best settings its search begins with; it then looks for the learning rate of
            the matrices alone.
        in_depth: Whether all seeds, and the longer run, are also made with the first two of its momenta; and all seeds
            with fewer steps.
    """

    name: str
    algorithm: str
    fraction: float = 1.0
    select: str | None = None
    lora: str = "adamw"
    has_rest: bool = True
    blocks: str | None = None
    like: str | None = None
    in_depth: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        select = {} if self.select is None else {"select": self.select}
        fraction = "rank_fraction" if self.algorithm == "dion" else "fraction"
        return {"algorithm": self.algorithm, fraction: self.fraction, "lora": self.lora, **select}

    @property
    def momenta(self) -> dict[str, float]:
        """The momenta to try, by the rule they follow, from long memory to short; AdamW's is its first beta.

        At a fraction k/n, mu^(n/k) remembers as many steps as mu does at the whole: a slice decays when it is selected.
        """
        if self.algorithm == "adamw":
            return {str(beta): beta for beta in SHORTER}
        if self.algorithm == "muon":
            return {str(mu): mu for mu in (0.95, *SHORTER)}
        restored = {f"{mu}^(n/k)": mu ** (1 / self.fraction) for mu in (0.95, *SHORTER)}
        return {"0.95": 0.95, **restored}


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
DION2_QUARTER = Method("Dion2 1/4", "dion2", 1 / 4, in_depth=True)
DION2_OUTPUTS = Method("Dion2 1/4, outputs", "dion2", 1 / 4, select="output", like="Dion2 1/4")
DION3_HALF = Method("Dion3 1/2", "dion3", 1 / 2, like="Dion3 1/4")
DION3_QUARTER = Method("Dion3 1/4", "dion3", 1 / 4)
DION3_EIGHTH = Method("Dion3 1/8", "dion3", 1 / 8, like="Dion3 1/4")
DION_HALF = Method("Dion 1/2", "dion", 1 / 2, like="Dion 1/4")
DION_QUARTER = Method("Dion 1/4", "dion", 1 / 4)
ADAMW_LORA = Method("AdamW", "adamw", lora="both", has_rest=False)
DION2_QUARTER_LORA = Method("Dion2 1/4, A and B", "dion2", 1 / 4, lora="both", has_rest=False)
DION2_QUARTER_LORA_B = Method("Dion2 1/4, B alone", "dion2", 1 / 4, lora="B", like=DION2_QUARTER_LORA.name)
DION2_EIGHTH = Method("Dion2 1/8", "dion2", 1 / 8, like="Dion2 1/4")


def in_blocks(method: Method) -> tuple[Method, ...]:
    """Returns a method three times, for fused weights: whole and per head begin with the settings of split."""
    split = f"{method.name}, split"
    return tuple(
        replace(method, name=f"{method.name}, {blocks}", blocks=blocks, like=like, in_depth=False)
        for blocks, like in (("whole", split), ("split", None), ("per head", split))
    )
