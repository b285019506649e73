"""Predicted milliseconds of a training step's kernels, part by part: ``python -m shear_kernels.step_time``.

Every part's work is ``roofline``'s; its time is that work at the rates a device has been seen to reach, not at its
maker's. What is no kernel of a layer or of the loss (communication, the optimizer, the host) is left to the caller.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shear_kernels import roofline
from shear_kernels.roofline import Work

MASTER_BYTES = 4  # of a weight as it is kept; products read 2


@dataclass(frozen=True)
class Reached:
    """Rates that well-made kernels reach on a device: FLOP/s of matrix products and of attention (forward, backward,
    causal half counted), memory bytes/s; and the FLOP/s of its data sheet."""

    name: str
    products: float
    attention: tuple[float, float]
    bandwidth: float
    peak: float


H100 = Reached("H100 SXM", 600e12, (667e12, 444e12), 2.9e12, roofline.H100.flops)
"""Products and bandwidth: what large bf16 products and copies usually reach. Attention: FlashAttention-3 at head_dim
128, 4096 tokens, causal. Assumptions, replaced by ``kernels/bench/run.py`` once there is a GPU."""

DEVICES = {"h100": H100}


@dataclass(frozen=True)
class Layer:
    """The sizes of a transformer layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each weight."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q": (heads, self.hidden), "k": (kv_heads, self.hidden), "v": (kv_heads, self.hidden)}
        mlp = {"gate": (self.ffn, self.hidden), "up": (self.ffn, self.hidden), "down": (self.hidden, self.ffn)}
        return attention | {"o": (self.hidden, heads)} | mlp


def product(rows: int, size: tuple[int, int]) -> tuple[Work, Work]:
    """(forward, backward) of ``x @ weight.T`` with x [rows, size[1]], weight [size], 16-bit operands, a gradient of the
    weight in float32."""
    flops, x, y, weight = 2.0 * rows * size[0] * size[1], 2 * rows * size[1], 2 * rows * size[0], size[0] * size[1]
    return Work(x + y + 2 * weight, flops), Work(2 * (x + y) + (2 + 4) * weight, 2 * flops)


def layer_parts(rows: int, sequence: int, layer: Layer, source: Layer | None = None) -> dict[str, tuple[Work, Work]]:
    """(forward, backward) of each part of a layer of ``rows`` tokens. ``source``: the layer whose weights it is cut
    from, in a compact step; the cut is read in float32 and written in 16 bits. Its masks lie in the weights, and its
    hidden mask in the norms too, so that residual and norm are two passes where other steps have one; weights that read
    one input lie in one buffer, and what they hand back adds up within their products."""
    added = Work(3 * 2 * rows * layer.hidden)  # two activations read, their sum written
    parts = {
        "matrix products": _sum(product(rows, size) for size in layer.matrices.values()),
        "attention": roofline.masked_attention(rows // sequence, sequence, layer.heads, layer.kv_heads, layer.head_dim),
        "norms": _sum((roofline.masked_rms_norm(rows, layer.hidden), roofline.add_rms_norm(rows, layer.hidden))),
        "gated residual": roofline.gated_residual(rows, layer.hidden),
        "swiglu": roofline.masked_swiglu(rows, layer.ffn),
        "rope": roofline.rope(rows, layer.heads, layer.kv_heads, layer.head_dim),
    }
    if source is None:
        parts["sums of gradients"] = Work(0), added + added + added  # from q, k and v, from gate and up
    else:
        parts["norms"] = _sum([roofline.masked_rms_norm(rows, layer.hidden)] * 2)
        parts["residual"] = _sum([(added, added)] * 2)  # backward autograd adds up two gradients
        del parts["gated residual"]
        cuts = zip(source.matrices.values(), layer.matrices.values(), strict=True)
        parts["select and scatter"] = _sum(roofline.select(*whole, *kept, 2, MASTER_BYTES) for whole, kept in cuts)
        ends = sum(2 * rows * columns for rows, columns in (layer.matrices[leaf] for leaf in ("o", "down")))
        parts["masks into weights"] = Work(2 * ends), Work(2 * ends)
    return parts


def step_parts(
    rows: int, sequence: int, layers: int, layer: Layer, vocab: int, source: Layer | None = None
) -> dict[str, tuple[Work, Work]]:
    """(forward, backward) of each part of a model of ``layers`` such layers, and of its head and loss."""
    parts = {
        name: tuple(Work(w.bytes * layers, w.flops * layers) for w in works)
        for name, works in layer_parts(rows, sequence, layer, source).items()
    }
    head = product(rows, (vocab, layer.hidden))
    logits = 4.0 * rows * vocab  # bytes in float32: written by a product, read twice; half written, read twice after
    found: dict[str, tuple[Work, Work]] = {name: (forward, backward) for name, (forward, backward) in parts.items()}
    return found | {"head's products": head, "loss beyond them": (Work(3.5 * logits), Work(logits))}


def milliseconds(device: Reached, parts: dict[str, tuple[Work, Work]]) -> dict[str, tuple[float, float]]:
    """(forward, backward) of each part: the longer of its arithmetic and its traffic."""
    found = {}
    for name, works in parts.items():
        rates = device.attention if name == "attention" else (device.products,) * 2
        forward, backward = (
            1e3 * max(work.flops / rate, work.bytes / device.bandwidth) for work, rate in zip(works, rates, strict=True)
        )
        found[name] = forward, backward
    return found


def _sum(works: Iterable[tuple[Work, Work]]) -> tuple[Work, Work]:
    total = Work(0), Work(0)
    for forward, backward in works:
        total = total[0] + forward, total[1] + backward
    return total


LLAMA_2_7B = Layer(4096, 32, 32, 128, 11008)
SHEARED_1_3B = Layer(2048, 16, 16, 128, 5504)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shear_kernels.step_time", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--rows", type=int, default=16384, help="tokens per microbatch (default %(default)s)")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens per sequence (default %(default)s)")
    parser.add_argument(
        "--dense", action="store_true", help="of a step of Sheared-LLaMA-1.3B without masks, with its MFU"
    )
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    name = "dense step of Sheared-LLaMA-1.3B" if options.dense else "closed compact step, LLaMA-2-7B to 1.3B"
    print(f"Predicted ms of the kernels of a {name}, on one {device.name},")
    print(f"{options.rows} tokens in sequences of {options.sequence}; no communication, no optimizer, no host")
    source = None if options.dense else LLAMA_2_7B
    parts = step_parts(options.rows, options.sequence, 24, SHEARED_1_3B, 32000, source)
    times = milliseconds(device, parts)
    for name, (forward, backward) in (*times.items(), ("all", tuple(map(sum, zip(*times.values(), strict=True))))):
        print(f"{name:20}{forward:9.1f} forward{backward:9.1f} backward{forward + backward:9.1f}")
    if options.dense:
        done = sum(3 * forward.flops for forward, _ in parts.values())  # backward twice, what is done again not counted
        print(f"{done / (sum(map(sum, times.values())) * 1e-3) / device.peak:.0%} of {device.peak / 1e12:.0f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
