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
def _ends(a_low, a_high, a_present, a_kept, b_low, b_high, b_present, b_kept):
    return tl.minimum(a_low, b_low), tl.maximum(a_high, b_high), a_present + b_present, a_kept + b_kept


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _threshold(keys, count):
    """The largest threshold that at least `count` keys reach, or any that exactly `count` reach, or the smallest key
    where too few are present; how many keys reach it; how many are above it, where more than `count` reach it.
    """
    is_kept = keys == KEPT
    low, high, reached, above = tl.reduce(
        (tl.where(keys == 0, KEPT, keys), tl.where(is_kept, 0, keys), (keys != 0).to(tl.int32), is_kept.to(tl.int32)),
        0, _ends,
    )  # fmt: skip
    low = tl.minimum(low, high)
    high += 1
    while (high - low > 1) & (reached > count):
        step = tl.maximum((high - low) >> 2, 1)
        first, second, third = low + step, low + 2 * step, low + 3 * step
        # two counts share an integer: at least one key reaches no threshold, and a row has at most 2**16
        counts = tl.where(keys >= second, 1, 0) + tl.where(keys >= third, 0x10000, 0)
        n1, counts = tl.reduce((tl.where(keys >= first, 1, 0), counts), 0, _add2)
        n2, n3 = counts & 0xFFFF, (counts.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
        steps = (n1 >= count).to(tl.uint32) + (n2 >= count).to(tl.uint32) + (n3 >= count).to(tl.uint32)
        reached = tl.where(steps == 3, n3, tl.where(steps == 2, n2, tl.where(steps == 1, n1, reached)))
        low += steps * step
        if (steps < 3) & (low + step < high):
            high = low + step
            above = tl.where(steps == 2, n3, tl.where(steps == 1, n2, n1))
    return low, reached, above


@triton.jit
def take(keys, count):
    """Takes the `count` largest keys, and all that are kept even if they are more; ties go to the lower index.

    Returns which are taken, each taken entry's place among them, and how many they are.
    """
    threshold, reached, above = _threshold(keys, count)
    room = tl.where(reached > count, tl.maximum(count - above, 0), reached)
    is_above = keys > threshold
    is_equal = (keys == threshold) & (threshold > 0)
    if keys.shape[0] <= 32768:  # one scan for both counts
        scanned = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
        num_above, num_equal = scanned & 0xFFFF, scanned >> 16
    else:
        num_above, num_equal = tl.cumsum(is_above.to(tl.int32), 0), tl.cumsum(is_equal.to(tl.int32), 0)
    place = num_above + tl.minimum(num_equal, room) - 1
    taken = is_above | (is_equal & (num_equal <= room))
    return taken, place, tl.where(reached > count, tl.maximum(count, above), reached)
