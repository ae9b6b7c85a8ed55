"""Starting Hydra: where the configs are, how a finished run becomes a base for them, and how errors are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

RUN_GROUPS = ("sampler", "guidance", "metrics")
_EMPTY: dict[str, Any] = {}


def conf_dir() -> Path:
    """The folder of config groups: the repository's ``conf/``, or the copy that the wheel carries."""
    here = Path(__file__).resolve()
    for candidate in (here.parents[3] / "conf", here.parents[1] / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise OrnsteinError("the package carries no conf/ folder: reinstall ornstein.")


def register_resolvers() -> None:
    """``${div:a,b}``: integer division that refuses a remainder, for sizes."""

    def div(a: int, b: int) -> int:
        if a % b:
            raise OrnsteinError(f"{a} is not divisible by {b}: choose a data.image_size that is a multiple of {b}.")
        return a // b

    OmegaConf.register_new_resolver("div", div, replace=True)


def take_argument(argv: list[str], key: str) -> str | None:
    """Removes ``key=value`` from the command line and returns the value, None where it is not given."""
    value = None
    for argument in list(argv):
        name, given, text = argument.partition("=")
        if given and name.lstrip("+") == key:
            argv.remove(argument)
            value = text
    return value


def peek_argument(argv: list[str], key: str) -> str | None:
    """The value of ``key=value`` on the command line, which stays as it is."""
    return take_argument(list(argv), key)


def store_run(config: dict[str, Any]) -> None:
    """Makes a finished run's config the base of sample and evaluate, its own groups an option called ``run``."""
    store = ConfigStore.instance()
    for group in RUN_GROUPS:
        node = dict(config.get(group) or {})
        store.store(group=group, name="run", node=node)
    own = ("task", "paths", "name", "resume", "seed", "checkpoint", "hydra", *RUN_GROUPS)
    store.store(name="run_base", node={key: value for key, value in config.items() if key not in own})


def told(body: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Turns a user's mistake into its one sentence and exit code 1; anything else keeps its traceback."""

    @wraps(body)
    def run(cfg: DictConfig) -> Any:
        try:
            return body(cfg)
        except Exception as error:
            mistake = find_mistake(error)
            if mistake is None or OmegaConf.select(cfg, "traceback", default=False):
                raise
            fail(mistake)

    return run


def find_mistake(error: BaseException) -> Exception | None:
    """The user's mistake behind an exception: an OrnsteinError or a ValueError of ours, however wrapped."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    seen: BaseException | None = error
    wrapped = False
    while seen is not None:
        if isinstance(seen, OrnsteinError):
            return seen
        if wrapped and isinstance(seen, ValueError | TypeError) and not isinstance(seen, OmegaConfBaseException):
            return seen
        wrapped = wrapped or isinstance(seen, InstantiationException | OmegaConfBaseException)
        seen = seen.__cause__ or seen.__context__
    return error if isinstance(error, OmegaConfBaseException | InstantiationException) else None


def fail(error: Exception) -> None:
    """Prints one sentence to stderr and leaves with exit code 1."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(1)


def launch(config_name: str, body: Callable[[DictConfig], Any]) -> None:
    """Composes ``config_name`` with the command line and runs ``body`` once, or once a job of a multirun."""
    register_resolvers()
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(told(body))()
