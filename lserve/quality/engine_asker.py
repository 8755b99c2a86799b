"""Asks an engine in this process."""

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

from lserve.engine.config import SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.errors import LServeError
from lserve.engine.request import AttentionOptions, Request, SamplingParams
from lserve.engine.residency import last_resume_point
from lserve.engine.tokenizer import Tokenizer

from .asker import Reply
from .cases import Case, Document

_numbers = itertools.count()


@functools.lru_cache(maxsize=128)
def _tokens(tokenizer: Tokenizer, message: str) -> tuple[int, ...]:
    """Long documents take longer to tokenize than to answer, and every arm asks the same."""
    if tokenizer.has_chat_template:
        return tuple(tokenizer.encode_chat([("user", message)]))
    return tuple(tokenizer.encode(message + "\n"))


class EngineAsker:
    """Asks one engine, as one kind of request.

    Several askers may share an engine one after the other: then they share the pages of its prefix cache too. sparsity:
    how decode selects pages, where that differs from the engine's own (rule, candidate_factor, reselect_interval and
    token_budget may differ over the same pages; the rest of it is part of the pages and of the prefill).
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        attention: AttentionOptions | None = None,
        sparsity: SparsityConfig | None = None,
    ) -> None:
        self.name, self.engine = name, engine
        self.attention = attention or AttentionOptions()
        own = engine.config.sparsity
        self._sparsity = sparsity and replace(
            own,
            rule=sparsity.rule,
            candidate_factor=sparsity.candidate_factor,
            reselect_interval=sparsity.reselect_interval,
            token_budget=sparsity.token_budget,
            max_token_budget=sparsity.max_token_budget,
        )

    def count(self, text: str) -> int:
        """The text's length in tokens."""
        return len(self.engine.tokenizer.encode(text, add_special_tokens=False))

    def cut(self, text: str, num_tokens: int) -> str:
        """The text's first so many tokens, as text."""
        tokenizer = self.engine.tokenizer
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:num_tokens])

    def prime(self, document: Document) -> Reply:
        """Reads what all questions about the document share, as a prompt of its own."""
        return self.answer([self._shared(document)], [1])[0]

    def overhang(self, text: str) -> int:
        """Tokens at the end of a document that each of its questions would compute anew."""
        length = len(self._shared(Document("", 0, text, ())))
        return length - last_resume_point(length)

    def _shared(self, document: Document) -> list[int]:
        """The tokens that the prompts of all questions about the document begin with."""
        first, second = (self.tokens(document.prompt(question)) for question in ("A", "1"))
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
        return first[:shared]

    def ask(self, document: Document, cases: Sequence[Case]) -> list[Reply]:
        """Asks the questions at once, as many as the engine batches."""
        prompts = [self.tokens(document.prompt(case.question)) for case in cases]
        return self.answer(prompts, [case.max_tokens for case in cases])

    def tokens(self, message: str) -> list[int]:
        """A user's message in the model's chat template; as plain text where it has none."""
        return list(_tokens(self.engine.tokenizer, message))

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[Reply]:
        """Greedy replies to prompts of token ids. What an engine refuses becomes a reply with its error."""
        self.select()
        started = time.perf_counter()
        replies: dict[str, Reply] = {}
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            request_id = f"quality-{next(_numbers)}"
            replies[request_id] = Reply("", len(prompt))
            params = SamplingParams(temperature=0, max_tokens=limit)
            try:
                self.engine.add_request(Request(request_id, tuple(prompt), params, self.attention))
            except LServeError as refused:
                replies[request_id] = Reply("", len(prompt), error=refused.message)
        try:
            while self.engine.has_work:
                result = self.engine.step()
                now = time.perf_counter() - started
                for output in result.outputs:
                    reply = replies[output.request_id]
                    replies[output.request_id] = replace(
                        reply,
                        text=reply.text + output.text,
                        cached_tokens=output.num_cached_tokens,
                        times_s=(*reply.times_s, now),
                        num_tokens=reply.num_tokens + len(output.token_ids),
                    )
                for request_id, error in result.errors:
                    replies[request_id] = replace(replies[request_id], error=error.message)
        finally:
            for request_id in replies:
                self.engine.abort(request_id)
        return list(replies.values())

    def select(self) -> None:
        """Makes the idle engine select pages as this asker's sparsity says."""
        if self._sparsity is not None:
            self.engine.runner.sparsity = self._sparsity

    def close(self) -> None:
        """Forgets the engine's prefix pages."""
        if self.engine.index is not None:
            self.engine.index.clear()
