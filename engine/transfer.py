"""Moving pages between workers with NIXL: one-sided READs from a peer's pools straight into this worker's own.

Works on host memory (DRAM) and device memory (VRAM) alike, over UCX. Each pool is registered once. One thread owns the
NIXL agent, whose Python API is not thread-safe and whose posts may copy inline (80 ms for 256 MB in shared memory); it
posts, polls and completes futures, so that no event loop ever waits for NIXL.

Releasing a running handle or removing its peer does not stop UCX: 117 MB arrived after both, from a peer that had been
paused. So a READ that times out or is cancelled is parked and polled until NIXL calls it done or failed, and its local
pages stay in `Transfer.pending_pages` until then.
"""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .errors import FormatMismatchError, TransferError
from .nixl_agent import Handle, NixlAgent

logger = logging.getLogger(__name__)

_MIN_POLL_S, _MAX_POLL_S = 50e-6, 1e-3
_ERROR_QUARANTINE_S = 1.0  # a failed READ may have other pages on the wire until its connection is torn down
_SLOW_BYTES, _SLOW_BYTES_PER_S = 16 << 20, 20e9  # between device pools; NVLink and CUDA IPC reach over 100 GB/s


@dataclass(frozen=True, slots=True)
class PoolMetadata:
    """Where a peer's pool lies: base address, pages, bytes per page, device index (0 for host memory)."""

    address: int
    num_pages: int
    page_bytes: int
    device_id: int


@dataclass(frozen=True, slots=True)
class PeerMetadata:
    """What another worker needs to read from this one. Passed in actor calls only, never stored or logged.

    name: the worker's; agent_name: the same with a random suffix, new at every start. memory: DRAM or VRAM.
    """

    name: str
    agent_name: str
    format_id: str
    memory: str
    pools: Mapping[str, PoolMetadata]
    nixl: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PageRead:
    """Copy one page: `remote_page` of the peer's pool into `local_page` of this worker's pool of the same name."""

    pool: str
    remote_page: int
    local_page: int


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Bytes moved by one `read`, and the seconds from its call to its end."""

    num_bytes: int
    seconds: float


@dataclass(eq=False, slots=True)
class _Peer:
    """A known peer; `loaded` once NIXL has its metadata, `num_reads` completed so far."""

    metadata: PeerMetadata
    loaded: bool = False
    num_reads: int = 0


@dataclass(eq=False, slots=True)
class _Flight:
    """One READ, from the call until nothing can write its pages any more.

    done: what the caller waits for. quiet: set when the pages are free to be used again. quiet_at: for a failed READ,
    the monotonic time at which it counts as quiet.
    """

    peer: _Peer
    reads: tuple[PageRead, ...]
    pages: frozenset[tuple[str, int]]
    num_bytes: int
    start: float
    done: "Future[TransferStats]" = field(default_factory=Future)
    quiet: "Future[None]" = field(default_factory=Future)
    handle: Handle = None
    quiet_at: float | None = None


class Transfer:
    """One worker's NIXL agent.

    pools: name ("retrieval", "streaming", "tail") -> contiguous uint8 [num_pages, page_bytes], all on one device; a
    pool without pages is left out. They must stay where they are until `close` returns. A CUDA pool must come from
    cudaMalloc (the default allocator without expandable segments), else UCX cannot map it into another process.
    format_id: of the pages in the pools; a peer with another one is refused.

    Methods may be called from any thread. TransferError if NIXL is missing or cannot register the pools.
    """

    def __init__(self, name: str, pools: Mapping[str, torch.Tensor], *, format_id: str) -> None:
        self._pools = {pool: tensor for pool, tensor in pools.items() if tensor.shape[0]}
        devices = {tensor.device for tensor in self._pools.values()}
        assert len(devices) <= 1, f"pools lie on several devices: {devices}"
        for pool, tensor in self._pools.items():
            assert tensor.dtype == torch.uint8 and tensor.dim() == 2 and tensor.is_contiguous(), pool
        self._device = devices.pop() if devices else torch.device("cpu")
        self._memory = "VRAM" if self._device.type == "cuda" else "DRAM"
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._flights: set[_Flight] = set()
        self._retired: set[_Peer] = set()
        self._warned_slow = False
        self._closing = False
        self._inbox: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        agent_name = f"{name}-{secrets.token_hex(6)}"
        started: Future[bytes] = Future()
        self._thread = threading.Thread(target=self._run, args=(agent_name, started), name="nixl", daemon=True)
        self._thread.start()
        device_id = self._device.index or 0
        self._metadata = PeerMetadata(
            name,
            agent_name,
            format_id,
            self._memory,
            {p: PoolMetadata(t.data_ptr(), t.shape[0], t.shape[1], device_id) for p, t in self._pools.items()},
            started.result(),
        )

    def metadata(self) -> PeerMetadata:
        """What a peer passes to its `add_peer` to read from this worker."""
        return self._metadata

    def add_peer(self, metadata: PeerMetadata) -> str:
        """Make a peer readable; returns its agent name, which `read` takes. An earlier start of that worker is dropped.

        FormatMismatchError if its pages have another format, size or kind of memory. Connects at the first read.
        """
        mine = self._metadata
        if metadata.format_id != mine.format_id:
            raise FormatMismatchError(f"{metadata.name} has format {metadata.format_id}, this worker {mine.format_id}")
        if metadata.memory != mine.memory and metadata.pools and mine.pools:
            raise FormatMismatchError(f"{metadata.name} has pages in {metadata.memory}, this worker in {mine.memory}")
        for pool in metadata.pools.keys() & mine.pools.keys():
            theirs, ours = metadata.pools[pool].page_bytes, mine.pools[pool].page_bytes
            if theirs != ours:
                raise FormatMismatchError(f"{metadata.name} has {theirs} bytes a page in {pool}, this worker {ours}")
        with self._lock:
            if metadata.agent_name not in self._peers:
                for peer in [p for p in self._peers.values() if p.metadata.name == metadata.name]:
                    self._retire(peer)
                self._peers[metadata.agent_name] = _Peer(metadata)
        return metadata.agent_name

    def remove_peer(self, agent_name: str) -> None:
        """Start no more reads from this peer. Running ones end by themselves; an unknown name is ignored."""
        with self._lock:
            if agent_name in self._peers:
                self._retire(self._peers[agent_name])

    async def read(self, peer: str, reads: Sequence[PageRead], timeout_s: float) -> TransferStats:
        """Copy pages from a peer (its agent name) into this worker's pools, all in one READ.

        TransferError if the peer is unknown, dead or too slow, or a page id is out of range. After any exception,
        cancellation too, the local pages may still be written: hold them until `settled(reads)` returns.
        """
        flight = self._admit(peer, tuple(reads))
        if not flight.reads:
            return TransferStats(0, 0.0)
        self._inbox.put(flight)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(flight.done)
        except TimeoutError:
            raise TransferError(f"reading {len(reads)} pages from {peer} took longer than {timeout_s} s") from None

    def pending_pages(self) -> frozenset[tuple[str, int]]:
        """(pool, local page) pairs that NIXL may still write; none of them may be used for anything else."""
        with self._lock:
            return frozenset().union(*(flight.pages for flight in self._flights))

    async def settled(self, reads: Sequence[PageRead]) -> None:
        """Wait until nothing can write the local pages of these reads any more.

        For a failed READ that is about a second; for one from a paused peer, until the peer runs again or dies.
        """
        pages = {(read.pool, read.local_page) for read in reads}
        while True:
            with self._lock:
                flights = [flight for flight in self._flights if not pages.isdisjoint(flight.pages)]
            if not flights:
                return
            await asyncio.wait([asyncio.wrap_future(flight.quiet) for flight in flights])

    def close(self, timeout_s: float = 5.0) -> None:
        """Deregister the pools once every READ is quiet. Past the time-out the thread goes on waiting for that."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("%s closes with transfers in flight; their pages stay registered", self._metadata.name)

    def _retire(self, peer: _Peer) -> None:
        """Forget a peer now, and in NIXL once its last READ is quiet. Called with the lock held."""
        del self._peers[peer.metadata.agent_name]
        self._retired.add(peer)
        self._inbox.put(None)

    def _admit(self, agent_name: str, reads: tuple[PageRead, ...]) -> _Flight:
        """Check a request and mark its local pages as pending."""
        pages = frozenset((read.pool, read.local_page) for read in reads)
        with self._lock:
            peer = self._peers.get(agent_name)
            if self._closing:
                raise TransferError(f"{self._metadata.name} is closing")
            if peer is None:
                raise TransferError(f"unknown peer {agent_name}: it was lost, removed or started again")
            num_bytes = sum(self._check(read, peer.metadata) for read in reads)
            if len(pages) != len(reads):
                raise TransferError("a read names the same local page twice")
            for flight in self._flights:
                if not pages.isdisjoint(flight.pages):
                    raise TransferError(f"another transfer may still write {sorted(pages & flight.pages)[0]}")
            flight = _Flight(peer, reads, pages, num_bytes, time.monotonic())
            flight.quiet.set_running_or_notify_cancel()  # cancelling a waiter must not cancel it
            if reads:
                self._flights.add(flight)
        return flight

    def _check(self, read: PageRead, theirs: PeerMetadata) -> int:
        """Bytes of a page to read, which both sides must have."""
        for side, page in ((theirs, read.remote_page), (self._metadata, read.local_page)):
            pool = side.pools.get(read.pool)
            if pool is None:
                raise TransferError(f"{side.name} has no pool {read.pool!r}")
            if not 0 <= page < pool.num_pages:
                raise TransferError(f"{side.name} has no {read.pool} page {page}, only {pool.num_pages}")
        return self._metadata.pools[read.pool].page_bytes

    # The agent's thread runs everything below.

    def _run(self, agent_name: str, started: "Future[bytes]") -> None:
        try:
            agent = NixlAgent(agent_name, self._pools.values(), self._device)
            started.set_result(agent.metadata())
        except Exception as error:
            started.set_exception(TransferError(f"cannot start NIXL for {agent_name}: {error!r}"))
            return
        delay = _MIN_POLL_S
        while not self._closing or self._flights:
            try:
                posted = self._inbox.get(timeout=delay if self._flights else None)
            except queue.Empty:
                delay = min(2 * delay, _MAX_POLL_S)
            else:
                delay = _MIN_POLL_S
                if posted is not None:
                    self._post(agent, posted)
            with self._lock:
                flights = list(self._flights)
            for flight in flights:
                self._poll(agent, flight)
            self._forget_retired(agent)
        agent.close()

    def _post(self, agent: NixlAgent, flight: _Flight) -> None:
        """Start a READ, unless its caller has gone already."""
        if not flight.done.set_running_or_notify_cancel():
            self._end(agent, flight)
            return
        metadata = flight.peer.metadata
        try:
            if not flight.peer.loaded:
                if any(peer.loaded and peer.metadata.agent_name == metadata.agent_name for peer in self._retired):
                    raise TransferError(f"the connection to {metadata.agent_name} is being reset")
                agent.add_peer(metadata.agent_name, metadata.nixl)
                flight.peer.loaded = True
            local = _descriptors(flight.reads, self._metadata)
            remote = _descriptors(flight.reads, metadata, remote=True)
            flight.handle = agent.prepare_read(metadata.agent_name, local, remote)
            if agent.post(flight.handle) == "ERR":
                self._fail(flight, "NIXL reports an error")
        except Exception as error:
            self._fail(flight, repr(error))

    def _poll(self, agent: NixlAgent, flight: _Flight) -> None:
        """See whether a READ has ended, or a failed one's quarantine."""
        if flight.quiet_at is not None:
            if time.monotonic() >= flight.quiet_at:
                self._end(agent, flight)
            return
        if flight.handle is None:
            return  # not posted yet
        try:
            state = agent.state(flight.handle)
        except Exception as error:
            self._fail(flight, repr(error))
            return
        if state == "ERR":
            self._fail(flight, "NIXL reports an error")
        elif state == "DONE":
            stats = TransferStats(flight.num_bytes, time.monotonic() - flight.start)
            self._warn_if_slow(flight.peer, stats)
            self._end(agent, flight)
            flight.done.set_result(stats)

    def _fail(self, flight: _Flight, reason: str) -> None:
        """Tell the caller now; the pages are quiet a little later. The peer must be added again."""
        flight.quiet_at = time.monotonic() + (_ERROR_QUARANTINE_S if flight.handle is not None else 0.0)
        with self._lock:
            if self._peers.get(flight.peer.metadata.agent_name) is flight.peer:
                self._retire(flight.peer)
        flight.done.set_exception(TransferError(f"reading from {flight.peer.metadata.agent_name} failed: {reason}"))

    def _end(self, agent: NixlAgent, flight: _Flight) -> None:
        """Free a quiet flight's pages."""
        if flight.handle is not None:
            agent.release(flight.handle)
            flight.handle = None
        with self._lock:
            self._flights.discard(flight)
        flight.quiet.set_result(None)

    def _forget_retired(self, agent: NixlAgent) -> None:
        """Remove retired peers from NIXL, but never under a READ that may still run."""
        with self._lock:
            idle = self._retired - {flight.peer for flight in self._flights}
        for peer in idle:
            if peer.loaded:
                agent.remove_peer(peer.metadata.agent_name)
        with self._lock:
            self._retired -= idle

    def _warn_if_slow(self, peer: _Peer, stats: TransferStats) -> None:
        peer.num_reads += 1
        if self._warned_slow or self._memory != "VRAM" or peer.num_reads == 1 or stats.num_bytes < _SLOW_BYTES:
            return
        rate = stats.num_bytes / stats.seconds
        if rate < _SLOW_BYTES_PER_S:
            self._warned_slow = True
            logger.warning(
                "pages from %s arrive at %.1f GB/s, less than %.0f between GPUs: is UCX using TCP? See UCX_TLS",
                peer.metadata.name,
                rate / 1e9,
                _SLOW_BYTES_PER_S / 1e9,
            )


def _descriptors(reads: Sequence[PageRead], side: PeerMetadata, *, remote: bool = False) -> "np.ndarray[Any, Any]":
    """uint64 [num_reads, 3]: address, bytes and device of each page on one side."""
    rows = np.empty((len(reads), 3), dtype=np.uint64)
    for row, read in zip(rows, reads, strict=True):
        pool = side.pools[read.pool]
        page = read.remote_page if remote else read.local_page
        row[:] = (pool.address + page * pool.page_bytes, pool.page_bytes, pool.device_id)
    return rows
