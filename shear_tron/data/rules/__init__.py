"""Rules by which domain weights follow losses, one a page: ``rule.update(evidence, memory) -> (weights, memory)``."""
