"""Trains a demonstrator to D4RL-"medium" level with PPO (Schulman et al. 2017), in a few minutes.

    python -m demos.train_demonstrator --env-id Hopper-v4

stops when 100 fresh sampled episodes come within 5 % of the target return, and writes
`demos/<env_id>/demonstrator.safetensors`: a Gaussian policy with the running observation
statistics. `demos/dataset.py` turns it into a D4RL-style dataset.
"""

import json
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from safetensors import safe_open
from safetensors.torch import save_file

from envs.vector import VectorEnv

TARGET_RETURN = {"Hopper-v4": 1422.0, "Walker2d-v4": 2852.0, "HalfCheetah-v4": 4770.0}  # D4RL medium-v2


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium task id."""
    target_return: float | None = None
    """Mean sampled return at which to stop; default: D4RL medium-v2's for the three tasks."""
    max_steps: int = 3_000_000
    """Environment steps after which to give up."""
    num_envs: int = 64
    """Parallel environments."""
    rollout_steps: int = 64
    """Steps per environment between updates."""
    epochs: int = 10
    """Passes over each rollout."""
    minibatch: int = 512
    """Transitions per gradient step."""
    learning_rate: float = 3e-4
    """Adam step size, annealed linearly to 0 at max_steps."""
    init_log_std: float = -0.5
    """Initial log standard deviation of the Gaussian policy, in units of the action space."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clipping range of the probability ratio."""
    seed: int = 0
    """Seed of weights, minibatches and environments."""
    threads: int = 1
    """CPU threads of torch and EnvPool."""
    out: Path | None = None
    """Output file; default demos/<env_id>/demonstrator.safetensors."""


def mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two tanh layers of 128 with orthogonal initialisation."""
    layers = [nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class RunningStats(nn.Module):
    """Running mean and variance over the first axis (Chan et al. 1979)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x: np.ndarray):
        x = torch.as_tensor(x, dtype=torch.float64)
        delta, n, total = x.mean(0) - self.mean, len(x), self.count + len(x)
        m2 = self.var * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    def normalize(self, x: np.ndarray) -> torch.Tensor:
        z = (torch.as_tensor(x, dtype=torch.float64) - self.mean) / (self.var + 1e-8).sqrt()
        return z.clamp(-10, 10).float()


class Demonstrator(nn.Module):
    """Gaussian policy N(mean(s), exp(log_std)^2) over actions in the units of the environment."""

    def __init__(self, obs_dim: int, action_dim: int, init_log_std: float = -1.0):
        super().__init__()
        self.stats = RunningStats(obs_dim)
        self.mean = mlp(obs_dim, action_dim, 0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), init_log_std))

    def act(self, obs: np.ndarray, noise: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """Actions (N, action_dim) for raw observations (N, obs_dim); noise=0 gives the mean."""
        mean = self.mean(self.stats.normalize(obs))
        return mean + noise * self.log_std.exp() * torch.randn(mean.shape, generator=generator)

    @classmethod
    def load(cls, path: Path) -> "Demonstrator":
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
        policy = cls(len(state["stats.mean"]), len(state["log_std"]))
        policy.load_state_dict(state)
        return policy


@torch.no_grad()
def evaluate(policy: Demonstrator, env_id: str, episodes: int, noise: float, seed: int) -> np.ndarray:
    """Undiscounted returns (episodes,) of the first episode of each environment."""
    envs = VectorEnv(env_id, episodes, seed=seed)
    obs, returns, alive = envs.reset(), np.zeros(episodes), np.ones(episodes, bool)
    while alive.any():
        _, reward, terminated, truncated, _ = envs.step(policy.act(obs, noise).numpy()[:, None])
        returns += reward * alive
        alive &= ~(terminated | truncated)
        obs = envs.obs
    return returns


def main(args: Args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    target = args.target_return or TARGET_RETURN.get(args.env_id)
    if target is None:
        raise SystemExit(f"No default target return for {args.env_id}; pass --target-return.")
    out = args.out or Path(__file__).parent / args.env_id / "demonstrator.safetensors"
    N, T = args.num_envs, args.rollout_steps
    envs = VectorEnv(args.env_id, N, seed=args.seed, threads=args.threads)
    policy = Demonstrator(envs.obs_dim, envs.action_dim, args.init_log_std)
    value = mlp(envs.obs_dim, 1, 1.0)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    reward_stats, discounted = RunningStats(1), np.zeros(N)
    obs, episode_return, recent = envs.reset(), np.zeros(N), deque(maxlen=100)
    policy.stats.update(obs)
    start = time.time()
    for step in range(0, args.max_steps, N * T):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.max_steps)
        observed, A, L, V, NV = [], [], [], [], []
        R, term_, done_ = torch.zeros(T, N), torch.zeros(T, N), torch.zeros(T, N)
        for t in range(T):
            o = policy.stats.normalize(obs)  # (N, obs_dim)
            with torch.no_grad():
                mean = policy.mean(o)
                a = mean + policy.log_std.exp() * torch.randn_like(mean)
                log_prob = (-0.5 * ((a - mean) / policy.log_std.exp()) ** 2 - policy.log_std).sum(-1)
                next_obs, reward, terminated, truncated, _ = envs.step(a.numpy()[:, None])
                V.append(value(o)[:, 0])
                NV.append(value(policy.stats.normalize(next_obs))[:, 0])  # bootstraps through time limits
            obs, done = envs.obs, terminated | truncated
            policy.stats.update(obs)
            episode_return += reward
            discounted = discounted * args.gamma + reward
            reward_stats.update(discounted[:, None])
            discounted[done] = 0
            recent.extend(episode_return[done])
            episode_return[done] = 0
            observed.append(o), A.append(a), L.append(log_prob)
            scale = float(reward_stats.var.sqrt()) + 1e-8
            R[t] = torch.as_tensor(reward / scale).clamp(-10, 10)
            term_[t], done_[t] = torch.as_tensor(terminated), torch.as_tensor(done)
        advantage, gae = torch.zeros(T, N), torch.zeros(N)
        for t in reversed(range(T)):
            delta = R[t] + args.gamma * (1 - term_[t]) * NV[t] - V[t]
            gae = delta + args.gamma * args.gae_lambda * (1 - done_[t]) * gae
            advantage[t] = gae
        target_value = (advantage + torch.stack(V)).flatten()
        observed, A, L, advantage = torch.cat(observed), torch.cat(A), torch.cat(L), advantage.flatten()
        for _ in range(args.epochs):
            for i in torch.randperm(N * T).split(args.minibatch):
                mean = policy.mean(observed[i])
                log_prob = (-0.5 * ((A[i] - mean) / policy.log_std.exp()) ** 2 - policy.log_std).sum(-1)
                ratio = (log_prob - L[i]).exp()
                adv = (advantage[i] - advantage[i].mean()) / (advantage[i].std() + 1e-8)
                policy_loss = -torch.min(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()
                loss = policy_loss + 0.5 * (value(observed[i])[:, 0] - target_value[i]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        if (step // (N * T) + 1) % 10 == 0:
            level = np.mean(recent)  # lags behind the policy, so fresh episodes decide
            if level >= 0.5 * target:
                level = evaluate(policy, args.env_id, 100, 1.0, seed=args.seed + 2).mean()
            print(f"{args.env_id} step {step + N * T:8d}  return {level:7.0f}  std {policy.log_std.exp().mean():.3f}  {time.time() - start:.0f} s", flush=True)
            if level >= 0.95 * target:
                break
    else:
        raise SystemExit(f"{args.env_id}: return {level:.0f} after {args.max_steps} steps, short of {target:.0f}; nothing was written.")
    sampled = evaluate(policy, args.env_id, 100, 1.0, seed=args.seed + 1)
    mean = evaluate(policy, args.env_id, 100, 0.0, seed=args.seed + 1)
    info = {
        "env_id": args.env_id, "algorithm": "PPO", "seed": args.seed, "env_steps": step + N * T,
        "sampled_return": [round(sampled.mean(), 1), round(sampled.std(), 1)],
        "mean_action_return": [round(mean.mean(), 1), round(mean.std(), 1)],
        "wall_s": round(time.time() - start, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(policy.state_dict(), out, metadata={"demonstrator": json.dumps(info)})
    print(json.dumps(info), "->", out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
