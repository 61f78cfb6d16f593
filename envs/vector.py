"""Vectorised Gymnasium tasks that step whole action chunks, over EnvPool or Gymnasium."""

import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from envs.interface import Step


class SkipNaN(gym.Wrapper):
    """An action of NaN leaves the environment as it is: how one of a batch sits out a step."""

    def reset(self, **kwargs):
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action):
        if np.isnan(action).any():
            return self.obs, 0.0, False, False, {}
        self.obs, *rest = self.env.step(action)
        return self.obs, *rest


def envpool_has(env_id: str) -> bool:
    try:
        import envpool
    except ImportError:
        return False
    return env_id in envpool.list_all_envs()


class VectorEnv:
    """`num_envs` copies of one task, over EnvPool where it has the task, else over Gymnasium; see envs/interface.py.

    Both backends run through one loop (`step`). An environment that ends inside a chunk sits out the rest of it.
    """

    def __init__(self, env_id: str, num_envs: int, threads: int = 1, backend: str | None = None):
        self.env_id, self.num_envs, self.threads = env_id, num_envs, threads
        self.backend = backend or ("envpool" if envpool_has(env_id) else "gymnasium")
        self.make(seed=0)
        if self.backend == "envpool":
            space, self.action_space = self.envs.observation_space, self.envs.action_space
        else:
            space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        for name, box in ("observation", space), ("action", self.action_space):
            if not isinstance(box, gym.spaces.Box) or len(box.shape) != 1:
                raise SystemExit(f"{env_id}: the {name} space must be a flat Box, not {box}.")
        self.obs_dim, self.action_dim = space.shape[0], self.action_space.shape[0]

    def make(self, seed: int):
        """New simulators: EnvPool takes its seed when it is made."""
        if self.backend == "envpool":
            import envpool

            self.envs = envpool.make_gymnasium(
                self.env_id, num_envs=self.num_envs, num_threads=self.threads, seed=seed
            )
            return
        try:
            mode = gym.vector.AutoresetMode.SAME_STEP
            makers = [lambda: SkipNaN(gym.make(self.env_id))] * self.num_envs
            self.envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=mode)
        except (gym.error.Error, ImportError) as error:
            raise SystemExit(f"Cannot make the environment {self.env_id!r}: {error}") from error

    def reset(self, seeds: int):
        self.envs.close()
        self.make(seeds)
        result = self.envs.reset() if self.backend == "envpool" else self.envs.reset(seed=seeds)
        self.obs = result[0].astype(np.float32)
        self.seed, self.tape, self.score = seeds, [], np.zeros(self.num_envs)

    def state_dict(self) -> dict:
        return {"seed": self.seed, "tape": torch.as_tensor(np.array(self.tape))}

    def load_state_dict(self, state: dict):
        self.reset(state["seed"])
        for chunks in state["tape"].cpu().numpy():
            self.step(chunks)

    def step(self, chunks: np.ndarray, active: np.ndarray | None = None) -> Step:
        """See envs/interface.py; actions are clipped to the action space. Raises FloatingPointError on NaN."""
        if not np.isfinite(chunks).all():
            raise FloatingPointError("the policy returned a non-finite action")
        self.tape.append(chunks)
        low, high = self.action_space.low, self.action_space.high
        chunks = np.clip(chunks, low, high).astype(self.action_space.dtype)
        next_obs, new_obs = self.obs.copy(), self.obs.copy()
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        ids = np.arange(self.num_envs) if active is None else np.flatnonzero(active)
        for actions in chunks.swapaxes(0, 1):
            obs, r, term, trunc, ended = self._step(actions, ids)
            for name, value in ("observation", obs), ("reward", r):
                if not np.isfinite(value).all():
                    raise FloatingPointError(f"the environment returned a non-finite {name}")
            next_obs[ids], terminated[ids], truncated[ids] = obs, term, trunc & ~term
            reward[ids] += r
            length[ids] += 1
            new_obs[ids[term | trunc]] = ended
            ids = ids[~(term | trunc)]
            if len(ids) == 0:
                break
        done = terminated | truncated
        if self.backend == "envpool" and done.any():
            new_obs[done] = self.envs.reset(np.flatnonzero(done).astype(np.int32))[0]
        self.obs = np.where(done[:, None], new_obs, next_obs)
        score = self.score + reward
        self.score = np.where(done, 0.0, score)
        return Step(next_obs, reward, terminated, truncated, length, score)

    def _step(self, actions: np.ndarray, ids: np.ndarray):
        """One step of environments `ids`; the last value is the new episodes' observations, if known yet."""
        if self.backend == "envpool":
            obs, r, term, trunc, _ = self.envs.step(actions[ids], ids.astype(np.int32))
            return obs, r, term, trunc, obs[term | trunc]
        padded = np.full_like(actions, np.nan)
        padded[ids] = actions[ids]
        obs, r, term, trunc, info = self.envs.step(padded)
        done = term | trunc
        new_obs = obs[done]
        if done.any():
            obs[done] = np.stack(info["final_obs"][done])
        return obs[ids], r[ids], term[ids], trunc[ids], new_obs

    def close(self):
        self.envs.close()


def record_video(policy, env_id: str, folder: Path):
    """One episode of a policy from x_0 = 0 as mp4, by Gymnasium's RecordVideo."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = gym.make(env_id, render_mode="rgb_array", width=320, height=320)
        env = gym.wrappers.RecordVideo(env, str(folder), disable_logger=True)
        obs, over = env.reset(seed=0)[0], False
        while not over:
            obs = policy.normalize(obs)[None]
            chunk = policy.to_env(policy.sample(obs, torch.zeros(1, policy.action_size, device=obs.device)))[0]
            for action in chunk.clip(env.action_space.low, env.action_space.high):
                obs, _, terminated, truncated, _ = env.step(action)
                over = terminated or truncated
                if over:
                    break
        env.close()
    except Exception as error:  # GL drivers fail in many ways; none of them may cost the trained policy
        print(f"No video: {error}. MuJoCo needs a GL backend: install libegl1 or libosmesa6, set MUJOCO_GL.")
