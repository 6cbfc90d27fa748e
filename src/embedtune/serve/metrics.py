"""What Prometheus reads at /metrics."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from embedtune.serve.guard import App, Message, Receive, Scope, Send, refuse

PATHS = {
    *("/v1/embeddings", "/v1/models", "/embed", "/info"),
    *("/", "/page.js", "/page.css", "/search", "/about", "/map", "/feedback"),
    *("/livez", "/readyz", "/health", "/metrics"),
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": registry, "namespace": "embedtune"}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **named)
        self.seconds = Histogram("request_seconds", "Seconds of a request", ["path"], buckets=SECONDS, **named)
        self.tokens = Counter("tokens", "Tokens that the model read", **named)
        self.texts = Counter("texts", "Texts that were embedded", **named)
        self.truncated = Counter("truncated_texts", "Texts longer than the model reads", **named)
        self.not_finite = Counter("not_finite", "Texts for which the model gave NaN or infinity", **named)
        self.queue_tokens = Gauge("queue_tokens", "Tokens that wait, estimated", **named)
        self.queue_texts = Gauge("queue_texts", "Texts that wait", **named)
        self.rate = Gauge("tokens_per_second", "Measured rate, in estimated tokens", **named)
        self.up = Gauge("ready", "1 where the model is loaded and answers", **named)


@dataclass(frozen=True)
class Counted:
    """ASGI middleware: counts what was answered, and makes an answer of a bug of ours."""

    app: App
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), 0
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except Exception:
            logging.getLogger("embedtune").exception("a request failed: a bug of ours")
            if not status:
                await refuse(seen, 500, "a bug of ours; the server's log says more")
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(time.monotonic() - start)
        return None
