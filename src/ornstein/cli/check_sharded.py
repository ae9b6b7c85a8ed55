"""Several machines, and what ``trainer=fsdp`` cannot train, told before anything is built."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.autoencoder import trains_autoencoder
from ornstein.errors import OrnsteinError

_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
_SHORT = ("32", "bf16")


def check_sharded(cfg: DictConfig) -> None:
    """An autoencoder, a compiled network and precisions that need a gradient scaler go without shards.

    Raises:
        OrnsteinError: names the options and a way out.
    """
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise OrnsteinError(f"trainer.num_nodes={nodes} must be a whole number, at least 1: so many machines.")
    if not str(OmegaConf.select(cfg, "trainer.strategy._target_", default="")).endswith(".ShardedStrategy"):
        return
    from ornstein.training.limits import check_limits

    check_limits("ShardedStrategy", **{str(key): value for key, value in cfg.trainer.strategy.items()})
    way_out = "choose trainer=default trainer.strategy=ddp"
    if trains_autoencoder(cfg):
        raise OrnsteinError(f"trainer=fsdp shards a denoiser, and model= trains an autoencoder: {way_out}.")
    if cfg.model.get("compile"):
        raise OrnsteinError(
            "trainer=fsdp and model.compile=true: a graph over the whole network cannot gather its blocks one by one; "
            f"set model.compile=false, or {way_out}."
        )
    if str(cfg.trainer.precision) not in (*_PRECISIONS, *_SHORT):
        raise OrnsteinError(
            f"trainer.precision={cfg.trainer.precision} does not go with trainer=fsdp: choose one of "
            f"{', '.join(_PRECISIONS)}, or {way_out[7:]}."
        )
