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

from envs.vector import VectorEnv

DEMOS = Path(__file__).parent
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


class DatasetError(SystemExit):
    """What is wrong with a dataset, in one line."""


@dataclass
class Demonstrations:
    """Consecutive steps of one or more episodes; the action at t was taken at the observation at t."""

    observations: np.ndarray  # (steps, obs_dim) float32, raw units
    actions: np.ndarray  # (steps, action_dim) float32, raw units
    episode_ends: np.ndarray  # (episodes,) int64, one past the last step of each episode
    rewards: np.ndarray | None = None  # (steps,) or None where the file has none
    normalization: dict | None = None  # obs_min, obs_max, action_min, action_max, where the file has its own

    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (episodes,)."""
        return np.add.reduceat(self.rewards, np.r_[0, self.episode_ends[:-1]])


def check(data: Demonstrations, path) -> Demonstrations:
    """Raises DatasetError unless shapes agree and every number is finite."""
    steps = len(data.observations)
    if data.observations.ndim != 2 or data.actions.ndim != 2 or len(data.actions) != steps or steps == 0:
        raise DatasetError(
            f"{path}: observations {data.observations.shape} and actions {data.actions.shape} "
            "should be (steps, dim) with the same number of steps"
        )
    if data.rewards is not None and data.rewards.shape != (steps,):
        raise DatasetError(f"{path}: rewards {data.rewards.shape} should be ({steps},)")
    for name in ("observations", "actions", "rewards"):
        value = getattr(data, name)
        if value is not None and not np.isfinite(value).all():
            raise DatasetError(f"{path}: {name} contain NaN or Inf, first at step {np.argwhere(~np.isfinite(value))[0][0]}")
    ends = data.episode_ends
    if len(ends) == 0 or ends[-1] != steps or (np.diff(ends, prepend=0) <= 0).any():
        raise DatasetError(f"{path}: episode lengths do not add up to the {steps} steps in the file")
    return data


def load_d4rl(path: Path) -> Demonstrations:
    """A D4RL .hdf5: observations, actions, rewards, terminals, timeouts (Fu et al. 2020)."""
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                raise DatasetError(f"{path}: not a D4RL file, it lacks {', '.join(missing)}")
            o, a, r, terminal, timeout = (np.atleast_1d(file[key][()]) for key in KEYS)
            if any(x.dtype.kind not in "fiub" for x in (o, a, r, terminal, timeout)):
                raise DatasetError(f"{path}: not a D4RL file, an array does not hold numbers")
    except (OSError, RuntimeError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be read as HDF5, is it truncated? ({error})") from error
    if terminal.shape != (len(o),) or timeout.shape != (len(o),):
        raise DatasetError(f"{path}: terminals {terminal.shape} and timeouts {timeout.shape} should be ({len(o)},)")
    done = (terminal.astype(bool) | timeout.astype(bool)) if len(o) else np.zeros(0, bool)
    ends = np.flatnonzero(done) + 1
    if len(o) and (len(ends) == 0 or ends[-1] != len(o)):
        ends = np.append(ends, len(o))  # the last episode may be cut off
    return check(Demonstrations(o.astype(np.float32), a.astype(np.float32), ends, r.astype(np.float32)), path)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
            texts = [key for key, value in arrays.items() if value.dtype.kind not in "fiub"]
            if texts:
                raise DatasetError(f"{path}: {', '.join(texts)} do not hold numbers")
            return arrays
    except ValueError as error:
        raise DatasetError(f"{path}: holds pickled objects, which are never loaded ({error})") from error
    except (OSError, EOFError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be read as .npz, is it truncated? ({error})") from error
    except Exception as error:  # zipfile.BadZipFile and zlib.error on damaged archives
        raise DatasetError(f"{path}: damaged .npz ({error})") from error


def load_dppo(path: Path) -> Demonstrations:
    """DPPO's train.npz (states, actions in [-1, 1], traj_lengths) with normalization.npz beside it."""
    data = load_npz(path)
    missing = [key for key in ("states", "actions", "traj_lengths") if key not in data]
    if missing:
        raise DatasetError(f"{path}: not a DPPO dataset, it lacks {', '.join(missing)}")
    stats_path = path.with_name("normalization.npz")
    if not stats_path.exists():
        raise DatasetError(f"{path}: DPPO's normalization.npz must lie beside it")
    stats = load_npz(stats_path)
    names = ("obs_min", "obs_max", "action_min", "action_max")
    missing = [key for key in names if key not in stats]
    if missing:
        raise DatasetError(f"{stats_path}: lacks {', '.join(missing)}")
    stats = {key: stats[key].astype(np.float32) for key in names}
    for key, array in ("obs", data["states"]), ("action", data["actions"]):
        if array.ndim != 2 or stats[f"{key}_min"].shape != array.shape[1:] or stats[f"{key}_max"].shape != array.shape[1:]:
            raise DatasetError(f"{stats_path}: {key}_min and {key}_max do not fit the {array.shape} array of {path.name}")

    def unscale(x, low, high):  # DPPO stores both already scaled: x = 2 (raw - low) / (high - low + 1e-6) - 1
        return (x.astype(np.float32) + 1) / 2 * (high - low + 1e-6) + low

    return check(
        Demonstrations(
            unscale(data["states"], stats["obs_min"], stats["obs_max"]),
            unscale(data["actions"], stats["action_min"], stats["action_max"]),
            np.cumsum(data["traj_lengths"]).astype(np.int64),
            data["rewards"].astype(np.float32) if "rewards" in data else None,
            stats,
        ),
        path,
    )


def load_minari(name: str) -> Demonstrations:
    """A Minari dataset: an id that is installed locally, or the path of its folder."""
    try:
        import minari
        from minari import MinariDataset
    except ImportError as error:
        raise DatasetError(f"{name}: looks like a Minari dataset; run `pip install minari` to read it") from error
    try:
        folder = Path(name)
        dataset = MinariDataset(folder / "data" if (folder / "data").is_dir() else folder) if folder.is_dir() else minari.load_dataset(name)
        episodes = list(dataset.iterate_episodes())
    except Exception as error:
        raise DatasetError(f"{name}: Minari cannot load it ({error}); is it downloaded (`minari list local`)?") from error
    if not episodes or any(not isinstance(e.observations, np.ndarray) for e in episodes):
        raise DatasetError(f"{name}: has no episodes, or its observations are not flat arrays")
    return check(
        Demonstrations(
            np.concatenate([e.observations[: len(e.actions)] for e in episodes]).astype(np.float32),
            np.concatenate([e.actions for e in episodes]).astype(np.float32),
            np.cumsum([len(e.actions) for e in episodes]),
            np.concatenate([e.rewards for e in episodes]).astype(np.float32),
        ),
        name,
    )


def load(source: str | Path) -> Demonstrations:
    """Reads a D4RL .hdf5, a DPPO .npz, or a Minari id or folder; raises DatasetError on anything else."""
    path = Path(source)
    if path.suffix in (".hdf5", ".h5", ".npz") and not path.exists():
        raise DatasetError(f"{path}: no such file")
    if path.suffix in (".hdf5", ".h5"):
        return load_d4rl(path)
    if path.suffix == ".npz":
        return load_dppo(path)
    if path.is_file():
        raise DatasetError(f"{path}: unknown format; give a D4RL .hdf5, a DPPO train.npz, or a Minari id or folder")
    return load_minari(str(source))


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Task whose shipped demonstrator acts (demos/<env_id>/demonstrator.safetensors)."""
    steps: int = 200_000
    """Environment steps to record."""
    num_envs: int = 100
    """Parallel environments."""
    noise: float = 1.0
    """Factor on the demonstrator's standard deviation; 0 records its mean action."""
    seed: int = 0
    """Seed of the environments and of the demonstrator's noise."""
    out: Path | None = None
    """Output; default demos/<env_id>/medium.hdf5."""


@torch.no_grad()
def make(args: Args) -> Path:
    """Lets the shipped demonstrator act and writes a D4RL-style .hdf5; returns its path."""
    from demos.train_demonstrator import Demonstrator

    weights = DEMOS / args.env_id / "demonstrator.safetensors"
    if not weights.exists():
        raise DatasetError(f"No demonstrator for {args.env_id}: give your own data with --dataset, or train one with "
                           f"`python -m demos.train_demonstrator --env-id {args.env_id} --target-return R`.")  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # its layers draw weights before they are loaded; a run's own stream goes on as if the file had been there
        policy = Demonstrator.load(weights)
    generator = torch.Generator().manual_seed(args.seed)
    envs = VectorEnv(args.env_id, args.num_envs, seed=args.seed)
    T = -(-args.steps // args.num_envs)
    columns = {key: [] for key in KEYS}
    obs = envs.reset()
    low, high = envs.action_space.low, envs.action_space.high
    for t in range(T):
        action = np.clip(policy.act(obs, args.noise, generator).numpy(), low, high)
        _, reward, terminated, truncated, _ = envs.step(action[:, None])
        timeout = (truncated | (t == T - 1)) & ~terminated  # the recording ends every episode
        for key, value in zip(KEYS, (obs, action, reward, terminated, timeout), strict=True):
            columns[key].append(value)
        obs = envs.obs
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


if __name__ == "__main__":
    path = make(args := tyro.cli(Args, description=__doc__))
    data = load(path)
    complete = data.returns()[np.diff(data.episode_ends, prepend=0) > 0]
    print(f"{path}: {len(data.observations)} steps, {len(complete)} episodes, return {complete.mean():.0f} +- {complete.std():.0f}")
