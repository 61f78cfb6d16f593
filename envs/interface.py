"""What the environments of all three families have in common.

They have `num_envs`, and `obs`, what to act on next. `reset(seeds)` starts an episode everywhere: from a
first seed on, or (not on Gym) with an iterator's seed for each. `step(chunks)` steps raw actions (N,
chunk, action_dim), on Gym only where `active` (N,); an ended episode starts anew. `close()` ends the
simulators. Numbers that are not finite end the run; where MuJoCo diverges, manipulation's episode ends.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest


class Step(NamedTuple):
    """What one chunk of actions led to; every array is (N, ...)."""

    next_obs: np.ndarray | dict[str, np.ndarray]  # where it ended; robomimic's may be a new episode's
    reward: np.ndarray  # summed over the chunk
    terminated: np.ndarray  # whether the episode ended by itself
    truncated: np.ndarray  # whether a time limit cut it
    length: np.ndarray  # environment steps taken, at most those of the chunk
    score: np.ndarray  # of the episode so far: return (Gym), success (robomimic), pairs (furniture)


def check_finite(values: np.ndarray, fault="The policy returned a non-finite action"):
    """Ends the run with the fault where a number is NaN or infinite."""
    if not np.isfinite(values).all():
        raise SystemExit(f"{fault}.")


class Episodes:
    """The part that the environments of robomimic and furniture share: it hands seeds to episodes.

    `episode` (N,) is the number of the seed that each environment runs, counted from the reset; -1 where
    no seed was left. `score` (N,) is that of the episode so far. A subclass has `start`, new episodes in
    the environments of indices (n,), and `run_chunks`, which gives reward, terminated, truncated, length
    and score of each from its chunk. Both write to `obs`.
    """

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.score, self.episode = np.zeros((2, num_envs), int)

    def reset(self, seeds: int | Iterator[int]):
        self.seeds = itertools.count(seeds) if isinstance(seeds, int) else seeds
        self.started = 0
        self.start(np.arange(self.num_envs))

    def take_seeds(self, indices: np.ndarray) -> dict[int, int]:
        """The seeds of new episodes in environments `indices`, in this order, while there are any."""
        pairs = zip(indices.tolist(), self.seeds, strict=False)
        seeds = {i: seed % 2**32 for i, seed in pairs}  # NumPy's generators take no other
        self.score[indices], self.episode[indices] = 0, -1
        self.episode[list(seeds)] = self.started + np.arange(len(seeds))
        self.started += len(seeds)
        return seeds

    def step(self, chunks: np.ndarray) -> Step:
        """See above; who is out of seeds sits still."""
        indices = np.flatnonzero(self.episode >= 0)
        check_finite(chunks[indices])
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        self.obs = copy.deepcopy(self.obs)  # who has the last one keeps it
        for i, result in zip(indices, self.run_chunks(indices, chunks[indices]), strict=True):
            reward[i], terminated[i], truncated[i], length[i], self.score[i] = result
        next_obs, score = copy.deepcopy(self.obs), self.score.copy()
        self.start(np.flatnonzero(terminated | truncated))
        return Step(next_obs, reward, terminated, truncated, length, score)


def success_rate(success: np.ndarray, name: str) -> dict[str, float]:
    """The share of episodes (n,) that succeeded, by name, and its 95 % interval (Wilson)."""
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    shares = {name: success.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: float(share) for key, share in shares.items()}
