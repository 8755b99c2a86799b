"""`lserve status` reads what the server itself exports."""

from lserve.cli.status import read_samples, summary

PAGE = """\
# TYPE lserve_kv_pages gauge
lserve_kv_pages{pool="retrieval",state="free",replica="a"} 90.0
lserve_kv_pages{pool="streaming",state="free",replica="a"} 10.0
lserve_kv_pages{pool="retrieval",state="used",replica="b"} 5.0
# TYPE lserve_running_requests gauge
lserve_running_requests{deployment="Router",replica="a"} 2.0
lserve_running_requests{deployment="Router",replica="b"} 1.0
lserve_running_requests{deployment="DecodeWorker",replica="c"} 3.0
# TYPE lserve_prefix_tokens_total counter
lserve_prefix_tokens_total{tier="pool"} 300.0
lserve_prefix_tokens_total{tier="redis"} 100.0
lserve_prefix_tokens_total{tier="miss"} 600.0
# TYPE ray_node_cpu gauge
ray_node_cpu 3.0
"""


def test_the_summary_adds_up_over_replicas() -> None:
    assert summary(read_samples(PAGE)) == [
        ("running requests", "3"),
        ("pages", "100 free, 5 used"),
        ("prompt tokens", "1000: 60% miss, 30% pool, 10% redis"),
    ]


def test_what_was_not_measured_yet_is_left_out() -> None:
    assert summary(read_samples("")) == []
