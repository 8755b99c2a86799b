"""What page selection keeps: recall of planted facts and attention mass lost, by rule, at a small token budget.

Each document is real text with a number and a word to remember at one of five depths. A question about each is asked
once densely and once per rule and budget, over the same pages, and is right when the answer appears in the reply.
The mass lost is the share of each query head's true attention (over all pages, exact keys) that falls on pages
that were not chosen, averaged over the layers, heads and steps at which a choice was made.

    python benchmarks/bench_selection.py [--tokens 7500] [--budgets 768,1024] [--documents 2] [--write]
"""

import argparse
import random
from dataclasses import dataclass, field

import torch
from common import demo_engine, long_text, print_table, report, run_greedy, wilson, with_rule

import lserve.engine.attention as attention
from lserve.engine.config import CacheConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.kernels.cpu.codec import decode_keys, gather_slots
from lserve.kernels.cpu.decode_attention import tail_logits
from lserve.kernels.views import DecodeBatch, LayerView, Selection

EVERY_PAGE = 1 << 20
RULES = (
    ("LServe's rule (bound over 16 tokens, max, max)", 16, "min_max", 4),
    ("first stage alone (bound over 32 tokens)", 32, "min_max", 4),
    ("two stages", 32, "two_stage", 4),
    ("true page masses", 32, "two_stage", EVERY_PAGE),
)
DEPTHS = (0.9, 0.7, 0.5, 0.3, 0.1)  # the deepest first: what stands before the facts is then in the prefix cache
WORDS = (
    "marmalade",
    "telescope",
    "umbrella",
    "cinnamon",
    "lantern",
    "compass",
    "violin",
    "harvest",
    "sapphire",
    "meadow",
)
FACTS = """The phone number of Mr. Lighthouse is {number}. Remember it. {number} is the phone number of Mr. Lighthouse.

The secret word of the sailors is {word}. Remember it. {capital} is the secret word of the sailors."""
QUESTIONS = {
    "number": "What is the phone number of Mr. Lighthouse?",
    "word": "What is the secret word of the sailors?",
}


@dataclass
class MassLost:
    """Collects, while it is installed, the mass that each page choice leaves out."""

    values: list[float] = field(default_factory=list)
    original: object = None

    def __enter__(self) -> "MassLost":
        self.original = attention.page_select
        attention.page_select = self._measured  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        attention.page_select = self.original  # type: ignore[assignment]

    def _measured(
        self, query: torch.Tensor, layer: LayerView, batch: DecodeBatch, selection: Selection, *rule: object
    ) -> None:
        self.original(query, layer, batch, selection, *rule)  # type: ignore[operator]
        if bool(batch.reselect[0]) and int(batch.positions[0]) // 64 + 1 > int(batch.budget_pages[0]):
            self.values.append(lost_mass(query, layer, batch, selection))


def lost_mass(query: torch.Tensor, layer: LayerView, batch: DecodeBatch, selection: Selection) -> float:
    """Mean over query heads of the attention mass outside the chosen pages and the own page; one sequence."""
    heads, sealed = layer.retrieval_heads, int(batch.positions[0]) // 64
    grouped = (query.float() * layer.scale).unflatten(1, (layer.head_slots.numel(), -1))[:, heads]
    page_ids = batch.retrieval_table[:1, None, :sealed].long()
    slots = gather_slots(layer.retrieval_pool, page_ids, layer.head_slots[heads].long()[:, None])
    keys = decode_keys(slots, layer.layout).reshape(1, heads.numel(), -1, layer.layout.head_dim)
    mass = (grouped @ keys.transpose(2, 3)).unflatten(3, (-1, 64)).logsumexp(-1)
    tail_key = layer.tail_key[batch.rows][:, heads].float()
    own = tail_logits(grouped, tail_key, batch.positions).logsumexp(-1, keepdim=True)
    share = torch.cat((mass, own), dim=-1).softmax(-1)
    row = int(batch.rows[0])
    kept = torch.zeros(heads.numel(), sealed + 1, dtype=torch.bool)
    for i, head in enumerate(heads.tolist()):
        kept[i, selection.pages[row, head, : int(selection.counts[row, head])].long()] = True
    kept[:, -1] = True
    return 1.0 - float((share[0] * kept[:, None]).sum(-1).mean())


def planted(engine: Engine, text: str, num_tokens: int, depth: float, number: str, word: str) -> str:
    """A document of about num_tokens tokens with a number and a word to remember at a depth between 0 and 1."""
    ids = engine.tokenizer.encode(text[: num_tokens * 8])[:num_tokens]
    cut = int(len(ids) * depth)
    facts = FACTS.format(number=number, word=word, capital=word.capitalize())
    return f"{engine.tokenizer.decode(ids[:cut])}\n\n{facts}\n\n{engine.tokenizer.decode(ids[cut:])}"


def found(engine: Engine, prompt: list[int], answer: str, dense: bool = False) -> bool:
    """Whether the answer appears in the first 20 tokens of the reply."""
    return answer in run_greedy(engine, prompt, 20, dense)[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7500)
    parser.add_argument("--budgets", default="768,1024")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--kv-dtype", default="int4")
    parser.add_argument("--text")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    budgets = [int(b) for b in args.budgets.split(",")]
    text = long_text(args.text)
    rows: list[tuple[object, ...]] = []
    results: list[dict[str, object]] = []
    for logical_page_size in (16, 32):
        engine = demo_engine(
            cache=CacheConfig(kv_dtype=args.kv_dtype, logical_page_size=logical_page_size),
            sparsity=SparsityConfig(token_budget=budgets[0]),
            scheduler=SchedulerConfig(max_batch_size=4),
        )
        settings = [(rule, budget) for rule in RULES if rule[1] == logical_page_size for budget in budgets]
        right = dict.fromkeys([None, *range(len(settings))], 0)
        lost: dict[int, list[float]] = {i: [] for i in range(len(settings))}
        total, draw = 0, random.Random(0)
        for document in range(args.documents):
            passage = text[len(text) * document // args.documents :]
            for depth in DEPTHS:
                answers = {"number": str(draw.randrange(10_000, 100_000)), "word": draw.choice(WORDS)}
                body = planted(engine, passage, args.tokens - 160, depth, **answers)
                for kind, question in QUESTIONS.items():
                    prompt = engine.tokenizer.encode_chat([("user", f"{body}\n\n{question}")])
                    total += 1
                    right[None] += found(engine, prompt, answers[kind], dense=True)
                    for i, ((_, _, rule, factor), budget) in enumerate(settings):
                        with_rule(engine, rule, factor, budget)
                        with MassLost() as mass:
                            right[i] += found(engine, prompt, answers[kind])
                        lost[i] += mass.values
        for i, ((name, _, _, _), budget) in enumerate(settings):
            low, high = wilson(right[i], total)
            mean = sum(lost[i]) / len(lost[i])
            rows.append((name, budget, f"{right[i]}/{total}", f"{low:.2f} to {high:.2f}", f"{mean * 100:.2f} %"))
            results.append({"rule": name, "budget": budget, "right": right[i], "total": total, "mass_lost": mean})
        name = f"dense, {args.kv_dtype}, logical pages of {logical_page_size}"
        rows.append((name, "", f"{right[None]}/{total}", "", "0 %"))
        results.append({"rule": name, "right": right[None], "total": total})
    cases = f"{args.documents} documents x {len(DEPTHS)} depths x {len(QUESTIONS)} questions"
    print(f"{args.tokens} tokens, {cases}, {args.kv_dtype} pages")
    print_table(("rule", "budget", "right", "95 % interval", "mass lost"), rows)
    report("selection", {"tokens": args.tokens, "results": results}, args.write)


if __name__ == "__main__":
    main()
