"""Other libraries' networks as short functions of a state dict, which they fill with random weights as they run.

Each says in what order, under which names and in which layout the published code keeps its weights; the networks of
this package are compared with them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


class Weights(dict[str, Tensor]):
    """A state dict in which a layer's weights appear, random, when it is first used."""

    def get_or_draw(self, name: str, *shape: int, scale: float | None = None) -> Tensor:
        if name not in self:
            scale = math.prod(shape[1:]) ** -0.5 if scale is None else scale
            self[name] = scale * torch.randn(*shape)
        return self[name]

    def linear(self, name: str, x: Tensor, out: int, *, bias: bool = True) -> Tensor:
        return F.linear(
            x,
            self.get_or_draw(f"{name}.weight", out, x.shape[-1]),
            self.get_or_draw(f"{name}.bias", out, scale=0.3) if bias else None,
        )

    def conv(self, name: str, x: Tensor, out: int, size: int, *, bias: bool = True, **options: int) -> Tensor:
        weight = self.get_or_draw(f"{name}.weight", out, x.shape[1], *[size] * (x.ndim - 2))
        conv = F.conv2d if x.ndim == 4 else F.conv1d
        return conv(x, weight, self.get_or_draw(f"{name}.bias", out, scale=0.3) if bias else None, **options)

    def norm(self, name: str, x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
        weight = 1 + self.get_or_draw(f"{name}.weight", x.shape[1], scale=0.3)
        return F.group_norm(x, groups, weight - 1, self.get_or_draw(f"{name}.bias", x.shape[1], scale=0.3), eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, d, N) each."""
    weights = torch.einsum("bhdn,bhdm->bhnm", q, k).div(q.shape[2] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bhdm->bhdn", weights, v)


def sinusoids(t: Tensor, dim: int, *, endpoint: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (B, dim / 2) each."""
    half = dim // 2
    angles = t[:, None] * 10_000.0 ** (-torch.arange(half, dtype=t.dtype) / (half - endpoint))
    return angles.cos(), angles.sin()


def adm(
    p: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    *,
    base: int = 32,
    mults: tuple[float, ...] = (1, 2),
    blocks: int = 1,
    attending: tuple[int, ...] = (1,),
    head_dim: int = 16,
    legacy: bool = True,
    residual: bool = True,
    scale_shift: bool = True,
    out: int = 6,
) -> Tensor:
    """guided-diffusion's ``UNetModel`` (Dhariwal & Nichol 2021)."""
    emb = p.linear("time_embed.0", torch.cat(sinusoids(t, base), dim=-1), 4 * base)
    emb = p.linear("time_embed.2", F.silu(emb), 4 * base)
    if y is not None:
        emb = emb + p.get_or_draw("label_emb.weight", 10, 4 * base)[y]

    def resnet(name: str, h: Tensor, width: int, change: float | None = None) -> Tensor:
        skip, h = h, F.silu(p.norm(f"{name}.in_layers.0", h, 32))
        if change is not None:
            skip, h = (resampled(each, change) for each in (skip, h))
        h = p.conv(f"{name}.in_layers.2", h, width, 3, padding=1)
        condition = p.linear(f"{name}.emb_layers.1", F.silu(emb), (1 + scale_shift) * width)[..., None, None]
        if scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = p.norm(f"{name}.out_layers.0", h, 32) * (1 + scale) + shift
        else:
            h = p.norm(f"{name}.out_layers.0", h + condition, 32)
        h = p.conv(f"{name}.out_layers.3", F.silu(h), width, 3, padding=1)
        return h + (skip if skip.shape[1] == width else p.conv(f"{name}.skip_connection", skip, width, 1))

    def resampled(h: Tensor, change: float) -> Tensor:
        return F.avg_pool2d(h, 2) if change < 1 else h.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def attend(name: str, h: Tensor) -> Tensor:
        flat = h.flatten(2)
        heads = h.shape[1] // head_dim
        qkv = p.conv(f"{name}.qkv", p.norm(f"{name}.norm", flat, 32), 3 * h.shape[1], 1)
        qkv = qkv.unflatten(1, (heads, 3, head_dim)) if legacy else qkv.unflatten(1, (3, heads, head_dim))
        q, k, v = qkv.unbind(2 if legacy else 1)
        return (flat + p.conv(f"{name}.proj_out", attention(q, k, v).flatten(1, 2), h.shape[1], 1)).view_as(h)

    h = p.conv("input_blocks.0.0", x, int(base * mults[0]), 3, padding=1)
    skips, n = [h], 1
    for level, mult in enumerate(mults):
        width = int(base * mult)
        for _ in range(blocks):
            h = resnet(f"input_blocks.{n}.0", h, width)
            h = attend(f"input_blocks.{n}.1", h) if level in attending else h
            skips.append(h)
            n += 1
        if level < len(mults) - 1:
            name = f"input_blocks.{n}.0"
            h = resnet(name, h, width, 0.5) if residual else p.conv(f"{name}.op", h, width, 3, stride=2, padding=1)
            skips.append(h)
            n += 1
    h = resnet("middle_block.2", attend("middle_block.1", resnet("middle_block.0", h, width)), width)
    n = 0
    for level, mult in reversed(list(enumerate(mults))):
        width = int(base * mult)
        for i in range(blocks + 1):
            h = resnet(f"output_blocks.{n}.0", torch.cat([h, skips.pop()], dim=1), width)
            h = attend(f"output_blocks.{n}.1", h) if level in attending else h
            if level and i == blocks:
                name = f"output_blocks.{n}.{1 + (level in attending)}"
                h = (
                    resnet(name, h, width, 2.0)
                    if residual
                    else p.conv(f"{name}.conv", resampled(h, 2.0), width, 3, padding=1)
                )
            n += 1
    return p.conv("out.2", F.silu(p.norm("out.0", h, 32)), out, 3, padding=1)


def edm(
    p: Weights,
    x: Tensor,
    c_noise: Tensor,
    y: Tensor | None,
    *,
    kind: str,
    base: int = 32,
    mults: tuple[int, ...] = (1, 2),
    blocks: int = 1,
    attending: tuple[int, ...] = (8,),
    augment: Tensor | None = None,
) -> Tensor:
    """NVlabs/edm's ``SongUNet`` (kind ddpmpp or ncsnpp) and ``DhariwalUNet`` (kind adm)."""
    song, ncsn = kind != "adm", kind == "ncsnpp"
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if ncsn else [1.0, 1.0])
    kernel = taps.outer(taps) / taps.sum() ** 2
    edge = (len(taps) - 1) // 2
    eps, gain = (1e-6, 0.5**0.5) if song else (1e-5, 1.0)

    def down(h: Tensor, padding: int = edge) -> Tensor:
        return F.conv2d(h, kernel.expand(h.shape[1], 1, -1, -1), stride=2, padding=padding, groups=h.shape[1])

    def up(h: Tensor) -> Tensor:
        tiled = (4 * kernel).expand(h.shape[1], 1, -1, -1)
        return F.conv_transpose2d(h, tiled, stride=2, padding=edge, groups=h.shape[1])

    def norm(name: str, h: Tensor) -> Tensor:
        return p.norm(name, h, min(32, h.shape[1] // 4), eps)

    if ncsn:
        angles = c_noise[:, None] * 2 * math.pi * p.get_or_draw("map_noise.freqs", base, scale=16)
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
    else:
        cos, sin = sinusoids(c_noise, base, endpoint=song)
        features = torch.cat([sin, cos] if song else [cos, sin], dim=1)
    onehot = None if y is None else F.one_hot(y, 11)[:, :10].float()
    if song and onehot is not None:
        features = features + p.linear("map_label", onehot * 10**0.5, features.shape[1])
    if augment is not None:
        features = features + p.linear("map_augment", augment, features.shape[1], bias=False)
    emb = p.linear("map_layer1", F.silu(p.linear("map_layer0", features, 4 * base)), 4 * base)
    if not song and onehot is not None:
        emb = emb + p.linear("map_label", onehot, 4 * base, bias=False)
    emb = F.silu(emb)

    def block(name: str, h: Tensor, width: int, change: str = "", attend: bool = False) -> Tensor:
        change_of = {"": lambda each: each, "down": down, "up": up}[change]
        if change:
            p[f"{name}.conv0.resample_filter"] = kernel[None, None]
        skip, h = change_of(h), change_of(F.silu(norm(f"{name}.norm0", h)))
        h = p.conv(f"{name}.conv0", h, width, 3, padding=1)
        condition = p.linear(f"{name}.affine", emb, width * (1 if song else 2))[..., None, None]
        if song:
            h = F.silu(norm(f"{name}.norm1", h + condition))
        else:
            scale, shift = condition.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, norm(f"{name}.norm1", h), scale + 1))
        h = p.conv(f"{name}.conv1", h, width, 3, padding=1)
        if skip.shape[1] != width or (change and song):
            skip = p.conv(f"{name}.skip", skip, width, 1)
        h = (h + skip) * gain
        if not attend:
            return h
        heads = 1 if song else width // 64
        qkv = p.conv(f"{name}.qkv", norm(f"{name}.norm2", h), 3 * width, 1)
        q, k, v = qkv.flatten(2).unflatten(1, (heads, width // heads, 3)).unbind(3)
        return (p.conv(f"{name}.proj", attention(q, k, v).flatten(1, 2).view_as(h), width, 1) + h) * gain

    channels, size = x.shape[1:3]
    h = p.conv(f"enc.{size}x{size}_conv", x, base if song else base * mults[0], 3, padding=1)
    skips, joined = [h], x
    for level, mult in enumerate(mults):
        name, width = f"enc.{size >> level}x{size >> level}", base * mult
        if level:
            h = block(f"{name}_down", h, h.shape[1], "down")
            if ncsn:
                p[f"{name}_aux_residual.resample_filter"] = kernel[None, None]
                joined = down(p.conv(f"{name}_aux_residual", joined, h.shape[1], 3, padding=1 + edge), padding=0)
                h = joined = (h + joined) / 2**0.5
            skips.append(h)
        for i in range(blocks):
            h = block(f"{name}_block{i}", h, width, attend=size >> level in attending)
            skips.append(h)
    for level, mult in reversed(list(enumerate(mults))):
        name, width, attends = f"dec.{size >> level}x{size >> level}", base * mult, size >> level in attending
        if level == len(mults) - 1:
            h = block(f"{name}_in1", block(f"{name}_in0", h, width, attend=True), width)
        else:
            h = block(f"{name}_up", h, h.shape[1], "up")
        for i in range(blocks + 1):
            attend = attends and (i == blocks or not song)
            h = block(f"{name}_block{i}", torch.cat([h, skips.pop()], dim=1), width, attend=attend)
    last = (f"{name}_aux_norm", f"{name}_aux_conv") if song else ("out_norm", "out_conv")
    return p.conv(last[1], F.silu(norm(last[0], h)), channels, 3, padding=1)


def lucidrains(
    p: Weights,
    x: Tensor,
    t: Tensor,
    *,
    dim: int = 8,
    mults: tuple[int, ...] = (1, 2),
    stem: int | None = None,
    full: tuple[int, ...] = (1,),
    heads: int = 2,
    head_dim: int = 4,
    out: int | None = None,
) -> Tensor:
    """denoising-diffusion-pytorch's ``Unet``."""
    cos, sin = sinusoids(t, dim, endpoint=True)
    emb = p.linear("time_mlp.1", torch.cat([sin, cos], dim=1), 4 * dim)
    emb = F.silu(p.linear("time_mlp.3", F.gelu(emb), 4 * dim))

    def rms(name: str, h: Tensor) -> Tensor:
        return F.normalize(h, dim=1) * h.shape[1] ** 0.5 * p.get_or_draw(f"{name}.g", 1, h.shape[1], 1, 1)

    def block(name: str, h: Tensor, width: int) -> Tensor:
        scale, shift = p.linear(f"{name}.mlp.1", emb, 2 * width)[..., None, None].chunk(2, dim=1)
        y = rms(f"{name}.block1.norm", p.conv(f"{name}.block1.proj", h, width, 3, padding=1))
        y = p.conv(f"{name}.block2.proj", F.silu(y * (scale + 1) + shift), width, 3, padding=1)
        skip = h if h.shape[1] == width else p.conv(f"{name}.res_conv", h, width, 1)
        return F.silu(rms(f"{name}.block2.norm", y)) + skip

    def attend(name: str, h: Tensor, is_full: bool) -> Tensor:
        qkv = p.conv(f"{name}.to_qkv", rms(f"{name}.norm", h), 3 * heads * head_dim, 1, bias=False)
        q, k, v = qkv.flatten(2).unflatten(1, (3, heads, head_dim)).unbind(1)
        shape = (2, heads, 4, head_dim) if is_full else (2, heads, head_dim, 4)
        memory = p.get_or_draw(f"{name}.mem_kv", *shape, scale=1.0)
        memory = (memory.mT if is_full else memory)[:, None].expand(-1, len(h), -1, -1, -1)
        k, v = torch.cat([memory[0], k], dim=-1), torch.cat([memory[1], v], dim=-1)
        if is_full:
            y = attention(q, k, v)
        else:
            context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
            y = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * head_dim**-0.5)
        y = y.flatten(1, 2).unflatten(2, h.shape[2:])
        if is_full:
            return h + p.conv(f"{name}.to_out", y, h.shape[1], 1)
        return h + rms(f"{name}.to_out.1", p.conv(f"{name}.to_out.0", y, h.shape[1], 1))

    widths = [dim if stem is None else stem, *(dim * mult for mult in mults)]
    h = first = p.conv("init_conv", x, widths[0], 7, padding=3)
    skips = []
    for i, (narrow, wide) in enumerate(pairwise(widths)):
        h = block(f"downs.{i}.0", h, narrow)
        skips.append(h)
        h = attend(f"downs.{i}.2", block(f"downs.{i}.1", h, narrow), i in full)
        skips.append(h)
        if i < len(mults) - 1:
            h = p.conv(f"downs.{i}.3.1", F.pixel_unshuffle(h, 2), wide, 1)
        else:
            h = p.conv(f"downs.{i}.3", h, wide, 3, padding=1)
    h = attend("mid_attn", block("mid_block1", h, widths[-1]), True)
    h = block("mid_block2", h, widths[-1])
    for i in range(len(mults)):
        narrow, wide = widths[-2 - i], widths[-1 - i]
        h = block(f"ups.{i}.0", torch.cat([h, skips.pop()], dim=1), wide)
        h = block(f"ups.{i}.1", torch.cat([h, skips.pop()], dim=1), wide)
        h = attend(f"ups.{i}.2", h, len(mults) - 1 - i in full)
        if i < len(mults) - 1:
            h = p.conv(f"ups.{i}.3.1", F.interpolate(h, scale_factor=2.0), narrow, 3, padding=1)
        else:
            h = p.conv(f"ups.{i}.3", h, narrow, 3, padding=1)
    h = block("final_res_block", torch.cat([h, first], dim=1), widths[0])
    return p.conv("final_conv", h, x.shape[1] if out is None else out, 1)
