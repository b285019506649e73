"""The network, with masks as an argument: a dense model is the same code without them.

One network serves every family: what their forwards do differently are facts of the ``Architecture``. The residual
stream is [tokens, hidden], tokens being batch x time flattened (this rank's share of them under sequence parallelism);
only attention sees [batch, time]. Parameters carry the names of ``shear_tron.params``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import shear_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from shear_tron.architecture import Architecture
from shear_tron.dims import Dim
from shear_tron.keep import ALL, KeepLayer
from shear_tron.masks import LayerMasks
from shear_tron.model.attention import Positions, attention
from shear_tron.model.autograd import scatter_columns, skip_layer
from shear_tron.model.context import DENSE, Context
from shear_tron.model.mlp import mlp
from shear_tron.model.products import gathered, together
from shear_tron.model.readout import NEXT_TOKEN, Readout
from shear_tron.model.split import Split
from shear_tron.params import Row, by_leaf, layer_rows, rows


class Layer(nn.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, architecture: Architecture, index: int, split: Split, checkpointing: str = "none", compiled: bool = False
    ) -> None:
        super().__init__()
        self.architecture, self.split, self.checkpointing = architecture, split, checkpointing
        self.turn = index not in architecture.unturned_layers
        self.window = None if index in architecture.full_layers else architecture.window
        self._run: Callable[..., Tensor] = self._forward
        if compiled:
            self._run = torch.compile(self._forward, fullgraph=True)
        self.rows = layer_rows(architecture)
        self.together = together(self.rows)
        _register(self, self.rows)

    def forward(self, x: Tensor, positions: Positions, masks: LayerMasks, keep: KeepLayer | None = None) -> Tensor:
        """x: [tokens, hidden], the residual stream. Returns the new one.

        With ``keep``, x and ``masks.hidden`` have only the kept hidden columns, and the layer runs on the kept rows and
        columns of its weights.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(x, positions, masks, keep)
        save = _keep_products if self.checkpointing == "selective" else noop_context_fn
        return cast(Tensor, checkpoint(self._run, x, positions, masks, keep, use_reentrant=False, context_fn=save))

    def _forward(self, x: Tensor, positions: Positions, masks: LayerMasks, keep: KeepLayer | None) -> Tensor:
        split, facts = self.split, self.architecture
        w = {row.leaf: split.weight(getattr(self, row.leaf), row) for row in self.rows}
        if keep is not None and keep.left_out:
            return skip_layer(x, list(w.values()))
        # Kernels apply masks on the way, head gates only where the best attention knows them. All others fold into what
        # leaves a branch, weights being smaller than activations, and a compact step, which copies them anyway, is a
        # plain dense model.
        fused = keep is None and shear_kernels.fuses_masks(x)
        edges = positions.documents is not None or self.window is not None
        fused_heads = fused and shear_kernels.fuses_head_gates(x, facts.shape.head_dim, edges)
        keep = keep or ALL
        own = keep.masks(replace(masks, heads=split.part(masks.heads), ffn=split.part(masks.ffn)))
        # Where a mask meets all there is on every rank, its gradient is whole on each; where it meets this rank's part,
        # it is a part.
        gate = replace(own, hidden=split.shared(own.hidden), layer=split.shared(own.layer))
        hidden = gate.hidden
        if fused:
            folded = folded_whole = LayerMasks(heads=None if fused_heads else own.heads)
            inner = replace(own, heads=own.heads if fused_heads else None)
        else:
            folded, folded_whole = own, gate
            inner = gate = LayerMasks()
        joined: dict[str, Tensor] = {}
        for group in self.together:
            joined |= gathered(w, keep, group)
        for row in self.rows:
            if row.leaf in joined:
                continue
            meets = folded if row.cut_axis is not None else folded_whole
            w[row.leaf] = keep.select(w[row.leaf], row, meets if Dim.LAYERS in row.scaled_by else None)
        w |= joined

        def attend(normed: Tensor) -> Tensor:
            head_dim, eps = facts.shape.head_dim, facts.norm_eps
            return attention(split.enter(normed), w, inner.heads, positions, head_dim, eps, self.turn, self.window)

        normed = norm(x, w, "attn_norm", hidden, facts)
        if facts.parallel_residual:
            other = norm(x, w, "mlp_norm", hidden, facts)
            both = split.leave(attend(normed) + mlp(split.enter(other), w, inner.ffn))
            return _residual(x, _biased(both, w, "o", "down"), gate)
        attended = _biased(split.leave(attend(normed)), w, "o")
        if not fused or facts.norm != "rms":
            x = _residual(x, attended, gate)
            normed = norm(x, w, "mlp_norm", hidden, facts)
        else:
            x, normed = shear_kernels.add_rms_norm(x, attended, w["mlp_norm"], hidden, gate.layer, facts.norm_eps)
        fed = split.leave(mlp(split.enter(normed), w, inner.ffn))
        return _residual(x, _biased(fed, w, "down"), gate)


def norm(x: Tensor, weights: dict[str, Tensor], leaf: str, hidden: Tensor | None, facts: Architecture) -> Tensor:
    """The norm called ``leaf`` of the residual stream, over the hidden columns that ``hidden`` keeps."""
    if facts.norm == "rms":
        return shear_kernels.masked_rms_norm(x, weights[leaf], hidden, facts.norm_eps)
    return shear_kernels.masked_layer_norm(x, weights[leaf], weights[f"{leaf}_bias"], hidden, facts.norm_eps)


def _biased(x: Tensor, weights: dict[str, Tensor], *leaves: str) -> Tensor:
    """``x`` plus the biases that matrices have whose outputs are sums over ranks: added once, after the sum."""
    for leaf in leaves:
        x = x + weights[f"{leaf}_bias"] if f"{leaf}_bias" in weights else x
    return x


def _residual(x: Tensor, branch: Tensor, gate: LayerMasks) -> Tensor:
    if gate.hidden is None and gate.layer is None:
        return x + branch
    return shear_kernels.gated_residual(x, branch, gate.hidden, gate.layer)


class Transformer(nn.Module):
    """A run of consecutive layers, with the embedding if it is the first and norm and head if it is the last.

    The whole model is the stage that is both. With tied embeddings, a last stage that is not the first holds its own
    copy of ``embed``, which training keeps equal (``shear_tron.parallel.sync``).
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range | None = None,
        split: Split | None = None,
        checkpointing: str = "none",
        readout: Readout = NEXT_TOKEN,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        shape = architecture.shape
        self.architecture, self.split, self.readout = architecture, split or Split(), readout
        self.checkpointing = checkpointing
        span = range(shape.layers) if layers is None else layers
        self.is_first, self.is_last = span.start == 0, span.stop == shape.layers
        self.layers = nn.ModuleDict({str(i): Layer(architecture, i, self.split, checkpointing, compiled) for i in span})
        here = {"first": self.is_first or (self.is_last and shape.tied), "last": self.is_last, "layer": False}
        _register(self, tuple(row for row in rows(architecture) if here[row.where]))

    def forward(
        self, x: Tensor, labels: Tensor | None = None, context: Context = DENSE, time: int | None = None
    ) -> Tensor:
        """From token ids to losses, or the part of that way that this stage holds.

        x: [batch, time] int64 token ids on the first stage, else the residual stream [tokens, hidden], of which
        ``time`` is the length of a sequence. labels: [batch, time] int64, for the last stage.
        Returns the residual stream, always of full width; on the last stage what the readout makes of it, [terms,
        batch], by default the mean next-token loss of each sequence [1, batch]; or the logits [batch, time, vocab (this
        rank's part)] where labels is None.
        """
        shape, split, masks = self.architecture.shape, self.split, context.masks
        kept = None if context.keep is None else context.keep.hidden
        if self.is_first:
            time = x.shape[1]
            x = self._embedding(x.flatten())
        assert time is not None
        x = shear_kernels.select(x, None, kept)
        hidden = None if masks.hidden is None else shear_kernels.select(masks.hidden, kept)
        shared = split.shared(hidden)
        if self.is_first and shared is not None:
            x = (x * shared).to(x.dtype)
        tokens = x.shape[0] * (split.size if split.sequence else 1)
        positions = Positions.of(self.architecture, time, context.documents, tokens, x.device, x.dtype)
        for number, layer in self.layers.items():
            own = replace(masks.layer(int(number), shape), hidden=hidden)
            x = layer(x, positions, own, None if context.keep is None else context.keep.layer(int(number)))
        if not self.is_last:
            return scatter_columns(x, kept, shape.hidden)
        outside = ALL if context.keep is None else context.keep.outside
        w = {row.leaf: outside.select(self._weight(row.leaf), row) for row in self._final_rows()}
        states = split.enter(norm(x, w, "norm", shared, self.architecture))
        head = w["embed" if shape.tied else "lm_head"]
        if labels is None:
            return F.linear(states, head).view(-1, time, head.shape[0])
        return self.readout(states, head, labels, split, context)

    def _embedding(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding. With a cut vocabulary each rank looks up its own rows and leaves zeros for the others.

        [tokens] -> [tokens, hidden], cut to this rank's tokens under sequence parallelism.
        """
        weight = self._weight("embed")
        if self.split.size == 1:
            return F.embedding(tokens, weight)
        own = tokens - self.split.rank * weight.shape[0]
        here = (own >= 0) & (own < weight.shape[0])
        return self.split.leave(F.embedding(own.where(here, 0), weight) * here[:, None].to(weight.dtype))

    def _final_rows(self) -> list[Row]:
        """Of the final norm and the output head."""
        last = [row for row in rows(self.architecture) if row.where == "last"]
        return [*last, by_leaf(self.architecture)["embed"]] if self.architecture.shape.tied else last

    def _weight(self, leaf: str) -> Tensor:
        return self.split.weight(getattr(self, leaf), by_leaf(self.architecture)[leaf])


def _register(module: Transformer | Layer, table: tuple[Row, ...]) -> None:
    """Parameters of global size, not yet initialised. Under ``torch.device("meta")`` they take no memory."""
    for row in table:
        size = row.size(module.architecture.shape)
        module.register_parameter(row.leaf, nn.Parameter(torch.empty(size)))


def _keep_products() -> tuple[Any, Any]:
    """Selective checkpointing: what matrix products and attention gave stays in memory, the cheap rest is computed
    again."""

    def policy(context: object, op: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op.name() in DEAR else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return contexts


DEAR = shear_kernels.ATTENTION_OPS | {"aten::mm", "aten::addmm", "aten::bmm"}
