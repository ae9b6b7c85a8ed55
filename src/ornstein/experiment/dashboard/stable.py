"""Names for panels that are the same every time, so that two specifications can be compared line by line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def stable_name(*words: str) -> str:
    """A name of 12 hexadecimal digits, for words in their order."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def name_panels(part: str, panels: Sequence[Any]) -> list[Any]:
    """Panels named after their part and place in it, where W&B's package has drawn names at random."""
    for place, panel in enumerate(panels):
        panel._id = stable_name(part, str(place))
    return list(panels)
