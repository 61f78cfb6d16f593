"""Vectorised Gymnasium tasks that step whole action chunks, over EnvPool or Gymnasium."""

import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from envs import rendering
from envs.interface import Step, check_finite


def envpool_has(env_id: str) -> bool:
    try:
        import envpool
    except ImportError:
        return False
    return env_id in envpool.list_all_envs()


class GymnasiumPool:
    """Copies of a Gymnasium task with those methods of EnvPool that are used here."""

    def __init__(self, env_id: str, num_envs: int, seed: int, **options):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*out of date", DeprecationWarning)
                options["disable_env_checker"] = True  # we check, and say it in one line
                self.envs = [gym.make(env_id, **options) for _ in range(num_envs)]
        except (gym.error.Error, ImportError, AttributeError, ValueError) as error:
            raise SystemExit(f"Cannot make the environment {env_id!r}: {error}") from error
        if self.envs[0].spec.max_episode_steps is None:
            raise SystemExit(f"{env_id} has no time limit: register it with max_episode_steps.")
        self.seeds = {i: seed + i for i in range(num_envs)}  # of the first episodes
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space

    def reset(self, ids: np.ndarray):
        return np.stack([self.envs[i].reset(seed=self.seeds.pop(i, None))[0] for i in ids]), {}

    def step(self, actions: np.ndarray, ids: np.ndarray):
        results = [self.envs[i].step(action) for i, action in zip(ids, actions, strict=True)]
        obs, reward, terminated, truncated, infos = zip(*results, strict=True)
        return np.array(obs), np.array(reward), np.array(terminated), np.array(truncated), infos

    def close(self):
        for env in self.envs:
            env.close()


class VectorEnv:
    """`num_envs` copies of one task, over EnvPool where it has the task, else over Gymnasium.

    See envs/interface.py. An environment that ends inside a chunk sits out the rest of it.
    """

    def __init__(self, env_id: str, num_envs: int, threads=1, backend: str | None = None, **options):
        self.env_id, self.num_envs, self.threads, self.options = env_id, num_envs, threads, options
        self.backend = backend or ("envpool" if envpool_has(env_id) else "gymnasium")
        self.make(seed=0)
        space, self.action_space = self.envs.observation_space, self.envs.action_space
        for name, box in ("observation", space), ("action", self.action_space):
            flat = isinstance(box, gym.spaces.Box) and len(box.shape) == 1
            if not flat or (name == "action" and box.dtype.kind != "f"):
                wanted, found = "a flat Box of real numbers", " ".join(str(box).split())
                raise SystemExit(f"{env_id}: the {name} space must be {wanted}, not {found}.")
        self.obs_dim, self.action_dim = space.shape[0], self.action_space.shape[0]

    def make(self, seed: int):
        """New simulators: EnvPool takes its seed when it is made."""
        if self.backend == "gymnasium":
            self.envs = GymnasiumPool(self.env_id, self.num_envs, seed, **self.options)
            return
        import envpool

        sizes = dict(num_envs=self.num_envs, num_threads=self.threads)
        self.envs = envpool.make_gymnasium(self.env_id, seed=seed, **sizes)

    def reset(self, seeds: int):
        self.envs.close()
        self.make(seeds % (2**31 - self.num_envs))  # EnvPool's are 32 bits, and count up from the first
        self.obs = self.start(np.arange(self.num_envs))
        self.seed, self.tape, self.score = seeds, [], np.zeros(self.num_envs)

    def start(self, ids: np.ndarray) -> np.ndarray:
        """The first observations (n, obs_dim) of new episodes."""
        obs = self.envs.reset(ids.astype(np.int32))[0].astype(np.float32)
        self.check(obs, "observation at a reset")
        if obs.shape != (len(ids), self.obs_dim):
            raise SystemExit(f"{self.env_id}: an observation of {obs.shape[1:]}, not ({self.obs_dim},)")
        return obs

    def check(self, values: np.ndarray, name: str):
        check_finite(values, f"{self.env_id}: the environment returned a non-finite {name}")

    def state_dict(self) -> dict:
        """Seed and actions since the last reset, all active: simulators cannot be saved."""
        tape = torch.as_tensor(np.array(self.tape))
        return dict(backend=self.backend, seed=self.seed, tape=tape)

    def load_state_dict(self, state: dict):
        """Replays them. Raises ValueError on those of another simulator."""
        if state["backend"] != self.backend:
            raise ValueError(f"it ran on {state['backend']}, this on {self.backend}")
        self.reset(state["seed"])
        for chunks in state["tape"].cpu().numpy():
            self.step(chunks)

    def step(self, chunks: np.ndarray, active: np.ndarray | None = None) -> Step:
        """See envs/interface.py; actions are clipped to the action space."""
        ids = np.arange(self.num_envs) if active is None else np.flatnonzero(active)
        check_finite(chunks[ids])
        self.tape.append(chunks)
        low, high = self.action_space.low, self.action_space.high
        chunks = np.clip(chunks, low, high).astype(self.action_space.dtype)
        next_obs = self.obs.copy()
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for actions in chunks.swapaxes(0, 1):
            if len(ids) == 0:
                break
            obs, r, term, trunc, _ = self.envs.step(actions[ids], ids.astype(np.int32))
            next_obs[ids], terminated[ids], truncated[ids] = obs, term, trunc & ~term
            self.check(next_obs[ids], "observation")
            self.check(r, "reward")
            reward[ids] += r
            length[ids] += 1
            ids = ids[~(terminated | truncated)[ids]]
        done = terminated | truncated
        self.obs, score = next_obs.copy(), self.score + reward
        if done.any():
            self.obs[done] = self.start(np.flatnonzero(done))
        self.score = np.where(done, 0.0, score)
        return Step(next_obs, reward, terminated, truncated, length, score)

    @property
    def fps(self) -> int:
        return self.envs.envs[0].metadata.get("render_fps") or 30

    def render(self) -> np.ndarray:
        """The first environment's picture, with Gymnasium only."""
        return self.envs.envs[0].render()

    def close(self):
        self.envs.close()


def record_video(policy, env_id: str, folder: Path):
    """Films a policy, see envs/rendering.py."""
    entry_point = getattr(gym.registry.get(env_id), "entry_point", "")
    small = dict(width=320, height=320) if "gymnasium.envs.mujoco" in str(entry_point) else {}
    make_envs = lambda: VectorEnv(env_id, 1, backend="gymnasium", render_mode="rgb_array", **small)
    rendering.record_video(policy, policy.normalize, make_envs, folder)
