"""What `/metrics` says, in the text format of Prometheus."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WINDOW = 10  # seconds


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "llama3_raw", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests.", ("path", "status"), **shared)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **shared)
        self.tokens = Counter("generated_tokens", "New tokens.", **shared)
        self.speed = Gauge("tokens_per_second", "New tokens in the last ten seconds.", **shared)
        self.running = Gauge("running_texts", "Texts in the batch.", **shared)
        self.waiting = Gauge("waiting_texts", "Texts that wait for a row.", **shared)
        shared["buckets"] = _SECONDS
        self.first_token = Histogram("first_token_seconds", "From arrival to the first token.", **shared)
        self.whole_text = Histogram("text_seconds", "From arrival to the end of a text.", **shared)

        self._tokens_of_second: deque[list[int]] = deque(maxlen=_WINDOW + 1)  # [second, tokens]; the last is not over
        self.speed.set_function(self._speed)

    def count_token(self) -> None:
        """Count a new token."""
        self.tokens.inc()
        second = int(time.monotonic())
        if not self._tokens_of_second or self._tokens_of_second[-1][0] != second:
            self._tokens_of_second.append([second, 0])
        self._tokens_of_second[-1][1] += 1

    def _speed(self) -> float:
        now = int(time.monotonic())
        counts = list(self._tokens_of_second)
        return sum(count for second, count in counts if now - _WINDOW <= second < now) / _WINDOW
