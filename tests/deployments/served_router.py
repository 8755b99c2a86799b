"""A router that listens on a port of this machine, for clients over real HTTP."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from lserve.deployments.api import Api
from lserve.deployments.router import RouterCore


@contextmanager
def served_router(core: RouterCore) -> Iterator[str]:
    """The URL, while the block runs."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # a client that is faster than the server waits
    server = uvicorn.Server(uvicorn.Config(Api(core).app(), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
