"""NIXL's Python API, cut down to what `transfer.py` needs. It is not thread-safe: an agent belongs to one thread."""

import importlib
import logging
import os
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch

from .errors import TransferError

logger = logging.getLogger(__name__)

_PROGRESS_US = 10_000  # the longest that NIXL's progress thread sleeps; events wake it

Handle = Any
"""A posted READ, as NIXL knows it."""


class NixlAgent:
    """An agent with the UCX backend and this worker's pools, each registered once.

    name: unique in the cluster. pools: contiguous tensors, all on `device`. Any error of NIXL may come out of any
    method, as NIXL's own exception types.
    """

    def __init__(self, name: str, pools: Iterable[torch.Tensor], device: torch.device) -> None:
        self._memory = "VRAM" if device.type == "cuda" else "DRAM"
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # UCX sees no NVLink inside one device and would read over TCP there: 0.6 GB/s instead of 130.
            os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
        api, bindings = importlib.import_module("nixl._api"), importlib.import_module("nixl._bindings")
        # The Python API fixes the progress thread's poll time-out at 0, which keeps a core busy for good.
        self._agent: Any = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        config = bindings.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
        self._agent.agent = bindings.nixlAgent(name, config)
        self._agent.create_backend("UCX")
        self._registered = [self._agent.register_memory(pool) for pool in pools]

    def metadata(self) -> bytes:
        """What `add_peer` takes on the other side."""
        return bytes(self._agent.get_agent_metadata())

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Connect to a peer. TransferError if the metadata names another agent."""
        if self._agent.add_remote_agent(metadata) != name.encode():
            raise TransferError(f"the NIXL metadata of {name} belongs to another agent")

    def remove_peer(self, name: str) -> None:
        """Disconnect from a peer. Does not stop a READ that is running."""
        try:
            self._agent.remove_remote_agent(name)
        except Exception as error:
            logger.debug("NIXL peer %s not removed: %r", name, error)  # NIXL drops a dead peer by itself

    def prepare_read(self, peer: str, local: "np.ndarray[Any, Any]", remote: "np.ndarray[Any, Any]") -> Handle:
        """A READ of the remote ranges into the local ones; both uint64 [num_ranges, 3]: address, bytes, device."""
        return self._agent.initialize_xfer(
            "READ",
            self._agent.get_xfer_descs(local, self._memory),
            self._agent.get_xfer_descs(remote, self._memory),
            peer,
        )

    def post(self, handle: Handle) -> Literal["DONE", "PROC", "ERR"]:
        """Start a prepared READ; in shared memory this copies all of it before it returns."""
        state: Literal["DONE", "PROC", "ERR"] = self._agent.transfer(handle)
        return state

    def state(self, handle: Handle) -> Literal["DONE", "PROC", "ERR"]:
        """How a posted READ stands. ERR may come while other ranges of it are still on the wire."""
        state: Literal["DONE", "PROC", "ERR"] = self._agent.check_xfer_state(handle)
        return state

    def release(self, handle: Handle) -> None:
        """Free a READ that has ended. Releasing a running one does not stop it."""
        try:
            handle.release()
        except Exception as error:
            logger.debug("NIXL handle not released: %r", error)

    def close(self) -> None:
        """Deregister the pools."""
        for descriptors in self._registered:
            self._agent.deregister_memory(descriptors)
