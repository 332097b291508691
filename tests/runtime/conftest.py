"""The service on a make-believe Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.properties.test_service import DirectService, Ray, make_believe


@pytest.fixture
def node_names() -> set[str]:
    """Which nodes there are, each of four GPUs and eight egress units; modules override it."""
    return {"x", "y"}


@pytest.fixture
def outside(node_names: set[str]) -> Iterator[Ray]:
    """All that is not the service."""
    ray = Ray(nodes=node_names)
    with make_believe(ray):
        yield ray


@pytest.fixture
def service(outside: Ray) -> DirectService:
    return DirectService()
