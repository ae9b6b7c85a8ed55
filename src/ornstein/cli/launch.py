"""Starting Hydra: where the configs are, how a finished run becomes a base for them, and how errors are told."""

from __future__ import annotations

import operator
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

RUN_GROUPS = ("sampler", "guidance", "metrics")
_failed_jobs: list[str] = []


def conf_dir() -> Path:
    """The folder of config groups: the repository's ``conf/``, or the copy that the wheel carries."""
    here = Path(__file__).resolve()
    for candidate in (here.parents[3] / "conf", here.parents[1] / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise OrnsteinError("the package carries no conf/ folder: reinstall ornstein.")


def register_resolvers() -> None:
    """``${div:a,b}``: integer division that refuses a remainder, for sizes; ``${mul:a,b}``: a product, for channels;
    ``${image_channels:source,a,b}``: channels of a conditioning image.
    """

    def div(a: int, b: int) -> int:
        if a % b:
            raise OrnsteinError(
                f"data.image_size={a} is not divisible by {b}, by which codec= reduces images: choose data.image_size="
                f"{max(1, round(a / b)) * b}, say."
            )
        return a // b

    OmegaConf.register_new_resolver("div", div, replace=True)
    OmegaConf.register_new_resolver("codec_fact", _codec_fact, replace=True)
    OmegaConf.register_new_resolver("pretrained_fact", _pretrained_fact, replace=True)
    OmegaConf.register_new_resolver("data_fact", _data_fact, replace=True)

    def channels(source: str, channels: int, condition_channels: int | None) -> int:
        from ornstein.conditioning.image import image_channels

        return image_channels(source, channels, condition_channels)

    OmegaConf.register_new_resolver("mul", operator.mul, replace=True)
    OmegaConf.register_new_resolver("image_channels", channels, replace=True)


def _codec_fact(kind: str, weights: str, name: str) -> Any:
    """``${codec_fact:kl,WEIGHTS,channels}``: what an autoencoder's file says of itself."""
    from ornstein.codecs.weights import codec_fact

    return codec_fact(kind, weights, name)


def _pretrained_fact(pretrained: str, name: str, subfolder: str | None = None, revision: str | None = None) -> int:
    """``${pretrained_fact:NAME,channels,SUBFOLDER,REVISION}``: the same of an autoencoder in diffusers' format."""
    from ornstein.codecs.pretrained import pretrained_fact

    return pretrained_fact(pretrained, name, subfolder, revision)


def _data_fact(name: str, *, _parent_: Any) -> Any:
    """``${data_fact:image_size}`` in a data config: what the data set's files say of themselves."""
    from ornstein.data.facts import data_fact

    return data_fact(_parent_, name)


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


def options_first(argv: list[str]) -> list[str]:
    """The command line with Hydra's own options (``-m``, ``--config-dir FOLDER``) before the overrides.

    Where one stands between overrides, as in ``a=1 -m b=2``, Hydra's parser refuses those behind it. An option takes
    along the word after it, unless that is an override.
    """
    options: list[str] = []
    overrides: list[str] = []
    taking = False
    for word in argv[1:]:
        own = word.startswith("-")
        (options if own or (taking and word[:1] not in "~+" and "=" not in word) else overrides).append(word)
        taking = own and "=" not in word and word not in ("-m", "--multirun")
    return [*argv[:1], *options, *overrides]


def store_run(config: dict[str, Any]) -> None:
    """Makes a finished run's config the base of sample and evaluate, its own groups an option called ``run``."""
    store = ConfigStore.instance()
    for group in RUN_GROUPS:
        # A defaults list in what was stored could bring in anything.
        node = {key: value for key, value in dict(config.get(group) or {}).items() if key != "defaults"}
        if group == "sampler" and isinstance(node.get("grid"), dict):
            # An option of its own group, so that sampler/grid=karras takes the place of all of it.
            grid = {key: value for key, value in node.pop("grid").items() if key != "defaults"}
            store.store(group="sampler/grid", name="run", node=grid)
            node = {"defaults": [{"grid": "run"}, "_self_"], **node}
        store.store(group=group, name="run", node=node)
    own = ("task", "paths", "resume", "seed", "checkpoint", "hydra", "likelihood", "logger", *RUN_GROUPS)
    store.store(name="run_base", node={key: value for key, value in config.items() if key not in own})


def told(body: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Turns a user's mistake into its one sentence and exit code 1; anything else keeps its traceback."""

    @wraps(body)
    def run(cfg: DictConfig) -> Any:
        register_resolvers()  # a launcher's own processes have not been through `launch`
        try:
            return body(cfg)
        except Exception as error:
            mistake = find_mistake(error)
            if mistake is None or OmegaConf.select(cfg, "traceback", default=False):
                raise
            remove_untouched(Path(HydraConfig.get().runtime.output_dir))
            if not _may_go_on():
                fail(mistake)
            tell(mistake)
            _failed_jobs.append(str(HydraConfig.get().job.id))
            return None

    return run


def note_failed(jobs: Iterable[str]) -> None:
    """Jobs of a sweep that failed in whatever process: the command ends with exit code 1."""
    _failed_jobs.extend(jobs)


def remove_untouched(folder: Path) -> None:
    """Removes the folder that Hydra made for a run that never began; one that holds more than Hydra's own stays.

    Two commands of one second have one such folder, and may both be about to remove it.
    """
    own = {".hydra", f"{HydraConfig.get().job.name}.log"}
    with suppress(FileNotFoundError):
        if {entry.name for entry in folder.iterdir()} <= own:
            shutil.rmtree(folder, onerror=_unless_gone)


def _unless_gone(function: Any, path: str, error: Any) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _may_go_on() -> bool:
    """Whether other jobs of a sweep follow in this process: one that cannot work is no reason to drop the rest."""
    hydra_config = HydraConfig.get()
    return hydra_config.mode == RunMode.MULTIRUN and hydra_config.launcher._target_.endswith("BasicLauncher")


def find_mistake(error: BaseException) -> Exception | None:
    """The user's mistake behind an exception: an OrnsteinError or a ValueError of ours, however wrapped."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    seen: BaseException | None = error
    wrapper: Exception | None = None
    while seen is not None:
        if isinstance(seen, OrnsteinError):
            return _placed(seen, wrapper)
        if wrapper is not None and isinstance(seen, TypeError):
            return wrapper  # a value of the wrong kind: Hydra says where, Python does not
        if wrapper is not None and isinstance(seen, ValueError) and not isinstance(seen, OmegaConfBaseException):
            return seen
        if isinstance(seen, InstantiationException | OmegaConfBaseException):
            wrapper = seen
        seen = seen.__cause__ or seen.__context__
    return error if isinstance(error, OmegaConfBaseException | InstantiationException) else None


def _placed(mistake: OrnsteinError, wrapper: Exception | None) -> OrnsteinError:
    """The mistake; one of a network says where its arguments are set, which the network itself does not know."""
    key = re.search(r"full_key: (model\.\S+)", str(wrapper))
    return mistake if key is None or key[1] in str(mistake) else OrnsteinError(f"{key[1]}: {mistake}")


@contextmanager
def as_ours() -> Iterator[None]:
    """Within it, whatever tells of a user's mistake is raised as an OrnsteinError; the rest as it is."""
    from hydra.errors import HydraException

    try:
        yield
    except OrnsteinError:
        raise
    except Exception as error:
        mistake = find_mistake(error) or (error if isinstance(error, HydraException) else None)
        if mistake is None:
            raise
        raise (mistake if isinstance(mistake, OrnsteinError) else OrnsteinError(str(mistake))) from error


def fail(error: Exception) -> None:
    """Prints one sentence to stderr and leaves with exit code 1."""
    tell(error)
    raise SystemExit(1)


def tell(error: Exception) -> None:
    """Prints one sentence to stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def launch(config_name: str, body: Callable[[DictConfig], Any]) -> None:
    """Composes ``config_name`` with the command line and runs ``body`` once, or once a job of a multirun."""
    from ornstein.cli.launchers import use_own_launchers
    from ornstein.cli.words import check_words

    register_resolvers()
    sys.argv[:] = options_first(sys.argv)
    try:
        check_words(config_name, sys.argv[1:])
    except OrnsteinError as error:
        fail(error)
    _failed_jobs.clear()
    use_own_launchers()
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(told(body))()
    if _failed_jobs:
        raise SystemExit(1)
