"""A server that several tests ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .servers import Server, running


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """A server with the built-in model, four rows, and a short queue."""
    with running("--rows", "4", "--queue", "64", "--max-body", "1MB") as started:
        yield started
        assert started.process.poll() is None  # whatever was asked of it
