"""Fixtures that several tests of FSDP share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from process_pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    """Start four processes that stay alive."""
    pool = Pool()
    yield pool
    pool.close()
