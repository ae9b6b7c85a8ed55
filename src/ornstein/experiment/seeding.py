"""One seed for everything, and kernels that repeat themselves."""

import os


def set_determinism(seed: int, *, deterministic: bool = False) -> int:
    """Seed Python, NumPy, torch and the data workers; with ``deterministic``, also refuse kernels that do
    not repeat.

    Deterministic kernels cost speed on a GPU and little on a CPU; with them a resumed run on the same
    device equals an undisturbed one to the bit. cuBLAS reads ``CUBLAS_WORKSPACE_CONFIG`` when it is first
    used, so call this before any work on a GPU; a value already set is kept. Returns the seed.

    Raises:
        ValueError: for a seed outside [0, 2**32).
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, {2**32 - 1}], not {seed}: NumPy takes no other")
    import lightning
    import torch

    lightning.seed_everything(seed, workers=True, verbose=False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        torch.backends.cudnn.benchmark = False
    return seed
