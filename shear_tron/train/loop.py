"""The training loop: pruning and (continued) pre-training are the same loop with and without a ``Pruner``."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.checkpoint import sharded
from shear_tron.config import save as save_config
from shear_tron.data.mixture import Mixture
from shear_tron.data.sampler import Batches, Sampler, held_out
from shear_tron.data.tokens import document_ends
from shear_tron.model.flops import flops
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Context, Engine, broadcast_losses, build_stages
from shear_tron.parallel.topology import Topology
from shear_tron.pruning.snapshot import snapshot
from shear_tron.train.facts import facts, peak_memory
from shear_tron.train.metrics import GATES, Log
from shear_tron.train.optimizer import adamw, moments, start_moments
from shear_tron.train.plan import CONFIG, Inputs, Plan
from shear_tron.train.pruner import Pruner
from shear_tron.train.schedule import learning_rate_factor
from shear_tron.train.speed import StepCost

REFERENCES = "reference_losses.json"
SNAPSHOTS = 64  # of the gates in a run, about


class Trainer:
    """One run on this rank: model, optimizer, data, and masks if it prunes."""

    def __init__(self, plan: Plan, inputs: Inputs, topology: Topology, compute: torch.dtype) -> None:
        self.plan, self.inputs, self.topology, self.compute = plan, inputs, topology, compute
        self.config, self.run = plan.config, Path(plan.config.run)
        train = self.config.train
        stages = build_stages(plan.architecture, topology, train.activation_checkpointing)
        self.stages = [shard(stage, inputs.weights, topology, torch.float32, compute) for stage in stages]
        self.engine = Engine(
            self.stages,
            topology,
            plan.microbatches,
            train.micro_batch,
            self.config.data.sequence,
            compute,
            self._document_ends if self.config.data.document_masking else None,
        )
        self.optimizer = adamw(
            (parameter for stage in self.stages for parameter in stage.parameters()), self.config.optimizer
        )
        shape, sequence = plan.architecture.shape, self.config.data.sequence
        self.dense_flops = flops(shape, range(shape.layers), True, train.batch * sequence, sequence)  # of a step
        self.pruner: Pruner | None = None
        self.cost: StepCost | None = None
        if self.config.prune is not None and plan.target is not None:
            self.pruner = Pruner(shape, plan.target, self.config.prune, train.seed, topology)
            self.cost = StepCost(self.engine, topology, train.micro_batch * sequence, sequence)
        self.step = 0  # updates made
        self.mixture: Mixture | None = None
        self.sampler = Sampler(inputs.manifest, inputs.names, self.config.data.sequence, train.seed)
        windows = [
            held_out(inputs.manifest, name, self.config.data.sequence, self.config.data.evaluate_windows)
            for name in inputs.names
        ]
        self.held_out = torch.cat(windows)
        self.held_out_domain = torch.cat([torch.full((len(w),), place) for place, w in enumerate(windows)])

    def fit(self) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint if there is one. Returns final held-out losses."""
        train, data, every = self.config.train, self.config.data, self.config.checkpoint.every
        resumed = self._resume()
        log = Log(self.run, self.step, train.steps, self._title(), self.topology.is_main)
        if resumed:
            log.say(f"going on from step {self.step} of {self.run}")
        elif self.topology.is_main:
            save_config(self.config, self.run / CONFIG)
        log.write({"run": {"from_step": self.step} | facts(self.plan, self.topology, self.compute)})
        if self.mixture is None:
            self.mixture = self._start_mixture(log)
        share = train.batch // self.topology.layout.dp
        first = self.topology.dp_rank * share
        batches = Batches(self.sampler, train.batch, first, first + share, self.mixture.weights)
        if self.cost:
            self.cost.time_dense(*self._held_out(torch.arange(share)))
        try:
            while self.step < train.steps:
                line = self._update(batches)
                self.step += 1
                if self.step == train.steps:
                    break
                if data.update_every and self.step % data.update_every == 0:
                    line["held_out"] = self.evaluate(self._current())
                    batches.set_weights(self.mixture.update(line["held_out"]))
                elif data.evaluate_every and self.step % data.evaluate_every == 0:
                    line["held_out"] = self.evaluate(self._current())
                self._tell(log, line)
                if every and self.step % every == 0:
                    self._save(batches)
            losses = self.evaluate(self.pruner.decided(final=True) if self.pruner else Context())
            if not resumed or self.step > resumed:
                line["held_out"] = losses
                self._tell(log, line)
                self._save(batches)
        finally:
            batches.close()
            log.close()
        return losses

    def _update(self, batches: Batches) -> dict[str, Any]:
        """One step: forward and backward of every microbatch, then weights and masks move. Returns its log line."""
        start, dp_rank = time.perf_counter(), self.topology.dp_rank
        train, optimizer = self.config.train, self.config.optimizer
        windows, domains = batches.next()
        waited = time.perf_counter() - start
        windows = windows.to(self.topology.device, non_blocking=True)
        tokens, labels = windows[:, :-1], windows[:, 1:]
        sampled, gated = None, None
        began = time.perf_counter()
        if self.pruner:
            mine = range(dp_rank * self.plan.microbatches, (dp_rank + 1) * self.plan.microbatches)
            sampled, gated = self.pruner.sample(self.step, mine)
        losses = self._everywhere(self.engine.train(tokens, labels, gated), len(tokens))
        report: dict[str, Any] = {}
        if self.pruner and sampled and gated:
            report |= self.pruner.backward(self.step, sampled, gated)
        pruned_seconds = time.perf_counter() - began
        sync.sum_tied(self.stages, self.topology)
        norm = sync.clip(self.stages, optimizer.clip, self.topology)
        factor = learning_rate_factor(self.step, train.steps, optimizer.warmup_steps, optimizer.min_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.learning_rate * factor
        if self.pruner:
            self.pruner.step(factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        by_domain, counts = self._by_domain(losses, domains)
        loss = float((by_domain * counts).nansum() / counts.sum())
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(
                f"loss={loss} at step {self.step}; lower optimizer.learning_rate or check the data"
            )
        assert self.mixture is not None
        seconds = time.perf_counter() - start
        report["flops"] = self.dense_flops
        if self.cost and sampled and gated:
            report |= self.cost.report(sampled, gated, seconds, pruned_seconds)
        tokens_in_batch = train.batch * self.config.data.sequence
        return {
            "step": self.step + 1,
            "tokens": (self.step + 1) * tokens_in_batch,  # so far
            "loss": loss,
            "domain_loss": self._named(by_domain),
            "weights": dict(zip(self.inputs.names, self.mixture.weights.tolist(), strict=True)),
            "gradient_norm": float(norm),
            "learning_rate": optimizer.learning_rate * factor,
            **report,
            "seconds": seconds,
            "data_seconds": waited,  # of them, waiting for the batch
            "tokens_per_second": tokens_in_batch / seconds,
            "tflops_per_rank": report["flops"] / seconds / self.topology.layout.world / 1e12,  # docs/report.md
            "peak_memory": peak_memory(self.topology.device),  # bytes, of this rank
            "time": time.time(),  # seconds since 1970
        }

    def evaluate(self, gated: Context) -> dict[str, float]:
        """Held-out loss of each domain, nats a token, the same on all ranks."""
        layout, dp_rank = self.topology.layout, self.topology.dp_rank
        share = self.config.train.batch // layout.dp
        losses, total = [], len(self.held_out)
        for first in range(0, total, share * layout.dp):
            rows = torch.arange(first + dp_rank * share, first + (dp_rank + 1) * share)
            found = self._everywhere(self.engine.evaluate(*self._held_out(rows), gated), share)
            losses.append((rows, found))
        rows = torch.cat([rows for rows, _ in losses])
        found = torch.cat([found for _, found in losses])
        real = rows < total
        by_domain, _ = self._by_domain(found[real.to(found.device)], self.held_out_domain[rows[real]])
        return self._named(by_domain)

    def _held_out(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and labels of held-out windows, which begin again after the last: batches are always full."""
        windows = self.held_out[rows % len(self.held_out)].to(self.topology.device)
        return windows[:, :-1], windows[:, 1:]

    def _by_domain(self, losses: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, sequences) of each domain over all data-parallel ranks; NaN where there were none. On the CPU."""
        sums = torch.zeros(2, len(self.inputs.names), dtype=torch.float64)
        sums[0].index_add_(0, domains, losses.double().cpu())
        sums[1].index_add_(0, domains, torch.ones_like(domains, dtype=torch.float64))
        sums = sync.sum_over_data(sums.to(self.topology.device), self.topology).cpu()
        return sums[0] / sums[1], sums[1]

    def _named(self, by_domain: Tensor) -> dict[str, float]:
        values = zip(self.inputs.names, by_domain.tolist(), strict=True)
        return {name: value for name, value in values if value == value}

    def _everywhere(self, losses: Tensor | None, sequences: int) -> Tensor:
        like = torch.empty(sequences, dtype=torch.float32, device=self.topology.device)
        return broadcast_losses(losses, like, self.topology)

    def _current(self) -> Context:
        return self.pruner.decided(final=False) if self.pruner else Context()

    def _document_ends(self, tokens: Tensor) -> Tensor:
        return document_ends(tokens, self.inputs.manifest.separator, self.inputs.manifest.bos)

    def _title(self) -> str:
        return "pruning" if self.pruner else "training"

    def _start_mixture(self, log: Log) -> Mixture:
        references = self.inputs.references
        if self.config.data.reference_losses == "source":
            references = self.evaluate(Context())
            log.say("reference losses measured from the source: " + _listed(references))
        if self.topology.is_main and references:
            (self.run / REFERENCES).write_text(json.dumps(references, indent=1) + "\n")
        return self._mixture(references or {})

    def _mixture(self, references: dict[str, float]) -> Mixture:
        settings = self.config.data.mixture
        if not self.config.data.update_every:
            settings = settings.model_copy(update={"update": "constant"})
        return Mixture(self.inputs.names, self.inputs.proportions, references, settings)

    def _tell(self, log: Log, line: dict[str, Any]) -> None:
        if line["step"] % self.config.train.log_every == 0 or "held_out" in line:
            log.write(line)
        if self.pruner and (self.step % max(1, self.config.train.steps // SNAPSHOTS) == 0 or "held_out" in line):
            log.write({"step": self.step} | snapshot(self.pruner.gates), GATES)
        if "held_out" in line:
            log.say(f"step {self.step}: held-out loss " + _listed(line["held_out"]))
        shown = {"loss": f"{line['loss']:.3f}", "tokens/s": f"{line['tokens_per_second']:.0f}"}
        if "expected_sparsity" in line:
            shown["sparsity"] = f"{line['expected_sparsity']:.2f}/{line['target_sparsity']:.2f}"
            shown["time"] = f"{line['seconds_to_dense']:.2f} of dense"
        log.advance(**shown)

    def _tensors(self) -> dict[str, Tensor]:
        parameters = {name: p for stage in self.stages for name, p in stage.named_parameters()}
        found = {name: parameter.detach() for name, parameter in parameters.items()}
        found |= moments(self.optimizer, parameters)
        return found | (self.pruner.tensors() if self.pruner else {})

    def _save(self, batches: Batches) -> None:
        assert self.mixture is not None
        progress = {
            "step": self.step,
            "sampler": batches.state(),
            "mixture": self.mixture.state(),
            "references": self.mixture.references,
        }
        sharded.save(self.run, self.step, self._tensors(), progress, self.config.checkpoint.keep)

    def _resume(self) -> int:
        """Go on from the newest checkpoint. Returns its step; 0 where there is none."""
        checkpoint = sharded.latest(self.run)
        self.run.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            return 0
        progress = sharded.progress(checkpoint)
        self.step = progress["step"]
        start_moments(self.optimizer, self.step)
        if self.pruner:
            self.pruner.begin_at(self.step)
        sharded.load(checkpoint, self._tensors())
        self.sampler.restore(progress["sampler"])
        self.mixture = self._mixture(progress["references"])
        self.mixture.restore(progress["mixture"])
        return self.step


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
