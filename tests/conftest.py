"""How property tests choose their examples."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run, so that a failure belongs to the change under test. Other ones are drawn by
# `pytest --hypothesis-profile=explore`; what that finds becomes an `@example` beside the law.
settings.register_profile("repeat", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=500, deadline=None)
settings.load_profile("repeat")
