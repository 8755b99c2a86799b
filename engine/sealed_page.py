"""What a page looks like in Redis: a fixed header that names and authenticates it, then the page's bytes.

    magic 4 | version 2 | head class 1 | zero 1 | format digest 16 | chain hash 32 | payload bytes 8 | nonce 16 | tag 16

The tag is Poly1305 over the payload under a key used once: HMAC-SHA256(cluster key, header without tag). So it covers
every field, and costs 0.1 ms per MB where BLAKE2b takes 0.9 and HMAC-SHA256 0.5.
"""

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

from .chain import HASH_BYTES

_MAGIC, _VERSION = b"LSPG", 1
_FIELDS = struct.Struct("<4sH1sx16s32sQ16s")
_TAG_BYTES = 16
HEADER_BYTES = _FIELDS.size + _TAG_BYTES


@dataclass(frozen=True, slots=True)
class PageKey:
    """One page of one prompt prefix: the chain hash of its tokens, and the head class whose slots it holds."""

    chain_hash: bytes
    head_class: Literal["retrieval", "streaming"]

    @property
    def letter(self) -> str:
        """One letter for the head class: r or s."""
        return self.head_class[0]


class PageSeal:
    """Seals and opens the pages of one format under the cluster's secret."""

    def __init__(self, secret: bytes, format_id: str) -> None:
        self._key = hmac.digest(secret, b"lserve prefix page", "sha256")
        self._format = hashlib.sha256(format_id.encode()).digest()[:16]

    def seal(self, key: PageKey, payload: bytes | memoryview) -> bytes:
        """The value to store: header and payload."""
        fields = self._fields(key, len(payload), secrets.token_bytes(16))
        return b"".join((fields, Poly1305.generate_tag(self._one_time_key(fields), payload), payload))

    def open(self, key: PageKey, value: bytes) -> memoryview | None:
        """The payload, not copied; None if the value is cut off, forged, of another format or for another key."""
        if len(value) < HEADER_BYTES:
            return None
        view = memoryview(value)
        fields, tag, payload = view[: _FIELDS.size], view[_FIELDS.size : HEADER_BYTES], view[HEADER_BYTES:]
        if fields != self._fields(key, len(payload), bytes(fields[-16:])):
            return None
        try:
            Poly1305.verify_tag(self._one_time_key(fields), payload, bytes(tag))
        except InvalidSignature:
            return None
        return payload

    def _fields(self, key: PageKey, num_bytes: int, nonce: bytes) -> bytes:
        assert len(key.chain_hash) == HASH_BYTES
        letter = key.letter.encode()
        return _FIELDS.pack(_MAGIC, _VERSION, letter, self._format, key.chain_hash, num_bytes, nonce)

    def _one_time_key(self, fields: bytes | memoryview) -> bytes:
        return hmac.digest(self._key, fields, "sha256")
