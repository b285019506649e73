"""The training loop: pruning and (continued) pre-training are the same loop with and without a ``Pruner``."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.checkpointer import Checkpointer
from shear_tron.data.mixture import Mixture
from shear_tron.data.sampler import Batches
from shear_tron.files import write_atomically
from shear_tron.model.context import DENSE
from shear_tron.model.flops import flops
from shear_tron.parallel import sync
from shear_tron.parallel.agree import first_text, highest
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Topology
from shear_tron.pruning.snapshot import snapshot
from shear_tron.train.begin import begin_pruning
from shear_tron.train.cached import CachedTeacher
from shear_tron.train.claim import claimed, record_config
from shear_tron.train.evaluation import DomainLosses, HeldOut
from shear_tron.train.facts import data_sheet, open_log, spent
from shear_tron.train.health import Health
from shear_tron.train.metrics import GATES, LOG, REFERENCES, Log
from shear_tron.train.optimizer import adamw, moments, start_moments
from shear_tron.train.plan import Inputs, Plan
from shear_tron.train.pruner import Pruner
from shear_tron.train.resume import go_back, resume
from shear_tron.train.samples import sampler_of
from shear_tron.train.schedule import rate_factor
from shear_tron.train.speed import StepCost
from shear_tron.train.spikes import Spikes
from shear_tron.train.stopping import Signals, Stopped
from shear_tron.train.teacher import Teacher, readout_of
from shear_tron.train.verify import verify_together
from shear_tron.train.viewers import viewers

SNAPSHOTS = 64  # of the gates in a run, about


class Trainer:
    """One run on this rank: model, optimizer, data, and masks if it prunes."""

    def __init__(
        self, plan: Plan, inputs: Inputs, topology: Topology, compute: torch.dtype,
        signals: Signals | None = None, changed: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """changed: keys of the config that were other before this run was stopped, and may be."""
        self.signals, self.changed = signals or Signals(), changed
        self.plan, self.inputs, self.topology, self.compute = plan, inputs, topology, compute
        self.config, self.run = plan.config, Path(plan.config.run)
        train = self.config.train
        readout = readout_of(self.config)
        stages = build_stages(plan.architecture, topology, train.activation_checkpointing, readout, train.compile)
        self.stages = [shard(stage, inputs.weights, topology, torch.float32, compute) for stage in stages]
        counts = plan.microbatches, train.micro_batch, self.config.data.sequence
        self.engine = Engine(self.stages, topology, *counts, compute, inputs.documents(self.config))
        self.teacher: Teacher | CachedTeacher | None = None
        if inputs.cache:
            self.teacher = CachedTeacher(inputs.cache, inputs.names, topology, plan.microbatches)
        elif inputs.teacher:
            self.teacher = Teacher.of(plan, inputs, topology, compute)
        self.optimizer = adamw((p for stage in self.stages for p in stage.parameters()), self.config.optimizer)
        layers, sequence = range(plan.architecture.shape.layers), self.config.data.sequence
        self.dense_flops = flops(plan.architecture, layers, True, train.batch * sequence, sequence)  # of a step
        self.peak = data_sheet(topology.device, self.config.log.peak_tflops)
        self.pruner: Pruner | None = None
        self.cost: StepCost | None = None
        if self.config.prune is not None and plan.target is not None:
            self.pruner = Pruner(plan.architecture, plan.target, self.config.prune, train.seed, topology)
            self.pruner.begin_at(0)
            self.cost = StepCost(self.engine, topology, train.micro_batch * sequence, sequence)
        start_moments(self.optimizer, 0)
        self.step = 0  # batches used
        self.updates_before = 0  # of the optimizer, in the run whose moments this one goes on with
        self.health = Health(train.max_skipped)
        self.spikes = Spikes(train.rewind_above, train.max_skipped)
        self.stop_signal = self.save_is_due = 0  # of this step: what the ranks agreed on
        self.back_to: Path | None = None  # a checkpoint: the loss jumped
        self.mixture: Mixture | None = None
        self.sampler = sampler_of(self.config, inputs.manifest, inputs.names)
        self.share = train.batch // topology.layout.dp  # sequences of a batch that this rank computes
        self.held_out = HeldOut(inputs.manifest, inputs.names, self.config.data, self.engine, topology, self.share)
        if self.config.data.verify:
            verify_together(inputs.manifest, topology)
        sharded.require_finite(self.tensors(), f"{self.config.model} cannot be trained, fetch it again")

    def fit(self) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint if there is one. Returns final held-out losses.

        Raises, on all ranks: Stopped where a signal asked for it, AgreedError where the run cannot go on.
        """
        settings = self.config.checkpoint.model_dump(exclude={"every"})
        with claimed(self.config, self.topology), closing(Checkpointer(self.run, **settings)) as self.checkpointer:
            return self._fit()

    def _fit(self) -> dict[str, float]:
        train = self.config.train
        resumed = resume(self)
        if self.topology.is_main:
            record_config(self.config, self.step)
        seen_by = viewers(self.run, self.step, self.config) if self.topology.is_main else []
        told_by = "pruning" if self.pruner else "training", self.topology.is_main, seen_by
        self.log = log = Log(self.run, self.step, train.steps, *told_by)
        open_log(log, self.step, resumed is not None, self.plan, self.topology, self.compute)
        if self.mixture is None:
            self.mixture = self._start()
        rows = self.topology.dp_rank * self.share, (self.topology.dp_rank + 1) * self.share
        batches = Batches(self.sampler, train.batch, *rows, self.mixture.weights)
        if self.cost:
            with log.wait("timing dense steps"):
                self.cost.time_dense(*self.held_out.rows(torch.arange(self.share)))
        self.signals.remember(tell=self.topology.is_main)
        try:
            if self.pruner and resumed is None:
                where = self.topology, self._own_microbatches(), log
                begin_pruning(self.pruner, self.engine, batches, self.config, self.inputs.weights, *where)
            # where there are no steps, only units to choose
            line: dict[str, Any] = {"step": 0, "tokens": 0, "weights": self._weights()}
            while self.step < train.steps:
                line = self._update(batches)
                if self.back_to:
                    go_back(self, self.back_to, line["loss"], batches)
                    continue
                self.step += 1
                if self.step == train.steps:
                    break
                self._evaluate(line, batches)
                self._tell(line)
                self.health.require(line, self.checkpointer.last_good)
                self._save_or_stop(batches)
            losses = self._held_out("final losses", final=True)
            if resumed is None or self.step > resumed:
                line["held_out"] = losses
                self._tell(line)
                self.health.require(line, self.checkpointer.last_good)
                self._save(batches)
            if skipped := self.health.skipped:
                log.say(f"{skipped} of {self.step} steps were skipped: see `skipped` in {self.run / LOG}")
        finally:
            batches.close()
            log.close()
        return losses

    def _own_microbatches(self) -> range:
        """This rank's, of the global batch."""
        first = self.topology.dp_rank * self.plan.microbatches
        return range(first, first + self.plan.microbatches)

    def _evaluate(self, line: dict[str, Any], batches: Batches) -> None:
        """Held-out losses where they are due after a step, into its log line, and the mixture that follows them."""
        data = self.config.data
        mixes = bool(data.update_every) and self.step % data.update_every == 0
        if mixes or (data.evaluate_every and self.step % data.evaluate_every == 0):
            line["held_out"] = self._held_out(f"losses at step {self.step}")
        if mixes:
            assert self.mixture is not None
            batches.set_weights(self.mixture.update(line["held_out"]))

    def _held_out(self, why: str, final: bool = False) -> dict[str, float]:
        context = self.pruner.decided(final) if self.pruner else DENSE
        with self.log.wait(why, len(self.held_out), "windows") as waiting:
            return self.held_out.losses(context, waiting.update)

    def _save_or_stop(self, batches: Batches) -> None:
        every = self.config.checkpoint.every
        due = (self.save_is_due or (every and self.step % every == 0)) and not self.health.skipped_in_a_row
        if due or self.stop_signal:
            self._save(batches)
        if self.stop_signal:
            raise Stopped(self.stop_signal, f"step {self.step} of {self.config.train.steps} is saved in {self.run}")

    def _update(self, batches: Batches) -> dict[str, Any]:
        """One step: forward and backward of every microbatch, then weights and masks move. Returns its log line.

        Where a loss or gradient is not finite on any rank, nothing moves on any: the batch is used up, and named.
        """
        start = time.perf_counter()
        train, optimizer = self.config.train, self.config.optimizer
        windows, domains, places = batches.next()
        waited = time.perf_counter() - start
        tokens, labels = windows[:, :-1], windows[:, 1:]
        began = time.perf_counter()
        drawn = self.pruner.sample(self.step, self._own_microbatches()) if self.pruner else None
        contexts = self.teacher.teach(tokens, drawn, domains, places) if self.teacher else drawn
        found, *terms = self.engine.broadcast(self.engine.train(tokens, labels, contexts), len(tokens))
        report: dict[str, Any] = {}
        if self.pruner and drawn:
            report |= self.pruner.backward(self.step, drawn)
        pruned_seconds = time.perf_counter() - began
        sync.sum_tied(self.stages, self.topology)
        norm = sync.clip(self.stages, optimizer.clip, self.topology)
        losses = DomainLosses.of(found, domains, self.inputs.names, self.topology)
        for name, term in zip(self.engine.readout.terms[1:], terms, strict=True):
            report[name] = DomainLosses.of(term, domains, self.inputs.names, self.topology).mean()
        factor = rate_factor(self.config, self.step)
        problem = self.health.problem(losses, float(norm), self.pruner is None or self.pruner.is_finite())
        votes = problem is not None, self.signals.asked, self.checkpointer.is_late(), self.spikes.found(losses.mean())
        skip, self.stop_signal, self.save_is_due, spike = highest(*votes)
        self.back_to = self.checkpointer.newest() if spike and not skip else None
        self.health.count(bool(skip))
        if skip:
            last = batches.state()["number"] - 1
            report["skipped"] = f"{first_text(problem)}; samples {last - train.batch + 1} to {last} changed nothing"
        elif not self.back_to:
            self.spikes.count(losses.mean())
            for group in self.optimizer.param_groups:
                group["lr"] = optimizer.learning_rate * factor
            if self.pruner:
                self.pruner.step(factor)
            self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        report["flops"] = self.dense_flops
        if self.cost and drawn:
            report |= self.cost.report(drawn.sampled, drawn.gated, seconds, pruned_seconds)
        report["flops"] += self.teacher.flops if self.teacher else 0
        tokens_in_batch = train.batch * self.config.data.sequence
        return {
            "step": self.step + 1,
            "tokens": (self.step + 1) * tokens_in_batch,  # so far
            "loss": losses.mean(),
            "domain_loss": losses.by_domain(),
            "weights": self._weights(),
            "gradient_norm": float(norm),
            "learning_rate": optimizer.learning_rate * factor,
            **report,
            **spent(report["flops"], tokens_in_batch, seconds, waited, self.topology, self.peak),
        }

    def _start(self) -> Mixture:
        """Tell the losses before the first step. Returns the mixture, whose references they may be."""
        with self.log.wait("losses at step 0", len(self.held_out), "windows") as waiting:
            losses = self.held_out.losses_of_source(self.config.model, waiting.update)
        references = losses if self.config.data.reference_losses == "source" else self.inputs.references
        if self.topology.is_main and references:
            write_atomically(self.run / REFERENCES, json.dumps(references, indent=1) + "\n")
        self.mixture = self.mixture_from(references or {})
        self.log.tell_start({"step": 0, "tokens": 0, "weights": self._weights(), "held_out": losses})
        return self.mixture

    def mixture_from(self, references: dict[str, float]) -> Mixture:
        settings = self.config.data.mixture
        if not self.config.data.update_every:
            settings = settings.model_copy(update={"update": "constant"})
        return Mixture(self.inputs.names, self.inputs.proportions, references, settings)

    def _weights(self) -> dict[str, float]:
        assert self.mixture is not None
        return dict(zip(self.inputs.names, self.mixture.weights.tolist(), strict=True))

    def _tell(self, line: dict[str, Any]) -> None:
        self.log.tell(line, self.config.train.log_every)
        if self.pruner and (self.step % max(1, self.config.train.steps // SNAPSHOTS) == 0 or "held_out" in line):
            self.log.write({"step": self.step} | snapshot(self.pruner.method.expected()), GATES)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to checkpoint that is a tensor, by name; the tensors themselves."""
        parameters = {name: p for stage in self.stages for name, p in stage.named_parameters()}
        found = {name: parameter.detach() for name, parameter in parameters.items()}
        found |= moments(self.optimizer, parameters)
        return found | (self.pruner.tensors() if self.pruner else {})

    def _save(self, batches: Batches) -> None:
        assert self.mixture is not None
        state = {
            "updates_before": self.updates_before,
            "health": self.health.state(),
            "losses": self.spikes.state(),
            "sampler": batches.state(),
            "mixture": self.mixture.state(),
            "references": self.mixture.references,
        }
        with self.log.wait(f"saving step {self.step}"):
            self.checkpointer.save(self.step, self.tensors(), state)
        self.changed = ()  # from here on checkpoints are this config's
