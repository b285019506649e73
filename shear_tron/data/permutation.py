"""A pseudo-random permutation of range(n) that can be entered anywhere, in constant memory."""

import hashlib

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Unsigned = npt.NDArray[np.uint64]

ROUNDS = 12  # half-rounds; below 10, permutations of a dozen windows show a pattern (tests/unit/test_data_sampler.py)


def keys(*parts: int | str) -> Unsigned:
    """Round keys, a function of ``parts`` only. Shape [ROUNDS]."""
    digest = hashlib.shake_128(repr(parts).encode()).digest(8 * ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: Integers, size: int | Integers, keys: Unsigned) -> Integers:
    """Where each ``index`` (0 <= index < size, shape [n]) goes under the permutation of range(size) named by ``keys``.

    ``size`` is one number, or one for each index ([n]); so may be the keys ([ROUNDS, n]). The index is written with two
    digits in a grid that just holds ``size``, and each digit in turn is shifted by a hash of the other: a Feistel
    network, a bijection for every key. Where it leaves range(size), which the grid makes rare, it is walked on until it
    is back ("cycle walking", Black and Rogaway 2002).
    """
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    rows = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    columns = (sizes + rows - np.uint64(1)) // rows
    keys = np.broadcast_to(keys.reshape(ROUNDS, -1), (ROUNDS, index.size))
    result = _feistel(index.astype(np.uint64), rows, columns, keys)
    while (outside := np.flatnonzero(result >= sizes)).size:
        result[outside] = _feistel(result[outside], rows[outside], columns[outside], keys[:, outside])
    return result.astype(np.int64)


def _feistel(value: Unsigned, rows: Unsigned, columns: Unsigned, keys: Unsigned) -> Unsigned:
    high, low = np.divmod(value, columns)
    for number, key in enumerate(keys):
        if number % 2:
            high = (high + _mix(low ^ key)) % rows
        else:
            low = (low + _mix(high ^ key)) % columns
    return high * columns + low


def _mix(x: Unsigned) -> Unsigned:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): an input bit flips half of the output bits.

    The upper 48 bits, so that a digit can be added without overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(16)
