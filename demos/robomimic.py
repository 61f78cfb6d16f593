"""Reads robomimic's HDF5 demonstrations, as published or as demos/make_robomimic_demos.py writes them."""

import json
from pathlib import Path

import h5py
import numpy as np

from envs.robomimic import IMAGE_SIZE, TASKS, metadata

RENDER = "render them with `python -m demos.make_robomimic_demos --images-from FILE`"


class DatasetError(SystemExit):
    """A robomimic file that cannot be used; the message says why."""


def check_metadata(recorded: dict, ours: dict, path: Path):
    """Raises DatasetError where actions were recorded for another robot or controller than the one they would train."""
    for key in "robots", "control_freq":
        if key in recorded and recorded[key] != ours[key]:
            raise DatasetError(f"{path}: recorded with {key} {recorded[key]}, the task here has {ours[key]}")
    controller = recorded.get("controller_configs", {})
    if not isinstance(controller, dict):
        raise DatasetError(f"{path}: has {type(controller).__name__} of controllers, the task here has one for all arms")
    for key, value in controller.items():
        if key in ours["controller_configs"] and value != ours["controller_configs"][key]:
            raise DatasetError(f"{path}: recorded with the controller's {key} {value}, the task here has {ours['controller_configs'][key]}")


def check_images(images: h5py.Dataset, name: str, length: int, path: Path):
    """Raises DatasetError where a demonstration's images are not `length` frames that the networks can see."""
    size = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.shape[1:] != size or images.dtype != np.uint8:
        raise DatasetError(f"{path}: {name} holds {images.dtype} images of {images.shape[1:]}, not uint8 of {size}; {RENDER}")
    if len(images) != length:
        raise DatasetError(f"{path}: {name} holds {len(images)} images for {length} states; {RENDER}")


def load(path: str | Path, task: str, images: bool, max_episodes: int = 0, split: str | None = None, fast_render: bool | None = None) -> dict:
    """Reads demonstrations from a robomimic HDF5 file (Mandlekar et al. 2021).

    Takes the demonstrations of mask/<split> (default: mask/train where there is one, else all) that reach a reward, at most
    `max_episodes` (0: all). Returns state (T, obs_dim) float32, rgb (T, 3 * cameras, 96, 96) uint8 with images, action
    (T, action_dim) float32, episode_ends (E,) and the file's metadata. Raises DatasetError on anything else, and where
    `fast_render` is given and the images were rendered here with another setting.
    """
    spec, path = TASKS[task], Path(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such file")
    columns = {"state": [], "action": [], **({"rgb": []} if images else {})}
    ends, failed = [], 0
    try:
        with h5py.File(path, "r") as file:
            if "data" not in file or "env_args" not in file["data"].attrs:
                raise DatasetError(f"{path}: not a robomimic file (it has no data/env_args)")
            meta = json.loads(file["data"].attrs["env_args"])
            if meta.get("env_name") != spec.env_name:
                raise DatasetError(f"{path}: holds {meta.get('env_name')}, not {spec.env_name}")
            check_metadata(meta.get("env_kwargs", {}), metadata(task, images)["env_kwargs"], path)
            if images and fast_render is not None and bool(file["data"].attrs.get("fast_render", fast_render)) != fast_render:
                raise DatasetError(f"{path}: rendered with --{'no-' * fast_render}fast-render; train with the same, or {RENDER}")
            if split is None:
                split = "train" if "mask/train" in file else None
            elif f"mask/{split}" not in file:
                raise DatasetError(f"{path}: has no mask/{split}")
            names = [name.decode() for name in file[f"mask/{split}"]] if split else list(file["data"])
            for name in sorted(names, key=lambda name: int(name.rpartition("_")[2])):
                demo = file["data"][name]
                keys = spec.state_keys(images) + (spec.image_keys if images else ())
                missing = [key for key in keys if f"obs/{key}" not in demo] + [key for key in ("actions",) if key not in demo]
                if missing:
                    hint = f"; {RENDER}" if images and any("image" in key for key in missing) else ""
                    raise DatasetError(f"{path}: data/{name} lacks {', '.join(missing)}{hint}")
                if "rewards" in demo and not np.any(demo["rewards"][()] > 0):
                    failed += 1
                    continue
                for key in spec.image_keys if images else ():
                    check_images(demo[f"obs/{key}"], f"data/{name}/obs/{key}", len(demo["actions"]), path)
                action = demo["actions"][()].astype(np.float32)
                state = np.concatenate([demo[f"obs/{key}"][()] for key in spec.state_keys(images)], 1).astype(np.float32)
                if action.shape != (len(state), 7 * spec.robots):
                    raise DatasetError(f"{path}: data/{name}: actions are {action.shape}, not ({len(state)}, {7 * spec.robots})")
                if not (np.isfinite(action).all() and np.isfinite(state).all()):
                    raise DatasetError(f"{path}: data/{name} contains NaN or Inf")
                columns["action"].append(action), columns["state"].append(state)
                if images:
                    columns["rgb"].append(np.concatenate([demo[f"obs/{key}"][()].transpose(0, 3, 1, 2) for key in spec.image_keys], 1))
                ends.append(len(action))
                if len(ends) == max_episodes:
                    break
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be read as robomimic HDF5, is it truncated? ({error})") from error
    if not ends:
        raise DatasetError(f"{path}: no successful demonstration ({failed} failed)")
    return {name: np.concatenate(values) for name, values in columns.items()} | {"episode_ends": np.cumsum(ends), "meta": meta}
