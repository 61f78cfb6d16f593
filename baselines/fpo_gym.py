"""FPO (Flow Policy Optimization, McAllister et al. 2025, arXiv 2507.21053) and FPO++ for Gymnasium tasks.

    python -m baselines.fpo_gym --env-id Hopper-v4                  # FPO++: a ratio per sample, asymmetric trust region
    python -m baselines.fpo_gym --env-id Hopper-v4 --form fpo       # FPO: one ratio per action

finetunes a pretrained flow-matching policy by PPO whose likelihood ratio is that of flow-matching losses.
Same skeleton as rldt_gym.py; docs/baselines.md has the equations.
In the settings below, "official" means this method's own code, "paper" and "authors" those of RLDT.
"""

import copy
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.flow import ResidualBlock, VelocityMLP, flow_matching_loss, interpolate, sample
from demos import dataset
from envs.vector import VectorEnv


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium task with flat Box observations and actions. Hopper-v4, Walker2d-v4 and HalfCheetah-v4 ship a base policy."""
    preset: Literal["laptop", "paper"] = "laptop"
    """Which defaults: `laptop` (two CPU cores, minutes) or `paper` (those of RLDT's authors for FPO++ and the size of their rollouts, for a GPU). Explicit flags win."""
    exp_name: str = "fpo"
    """Name of the experiment, part of the run directory's name."""
    seed: int = 1
    """Seed of networks, minibatches, noise and environments."""
    runs: Path = Path("runs")
    """Directory in which run directories are made."""
    device: str = "auto"
    """Torch device: cpu, cuda, cuda:0, ... `auto` takes CUDA where there is one."""
    threads: int = 1
    """CPU threads of torch and EnvPool. One is bit-for-bit reproducible and leaves room for a second seed; two are 1.6 times as fast."""
    backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """Vector environments: EnvPool (C++) where it has the task, else Gymnasium."""
    bf16: bool = True
    """bfloat16 matrix products (autocast): in the no-grad sampler and the update steps. Weights and Euler states stay fp32."""
    compile: bool = False
    """torch.compile the networks (on an H100 a tenth faster; costs about a minute at the start)."""

    # what to run
    resume: Path | None = None
    """Run directory to continue from its last checkpoint, with the arguments stored there."""
    evaluate: Path | None = None
    """Run directory whose final policy to load and evaluate, nothing else."""
    track: bool = False
    """Also log to Weights & Biases (needs `pip install wandb`)."""
    wandb_project: str = "rldt"
    """Weights & Biases project."""
    capture_video: bool = False
    """Record one evaluation episode of the final policy as mp4 (needs a MuJoCo GL backend, see MUJOCO_GL)."""

    # base policy
    base: Path | None = None
    """Base policy (.safetensors); default demos/<env_id>/base.safetensors where it exists, else it is pretrained."""
    pretrain: bool = False
    """Pretrain the base policy even where one exists; it is kept in the run directory."""
    dataset: str | None = None
    """Demonstrations: D4RL .hdf5, DPPO train.npz, or Minari id or folder; default: made by the shipped demonstrator."""
    bc_epochs: int = 40
    """Pretraining passes over the data (paper: 200)."""
    bc_batch: int = 512
    """Pretraining batch, in action chunks (paper: 128)."""
    bc_lr: float = 1e-3
    """Initial learning rate of pretraining, AdamW with weight decay 1e-6 (paper: 1e-3)."""
    bc_lr_end: float = 1e-4
    """Final learning rate of pretraining, cosine schedule (paper: 1e-4)."""
    bc_ema: float = 0.995
    """Decay per step of the weight average that becomes the base policy (authors: 0.995)."""
    actor_width: int = 512
    """Hidden width of the velocity network (paper: 512)."""
    actor_depth: int = 3
    """Hidden layers of the velocity network, odd (paper: 3)."""
    time_dim: int = 16
    """Size of the time embedding (paper: 16)."""
    chunk: int = 4
    """Actions per decision, executed open loop, in environment steps (paper: 4)."""
    euler_steps: int = 8
    """K, Euler steps from noise to action (paper: 8)."""

    # rollouts
    iterations: int = 0
    """Training iterations, the evaluation-only ones included (DPPO: 1000, --preset paper: 80); 0: 31 for Hopper-v4, else 106 (1 M and 3.5 M steps), without limit under `wall_budget_s`."""
    wall_budget_s: float = 0.0
    """Seconds of training and evaluation after which the run makes its final evaluation and ends; 0: no limit. `iterations`, if given, may end it sooner."""
    num_envs: int = 40
    """Parallel environments, per process under torchrun (DPPO: 40, --preset paper: RLDT's 100)."""
    rollout_chunks: int = 250
    """Chunks per environment and iteration (DPPO: 500)."""
    zero_fraction: float = 0.25
    """Share of environments that start from x_0 = 0 instead of noise, as the evaluation does (DPPO: 0)."""
    eval_every: int = 6
    """Every n-th iteration only evaluates, and resets the environments (DPPO: 10, RLDT's authors: 5)."""
    eval_episodes: int = 20
    """Episodes per evaluation during training, from x_0 = 0 and again from noise (DPPO: 40, RLDT's authors: 100)."""
    final_eval_episodes: int = 100
    """Episodes of the base, final and best evaluations, from x_0 = 0 and again from noise (RLDT's authors: 100)."""

    # value
    gamma: float = 0.99
    """Discount per chunk of actions (DPPO: 0.99)."""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (DPPO: 0.95)."""
    value_lr: float = 1e-3
    """Adam step size of the value network (DPPO: 1e-3; official FPO: 3e-4)."""
    value_width: int = 256
    """Hidden width of the value network (DPPO: 256)."""
    value_depth: int = 3
    """Hidden layers of the value network, odd (DPPO: 3)."""
    warmup_iterations: int = 0
    """Training iterations before the actor starts (DPPO: 0)."""

    # actor
    form: Literal["fpo", "fpo++"] = "fpo++"
    """`fpo`: ratio of the mean losses of an action, clipped. `fpo++`: a ratio per sample, clipped where the advantage is positive, SPO else. The laptop settings were searched for with `fpo++`."""
    samples: int = 0
    """N, pairs (epsilon, t) per action; 0: 8 (official FPO), of `fpo++` with --preset paper 16 (RLDT's paper)."""
    clip: float = 0.0
    """Trust region of the ratio; 0: 0.05 of `fpo` (official); of `fpo++` 0.04, with --preset paper 0.01 (RLDT's paper, the best of 0.01, 0.02, 0.04)."""
    loss_clamp: float = 20.0
    """Flow-matching losses are cut off here (official FPO++: 20)."""
    log_ratio_clamp: float = 10.0
    """Log-ratios are cut off at +- this (official FPO: 3 per sample; FPO++: 10)."""
    max_grad_norm: float = 1.0
    """The actor's gradient is scaled down to this norm (official FPO++: 1)."""
    epochs: int = 5
    """Passes over each rollout (official FPO: 16)."""
    batch: int = 5000
    """Chunks per update, each with N samples (official FPO: 1024 segments of 30 steps)."""
    target_kl: float = 1.0
    """Estimated KL divergence from the old policy beyond which an iteration's updates end (DPPO: 1; official FPO: none)."""
    actor_lr: float = 2e-4
    """Adam step size of the actor (official FPO: 3e-4, from scratch)."""
    actor_lr_end: float = 0.1
    """Factor on actor_lr that is reached linearly by the last iteration (official: 1)."""
    lr_warmup: int = 2
    """Training iterations over which the step size rises linearly (DPPO: 10)."""


NO_LIMIT = 10**9  # iterations of a run that ends by wall_budget_s
PAPER = dict(
    bc_epochs=200, bc_batch=128, iterations=80, num_envs=100, rollout_chunks=500, eval_every=5, eval_episodes=100, zero_fraction=0.0,
    batch=50_000, actor_lr=1e-4, actor_lr_end=1.0, bf16=False, lr_warmup=10,
)  # fmt: skip


# ----------------------------------------------------------------------------------- networks
class FlowPolicy(nn.Module):
    """A velocity network with the min-max scaling of its demonstrations, frozen after pretraining."""

    SCALING = ("obs_min", "obs_max", "action_min", "action_max")

    def __init__(self, obs_dim: int, action_dim: int, chunk: int, euler_steps: int, width: int, depth: int, time_dim: int):
        super().__init__()
        self.config = dict(obs_dim=obs_dim, action_dim=action_dim, chunk=chunk, euler_steps=euler_steps,
                           width=width, depth=depth, time_dim=time_dim)  # fmt: skip
        self.chunk, self.euler_steps, self.action_size = chunk, euler_steps, chunk * action_dim
        self.velocity = VelocityMLP(self.action_size, obs_dim, width, depth, time_dim)
        for name in self.SCALING:
            dim = obs_dim if name.startswith("obs") else action_dim
            self.register_buffer(name, torch.full((dim,), -1.0 if name.endswith("min") else 1.0))

    def normalize(self, obs) -> torch.Tensor:
        """Raw observations (..., obs_dim), array or tensor -> [-1, 1] on the range of the demonstrations."""
        obs = torch.as_tensor(obs, device=self.obs_min.device)
        return (2 * (obs - self.obs_min) / (self.obs_max - self.obs_min + 1e-6) - 1).clamp(-5, 5)

    def to_env(self, action: torch.Tensor) -> np.ndarray:
        """Flat normalised chunks (N, chunk * action_dim) -> raw actions (N, chunk, action_dim)."""
        action = action.view(len(action), self.chunk, -1)
        return ((action + 1) / 2 * (self.action_max - self.action_min + 1e-6) + self.action_min).cpu().numpy()

    def sample(self, obs: torch.Tensor, x0: torch.Tensor | None = None, trajectory: bool = False) -> torch.Tensor:
        """Action chunks (..., D) for normalised obs (..., obs_dim), from x0 or from noise; see common.flow.sample."""
        if x0 is None:
            x0 = torch.randn(*obs.shape[:-1], self.action_size, device=obs.device)
        return sample(self.velocity, obs, x0, self.euler_steps, trajectory)


class Value(nn.Module):
    """V(s) of normalised observations (..., obs_dim) -> (...), the residual MLP of DPPO (Ren et al. 2024)."""

    def __init__(self, obs_dim: int, width: int, depth: int):
        super().__init__()
        blocks = [ResidualBlock(width, "mish", False) for _ in range((depth - 1) // 2)]
        self.layers = nn.Sequential(nn.Linear(obs_dim, width), *blocks, nn.Linear(width, 1))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs)[..., 0]


class RewardScale(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return (Engstrom et al. 2020)."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        for name, value in ("mean", 0.0), ("var", 1.0), ("count", 1e-4):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("carry", torch.zeros(num_envs))  # discounted return of the running episodes

    def forward(self, reward: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        """Rewards and ends of episodes (T, N), time first -> scaled rewards, clipped to +-10 standard deviations."""
        returns = torch.empty_like(reward)
        for t in range(len(reward)):
            returns[t] = self.carry = reward[t] + self.gamma * self.carry
            self.carry = self.carry * (1 - done[t])
        moments = torch.stack([returns.mean(), returns.square().mean()]).double()
        average_over_processes(moments)
        mean, var = moments[0], moments[1] - moments[0].square()
        total = self.count + returns.numel()
        weight = returns.numel() / total
        self.var = (1 - weight) * self.var + weight * var + weight * (1 - weight) * (mean - self.mean).square()
        self.mean, self.count = self.mean + weight * (mean - self.mean), total
        return (reward / (self.var + 1e-8).sqrt().float()).clamp(-10, 10)


def autocast(args: Args):
    """bfloat16 matrix products, where asked for."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16)


def average_gradients(parameters):
    """Averages gradients over the processes of torchrun."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))


def average_over_processes(value: torch.Tensor):
    """Averages a tensor in place over the processes of torchrun."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()


# -------------------------------------------------------------------------------- base policy
def pretrain(args: Args, data: dataset.Demonstrations, log=print) -> FlowPolicy:
    """Flow matching on demonstrations, eq. (1)-(2); returns the policy with averaged weights."""
    scaling = data.normalization or {
        "obs_min": data.observations.min(0), "obs_max": data.observations.max(0),
        "action_min": data.actions.min(0), "action_max": data.actions.max(0),
    }  # fmt: skip
    starts = np.r_[0, data.episode_ends[:-1]]
    first = np.concatenate([np.arange(s, e - args.chunk + 1) for s, e in zip(starts, data.episode_ends, strict=True)])
    if len(first) < 20:
        raise SystemExit(f"{len(first)} chunks to clone are too few; every episode must be as long as a chunk ({args.chunk} steps), and 20 chunks are the least.")
    policy = FlowPolicy(data.observations.shape[1], data.actions.shape[1], args.chunk, args.euler_steps,
                        args.actor_width, args.actor_depth, args.time_dim)  # fmt: skip
    for name in FlowPolicy.SCALING:
        getattr(policy, name).copy_(torch.as_tensor(scaling[name]))
    policy.to(args.device)
    obs = policy.normalize(data.observations[first])  # (n, obs_dim)
    action = torch.as_tensor(data.actions[first[:, None] + np.arange(args.chunk)], device=args.device)
    action = 2 * (action - policy.action_min) / (policy.action_max - policy.action_min + 1e-6) - 1
    action = action.flatten(1)  # (n, D)
    shuffled = torch.randperm(len(obs), device=args.device)
    held_out, train = shuffled[: len(obs) // 20], shuffled[len(obs) // 20 :]
    averaged = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.velocity.parameters(), args.bc_lr, weight_decay=1e-6, fused=True)
    steps = max(1, args.bc_epochs * len(train) // args.bc_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, args.bc_lr_end)
    progress = tqdm(range(steps), desc="pretraining", mininterval=1)
    for step in progress:
        i = train[torch.randint(len(train), (args.bc_batch,), device=args.device)]
        with autocast(args):
            loss = flow_matching_loss(policy.velocity, action[i], obs[i])  # eq. (2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - args.bc_ema)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            with torch.no_grad():
                validation = flow_matching_loss(averaged.velocity, action[held_out], obs[held_out]).item()
            if not math.isfinite(validation):
                raise FloatingPointError("the flow-matching loss is not finite; lower --bc-lr")
            progress.set_postfix(validation=f"{validation:.4f}")
    log(f"base policy: {steps} steps, validation loss {validation:.4f}, {len(data.episode_ends)} episodes")
    averaged.validation_loss = validation
    return averaged


def save_base(policy: FlowPolicy, path: Path, **info):
    """Writes weights, scaling and sizes of a policy as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(policy.state_dict(), path, metadata={"config": json.dumps(policy.config), "info": json.dumps(info)})


def load_base(path: Path, args: Args, envs: VectorEnv) -> FlowPolicy:
    """Reads a base policy and checks that it fits the environment and the arguments."""
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            state = {key: file.get_tensor(key) for key in file.keys()}
        policy = FlowPolicy(**config)
        policy.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path}: not a base policy written by this project ({error})") from error
    want = dict(obs_dim=envs.obs_dim, action_dim=envs.action_dim, chunk=args.chunk, euler_steps=args.euler_steps,
                width=args.actor_width, depth=args.actor_depth, time_dim=args.time_dim)  # fmt: skip
    for key, value in want.items():
        if config[key] != value:
            raise SystemExit(f"{path}: has {key} {config[key]}, the run wants {value}; change the flag or use --pretrain.")
    return policy.to(args.device)


def get_demonstrations(args: Args, envs: VectorEnv) -> dataset.Demonstrations:
    """The given dataset, or that of the shipped demonstrator, recorded when first needed."""
    source = args.dataset or dataset.DEMOS / args.env_id / "medium.hdf5"
    if args.dataset is None and not source.exists():
        print(f"Recording demonstrations of {args.env_id} to {source} ...")
        dataset.make(dataset.Args(env_id=args.env_id))
    data = dataset.load(source)
    sizes = data.observations.shape[1], data.actions.shape[1]
    if sizes != (envs.obs_dim, envs.action_dim):
        raise SystemExit(f"{source}: observation and action sizes {sizes} are not {args.env_id}'s {(envs.obs_dim, envs.action_dim)}.")
    return data


def get_base(args: Args, envs: VectorEnv, run_dir: Path) -> FlowPolicy:
    """The base policy: given, shipped, or pretrained here; one pretrained here is kept in the run directory."""
    shipped = dataset.DEMOS / args.env_id / "base.safetensors"
    path = args.base or (shipped if shipped.exists() and args.dataset is None else None)
    if path and not args.pretrain:
        return load_base(Path(path), args, envs)
    policy = pretrain(args, get_demonstrations(args, envs))
    save_base(policy, run_dir / "base.safetensors", env_id=args.env_id, validation_loss=policy.validation_loss)
    return policy


# ------------------------------------------------------------------------------------ updates
def gae(reward, terminated, truncated, value, next_value, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), time first, all (T, N).

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t); V(s_{t+1}) is dropped where the episode
    terminated, A_{t+1} where it ended in either way: a time limit bootstraps.
    """
    advantage, a = torch.empty_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * (1 - terminated[t]) * next_value[t] - value[t]
        a = advantage[t] = delta + gamma * lam * (1 - terminated[t]) * (1 - truncated[t]) * a
    return advantage


def normalize(advantage: torch.Tensor) -> torch.Tensor:
    """Advantages of a minibatch (B,) with mean 0 and standard deviation 1."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def update_value(value: Value, optimizer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One step of V(s) toward A + V(s), `target` (B,)."""
    loss = 0.5 * (value(batch["obs"]) - batch["target"]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    average_gradients(list(value.parameters()))
    optimizer.step()
    return {"losses/value": loss.detach()}


def cfm_losses(velocity, batch: dict, args: Args) -> torch.Tensor:
    """Flow-matching losses (B, N), means over the D numbers, of actions (B, D) for their N pairs noise (B, N, D) and t (B, N)."""
    action, noise, t = batch["action"][:, None], batch["noise"], batch["t"]
    obs = batch["obs"][:, None].expand(-1, t.shape[1], -1)
    with autocast(args):
        v = velocity(interpolate(action, noise, t), t, obs)
    return (v - (action - noise)).square().mean(-1).clamp_max(args.loss_clamp)


@torch.no_grad()
def make_batch(policy: FlowPolicy, rollout: dict, advantage, target, args: Args) -> dict[str, torch.Tensor]:
    """Rollouts (T, N, ...) as one batch (T * N, ...) with the pairs of each action and the old policy's losses."""
    batch = {"obs": rollout["obs"].flatten(0, 1), "action": rollout["action"].flatten(0, 1)}
    rows, device = len(batch["obs"]), batch["obs"].device
    batch["noise"] = torch.randn(rows, args.samples, policy.action_size, device=device)
    batch["t"] = torch.randint(args.euler_steps, (rows, args.samples), device=device) / args.euler_steps
    parts = zip(*(x.split(args.batch) for x in batch.values()), strict=True)
    old = torch.cat([cfm_losses(policy.velocity, dict(zip(batch, part, strict=True)), args) for part in parts])
    return batch | {"old_losses": old, "advantage": advantage.flatten(), "target": target.flatten()}


def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, args: Args) -> torch.Tensor:
    """What is maximised, per ratio (B, N) and advantage (B, 1).

    fpo:   min(rho A, clip(rho, 1 - c, 1 + c) A)
    fpo++: the same where A > 0, else SPO (Xie et al. 2024): rho A - |A| (rho - 1)^2 / (2 c), which pulls rho back
    """
    clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage)
    if args.form == "fpo":
        return clipped
    return torch.where(advantage > 0, clipped, ratio * advantage - advantage.abs() * (ratio - 1).square() / (2 * args.clip))  # (F2)


def update_actor(velocity, optimizer, batch: dict, args: Args) -> dict[str, torch.Tensor]:
    """One step of PPO with the ratio exp(L_old - L_theta) of flow-matching losses, of their means or per sample."""
    log_ratio = batch["old_losses"] - cfm_losses(velocity, batch, args)  # (B, N)
    if args.form == "fpo":
        log_ratio = log_ratio.mean(-1, keepdim=True)  # (B, 1)
    log_ratio = log_ratio.clamp(-args.log_ratio_clamp, args.log_ratio_clamp)
    ratio = log_ratio.exp()  # (F1) of docs/baselines.md
    loss = -surrogate(ratio, normalize(batch["advantage"])[:, None], args).mean()
    optimizer.zero_grad()
    loss.backward()
    parameters = list(velocity.parameters())
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean()
        average_over_processes(kl)
        clipped = ((ratio - 1).abs() > args.clip).float().mean()
    return {
        "losses/policy": loss.detach(), "losses/flow_matching": batch["old_losses"].mean(), "diagnostics/kl": kl,
        "diagnostics/clip_fraction": clipped, "diagnostics/actor_grad_norm": norm,
    }  # fmt: skip


# ------------------------------------------------------------------------------ rollouts, evaluation
@torch.no_grad()
def collect(policy: FlowPolicy, envs: VectorEnv, tape: list, returns: np.ndarray, args: Args):
    """One rollout, values (T, N, ...); returns (rollout, env steps, returns of the episodes that ended)."""
    rollout, steps, finished = defaultdict(list), 0, []
    for _ in range(args.rollout_chunks):
        obs = policy.normalize(envs.obs)  # (N, obs_dim)
        x0 = torch.randn(len(obs), policy.action_size, device=obs.device)
        x0[: round(args.zero_fraction * len(obs))] = 0
        with autocast(args):
            action = policy.sample(obs, x0)  # (N, D)
        chunks = policy.to_env(action)
        next_obs, reward, terminated, truncated, length = envs.step(chunks)
        tape.append(chunks)
        row = dict(obs=obs, action=action, next_obs=policy.normalize(next_obs), reward=reward, terminated=terminated, truncated=truncated)
        for name, x in row.items():
            rollout[name].append(torch.as_tensor(x, dtype=torch.float32, device=obs.device))
        returns += reward
        done = terminated | truncated
        finished.extend(returns[done])
        returns[done] = 0
        steps += int(length.sum())
    return {name: torch.stack(x) for name, x in rollout.items()}, steps, finished


@torch.no_grad()
def evaluate(policy: FlowPolicy, args: Args, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Undiscounted returns, (episodes,) each, from x_0 = 0 ("zero") and from x_0 ~ N(0, I) ("noise")."""
    envs = VectorEnv(args.env_id, 2 * episodes, policy.chunk, args.backend, seed, args.threads)
    generator = torch.Generator(args.device).manual_seed(seed)
    envs.reset()
    returns, alive = np.zeros(2 * episodes), np.ones(2 * episodes, bool)
    while alive.any():
        x0 = torch.randn(2 * episodes, policy.action_size, device=args.device, generator=generator)
        x0[:episodes] = 0
        index = torch.as_tensor(np.flatnonzero(alive), device=args.device)
        chunks = np.zeros((2 * episodes, policy.chunk, envs.action_dim), np.float32)
        with autocast(args):
            chunks[alive] = policy.to_env(policy.sample(policy.normalize(envs.obs)[index], x0[index]))
        _, reward, terminated, truncated, _ = envs.step(chunks, alive)
        returns += reward
        alive &= ~(terminated | truncated)
    envs.close()
    return {"zero": returns[:episodes], "noise": returns[episodes:]}


def record_video(policy: FlowPolicy, args: Args, folder: Path):
    """One episode from x_0 = 0 as mp4, by Gymnasium's RecordVideo."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = gym.wrappers.RecordVideo(gym.make(args.env_id, render_mode="rgb_array", width=320, height=320), str(folder), disable_logger=True)
        obs, done = env.reset(seed=args.seed)[0], False
        while not done:
            obs = policy.normalize(obs.astype(np.float32))[None]
            for action in policy.to_env(policy.sample(obs, torch.zeros(1, policy.action_size, device=obs.device)))[0]:
                obs, _, terminated, truncated, _ = env.step(action.clip(env.action_space.low, env.action_space.high))
                done = terminated or truncated
                if done:
                    break
        env.close()
    except Exception as error:  # GL drivers fail in many ways; none of them may cost the trained policy
        print(f"No video: {error}. MuJoCo needs a GL backend: install libegl1 or libosmesa6 and set MUJOCO_GL=egl or osmesa.")


# ------------------------------------------------------------------------------- run directory
COLUMNS = (
    "iteration,env_steps,wall_s,rollout_s,update_s,train_return,eval_return,eval_return_std,eval_return_sampled,eval_return_sampled_std,"
    "losses/policy,losses/value,diagnostics/kl,diagnostics/clip_fraction,losses/flow_matching,"
    "diagnostics/explained_variance,diagnostics/base_distance,diagnostics/actor_grad_norm,diagnostics/reward_scale"
).split(",")


def write_atomically(path: Path, write):
    """Writes to a neighbour and renames it, so that a reader or a crash never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path} ({error}): is the disk full? The last good file is kept.") from error


def write_rows(path: Path, rows: list[dict]):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def save_policy(policy: FlowPolicy, path: Path):
    write_atomically(path, lambda p: torch.save({"config": policy.config, "state": policy.state_dict()}, p))


def load_policy(path: Path, device: str) -> FlowPolicy:
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        policy = FlowPolicy(**saved["config"])
        policy.load_state_dict(saved["state"])
    except Exception as error:  # torch.load raises many types on files that are not its own
        raise SystemExit(f"{path}: cannot be loaded as a policy ({error})") from error
    return policy.to(device)


def plot_curve(csv_path: Path, out: Path, title: str):
    """Evaluation and training return against environment steps."""
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(csv_path.open()))
    figure, axis = plt.subplots(figsize=(6, 4))
    labels = {"eval_return": "x_0 = 0", "eval_return_sampled": "x_0 ~ N(0, I)", "train_return": "training (exploring)"}
    for key, label in labels.items():
        points = [(int(r["env_steps"]), float(r[key])) for r in rows if r[key] != ""]
        if points:
            axis.plot(*zip(*points, strict=True), "-" if key == "train_return" else "o-", label=label, alpha=0.5 if key == "train_return" else 1)
    axis.set(xlabel="environment steps", ylabel="return", title=title)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def git_commit() -> str:
    """Short hash of the checkout, with -dirty if tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args: the preset sets the defaults, explicit flags win."""
    argv = sys.argv[1:] if argv is None else argv
    paper = "--preset=paper" in argv or any(pair == ("--preset", "paper") for pair in itertools.pairwise(argv))
    default = Args(preset="paper", **PAPER) if paper else Args()
    return tyro.cli(Args, args=argv, default=default, description=__doc__)


def resolve(args: Args) -> Args:
    """Fills in the device, checks ranges, and on --resume takes the stored arguments."""
    if args.resume:
        stored = Path(args.resume) / "args.json"
        if not stored.exists():
            raise SystemExit(f"{args.resume}: not a run directory (it has no args.json)")
        ignored = [f.name.replace("_", "-") for f in dataclasses.fields(Args) if f.name != "resume" and getattr(args, f.name) != f.default]
        if ignored:
            print(f"--resume takes the stored arguments; not used: --{', --'.join(ignored)}")
        try:
            args = Args(**{**json.loads(stored.read_text()), "resume": args.resume})
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{stored}: cannot be read ({error})") from error
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if args.device == "auto" or (args.device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1):  # under torchrun a GPU each
        args.device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: this torch sees no CUDA device; use --device cpu.")
    args.iterations = args.iterations or (NO_LIMIT if args.wall_budget_s else 31 if args.env_id == "Hopper-v4" else 106)
    args.samples = args.samples or (16 if args.form == "fpo++" and args.preset == "paper" else 8)
    args.clip = args.clip or (0.05 if args.form == "fpo" else 0.01 if args.preset == "paper" else 0.04)
    for name in "chunk euler_steps samples num_envs rollout_chunks epochs batch lr_warmup eval_every eval_episodes final_eval_episodes threads".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.actor_depth < 3 or args.actor_depth % 2 == 0:
        raise SystemExit(f"--actor-depth must be odd and at least 3 (a block has two layers), got {args.actor_depth}")
    return args


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    args = resolve(args)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.evaluate:
        policy = load_policy(Path(args.evaluate) / "policy.pt", args.device)
        args.env_id = json.loads((Path(args.evaluate) / "args.json").read_text())["env_id"]
        scores = evaluate(policy, args, args.final_eval_episodes, 1_000_000 * (args.seed + 1))
        for start, r in scores.items():
            print(f"{args.env_id}, {len(r)} episodes from x_0 {'= 0' if start == 'zero' else '~ N(0, I)'}: {r.mean():.0f} +- {r.std():.0f}")
        if args.capture_video:
            record_video(policy, args, Path(args.evaluate) / "videos")
        return {start: r.mean() for start, r in scores.items()}

    # processes: one, or those of torchrun, each with its own environments and replay
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    names = [str(args.resume or Path(args.runs) / name)]
    if world > 1:
        dist.broadcast_object_list(names)
    run_dir = Path(names[0])
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # networks
    envs = VectorEnv(args.env_id, args.num_envs, args.chunk, args.backend, args.seed, args.threads)
    if not (run_dir / "args.json").exists() and rank == 0:
        values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
        write_atomically(run_dir / "args.json", lambda p: p.write_text(json.dumps(values, indent=2)))
    if args.resume and (run_dir / "base.safetensors").exists():
        args.base, args.pretrain = run_dir / "base.safetensors", False
    if world > 1 and rank > 0:
        dist.barrier()  # rank 0 records and pretrains, the others then read its files
        args.base, args.pretrain = next(run_dir.glob("base.safetensors"), args.base), False
    policy = get_base(args, envs, run_dir)
    if world > 1:
        if rank == 0:
            dist.barrier()
    torch.manual_seed(args.seed)  # the same networks in all processes, however the base policy was come by
    base = copy.deepcopy(policy.velocity).requires_grad_(False)
    value = Value(envs.obs_dim, args.value_width, args.value_depth).to(args.device)
    reward_scale = RewardScale(args.num_envs, args.gamma).to(args.device)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr, fused=True)
    value_optimizer = torch.optim.Adam(value.parameters(), args.value_lr, fused=True)
    if args.compile:
        policy.velocity.compile(), value.compile()
    state = dict(iteration=0, env_steps=0, wall_s=0.0, trained=0, env_seed=0, best=-math.inf)
    best_policy, tape, returns = copy.deepcopy(policy.state_dict()), [], np.zeros(args.num_envs)
    torch.manual_seed(args.seed + 1000 * rank)
    modules = dict(policy=policy, value=value, reward_scale=reward_scale, actor_optimizer=actor_optimizer, value_optimizer=value_optimizer)
    checkpoint_path = run_dir / f"checkpoint{rank or ''}.pt"

    def save_checkpoint():
        saved = {key: module.state_dict() for key, module in modules.items()}
        saved |= dict(state=state, best_policy=best_policy, rng=torch.get_rng_state(),
                      tape=torch.as_tensor(np.array(tape)), returns=torch.as_tensor(returns))  # fmt: skip
        if torch.cuda.is_available():
            saved["cuda_rng"] = torch.cuda.get_rng_state(args.device)
        write_atomically(checkpoint_path, lambda p: torch.save(saved, p))

    def reset_envs(seed: int):
        nonlocal envs
        envs.close()
        state["env_seed"] = seed
        envs = VectorEnv(args.env_id, args.num_envs, args.chunk, args.backend, seed, args.threads)
        envs.reset()
        tape.clear()
        returns[:] = 0
        reward_scale.carry.zero_()

    if args.resume:
        try:
            saved = torch.load(checkpoint_path, map_location=args.device, weights_only=True)
        except Exception as error:  # torch.load raises many types
            raise SystemExit(f"{checkpoint_path}: cannot be loaded ({error})") from error
        state, best_policy = saved["state"], saved["best_policy"]
        reset_envs(state["env_seed"])  # simulators cannot be saved: replay their actions since the last reset
        for key, module in modules.items():
            module.load_state_dict(saved[key])
        tape.extend(saved["tape"].cpu().numpy())
        for chunks in tape:
            envs.step(chunks)
        returns[:] = saved["returns"].cpu().numpy()
        torch.set_rng_state(saved["rng"].cpu())
        if "cuda_rng" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), args.device)

    # logging
    if rank == 0:
        writer = SummaryWriter(str(run_dir), purge_step=state["env_steps"] + 1 if args.resume else None)
        writer.add_text("args", "|name|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
        csv_path = run_dir / "metrics.csv"
        rows = list(csv.DictReader(csv_path.open())) if args.resume and csv_path.exists() else []
        rows = [row for row in rows if int(row["iteration"]) < state["iteration"]]
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project, name=run_dir.name, config=vars(args), dir=str(run_dir))
        counted, total = ("iteration", args.iterations) if args.iterations < NO_LIMIT else ("wall_s", int(args.wall_budget_s))
        progress = tqdm(total=total, initial=min(total, int(state[counted])), unit=" s" if counted == "wall_s" else "it", desc=args.env_id, dynamic_ncols=True)

    interrupted = []
    if threading.current_thread() is threading.main_thread():  # Ctrl-C: finish the iteration and save; twice: stop at once
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler) and interrupted.append(1))

    # training
    row, base_seed = rows[-1] if rank == 0 and rows else {}, 1_000_000 * (args.seed + 1)
    for iteration in range(state["iteration"], args.iterations + 1):
        tick = time.perf_counter()
        row, sums = {"iteration": iteration}, defaultdict(list)
        spent = max(iteration / args.iterations, state["wall_s"] / args.wall_budget_s if args.wall_budget_s else 0.0)  # 1: the end
        if iteration % args.eval_every == 0 or spent >= 1:  # evaluation only
            final = iteration == 0 or spent >= 1
            if rank == 0:
                scores = evaluate(policy, args, args.final_eval_episodes if final else args.eval_episodes, base_seed)
                zero, noise = scores["zero"], scores["noise"]
                row |= dict(eval_return=zero.mean(), eval_return_std=zero.std(), eval_return_sampled=noise.mean(), eval_return_sampled_std=noise.std())
                if zero.mean() > state["best"] and spent < 1:
                    state["best"], best_policy = float(zero.mean()), copy.deepcopy(policy.state_dict())
                if iteration == 0:
                    state["base_return"], state["base_return_sampled"] = float(zero.mean()), float(noise.mean())
            reset_envs(base_seed + (iteration * world + rank + 1) * max(args.num_envs, 2 * args.final_eval_episodes))
        else:
            rollout, steps, finished = collect(policy, envs, tape, returns, args)
            state["env_steps"] += steps * world
            row["train_return"] = float(np.mean(finished)) if finished else ""
            row["rollout_s"] = time.perf_counter() - tick
            start = time.perf_counter()
            terminated, truncated = rollout["terminated"], rollout["truncated"]
            reward = reward_scale(rollout["reward"], terminated + truncated)  # (T, N)
            with torch.no_grad():
                v, next_v = value(torch.stack([rollout["obs"], rollout["next_obs"]]))
            advantage = gae(reward, terminated, truncated, v, next_v, args.gamma, args.gae_lambda)
            batch = make_batch(policy, rollout, advantage, advantage + v, args)
            for group in actor_optimizer.param_groups:
                group["lr"] = args.actor_lr * (1 + (args.actor_lr_end - 1) * spent) * min(1.0, (state["trained"] + 1) / args.lr_warmup)
            n, device = len(batch["obs"]), batch["obs"].device
            for i in [i for _ in range(args.epochs) for i in torch.randperm(n, device=device).split(args.batch)]:
                minibatch = {name: x[i] for name, x in batch.items()}
                metrics = update_value(value, value_optimizer, minibatch)
                if state["trained"] >= args.warmup_iterations:
                    metrics |= update_actor(policy.velocity, actor_optimizer, minibatch, args)
                for key, x in metrics.items():
                    sums[key].append(x)
                if metrics.get("diagnostics/kl", 0) > args.target_kl:
                    break
            row["update_s"] = time.perf_counter() - start
            state["trained"] += 1
            with torch.no_grad():  # how far the velocity has moved from the base, at a_0 ~ N(0, I), t = 0
                states = batch["obs"][:512]
                noise, zero = torch.randn(len(states), policy.action_size, device=device), torch.zeros((), device=device)
                sums["diagnostics/base_distance"] = [(policy.velocity(noise, zero, states) - base(noise, zero, states)).norm(dim=-1).mean()]
            row |= {key: torch.stack(x).mean().item() for key, x in sums.items()}
            row |= {"diagnostics/explained_variance": 1 - (advantage.var() / (advantage + v).var().clamp_min(1e-8)).item(), "diagnostics/reward_scale": reward_scale.var.sqrt().item()}
            for key, x in row.items():
                if isinstance(x, float) and not math.isfinite(x):
                    raise FloatingPointError(f"{key} became {x} in iteration {iteration}; the last good checkpoint is {checkpoint_path}")

        elapsed = torch.tensor(time.perf_counter() - tick, device=args.device)
        if world > 1:
            dist.all_reduce(elapsed), elapsed.div_(world)
        state["iteration"], state["wall_s"] = args.iterations + 1 if spent >= 1 else iteration + 1, state["wall_s"] + elapsed.item()
        row |= {"env_steps": state["env_steps"], "wall_s": state["wall_s"]}
        if rank == 0:
            rows.append(row)
            write_atomically(csv_path, lambda p: write_rows(p, rows))
            for key, x in row.items():
                if x != "" and key != "iteration":
                    writer.add_scalar(key if "/" in key else f"charts/{key}", x, state["env_steps"])
            if args.track:
                wandb.log(row, step=state["env_steps"])
            if "eval_return" in row:
                tqdm.write(f"{state['env_steps']:9d} steps {state['wall_s']:6.0f} s  return {row['eval_return']:6.0f} +- {row['eval_return_std']:4.0f} from x_0 = 0, "
                           f"{row['eval_return_sampled']:6.0f} +- {row['eval_return_sampled_std']:4.0f} from noise")  # fmt: skip
            current = row.get("eval_return") or row.get("train_return")
            if current:
                progress.set_postfix_str(f"return {current:.0f}")
            progress.update(min(total, int(state[counted])) - progress.n)
        save_checkpoint()
        if spent >= 1:
            break
        if interrupted:
            raise SystemExit(f"Stopped after iteration {iteration}, saved. Continue with: python -m baselines.fpo_gym --resume {run_dir}")

    # results
    envs.close()
    if rank > 0:
        return None
    save_policy(policy, run_dir / "policy.pt")
    final = {key: float(row[key]) for key in ("eval_return", "eval_return_std", "eval_return_sampled", "eval_return_sampled_std")}
    best = final
    if state["best"] > final["eval_return"]:  # measured again, on other episodes than those that selected it
        best_net = copy.deepcopy(policy)
        best_net.load_state_dict(best_policy)
        save_policy(best_net, run_dir / "best_policy.pt")
        scores = evaluate(best_net, args, args.final_eval_episodes, base_seed + 500_000)
        measured = {"eval_return": scores["zero"].mean(), "eval_return_sampled": scores["noise"].mean()}
        best = max(final, measured, key=lambda scores: scores["eval_return"])
    result = {
        "task": args.env_id, "method": args.exp_name, "preset": args.preset, "seed": args.seed,
        "base_return": state["base_return"], "base_return_sampled": state["base_return_sampled"],
        "final_return": final["eval_return"], "final_return_std": final["eval_return_std"],
        "final_return_sampled": final["eval_return_sampled"], "final_return_sampled_std": final["eval_return_sampled_std"],
        "best_return": best["eval_return"], "best_return_sampled": best["eval_return_sampled"],
        "env_steps": state["env_steps"], "wall_s": round(state["wall_s"], 1), "threads": args.threads, "device": args.device,
        "backend": envs.backend, "commit": git_commit(), "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in ("torch", "numpy", "gymnasium", "mujoco")},
        "args": json.loads((run_dir / "args.json").read_text()),
    }  # fmt: skip
    write_atomically(run_dir / "result.json", lambda p: p.write_text(json.dumps(result, indent=2)))
    plot_curve(csv_path, run_dir / "curve.png", f"{args.env_id}, seed {args.seed}")
    writer.close()
    progress.close()
    if args.capture_video:
        record_video(policy, args, run_dir / "videos")
    print(f"{args.env_id}: base {result['base_return']:.0f} -> final {result['final_return']:.0f} (x_0 = 0), {result['base_return_sampled']:.0f} -> "
          f"{result['final_return_sampled']:.0f} (sampled), {state['env_steps']} env steps, {state['wall_s']:.0f} s. Results in {run_dir}")  # fmt: skip
    return result


if __name__ == "__main__":
    main(parse_args())
