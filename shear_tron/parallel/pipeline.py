"""Pipeline parallelism with torch's schedules; one stage without a pipeline is the plain loop over microbatches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from shear_tron.architecture import Architecture
from shear_tron.model.context import DENSE, Context
from shear_tron.model.readout import NEXT_TOKEN, Readout
from shear_tron.model.transformer import Transformer
from shear_tron.parallel.tensor import TensorParallel
from shear_tron.parallel.topology import Topology
from shear_tron.transfer import sent


class PipelinePart(Transformer):
    """A stage whose contexts wait in a queue: schedules pass tensors only, and call microbatches in order."""

    waiting: Iterator[Context] = iter(())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, labels, next(self.waiting), labels.shape[1])


def build_stages(
    architecture: Architecture,
    topology: Topology,
    checkpointing: str,
    readout: Readout = NEXT_TOKEN,
    compiled: bool = False,
) -> list[Transformer]:
    """This rank's stages, on the meta device."""
    layout = topology.layout
    split = TensorParallel(topology.mesh["tp"], layout.sequence)
    kind = Transformer if layout.pp == 1 else PipelinePart
    with torch.device("meta"):
        return [
            kind(architecture, layout.layers(number, architecture), split, checkpointing, readout, compiled)
            for number in layout.stages(topology.pp_rank)
        ]


class Engine:
    """Runs forward and backward of one model over this rank's share of a batch.

    Args:
        stages: this rank's stages, filled and sharded.
        count: microbatches in this rank's share.
        micro_batch, time: sequences of a microbatch, tokens of a sequence; fixed, since a pipeline's messages are.
        compute: dtype of activations.
        documents: from the token ids of a microbatch to where its documents end; None: one document a sequence.
    """

    def __init__(
        self,
        stages: Sequence[Transformer],
        topology: Topology,
        count: int,
        micro_batch: int,
        time: int,
        compute: torch.dtype,
        documents: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.stages, self.topology, self.count = list(stages), topology, count
        self.documents = documents
        self.has_loss = any(stage.is_last for stage in stages)
        # What crosses a stage's edge: this rank's tokens at full hidden width, whatever a stage does inside.
        tensor_ranks = topology.layout.tp if stages[0].split.sequence else 1
        self.message = torch.empty(
            micro_batch * time // tensor_ranks,
            stages[0].architecture.shape.hidden,
            dtype=compute,
            device=topology.device,
        )
        self.readout, self.micro_batch, self.time = stages[0].readout, micro_batch, time
        self.recomputes = stages[0].checkpointing != "none"

    def train(self, tokens: Tensor, labels: Tensor, contexts: Iterable[Context] | None) -> Tensor | None:
        """Add the gradients of the mean loss to parameters and masks; return the losses of each sequence.

        tokens, labels: [batch, time], best still on the host, where documents are looked for; contexts: one per
        microbatch, masks being leaves; without a pipeline each is taken when its turn comes. The gradient is of the
        readout's weighted terms, the mean over this rank's batch; FSDP takes the mean over data-parallel ranks. The
        losses [terms, batch] are known on ranks that hold the last stage, elsewhere the result is None.
        """
        contexts = self._placed(tokens, contexts or [DENSE] * self.count)
        tokens, labels = sent(tokens, self.topology.device), sent(labels, self.topology.device)
        if self.topology.layout.pp > 1:
            contexts = list(contexts)
            for stage in self.stages:
                cast(PipelinePart, stage).waiting = iter(contexts)
            inputs = (tokens,) if any(stage.is_first for stage in self.stages) else ()
            result = self.schedule.step(*inputs, target=labels if self.has_loss else None, labels=labels)
            if not self.has_loss:
                return None
            losses = cast(Tensor, result).detach()  # [microbatches x terms, sequences]
            return torch.cat(losses.chunk(self.count), 1)
        stage, found = self.stages[0], []
        assert isinstance(stage, FSDPModule)
        parts = zip(tokens.chunk(self.count), labels.chunk(self.count), contexts, strict=True)
        for number, (rows, wanted, context) in enumerate(parts):
            stage.set_requires_gradient_sync(number == self.count - 1)
            self._gather_for_backward(not (context.keep and context.keep.copies))
            loss: Tensor = stage(rows, wanted, context)
            self._minimised(loss).backward()  # type: ignore[no-untyped-call]
            found.append(loss.detach())
        return torch.cat(found, 1)

    def evaluate(self, tokens: Tensor, labels: Tensor, context: Context) -> Tensor | None:
        """The losses of each sequence, without gradients; as ``train`` but with the same masks throughout."""
        losses = self.forward(tokens, labels, [context] * self.count)
        self.reshard()
        return torch.cat(losses, 1) if losses else None

    @torch.no_grad()
    def forward(self, tokens: Tensor, labels: Tensor, contexts: Sequence[Context]) -> list[Tensor]:
        """What the readout makes of each microbatch, without gradients; empty where the last stage is not.

        Schedules are made for training steps; forward alone needs only messages down the line. Parameters may be left
        gathered: see ``reshard``.
        """
        group, found, sending = self.topology.mesh.get_group("pp"), [], []
        placed = list(self._placed(tokens, contexts))
        tokens, labels = sent(tokens, self.topology.device), sent(labels, self.topology.device)
        parts = list(zip(tokens.chunk(self.count), labels.chunk(self.count), placed, strict=True))
        for stage in self.stages:
            if isinstance(stage, PipelinePart):
                stage.waiting = iter(placed)
            for rows, wanted, under in parts:
                x = rows
                if not stage.is_first:
                    x = torch.empty_like(self.message)
                    dist.recv(x, group=group, group_src=(self.topology.pp_rank - 1) % self.topology.layout.pp)
                x = stage(x, wanted) if isinstance(stage, PipelinePart) else stage(x, wanted, under)
                if stage.is_last:
                    found.append(x)
                else:
                    to = (self.topology.pp_rank + 1) % self.topology.layout.pp
                    sending.append((x, dist.isend(x, group=group, group_dst=to)))  # x lives until it is sent
        for _, work in sending:
            if work is not None:
                work.wait()
        return found

    def reshard(self, outside: bool = True) -> None:
        """Let gathered parameters go after ``forward``: no backward will, and an optimizer wants the sharded ones.

        outside: also those outside the layers.
        """
        for stage in self.stages:
            for name, module in stage.named_modules():
                if isinstance(module, FSDPModule) and (outside or name):
                    module.reshard()

    def broadcast(self, losses: Tensor | None, sequences: int) -> Tensor:
        """What ``train`` or ``evaluate`` returned, [terms, sequences], known to every pipeline rank."""
        if self.topology.layout.pp == 1:
            assert losses is not None
            return losses
        losses = self._empty_losses(sequences) if losses is None else losses.contiguous()
        dist.broadcast(losses, group_src=self.topology.layout.pp - 1, group=self.topology.mesh.get_group("pp"))
        return losses

    def _empty_losses(self, sequences: int) -> Tensor:
        precision = torch.float64 if self.message.dtype == torch.float64 else torch.float32
        return torch.empty(len(self.readout.terms), sequences, dtype=precision, device=self.topology.device)

    def _placed(self, tokens: Tensor, contexts: Iterable[Context]) -> Iterable[Context]:
        for context, rows in zip(contexts, tokens.chunk(self.count), strict=True):
            if self.documents:
                context = replace(context, documents=sent(self.documents(rows), self.topology.device))
            yield context

    def _gather_for_backward(self, wanted: bool) -> None:
        """Whether FSDP gathers a layer's weights again for its backward, which ``Keep.copies`` makes needless."""
        for layer in self.stages[0].layers.values():
            assert isinstance(layer, FSDPModule)
            layer.set_unshard_in_backward(wanted or self.recomputes)

    def _minimised(self, losses: Tensor) -> Tensor:
        """One microbatch's share of what is minimised; losses: [terms, sequences]."""
        return losses.mean(1) @ losses.new_tensor(self.readout.weights) / self.count

    @cached_property
    def schedule(self) -> Any:
        """Of a pipeline."""
        layout, device = self.topology.layout, self.topology.device
        # Shapes are said beforehand; a schedule would find them out by running stages on meta tensors.
        ids = torch.empty(self.micro_batch, self.time, dtype=torch.int64, device=device)
        losses = self._empty_losses(self.micro_batch)
        group = self.topology.mesh.get_group("pp")
        parts: list[Any] = [
            PipelineStage(
                cast(torch.nn.Module, stage),
                number,
                layout.pp * layout.stages_per_rank,
                device,
                input_args=ids if stage.is_first else self.message.clone().requires_grad_(),
                output_args=losses.requires_grad_() if stage.is_last else self.message.clone().requires_grad_(),
                group=group,
            )
            for number, stage in zip(layout.stages(self.topology.pp_rank), self.stages, strict=True)
        ]

        def minimised(losses: Tensor, _labels: Tensor) -> Tensor:
            return self._minimised(losses)

        # scale_grads would divide the parameters' gradients by the count, and not those of the masks.
        if layout.schedule == "interleaved":
            return ScheduleInterleaved1F1B(parts, self.count, minimised, scale_grads=False)
        return Schedule1F1B(parts[0], self.count, minimised, scale_grads=False)
