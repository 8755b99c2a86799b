"""The Ray cluster that this machine belongs to, for commands that act on it."""

import logging
import os
import socket

from lserve.engine.errors import LServeError

_TIMEOUT_S = 5.0


def connect() -> None:
    """Makes this process a driver of the cluster. Raises LServeError when there is none, or its head is gone.

    Ray itself waits minutes for a head that is gone, which a pod on its way out does not have.
    """
    import ray

    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), _TIMEOUT_S).close()
        except OSError as error:
            raise LServeError(f"no Ray head answers at {host}:{port}: {error.strerror or error}") from None
    try:
        ray.init(address="auto", namespace="lserve", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise LServeError(str(error).strip().splitlines()[0]) from None
