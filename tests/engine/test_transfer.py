import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch
from transfer_peer import NUM_PAGES, make_pools

from lserve.engine.errors import FormatMismatchError, TransferError
from lserve.engine.transfer import PageRead, PeerMetadata, Transfer

pytest.importorskip("nixl", reason="NIXL is not installed")

PAGE_BYTES = 1 << 18
ROOT = Path(__file__).parents[2]
EXPECTED = make_pools(PAGE_BYTES)


class Peer:
    """A worker process over loopback NIXL. `transports` limits what UCX may use on its side."""

    def __init__(self, directory: Path, *, transports: str = "", device: str = "cpu") -> None:
        path = directory / "peer.sock"
        path.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if transports:
            environment["UCX_TLS"] = transports
        with Listener(str(path)) as listener:
            script = str(Path(__file__).with_name("transfer_peer.py"))
            self.process = subprocess.Popen(
                [sys.executable, script, str(path), "prefill", device, str(PAGE_BYTES)], env=environment, cwd=ROOT
            )
            self.connection = listener.accept()
        self.metadata: PeerMetadata = self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[MakePeer]:
    peers: list[Peer] = []

    def make(*, transports: str = "", device: str = "cpu") -> Peer:
        peers.append(Peer(tmp_path, transports=transports, device=device))
        return peers[-1]

    yield make
    for peer in peers:
        peer.kill()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """One peer for the tests that leave it alive."""
    peer = Peer(tmp_path_factory.mktemp("peer"))
    yield peer
    peer.connection.send("close")
    assert peer.process.wait(10) == 0
    peer.kill()


@pytest.fixture
def pools() -> dict[str, torch.Tensor]:
    return {pool: torch.zeros(num_pages, PAGE_BYTES, dtype=torch.uint8) for pool, num_pages in NUM_PAGES.items()}


@pytest.fixture
def transfer(pools: dict[str, torch.Tensor]) -> Iterator[Transfer]:
    transfer = Transfer("decode", pools, format_id="format")
    yield transfer
    transfer.close()


def test_pages_arrive_byte_for_byte_and_no_other_page_is_touched(
    peer: Peer, transfer: Transfer, pools: dict[str, torch.Tensor]
) -> None:
    reads = [PageRead("retrieval", page, 63 - page) for page in (0, 3, 4, 5, 63)]
    reads += [PageRead("streaming", 2, 15), PageRead("tail", 3, 0)]
    stats = asyncio.run(transfer.read(transfer.add_peer(peer.metadata), reads, timeout_s=10))
    assert stats.num_bytes == len(reads) * PAGE_BYTES
    assert stats.seconds > 0
    expected = {pool: torch.zeros_like(tensor) for pool, tensor in pools.items()}
    for read in reads:
        expected[read.pool][read.local_page] = EXPECTED[read.pool][read.remote_page]
    assert all(torch.equal(pools[pool], expected[pool]) for pool in pools)
    assert not transfer.pending_pages()


def test_concurrent_reads_from_one_loop_all_arrive(
    peer: Peer, transfer: Transfer, pools: dict[str, torch.Tensor]
) -> None:
    async def read_all() -> None:
        name = transfer.add_peer(peer.metadata)
        await asyncio.gather(
            *(transfer.read(name, [PageRead("retrieval", page, page)], timeout_s=10) for page in range(64))
        )

    asyncio.run(read_all())
    assert torch.equal(pools["retrieval"], EXPECTED["retrieval"])


def test_nothing_to_read_is_done_at_once(peer: Peer, transfer: Transfer) -> None:
    assert asyncio.run(transfer.read(transfer.add_peer(peer.metadata), [], timeout_s=1)).num_bytes == 0


def test_a_peer_of_another_format_is_refused(peer: Peer, transfer: Transfer) -> None:
    with pytest.raises(FormatMismatchError, match="other"):
        transfer.add_peer(dataclasses.replace(peer.metadata, format_id="other"))
    tail = dataclasses.replace(peer.metadata.pools["tail"], page_bytes=64)
    with pytest.raises(FormatMismatchError, match="64 bytes a page in tail"):
        transfer.add_peer(dataclasses.replace(peer.metadata, pools={**peer.metadata.pools, "tail": tail}))
    with pytest.raises(FormatMismatchError, match="VRAM"):
        transfer.add_peer(dataclasses.replace(peer.metadata, memory="VRAM"))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (PageRead("retrieval", 64, 0), "retrieval page 64"),
        (PageRead("retrieval", -1, 0), "retrieval page -1"),
        (PageRead("streaming", 0, 16), "streaming page 16"),
        (PageRead("other", 0, 0), "no pool 'other'"),
    ],
)
def test_a_page_outside_its_pool_is_refused(peer: Peer, transfer: Transfer, read: PageRead, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        asyncio.run(transfer.read(transfer.add_peer(peer.metadata), [PageRead("tail", 0, 0), read], timeout_s=1))
    assert not transfer.pending_pages()


def test_a_local_page_named_twice_is_refused(peer: Peer, transfer: Transfer) -> None:
    with pytest.raises(TransferError, match="twice"):
        reads = [PageRead("tail", 0, 0), PageRead("tail", 1, 0)]
        asyncio.run(transfer.read(transfer.add_peer(peer.metadata), reads, timeout_s=1))


def test_a_removed_peer_is_unknown_until_it_is_added_again(
    peer: Peer, transfer: Transfer, pools: dict[str, torch.Tensor]
) -> None:
    async def scenario() -> None:
        name = transfer.add_peer(peer.metadata)
        await transfer.read(name, [PageRead("tail", 0, 0)], timeout_s=10)
        transfer.remove_peer(name)
        transfer.remove_peer("never seen")
        with pytest.raises(TransferError, match="unknown peer"):
            await transfer.read(name, [PageRead("tail", 0, 0)], timeout_s=1)
        while transfer._retired:
            await asyncio.sleep(0.01)
        await transfer.read(transfer.add_peer(peer.metadata), [PageRead("tail", 1, 1)], timeout_s=10)

    asyncio.run(scenario())
    assert torch.equal(pools["tail"][:2], EXPECTED["tail"][:2])


def test_forged_nixl_metadata_is_an_error(peer: Peer, transfer: Transfer) -> None:
    forged = dataclasses.replace(peer.metadata, agent_name="forged", nixl=b"\0" * 400)
    with pytest.raises(TransferError):
        asyncio.run(transfer.read(transfer.add_peer(forged), [PageRead("tail", 0, 0)], timeout_s=5))


def test_pools_without_pages_are_left_out() -> None:
    pools = {"retrieval": torch.zeros(2, 64, dtype=torch.uint8), "streaming": torch.zeros(0, 64, dtype=torch.uint8)}
    transfer = Transfer("decode", pools, format_id="format")
    assert set(transfer.metadata().pools) == {"retrieval"}
    transfer.close()
    empty = Transfer("router", {}, format_id="format")
    assert not empty.metadata().pools
    empty.close()


def test_a_dead_peer_is_an_error_in_time_and_its_successor_is_another_peer(
    make_peer: MakePeer, transfer: Transfer, pools: dict[str, torch.Tensor]
) -> None:
    first = make_peer()

    async def scenario() -> None:
        old = transfer.add_peer(first.metadata)
        reads = [PageRead("retrieval", page, page) for page in range(8)]
        await transfer.read(old, reads[:1], timeout_s=10)
        first.kill()
        start = time.monotonic()
        with pytest.raises(TransferError):
            await transfer.read(old, reads, timeout_s=5)
        assert time.monotonic() - start < 5.5
        await asyncio.wait_for(transfer.settled(reads), 5)
        assert not transfer.pending_pages()

        new = transfer.add_peer(make_peer().metadata)
        with pytest.raises(TransferError, match="unknown peer"):
            await transfer.read(old, reads, timeout_s=1)
        await transfer.read(new, reads, timeout_s=10)

    asyncio.run(scenario())
    assert torch.equal(pools["retrieval"][:8], EXPECTED["retrieval"][:8])


@pytest.mark.parametrize("how", ["times out", "is cancelled"])
def test_pages_of_an_abandoned_read_stay_pending_until_nothing_can_write_them(
    make_peer: MakePeer, transfer: Transfer, pools: dict[str, torch.Tensor], how: str
) -> None:
    """A paused peer over TCP: its kernel has the request, and the bytes come when it runs again."""
    peer = make_peer(transports="tcp")

    async def scenario() -> None:
        name = transfer.add_peer(peer.metadata)
        await transfer.read(name, [PageRead("tail", 0, 0)], timeout_s=10)
        reads = [PageRead("retrieval", page, page) for page in range(64)]
        os.kill(peer.process.pid, signal.SIGSTOP)
        if how == "times out":
            with pytest.raises(TransferError, match="longer than 0.2 s"):
                await transfer.read(name, reads, timeout_s=0.2)
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(transfer.read(name, reads, timeout_s=60), 0.2)
        assert len(transfer.pending_pages()) == 64
        with pytest.raises(TransferError, match="may still write"):
            await transfer.read(name, reads[3:4], timeout_s=0.2)
        transfer.remove_peer(name)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(transfer.settled(reads), 0.2)
        os.kill(peer.process.pid, signal.SIGCONT)
        await asyncio.wait_for(transfer.settled(reads), 20)
        assert not transfer.pending_pages()

    asyncio.run(scenario())
    assert torch.equal(pools["retrieval"], EXPECTED["retrieval"]), "they had been on their way"


def test_a_paused_peer_that_dies_settles_its_reads(make_peer: MakePeer, transfer: Transfer) -> None:
    peer = make_peer(transports="tcp")

    async def scenario() -> None:
        name = transfer.add_peer(peer.metadata)
        reads = [PageRead("retrieval", page, page) for page in range(64)]
        await transfer.read(name, reads[:1], timeout_s=10)
        os.kill(peer.process.pid, signal.SIGSTOP)
        with pytest.raises(TransferError):
            await transfer.read(name, reads, timeout_s=0.1)
        peer.kill()
        await asyncio.wait_for(transfer.settled(reads), 20)

    asyncio.run(scenario())
    assert not transfer.pending_pages()


def test_a_read_cancelled_at_once_leaves_nothing_pending(peer: Peer, transfer: Transfer) -> None:
    async def scenario() -> None:
        name = transfer.add_peer(peer.metadata)
        task = asyncio.create_task(transfer.read(name, [PageRead("tail", 0, 0)], timeout_s=10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(transfer.settled([PageRead("tail", 0, 0)]), 10)
        assert not transfer.pending_pages()

    asyncio.run(scenario())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_pages_arrive_byte_for_byte_and_fast(make_peer: MakePeer, caplog: pytest.LogCaptureFixture) -> None:
    pools = make_pools(PAGE_BYTES, "cuda")
    for pool in pools.values():
        pool.zero_()
    torch.cuda.synchronize()
    transfer = Transfer("decode", pools, format_id="format")

    async def scenario() -> float:
        name = transfer.add_peer(make_peer(device="cuda").metadata)
        reads = [PageRead("retrieval", page, 63 - page) for page in range(64)] + [PageRead("tail", 0, 3)]
        return min([(await transfer.read(name, reads, timeout_s=30)).seconds for _ in range(5)])

    seconds = asyncio.run(scenario())
    assert torch.equal(pools["retrieval"].cpu(), EXPECTED["retrieval"].flip(0))
    assert torch.equal(pools["tail"][3].cpu(), EXPECTED["tail"][0])
    assert not pools["streaming"].any()
    assert 65 * PAGE_BYTES / seconds > 5e9, "over CUDA IPC, not TCP"
    assert "TCP" not in caplog.text
    transfer.close()
