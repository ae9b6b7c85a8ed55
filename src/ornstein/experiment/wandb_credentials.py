"""Whether Weights & Biases could log in without asking; importing this loads neither wandb nor Lightning."""

import netrc
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit


def has_credentials() -> bool:
    """Whether W&B could log in without asking, by environment or netrc file; wandb is not imported."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if host in netrc.netrc(str(file)).hosts:
                return True
    return False
