"""Reads HDF5 demonstrations of the furniture tasks, as demos/make_furniture_demos.py writes them."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5 import DEMOS, DatasetError, check_actions, in_order, join, numbers, reading, widen
from envs.furniture_mujoco import FURNITURE


def load(path: str | Path, furniture: str, max_episodes: int = 0) -> dict:
    """Reads demonstrations from data/demo_i/{actions, rewards, obs/state} of an HDF5 file.

    Takes those that assemble all pairs, where rewards are stored, at most `max_episodes` (0: all).
    Returns state (T, obs_dim), action (T, 10), the stage before each action (T,), and episode_ends (E,).
    """
    spec, path = FURNITURE[furniture], Path(path)

    def episodes(file: h5py.File) -> Iterator[dict | None]:
        for name in in_order(file["data"]):
            demo = f"data/{name}"
            action = numbers(path, file, f"{demo}/actions", None, 10)
            rewards = numbers(path, file, f"{demo}/rewards", len(action), optional=True)
            if rewards is not None and np.nansum(rewards) < len(spec.pairs):
                yield None
                continue
            state = numbers(path, file, f"{demo}/obs/state", len(action), spec.obs_dim)
            rewards = np.zeros(len(action)) if rewards is None else np.nan_to_num(rewards)
            yield {"state": state, "action": action, "stage": np.cumsum(rewards) - rewards}

    with reading(path) as file:
        held = file["data"].attrs.get("furniture") if "data" in file else None
        if str(held) != furniture:
            raise DatasetError(f"{path}: holds {held or 'no furniture task'}, not {furniture}")
        data = join(path, episodes(file), max_episodes)
    check_actions(path, data["action"])
    return data


def get(furniture: str, randomness: str, source: Path | None, max_episodes: int = 0) -> dict:
    """The given demonstrations, or those of the scripted assembler, made when they are first needed."""
    path = source or DEMOS / furniture / f"{randomness}.hdf5"
    if source is None and not path.exists():
        from demos.make_furniture_demos import Args, make  # only here: most runs have demonstrations
        print(f"Recording demonstrations of the scripted assembler in MuJoCo to {path} ...")
        make(Args(furniture=furniture, randomness=randomness, out=path))
    return load(path, furniture, max_episodes)


def limits(data: dict, spread: float) -> dict[str, np.ndarray]:
    """What becomes -1 and 1 in the networks: `spread` deviations from the mean, or with 0 the range."""
    result = {}
    for name, x in ("obs", data["state"]), ("action", data["action"]):
        low, high = x.min(0), x.max(0)
        if spread:
            mean, deviation = x.mean(0, dtype=float), x.std(0, dtype=float)
            low, high = mean - spread * deviation, mean + spread * deviation
        result |= widen(name, low, high)
    return result
