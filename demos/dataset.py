"""Demonstration data: reads D4RL, DPPO and Minari files, and makes ours from a demonstrator.

    python -m demos.dataset --env-id Hopper-v4          # writes demos/Hopper-v4/medium.hdf5

Nothing here unpickles: .npz files that hold pickled objects are refused.
"""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro

from common.settings import Count, Seed, Weight, check_bounds
from demos import hdf5
from demos.hdf5 import DEMOS, DatasetError, check_size, numbers, parsing, reading
from demos.train_demonstrator import Demonstrator
from envs.vector import VectorEnv

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


@dataclass
class Demonstrations:
    """Consecutive steps of one or more episodes; the action at t was taken at the observation at t."""

    observations: np.ndarray  # (steps, obs_dim) float32, raw units
    actions: np.ndarray  # (steps, action_dim) float32, raw units
    episode_ends: np.ndarray  # (episodes,) int64, one past the last step of each episode
    normalization: dict | None = None  # the file's own obs_min, obs_max, action_min, action_max, if any

    def limits(self) -> dict[str, np.ndarray]:
        """What becomes -1 and 1 in the networks: the file's own limits, or the range of the data."""
        limits = {}
        for name, values in ("obs", self.observations), ("action", self.actions):
            low, high = values.min(0), values.max(0)
            if self.normalization:
                low, high = self.normalization[f"{name}_min"], self.normalization[f"{name}_max"]
            limits |= hdf5.widen(name, low, high)
        return limits


def chunk_starts(episode_ends: np.ndarray, length: int) -> np.ndarray:
    """Steps (n,) at which a chunk of `length` actions begins that lies inside an episode."""
    episodes = zip([0, *episode_ends[:-1]], episode_ends, strict=True)
    starts = np.concatenate([np.arange(start, end - length + 1) for start, end in episodes])
    if len(starts) < 20:
        raise DatasetError(f"{len(starts)} chunks of {length} steps are too few to clone, 20 the least.")
    return starts.astype(np.int64)


def chunk_rows(episode_ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First steps (n,) of chunks of episodes, from each of their first steps on, and episodes' ends."""
    first = []
    for start, end in zip([0, *episode_ends[:-1]], episode_ends, strict=True):
        first += [np.arange(i, end, length) for i in range(start, min(start + length, end))]
    first = np.concatenate(first)
    return first, episode_ends[np.searchsorted(episode_ends, first, side="right")]


def as_rollouts(rows: dict, obs: dict, T: int, N: int) -> dict[str, torch.Tensor]:
    """Rows (n, ...), one after another, as rollouts (., T, N, ...); observations have T + 1 rows."""
    n = len(rows["reward"])
    row = torch.arange(-(-n // (T * N)) * N * T).view(-1, N, T).transpose(1, 2)
    after = torch.cat([row, row[:, -1:] + 1], 1)
    rollouts = {name: value[row.clamp_max(n - 1)] for name, value in rows.items()}
    rollouts |= {name: value[after.clamp_max(n - 1)] for name, value in obs.items()}
    return rollouts | {"valid": (row < n).float().to(rows["reward"].device)}


def load_d4rl(path: Path) -> Demonstrations:
    """A D4RL .hdf5: observations, actions, terminals, timeouts (Fu et al. 2020)."""
    with reading(path) as file:
        observations = numbers(path, file, "observations", None, None)
        steps = len(observations)
        actions = numbers(path, file, "actions", steps, None)
        over = numbers(path, file, "terminals", steps) + numbers(path, file, "timeouts", steps) > 0
    over[-1] = True  # the last episode may be cut off
    return Demonstrations(observations, actions, np.flatnonzero(over) + 1)


def load_dppo(path: Path) -> Demonstrations:
    """DPPO's train.npz (states, actions in [-1, 1], traj_lengths) with normalization.npz beside it."""
    stats_path, raw, stats = path.with_name("normalization.npz"), {}, {}
    with parsing(path, "a DPPO .npz"), np.load(path, allow_pickle=False) as file:
        check_size(f"{path}: it", sum(part.file_size for part in file.zip.infolist()), path)
        states = numbers(path, file, "states", None, None)
        scaled = dict(obs=states, action=numbers(path, file, "actions", len(states), None))
        ends = np.cumsum(numbers(path, file, "traj_lengths", None, dtype=float)).astype(np.int64)
    with parsing(stats_path, "a DPPO .npz"), np.load(stats_path, allow_pickle=False) as file:
        for name, x in scaled.items():  # x = 2 (raw - low) / (high - low + 1e-6) - 1
            if np.abs(x).max() > 1.01:
                cause = f"{name} reaches {np.abs(x).max():.4g}, where scaled numbers lie in [-1, 1]"
                raise DatasetError(f"{path}: {cause}; if they are raw, scale them by {stats_path.name}")
            low = stats[f"{name}_min"] = numbers(stats_path, file, f"{name}_min", x.shape[1])
            high = stats[f"{name}_max"] = numbers(stats_path, file, f"{name}_max", x.shape[1])
            if (low > high).any():
                where = np.flatnonzero(low > high)
                raise DatasetError(f"{stats_path}: {name}_min exceeds {name}_max in dimensions {where}")
            raw[name] = (x + 1) / 2 * (high - low + 1e-6) + low
    if ends[-1] != len(states) or (np.diff(ends, prepend=0) <= 0).any():
        raise DatasetError(f"{path}: traj_lengths do not add up to the {len(states)} steps in the file")
    return Demonstrations(raw["obs"], raw["action"], ends, stats)


def load_minari(name: str) -> Demonstrations:
    """A Minari dataset in HDF5: an id that is installed locally, or the path of its folder."""
    root = os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets")
    folders = Path(name), Path(name) / "data", Path(root) / name / "data"
    paths = [folder / "main_data.hdf5" for folder in folders]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        raise DatasetError(f"{name}: no such file, and no Minari dataset in HDF5 (`minari list local`)")

    def episodes(file: h5py.File) -> Iterator[dict]:
        obs_dim = action_dim = None  # those of the first one
        for group in hdf5.in_order(file):
            action = numbers(path, file, f"{group}/actions", None, action_dim)
            obs = numbers(path, file, f"{group}/observations", None, obs_dim)  # and a last one
            if len(obs) < len(action):
                raise DatasetError(f"{path}: {group} has {len(obs)} observations, {len(action)} actions")
            obs_dim, action_dim = obs.shape[1], action.shape[1]
            yield {"state": obs[: len(action)], "action": action}

    with reading(path) as file:
        data = hdf5.join(path, episodes(file))
    return Demonstrations(data["state"], data["action"], data["episode_ends"])


def load(source: str | Path) -> Demonstrations:
    """Reads a D4RL .hdf5, a DPPO .npz, or a Minari id or folder; else raises DatasetError."""
    path = Path(source)
    known = path.suffix in (".hdf5", ".h5", ".npz")
    if os.path.isdir(path) or not (known or os.path.exists(path)):
        return load_minari(str(source))
    with parsing(path, "demonstrations"):  # by its content, whatever its suffix
        packed, is_hdf5 = zipfile.is_zipfile(path), h5py.is_hdf5(path)
    if packed or is_hdf5:
        return load_d4rl(path) if is_hdf5 else load_dppo(path)
    raise DatasetError(f"{path}: unknown format or damaged; give D4RL .hdf5, DPPO .npz or Minari's")


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # task whose demos/<env_id>/demonstrator.safetensors acts
    steps: Count = 200_000  # environment steps to record
    num_envs: Count = 100  # parallel environments
    noise: Weight = 1.0  # factor on the demonstrator's standard deviation; 0 records its mean action
    seed: Seed = 0  # of the environments and of the demonstrator's noise
    out: Path | None = None  # output; default demos/<env_id>/medium.hdf5


@torch.no_grad()
def make(args: Args) -> Path:
    """Lets the shipped demonstrator act and writes a D4RL-style .hdf5; returns its path."""
    check_bounds(args)
    weights = DEMOS / args.env_id / "demonstrator.safetensors"
    if not weights.exists():
        hint = "give your own data with --dataset, or train one (python -m demos.train_demonstrator)"
        raise DatasetError(f"No demonstrator for {args.env_id}: {hint}.")
    out = args.out or DEMOS / args.env_id / "medium.hdf5"
    policy, envs = Demonstrator(weights), VectorEnv(args.env_id, args.num_envs)
    generator = torch.Generator().manual_seed(args.seed)
    T = -(-args.steps // args.num_envs)
    columns = {key: [] for key in KEYS}
    low, high = envs.action_space.low, envs.action_space.high
    with hdf5.replacing(out) as file:
        envs.reset(args.seed)
        for t in range(T):
            obs = envs.obs
            action = np.clip(policy.act(obs, args.noise, generator).numpy(), low, high)
            step = envs.step(action[:, None])
            timeout = (step.truncated | (t == T - 1)) & ~step.terminated  # the end of the recording too
            values = obs, action, step.reward, step.terminated, timeout
            for key, value in zip(KEYS, values, strict=True):
                columns[key].append(value)
        for key, rows in columns.items():
            value = np.stack(rows, 1)  # (num_envs, T, ...): one environment after the other
            value = value.reshape(-1, *value.shape[2:])[: args.steps]
            file[key] = value if value.dtype == bool else value.astype(np.float32)
        file["timeouts"][-1] = not file["terminals"][-1]
        file.attrs.update(env_id=args.env_id, seed=args.seed, noise=args.noise)
    envs.close()
    return out


def get(env_id: str, source: str | None, envs: VectorEnv) -> Demonstrations:
    """The given dataset, or the shipped demonstrator's; raises DatasetError unless it fits the task."""
    path = source or DEMOS / env_id / "medium.hdf5"
    if source is None and not path.exists():
        print(f"Recording demonstrations of {env_id} to {path} ...")
        make(Args(env_id=env_id))
    data = load(path)
    sizes, wanted = (data.observations.shape[1], data.actions.shape[1]), (envs.obs_dim, envs.action_dim)
    if sizes != wanted:
        raise DatasetError(f"{path}: observation and action sizes {sizes} are not {env_id}'s {wanted}.")
    hdf5.check_actions(path, data.actions, envs.action_space.low, envs.action_space.high)
    spec = gym.registry.get(env_id.rpartition(":")[2])
    limit = spec and spec.max_episode_steps
    if limit and len(data.episode_ends) == 1 and data.episode_ends[0] > limit:
        words = f"one episode of {data.episode_ends[0]} steps, where {env_id}'s have at most {limit}"
        raise DatasetError(f"{path}: {words}; mark where episodes end in `terminals` and `timeouts`.")
    return data


if __name__ == "__main__":
    path = make(tyro.cli(Args, description=__doc__))
    data = load(path)
    print(f"{path}: {len(data.observations)} steps in {len(data.episode_ends)} episodes")
