"""What each process is given of a batch: the batches are those of one process, split over all of them.

So the batch size that a loader has is the global one, and the same command on any number of processes takes the same
steps. The parts of a batch differ by one image at most; the loss of each counts by its share of the images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from planish.network.batches import cut, size_of


def bounds(count: int, parts: int, index: int) -> tuple[int, int]:
    """Where part ``index`` of ``parts`` nearly equal parts of ``count`` things begins and ends."""
    return index * count // parts, (index + 1) * count // parts


def first_parts(whole: int, processes: int, parts: int) -> list[int]:
    """How many images each process has in the first part of its share of a batch."""
    own = [stop - start for start, stop in (bounds(whole, processes, rank) for rank in range(processes))]
    return [bounds(count, parts, 0)[1] for count in own]


@dataclass(frozen=True)
class Share:
    """A part of a batch.

    Attributes:
        batch: the images of this part; where it has none, one image that does not count.
        own: how many images of this part count.
        whole: how many images the whole batch has, over all processes.
    """

    batch: Any
    own: int
    whole: int

    @classmethod
    def all_of(cls, batch: Any) -> Share:
        """The whole batch, for the only process."""
        count = size_of(batch)
        return cls(batch, count, count)

    @property
    def weight(self) -> float:
        """What the mean over this part weighs in the mean over the whole batch."""
        return self.own / max(self.whole, 1)

    def split(self, parts: int) -> list[Share]:
        """This share in so many parts, one after the other (or fewer: each has an image)."""
        parts = max(1, min(parts, self.own))
        if parts == 1:
            return [self]
        ends = [bounds(self.own, parts, index) for index in range(parts)]
        return [Share(cut(self.batch, start, stop), stop - start, self.whole) for start, stop in ends]


class _Parts:
    """A batch sampler that yields this process's part of every batch, and notes how many images it and the batch have.

    ``begin`` batches are left out, without being read.
    """

    def __init__(self, batches: Any, rank: int, processes: int, begin: int = 0) -> None:
        self.sampler, self.rank, self.processes, self.begin = batches, rank, processes, begin
        self.counts: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.begin)

    def __iter__(self) -> Iterator[list[int]]:
        counts = self.counts = deque()  # of this iteration: another may have been left in the middle
        for batch in islice(self.sampler, self.begin, None):
            start, stop = bounds(len(batch), self.processes, self.rank)
            counts.append((stop - start, len(batch)))
            yield list(batch)[start:stop] or list(batch)[:1]


class SharedLoader:
    """The batches of a loader, split over the processes; iterated, it yields a :class:`Share` for each batch.

    A stock ``DataLoader`` over a data set with indices reads only the images of its process. Of anything else (a list
    of batches, an iterable data set) every process reads all and takes its part; it must give every process the same.

    Args:
        loader: batches with a length; its batch size is that of all processes together.
    """

    def __init__(self, loader: Any, rank: int = 0, processes: int = 1) -> None:
        self.loader, self.rank, self.processes = loader, rank, processes

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Share]:
        return self.begin_at(0)

    def begin_at(self, index: int) -> Iterator[Share]:
        """The shares from a batch on; those before it are not read, where they can be told without."""
        if indexed(self.loader) and (index or self.processes > 1):
            sampler = _Parts(self.loader.batch_sampler, self.rank, self.processes, index)
            for batch in _with_sampler(self.loader, sampler):
                yield Share(batch, *sampler.counts.popleft())
            return
        for batch in islice(self.loader, index, None):
            if self.processes == 1:
                yield Share.all_of(batch)
                continue
            count = size_of(batch)
            start, stop = bounds(count, self.processes, self.rank)
            mine = cut(batch, start, stop) if stop > start else cut(batch, 0, 1)
            yield Share(mine, stop - start, count)


def indexed(loader: Iterable[Any]) -> bool:
    """Whether a loader's batches are lists of indices that can be split before anything is read."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _with_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset, batch_sampler=sampler, num_workers=loader.num_workers, collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory, timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context, generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )  # fmt: skip
