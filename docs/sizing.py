"""How much fits: the tables of docs/operations.md, from the engine's own pool sizes and page format.

python docs/sizing.py            prints the tables
python docs/sizing.py --write    puts them into docs/operations.md

Weights are counted from the model's shape: exact for `native`, and for `w4a8` 4 bits plus a scale and a zero point per
group of 128, the first and the last layer in 8 bits as calibration leaves them, embeddings in 16 bits.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lserve.engine.config import PAGE_SIZE, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SparsityConfig
from lserve.engine.errors import SettingsError
from lserve.engine.page_format import PageFormat, make_page_format
from lserve.engine.pool_sizes import pool_sizes
from lserve.engine.residency import Residency

PAGE = Path(__file__).with_name("operations.md")
START, END = "<!-- sizing: written by docs/sizing.py -->\n", "<!-- end of sizing -->\n"
GIB = 1 << 30
W4A8_BYTES = (4 + 16 / 128) / 8
CONTEXTS = (8_192, 32_768, 131_072)

Weights = Literal["native", "w4a8"]


@dataclass(frozen=True)
class Row:
    """A model with its weights on a card. gpu_gib: what the driver shows, a little less than the name says."""

    model: str
    config: ModelConfig
    weights: Weights
    gpu: str
    gpu_gib: float


def shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> ModelConfig:
    """A decoder with heads of 128 channels and embeddings that are not tied."""
    return ModelConfig("", layers, hidden, intermediate, heads, kv_heads, 128, vocabulary, 1 << 20, 1e6, 1e-6)


LLAMA_8B = shape(32, 4096, 14336, 32, 8, 128256)
QWEN_8B = shape(36, 4096, 12288, 32, 8, 151936)
QWEN_32B = shape(64, 5120, 25600, 64, 8, 151936)

ROWS = (
    Row("Llama-3.1-8B", LLAMA_8B, "w4a8", "L40S 48 GB", 44.5),
    Row("Llama-3.1-8B", LLAMA_8B, "native", "H100 80 GB", 79.1),
    Row("Qwen3-8B", QWEN_8B, "native", "H100 80 GB", 79.1),
    Row("Qwen3-8B", QWEN_8B, "native", "H200 141 GB", 139.7),
    Row("Qwen3-32B", QWEN_32B, "w4a8", "H100 80 GB", 79.1),
    Row("Qwen3-32B", QWEN_32B, "native", "H200 141 GB", 139.7),
)


def weight_bytes(config: ModelConfig, weights: Weights) -> int:
    """Bytes of the weights on the GPU."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    embeddings = 2 * config.vocab_size * config.hidden_size
    if weights == "native":
        return config.num_layers * layer * 2 + 2 * embeddings
    return int(layer * ((config.num_layers - 2) * W4A8_BYTES + 2)) + 2 * embeddings


def page_format(row: Row, streaming_heads: bool) -> PageFormat:
    """int4 pages; with streaming heads, half of each layer's."""
    half = row.config.num_kv_heads // 2 if streaming_heads else 0
    heads = tuple(head < half for head in range(row.config.num_kv_heads))
    return make_page_format(
        row.config, CacheConfig(), SparsityConfig(), (heads,) * row.config.num_layers, "", row.weights, "bfloat16"
    )


def tokens_in_pool(row: Row, streaming_heads: bool) -> int:
    """Tokens whose retrieval pages one worker holds; 0 when the weights leave no room."""
    free = int(row.gpu_gib * GIB) - weight_bytes(row.config, row.weights)
    config = EngineConfig("", device="cuda", scheduler=SchedulerConfig())
    try:
        return pool_sizes(config, page_format(row, streaming_heads), 8192, max(free, 0)).retrieval_pages * PAGE_SIZE
    except SettingsError:
        return 0


def stored_bytes(row: Row, streaming_heads: bool, prompt_length: int) -> int:
    """What the prefix cache keeps of one prompt: in Redis, and in a worker's pool."""
    layout, sparsity = page_format(row, streaming_heads), SparsityConfig()
    streaming = Residency(sparsity.sink_size, sparsity.local_window).streaming_pages_kept(prompt_length)
    retrieval = prompt_length // PAGE_SIZE * layout.retrieval_page_bytes
    return retrieval + len(streaming) * layout.streaming_page_bytes * (layout.num_streaming_slots > 0)


def tables() -> str:
    """Both tables as Markdown."""
    lines = [
        "| model, weights | GPU | weights | tokens in one worker's pages | "
        + " | ".join(f"requests of {context // 1024}K" for context in CONTEXTS)
        + " |",
        "|---|---|---|---|" + "---|" * len(CONTEXTS),
    ]
    for row in ROWS:
        pools = [tokens_in_pool(row, streaming) for streaming in (False, True)]
        cells = [f"{row.model}, {row.weights}", row.gpu, f"{weight_bytes(row.config, row.weights) / GIB:.1f} GiB"]
        cells.append(" / ".join(f"{pool / 1e6:.2f}M" for pool in pools))
        cells += [" / ".join(str(pool // context) for pool in pools) for context in CONTEXTS]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | one page (64 tokens) | " + " | ".join(f"a prompt of {c // 1024}K" for c in CONTEXTS) + " |"
        " prompts of 32K in 48 GB of Redis |",
        "|---|---|" + "---|" * (len(CONTEXTS) + 1),
    ]
    for row in {row.model: row for row in ROWS}.values():
        size = [page_format(row, streaming).retrieval_page_bytes / (1 << 20) for streaming in (False, True)]
        cells = [row.model, " / ".join(f"{mib:.2f} MiB" for mib in size)]
        for context in CONTEXTS:
            cells.append(" / ".join(f"{stored_bytes(row, s, context) / GIB:.2f} GiB" for s in (False, True)))
        cells.append(" / ".join(str(int(48 * GIB // stored_bytes(row, s, 32_768))) for s in (False, True)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The guide with the tables of now."""
    before, rest = text.split(START)
    return before + START + tables() + END + rest.split(END)[1]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(written(PAGE.read_text()))
    else:
        print(tables(), end="")
