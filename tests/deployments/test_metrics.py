"""What is counted, and that counting cannot break a request."""

import pytest

from lserve.deployments.metrics import Metrics, ServeInstrument

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on import


def test_counting_nothing_is_no_error() -> None:
    """A pull without pages moves no bytes; Ray's counters refuse a zero."""
    metrics = Metrics(ServeInstrument)
    metrics.kv_transfer_bytes.record(0)
    metrics.kv_transfer_bytes.record(7)
    metrics.running_requests.record(0)
