"""What a pruning run does before its first step, with all units open and the weights as they are."""

from shear_tron.data.sampler import Batches
from shear_tron.parallel.data import Weights
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.topology import Topology
from shear_tron.pruning.rotate import Turned
from shear_tron.train.config import RunConfig
from shear_tron.train.metrics import Log
from shear_tron.train.pruner import Pruner
from shear_tron.train.rotation import rotate


def begin_pruning(
    pruner: Pruner,
    engine: Engine,
    batches: Batches,
    config: RunConfig,
    weights: Weights,
    topology: Topology,
    microbatches: range,
    log: Log,
) -> None:
    """Turn the residual stream where asked, score units on a few batches, and close those to close at once.

    microbatches: this rank's, of the global batch.
    """
    if isinstance(weights, Turned):
        with log.wait("turning the residual stream to its principal axes"):
            pruner.set_energy(rotate(engine, batches, config, weights, topology))
    if pruner.config.method == "hard_concrete":
        return  # learned: there is nothing to score
    with log.wait("scoring units"):
        pruner.calibrate(engine, batches, microbatches)
        pruner.begin(weights.read)
