"""How every client connects to Redis: with a password, over TLS, checked against a private authority if need be."""

import ssl
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError

_PEM = "-----BEGIN CERTIFICATE-----"


def client_options(url: str, password: str | None, ca: str | None, timeout_s: float) -> dict[str, Any]:
    """Keyword arguments for `Redis.from_url(url, ...)` of the synchronous and the asyncio client alike.

    ca: the certificates that a server reached by rediss:// must descend from, as PEM or as the path of a PEM file;
    None trusts the system's authorities. SettingsError when it cannot be used.
    """
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    if password is not None:
        options["password"] = password
    if ca is not None:
        if urlsplit(url).scheme != "rediss":
            raise SettingsError(f"redis.ca is set, so redis.url must start with rediss://, got {url!r}")
        is_text = ca.lstrip().startswith(_PEM)
        try:
            ssl.create_default_context(cafile=None if is_text else ca, cadata=ca if is_text else None)
        except OSError as error:  # SSLError is one
            what = "the certificate" if is_text else repr(ca)
            raise SettingsError(f"redis.ca: cannot use {what}: {error.strerror or error}") from None
        options["ssl_ca_data" if is_text else "ssl_ca_certs"] = ca
    return options
