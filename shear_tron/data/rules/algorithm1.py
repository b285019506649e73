"""The paper's Algorithm 1 (Sheared LLaMA, section 2.2): ``w * exp(max(loss - reference, 0))``, normalised."""

import numpy as np

from shear_tron.data.rules.evidence import Evidence, Memory, Weights
from shear_tron.data.rules.exponential import Exponential


class Algorithm1(Exponential):
    """A domain better than its reference counts as level with it."""

    def update(self, evidence: Evidence, memory: Memory) -> tuple[Weights, Memory]:
        return self.raised(evidence.weights, np.maximum(evidence.excess, 0.0)), memory
