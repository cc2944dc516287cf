"""Spans for OpenTelemetry: one a request, with parts of its own, sent in the background. Extra `otel`.

A span says which route answered, how, and with which model, bank and policy. It never holds text, a key, an address,
the path that was asked for or an exception's message. Where spans are sent and how they are sampled is said by
OpenTelemetry's own variables, `OTEL_EXPORTER_OTLP_ENDPOINT` and so on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import SettingsError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from service.engine import ServedEngine
    from service.settings import Settings

__all__ = ["TracedRequests", "Tracing", "start_tracing"]

_NAME = "sailguard"
_FLUSH_SECONDS = 3.0
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_CLIENT_GONE = 499


def start_tracing(settings: Settings, version: str) -> Tracing:
    """Start to send spans if the settings say so; else what is returned does nothing. Raises as `Tracing.start`."""
    return Tracing.start(_NAME, version) if settings.tracing else Tracing()


class Tracing:
    """Makes spans and sends them from a thread of its own; one made without a provider does nothing.

    A collector that is slow or gone costs spans: they wait in a bounded queue, and no request waits for it.
    """

    def __init__(self, provider: TracerProvider | None = None, *, version: str = "") -> None:
        self._provider = provider
        self._tracer: Tracer | None = None if provider is None else provider.get_tracer(_NAME, version)

    @classmethod
    def start(cls, service_name: str, version: str, *, exporter: SpanExporter | None = None) -> Tracing:
        """Send spans to the collector that OpenTelemetry's variables name, or to `exporter`.

        `service_name` stands unless those variables give another. Raises `SettingsError` if the extra `otel` is not
        installed, or if one of the variables has a value that cannot be used.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingsError(
                "setting 'tracing': spans need further packages: pip install 'sailguard[otel]', "
                "or unset SAILGUARD_TRACING"
            ) from error
        ours = {"service.name": service_name, "service.version": version}
        try:
            told = OTELResourceDetector().detect().attributes
            resource = Resource.create({name: value for name, value in ours.items() if name not in told})
            provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter() if exporter is None else exporter))
        except ValueError as error:
            raise SettingsError(f"setting 'tracing': a variable OTEL_... has a wrong value: {error}") from error
        return cls(provider, version=version)

    @contextlib.contextmanager
    def span(self, name: str, **attributes: int | float | bool) -> Iterator[None]:
        """A part of the request that is being served. Attributes are numbers alone, so that no text gets in."""
        if self._tracer is None:
            yield
            return
        values = {f"{_NAME}.{attribute}": value for attribute, value in attributes.items()}
        with self._tracer.start_as_current_span(
            # An exception's message may quote a prompt.
            name,
            attributes=values,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except Exception as error:
                _fail(span, type(error).__name__)
                raise

    @contextlib.contextmanager
    def request_span(self, scope: Scope) -> Iterator[Span | None]:
        """The span of a whole request; it continues the caller's, if the request has a valid `traceparent`."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import SpanKind

        method = _method(scope)
        with self._tracer.start_as_current_span(
            method,
            context=_caller(scope),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def install(self, app: FastAPI) -> None:
        """Put a span around every request of `app`, if spans are made."""
        if self._tracer is not None:
            app.add_middleware(TracedRequests, tracing=self, engine=lambda: app.state.services.slot.engine)

    def close(self, seconds: float = _FLUSH_SECONDS) -> None:
        """Send what is left, for at most so many seconds; what a collector does not take by then is lost."""
        if self._provider is None:
            return
        flushing = threading.Thread(target=self._provider.shutdown, name="sailguard-spans", daemon=True)
        flushing.start()
        flushing.join(seconds)


class TracedRequests:
    """A layer that gives every request a span. Probes and scrapes have none."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing, engine: Callable[[], ServedEngine | None]) -> None:
        self._app = app
        self._tracing = tracing
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        engine = self._engine()
        with self._tracing.request_span(scope) as span:
            try:
                await self._app(scope, receive, watched)
            except Exception as error:
                _fail(span, type(error).__name__)
                raise
            finally:
                if span is not None:
                    _describe(span, scope, status, engine)


def _describe(span: Span, scope: Scope, status: int, engine: ServedEngine | None) -> None:
    record = scope.get("sailguard.record")
    # The path is free text of the client's; the route's template is not.
    route = getattr(scope.get("route"), "path", None)
    if record is not None and record.client_gone:
        status = _CLIENT_GONE
    found: dict[str, Any] = {
        "http.route": route,
        "http.response.status_code": status or None,
        f"{_NAME}.request_id": None if record is None else record.request_id,
        f"{_NAME}.action": None if record is None else record.action,
        f"{_NAME}.refused": None if record is None else getattr(record, "refused", None),
    }
    if engine is not None:
        found[f"{_NAME}.model"] = engine.model_id
        found[f"{_NAME}.bank"] = engine.bank_version
        found[f"{_NAME}.policy"] = engine.policy_version
    span.set_attributes({name: value for name, value in found.items() if value is not None})
    if route is not None:
        span.update_name(f"{_method(scope)} {route}")
    if status >= 500:
        _fail(span, str(status))


def _fail(span: Span | None, kind: str) -> None:
    if span is None:
        return
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _method(scope: Scope) -> str:
    # A client may send any word as the method.
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def _caller(scope: Scope) -> Context:
    """The caller's span. Of its headers `traceparent` alone is read: the others may hold anything."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
    carrier = {"traceparent": found[0]} if len(found) == 1 else {}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())
