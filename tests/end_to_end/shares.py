"""What one of several processes does in test_invariance.py; a module of its own, so that they can import it."""

from __future__ import annotations

import hashlib
from typing import Any

from ornstein.cli.ranks import Ranks


def drawn_noise(ranks: Ranks, run: str, count: int, batch_size: int) -> list[tuple[int, int | None, str]]:
    """(number, label, hash of the noise of every step) of each sample, from all processes in order of rank."""
    import ornstein

    loaded = ornstein.load(run, device="cpu")
    share = ranks.share(count)
    noise: list[Any] = []

    def watch(step: int, state: Any) -> None:
        if step == 0:
            noise.append([])
        noise[-1].append(state.noise(step).numpy().copy())

    told: list[tuple[int, int | None, str]] = []
    for batch in loaded.module.generate(share, seed=3, batch_size=batch_size, watch=watch):
        for place, number in enumerate(batch.index.tolist()):
            digest = hashlib.sha256(b"".join(step[place].tobytes() for step in noise[-1])).hexdigest()
            told.append((number, None if batch.labels is None else int(batch.labels[place]), digest))
    return [each for part in ranks.gather(told) for each in part]


def refuse(ranks: Ranks) -> None:
    """Fails as a user's mistake does, on every process."""
    from ornstein.errors import OrnsteinError

    raise OrnsteinError("sampler=x cannot: choose y.")
