import os

from hypothesis import given
from hypothesis import strategies as st

from lserve.engine.sealed_page import HEADER_BYTES, PageKey, PageSeal

SEAL = PageSeal(b"secret", "format")
KEY = PageKey(b"h" * 32, "retrieval")
PAYLOAD = os.urandom(1000)
VALUE = SEAL.seal(KEY, PAYLOAD)


@given(st.binary(max_size=2000))
def test_a_sealed_page_opens_to_its_own_bytes(payload: bytes) -> None:
    value = SEAL.seal(KEY, payload)
    assert len(value) == HEADER_BYTES + len(payload)
    assert SEAL.open(KEY, value) == payload


def test_the_same_page_never_has_the_same_tag_twice() -> None:
    assert SEAL.seal(KEY, PAYLOAD)[:HEADER_BYTES] != VALUE[:HEADER_BYTES]


def test_a_page_opens_only_under_its_own_secret_format_hash_and_class() -> None:
    assert SEAL.open(KEY, VALUE) == PAYLOAD
    assert SEAL.open(PageKey(b"g" * 32, "retrieval"), VALUE) is None
    assert SEAL.open(PageKey(b"h" * 32, "streaming"), VALUE) is None
    assert PageSeal(b"other", "format").open(KEY, VALUE) is None
    assert PageSeal(b"secret", "other").open(KEY, VALUE) is None


@given(st.integers(0, len(VALUE) - 1), st.integers(1, 255))
def test_any_changed_byte_closes_it(position: int, flip: int) -> None:
    changed = bytearray(VALUE)
    changed[position] ^= flip
    assert SEAL.open(KEY, bytes(changed)) is None


@given(st.integers(0, len(VALUE) - 1), st.binary(max_size=200))
def test_any_cut_or_splice_closes_it(length: int, tail: bytes) -> None:
    value = VALUE[:length] + tail
    assert SEAL.open(KEY, value) == (PAYLOAD if value == VALUE else None)


@given(st.binary(max_size=300))
def test_noise_is_no_page(value: bytes) -> None:
    assert SEAL.open(KEY, value) is None
