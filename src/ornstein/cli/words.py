"""Overrides that Hydra would take for something else, or would answer with advice that does not help.

``sampler.grid=karras`` sets a text where an option is meant; and for a key that an option does not have Hydra's hint is
to add it by ``+``, which then fails when the option is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli import guides
from ornstein.cli.launch import conf_dir
from ornstein.cli.ranks import launched_elsewhere
from ornstein.errors import OrnsteinError

# Guidance has words of its own.
_GROUPS = ("sampler", "scheduler", "objective", "model", "conditioner", "codec", "adapter", "metrics")
_MAX_KEYS = 16  # listed of an option
_MAX_OTHERS = 6  # options named that have a key
_OVERRIDE = re.compile(r"(?P<sign>[+~]{0,2})(?P<key>[A-Za-z_][\w./]*)=(?P<value>.*)", re.DOTALL)
_BRACES = re.compile(r"[^'\"\[].*\{\d+\.\.\d+\}.*")
_OPTION = re.compile(r"[A-Za-z_]\w*")


def check_words(task: str, words: Sequence[str]) -> None:
    """Refuses overrides that cannot mean what they say.

    Args:
        task: the primary config: train, sample, evaluate or resumed.
        words: the overrides.

    Raises:
        OrnsteinError: says which option is meant, or which keys the chosen option has.
    """
    guides.check_words(task, words)
    _check_searches(words)
    matches = [match for match in map(_OVERRIDE.fullmatch, words) if match is not None]
    for match in matches:
        _check_dots(match)
    _check_shards(matches)
    _check_lists(matches, words)
    dotted = [match for match in matches if not match["sign"] and match["key"].partition(".")[0] in _GROUPS]
    dotted = [match for match in dotted if "." in match["key"] and "/" not in match["key"]]
    grids = [match for match in matches if match["key"] == "sampler/grid"]
    if not (dotted or grids):
        return
    chosen = [match for match in matches if (conf_dir() / match["key"]).is_dir()]
    cfg = _composed(task, [match.string for match in chosen if match["key"] != "sampler/grid"])
    if cfg is None:
        return
    for match in grids:
        if str(OmegaConf.select(cfg, "sampler._target_")).endswith(".DiffusersSampler"):
            raise OrnsteinError(
                f"{match.string}: sampler=diffusers has no grid of ours, diffusers' schedulers bring their own: leave "
                f"it out (+sampler.scheduler.use_karras_sigmas=true, say, is theirs), or name another sampler: "
                f"sampler=ddim {match.string}."
            )
    whole = _composed(task, [match.string for match in chosen]) if grids else cfg
    if whole is None:
        return
    for match in dotted:
        _check_key(match, whole)


def _check_dots(match: re.Match[str]) -> None:
    """A dot for a slash."""
    group = match["key"].replace(".", "/")
    if "." in match["key"] and _OPTION.fullmatch(match["value"]) and _options(group):
        if match["value"] in ("null", "true", "false"):
            return
        raise OrnsteinError(
            f"{match.string} sets a text where an option is meant, whose group is written with a slash: choose "
            f"{group}={match['value']}."
        )


def _check_shards(matches: Sequence[re.Match[str]]) -> None:
    """Braces of shards' names that the shell has spelled out, an override each, or that Hydra cannot read."""
    for key in ("data.urls", "data.val_urls", "data.test_urls"):
        values = [match["value"] for match in matches if match["key"] == key]
        if len(values) > 1 or any(_BRACES.fullmatch(value) for value in values):
            more = f" and {len(values) - 1} more" if len(values) > 1 else ""
            raise OrnsteinError(
                f"{key}={values[-1]}{more}: braces need quotes for the shell "
                f"and quotes for Hydra, \"{key}='/data/train-{{0000..0099}}.tar'\" say."
            )


def _check_lists(matches: Sequence[re.Match[str]], words: Sequence[str]) -> None:
    """An option that there is not, in a sweep's list: before the first of its jobs."""
    if any(word.startswith(("-cd", "--config-dir", "-cp", "--config-path", "hydra.searchpath")) for word in words):
        return  # options of one's own
    for match in matches:
        group, listed = match["key"].partition("@")[0], match["value"].split(",")
        if len(listed) < 2 or "." in group or group.startswith("hydra/") or not all(map(_OPTION.fullmatch, listed)):
            continue
        options = [path.stem for path in _options(group)]
        # A finished run's own options are called run.
        unknown = [option for option in listed if option not in (*options, "null", "run")]
        if options and unknown:
            near = get_close_matches(unknown[0], options, n=1)
            meant = f" ({near[0]}?)" if near else ""
            raise OrnsteinError(
                f"{match.string}: there is no {group}={unknown[0]}{meant}; it has {', '.join(options)}."
            )


def _check_searches(words: Sequence[str]) -> None:
    """A search without ``-m`` would be one run, and no search; each of several ranks would search for itself."""
    asked = next((word for word in words if word.startswith(("hparams_search=", "hydra/sweeper=optuna"))), None)
    shows = ("-m", "--multirun", "hydra.mode=MULTIRUN", "--cfg", "-c", "--help", "-h", "--info", "-i", "--hydra-help")
    if asked is None or asked.endswith("=null"):
        return
    if launched_elsewhere():
        raise OrnsteinError(
            f"{asked} starts the processes of its jobs itself: leave torchrun or srun out, and say trainer.devices=N."
        )
    if any(word.partition(" ")[0] in shows for word in words):
        return
    raise OrnsteinError(f"{asked} searches with -m alone: python train.py -m {asked}.")


def _check_key(match: re.Match[str], cfg: DictConfig) -> None:
    """A key that the class at its place is not configured by."""
    path, _, key = match["key"].rpartition(".")
    node: Any = OmegaConf.select(cfg, path, default=None)
    # What is not ours, or is a network of diffusers, may take keys that its file does not show: there Hydra's hint is
    # right. A node does not count keys that wait for a value (`???`) as its own; a walk through them does.
    if not isinstance(node, DictConfig) or key in list(node):
        return
    # Of these two groups the root is no class's.
    target = str(node.get("_target_", "ornstein.model" if path.split(".")[0] in ("model", "metrics") else None))
    if not target.startswith("ornstein.") or ".networks.Diffusers" in target:
        return
    group = path.replace(".", "/")
    choices = OmegaConf.select(cfg, "hydra.runtime.choices", default={})
    # A group that another option places elsewhere is listed with the place: model/network@model.network.
    option = choices.get(group) or choices.get(f"{group}@{path}", "")
    named = {"run": f"the run's own {path}", "": path}.get(option, f"{group}={option}")
    keys = [str(own) for own in node if not str(own).startswith("_")]
    others = [path.stem for path in _options(group) if key in _keys(path)]
    told = f"{match.string}: {named} has no {key}; it has {_shown(key, keys)}."
    if others:
        shown = ", ".join(others[:_MAX_OTHERS]) + (", ..." if len(others) > _MAX_OTHERS else "")
        told = f"{told[:-1]}. {group}={shown} {'have' if len(others) > 1 else 'has'} one."
    raise OrnsteinError(told)


def _shown(key: str, keys: list[str]) -> str:
    """The keys; of a long list those that look like ``key``."""
    if len(keys) <= _MAX_KEYS:
        return ", ".join(keys) or "no keys"
    near = [f"{match}, " for match in get_close_matches(key, keys, n=3, cutoff=0.5)]
    return f"{''.join(near)}{'and ' if near else ''}{len(keys) - len(near)} {'more' if near else 'others'} (--cfg job)"


def _options(group: str) -> list[Path]:
    return sorted((conf_dir() / group).glob("*.yaml"))


def _keys(path: Path) -> set[str]:
    return {str(key) for key in OmegaConf.load(path)} - {"defaults", "_target_"}


def _composed(task: str, words: list[str]) -> DictConfig | None:
    """The config of these options; None where there is none, of which Hydra tells when it is its turn."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return compose(task, overrides=words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        GlobalHydra.instance().hydra = outer
