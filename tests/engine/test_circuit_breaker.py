import logging
import time

import pytest

from lserve.engine.circuit_breaker import CircuitBreaker


def test_it_lets_one_try_through_per_back_off_and_closes_on_success(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    breaker = CircuitBreaker("reads", first_backoff_s=0.05)
    assert breaker.allows() and breaker.would_allow
    breaker.failed("first")
    breaker.failed("second")
    assert breaker.is_open and not breaker.allows() and not breaker.would_allow
    deadline = time.monotonic() + 5
    while not breaker.allows():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not breaker.allows(), "one try per back-off"
    breaker.succeeded()
    assert not breaker.is_open and breaker.allows()
    assert breaker.num_outages == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "first" in caplog.text and "second" not in caplog.text


def test_calls_that_fail_together_are_one_failure() -> None:
    breaker = CircuitBreaker("reads", first_backoff_s=0.05)
    for _ in range(20):
        breaker.failed("at the same moment")
    deadline = time.monotonic() + 2
    while not breaker.would_allow:
        assert time.monotonic() < deadline
        time.sleep(0.005)
