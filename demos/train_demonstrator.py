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
ROLLOUT, EPOCHS, MINIBATCH = 64, 10, 512  # steps per environment between updates; passes over them
LEARNING_RATE = 3e-4  # of Adam, annealed linearly to 0 at max_steps
GAMMA, LAMBDA = 0.99, 0.95  # discount per step; of generalised advantage estimation
CLIP = 0.2  # range of the probability ratio


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium task id
    target_return: float | None = None  # mean sampled return to stop at; default: D4RL medium-v2's
    max_steps: int = 3_000_000  # environment steps after which to give up
    num_envs: int = 64  # parallel environments
    init_log_std: float = -0.5  # initial log standard deviation, in units of the action space
    seed: int = 0  # of weights, minibatches and environments
    threads: int = 1  # CPU threads of torch and EnvPool
    out: Path | None = None  # output file; default demos/<env_id>/demonstrator.safetensors


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

    def act(self, obs: np.ndarray, noise: float = 1.0, generator: torch.Generator | None = None):
        """Actions (N, action_dim) for raw observations (N, obs_dim); noise=0 gives the mean."""
        mean = self.mean(self.stats.normalize(obs))
        return mean + noise * self.log_std.exp() * torch.randn(mean.shape, generator=generator)

    def log_prob(self, action: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Log density (N,) of actions (N, action_dim), up to a constant."""
        return (-0.5 * ((action - mean) / self.log_std.exp()) ** 2 - self.log_std).sum(-1)

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
    envs = VectorEnv(env_id, episodes)
    envs.reset(seed)
    returns, alive = np.zeros(episodes), np.ones(episodes, bool)
    while alive.any():
        step = envs.step(policy.act(envs.obs, noise).numpy()[:, None])
        done = alive & (step.terminated | step.truncated)
        returns[done] = step.score[done]
        alive &= ~done
    return returns


def advantages(value, reward, next_value, terminated, done) -> torch.Tensor:
    """Generalised advantages (T, N) of steps (T, N) (Schulman et al. 2016)."""
    result, gae = torch.zeros_like(value), torch.zeros_like(value[0])
    for t in reversed(range(len(result))):
        delta = reward[t] + GAMMA * (1 - terminated[t]) * next_value[t] - value[t]
        gae = delta + GAMMA * LAMBDA * (1 - done[t]) * gae
        result[t] = gae
    return result


def update(policy: Demonstrator, value: nn.Module, optimizer, o, a, log_prob, advantage, target):
    """PPO's epochs over one rollout of B steps: o (B, obs_dim), a (B, action_dim), the others (B,)."""
    parameters = optimizer.param_groups[0]["params"]
    for _ in range(EPOCHS):
        for i in torch.randperm(len(o)).split(MINIBATCH):
            ratio = (policy.log_prob(a[i], policy.mean(o[i])) - log_prob[i]).exp()
            adv = (advantage[i] - advantage[i].mean()) / (advantage[i].std() + 1e-8)
            policy_loss = -torch.min(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv).mean()
            loss = policy_loss + 0.5 * (value(o[i])[:, 0] - target[i]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()


def main(args: Args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    target = args.target_return or TARGET_RETURN.get(args.env_id)
    if target is None:
        raise SystemExit(f"No default target return for {args.env_id}; pass --target-return.")
    out = args.out or Path(__file__).parent / args.env_id / "demonstrator.safetensors"
    N, T = args.num_envs, ROLLOUT
    envs = VectorEnv(args.env_id, N, args.threads)
    envs.reset(args.seed)
    policy = Demonstrator(envs.obs_dim, envs.action_dim, args.init_log_std)
    value = mlp(envs.obs_dim, 1, 1.0)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, eps=1e-5, fused=True)
    reward_stats, discounted = RunningStats(1), np.zeros(N)
    obs, recent = envs.obs, deque(maxlen=100)
    policy.stats.update(obs)
    start = time.time()
    for step in range(0, args.max_steps, N * T):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / args.max_steps)
        steps = []
        for _ in range(T):
            o = policy.stats.normalize(obs)  # (N, obs_dim)
            with torch.no_grad():
                mean = policy.mean(o)
                a = mean + policy.log_std.exp() * torch.randn_like(mean)
                log_prob = policy.log_prob(a, mean)
                now = envs.step(a.numpy()[:, None])
                envs.tape.clear()  # nothing resumes this
                v = value(o)[:, 0]
                next_v = value(policy.stats.normalize(now.next_obs))[:, 0]  # also at time limits
            obs, done = envs.obs, now.terminated | now.truncated
            policy.stats.update(obs)
            discounted = discounted * GAMMA + now.reward
            reward_stats.update(discounted[:, None])
            discounted[done] = 0
            recent.extend(now.score[done])
            scale = float(reward_stats.var.sqrt()) + 1e-8
            r = torch.as_tensor(now.reward / scale).clamp(-10, 10).float()
            ended, done = (torch.as_tensor(x, dtype=torch.float32) for x in (now.terminated, done))
            steps.append((o, a, log_prob, v, r, next_v, ended, done))
        o, a, log_prob, v, *rest = map(torch.stack, zip(*steps, strict=True))  # (T, N, ...)
        advantage = advantages(v, *rest)
        batch = [x.flatten(0, 1) for x in (o, a, log_prob, advantage, advantage + v)]
        update(policy, value, optimizer, *batch)
        if (step // (N * T) + 1) % 10 == 0:
            level = np.mean(recent)  # lags behind the policy, so fresh episodes decide
            if level >= 0.5 * target:
                level = evaluate(policy, args.env_id, 100, 1.0, seed=args.seed + 2).mean()
            text = f"step {step + N * T:8d}  return {level:7.0f}  std {policy.log_std.exp().mean():.3f}"
            print(f"{args.env_id} {text}  {time.time() - start:.0f} s", flush=True)
            if level >= 0.95 * target:
                break
    else:
        raise SystemExit(f"{args.env_id}: return {level:.0f} after {args.max_steps} steps, "
                         f"short of {target:.0f}; nothing was written.")  # fmt: skip
    sampled = evaluate(policy, args.env_id, 100, 1.0, seed=args.seed + 1)
    mean = evaluate(policy, args.env_id, 100, 0.0, seed=args.seed + 1)
    info = {"env_id": args.env_id, "algorithm": "PPO", "seed": args.seed, "env_steps": step + N * T}
    info["sampled_return"] = [round(sampled.mean(), 1), round(sampled.std(), 1)]
    info["mean_action_return"] = [round(mean.mean(), 1), round(mean.std(), 1)]
    info["wall_s"] = round(time.time() - start, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(policy.state_dict(), out, metadata={"demonstrator": json.dumps(info)})
    print(json.dumps(info), "->", out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
