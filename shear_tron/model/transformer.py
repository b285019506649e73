"""LLaMA with masks as an argument: a dense model is the same code with None.

The residual stream is [tokens, hidden], tokens being batch x time flattened (this rank's share of them under sequence
parallelism); only attention sees [batch, time]. Parameters carry the names of ``shear_tron.params``.
"""

from dataclasses import dataclass, replace
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

from shear_tron.architecture import Architecture, Rope
from shear_tron.keep import Keep, fold
from shear_tron.masks import LayerMasks, Masks
from shear_tron.model.autograd import scatter_columns, skip_layer
from shear_tron.model.loss import next_token_loss
from shear_tron.model.rope import rope_table
from shear_tron.model.split import Split
from shear_tron.params import BY_LEAF, LAYER_TABLE, Row


@dataclass(frozen=True)
class Positions:
    """Where tokens stand. ``documents``: int32 [documents + 1], the documents' ends in batch x time flattened, first 0;
    attention does not cross them and positions restart. None: each sequence is one document."""

    time: int
    cos: Tensor  # [time, head_dim / 2], or [batch, time, head_dim / 2] with documents
    sin: Tensor
    documents: Tensor | None = None

    @classmethod
    def of(cls, rope: Rope, head_dim: int, time: int, documents: Tensor | None, x: Tensor) -> "Positions":
        """For a residual stream ``x``, whose device and (at least float32) precision the angles have."""
        precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        if documents is None:
            return cls(time, *rope_table(rope, head_dim, torch.arange(time, device=x.device), precision))
        token = torch.arange(int(documents[-1]), device=x.device)
        starts = documents[torch.searchsorted(documents, token, right=True) - 1]
        cos, sin = rope_table(rope, head_dim, token - starts, precision)
        return cls(time, cos.view(-1, time, cos.shape[-1]), sin.view(-1, time, sin.shape[-1]), documents)


class Layer(nn.Module):
    """One transformer layer: attention and gated MLP, each behind a norm and added to the residual stream."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, architecture: Architecture, split: Split, checkpointing: str = "none") -> None:
        super().__init__()
        self.architecture, self.split, self.checkpointing = architecture, split, checkpointing
        for row in LAYER_TABLE:
            self.register_parameter(row.leaf, _parameter(row, architecture))

    def forward(
        self, x: Tensor, place: "Positions", masks: LayerMasks, keep: Keep | None = None, index: int = 0
    ) -> Tensor:
        """x: [tokens, hidden], the residual stream. Returns the new one.

        With ``keep``, which says what layer ``index`` keeps, x has only the kept hidden columns, and the layer runs on
        the kept rows and columns of its weights.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(x, place, masks, keep, index)
        save = _keep_matmuls if self.checkpointing == "selective" else noop_context_fn
        return cast(
            Tensor, checkpoint(self._forward, x, place, masks, keep, index, use_reentrant=False, context_fn=save)
        )

    def _forward(self, x: Tensor, place: "Positions", masks: LayerMasks, keep: Keep | None, index: int) -> Tensor:
        split, eps = self.split, self.architecture.norm_eps
        w = {row.leaf: split.weight(getattr(self, row.leaf), row) for row in LAYER_TABLE}
        masks = replace(masks, heads=split.part(masks.heads), ffn=split.part(masks.ffn))
        if keep is not None:
            if index not in keep.layers:
                return skip_layer(x, list(w.values()))
            w = {row.leaf: shear_kernels.select(w[row.leaf], *keep.indices(row, index)) for row in LAYER_TABLE}
            masks = keep.layer_masks(masks, index)
        hidden, layer = split.shared(masks.hidden), split.shared(masks.layer)
        folded = not shear_kernels.fuses_masks(x)
        if folded:  # weights are smaller than activations: open gates run at 1.01 of the dense speed, not 0.92
            w |= {leaf: fold(w[leaf], BY_LEAF[leaf], masks) for leaf in ("o", "down")}
            masks = LayerMasks()

        normed = shear_kernels.masked_rms_norm(x, w["attn_norm"], hidden, eps)
        attended = split.leave(self._attention(split.enter(normed), place, w, masks.heads))
        if folded:
            x = x + attended
            normed = shear_kernels.masked_rms_norm(x, w["mlp_norm"], hidden, eps)
        else:
            x, normed = shear_kernels.add_rms_norm(x, attended, w["mlp_norm"], hidden, layer, eps)
        fed = split.leave(self._mlp(split.enter(normed), w, masks.ffn))
        return x + fed if folded else shear_kernels.gated_residual(x, fed, hidden, layer)

    def _attention(self, x: Tensor, place: "Positions", w: dict[str, Tensor], heads: Tensor | None) -> Tensor:
        q, k, v = (
            F.linear(x, w[name]).view(-1, place.time, len(w[name]) // self.head_dim, self.head_dim) for name in "qkv"
        )
        q, k = shear_kernels.rope(q, k, place.cos, place.sin)
        out = shear_kernels.masked_attention(q, k, v, heads, cu_seqlens=place.documents)
        return F.linear(out.flatten(2).flatten(0, 1), w["o"])

    def _mlp(self, x: Tensor, w: dict[str, Tensor], ffn: Tensor | None) -> Tensor:
        return F.linear(shear_kernels.masked_swiglu(F.linear(x, w["gate"]), F.linear(x, w["up"]), ffn), w["down"])

    @property
    def head_dim(self) -> int:
        return self.architecture.shape.head_dim


class Transformer(nn.Module):
    """A run of consecutive layers, with the embedding if it is the first and norm and head if it is the last.

    The whole model is the stage that is both. With tied embeddings, a last stage that is not the first holds its own
    copy of ``embed``, which training keeps equal (``shear_tron.parallel.sync``).
    """

    embed: Tensor
    norm: Tensor
    lm_head: Tensor

    def __init__(
        self,
        architecture: Architecture,
        layers: range | None = None,
        split: Split | None = None,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        shape = architecture.shape
        self.architecture, self.split = architecture, split or Split()
        span = range(shape.layers) if layers is None else layers
        self.is_first, self.is_last = span.start == 0, span.stop == shape.layers
        self.layers = nn.ModuleDict({str(i): Layer(architecture, self.split, checkpointing) for i in span})
        if self.is_first or (self.is_last and shape.tied):
            self.register_parameter("embed", _parameter(BY_LEAF["embed"], architecture))
        if self.is_last:
            self.register_parameter("norm", _parameter(BY_LEAF["norm"], architecture))
            if not shape.tied:
                self.register_parameter("lm_head", _parameter(BY_LEAF["lm_head"], architecture))

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        masks: Masks | None = None,
        keep: Keep | None = None,
        time: int | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """From token ids to losses, or the part of that way that this stage holds.

        x: [batch, time] int64 token ids on the first stage, else the residual stream [tokens, hidden], of which
        ``time`` is the length of a sequence. labels: [batch, time] int64, for the last stage.
        keep: the units whose masks are not zero (and perhaps some more), of this tensor-parallel rank: with it the
        stage runs on those alone, which gives the same numbers (docs/compaction.md).
        documents: see ``Positions``.
        Returns the residual stream, always of full width; on the last stage the mean loss of each sequence [batch]
        (``next_token_loss``), or the logits [batch, time, vocab (this rank's part)] where labels is None.
        """
        masks, shape = masks or Masks(), self.architecture.shape
        kept = None if keep is None else keep.hidden
        if self.is_first:
            time = x.shape[1]
            x = self._embedding(x.flatten())
        assert time is not None
        x = shear_kernels.select(x, None, kept)
        hidden = None if masks.hidden is None else self.split.shared(shear_kernels.select(masks.hidden, kept))
        if self.is_first and hidden is not None:
            x = (x * hidden).to(x.dtype)
        place = Positions.of(self.architecture.rope, shape.head_dim, time, documents, x)
        for number, layer in self.layers.items():
            x = layer(x, place, masks.layer(int(number), shape), keep, int(number))
        if not self.is_last:
            return scatter_columns(x, kept, shape.hidden)
        weight = shear_kernels.select(self.split.weight(self.norm, BY_LEAF["norm"]), kept)
        normed = self.split.enter(shear_kernels.masked_rms_norm(x, weight, hidden, self.architecture.norm_eps))
        head = shear_kernels.select(self._head(), None, kept)
        if labels is None:
            return F.linear(normed, head).view(-1, time, head.shape[0])
        return next_token_loss(normed, head, labels, self.split)

    def _embedding(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding. With a cut vocabulary each rank looks up its own rows and leaves zeros for the others.

        [tokens] -> [tokens, hidden], cut to this rank's tokens under sequence parallelism.
        """
        weight = self.split.weight(self.embed, BY_LEAF["embed"])
        if self.split.size == 1:
            return F.embedding(tokens, weight)
        own = tokens - self.split.rank * weight.shape[0]
        here = (own >= 0) & (own < weight.shape[0])
        return self.split.leave(F.embedding(own.where(here, 0), weight) * here[:, None].to(weight.dtype))

    def _head(self) -> Tensor:
        if self.architecture.shape.tied:
            return self.split.weight(self.embed, BY_LEAF["embed"])
        return self.split.weight(self.lm_head, BY_LEAF["lm_head"])


def _parameter(row: Row, architecture: Architecture) -> nn.Parameter:
    """A parameter of global size, not yet initialised. Under ``torch.device("meta")`` it takes no memory."""
    return nn.Parameter(torch.empty(row.size(architecture.shape)))


def _keep_matmuls() -> tuple[Any, Any]:
    """Selective checkpointing: the results of matrix products stay in memory, everything cheap is computed again."""
    aten = torch.ops.aten
    dear = {aten.mm.default, aten.addmm.default, aten.bmm.default}

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in dear else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return contexts
