"""Reads HDF5 demonstrations of the furniture tasks, as demos/make_furniture_demos.py writes them."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5 import DatasetError, check_array, in_order, join, reading, require
from envs.furniture_mujoco import FURNITURE

DEMOS = Path(__file__).parent


def load(path: str | Path, furniture: str, max_episodes: int = 0) -> dict:
    """Reads demonstrations from data/demo_i/{actions, rewards, obs/state} of an HDF5 file.

    Takes those that assemble all pairs, at most `max_episodes` (0: all). Returns state (T, obs_dim) and
    action (T, 10), both float32, episode_ends (E,) and the file's attributes as meta.
    Raises DatasetError on anything else.
    """
    spec, path = FURNITURE[furniture], Path(path)

    def episodes(data: h5py.Group) -> Iterator[dict | None]:
        for name in in_order(data):
            demo, where = data[name], f"{path}: data/{name}"
            require(where, demo, ("actions", "rewards", "obs/state"))
            if demo["rewards"][()].sum() < len(spec.pairs):
                yield None
                continue
            action = demo["actions"][()].astype(np.float32)
            state = demo["obs/state"][()].astype(np.float32)
            check_array(f"{where}: actions", action, (len(state), 10))
            check_array(f"{where}: obs/state", state, (len(state), spec.obs_dim))
            yield {"state": state, "action": action}

    with reading(path) as file:
        meta = dict(file["data"].attrs) if "data" in file else {}
        if "furniture" not in meta:
            raise DatasetError(f"{path}: not demonstrations of a furniture task (no data/furniture)")
        if meta["furniture"] != furniture:
            raise DatasetError(f"{path}: holds {meta['furniture']}, not {furniture}")
        return join(path, episodes(file["data"]), max_episodes) | {"meta": meta}


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
        result |= {f"{name}_min": low, f"{name}_max": high}
    return result
