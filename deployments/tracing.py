"""OpenTelemetry traces: one span per stage of a request, all of them children of the router's span.

Switched on by OpenTelemetry's own variables: `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`)
names the collector, spoken to over HTTP; sampling, headers and the service's name come from the usual ones too. Without
an endpoint nothing is imported and nothing recorded. Needs the extra `otel`.

Stages: `request`, `queue`, `prefix_lookup`, `prefill`, `transfer`, `decode`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Span:
    """One stage. traceparent: what its children take as parent (W3C Trace Context), empty when traces are off."""

    def __init__(self, span: Any, traceparent: str) -> None:
        self._span, self.traceparent = span, traceparent

    def end(self, error: BaseException | None = None, **attributes: str | int | float) -> None:
        """Ends it now, failed if there is an error; once ended it stays as it is."""
        if self._span is None:
            return
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.record_exception(error)
            self._span.set_status(_error_status(str(error)))
        self._span.end()
        self._span = None


def start(name: str, parent: str, **attributes: str | int | float) -> Span:
    """Begins a stage under the parent's traceparent, or a trace of its own where that is empty or malformed."""
    tracer = _tracer()
    if tracer is None:
        return Span(None, "")
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator, carrier = TraceContextTextMapPropagator(), {"traceparent": ""}
    span = tracer.start_span(name, context=propagator.extract({"traceparent": parent}), attributes=attributes)
    propagator.inject(carrier, context=set_span_in_context(span))
    return Span(span, carrier["traceparent"])


@contextmanager
def stage(name: str, parent: str, **attributes: str | int | float) -> Iterator[Span]:
    """A stage for the length of the block; what leaves the block by an exception has failed."""
    span = start(name, parent, **attributes)
    try:
        yield span
    except BaseException as error:
        span.end(error)
        raise
    span.end()


@cache
def _tracer() -> Any:
    """This process's tracer; None when traces are off."""
    wanted = any(os.environ.get(name) for name in _ENDPOINTS) and os.environ.get("OTEL_TRACES_EXPORTER") != "none"
    if not wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no traces although an endpoint is set: %s; install lserve[otel]", error)
        return None
    service = os.environ.get("OTEL_SERVICE_NAME", "lserve")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("lserve")


def _error_status(message: str) -> Any:
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR, message)
