"""Reads HDF5 demonstrations of the furniture tasks, as demos/make_furniture_demos.py writes them."""

from pathlib import Path

import h5py
import numpy as np

from envs.furniture_mujoco import FURNITURE


class DatasetError(SystemExit):
    """A file of demonstrations that cannot be used; the message says why."""


def load(path: str | Path, furniture: str, max_episodes: int = 0) -> dict:
    """Reads demonstrations from data/demo_i/{actions, rewards, obs/state} of an HDF5 file.

    Takes those that assemble all pairs, at most `max_episodes` (0: all). Returns state (T, obs_dim) float32, action (T, 10) float32,
    episode_ends (E,) and the file's attributes. Raises DatasetError on anything else.
    """
    spec, path = FURNITURE[furniture], Path(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such file")
    columns, ends, failed = {"state": [], "action": []}, [], 0
    try:
        with h5py.File(path, "r") as file:
            meta = dict(file["data"].attrs) if "data" in file else {}
            if "furniture" not in meta:
                raise DatasetError(f"{path}: not demonstrations of a furniture task (it has no data/furniture)")
            if meta["furniture"] != furniture:
                raise DatasetError(f"{path}: holds {meta['furniture']}, not {furniture}")
            for name in sorted(file["data"], key=lambda name: int(name.rpartition("_")[2])):
                demo = file["data"][name]
                if missing := [key for key in ("actions", "rewards", "obs/state") if key not in demo]:
                    raise DatasetError(f"{path}: data/{name} lacks {', '.join(missing)}")
                if demo["rewards"][()].sum() < len(spec.pairs):
                    failed += 1
                    continue
                action, state = demo["actions"][()].astype(np.float32), demo["obs/state"][()].astype(np.float32)
                for what, value, shape in ("actions", action, (len(state), 10)), ("obs/state", state, (len(state), spec.obs_dim)):
                    if value.shape != shape:
                        raise DatasetError(f"{path}: data/{name}: {what} are {value.shape}, not {shape}")
                    if not np.isfinite(value).all():
                        raise DatasetError(f"{path}: data/{name}: {what} contain NaN or Inf")
                columns["action"].append(action), columns["state"].append(state)
                ends.append(len(action))
                if len(ends) == max_episodes:
                    break
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be read as HDF5 demonstrations, is it truncated? ({error})") from error
    if not ends:
        raise DatasetError(f"{path}: no successful demonstration ({failed} failed)")
    return {name: np.concatenate(values) for name, values in columns.items()} | {"episode_ends": np.cumsum(ends), "meta": meta}
