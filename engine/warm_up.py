"""What the first request would otherwise wait for: compiled kernels and captured decode steps."""

from .config import PAGE_SIZE
from .engine import Engine
from .request import Request, SamplingParams

TENANT = "warm-up"
"""Pages are kept under a tenant of their own, so that no request ever takes them up."""


def warm_up(engine: Engine) -> None:
    """Runs one short request on an idle engine: a whole chunk, an incomplete one after it, and a few decode steps."""
    new_tokens = engine.config.sparsity.reselect_interval + 2
    wanted = engine.config.scheduler.chunk_size + 100
    length = max(min(wanted, engine.max_model_len - new_tokens, (engine.retrieval_pool.num_pages - 2) * PAGE_SIZE), 1)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=new_tokens, ignore_eos=True)
    engine.add_request(Request("warm-up", (0,) * length, sampling, tenant=TENANT))
    while engine.has_work:
        engine.step()
