"""One rank of a run, from joining the others to its exit status; whatever happens, one rank says it once."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shear_tron import unforeseen
from shear_tron.parallel import topology
from shear_tron.parallel.agree import AgreedError
from shear_tron.parallel.failure import is_first_to_fail, keep_recording, lost_peer, silent_ranks
from shear_tron.parallel.topology import Topology
from shear_tron.progress import bar
from shear_tron.pruning.reached import missed, told
from shear_tron.train.cached import Filler
from shear_tron.train.loop import Trainer
from shear_tron.train.plan import Inputs, Plan
from shear_tron.train.stopping import Signals, Stopped

FAILED, MISSED = 1, 3
RECORDINGS = "flight-recorder"  # in a run's folder: of each rank that lost a peer


def session(
    plan: Plan,
    inputs: Inputs,
    device: torch.device,
    compute: torch.dtype,
    changed: Sequence[str],
    command: Sequence[str],
    strict: bool = False,
) -> int:
    """Train, and return the exit status: 0, 1 for a run that failed, 143 or 130 for one that was asked to stop.

    changed: see ``Trainer``; command: what was typed, for telling how to go on. strict: 3 for a pruning run whose masks
    did not reach the target, which is a warning otherwise.
    """
    with Signals() as signals:  # also while telling what broke: a launcher ends the peers of a broken rank
        ranks = topology.start(plan.layout, device, plan.config.parallel.timeout)
        try:
            with bar(f"reading {plan.config.model}", silent=not ranks.is_main):
                trainer = Trainer(plan, inputs, ranks, compute, signals, changed)
            losses = trainer.fit()
        except Stopped as stop:
            torchrun = "torchrun ... " if plan.layout.world > 1 and "--nproc" not in command else ""
            again = torchrun + shlex.join(["shear-tron", *command])
            _say(ranks, f"{stop}; resume with: {again}")
            return stop.status
        except AgreedError as error:
            _say(ranks, str(error))
            return FAILED
        except Exception as error:
            return _tell(error, plan)
        else:
            if ranks.is_main:
                print(json.dumps({"run": plan.config.run, "held_out": losses}), flush=True)
            verb, folder = ("extract", "small") if plan.target else ("export", "final")
            _say(ranks, f"done; next: shear-tron {verb} {plan.config.run} models/{folder}")
            shortfall = _shortfall(plan, trainer)
            if shortfall:
                _say(ranks, shortfall)
            return MISSED if shortfall and strict else 0
        finally:
            topology.stop()


def fill(plan: Plan, inputs: Inputs, device: torch.device, compute: torch.dtype, headroom: float | None) -> int:
    """Fill a cache with samples of a teacher, on this rank; returns the exit status."""
    ranks = topology.start(plan.layout, device, plan.config.parallel.timeout)
    try:
        filler = Filler(plan, inputs, ranks, compute)
        filler.fill(headroom, lambda text: _say(ranks, text, "cache-teacher"))
    except AgreedError as error:
        _say(ranks, str(error), "cache-teacher")
        return FAILED
    except Exception as error:
        return _tell(error, plan, "cache-teacher")
    else:
        _say(ranks, f"done; {plan.config.distill and plan.config.distill.cache} has all of it", "cache-teacher")
        return 0
    finally:
        topology.stop()


def _shortfall(plan: Plan, trainer: Trainer) -> str | None:
    """Of a pruning run that ended, what its masks lack; None where nothing does."""
    if trainer.pruner is None or plan.target is None:
        return None
    short = missed(trainer.pruner.method.expected(), plan.architecture.shape, plan.target)
    return f"WARNING: {told(short)}; use more steps, or a higher prune.learning_rate" if short else None


def _say(ranks: Topology, text: str, verb: str = "train") -> None:
    if ranks.is_main:
        print(f"shear-tron {verb}: {text}", file=sys.stderr, flush=True)


def _tell(error: Exception, plan: Plan, verb: str = "train") -> int:
    """Say what broke on this rank, unless another rank has spoken: peers of a broken rank break too.

    Returns the exit status. An error that nobody foresaw is raised again, for ``main`` to tell, where there is one rank
    only: with several, the launcher may end this one as soon as another has ended.
    """
    kept = keep_recording(Path(plan.config.run) / RECORDINGS) if lost_peer(error) else None
    if not is_first_to_fail():
        return FAILED
    prefix = f"rank {topology.rank()}: " if plan.layout.world > 1 else ""
    if lost_peer(error):
        silent = silent_ranks()
        who = f"rank {', '.join(map(str, silent))} does" if silent else "a rank did"
        reason = (
            f"{who} not answer: it was killed (out of memory?), its machine is gone, or it hangs for more than "
            f"parallel.timeout={plan.config.parallel.timeout} seconds; start the same command again to go on from "
            f"the last checkpoint ({_in_one_line(error)}){f'; the last collectives: {kept.parent}' if kept else ''}"
        )
    elif isinstance(error, ValueError | OSError):
        reason = str(error)
    elif plan.layout.world == 1:
        raise error
    else:
        reason = unforeseen.told(error)
    print(f"shear-tron {verb}: {prefix}{reason}", file=sys.stderr, flush=True)
    return FAILED


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200]
