"""Whether an engine can serve a request at all, decided before anything is queued."""

from .config import PAGE_SIZE, EngineConfig
from .errors import InvalidRequestError, PromptTooLongError
from .request import Request
from .sampling_limits import validate


def check_request(request: Request, config: EngineConfig, vocab_size: int, max_model_len: int, num_pages: int) -> None:
    """Raises InvalidRequestError or PromptTooLongError, naming the value.

    max_model_len: tokens of prompt and answer together. num_pages: the retrieval pool's.
    """
    params, prompt = request.sampling, len(request.prompt_token_ids)
    validate(params, vocab_size)
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    bad = next((t for t in request.input_token_ids if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise InvalidRequestError(f"token id {bad} is outside the vocabulary of {vocab_size}", param="prompt")
    if request.emitted and params.n > 1:
        raise InvalidRequestError(f"n must be 1 where tokens were emitted already, got {params.n}", param="n")
    if len(request.emitted) > params.max_tokens:
        raise InvalidRequestError(
            f"{len(request.emitted)} emitted tokens are more than max_tokens {params.max_tokens}", param="emitted"
        )
    budget, sparsity = request.attention.token_budget, config.sparsity
    if budget is not None and not sparsity.min_token_budget <= budget <= sparsity.max_token_budget:
        limits = f"{sparsity.min_token_budget} to {sparsity.max_token_budget}"
        raise InvalidRequestError(
            f"lserve.token_budget must be from {limits}, got {budget}", param="lserve.token_budget"
        )
    wanted = prompt + params.max_tokens
    if wanted > max_model_len:
        raise PromptTooLongError(
            f"{prompt} prompt tokens and max_tokens {params.max_tokens} are over the limit of {max_model_len} tokens",
            param="max_tokens",
        )
    pages = wanted // PAGE_SIZE + 1 + (params.n - 1) * (params.max_tokens // PAGE_SIZE + 2)
    if pages > num_pages:
        raise PromptTooLongError(f"the request needs {pages} pages, the pool has {num_pages}")
    most = config.scheduler.max_batch_size
    if params.n > most:
        raise InvalidRequestError(f"n must be at most {most}, got {params.n}", param="n")
