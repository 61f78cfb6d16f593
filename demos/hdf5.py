"""What the readers of demonstrations share: one kind of error, and safe reading of HDF5."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np


class DatasetError(SystemExit):
    """A file of demonstrations that cannot be used; the message says why, in one line."""


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """The open HDF5 file; raises DatasetError where it is missing or damaged."""
    if not path.exists():
        raise DatasetError(f"{path}: cannot be read, no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be read as HDF5, is it truncated? ({error})") from error


def require(where: str, container: Container[str], keys: Iterable[str], hint: str = ""):
    """Raises DatasetError unless `container` has all keys."""
    missing = [key for key in keys if key not in container]
    if missing:
        raise DatasetError(f"{where} lacks {', '.join(missing)}{hint}")


def check_array(what: str, value: np.ndarray, shape: tuple | None = None):
    """Raises DatasetError where the shape is another one, or a number is NaN or Inf."""
    if shape is not None and value.shape != shape:
        raise DatasetError(f"{what} {value.shape} should be {shape}")
    bad = np.argwhere(~np.isfinite(value))
    if len(bad):
        raise DatasetError(f"{what} contain NaN or Inf, first at step {bad[0][0]}")


def in_order(names: Iterable[str]) -> list[str]:
    """demo_0, demo_1, ..., demo_10 by their numbers."""
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def join(path: Path, episodes: Iterable[dict | None], max_episodes: int) -> dict:
    """Concatenates episodes {name: (T, ...)}, at most `max_episodes` (0: all); None is a failed one.

    Returns the arrays and episode_ends (E,), one past each last step. Raises DatasetError if all failed.
    """
    taken, failed = [], 0
    for episode in episodes:
        if episode is None:
            failed += 1
            continue
        taken.append(episode)
        if len(taken) == max_episodes:
            break
    if not taken:
        raise DatasetError(f"{path}: no successful demonstration ({failed} failed)")
    arrays = {name: np.concatenate([episode[name] for episode in taken]) for name in taken[0]}
    return arrays | {"episode_ends": np.cumsum([len(episode["action"]) for episode in taken])}
