"""What all demonstrations share: one kind of error, safe files, checks and scaling of their numbers."""

import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from common.checkpoints import require_memory

DEMOS = Path(__file__).parent
PACKED = 1100  # gzip makes numbers at most 1032 times smaller
SMALL = 2**26  # bytes that any file may claim
LARGEST = 1e9  # an observation or an action beyond it is a flipped bit
OUTSIDE = 1e-3  # by which rounding may carry an action out of the environment's box
CONSTANT = 0.01  # share of the usual range below which a dimension counts as constant
WIDENED = 0.1  # share of the usual range that it is given instead


class DatasetError(SystemExit):
    """Demonstrations that cannot be used; the message says why, in one line."""

    def __init__(self, text: str):
        super().__init__(" ".join(text.splitlines()))


@contextmanager
def parsing(path: Path, kind: str):
    """Raises DatasetError where `path` is no file, and where a library cannot read it."""
    if not os.path.isfile(path):
        reason = "a folder, a pipe or a device" if os.path.exists(path) else "no such file"
        raise DatasetError(f"{path}: cannot be read, {reason}")
    try:
        yield
    except MemoryError:
        raise  # no fault of the file
    except Exception as error:  # of many types, on damaged files
        reason = f"{type(error).__name__}: {error}"
        if "pickle" in reason:  # NumPy says how to load it
            reason = "pickled objects are never loaded"
        raise DatasetError(f"{path}: damaged, truncated or not {kind} ({reason})") from error


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """The open HDF5 file; raises DatasetError where it is missing or damaged."""
    with parsing(path, "HDF5"):
        check_heaps(path)
        with h5py.File(path, "r") as file:
            yield file


def check_heaps(path: Path):
    """Refuses heaps of texts with free space of size 0, as of flipped bits: HDF5 never gets past it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for heap in re.finditer(rb"GCOL.{4}(.{8})", data, re.DOTALL):
            at, end = heap.end(), heap.start() + int.from_bytes(heap[1], "little")
            while at + 16 <= min(end, len(data)):
                index, size = struct.unpack_from("<H6xQ", data, at)
                if index == size == 0:
                    raise DatasetError(f"{path}: damaged, its heap of texts has no end")
                at += 16 + (size + 7) // 8 * 8 if index else size


def check_size(what: str, size: int, path: Path):
    """Raises DatasetError where a file cannot hold `size` bytes, or the memory cannot."""
    held = os.path.getsize(path)
    if size > max(SMALL, PACKED * held):
        raise DatasetError(f"{what} claims {size / 2**30:.3g} GiB in {held} bytes: the file is damaged")
    require_memory(size, "cpu", what)


def numbers(path: Path, file: Mapping, name: str, *shape, dtype=np.float32, optional=False, hint=""):
    """An array of this shape, None being any length. `optional`: it may lack, or contain NaN."""
    where, wanted = f"{path}: {name}", np.dtype(dtype)
    if name not in file:
        if optional:
            return None
        raise DatasetError(f"{path}: lacks {name}{hint}")
    data = file[name]
    held = getattr(data, "shape", None) or ()  # a group has none
    fits = len(held) == len(shape) and 0 not in held
    if not fits or any(w not in (None, h) for h, w in zip(held, shape, strict=True)):
        raise DatasetError(f"{where} {held} should be {shape}{hint}".replace("None", "any"))
    if data.dtype != wanted and not (wanted.kind == "f" and data.dtype.kind in "fiub"):
        raise DatasetError(f"{where} holds {data.dtype}, not {wanted}{hint}")
    check_size(where, data.size * (data.dtype.itemsize + wanted.itemsize), path)
    with np.errstate(over="ignore", invalid="ignore"):
        value = data[()].astype(wanted)
    if not optional and wanted.kind == "f" and not (np.abs(value) <= LARGEST).all():
        step = np.argwhere(~(np.abs(value) <= LARGEST))[0][0]
        raise DatasetError(f"{where} contains NaN, Inf or more than {LARGEST:g}, first at step {step}")
    return value


def in_order(names: Iterable[str]) -> list[str]:
    """demo_0, demo_1, ..., demo_10 by their numbers; names without one come first."""
    return sorted(names, key=lambda name: (int("0" + re.search("[0-9]*$", name)[0]), name))


def join(path: Path, episodes: Iterable[dict | None], max_episodes: int = 0) -> dict:
    """Joins episodes {name: (T, ...)}, at most `max_episodes` (0: all); a failed one is None."""
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
    check_size(f"{path}: it", sum(value.nbytes for episode in taken for value in episode.values()), path)
    arrays = {name: np.concatenate([episode[name] for episode in taken]) for name in taken[0]}
    return arrays | {"episode_ends": np.cumsum([len(episode["action"]) for episode in taken])}


def check_actions(path: Path, action: np.ndarray, low=-1.0, high=1.0):
    """Raises DatasetError where actions (T, dim) leave the box of the environment."""
    outside = np.maximum(low - action, action - high)
    step, dim = np.unravel_index(outside.argmax(), outside.shape)
    if outside[step, dim] > OUTSIDE:
        found = f"an action is {action[step, dim]:.4g} in dimension {dim}, outside the environment's box"
        raise DatasetError(f"{path}: {found}: absolute poses, or unclipped? Convert or clip them.")


def widen(name: str, low: np.ndarray, high: np.ndarray) -> dict[str, np.ndarray]:
    """Limits name_min and name_max (dim,), wider where the data hardly vary: RL must reach beyond."""
    span = high - low
    usual = np.median(span[span > 0]) if span.any() else np.abs(high).max() or 1.0
    constant = span < CONSTANT * usual
    if constant.any():
        middle, half = (low + high) / 2, WIDENED * usual / 2
        low = np.where(constant, middle - half, low).astype(low.dtype)
        high = np.where(constant, middle + half, high).astype(high.dtype)
        where = ", ".join(map(str, np.flatnonzero(constant)))
        print(f"{name} {where} hardly varies in the demonstrations: its range is set to {2 * half:.3g}.")
    return {f"{name}_min": low, f"{name}_max": high}


@contextmanager
def replacing(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to write, in memory until it is complete: a full disk would crash HDF5."""
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")  # two may write at once
    memory = dict(driver="core", backing_store=False, libver=("v110", "v110"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError("it is a folder")
        with open(partial, "xb") as disk, h5py.File(partial, "w", **memory) as file:
            yield file
            file.flush()
            disk.write(file.id.get_file_image())
        partial.replace(path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror or error})") from error
    except KeyboardInterrupt:
        raise SystemExit(f"{path}: interrupted, nothing was written.") from None
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
