"""Networks in shards beside the same ones whole, in two processes under torchrun (test_sharding.py)."""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
from conftest import NETWORKS, batch, perturb

from ornstein.networks import Experts
from ornstein.training.sharding import ShardedStrategy, gathered, local, shard, total_norm, whole

STEPS, LIMIT = 2, 0.05
# One of each kind of block and of parameter; others differ from these within a block.
KINDS = ("unet_ddpmpp", "lucidrains", "dit_single", "dit_uvit", "edm2")
MADE: dict[str, Any] = {name: partial(NETWORKS[name][0], 3, num_classes=10) for name in KINDS}
MADE["experts"] = lambda: Experts(MADE["dit_single"], num_experts=2)


def strategy(shares: nn.Module, optimizer: torch.optim.Optimizer) -> ShardedStrategy:
    """One that has joined the processes and shared a network out, without a trainer."""
    made = ShardedStrategy()
    made.cluster_environment = TorchElasticEnvironment()
    made.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    made.optimizers = [optimizer]
    made._replicated = [p for p in shares.parameters() if not isinstance(p, DTensor)]
    return made


def compare(name: str, mesh: Any) -> dict[str, float]:
    """How far weights, norms and outputs are from those of the whole network after some clipped steps, relatively.

    The whole one sees all four images at once; each process's shards see two of them, one after the other.
    """
    torch.manual_seed(0)
    together = perturb(MADE[name]()).train()
    began = {key: value.clone() for key, value in together.state_dict().items()}
    shares = copy.deepcopy(together)
    shard(shares, mesh)
    rank = dist.get_rank()
    # Adam divides a gradient that is nearly zero by itself, rounding included; momentum does not.
    adam, momentum = partial(torch.optim.AdamW, lr=1e-3, fused=True), partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    kind = adam if name == "experts" else momentum
    first, second = (kind(network.parameters()) for network in (together, shares))
    own, norms = strategy(shares, second), []
    for step in range(STEPS):
        torch.manual_seed(step)
        (x, noise_cond), given = batch(3, 8, size=4)
        target = torch.randn(4, 3, 8, 8)
        first.zero_grad()
        (together(x, noise_cond, **given) - target).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(together.parameters(), LIMIT)
        first.step()
        second.zero_grad()
        for row in (2 * rank, 2 * rank + 1):
            part = slice(row, row + 1)
            mine = {key: value[part] for key, value in given.items()}
            loss = (shares(x[part], noise_cond[part], **mine) - target[part]).square().mean() / 2
            loss.backward()
            own.post_backward(loss)
        norms.append(abs(float(total_norm([p.grad for p in shares.parameters() if p.grad is not None]) / norm) - 1))
        own.clip_gradients(list(shares.parameters()), LIMIT)
        second.step()
    found, facts = whole(shares.state_dict()), {"norm": max(norms)}
    if rank == 0:
        expected = together.state_dict()
        assert list(found) == list(expected)
        moved = max(float((expected[key] - value).abs().max()) for key, value in began.items())
        facts |= {"weights": max(float((found[k] - value).abs().max()) for k, value in expected.items()) / moved}
    with gathered(shares), torch.no_grad():
        if rank == 0:  # alone
            outputs = [net.eval()(x, noise_cond, **given) for net in (shares, together, shares)]
            facts["outputs"] = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
            assert torch.equal(outputs[0], outputs[2])
    assert any(isinstance(p, DTensor) for p in shares.parameters())
    check_state(own, second, first)
    second.step()
    return facts


def check_state(own: ShardedStrategy, sharded: torch.optim.Optimizer, plain: torch.optim.Optimizer) -> None:
    """Of an optimizer of shards the state is saved as that of whole tensors, and comes back to the bit."""
    saved = [copy.deepcopy(whole(own.optimizer_state(sharded)))]
    dist.broadcast_object_list(saved)
    layouts = [
        {number: {key: value.shape for key, value in values.items()} for number, values in state["state"].items()}
        for state in (saved[0], plain.state_dict())
    ]
    assert layouts[0] == layouts[1] and saved[0]["param_groups"] == plain.state_dict()["param_groups"]
    kept = [local(value).clone() for values in sharded.state.values() for value in values.values()]
    for values in sharded.state.values():
        for value in values.values():
            local(value).zero_()
    own.load_optimizer_state_dict({"optimizer_states": saved})
    back = [local(value) for values in sharded.state.values() for value in values.values()]
    assert all(torch.equal(one, other) for one, other in zip(kept, back, strict=True))


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    facts = {name: compare(name, mesh) for name in MADE}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
