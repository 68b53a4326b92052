"""A DataLoader of the user's own among several processes: each takes its share of what is drawn."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from vbdcompress.data.loaders import drawn_from, reload, seed_generator, set_epoch, shared_by
from vbdcompress.errors import DataError


class SharedSampler(DistributedSampler[Any]):
    """A process's share of what a sampler draws. All draw the same: by the seed and the epoch alone.

    Args:
        sampler: of examples or of batches, as a DataLoader takes it.
        seed, rank, world_size: of the fit, of this process, and number of all.
    Raises:
        DataError: it has no length.
    """

    def __init__(self, sampler: Iterable[Any], seed: int, rank: int, world_size: int) -> None:
        if not isinstance(sampler, Sized):
            told = f"draws by a {type(sampler).__name__} without a length"
            raise DataError(
                "loader",
                f"{told}: {world_size} processes can't share that.",
                "Give the sampler a __len__, or fit in one process.",
            )
        places: Any = range(len(sampler))
        super().__init__(places, num_replicas=world_size, rank=rank, shuffle=False, seed=seed)
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        seed = self.seed * 1_000_003 + self.epoch
        with drawn_from(seed):
            for part in (self.sampler, getattr(self.sampler, "sampler", None)):
                seed_generator(part, seed)
            drawn = list(self.sampler)
        return iter([drawn[place] for place in super().__iter__()])

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch."""
        super().set_epoch(epoch)
        for part in (self.sampler, getattr(self.sampler, "sampler", None)):
            set_epoch(part, epoch)


def share(loader: DataLoader[Any], seed: int, rank: int, world_size: int) -> DataLoader[Any]:
    """The loader of one process: its share of the examples or, where a sampler draws batches, of those.

    One that a DistributedSampler shares already stays as it is.

    Raises:
        DataError: the data are a stream, or the sampler has no length.
    """
    if isinstance(loader.dataset, IterableDataset):
        told = f"reads a stream, a {type(loader.dataset).__name__}"
        raise DataError(
            "loader",
            f"{told}: each of {world_size} processes would take all of it.",
            "Use a data set with an index, or one process.",
        )
    if shared_by(loader) is not None:
        return loader
    by_batches = loader.batch_size is None and loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if by_batches else loader.sampler
    shared = SharedSampler(sampler, seed, rank, world_size)
    if by_batches:
        return reload(loader, loader.dataset, batch_sampler=shared)
    order = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return reload(loader, loader.dataset, sampler=shared, **order)
