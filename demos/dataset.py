"""Demonstration data: reads D4RL, DPPO and Minari files, and makes ours from a demonstrator.

    python -m demos.dataset --env-id Hopper-v4          # writes demos/Hopper-v4/medium.hdf5

Nothing here unpickles: .npz files that hold pickled objects are refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro

from demos.hdf5 import DatasetError, check_array, reading, require
from demos.train_demonstrator import Demonstrator
from envs.vector import VectorEnv

DEMOS = Path(__file__).parent
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


@dataclass
class Demonstrations:
    """Consecutive steps of one or more episodes; the action at t was taken at the observation at t."""

    observations: np.ndarray  # (steps, obs_dim) float32, raw units
    actions: np.ndarray  # (steps, action_dim) float32, raw units
    episode_ends: np.ndarray  # (episodes,) int64, one past the last step of each episode
    rewards: np.ndarray | None = None  # (steps,) or None where the file has none
    normalization: dict | None = None  # the file's own obs_min, obs_max, action_min, action_max, if any

    def limits(self) -> dict[str, np.ndarray]:
        """What becomes -1 and 1 in the networks: the file's own limits, or the range of the data."""
        if self.normalization:
            return self.normalization
        return {
            "obs_min": self.observations.min(0), "obs_max": self.observations.max(0),
            "action_min": self.actions.min(0), "action_max": self.actions.max(0),
        }  # fmt: skip

    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (episodes,)."""
        return np.add.reduceat(self.rewards, np.r_[0, self.episode_ends[:-1]])


def chunk_starts(episode_ends: np.ndarray, length: int) -> np.ndarray:
    """Steps (n,) at which a chunk of `length` actions begins that lies inside an episode."""
    episodes = zip([0, *episode_ends[:-1]], episode_ends, strict=True)
    starts = np.concatenate([np.arange(start, end - length + 1) for start, end in episodes])
    if len(starts) < 20:
        raise DatasetError(f"{len(starts)} chunks of {length} steps are too few to clone, 20 the least.")
    return starts.astype(np.int64)


def check(data: Demonstrations, path) -> Demonstrations:
    """Raises DatasetError unless shapes agree and every number is finite."""
    o, a, r, ends = data.observations, data.actions, data.rewards, data.episode_ends
    if o.ndim != 2 or a.ndim != 2 or len(a) != len(o) or len(o) == 0:
        shapes = f"observations {o.shape} and actions {a.shape}"
        raise DatasetError(f"{path}: {shapes} should be (steps, dim) with the same number of steps")
    check_array(f"{path}: observations", o)
    check_array(f"{path}: actions", a)
    if r is not None:
        check_array(f"{path}: rewards", r, (len(o),))
    if len(ends) == 0 or ends[-1] != len(o) or (np.diff(ends, prepend=0) <= 0).any():
        raise DatasetError(f"{path}: episode lengths do not add up to the {len(o)} steps in the file")
    return data


def load_d4rl(path: Path) -> Demonstrations:
    """A D4RL .hdf5: observations, actions, rewards, terminals, timeouts (Fu et al. 2020)."""
    with reading(path) as file:
        require(f"{path}: not a D4RL file, it", file, KEYS)
        arrays = [np.atleast_1d(file[key][()]) for key in KEYS]
    if any(x.dtype.kind not in "fiub" for x in arrays):
        raise DatasetError(f"{path}: not a D4RL file, an array does not hold numbers")
    o, a, r, terminal, timeout = arrays
    check_array(f"{path}: terminals", terminal, (len(o),))
    check_array(f"{path}: timeouts", timeout, (len(o),))
    over = terminal.astype(bool) | timeout.astype(bool)
    over[-1:] = True  # the last episode may be cut off
    ends = np.flatnonzero(over) + 1
    data = Demonstrations(o.astype(np.float32), a.astype(np.float32), ends, r.astype(np.float32))
    return check(data, path)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers in an .npz; raises DatasetError on anything else."""
    if not path.exists():
        raise DatasetError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except ValueError as error:
        raise DatasetError(f"{path}: holds pickled objects, which are never loaded ({error})") from error
    except Exception as error:  # of many kinds, on truncated and damaged archives
        raise DatasetError(f"{path}: cannot be read as .npz, is it damaged? ({error})") from error
    texts = [key for key, value in arrays.items() if value.dtype.kind not in "fiub"]
    if texts:
        raise DatasetError(f"{path}: {', '.join(texts)} do not hold numbers")
    return arrays


def load_dppo(path: Path) -> Demonstrations:
    """DPPO's train.npz (states, actions in [-1, 1], traj_lengths) with normalization.npz beside it."""
    data = load_npz(path)
    require(f"{path}: not a DPPO dataset, it", data, ("states", "actions", "traj_lengths"))
    stats_path = path.with_name("normalization.npz")
    stats = load_npz(stats_path)
    names = ("obs_min", "obs_max", "action_min", "action_max")
    require(f"{stats_path}:", stats, names)
    stats = {key: stats[key].astype(np.float32) for key in names}

    def unscale(x, name):  # DPPO stores both already scaled: x = 2 (raw - low) / (high - low + 1e-6) - 1
        low, high = stats[f"{name}_min"], stats[f"{name}_max"]
        if x.ndim != 2 or low.shape != x.shape[1:] or high.shape != x.shape[1:]:
            raise DatasetError(f"{stats_path}: {name}_min and {name}_max do not fit data of {x.shape}")
        return (x.astype(np.float32) + 1) / 2 * (high - low + 1e-6) + low

    observations, actions = unscale(data["states"], "obs"), unscale(data["actions"], "action")
    ends = np.cumsum(data["traj_lengths"]).astype(np.int64)
    rewards = data["rewards"].astype(np.float32) if "rewards" in data else None
    return check(Demonstrations(observations, actions, ends, rewards, stats), path)


def load_minari(name: str) -> Demonstrations:
    """A Minari dataset: an id that is installed locally, or the path of its folder."""
    try:
        import minari
        from minari import MinariDataset
    except ImportError as error:
        raise DatasetError(f"{name}: a Minari dataset? `pip install minari` to read it") from error
    folder = Path(name)
    try:
        if folder.is_dir():
            dataset = MinariDataset(folder / "data" if (folder / "data").is_dir() else folder)
        else:
            dataset = minari.load_dataset(name)
        episodes = list(dataset.iterate_episodes())
    except Exception as error:
        hint = "is it downloaded (`minari list local`)?"
        raise DatasetError(f"{name}: Minari cannot load it ({error}); {hint}") from error
    if not episodes or any(not isinstance(e.observations, np.ndarray) for e in episodes):
        raise DatasetError(f"{name}: has no episodes, or its observations are not flat arrays")
    o = np.concatenate([e.observations[: len(e.actions)] for e in episodes]).astype(np.float32)
    a = np.concatenate([e.actions for e in episodes]).astype(np.float32)
    r = np.concatenate([e.rewards for e in episodes]).astype(np.float32)
    return check(Demonstrations(o, a, np.cumsum([len(e.actions) for e in episodes]), r), name)


def load(source: str | Path) -> Demonstrations:
    """Reads a D4RL .hdf5, a DPPO .npz, or a Minari id or folder; else raises DatasetError."""
    path = Path(source)
    if path.suffix in (".hdf5", ".h5"):
        return load_d4rl(path)
    if path.suffix == ".npz":
        return load_dppo(path)
    if path.is_file():
        raise DatasetError(f"{path}: unknown format; give a D4RL .hdf5, a DPPO .npz or a Minari dataset")
    return load_minari(str(source))


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # task whose demos/<env_id>/demonstrator.safetensors acts
    steps: int = 200_000  # environment steps to record
    num_envs: int = 100  # parallel environments
    noise: float = 1.0  # factor on the demonstrator's standard deviation; 0 records its mean action
    seed: int = 0  # of the environments and of the demonstrator's noise
    out: Path | None = None  # output; default demos/<env_id>/medium.hdf5


@torch.no_grad()
def make(args: Args) -> Path:
    """Lets the shipped demonstrator act and writes a D4RL-style .hdf5; returns its path."""
    weights = DEMOS / args.env_id / "demonstrator.safetensors"
    if not weights.exists():
        command = f"python -m demos.train_demonstrator --env-id {args.env_id} --target-return R"
        hint = f"give your own data with --dataset, or train one with `{command}`"
        raise DatasetError(f"No demonstrator for {args.env_id}: {hint}.")
    policy = Demonstrator(weights)
    generator = torch.Generator().manual_seed(args.seed)
    envs = VectorEnv(args.env_id, args.num_envs)
    envs.reset(args.seed)
    T = -(-args.steps // args.num_envs)
    columns = {key: [] for key in KEYS}
    low, high = envs.action_space.low, envs.action_space.high
    for t in range(T):
        obs = envs.obs
        action = np.clip(policy.act(obs, args.noise, generator).numpy(), low, high)
        step = envs.step(action[:, None])
        timeout = (step.truncated | (t == T - 1)) & ~step.terminated  # the recording ends every episode
        for key, value in zip(KEYS, (obs, action, step.reward, step.terminated, timeout), strict=True):
            columns[key].append(value)
    envs.close()
    out = args.out or DEMOS / args.env_id / "medium.hdf5"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        for key, rows in columns.items():
            value = np.stack(rows, 1)  # (num_envs, T, ...): one environment after the other
            value = value.reshape(-1, *value.shape[2:])[: args.steps]
            file[key] = value if value.dtype == bool else value.astype(np.float32)
        file["timeouts"][-1] = not file["terminals"][-1]
        file.attrs["info"] = json.dumps({"env_id": args.env_id, "seed": args.seed, "noise": args.noise})
    partial.replace(out)
    return out


def get(env_id: str, source: str | None, envs: VectorEnv) -> Demonstrations:
    """The given dataset, or that of the shipped demonstrator, recorded when it is first needed.

    Raises DatasetError where observations or actions have other sizes than the environments'.
    """
    path = source or DEMOS / env_id / "medium.hdf5"
    if source is None and not path.exists():
        print(f"Recording demonstrations of {env_id} to {path} ...")
        make(Args(env_id=env_id))
    data = load(path)
    sizes, wanted = (data.observations.shape[1], data.actions.shape[1]), (envs.obs_dim, envs.action_dim)
    if sizes != wanted:
        raise DatasetError(f"{path}: observation and action sizes {sizes} are not {env_id}'s {wanted}.")
    return data


if __name__ == "__main__":
    path = make(tyro.cli(Args, description=__doc__))
    data = load(path)
    returns = data.returns()
    print(f"{path}: {len(data.observations)} steps, {len(returns)} episodes, "
          f"return {returns.mean():.0f} +- {returns.std():.0f}")  # fmt: skip
