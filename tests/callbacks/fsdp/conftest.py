"""What several tests of callbacks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from process_pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    """Four processes that stay."""
    pool = Pool()
    yield pool
    pool.close()
