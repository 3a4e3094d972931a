"""data/sampling.py: which samples make a batch depends on nothing but the seed and the step."""

from itertools import chain

import numpy as np
import pytest
import torch

from data.sampling import batches, fixed_subset, label_subset, loader, sample_at


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own():
    epochs = [[sample_at(k, 10, seed=3) for k in range(10 * e, 10 * e + 10)] for e in range(3)]
    for e, samples in enumerate(epochs):
        assert sorted(samples) == [(e, i) for i in range(10)]
    orders = [[i for _, i in samples] for samples in epochs] + [
        [sample_at(k, 10, seed=4)[1] for k in range(10)]
    ]
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("accumulation, world", [(1, 1), (3, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_only_cut_a_batch_into_blocks(accumulation, world):
    """Batches of 12 from 10 samples, resumed at step 2: together they are samples 24 to 59 of the run."""
    ranks = [list(batches(10, 0, 2, 5, 12, accumulation, world, rank)) for rank in range(world)]
    assert all(len(parts) == 3 * accumulation for parts in ranks)
    seen = list(chain(*(part for parts in zip(*ranks) for part in parts)))
    assert seen == [sample_at(k, 10, 0) for k in range(24, 60)]


def test_a_fraction_of_the_labels_is_one_of_each_class():
    labels = np.array([0] * 40 + [1] * 20 + [2] * 2)
    chosen = label_subset(labels, 0.25, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1] and sorted(set(chosen)) == chosen.tolist()
    assert np.array_equal(chosen, label_subset(labels, 0.25, 0))
    assert not np.array_equal(chosen, label_subset(labels, 0.25, 1))
    assert label_subset(labels, 1.0, 0).tolist() == list(range(62))


def test_a_fixed_subset_is_sorted_random_and_the_same_at_every_call():
    chosen = fixed_subset(100, 10, 0)
    assert sorted(set(chosen)) == chosen.tolist() == fixed_subset(100, 10, 0).tolist() != list(range(10))
    assert fixed_subset(5, 10, 0).tolist() == [0, 1, 2, 3, 4]


class Squares(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return {"x": torch.tensor(key) ** 2, "skipped": []}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_takes_keys_in_order_and_leaves_random_numbers_alone(workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keys = ([k, k + 1] for k in range(5))
    loaded = loader(Squares(), keys, workers, torch.device("cpu"))
    assert [batch["x"].tolist() for batch in loaded] == [[k * k, (k + 1) ** 2] for k in range(5)]
    assert torch.equal(torch.rand(3), expected)
