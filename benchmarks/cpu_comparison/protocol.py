"""How a worker talks: one JSON object a line, on a channel that libraries cannot write to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import IO, Any


def protect_standard_output() -> IO[str]:
    """Return standard output for this process's own lines, and send what libraries print to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def send(replies: IO[str], message: Mapping[str, Any]) -> None:
    """Write one line."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()
