"""The largest scores of a row, found without sorting, for rows that one program holds in registers.

Scores become integers of the same order, and the interval that holds the threshold shrinks to a quarter in each
pass over the row. It starts between the row's own ends and stops as soon as a threshold keeps exactly as many as are
wanted, so that a row of well-spread scores takes six or seven passes.
"""

import triton
import triton.language as tl

KEPT: tl.constexpr = tl.constexpr(0xFFFFFFFF)
"""The key of an entry that is taken whatever the others are. Absent entries have key 0."""


@triton.jit
def keys_of(score, kept, real):
    """uint32 keys in the order of the scores (float32, no NaN): `KEPT` for kept entries, 0 for those not real."""
    bits = score.to(tl.uint32, bitcast=True)
    bits ^= tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(kept, KEPT, tl.where(real, bits, 0)).to(tl.uint32)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _threshold(keys, count):
    """The largest threshold that at least `count` keys reach, or any that exactly `count` reach; the smallest key where
    too few are present. At most the largest key that is not kept.
    """
    high = tl.max(tl.where(keys == KEPT, 0, keys), 0)
    low = tl.min(tl.where(keys == 0, high, keys), 0)
    high += 1
    reached = tl.sum((keys != 0).to(tl.int32), 0)
    while (high > low) & (high - low > 1) & (reached > count):
        step = tl.maximum((high - low) >> 2, 1)
        first, second, third = low + step, low + 2 * step, low + 3 * step
        # two counts share an integer: at least one key reaches no threshold, and a row has at most 2**16
        counts = tl.where(keys >= second, 1, 0) + tl.where(keys >= third, 0x10000, 0)
        n1, counts = tl.reduce((tl.where(keys >= first, 1, 0), counts), 0, _add2)
        n2, n3 = counts & 0xFFFF, (counts.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
        reached = tl.where(n3 >= count, n3, tl.where(n2 >= count, n2, tl.where(n1 >= count, n1, reached)))
        steps = (n1 >= count).to(tl.uint32) + (n2 >= count).to(tl.uint32) + (n3 >= count).to(tl.uint32)
        low += steps * step
        high = tl.where(steps == 3, high, tl.minimum(high, low + step))
    return low


@triton.jit
def take(keys, count):
    """Takes the `count` largest keys, and all that are kept even if they are more; ties go to the lower index.

    Returns which are taken, each taken entry's place among them, and how many they are.
    """
    threshold = _threshold(keys, count)
    above = (keys > threshold).to(tl.int32)
    equal = ((keys == threshold) & (threshold > 0)).to(tl.int32)
    room = tl.maximum(count - tl.sum(above, 0), 0)
    if keys.shape[0] <= 32768:  # one scan for both counts
        scanned = tl.cumsum(above + (equal << 16), 0)
        num_above, num_equal = scanned & 0xFFFF, scanned >> 16
    else:
        num_above, num_equal = tl.cumsum(above, 0), tl.cumsum(equal, 0)
    place = num_above + tl.minimum(num_equal, room) - 1
    taken = (keys > threshold) | ((keys == threshold) & (threshold > 0) & (num_equal <= room))
    return taken, place, tl.max(place, 0) + 1
