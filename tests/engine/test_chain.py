import hashlib
import hmac
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve.engine.chain import HASH_BYTES, chain_hashes, chain_root

ROOT = chain_root(b"secret", "tenant", "format")


def test_every_link_is_sha256_of_the_parent_and_the_page_as_little_endian_int32() -> None:
    token_ids = list(range(1000, 1000 + 2 * 64))
    first = hashlib.sha256(ROOT + struct.pack("<64i", *token_ids[:64])).digest()
    second = hashlib.sha256(first + struct.pack("<64i", *token_ids[64:])).digest()
    assert chain_hashes(ROOT, token_ids) == [first, second]


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (63, 0), (64, 1), (127, 1), (128, 2), (1000, 15)])
def test_only_full_pages_have_a_hash(num_tokens: int, num_pages: int) -> None:
    hashes = chain_hashes(ROOT, tuple(range(num_tokens)))
    assert len(hashes) == num_pages
    assert all(len(chain_hash) == HASH_BYTES for chain_hash in hashes)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=64, max_size=400), st.data())
def test_a_changed_token_changes_its_page_and_every_later_one_only(token_ids: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(token_ids) // 64 * 64 - 1))
    changed = list(token_ids)
    changed[position] ^= 1
    before, after = chain_hashes(ROOT, token_ids), chain_hashes(ROOT, changed)
    page = position // 64
    assert before[:page] == after[:page]
    assert all(old != new for old, new in zip(before[page:], after[page:], strict=True))


def test_secret_tenant_and_format_each_give_another_root() -> None:
    roots = {
        ROOT,
        chain_root(b"other", "tenant", "format"),
        chain_root(b"secret", "other", "format"),
        chain_root(b"secret", "tenant", "other"),
        chain_root(b"secret", "tenantf", "ormat"),
        chain_root(b"secret", "", "tenantformat"),
    }
    assert len(roots) == 6
    assert len(ROOT) == HASH_BYTES
    message = (6).to_bytes(4, "little") + b"tenant" + b"format"
    assert hmac.new(b"secret", message, hashlib.sha256).digest() == ROOT


def test_a_token_id_that_is_no_int32_is_refused() -> None:
    with pytest.raises(OverflowError):
        chain_hashes(ROOT, [2**31] * 64)


def test_128k_tokens_take_milliseconds() -> None:
    token_ids = tuple(range(131_072))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        chain_hashes(ROOT, token_ids)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05, f"took {best * 1e3:.1f} ms"
