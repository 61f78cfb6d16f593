"""FurnitureSim, the furniture tasks in Isaac Gym on an NVIDIA GPU, behind the interface of envs/furniture_mujoco.py.

Isaac Gym is a download of NVIDIA's for Python 3.8, and the environment is the fork of FurnitureBench that DPPO (Ren et al. 2024)
trains in (github.com/ankile/furniture-bench). Both have to be installed by hand; nothing of them is in this repository.
"""

import importlib.util
import sys

import gymnasium as gym
import numpy as np

from envs.furniture_mujoco import FURNITURE


def isaac_missing() -> str:
    """Why FurnitureSim cannot run here, or "" where it can."""
    for name, what in ("isaacgym", "Isaac Gym"), ("furniture_bench", "furniture-bench"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            return f"{what} is not installed"
    if "isaacgym" not in sys.modules:
        return "Isaac Gym was not imported: it needs Python 3.8 and must come before torch"
    try:
        found = importlib.util.find_spec("furniture_bench.envs.furniture_rl_sim_env")  # imports the package, and its requirements
    except ImportError as error:
        return f"furniture-bench cannot be imported ({error})"
    return "" if found else "the installed furniture-bench has no FurnitureRLSimEnv (it is in the fork ankile/furniture-bench)"


class IsaacVectorEnv:
    """`num_envs` FurnitureRLSimEnvs with DPPO's arguments, stepped in lockstep on the GPU.

    The methods are those of FurnitureVectorEnv. Differences: the simulator draws its initial states itself, so seeds have no effect;
    environments that are not active move on unobserved, and all of them do, for a few steps of the physics, when some are reset. In Lamp
    a reset also holds the bulbs of all other environments where they are until the hand comes near: reset all of them together.
    """

    def __init__(self, num_envs: int, furniture: str, randomness: str, chunk: int = 8, horizon: int = 0, stop_on_success: bool = False):
        from furniture_bench.controllers.control_utils import proprioceptive_quat_to_6d_rotation
        from furniture_bench.envs.furniture_rl_sim_env import FurnitureRLSimEnv
        from furniture_bench.envs.observation import DEFAULT_STATE_OBS

        spec = FURNITURE[furniture]
        self.num_envs, self.chunk, self.stages, self.stop_on_success = num_envs, chunk, len(spec.pairs), stop_on_success
        self.horizon = horizon or spec.horizon
        self.observation_space = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (spec.obs_dim,), np.float32)})
        self.env = FurnitureRLSimEnv(
            act_rot_repr="rot_6d", action_type="pos", april_tags=False, concat_robot_state=True, ctrl_mode="diffik",
            obs_keys=DEFAULT_STATE_OBS, furniture=furniture, gpu_id=0, headless=True, num_envs=num_envs, observation_space="state",
            randomness=randomness, max_env_steps=self.horizon, record=False, pos_scalar=1, rot_scalar=1, stiffness=1_000, damping=200,
        )  # fmt: skip
        self.to_rot6d = proprioceptive_quat_to_6d_rotation
        self.stage, self.t = np.zeros(num_envs, int), np.zeros(num_envs, int)

    def observe(self, obs: dict) -> dict[str, np.ndarray]:
        """The robot's state with its rotation as 6 numbers, then the parts' poses, (N, obs_dim), as DPPO's wrapper has them."""
        parts = [self.to_rot6d(obs["robot_state"]), obs["parts_poses"]]
        state = np.concatenate([np.asarray(part.cpu(), np.float32) for part in parts], -1)
        if not np.isfinite(state).all():
            raise FloatingPointError("the simulator returned a non-finite observation")
        return {"state": state}

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Starts episodes where `mask` (N,); returns all observations."""
        import torch

        mask = np.asarray(mask, bool)
        self.stage[mask] = self.t[mask] = 0
        return self.observe(self.env.reset(torch.as_tensor(np.flatnonzero(mask), dtype=torch.int32, device=self.env.device)))

    def step(self, chunks: np.ndarray, active: np.ndarray):
        """Chunks (N, chunk, 10) where `active` (N,); returns obs, reward, terminated, truncated, stages, steps."""
        import torch

        if not np.isfinite(chunks).all():
            raise FloatingPointError("the policy returned a non-finite action")
        actions = torch.as_tensor(chunks, dtype=torch.float32, device=self.env.device)
        total, steps = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        for i in range(self.chunk):
            obs, reward, _, _ = self.env.step(actions[:, i])
            counts = active & (self.t < self.horizon) & ~(self.stop_on_success & (self.stage == self.stages))
            reward = np.where(counts, np.asarray(reward.squeeze(-1).cpu(), float), 0)
            total, steps, self.t = total + reward, steps + counts, self.t + counts
            self.stage = self.stage + reward.astype(int)
        terminated = active & (self.stage == self.stages) & self.stop_on_success
        return self.observe(obs), total, terminated, active & ~terminated & (self.t >= self.horizon), self.stage.copy(), steps

    def close(self):
        self.env = None
