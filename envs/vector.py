"""Vectorised Gymnasium tasks that step whole action chunks, over EnvPool or Gymnasium."""

import gymnasium as gym
import numpy as np


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
    """`num_envs` copies of one task that step whole action chunks, over EnvPool or Gymnasium.

    Both backends run through one loop (`step`). An environment that ends inside a chunk sits out
    the rest of it; `self.obs` then holds the first observation of its next episode.
    """

    def __init__(self, env_id: str, num_envs: int, chunk: int = 1, backend: str = "auto", seed: int = 0, threads: int = 1):
        if backend == "auto":
            backend = "envpool" if envpool_has(env_id) else "gymnasium"
        elif backend == "envpool" and not envpool_has(env_id):
            raise SystemExit(f"EnvPool is not installed or has no {env_id!r}: use --backend gymnasium.")
        self.backend, self.num_envs, self.chunk, self.seed = backend, num_envs, chunk, seed
        if backend == "envpool":
            import envpool

            self.envs = envpool.make_gymnasium(env_id, num_envs=num_envs, num_threads=threads, seed=seed)
            space, self.action_space = self.envs.observation_space, self.envs.action_space
        else:
            try:
                mode = gym.vector.AutoresetMode.SAME_STEP
                self.envs = gym.vector.SyncVectorEnv([lambda: SkipNaN(gym.make(env_id))] * num_envs, autoreset_mode=mode)
            except (gym.error.Error, ImportError) as error:
                raise SystemExit(f"Cannot make the environment {env_id!r}: {error}") from error
            space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        for name, box in ("observation", space), ("action", self.action_space):
            if not isinstance(box, gym.spaces.Box) or len(box.shape) != 1:
                raise SystemExit(f"{env_id}: the {name} space must be a flat Box, not {box}.")
        self.obs_dim, self.action_dim = space.shape[0], self.action_space.shape[0]

    def reset(self) -> np.ndarray:
        """Starts a new episode everywhere; returns observations (N, obs_dim), float32."""
        result = self.envs.reset() if self.backend == "envpool" else self.envs.reset(seed=self.seed)
        self.obs = result[0].astype(np.float32)
        return self.obs

    def step(self, chunks: np.ndarray, active: np.ndarray | None = None):
        """Steps action chunks (N, chunk, action_dim), clipped to the action space, where `active` (N,).

        Returns next_obs (N, obs_dim) at the end of the chunk or of the episode inside it, the summed
        reward, `terminated`, `truncated` and the steps taken, each (N,). Raises FloatingPointError
        on a non-finite observation or reward.
        """
        if not np.isfinite(chunks).all():
            raise FloatingPointError("the policy returned a non-finite action")
        chunks = np.clip(chunks, self.action_space.low, self.action_space.high).astype(self.action_space.dtype)
        next_obs, new_obs = self.obs.copy(), self.obs.copy()
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        ids = np.arange(self.num_envs) if active is None else np.flatnonzero(active)
        for c in range(self.chunk):
            obs, r, term, trunc, ended = self._step(chunks[:, c], ids)
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
        return next_obs, reward, terminated, truncated, length

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
