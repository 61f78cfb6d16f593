"""Reads robomimic's HDF5 demonstrations, published ones or those of demos/make_robomimic_demos.py."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5 import DatasetError, check_array, in_order, join, reading, require
from envs.robomimic import IMAGE_SIZE, TASKS, metadata

DEMOS = Path(__file__).parent
RENDER = "render them with `python -m demos.make_robomimic_demos --images-from FILE`"


def check_metadata(recorded: dict, ours: dict, path: Path):
    """Raises DatasetError where actions were recorded for another robot or controller than ours."""
    for key in "robots", "control_freq":
        if key in recorded and recorded[key] != ours[key]:
            raise DatasetError(f"{path}: recorded with {key} {recorded[key]}, not {ours[key]}")
    theirs, controller = recorded.get("controller_configs", {}), ours["controller_configs"]
    if not isinstance(theirs, dict):
        raise DatasetError(f"{path}: has {type(theirs).__name__} of controllers, not one for all arms")
    for key, value in theirs.items():
        if key in controller and value != controller[key]:
            raise DatasetError(f"{path}: the controller's {key} was {value}, not {controller[key]}")


def check_images(images: h5py.Dataset, name: str, length: int):
    """Raises DatasetError where images are not `length` frames that the networks can see."""
    size = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.shape[1:] != size or images.dtype != np.uint8:
        held = f"{images.dtype} images of {images.shape[1:]}"
        raise DatasetError(f"{name} holds {held}, not uint8 of {size}; {RENDER}")
    if len(images) != length:
        raise DatasetError(f"{name} holds {len(images)} images for {length} states; {RENDER}")


def load(path: str | Path, task: str, images: bool, max_episodes: int = 0, split: str | None = None,
         fast_render: bool | None = None) -> dict:  # fmt: skip
    """Reads demonstrations from a robomimic HDF5 file (Mandlekar et al. 2021).

    Takes the demonstrations of mask/<split> (default: mask/train if there is one, else all) that get a
    reward, at most `max_episodes` (0: all). Returns state (T, obs_dim) float32, with images rgb
    (T, 3 * cameras, 96, 96) uint8, action (T, action_dim) float32, episode_ends (E,) and the file's
    metadata as meta. Raises DatasetError on anything else, and where `fast_render` is given and the
    images were rendered here with another setting.
    """
    spec, path = TASKS[task], Path(path)
    image_keys = spec.image_keys if images else ()

    def episodes(data: h5py.Group, names: list[str]) -> Iterator[dict | None]:
        for name in names:
            demo, where = data[name], f"{path}: data/{name}"
            require(where, demo, [f"obs/{key}" for key in spec.state_keys(images)] + ["actions"])
            require(where, demo, [f"obs/{key}" for key in image_keys], f"; {RENDER}")
            if "rewards" in demo and not np.any(demo["rewards"][()] > 0):
                yield None
                continue
            for key in image_keys:
                check_images(demo[f"obs/{key}"], f"{where}/obs/{key}", len(demo["actions"]))
            action = demo["actions"][()].astype(np.float32)
            state = np.concatenate([demo[f"obs/{key}"][()] for key in spec.state_keys(images)], 1)
            state = state.astype(np.float32)
            check_array(f"{where}: actions", action, (len(state), 7 * spec.robots))
            check_array(f"{where}: states", state)
            episode = {"state": state, "action": action}
            if images:
                frames = [demo[f"obs/{key}"][()].transpose(0, 3, 1, 2) for key in image_keys]
                episode["rgb"] = np.concatenate(frames, 1)
            yield episode

    with reading(path) as file:
        if "data" not in file or "env_args" not in file["data"].attrs:
            raise DatasetError(f"{path}: not a robomimic file (it has no data/env_args)")
        meta = json.loads(file["data"].attrs["env_args"])
        if meta.get("env_name") != spec.env_name:
            raise DatasetError(f"{path}: holds {meta.get('env_name')}, not {spec.env_name}")
        check_metadata(meta.get("env_kwargs", {}), metadata(task, images)["env_kwargs"], path)
        rendered = file["data"].attrs.get("fast_render", fast_render)
        if images and fast_render is not None and bool(rendered) != fast_render:
            flag = f"--{'no-' * fast_render}fast-render"
            raise DatasetError(f"{path}: rendered with {flag}; train with the same, or {RENDER}")
        if split is None and "mask/train" in file:
            split = "train"
        if split and f"mask/{split}" not in file:
            raise DatasetError(f"{path}: has no mask/{split}")
        names = [name.decode() for name in file[f"mask/{split}"]] if split else file["data"]
        return join(path, episodes(file["data"], in_order(names)), max_episodes) | {"meta": meta}


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
