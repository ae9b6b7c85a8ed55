"""Training with weights, gradients, moments and averages in shards, one on each device (``trainer=fsdp``).

A shard is a ``DTensor``: a part, along its first dimension, of a tensor that no device holds whole for longer than a
block of the network needs it. Whatever is done with shards as a whole (gathering, a norm) is done by all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ornstein.networks import Experts
from ornstein.training.limits import check_limits

_UNFUSED = {"fused": False, "foreach": False}


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with FSDP2 over all processes, whose checkpoints are those of one device.

    The network's blocks (U-Net stages, DiT blocks) are sharded one by one, so that a device holds one of them whole at
    a time, and with it what averages are kept. What the network cannot share out (parameters without a dimension, those
    of a learned schedule) every device has, and their gradients are averaged. A checkpoint is loaded before the weights
    are shared out and gathered before it is written: runs go on under another strategy, and on another number of
    devices, as far as their data can. Works on CPUs (gloo) as on GPUs (nccl).

    Args:
        reshard_after_forward: give a block's weights up after its forward pass and gather them again for its backward
            pass; false keeps them in between: less to send, more memory.
        timeout_s: how long processes wait for each other, in seconds.

    Raises:
        OrnsteinError: an option that is none, or a time that is not above 0.
    """

    def __init__(self, *, reshard_after_forward: bool = True, timeout_s: float = 1800.0) -> None:
        check_limits("ShardedStrategy", reshard_after_forward=reshard_after_forward, timeout_s=timeout_s)
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout_s))
        self.reshard_after_forward = reshard_after_forward
        self._replicated: list[nn.Parameter] = []

    # ---- weights in order before shards are made of them ------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint holds whole tensors: they are taken before there are shards."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Its state comes after the shards, whole, and is shared out here."""
        return True

    def setup_environment(self) -> None:
        """Joins the processes, all of them one data-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shares the weights out, then makes the optimizer of the shards."""
        module: Any = self.lightning_module
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        networks = [module.network, *([module.evaluation_network()] if self._averages(module) else [])]
        for tensor in [*module.state_dict().values(), *networks[-1].state_dict().values()]:
            self._from_first(tensor)
        for network in networks:
            shard(network, self.device_mesh["data_parallel"], reshard_after_forward=self.reshard_after_forward)
        self.model_to_device()
        self._replicated = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        self.barrier()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        _optimizers_to_device(self.optimizers, self.root_device)

    @staticmethod
    def _averages(module: Any) -> bool:
        return module.evaluation_network() is not module.network

    def _from_first(self, tensor: Tensor) -> None:
        """All devices begin with the first one's values."""
        on_device = tensor.to(self.root_device).contiguous()
        dist.broadcast(on_device, 0)
        if on_device is not tensor:
            tensor.copy_(on_device)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """The optimizer of the shards; a fused or foreach one cannot mix them with whole tensors."""
        super().setup_optimizers(trainer)
        if self._replicated:
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group.update({name: value for name, value in _UNFUSED.items() if name in group})

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients of what every device has. Of accumulated ones the earlier part is equal already."""
        super().post_backward(closure_loss)
        for parameter in self._replicated:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    @torch.no_grad()
    def clip_gradients(self, parameters: Sequence[nn.Parameter], limit: float, *, by: str = "norm") -> None:
        """As ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` do it to whole gradients, in place."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if by == "value":
            torch._foreach_clamp_min_(list(map(local, gradients)), -limit)
            torch._foreach_clamp_max_(list(map(local, gradients)), limit)
            return
        coefficient = (limit / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(map(local, gradients)), coefficient)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names and shards; they are gathered when the checkpoint is written."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same of an optimizer, with the options that it was given."""
        state = Strategy.optimizer_state(self, optimizer)
        if not self._replicated:
            return state
        given = [{name: optimizer.defaults.get(name) for name in _UNFUSED if name in group} for group in _groups(state)]
        return state | {"param_groups": [{**group, **own} for group, own in zip(_groups(state), given, strict=True)]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Gathers every shard in it, on all ranks, and has the first one write it."""
        Strategy.save_checkpoint(self, whole(checkpoint), filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads it as it was written."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes whole weights, before they are shared out."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's share of each parameter's state."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in _groups(stored) for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            owners = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {key: shared_out(value, owners[number]) for key, value in values.items()}
                for number, values in stored["state"].items()
            }
            options = [dict(group) for group in optimizer.param_groups] if self._replicated else []
            optimizer.load_state_dict({**stored, "state": state})
            for group, own in zip(optimizer.param_groups, options, strict=False):
                group.update({name: own[name] for name in _UNFUSED if name in own})
        _optimizers_to_device(self.optimizers, self.root_device)


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


# ---- networks --------------------------------------------------------------------------------------------------------


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The parts that are sharded one by one: what the network's lists hold, the outermost, in order of their names.

    None of experts, of which every device calls those that its samples need.
    """
    found: list[nn.Module] = []
    for part in () if isinstance(network, Experts) else network.children():
        if not isinstance(part, nn.ModuleList):
            continue
        found += [block for block in part if any(p.ndim > 0 for p in block.parameters())]
    return found


def shard(network: nn.Module, mesh: Any, *, reshard_after_forward: bool = True) -> None:
    """Shares a network's parameters out over ``mesh``, in place: its blocks one by one, and what is left together.

    It is then called as ever, by all ranks or within :func:`gathered`. Parameters without a dimension stay whole.
    """
    scalars = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=scalars)
    fully_shard(network, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=scalars)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Within it a sharded network is whole on every device, so that some ranks may call it more often than others.

    All ranks must enter and leave it. Of a network that is not sharded nothing changes.
    """
    parts = [part for part in network.modules() if isinstance(part, FSDPModule)]
    kept = [_reshards(part) for part in parts]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part, value in zip(parts, kept, strict=True):
            part.set_reshard_after_forward(value, recurse=False)
            part.reshard()


def _reshards(part: FSDPModule) -> bool:
    group = part._get_fsdp_state()._fsdp_param_group
    return group is not None and bool(group._reshard_after_forward)


# ---- tensors ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part of a shard, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any) -> Any:
    """``tree`` (dicts, lists, tuples) with the whole tensors in the place of shards, on the CPU of rank zero.

    All ranks must call it with trees of one structure; the others keep their shards.
    """

    def gather(shard: DTensor) -> Tensor:
        found = shard.full_tensor()
        return found.cpu() if dist.get_rank() == 0 else shard

    with torch.no_grad():
        return tree_map_only(DTensor, gather, tree)


def shared_out(value: Any, like: Tensor) -> Any:
    """This rank's shard of a whole tensor that has the shape of ``like``, where that is a shard; else ``value``."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """A local part as the shard that it is of a whole, placed as ``like`` is; where that is no shard, the part."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, scalar; where there are shards, that of the whole, and for all ranks."""
    shards = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return torch.nn.utils.get_total_norm(gradients)
    square = torch.nn.utils.get_total_norm([local(shard) for shard in shards]).square()
    dist.all_reduce(square)
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    return (square + torch.nn.utils.get_total_norm(others).square().to(square)).sqrt()
