"""Reads robomimic's HDF5 demonstrations, published ones or those of demos/make_robomimic_demos.py."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5 import DEMOS, DatasetError, check_actions, in_order, join, numbers, reading, widen
from envs.robomimic import IMAGE_SIZE, TASKS, metadata

WIDTHS = {"pos": 3, "quat": 4, "qpos": 2}  # of proprioception, by the end of its key
RENDER = "render them with `python -m demos.make_robomimic_demos --images-from FILE`"


def read_metadata(file: h5py.File, path: Path) -> dict:
    """What env_args says of the environment. Raises DatasetError unless its robot moves as ours does."""
    try:
        meta = json.loads(file["data"].attrs["env_args"])
        recorded, name = meta["env_kwargs"], meta["env_name"]
        theirs = recorded.get("controller_configs", {})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a robomimic file, data's env_args are no metadata") from error
    task = next((task for task, spec in TASKS.items() if spec.env_name == name), None)
    if task is None:
        raise DatasetError(f"{path}: holds {name}; known are {', '.join(TASKS)}")
    if not isinstance(theirs, dict):
        raise DatasetError(f"{path}: has {type(theirs).__name__} of controllers, not one for all arms")
    held, ours = recorded | theirs, metadata(task, images=False)["env_kwargs"]
    others = "robots", "control_freq", "reward_shaping"
    ours = ours["controller_configs"] | {key: ours[key] for key in others}
    for key, value in ours.items():
        if held.get(key, value) != value:
            raise DatasetError(f"{path}: recorded with {key} {held[key]}, not {value}")
    return meta | {"task": task}


def choose(file: h5py.File, path: Path, split: str | None) -> list[str]:
    """The names of the demonstrations of mask/<split>; without one of mask/train or, without it, all."""
    mask = f"mask/{split or 'train'}"
    if split is None and mask not in file:
        return in_order(file["data"])
    names = file[mask].asstr(errors="replace")[()].tolist() if mask in file else []
    missing = [name for name in names if name not in file["data"]]
    if missing or not names:
        fault = f"names {missing[0]}, which is not in data" if missing else "is missing or empty"
        raise DatasetError(f"{path}: {mask} {fault}; choose another --split")
    return in_order(names)


def load(path: str | Path, task: str, images: bool, max_episodes: int = 0, split: str | None = None,
         fast_render: bool | None = None) -> dict:  # fmt: skip
    """Reads demonstrations from a robomimic HDF5 file (Mandlekar et al. 2021).

    Takes those of mask/<split> (default: mask/train if there is one, else all) that get a reward, where
    rewards are stored, at most `max_episodes` (0: all). Returns state (T, obs_dim), with images rgb (T,
    3 * cameras, 96, 96) uint8 and object (T, object_size), action (T, action_dim), whether the task was
    solved before it, solved (T,), and episode_ends (E,).
    Raises DatasetError on anything else, and on images of another `fast_render`.
    """
    spec, path = TASKS[task], Path(path)

    def episodes(file: h5py.File) -> Iterator[dict | None]:
        for name in choose(file, path, split):
            demo = f"data/{name}"
            action = numbers(path, file, f"{demo}/actions", None, 7 * spec.robots)
            rewards = numbers(path, file, f"{demo}/rewards", len(action), optional=True)
            if rewards is not None and not (rewards > 0).any():
                yield None
                continue
            states, frames = [], []
            for key in spec.state_keys(images):
                width = WIDTHS.get(key.rpartition("_")[2], spec.object_size)
                states.append(numbers(path, file, f"{demo}/obs/{key}", len(action), width))
            rewards = np.zeros(len(action)) if rewards is None else np.nan_to_num(rewards)
            episode = {"state": np.concatenate(states, 1), "action": action}
            episode["solved"] = np.cumsum(rewards) - rewards > 0
            for key in spec.image_keys if images else ():
                name, shape = f"{demo}/obs/{key}", (len(action), IMAGE_SIZE, IMAGE_SIZE, 3)
                seen = numbers(path, file, name, *shape, dtype=np.uint8, hint=f"; {RENDER}")
                frames.append(seen.transpose(0, 3, 1, 2))
            if images:
                name, width = f"{demo}/obs/object", spec.object_size
                seen = numbers(path, file, name, len(action), width)
                episode |= {"rgb": np.concatenate(frames, 1), "object": seen}
            yield episode

    with reading(path) as file:
        meta = read_metadata(file, path)
        if meta.pop("task") != task:
            raise DatasetError(f"{path}: holds {meta['env_name']}, not {spec.env_name}")
        rendered = file["data"].attrs.get("fast_render", False)  # by robomimic's own tool: in full
        if images and fast_render is not None and bool(rendered) != fast_render:
            how = "with shadows (--preset paper)" if fast_render else "without shadows (--preset laptop)"
            raise DatasetError(f"{path}: rendered {how}; this run renders otherwise: {RENDER}")
        data = join(path, episodes(file), max_episodes)
    check_actions(path, data["action"])
    return data


def limits(data: dict) -> dict[str, np.ndarray]:
    """What becomes -1 and 1 in the networks: the range of the data and of zero, as in DPPO."""
    result = {}
    for name, values in data.items():
        if name in ("state", "action", "object"):
            limits = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
            result |= widen("obs" if name == "state" else name, *limits)
    return result


def get(task: str, obs: str, source: Path | None, fast_render: bool, episodes=0, split=None) -> dict:
    """The given dataset, or that of the scripted expert, made when it is first needed."""
    images, folder = obs == "image", DEMOS / task
    path = source or folder / ("image.hdf5" if images else "low_dim.hdf5")

    def make(out: Path, *flags: str):  # in its own process: one that has rendered must not fork
        print(f"Making demonstrations of {task}: {out} ...")
        module = [sys.executable, "-m", "demos.make_robomimic_demos"]
        if subprocess.run([*module, "--task", task, "--out", out, *flags], cwd=DEMOS.parent).returncode:
            raise SystemExit("The demonstrations could not be made, see above.")

    if source is None and not path.exists():
        states = folder / "low_dim.hdf5"
        if not states.exists():
            make(states)
        if images:
            make(path, "--images-from", str(states), f"--{'' if fast_render else 'no-'}fast-render")
    return load(path, task, images, episodes, split, fast_render)
