"""One worker's engine: `add_request`, `step`, `abort`. A step reads: schedule, run, postprocess.

An engine is used from one thread. It serves three kinds of worker: one that does everything (`add_request(request)`),
one that prefills and hands over (`prefill_only=True`: chunks are announced under leases), and one that decodes what
was prefilled elsewhere (`hold=True`: pages are reserved, then filled from outside, then `begin_decode`).
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from .attention import budget_pages
from .chain import chain_hashes, chain_root
from .config import BLOCK_SIZE, PAGE_SIZE, EngineConfig
from .density import AttentionDensity
from .detokenizer import Detokenizer
from .errors import DeadlineExceededError, InvalidRequestError
from .kv_cache import KVCache
from .leases import LeaseTable
from .loading import LoadedModel, load
from .page_pool import PagePool
from .pool_sizes import PoolSizes, pool_sizes
from .prefix_index import PrefixIndex
from .publisher import PagePublisher
from .request import Output, PageChoice, Request, SampledToken, SamplingParams
from .request_check import check_request
from .residency import Residency
from .results import ChunkReady, EngineLoad, Reservation, StepResult
from .runner import Runner
from .sampling import SamplingRow, TokenHistory, sample
from .scheduler import Scheduler
from .sequence import PrefillChunk, Sequence, State
from .swap import HostSwap
from .trace import TraceRecorder


class Engine:
    """The engine of one worker, over one model on one device."""

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        secret: bytes = b"",
        sizes: PoolSizes | None = None,
        lease_ttl_s: float = 30.0,
    ) -> None:
        sparsity = loaded.sparsity
        config = replace(config, sparsity=sparsity)
        self.config, self.model_config, self.tokenizer = config, loaded.model.config, loaded.tokenizer
        self.page_format = loaded.page_format
        self._secret = secret
        limit = config.scheduler.max_model_len or self.model_config.max_position
        self.max_model_len = min(limit, self.model_config.max_position)
        sizes = sizes or pool_sizes(config, self.page_format, self.max_model_len)
        self.cache = KVCache(
            self.page_format,
            self.model_config,
            sparsity,
            sizes.retrieval_pages,
            sizes.streaming_pages,
            sizes.rows + 1,  # the last one is the runner's
            config.device,
            loaded.model.dtype,
        )
        has_retrieval = self.page_format.num_retrieval_slots > 0
        has_streaming = self.page_format.num_streaming_slots > 0
        self.retrieval_pool = PagePool(sizes.retrieval_pages, "retrieval")
        self.streaming_pool = PagePool(sizes.streaming_pages, "streaming")
        self.row_pool = PagePool(sizes.rows, "tail row")
        self.residency = Residency(sparsity.sink_size, sparsity.local_window)
        self.index: PrefixIndex | None = None
        if config.cache.prefix_cache:
            self.index = PrefixIndex(
                self.retrieval_pool if has_retrieval else None,
                self.streaming_pool if has_streaming else None,
                self.residency,
            )
        pools = (self.retrieval_pool, self.streaming_pool, self.row_pool)
        self._publisher = PagePublisher(self.page_format, self.residency, *pools, self.index, lease_ttl_s)
        self._swap = HostSwap(self.cache, config.cache.host_swap_bytes)
        self.scheduler = Scheduler(
            config.scheduler,
            sparsity,
            self.residency,
            self.retrieval_pool,
            self.streaming_pool,
            self.row_pool,
            self.index,
            self._swap.save,
            has_retrieval,
            has_streaming,
        )
        self.runner = Runner(loaded.model, self.cache, sparsity, self.max_model_len)
        self.trace = TraceRecorder(self.cache)
        self._density = AttentionDensity(
            self.page_format.num_retrieval_slots,
            self.page_format.num_streaming_slots,
            sparsity.sink_size,
            sparsity.local_window,
        )
        self._live: dict[str, list[Sequence]] = {}
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._histories: dict[Sequence, TokenHistory] = {}
        self._pending: list[Output] = []

    @classmethod
    def from_pretrained(cls, model: str, **settings: object) -> "Engine":
        """An engine over a local directory, a Hugging Face id or a GGUF file; settings are EngineConfig's fields."""
        config = EngineConfig(model=model, **settings)  # type: ignore[arg-type]
        return cls(config, load(config))

    @property
    def leases(self) -> LeaseTable:
        """The leases on announced chunks."""
        return self._publisher.leases

    @property
    def has_work(self) -> bool:
        """Whether calling `step` would do anything."""
        return self.scheduler.has_work or bool(self._pending)

    def add_request(
        self, request: Request, *, prefill_only: bool = False, hold: bool = False, have_tokens: int = 0
    ) -> None:
        """Queues a request. Raises InvalidRequestError, PromptTooLongError or CapacityError, and then keeps nothing.

        prefill_only: hand over after prefill, announcing chunks from have_tokens on. hold: stop once pages are
        reserved.
        """
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        vocab_size, pages = self.model_config.vocab_size, self.retrieval_pool.num_pages
        check_request(request, self.config, vocab_size, self.max_model_len, pages)
        tokens = request.input_token_ids
        root = chain_root(self._secret, request.tenant, self.page_format.format_id)
        lead = Sequence(request, request.choice, list(tokens), len(tokens), num_forks=request.sampling.n - 1)
        if self.index is not None:
            lead.chain = chain_hashes(root, tokens)
        lead.prefill_only, lead.hold, lead.num_announced = prefill_only, hold, have_tokens
        if request.emitted and not prefill_only:
            detokenizer = self._detokenizer(lead)
            if detokenizer.finish_reason is not None:
                self._pending.append(
                    Output(request.request_id, request.choice, finish_reason=detokenizer.finish_reason)
                )
                return
        self.scheduler.add(lead)
        self._live[request.request_id] = [lead]

    def abort(self, request_id: str) -> bool:
        """Drops a request and all it holds (its leases live on). False when it is not here (any more)."""
        sequences = self._live.pop(request_id, None)
        for sequence in sequences or ():
            self._finish(sequence)
        return sequences is not None

    def reserve_window(self, request_id: str, num_tokens: int) -> dict[int, int]:
        """Streaming pages (index to id) that a held request needs to go on from num_tokens, reserved now."""
        sequence = self._lead(request_id)
        wanted = self.residency.streaming_pages_to_resume(num_tokens)
        self.scheduler.reserve_streaming(sequence, wanted)
        return {i: sequence.streaming_pages[i] for i in wanted if i in sequence.streaming_pages}

    def begin_prefill(self, request_id: str, num_computed: int) -> ChunkReady | None:
        """A held request's pages hold its first num_computed tokens (a multiple of 128): compute the rest here.

        Returns the announcement of what is there already, when it is to be handed over and not known there.
        """
        sequence = self._lead(request_id)
        assert num_computed % BLOCK_SIZE == 0 and num_computed < sequence.num_prefill, num_computed
        sequence.num_cached = num_computed
        self.scheduler.start_prefill(sequence, num_computed)
        if sequence.prefill_only and num_computed > sequence.num_announced:
            self.runner.wait()  # pages from outside may still be on their way to the device
            return self._publisher.announce(sequence, num_computed)
        return None

    def begin_decode(self, request_id: str, first_tokens: SequenceOf[SampledToken], num_cached_tokens: int) -> None:
        """A held request's pages and tail row hold its whole input; first_tokens are its choices' first tokens."""
        sequence = self._lead(request_id)
        sequence.num_computed = sequence.num_prefill
        sequence.num_cached = num_cached_tokens
        self._publisher.keep(sequence, sequence.num_prefill)
        self._start_choices(sequence, first_tokens)

    def take_outputs(self) -> list[Output]:
        """Output that is there already, such as first tokens that came with `begin_decode`: it need not wait for a
        step.
        """
        outputs, self._pending = self._pending, []
        return outputs

    def step(self) -> StepResult:
        """Schedules, runs and postprocesses one step."""
        result, started = StepResult(outputs=self.take_outputs()), time.monotonic()
        self._expire(result)
        plan = self.scheduler.schedule()
        for sequence in plan.swapped_in:
            self._swap.restore(sequence)
        result.admitted += [self._reservation(s) for s in plan.admitted if s.hold or s.prefill_only]
        result.computed = bool(plan.decode or plan.prefill)
        logits: list[torch.Tensor] = []
        rows: list[SamplingRow] = []
        if plan.decode:
            budgets = [(s, budget_pages(s, self.runner.sparsity)) for s in plan.decode]
            result.density["decode"] = self._density.decode(budgets)
            traced = self.trace.begin(plan.decode, self.runner.sparsity)
            logits.append(self.runner.decode(plan.decode, self.trace.see if traced else None))
            rows += [self._sampling_row(s, s.choice) for s in plan.decode]
        if plan.prefill:
            result.prefill_tokens = sum(chunk.length for chunk in plan.prefill)
            result.density["prefill"] = self._density.prefill(plan.prefill)
            logits.append(self.runner.prefill(plan.prefill))
            for sequence in (chunk.sequence for chunk in plan.prefill if chunk.is_last):
                rows += [self._sampling_row(sequence, sequence.choice + i) for i in range(sequence.num_forks + 1)]
        if result.computed:
            drawn = self._draw(logits, rows)
            self._after_decode(plan.decode, drawn[: len(plan.decode)], self.trace.finish())
            self._after_prefill(plan.prefill, drawn[len(plan.decode) :], result)
        result.outputs += self.take_outputs()
        result.seconds = time.monotonic() - started
        return result

    def load(self) -> EngineLoad:
        """How full the engine is now."""
        queues = self.scheduler
        prompts = queues.prompts_to_compute
        return EngineLoad(
            running=len(queues.running) + len(queues.prefilling) + len(queues.held),
            waiting=len(queues.waiting) + len(queues.swapped),
            used_pages=self.retrieval_pool.num_held,
            total_pages=self.retrieval_pool.num_pages,
            cached_pages=self.retrieval_pool.num_idle,
            used_streaming_pages=self.streaming_pool.num_held,
            total_streaming_pages=self.streaming_pool.num_pages,
            cached_streaming_pages=self.streaming_pool.num_idle,
            used_rows=self.row_pool.num_used,
            total_rows=self.row_pool.num_pages,
            leases=self.leases.num_held,
            waiting_pages=queues.waiting_pages,
            queued_prompts=max(len(prompts) - 1, 0),
            queued_tokens=sum(prompts[1:]),
            head_tokens=sum(prompts[:1]),
            preemptions=queues.num_preemptions,
        )

    def generate(self, prompts: Iterable[str | SequenceOf[int]], params: SamplingParams | None = None) -> list[str]:
        """Answers prompts (text or token ids) offline, as many at once as fit; returns each one's first choice."""
        encoded = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        params = params or SamplingParams()
        left = deque(Request(f"generate-{number}", tuple(ids), params) for number, ids in enumerate(encoded))
        texts = {request.request_id: "" for request in left}
        try:
            while left or self.has_work:
                while left and len(self.scheduler.waiting) < self.config.scheduler.max_waiting:
                    self.add_request(left.popleft())
                for output in self.step().outputs:
                    if output.choice == 0:
                        texts[output.request_id] += output.text
        finally:
            for request_id in texts:
                self.abort(request_id)
        return list(texts.values())

    def _lead(self, request_id: str) -> Sequence:
        return self._live[request_id][0]

    def _expire(self, result: StepResult) -> None:
        self.leases.expire()
        now = time.time()
        late = [r for r, sequences in self._live.items() if sequences and sequences[0].request.deadline < now]
        for request_id in late:
            if self._live[request_id][0].state is State.HELD:
                continue
            self.abort(request_id)
            result.errors.append((request_id, DeadlineExceededError(f"request {request_id} passed its deadline")))

    def _reservation(self, sequence: Sequence) -> Reservation:
        assert sequence.row is not None
        return Reservation(
            sequence.request_id,
            tuple(sequence.retrieval_pages),
            dict(sequence.streaming_pages),
            sequence.row,
            sequence.num_cached,
            tuple(sequence.chain),
            time.monotonic(),
        )

    def _draw(self, logits: SequenceOf[torch.Tensor], rows: SequenceOf[SamplingRow]) -> list[SampledToken]:
        """Draws a step's tokens, and waits until the device has done all of it: other workers may read the pages that
        it announces, and pages that it gives back may be written from outside.
        """
        if rows:
            return sample(logits[0] if len(logits) == 1 else torch.cat(tuple(logits)), rows)
        self.runner.wait()
        return []

    def _after_decode(
        self, sequences: list[Sequence], drawn: list[SampledToken], choices: Mapping[Sequence, PageChoice]
    ) -> None:
        for sequence in sequences:
            sequence.num_computed, sequence.fresh = sequence.num_tokens, False
        for sequence, token in zip(sequences, drawn, strict=True):
            self._emit(sequence, token, choices.get(sequence))
            # the window's first page moves on where the next position ends its own page
            if sequence.state is State.RUNNING and sequence.num_computed % PAGE_SIZE == PAGE_SIZE - 1:
                self.scheduler.drop_stale_streaming(sequence)

    def _after_prefill(self, chunks: list[PrefillChunk], drawn: list[SampledToken], result: StepResult) -> None:
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
            self._publisher.keep(chunk.sequence, chunk.end)
            if chunk.sequence.chain:
                result.written.append(self._publisher.written(chunk))
        for chunk in chunks:
            sequence = chunk.sequence
            first: list[SampledToken] = []
            if chunk.is_last:
                first, drawn = drawn[: sequence.num_forks + 1], drawn[sequence.num_forks + 1 :]
            if sequence.prefill_only:
                result.chunks.append(self._publisher.announce(sequence, chunk.end, first))
                if chunk.is_last:
                    self.abort(sequence.request_id)
            elif chunk.is_last:
                self._start_choices(sequence, first)
            if sequence.state is State.PREFILL:
                self.scheduler.drop_stale_streaming(sequence)

    def _start_choices(self, lead: Sequence, first_tokens: SequenceOf[SampledToken]) -> None:
        forks = self.scheduler.fork(lead)
        self._live[lead.request_id] += forks
        for sequence in forks:
            assert lead.row is not None and sequence.row is not None
            self.cache.copy_row(lead.row, sequence.row)
        for sequence, token in zip([lead, *forks], first_tokens, strict=True):
            self.scheduler.start_decode(sequence)
            self._detokenizers[sequence] = self._detokenizer(sequence)
            self._histories.setdefault(sequence, TokenHistory())
            self._emit(sequence, token)

    def _detokenizer(self, sequence: Sequence) -> Detokenizer:
        """A stop finder for the choice, primed with what another worker already sent (or, recomputed, with its own
        output).
        """
        existing = self._detokenizers.get(sequence)
        if existing is not None:
            return existing
        request = sequence.request
        return Detokenizer(
            self.tokenizer, request.sampling, self.model_config.eos_token_ids, request.prompt_token_ids, request.emitted
        )

    def _emit(self, sequence: Sequence, token: SampledToken, choice: PageChoice | None = None) -> None:
        """Appends a drawn token, reports it, and ends the choice when it is done."""
        sequence.token_ids.append(token.token_id)
        piece = self._detokenizers[sequence].push(token)
        self._pending.append(
            Output(
                request_id=sequence.request_id,
                choice=sequence.choice,
                token_ids=(token.token_id,),
                text=piece.text,
                logprobs=() if token.logprob is None else (token.logprob,),
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                num_cached_tokens=min(sequence.num_cached, len(sequence.request.prompt_token_ids)),
                trace=() if choice is None else (choice,),
            )
        )
        if piece.finish_reason is not None:
            self._finish(sequence)
            siblings = self._live.get(sequence.request_id, [])
            if all(s.state is State.FINISHED for s in siblings):
                self._live.pop(sequence.request_id, None)

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self._swap.discard(sequence)
        self._detokenizers.pop(sequence, None)
        self._histories.pop(sequence, None)

    def _sampling_row(self, sequence: Sequence, choice: int) -> SamplingRow:
        """What the sampler needs to draw the sequence's next token, as if it were the given choice."""
        prompt = len(sequence.request.prompt_token_ids)
        history = self._histories.get(sequence)
        return SamplingRow(sequence.request.sampling, choice, sequence.num_tokens, sequence.token_ids, prompt, history)
