"""Trains a demonstrator to D4RL-"medium" level with Stable-Baselines3's PPO, in some minutes.

    python -m demos.train_demonstrator --env-id Hopper-v4   # needs baselines/requirements.txt

stops when 100 fresh sampled episodes reach 95 % of the target return, and writes
`demos/<env_id>/demonstrator.safetensors`. `demos/dataset.py` turns it into a D4RL-style dataset.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import tyro
from safetensors.torch import load_file, save_file

from common.settings import Count, Seed, Threads, check_bounds
from demos.hdf5 import DEMOS, parsing
from envs.vector import VectorEnv

TARGET_RETURN = {"Hopper-v4": 1422.0, "Walker2d-v4": 2852.0, "HalfCheetah-v4": 4770.0}  # D4RL medium-v2
EPISODES = 100  # of an evaluation
EVAL_EVERY = 5  # rollouts
ROLLOUT = 64  # steps per environment between updates


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium task id
    target_return: Annotated[float, -1e9, 1e9] | None = None  # mean sampled; default: D4RL medium-v2's
    max_steps: Annotated[int, 1, 10**9] = 3_000_000  # environment steps after which to give up
    num_envs: Count = 64  # parallel environments
    init_log_std: Annotated[float, -20, 2] = -0.5  # first log deviation, in units of the action space
    seed: Seed = 0  # of weights, minibatches and environments
    threads: Threads = 1  # CPU threads of torch
    out: Path | None = None  # output file; default demos/<env_id>/demonstrator.safetensors


class Demonstrator:
    """Gaussian policy N(mean(s), exp(log_std)^2) over actions in the units of the environment."""

    def __init__(self, path: Path):
        with parsing(path, "a demonstrator"):
            self.weights = load_file(path)

    def act(self, obs: np.ndarray, noise: float = 1.0, generator: torch.Generator | None = None):
        """Actions (N, action_dim) for raw observations (N, obs_dim); noise=0 gives the mean."""
        w = self.weights
        x = torch.as_tensor(obs, dtype=torch.float64) - w["stats.mean"]
        x = (x / (w["stats.var"] + 1e-8).sqrt()).clamp(-10, 10).float()
        for i in (0, 2):
            x = nn.functional.linear(x, w[f"mean.{i}.weight"], w[f"mean.{i}.bias"]).tanh()
        mean = nn.functional.linear(x, w["mean.4.weight"], w["mean.4.bias"])
        return mean + noise * w["log_std"].exp() * torch.randn(mean.shape, generator=generator)


def export(model) -> dict[str, torch.Tensor]:
    """The weights of a Demonstrator that acts as Stable-Baselines3's PPO on VecNormalize does."""
    policy, stats = model.policy, model.get_vec_normalize_env().obs_rms
    actor = nn.Sequential(*policy.mlp_extractor.policy_net, policy.action_net)
    weights = {f"mean.{name}": value for name, value in actor.state_dict().items()}
    for name in ("mean", "var", "count"):
        weights[f"stats.{name}"] = torch.as_tensor(getattr(stats, name), dtype=torch.float64)
    return weights | {"log_std": policy.log_std.data}


def train(args: Args, target: float):
    """Stable-Baselines3's PPO at its target; mean and deviation of its returns, sampled and not."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.evaluation import evaluate_policy
        from stable_baselines3.common.vec_env import VecNormalize
    except ImportError as error:
        raise SystemExit("PPO is missing: pip install -r baselines/requirements.txt") from error
    envs = VecNormalize(make_vec_env(args.env_id, args.num_envs))
    fresh = make_vec_env(args.env_id, EPISODES, seed=args.seed + args.num_envs)
    fresh = VecNormalize(fresh, training=False, norm_reward=False)
    layers = dict(net_arch=[128, 128], activation_fn=nn.Tanh, log_std_init=args.init_log_std)
    model = PPO("MlpPolicy", envs, learning_rate=lambda left: 3e-4 * left, n_steps=ROLLOUT,
                batch_size=512, policy_kwargs=layers, seed=args.seed, device="cpu")  # fmt: skip
    least = target - 0.05 * abs(target)
    reached = StopTrainingOnRewardThreshold(least)
    stop = EvalCallback(fresh, callback_on_new_best=reached, n_eval_episodes=EPISODES,
                        eval_freq=EVAL_EVERY * ROLLOUT, deterministic=False)  # fmt: skip
    model.learn(args.max_steps, stop)
    if stop.best_mean_reward < least:
        best = f"a return of {stop.best_mean_reward:.0f} is the best of {args.max_steps} steps"
        raise SystemExit(f"{args.env_id}: {best}, short of {target:.0f}; nothing was written.")
    sampled = evaluate_policy(model, fresh, EPISODES, deterministic=False)
    return model, sampled, evaluate_policy(model, fresh, EPISODES, deterministic=True)


def main(args: Args):
    check_bounds(args)
    torch.set_num_threads(args.threads)
    target = TARGET_RETURN.get(args.env_id) if args.target_return is None else args.target_return
    if target is None:
        raise SystemExit(f"No default target return for {args.env_id}; pass --target-return.")
    VectorEnv(args.env_id, 1, backend="gymnasium").close()  # says what is wrong with it
    out = args.out or DEMOS / args.env_id / "demonstrator.safetensors"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {out}: cannot be written ({error.strerror})") from error
    if out.is_dir():
        raise SystemExit(f"--out {out}: is a folder, not a file to write")
    model, sampled, mean = train(args, target)
    info = dict(env_id=args.env_id, algorithm="PPO", seed=args.seed, env_steps=model.num_timesteps)
    info["sampled_return"] = np.round(sampled, 1).tolist()
    info["mean_action_return"] = np.round(mean, 1).tolist()
    save_file(export(model), out, metadata={"demonstrator": json.dumps(info)})
    print(json.dumps(info), "->", out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
