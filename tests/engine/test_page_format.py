"""The page format: what changes its identity, where slots lie, and how large pages are."""

from dataclasses import fields, replace
from typing import Any

import pytest

from lserve.engine.config import CacheConfig, ModelConfig, SparsityConfig
from lserve.engine.page_format import PageFormat, make_page_format

MODEL = ModelConfig("llama", 4, 96, 128, 6, 2, 16, 512, 4096, 10000.0, 1e-5)
STREAMING = ((False, True), (True, True), (False, False), (True, False))
LLAMA_8B = ModelConfig("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 500000.0, 1e-5)


def make(**changes: Any) -> PageFormat:
    """A format in which the named fields of model, cache or sparsity, or the named arguments, are changed."""
    parts: dict[str, Any] = {"model": MODEL, "cache": CacheConfig(), "sparsity": SparsityConfig()}
    for name in parts:
        own = {f.name for f in fields(parts[name])} & changes.keys()
        parts[name] = replace(parts[name], **{field: changes.pop(field) for field in own})
    arguments = {"streaming": STREAMING, "fingerprint": "f", "weights": "native", "compute_dtype": "bfloat16"}
    return make_page_format(**parts, **arguments | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"weights": "fp8"},
        {"compute_dtype": "float16"},
        {"rope_theta": 500000.0},
        {"rope_scaling": (("rope_type", "linear"), ("factor", 2.0))},
        {"rope_frequency_factors": (1.0,) * 8},
        {"value_rotation": "none"},
        {"streaming": STREAMING[::-1]},
        {"sink_size": 64},
        {"local_window": 128},
        {"prefill_sparse_from": 8192},
        {"prefill_sparse_from": 8192, "prefill_threshold": 0.1},
        {"prefill_sparse_from": 8192, "prefill_budget": 0.25},
        {"kv_dtype": "int8"},
        {"kv_dtype": "k8v4"},
        {"logical_page_size": 16},
    ],
    ids=str,
)
def test_what_changes_a_pages_numbers_changes_its_format(change: dict[str, Any]) -> None:
    assert make(**change).format_id != make().format_id
    assert make(**change).format_id == make(**change).format_id


@pytest.mark.parametrize(
    "change",
    [
        {"retrieval_pool_bytes": 1 << 20},
        {"host_swap_bytes": 0},
        {"prefix_cache": False},
        {"token_budget": 4096},
        {"candidate_factor": 2},
        {"reselect_interval": 16},
        {"rule": "bound"},
        {"prefill_threshold": 0.1},
        {"prefill_budget": 0.25},
        {"eos_token_ids": (1, 2)},
    ],
    ids=str,
)
def test_nothing_else_does(change: dict[str, Any]) -> None:
    """Decode's choices leave no trace in pages that others may take; nor do pools, nor an estimator that is off."""
    assert make(**change).format_id == make().format_id


def test_all_changes_give_different_formats() -> None:
    thresholds = {make(prefill_sparse_from=1024, prefill_threshold=t).format_id for t in (0.1, 0.2, 0.3)}
    dtypes = {make(kv_dtype=d, logical_page_size=s).format_id for d in ("bf16", "float32", "int4") for s in (16, 32)}
    assert (len(thresholds), len(dtypes)) == (3, 6)


def test_slots_run_layer_by_layer_in_head_order() -> None:
    page_format = make()
    assert (page_format.num_retrieval_slots, page_format.num_streaming_slots) == (4, 4)
    assert [page_format.head_slots(layer) for layer in range(4)] == [[0, 0], [1, 2], [1, 2], [3, 3]]
    assert [page_format.first_slots(layer) for layer in range(4)] == [(0, 0), (1, 1), (1, 3), (3, 3)]
    slots = {(page_format.streaming[i][h], s) for i in range(4) for h, s in enumerate(page_format.head_slots(i))}
    assert slots == {(streams, slot) for streams in (False, True) for slot in range(4)}


@pytest.mark.parametrize("streams", [False, True])
def test_a_class_without_slots_has_empty_pages(streams: bool) -> None:
    page_format = make(streaming=((streams,) * 2,) * 4)
    sizes = (page_format.retrieval_page_bytes, page_format.streaming_page_bytes)
    assert sizes[not streams] == 0 and sizes[streams] == 8 * page_format.layout.slot_bytes


def test_a_page_of_an_8b_model_is_about_a_megabyte() -> None:
    """At 4 bits, half the heads streaming: 1.2 MB a page, 17 KiB a token (bf16 takes 128 KiB)."""
    streaming = ((False,) * 4 + (True,) * 4,) * 32
    made = make_page_format(LLAMA_8B, CacheConfig(), SparsityConfig(), streaming, "f", "native", "bfloat16")
    assert made.retrieval_page_bytes == made.streaming_page_bytes == pytest.approx(1.2e6, rel=0.03)
    assert made.layout.slot_bytes == 64 * 128 + 2 * (2 * 128 * 2) + 2 * 64 * 2
    assert made.tail_row_bytes == 64 * 128 * 1024


@pytest.mark.parametrize(("compute_dtype", "element"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_tail_row_holds_one_page_in_the_compute_dtype(compute_dtype: str, element: int) -> None:
    assert make(compute_dtype=compute_dtype).tail_row_bytes == 4 * 2 * 2 * 64 * 16 * element
