"""A prompt prefilled in one process and decoded in another on one device, its pages pulled by NIXL: bytes and times.

Weights are random, the same in both processes. Each chunk's pages are pulled while the next chunk is computed, as
prefill and decode workers do it, without Ray between them. Time to first token is from the request to the moment when
all pages are there; `exposed` is the part of it after the last chunk was announced.

    python benchmarks/bench_handoff.py --shape llama-3-8b --device cuda --weights w4a8 --tokens 32K --chunk 8K
    python benchmarks/bench_handoff.py          # a tiny shape on a CPU
"""

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import torch
from bench_engine import GREEDY, size
from common import environment
from random_engine import SHAPES, random_engine, random_model

from lserve.engine.engine import Engine
from lserve.engine.request import Request
from lserve.engine.results import ChunkReady, Reservation
from lserve.engine.transfer import PageRead, Transfer, TransferStats

Pages = dict[str, list[int]]


def make_worker(name: str, args: argparse.Namespace) -> tuple[Engine, Transfer]:
    torch.manual_seed(0)
    model = random_model(args.shape, args.device, args.weights)
    engine = random_engine(model, args.weights, args.kv_dtype, 2 * args.tokens + 1024, args.chunk)
    return engine, Transfer(name, engine.cache.pools, format_id=engine.page_format.format_id)


def digest(engine: Engine, pages: Pages) -> str:
    """SHA-256 of the pages' bytes, in order."""
    whole = hashlib.sha256()
    for pool, units in pages.items():
        if units:
            whole.update(engine.cache.export(pool, units).numpy())
    return whole.hexdigest()


def serve(path: str, args: argparse.Namespace) -> None:
    """The prefill process: a prompt in, its chunks out, then their digest; until its parent hangs up."""
    engine, transfer = make_worker("prefill", args)
    with Client(path) as connection:
        connection.send(transfer.metadata())
        while (request := connection.recv()) is not None:
            engine.add_request(request, prefill_only=True)
            chunks = []
            while engine.has_work:
                for chunk in engine.step().chunks:
                    connection.send(chunk)
                    chunks.append(chunk)
            connection.recv()
            connection.send(digest(engine, announced(chunks)))
            for chunk in chunks:
                engine.leases.release(chunk.lease_id, chunk.generation)
    transfer.close()


def announced(chunks: list[ChunkReady]) -> Pages:
    rows = [chunk.tail_row for chunk in chunks if chunk.tail_row is not None]
    return {
        "retrieval": [page for chunk in chunks for _, page in chunk.retrieval_pages],
        "streaming": [page for chunk in chunks for _, page in chunk.streaming_pages],
        "tail": rows,
    }


def reads_of(chunk: ChunkReady, own: Reservation) -> list[PageRead]:
    reads = [PageRead("retrieval", page, own.retrieval_pages[i]) for i, page in chunk.retrieval_pages]
    reads += [PageRead("streaming", page, own.streaming_pages[i]) for i, page in chunk.streaming_pages]
    return reads + ([] if chunk.tail_row is None else [PageRead("tail", chunk.tail_row, own.row)])


async def hand_over(
    engine: Engine, transfer: Transfer, peer: str, connection: Connection, request: Request
) -> dict[str, object]:
    """One request, from its prompt to its first own decode step."""
    start = time.perf_counter()
    engine.add_request(request, hold=True)
    (own,) = engine.step().admitted
    connection.send(request)
    pulls: list[asyncio.Task[TransferStats]] = []
    reads: list[PageRead] = []
    while True:
        chunk: ChunkReady = await asyncio.to_thread(connection.recv)
        last_announced = time.perf_counter()
        reads += reads_of(chunk, own)
        pulls.append(asyncio.ensure_future(transfer.read(peer, reads_of(chunk, own), 60)))
        if chunk.last:
            break
    stats = await asyncio.gather(*pulls)
    there = time.perf_counter()
    engine.begin_decode(request.request_id, chunk.first_tokens, 0)
    connection.send("digest")
    pages = {pool: [r.local_page for r in reads if r.pool == pool] for pool in ("retrieval", "streaming", "tail")}
    equal = digest(engine, pages) == connection.recv()
    assert len(engine.step().outputs) == 2  # the first token, and one decoded here
    engine.abort(request.request_id)
    num_bytes, seconds = sum(s.num_bytes for s in stats), sum(s.seconds for s in stats)
    return {
        "tokens": len(request.prompt_token_ids),
        "equal": equal,
        "bytes": num_bytes,
        "chunks": len(stats),
        "ttft_ms": (there - start) * 1e3,
        "transfer_ms": seconds * 1e3,
        "gb_per_s": num_bytes / seconds / 1e9,
        "exposed_ms": (there - last_announced) * 1e3,
        "exposed_share": (there - last_announced) / (there - start),
    }


async def run(args: argparse.Namespace) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "peer.sock")
        with Listener(path) as listener:
            process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--serve", path])
            engine, transfer = make_worker("decode", args)
            connection = listener.accept()
        peer = transfer.add_peer(connection.recv())
        results = []
        for number in range(1 + args.repeats):
            prompt = torch.randint(0, engine.model_config.vocab_size, (args.tokens - 1,)).tolist()
            request = Request(f"handoff-{number}", tuple(prompt), GREEDY)
            results.append(await hand_over(engine, transfer, peer, connection, request))
            print(results[-1], flush=True)
        connection.send(None)
        process.wait(30)
        transfer.close()
        return results[1:]  # the first one compiles and connects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="native")
    parser.add_argument("--kv-dtype", default="int4")
    parser.add_argument("--tokens", type=size, default=2048)
    parser.add_argument("--chunk", type=size, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args)
        return
    results = asyncio.run(run(args))
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    settings = {"shape": args.shape, "weights": args.weights, "kv_dtype": args.kv_dtype, "chunk": args.chunk}
    line = json.dumps(
        {"benchmark": "handoff", **environment(args.commit), "device": device, **settings, "results": results}
    )
    print(line)
    if args.output is not None:
        args.output.write_text(line + "\n")
    if not all(result["equal"] for result in results):
        raise SystemExit("pages differ")


if __name__ == "__main__":
    main()
