"""``python -m ornstein.cli.options`` prints the page, with a file's name behind it writes it there."""

from __future__ import annotations

import sys
from pathlib import Path

from ornstein.cli.options.page import page

if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
