"""How well an engine predicts text that is already there: bits per character, and its most likely next tokens.

Two ways of reading are scored, since they attend differently: as a prompt (prefill: retrieval heads read everything,
streaming heads sink and window), and token by token (decode: retrieval heads read the selected pages).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lserve.engine.attention import PrefillStep
from lserve.engine.config import BLOCK_SIZE, PAGE_SIZE
from lserve.engine.engine import Engine
from lserve.engine.request import AttentionOptions, Request
from lserve.engine.sequence import PrefillChunk
from lserve.engine.sequence import Sequence as EngineSequence


@dataclass(frozen=True, slots=True)
class TextScore:
    """What reading one passage gave. bits are summed over the scored tokens, which have so many characters.

    top_tokens: the most likely token at every position that decode scored.
    """

    prompt_bits: float
    prompt_characters: int
    decode_bits: float
    decode_characters: int
    top_tokens: tuple[int, ...]


@torch.inference_mode()
def read_text(
    engine: Engine,
    tokens: Sequence[int],
    scored_from: int,
    num_decoded: int = 128,
    num_readers: int = 8,
    attention: AttentionOptions | None = None,
) -> TextScore:
    """Scores tokens[scored_from:] as a prompt, and up to num_readers stretches of num_decoded of them by decoding.

    The engine must be idle. The stretches begin at page boundaries and are decoded as one batch, each over the pages
    that the prompt left before it.
    """
    request = Request("quality-text", tuple(tokens), attention=attention or AttentionOptions())
    starts = _starts(len(tokens), scored_from, num_decoded, min(num_readers, engine.config.scheduler.max_batch_size))
    lead = _Reader(engine, request, [])
    readers: list[_Reader] = []
    try:
        prompt_bits = 0.0
        for start in range(0, len(tokens), engine.config.scheduler.chunk_size):
            end = min(start + engine.config.scheduler.chunk_size, len(tokens))
            for inner in (*(s for s in starts if start < s <= end), end):
                if inner > lead.sequence.num_computed:
                    prompt_bits += lead.prefill(inner, scored_from)
                if inner in starts and len(readers) < len(starts):
                    readers.append(lead.fork())
        decode_bits, top = _decode(engine, readers, num_decoded)
    finally:
        for reader in (lead, *readers):
            reader.close()
    decode, spans = engine.tokenizer.decode, [tokens[s + 1 : s + 1 + num_decoded] for s in starts]
    characters = len(decode(tokens[scored_from:])), sum(len(decode(span)) for span in spans)
    return TextScore(prompt_bits, characters[0], decode_bits, characters[1], top)


class _Reader:
    """A sequence that reads given tokens, outside the scheduler's queues."""

    def __init__(self, engine: Engine, request: Request, token_ids: list[int]) -> None:
        self.engine, self.sequence = engine, EngineSequence(request, 0, token_ids, len(request.prompt_token_ids))
        self.sequence.row = engine.row_pool.allocate(1)[0]

    def prefill(self, end: int, scored_from: int) -> float:
        """Reads the prompt up to `end`; the bits of the tokens from scored_from on that this predicted."""
        engine, sequence, tokens = self.engine, self.sequence, self.sequence.request.prompt_token_ids
        start = sequence.num_computed
        sequence.token_ids = list(tokens[:end])
        self._reserve(start, end)
        step = PrefillStep(engine.cache, engine.runner.sparsity, [PrefillChunk(sequence, start, end - start)])
        device = engine.cache.device
        ids, positions = torch.tensor(tokens[start:end], device=device), torch.arange(start, end, device=device)
        hidden = engine.runner.model.forward(ids, positions, step)
        sequence.num_computed = end
        engine.scheduler.drop_stale_streaming(sequence)
        first, last = max(scored_from - 1, start), min(end, len(tokens) - 1)
        if first >= last:
            return 0.0
        logits = engine.runner.model.logits(hidden[first - start : last - start])
        return _bits(logits, tokens[first + 1 : last + 1])

    def fork(self) -> "_Reader":
        """A reader that goes on from here by decoding. Only between pages."""
        engine, lead = self.engine, self.sequence
        assert lead.num_computed % PAGE_SIZE == 0
        reader = _Reader(engine, lead.request, list(lead.token_ids))
        sequence = reader.sequence
        sequence.num_computed = sequence.num_prefill = lead.num_computed
        sequence.retrieval_pages = lead.retrieval_pages[: lead.num_computed // PAGE_SIZE]
        engine.retrieval_pool.share(sequence.retrieval_pages)
        sequence.streaming_pages = {i: p for i, p in lead.streaming_pages.items() if i < lead.num_computed // PAGE_SIZE}
        engine.streaming_pool.share(sequence.streaming_pages.values())
        return reader

    def advance(self) -> None:
        """Takes the next token of the text, and the page that it needs."""
        sequence = self.sequence
        sequence.token_ids.append(sequence.request.prompt_token_ids[sequence.num_tokens])
        self._reserve(sequence.position, sequence.num_tokens)

    def close(self) -> None:
        """Gives everything back."""
        self.engine.scheduler.finish(self.sequence)

    def _reserve(self, start: int, end: int) -> None:
        engine, sequence = self.engine, self.sequence
        if engine.page_format.num_retrieval_slots:
            missing = (end - 1) // PAGE_SIZE + 1 - len(sequence.retrieval_pages)
            sequence.retrieval_pages += engine.retrieval_pool.allocate(max(missing, 0))
        engine.scheduler.reserve_streaming(sequence, list(range(start // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)))


def _decode(engine: Engine, readers: list[_Reader], num_decoded: int) -> tuple[float, tuple[int, ...]]:
    bits, top = 0.0, []
    for _ in range(num_decoded if readers else 0):
        for reader in readers:
            reader.advance()
        sequences = [reader.sequence for reader in readers]
        logits = engine.runner.decode(sequences)
        for sequence in sequences:
            sequence.num_computed, sequence.fresh = sequence.num_tokens, False
            engine.scheduler.drop_stale_streaming(sequence)
        bits += _bits(logits, [s.request.prompt_token_ids[s.num_tokens] for s in sequences])
        top += logits.argmax(-1).tolist()
    return bits, tuple(top)


def _bits(logits: torch.Tensor, targets: Sequence[int]) -> float:
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(1, torch.tensor(targets, device=logits.device)[:, None])
    return -chosen.double().sum().item() / math.log(2)


def _starts(length: int, scored_from: int, num_decoded: int, count: int) -> list[int]:
    """Block boundaries, evenly spaced, each with room for the tokens that are decoded and their targets."""
    first, last = -(-(scored_from - 1) // BLOCK_SIZE), (length - num_decoded - 1) // BLOCK_SIZE
    places = range(max(first, 1), last + 1)
    count = min(count, len(places))
    return sorted({places[len(places) * i // count] * BLOCK_SIZE for i in range(count)})
