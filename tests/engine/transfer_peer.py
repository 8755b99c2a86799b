"""A worker process whose pools `test_transfer.py` reads. Arguments: socket path, name, device, bytes per page."""

import sys
from multiprocessing.connection import Client

import torch

from lserve.engine.transfer import Transfer

NUM_PAGES = {"retrieval": 64, "streaming": 16, "tail": 4}


def make_pools(page_bytes: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The bytes that every peer holds: the same for the reader, who checks them."""
    generator = torch.Generator().manual_seed(1)
    return {
        pool: torch.randint(0, 256, (num_pages, page_bytes), dtype=torch.uint8, generator=generator).to(device)
        for pool, num_pages in NUM_PAGES.items()
    }


if __name__ == "__main__":
    path, name, device, page_bytes = sys.argv[1:]
    transfer = Transfer(name, make_pools(int(page_bytes), device), format_id="format")
    with Client(path) as connection:
        connection.send(transfer.metadata())
        connection.recv()  # until the test says so, or is gone
    transfer.close()
