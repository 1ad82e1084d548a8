from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from planish.data import make_loader
from planish.training.engine import begin_epoch
from planish.training.shares import Share, SharedLoader, bounds, first_parts

DATA = TensorDataset(torch.arange(23.0)[:, None], torch.arange(23))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([DATA[i] for i in range(23)])

    def __len__(self):
        return 23


class Own(DataLoader):
    """One with ways of its own, which must be kept."""

    def __iter__(self):
        return iter([[images + 100, labels] for images, labels in super().__iter__()])


LOADERS = {
    "stock": lambda: DataLoader(DATA, 5),
    "shuffled": lambda: DataLoader(DATA, 5, shuffle=True),
    "workers": lambda: DataLoader(DATA, 5, shuffle=True, num_workers=1, generator=torch.Generator()),
    "planish": lambda: make_loader(DATA, 5, shuffle=True, seed=3),
    "stream": lambda: DataLoader(Stream(), 5),
    "own": lambda: Own(DATA, 5),
    "list": lambda: list(DataLoader(DATA, 5)),
}


def images_of(shares):
    """The images that count."""
    return [share.batch[0][: share.own, 0].tolist() for share in shares]


def epoch_of(kind, epoch, rank, processes, begin=0):
    loader = SharedLoader(LOADERS[kind](), rank, processes)
    begin_epoch(loader, epoch, seed=0)
    return list(loader.begin_at(begin))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("begin", [0, 2])
def test_the_parts_of_all_processes_are_the_batches_of_one(kind, begin):
    for epoch in (0, 1) if kind != "workers" else (0,):
        alone = epoch_of(kind, epoch, 0, 1, begin)
        together = [epoch_of(kind, epoch, rank, 4, begin) for rank in range(4)]
        assert [list(chain(*parts)) for parts in zip(*map(images_of, together), strict=True)] == images_of(alone)
        assert [share.whole for share in alone] == [5, 5, 5, 5, 3][begin:]
        for shares in together:
            assert [share.whole for share in shares] == [share.whole for share in alone]
            assert all(len(share.batch[0]) == max(1, share.own) for share in shares)
    assert len(alone) + begin == len(SharedLoader(LOADERS[kind]()))


def test_what_is_not_of_this_process_is_not_read():
    class Counted(TensorDataset):
        read = 0

        def __getitem__(self, index):
            type(self).read += 1
            return super().__getitem__(index)

    loader = SharedLoader(DataLoader(Counted(*DATA.tensors), 5), rank=1, processes=2)
    assert len(list(loader)) == 5
    assert Counted.read == sum(share.own for share in loader) == 14
    Counted.read = 0
    list(loader.begin_at(3))
    assert Counted.read == 5


def test_an_iteration_that_was_left_does_not_disturb_the_next():
    loader = SharedLoader(DataLoader(DATA, 5, num_workers=1), rank=0, processes=2)
    next(iter(loader))
    assert [share.own for share in loader] == [2, 2, 2, 2, 1]


@given(st.integers(0, 50), st.integers(1, 9))
def test_parts_are_nearly_equal_and_cover_everything(count, parts):
    ends = [bounds(count, parts, index) for index in range(parts)]
    assert [*range(count)] == [i for start, stop in ends for i in range(start, stop)]
    sizes = [stop - start for start, stop in ends]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_the_parts_of_a_share_weigh_as_much_as_their_images(whole, processes, accumulation):
    parts = min(accumulation, max(1, whole // processes))
    weights, first = [], []
    for rank in range(processes):
        start, stop = bounds(whole, processes, rank)
        share = Share(torch.zeros(max(1, stop - start), 2), stop - start, whole)
        split = share.split(parts)
        assert len(split) == parts
        first.append(split[0].own)
        weights += [part.weight for part in split]
    assert sum(weights) == pytest.approx(1)
    assert first_parts(whole, processes, parts) == first


def test_a_share_is_split_like_its_batch():
    share = Share({"pixels": torch.arange(5), "labels": torch.arange(5)}, 5, 10)
    first, second = share.split(2)
    assert first.batch["pixels"].tolist() == first.batch["labels"].tolist() == [0, 1]
    assert (second.own, second.weight) == (3, 0.3)
    assert share.split(1) == [share]
    assert [part.own for part in share.split(9)] == [1] * 5
    assert Share.all_of((torch.zeros(4, 1), torch.zeros(4))).weight == 1
