"""What the environments of all three families have in common."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from scipy.stats import binomtest


class Step(NamedTuple):
    """What one chunk of actions led to; every array is (N, ...)."""

    next_obs: np.ndarray | dict[str, np.ndarray]
    """Observations where the chunk ended, before any new episode."""
    reward: np.ndarray
    """Rewards, summed over the chunk."""
    terminated: np.ndarray
    """Whether the episode ended by itself."""
    truncated: np.ndarray
    """Whether a time limit cut it."""
    length: np.ndarray
    """Environment steps taken, at most those of the chunk."""
    score: np.ndarray
    """Of the episode so far: return (Gym), success 0 or 1 (robomimic), pairs assembled (furniture)."""


class ChunkEnvs(Protocol):
    """`num_envs` environments that step whole chunks of actions; `obs` is what to act on next."""

    num_envs: int
    obs: np.ndarray | dict[str, np.ndarray]

    def reset(self, seeds: int | Iterator[int]) -> None:
        """Starts an episode everywhere: a first seed, or an iterator that gives one to each new episode."""

    def step(self, chunks: np.ndarray, active: np.ndarray | None = None) -> Step:
        """Steps raw actions (N, chunk, action_dim) where `active` (N,); an ended episode starts anew."""

    def state_dict(self) -> dict:
        """Seed and actions since the last reset: simulators cannot be saved."""

    def load_state_dict(self, state: dict) -> None:
        """Replays them."""

    def close(self) -> None:
        """Ends the simulators."""


def success_rate(success: np.ndarray, name: str) -> dict[str, float]:
    """The share of episodes (n,) that succeeded, by name, and its 95 % interval (Wilson)."""
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    return {name: float(success.mean()), f"{name}_low": interval.low, f"{name}_high": interval.high}
