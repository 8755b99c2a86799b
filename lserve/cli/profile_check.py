"""The last word on a head profile is the engine's: pages, chunks and greedy answers, with the profile and without."""

from dataclasses import dataclass, replace

import torch

from lserve.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from lserve.engine.engine import Engine
from lserve.engine.head_profile import HeadProfile
from lserve.engine.loading import LoadedModel
from lserve.engine.page_format import make_page_format
from lserve.engine.profile_gate import FactDocument
from lserve.engine.request import Request, SamplingParams
from lserve.quality.likelihood import read_text


@dataclass(frozen=True, slots=True)
class Checked:
    """bits: of the document's tokens past sink and window. right, asked: greedy answers about its facts."""

    bits: float
    right: int
    asked: int


def check(loaded: LoadedModel, config: EngineConfig, profile: HeadProfile, document: FactDocument) -> Checked:
    """Reads a document and answers its questions through an engine with float32 pages, of which all are read."""
    length = len(document.token_ids) + max(len(q.token_ids) + len(q.answer) for q in document.questions) + 1
    kv_dtype = "float32" if loaded.model.dtype == torch.float32 else "bf16"
    config = replace(
        config,
        cache=CacheConfig(kv_dtype=kv_dtype, retrieval_pool_bytes=0),  # type: ignore[arg-type]
        sparsity=replace(
            config.sparsity, token_budget=None, sink_size=profile.sink_size, local_window=profile.local_window
        ),
        scheduler=SchedulerConfig(max_batch_size=4, max_model_len=length),
    )
    page_format = make_page_format(
        loaded.model.config,
        config.cache,
        config.sparsity,
        profile.streaming,
        "check",
        "native",
        str(loaded.model.dtype),
    )
    pages = 2 * (length // 64 + 2)  # one prompt, its prefix kept, and the suffixes of a batch
    config = replace(config, cache=replace(config.cache, retrieval_pool_bytes=pages * page_format.retrieval_page_bytes))
    engine = Engine(config, replace(loaded, page_format=page_format, sparsity=config.sparsity))
    bits = read_text(engine, document.token_ids, profile.sink_size + profile.local_window, num_readers=0).prompt_bits
    right = sum(_answers(engine, document))
    return Checked(bits, right, len(document.questions))


def _answers(engine: Engine, document: FactDocument) -> list[bool]:
    """Whether greedy decoding writes each question's answer. The document is prefilled once."""
    answers = []
    for number, question in enumerate(document.questions):
        prompt = (*document.token_ids, *question.token_ids)
        params = SamplingParams(temperature=0, max_tokens=len(question.answer), ignore_eos=True)
        engine.add_request(Request(f"check-{number}", prompt, params))
        token_ids: list[int] = []
        while engine.has_work:
            for output in engine.step().outputs:
                token_ids += output.token_ids
        answers.append(tuple(token_ids) == question.answer)
    return answers
