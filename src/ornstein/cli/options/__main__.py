"""``python -m ornstein.cli.options FOLDER`` writes the generated pages there."""

from __future__ import annotations

import sys
from pathlib import Path

from ornstein.cli.options.networks import networks_page
from ornstein.cli.options.page import page

PAGES = {"design_space.md": page, "networks.md": networks_page}

if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("name the folder to write to: python -m ornstein.cli.options docs")
    for name, write in PAGES.items():
        (Path(sys.argv[1]) / name).write_text(write(), encoding="utf-8")
