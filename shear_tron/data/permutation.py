"""A pseudo-random permutation of range(n) that can be entered anywhere, in constant memory."""

import hashlib

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

ROUNDS = 8  # half-rounds of the Feistel network; four already decorrelate neighbours, eight leave a margin


def keys(*parts: int | str) -> npt.NDArray[np.uint64]:
    """Round keys, a function of ``parts`` only. Shape [ROUNDS]."""
    digest = hashlib.shake_128(repr(parts).encode()).digest(8 * ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: Integers, size: int, keys: npt.NDArray[np.uint64]) -> Integers:
    """Where each ``index`` (0 <= index < size, any shape) goes under the permutation of range(size) named by ``keys``.

    A Feistel network over the smallest power of two that holds ``size``, walked until it lands inside ("cycle
    walking", Black and Rogaway 2002): at most two steps on average. Exact: a bijection for every key.
    """
    result = index.astype(np.uint64)
    if size < 2:
        return result.astype(np.int64)
    pending = np.arange(result.size)
    while pending.size:
        result.flat[pending] = _feistel(result.flat[pending], (size - 1).bit_length(), keys)
        pending = pending[result.flat[pending] >= size]
    return result.astype(np.int64)


def _feistel(value: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    low_bits = np.uint64((bits + 1) // 2)
    high_bits = np.uint64(bits) - low_bits
    low_mask, high_mask = (np.uint64((1 << int(width)) - 1) for width in (low_bits, high_bits))
    low, high = value & low_mask, value >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            high ^= _mix(low ^ key) & high_mask
        else:
            low ^= _mix(high ^ key) & low_mask
    return (high << low_bits) | low


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): an input bit flips half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
