"""Dion3 (arXiv 2608.11612): Dion2 on output slices, with its neurons normalized.

    M    <- M + G                              accumulate
    K    <- the k output slices of M with the largest L1 norms
    S    <- M[K]                               or G[K] + mu M[K] with nesterov
    M[K] <- mu M[K]                            only what is selected decays
    O    <- U V^T of S = U Sigma V^T           orthonormalize
    v[K] <- v[K] + (1 - neuron_beta) (mean square of the slices of O - v[K])
    O    <- |O| O' / |O'| with O' = O / (sqrt(v[K]) + 1e-8), slice by slice
    X    <- (1 - lr weight_decay) X            every entry
    X[K] <- X[K] - lr scale sqrt(n / k) O      only what is selected moves

Of a tall matrix (4 d, d) a quarter of the outputs makes an update of rank d, a quarter of the shorter axis, as Dion2
selects, one of rank d / 4.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from dion2_lightning.algorithms.dion2 import Dion2Algorithm, SlicedSettings
from dion2_lightning.algorithms.hyperparameters import SharedSettings


class Dion3Algorithm(Dion2Algorithm):
    """Orthonormalizes the largest output slices of the momentum, and normalizes their neurons."""

    name: ClassVar[str] = "dion3"
    settings: ClassVar[type[SharedSettings]] = SlicedSettings

    def select(self, group: Mapping[str, Any]) -> str:
        """Return ``"output"``: a neuron is an output slice."""
        return "output"

    def normalizes_neurons(self, group: Mapping[str, Any]) -> bool:
        """Return True."""
        return True
