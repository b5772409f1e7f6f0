"""How all tests run: the examples of property tests, and the threads of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples on every run, so that a failure belongs to the change under test. Other ones are drawn by
# `pytest --hypothesis-profile=explore`; what that finds becomes an `@example` beside the law.
settings.register_profile("repeat", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=500, deadline=None)
settings.load_profile("repeat")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: the models are so small that threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
