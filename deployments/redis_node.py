"""Redis on a node of the Ray cluster: an actor owns the server, so it starts, moves and ends as Ray does."""

import datetime
import ipaddress
from dataclasses import dataclass
from typing import Any

import ray
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lserve.engine.errors import LServeError, SettingsError

from .embedded_valkey import EmbeddedValkey, TlsListener
from .settings import RedisSettings, secret

RESOURCE = "lserve_redis"
"""The custom resource of the node that Redis belongs on."""

_LIFETIME = datetime.timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class RedisEndpoint:
    """For the settings `redis.url` and `redis.ca`."""

    url: str
    ca: str


class RedisNode:
    """The actor: a server with TLS under a certificate of its own, and the password that the node's environment has.

    address: of the node; None asks Ray. SettingsError without a password or a server that can do TLS.
    """

    def __init__(self, max_memory_bytes: int, port: int, address: str | None = None) -> None:
        password_env = RedisSettings().password_env
        password = secret(password_env)
        if password is None:
            raise SettingsError(f"the environment of Redis' node must have a password in {password_env}")
        address = address or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        certificate, key = self_signed(address)
        self._server = EmbeddedValkey(max_memory_bytes, tls=TlsListener(port, certificate, key, password))
        self._endpoint = RedisEndpoint(f"rediss://{address}:{port}/0", certificate)

    def endpoint(self) -> RedisEndpoint:
        """Where the server is and how to know it."""
        return self._endpoint

    def stop(self) -> None:
        """End the server; it also ends with this process."""
        self._server.stop()


def start_redis(max_memory_bytes: int, port: int, timeout_s: float) -> RedisEndpoint:
    """The endpoint of the cluster's Redis, started where it is not yet; waits for a node with the resource.

    Needs a connected Ray driver. LServeError when there is none in time, or the server does not start.
    """
    kind: Any = ray.remote(RedisNode)
    actor = kind.options(
        name="redis",
        namespace="lserve",
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources={RESOURCE: 1},
        max_restarts=-1,
    ).remote(max_memory_bytes, port)
    try:
        endpoint: RedisEndpoint = ray.get(actor.endpoint.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise LServeError(f"no node with the resource {RESOURCE} runs Redis within {timeout_s:g} s") from None
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        ray.kill(actor)
        raise LServeError(f"Redis did not start: {reason}") from None
    return endpoint


def self_signed(address: str) -> tuple[str, str]:
    """A certificate for an IP address that vouches for itself, and its private key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lserve redis")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
