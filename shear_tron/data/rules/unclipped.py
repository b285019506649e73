"""The authors' released code: Algorithm 1 without the maximum, so a domain better than its reference shrinks."""

from shear_tron.data.rules.evidence import Evidence, Memory, Weights
from shear_tron.data.rules.exponential import Exponential


class Unclipped(Exponential):
    """A domain better than its reference shrinks, as in the authors' released code."""

    def update(self, evidence: Evidence, memory: Memory) -> tuple[Weights, Memory]:
        return self.raised(evidence.weights, evidence.excess), memory
