"""FurnitureSim, the furniture tasks in Isaac Gym on an NVIDIA GPU, behind envs/interface.py.

Isaac Gym is a download of NVIDIA's for Python 3.8, the environment DPPO's (Ren et al. 2024) fork of
FurnitureBench, github.com/ankile/furniture-bench. Both have to be installed by hand.
"""

import importlib.util
import sys

import numpy as np
import torch

from envs.furniture_mujoco import FURNITURE
from envs.interface import Episodes, Step, check_finite


def isaac_missing() -> str:
    """Why FurnitureSim cannot run here, or "" where it can."""
    for name, what in ("isaacgym", "Isaac Gym"), ("furniture_bench", "furniture-bench"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            return f"{what} is not installed"
    if "isaacgym" not in sys.modules:
        return "Isaac Gym was not imported: it needs Python 3.8 and must come before torch"
    try:  # imports the package, and its requirements
        found = importlib.util.find_spec("furniture_bench.envs.furniture_rl_sim_env")
    except ImportError as error:
        return f"furniture-bench cannot be imported ({error})"
    return "" if found else "the installed furniture-bench is not the fork ankile/furniture-bench"


class IsaacVectorEnv(Episodes):
    """`num_envs` FurnitureRLSimEnvs with DPPO's arguments, stepped in lockstep on the GPU.

    A reset disturbs the other environments: all move on for a few steps of the physics. So episodes run
    to the time limit, also after success, and start together. What the seeds are has no effect.
    """

    def __init__(self, num_envs: int, furniture: str, randomness: str, horizon=None):
        from furniture_bench.controllers.control_utils import proprioceptive_quat_to_6d_rotation
        from furniture_bench.envs.furniture_rl_sim_env import FurnitureRLSimEnv
        from furniture_bench.envs.observation import DEFAULT_STATE_OBS

        super().__init__(num_envs)
        self.obs_dim, self.action_dim = FURNITURE[furniture].obs_dim, 10
        self.horizon = horizon or FURNITURE[furniture].horizon
        self.env = FurnitureRLSimEnv(
            furniture=furniture, randomness=randomness, num_envs=num_envs, max_env_steps=self.horizon,
            act_rot_repr="rot_6d", action_type="pos", april_tags=False, concat_robot_state=True,
            ctrl_mode="diffik", obs_keys=DEFAULT_STATE_OBS, observation_space="state", headless=True,
            record=False, gpu_id=0, pos_scalar=1, rot_scalar=1, stiffness=1_000, damping=200,
        )  # fmt: skip
        self.to_rot6d = proprioceptive_quat_to_6d_rotation

    def observe(self, obs: dict) -> np.ndarray:
        """The robot's state with its rotation as 6 numbers, then the parts' poses, as DPPO's wrapper."""
        parts = [self.to_rot6d(obs["robot_state"]), obs["parts_poses"]]
        state = np.concatenate([np.asarray(part.cpu(), np.float32) for part in parts], -1)
        check_finite(state, "The simulator returned a non-finite observation")
        return state

    def start(self, indices: np.ndarray):
        """Starts as many episodes as there are environments and seeds."""
        self.t = np.zeros(self.num_envs, int)
        count = len(self.take_seeds(indices))
        if count:
            self.obs = self.observe(self.env.reset(torch.arange(count, device=self.env.device).int()))

    def step(self, chunks: np.ndarray) -> Step:
        """See envs/interface.py; environments without an episode move on unobserved."""
        running = self.episode >= 0
        check_finite(chunks[running])
        total, length = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        for action in torch.as_tensor(chunks, dtype=torch.float32, device=self.env.device).unbind(1):
            obs, reward, _, _ = self.env.step(action)
            counts = running & (self.t < self.horizon)
            total += np.where(counts, np.asarray(reward.squeeze(-1).cpu(), float), 0)
            length += counts
            self.t += counts
        self.score += total.astype(int)
        self.obs, truncated = self.observe(obs), running & (self.t >= self.horizon)
        step = Step(self.obs, total, np.zeros(self.num_envs, bool), truncated, length, self.score.copy())
        self.episode[truncated] = -1
        if (self.episode < 0).all():
            self.start(np.arange(self.num_envs))
        return step

    def close(self):
        self.env = None
