"""Which samples make a batch: functions of (seed, epoch, step), for any number of processes or workers."""

import functools
import signal

import numpy as np
import torch

from common import SIGNALS


@functools.lru_cache(maxsize=2)  # two, for a batch that spans epochs
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's permutation of n samples, (n,) int64, read-only."""
    permutation = np.random.default_rng([seed, epoch, n]).permutation(n)
    permutation.flags.writeable = False  # it is cached
    return permutation


def sample_at(k: int, n: int, seed: int) -> tuple[int, int]:
    """(epoch, index) of the k-th sample of the run; epochs follow each other without a gap."""
    return k // n, int(order(n, seed, k // n)[k % n])


def batches(
    n: int, seed: int, start: int, steps: int, global_batch: int, accumulation: int, world: int, rank: int
):
    """Yields this process's micro-batches, lists of (epoch, index), of steps start .. steps - 1.

    Step s takes the run's samples from s * global_batch on; accumulation and world only cut them into blocks,
    so that 1, 8 or 16 processes train on the same batches.
    """
    size = global_batch // (accumulation * world)
    assert size * accumulation * world == global_batch
    for step in range(start, steps):
        for micro in range(accumulation):
            first = step * global_batch + (micro * world + rank) * size
            yield [sample_at(k, n, seed) for k in range(first, first + size)]


def fixed_subset(n: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `limit` of n samples, the same at every call."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:limit])


def label_subset(labels, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a fraction of each class, at least one each; a function of the seed alone."""
    labels, rng, chosen = np.asarray(labels), np.random.default_rng([seed, 10]), []
    for c in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == c))
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def loader(dataset, keys, workers: int, device: torch.device) -> torch.utils.data.DataLoader:
    """Batches dataset[key] for each of the keys, loaded by `workers` processes ahead of time."""
    options = {"pin_memory": device.type == "cuda", "worker_init_fn": ignore_signals}
    options["generator"] = torch.Generator()  # of its own, which leaves torch's alone
    return torch.utils.data.DataLoader(dataset, None, sampler=keys, num_workers=workers, **options)


def ignore_signals(worker: int) -> None:
    """In a worker: the training process decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
