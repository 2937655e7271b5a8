"""Random numbers as a function of (seed, stream, position).

A generator with a state makes what a sample looks like depend on everything drawn before it, and so on the
number of workers and processes. Here the draw *is* its address: the sample at position p of a run, its
augmentation and its masks are the same whoever computes them and whenever. The state of a data loader is then
one integer, and resuming needs nothing else.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators"), applied to a counter; it passes BigCrush as a stream.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TO_UNIT = 2.0**-53


def _mix(x: UInt64) -> UInt64:
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _key(seed: int, stream: str) -> UInt64:
    words = np.asarray([seed & (2**64 - 1)], dtype=np.uint64)
    return _mix(_mix(words) ^ np.uint64(zlib.crc32(stream.encode())))


def bits(seed: int, stream: str, positions: Int64, count: int) -> UInt64:
    """64 random bits for each position and draw.

    Args:
        seed: the run's seed.
        stream: what the numbers are for; two streams are independent.
        positions: `[n]` non-negative integers, the address of each row.
        count: how many numbers each position gets.

    Returns:
        `[n, count]` uint64. Row i depends on nothing but (seed, stream, positions[i]).
    """
    rows = _mix(_key(seed, stream) ^ np.asarray(positions, dtype=np.int64).astype(np.uint64))
    with np.errstate(over="ignore"):
        counters = rows[:, None] + np.arange(count, dtype=np.uint64)[None, :] * _GOLDEN
    return _mix(counters)


def uniform(seed: int, stream: str, positions: Int64, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1): `[n, count]` float64; see `bits` for the arguments."""
    return (bits(seed, stream, positions, count) >> np.uint64(11)).astype(np.float64) * _TO_UNIT


def scalar_seed(seed: int, stream: str, position: int) -> int:
    """One integer in [0, 2^63) to seed a stateful generator at an address."""
    return int(bits(seed, stream, np.asarray([position]), 1)[0, 0] >> np.uint64(1))


def permute(seed: int, stream: str, round_: Int64, index: Int64, size: int) -> Int64:
    """A pseudorandom permutation of range(size), evaluated only where it is asked for.

    A four-round Feistel network over the smallest even number of bits that holds `size`, walked along its
    cycle until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It costs
    O(1) memory whatever the size, where a shuffled index of 10^9 images would cost 8 GB per process.

    Args:
        seed, stream: name the family of permutations.
        round_: `[n]` which permutation of the family each row uses (an epoch, say).
        index: `[n]` integers in [0, size).
        size: length of the range, at least 1.

    Returns:
        `[n]` int64 in [0, size); for a fixed round a bijection of range(size).
    """
    index = np.asarray(index, dtype=np.int64)
    assert size >= 1
    assert index.size == 0 or (index.min() >= 0 and index.max() < size)
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = bits(seed, stream, np.broadcast_to(np.asarray(round_, dtype=np.int64), index.shape), 4)

    def encrypt(x: UInt64, k: UInt64) -> UInt64:
        left, right = x >> shift, x & mask
        for i in range(4):
            left, right = right, left ^ (_mix(right ^ k[:, i]) & mask)
        return (left << shift) | right

    out = encrypt(index.astype(np.uint64), keys)
    # The domain is at most 4 x size, so each walk ends after 4 tries on average; a cycle returns to its start,
    # which is inside, so it always ends.
    outside = np.flatnonzero(out >= np.uint64(size))
    while outside.size:
        out[outside] = encrypt(out[outside], keys[outside])
        outside = outside[out[outside] >= np.uint64(size)]
    return out.astype(np.int64)
