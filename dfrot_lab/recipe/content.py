"""The hash of plain values: what keys are made of."""

import hashlib
import json
from typing import Any


def content_key(value: Any) -> str:
    """The first 32 hex digits of the sha256 of a JSON-able value: equal values have equal keys, in any
    process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
