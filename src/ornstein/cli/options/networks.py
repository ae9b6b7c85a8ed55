"""The page of the networks: every `model=` option and every preset, with parameters and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from ornstein.cli.launch import conf_dir, register_resolvers
from ornstein.cli.options.files import Option, comment_of, options


@dataclass(frozen=True)
class Facts:
    """What a preset is counted at: what it was published for, where it was published."""

    channels: int
    size: int
    classes: int | None = 10
    outputs: int = 1
    text: int | None = None

    @property
    def told(self) -> str:
        """As the table says it."""
        classes = "" if self.classes is None else f", {self.classes:,} classes"
        text = "" if self.text is None else f", captions of width {self.text:,}"
        variance = ", learned variance" if self.outputs == 2 else ""
        return f"{self.channels}x{self.size}x{self.size}{classes}{text}{variance}"


SMALL = Facts(1, 8)
LATENTS = Facts(4, 32, 1000, outputs=2)  # ImageNet at 256x256 through Stable Diffusion's autoencoder
# By the beginning of a preset's name; the first that fits counts.
FACTS = {
    "adm_512": Facts(3, 512, 1000, outputs=2),
    "adm_256": Facts(3, 256, 1000, outputs=2),
    "adm_128": Facts(3, 128, 1000, outputs=2),
    "adm_64": Facts(3, 64, 1000, outputs=2),
    "adm": Facts(3, 256, 1000, outputs=2),
    "annotated": Facts(1, 28, None),
    "ddpmpp": Facts(3, 32, None),
    "ddpm": Facts(3, 32, None),
    "ncsnpp": Facts(3, 32, None),
    "dit_tiny": SMALL,
    "dit_text_tiny": Facts(1, 8, None, text=384),
    "dit": LATENTS,
    "edm2_tiny": SMALL,
    "edm2": Facts(4, 64, 1000),
    "edm_adm": Facts(3, 64, 1000),
    "lucidrains": Facts(3, 32, None),
    "lightningdit": Facts(32, 16, 1000),
    "pixart": Facts(4, 32, None, outputs=2, text=4096),
    "text_unet": Facts(1, 8, None, text=384),
    "tiny_unet": SMALL,
    "uvit": Facts(3, 32, None),
    "unet": Facts(3, 32),
}


def networks_page() -> str:
    """The whole page."""
    presets = options("model/network")
    lines = [
        "# Networks",
        "<!-- Written by `make docs` from conf/: change that, not this page. -->",
        "`model=` chooses a whole model (network, conditioning, codec), `model/network=` a network of another size or "
        "paper inside it, as in `python train.py model=latent_dit model/network=dit_s_2`. Every key stands with a "
        "comment in `conf/model/network/<preset>.yaml`; those of the classes behind them, with shapes and sources, in "
        "`help(ornstein.networks.UNet)`, `DiT` and `EDM2UNet`.",
        "## Models: `model=`",
        _table(
            ("model", "what it is", "network", "conditioner", "codec"),
            [_model(path) for path in sorted((conf_dir() / "model").glob("*.yaml"))],
        ),
        "## Presets: `model/network=`",
        "Parameters and multiply-adds (MACs) of one forward pass at the size that stands beside them. Papers on "
        "transformers call MACs FLOPs; everything else here counts two FLOPs a MAC. One more row in a label table than "
        "there are classes is the null class.",
        _table(
            ("preset", "what it is", "counted at", "parameters", "GMACs"),
            [(f"`{option.name}`", option.comment, *_count(option)) for option in presets],
        ),
    ]
    return "\n\n".join(lines) + "\n"


def facts_of(name: str) -> Facts:
    """What a preset is counted at."""
    return next(facts for start, facts in FACTS.items() if name.startswith(start))


def _model(path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    chosen: dict[str, str] = {}
    for entry in raw.get("defaults", []):
        if isinstance(entry, dict):
            for key, value in entry.items():
                chosen[key.removeprefix("override ").removeprefix("/").partition("@")[0].rpartition("/")[2]] = value
    parts = (chosen.get(group) for group in ("network", "conditioner", "codec"))
    return (f"`{path.stem}`", comment_of(text), *(f"`{part}`" if part else "" for part in parts))


def _count(option: Option) -> tuple[str, str, str]:
    """The facts, parameters and multiply-adds of a preset, counted on the meta device: nothing is allocated."""
    import torch
    from hydra.utils import instantiate

    from ornstein.networks import count_flops, count_parameters

    register_resolvers()
    facts = facts_of(option.name)
    config = {
        "codec": {"channels": facts.channels, "size": facts.size},
        "conditioner": {"num_classes": facts.classes, "text_dim": facts.text, "pooled_dim": facts.text},
        "objective": {"parameterization": {"outputs": facts.outputs}},
        "network": dict(option.node),
    }
    cond = {}
    with torch.device("meta"):
        network = instantiate(OmegaConf.create(config).network)
        if facts.classes is not None:
            cond["label"] = torch.zeros(1, dtype=torch.long)
        if facts.text is not None:
            cond |= {"text": torch.zeros(1, 32, facts.text), "text_mask": torch.ones(1, 32, dtype=torch.bool)}
            if option.node.get("pooled_dim") is not None:
                cond["pooled"] = torch.zeros(1, facts.text)
        x = torch.zeros(1, facts.channels, facts.size, facts.size)
        macs = count_flops(network, x, torch.zeros(1), **cond) / 2
    count = count_parameters(network)
    return facts.told, f"{count / 1e6:,.2f} M", f"{macs / 1e9:,.3f}" if macs < 1e9 else f"{macs / 1e9:,.1f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    ruled = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in ruled)
