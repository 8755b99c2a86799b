"""How fast pages move: NIXL between two processes of this machine, and the Redis page store (embedded Valkey).

Each number is the median of `--repeats` runs. GB/s counts page bytes over the time that a worker waits: for NIXL one
`Transfer.read`, for the store `get_pages`, and `put_pages` until everything is written.

    python benchmarks/bench_transfer.py [--page-bytes 1200000] [--pages 1,8,64,256] [--device cpu|cuda] [--only nixl]
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path

import redis
import torch

from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.engine.prefix_store import PageKey, PrefixStore
from lserve.engine.transfer import PageRead, Transfer


@dataclass(frozen=True)
class Row:
    """One measurement: what, how many pages, milliseconds, GB/s."""

    path: str
    pages: int
    ms: float
    gb_per_s: float


def row(path: str, pages: int, page_bytes: int, seconds: list[float]) -> Row:
    median = statistics.median(seconds)
    return Row(path, pages, median * 1e3, pages * page_bytes / median / 1e9)


def make_pools(num_pages: int, page_bytes: int, device: str, fill: int) -> dict[str, torch.Tensor]:
    return {"retrieval": torch.full((num_pages, page_bytes), fill, dtype=torch.uint8, device=device)}


def serve(path: str, num_pages: int, page_bytes: int, device: str) -> None:
    """The peer: holds pages until its parent hangs up."""
    transfer = Transfer("peer", make_pools(num_pages, page_bytes, device, 7), format_id="bench")
    with Client(path) as connection:
        connection.send(transfer.metadata())
        connection.recv()
    transfer.close()


async def bench_nixl(args: argparse.Namespace) -> list[Row]:
    num_pages = max(args.pages)
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "peer.sock")
        with Listener(path) as listener:
            options = ["--page-bytes", str(args.page_bytes), "--pages", str(num_pages), "--device", args.device]
            peer = subprocess.Popen([sys.executable, __file__, "--serve", path, *options])
            connection = listener.accept()
        metadata = connection.recv()
        pools = make_pools(num_pages, args.page_bytes, args.device, 0)
        transfer = Transfer("bench", pools, format_id="bench")
        name = transfer.add_peer(metadata)
        first = await transfer.read(name, [PageRead("retrieval", 0, 0)], 30)
        rows = [Row("NIXL, first read of a peer", 1, first.seconds * 1e3, first.num_bytes / first.seconds / 1e9)]
        for count in args.pages:
            order = torch.randperm(num_pages)[:count].tolist()  # scattered, as in a real pool
            reads = [PageRead("retrieval", page, num_pages - 1 - page) for page in order]
            seconds = [(await transfer.read(name, reads, 60)).seconds for _ in range(args.repeats)]
            rows.append(row(f"NIXL READ, {args.device}", count, args.page_bytes, seconds))
        assert bool((pools["retrieval"][[num_pages - 1 - page for page in order]] == 7).all())
        connection.send("close")
        peer.wait(30)
        transfer.close()
        return rows


async def bench_store(args: argparse.Namespace) -> list[Row]:
    payloads = [os.urandom(args.page_bytes) for _ in range(8)]
    rows = []
    with EmbeddedValkey(max_memory_bytes=2 * max(args.pages) * args.page_bytes + (256 << 20)) as valkey:
        client = redis.Redis.from_url(valkey.url)
        store = PrefixStore(valkey.url, b"secret", "bench", timeout_s=5.0, max_pending_bytes=8 << 30)
        for count in args.pages:
            puts, gets = [], []
            for _ in range(args.repeats):
                client.flushall()
                keys = [PageKey(os.urandom(32), "retrieval") for _ in range(count)]
                start = time.perf_counter()
                store.put_pages([(key, payloads[i % 8]) for i, key in enumerate(keys)])
                assert store.flush(60)
                puts.append(time.perf_counter() - start)
                start = time.perf_counter()
                pages = await store.get_pages(keys)
                gets.append(time.perf_counter() - start)
                assert len(pages) == count and pages[-1] == payloads[(count - 1) % 8]
            rows.append(row("Redis put, sealed", count, args.page_bytes, puts))
            rows.append(row("Redis get, verified", count, args.page_bytes, gets))
        store.close()
        client.close()
    return rows


def hardware(device: str) -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}{gpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-bytes", type=int, default=1_200_000, help="an 8B model at 4 bits: 1.2 MB")
    parser.add_argument("--pages", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 256])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["nixl", "redis"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.pages[0], args.page_bytes, args.device)
        return
    rows: list[Row] = []
    if args.only != "redis":
        rows += asyncio.run(bench_nixl(args))
    if args.only != "nixl":
        rows += asyncio.run(bench_store(args))
    print(f"{'path':<28}{'pages':>7}{'ms':>10}{'GB/s':>9}")
    for entry in rows:
        print(f"{entry.path:<28}{entry.pages:>7}{entry.ms:>10.2f}{entry.gb_per_s:>9.2f}")
    result = {"benchmark": "transfer", "hardware": hardware(args.device), "page_bytes": args.page_bytes}
    print(json.dumps(result | {"rows": [asdict(entry) for entry in rows]}))


if __name__ == "__main__":
    main()
