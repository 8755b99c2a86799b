"""What requests would otherwise wait for: kernels are compiled, and decode steps captured, for every size of batch."""

from .config import PAGE_SIZE
from .engine import Engine
from .errors import PromptTooLongError
from .request import Request, SamplingParams
from .sampling_limits import MAX_CHOICES

TENANT = "warm-up"
"""Pages are kept under a tenant of their own, so that no request ever takes them up."""


def warm_up(engine: Engine, decodes: bool = True) -> None:
    """Runs short requests on an idle engine: the first has a whole chunk and an incomplete one after it.

    decodes: whether the worker decodes; then a request of 1, 2, 4, ... choices follows, up to a whole batch.
    """
    steps = engine.config.sparsity.reselect_interval + 2
    room = min(engine.max_model_len - steps, (engine.retrieval_pool.num_pages - 2) * PAGE_SIZE)
    _run(engine, 1, max(min(engine.config.scheduler.chunk_size + 100, room), 1), steps, top_p=0.9)
    largest = min(engine.config.scheduler.max_batch_size, engine.row_pool.num_pages, MAX_CHOICES)
    for size in (2**i for i in range(largest.bit_length() + 1) if decodes):
        try:
            _run(engine, min(size, largest), 1, steps, top_p=1.0)
        except PromptTooLongError:
            return  # the pool holds no larger batch
        if size >= largest:
            return


def _run(engine: Engine, choices: int, length: int, steps: int, top_p: float) -> None:
    sampling = SamplingParams(n=choices, top_p=top_p, max_tokens=steps, ignore_eos=True)
    engine.add_request(Request("warm-up", (0,) * length, sampling, tenant=TENANT))
    while engine.has_work:
        engine.step()
