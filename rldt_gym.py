"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for Gymnasium tasks.

    python rldt_gym.py --env-id Hopper-v4 --n-particles 4

finetunes a pretrained flow-matching policy by moving its action density toward exp(Q / alpha) with
Stein variational gradient descent. docs/rldt_gym.md walks through this file, equation by equation.
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
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.flow import VelocityMLP, expected_target, flow_matching_loss, interpolate, sample
from common.svgd import transport_field
from demos import dataset
from envs.vector import VectorEnv


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium task with flat Box observations and actions. Hopper-v4, Walker2d-v4 and HalfCheetah-v4 ship a base policy."""
    preset: Literal["laptop", "paper"] = "laptop"
    """Which defaults: `laptop` (two CPU cores, minutes) or `paper` (the paper's settings, for a GPU). Explicit flags win."""
    exp_name: str = "rldt"
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
    """Training iterations, the evaluation-only ones included (paper: 70); 0: 25 for Hopper-v4, else 85, without limit under `wall_budget_s`."""
    wall_budget_s: float = 0.0
    """Seconds of training and evaluation after which the run makes its final evaluation and ends; 0: no limit. `iterations`, if given, may end it sooner."""
    num_envs: int = 100
    """Parallel environments, per process under torchrun (paper: 100)."""
    rollout_chunks: int = 125
    """Chunks per environment and iteration (paper: 500)."""
    exploration_steps: int = 2
    """Exploration noise |a - a_dagger_k| N(0, I) with k uniform over this many last ODE steps; 0: none (authors: 2)."""
    zero_fraction: float = 0.25
    """Share of environments and of particles that start from x_0 = 0 instead of noise, as the evaluation does (authors: 0)."""
    buffer_iterations: int = 10
    """Rollouts kept in the replay, in iterations (paper: 20)."""
    eval_every: int = 6
    """Every n-th iteration only evaluates, and resets the environments (authors: 5)."""
    eval_episodes: int = 20
    """Episodes per evaluation during training, from x_0 = 0 and again from noise (authors: 100)."""
    final_eval_episodes: int = 100
    """Episodes of the base, final and best evaluations, from x_0 = 0 and again from noise (authors: 100)."""

    # critic
    gamma: float = 0.97
    """Discount per chunk of actions (paper: 0.99, with batches 200 times as large)."""
    td_lambda: float = 0.5
    """lambda of TD(lambda) (authors: 0 for Gym)."""
    value_samples: int = 1
    """Policy actions per next state over which the target V(s') is averaged (authors: 2)."""
    target_momentum: float = 0.99
    """Polyak momentum of the target critics per critic step (paper: 0.998, authors' file: 0.995)."""
    rounds: int = 16
    """Rounds per iteration, each: draw segments, compute targets, critic steps, actor steps (authors: 16)."""
    critic_steps: int = 32
    """Critic steps per round (paper: 64, authors' file: 32)."""
    critic_batch: int = 256
    """Transitions per critic step (authors: 50 000, all that were drawn)."""
    critic_lr: float = 5e-4
    """Adam step size of the critic (paper: 1e-3 or 5e-4)."""
    critic_width: int = 256
    """Hidden width of each critic (paper: 256)."""
    critic_depth: int = 3
    """Hidden layers of each critic (paper: 3)."""
    critic_layer_norm: bool = True
    """LayerNorm before each activation of the critic (authors: none; see the ablation in the docs)."""
    critic_init: Literal["default", "normal"] = "default"
    """Critic weights: torch's default U(+-1/sqrt(fan_in)), or N(0, 0.1^2) with zero bias (authors)."""
    reward_ema: float = 0.01
    """Rate of the average of |chunk reward| by which rewards are divided (authors: 0.01)."""
    segments: int = 128
    """Replay segments drawn per round (authors: 100)."""
    segment_chunks: int = 16
    """Length of a segment in chunks, at most rollout_chunks (authors: 500, the whole rollout)."""
    fresh_fraction: float = 0.33
    """Least fraction of the segments that comes from the newest rollout (authors: 0.33)."""
    warmup_iterations: int = 3
    """Training iterations before the actor starts (paper: 2)."""
    warmup_lambda: float = 0.95
    """lambda before the actor starts, so that values reach their true scale first (authors: as td_lambda)."""
    warmup_factor: int = 3
    """Factor on critic_steps before the actor starts (authors: 1; fewer, smaller batches need more)."""

    # actor
    actor_steps: int = 8
    """Actor steps per round (authors: 2)."""
    actor_batch: int = 128
    """States per actor step, each with n_particles particles (authors: 6250)."""
    n_particles: int = 4
    """P, particles per state (paper: 8, and 4 are enough)."""
    kernel: Literal["rbf", "delta"] = "rbf"
    """Kernel of the transport field; `delta` is the ablation RLDT-Delta (paper: rbf)."""
    alpha: float = 1e-3
    """Temperature: weight of the repulsion, relative to |grad Q| (paper: 1e-3; ablation 1e-4, 0)."""
    transport_loss: Literal["literal", "authors"] = "authors"
    """Transport loss: eq. (13) as printed (weight 1 - t), or as in the authors' code (weight 1 / (1 - t))."""
    consistency_weight: float = 0.5
    """Weight of the consistency loss, eq. (14) (paper: 0.5)."""
    constraint_weight: float = 0.2
    """Weight of the Fisher-divergence constraint, eq. (15) (paper: 0.2)."""
    reference: Literal["previous", "pretrained"] = "previous"
    """Policy of the constraint: that of the previous iteration (authors) or the pretrained one (paper's text)."""
    actor_lr: float = 1e-4
    """Adam step size of the actor (paper: 2e-5, with 32 larger steps an iteration)."""
    actor_lr_end: float = 0.1
    """Factor on actor_lr that is reached linearly by the last iteration (authors: 1)."""
    actor_warmup: int = 32
    """Actor steps over which the step size rises linearly (paper: 32)."""


NO_LIMIT = 10**9  # iterations of a run that ends by wall_budget_s
PAPER = dict(
    bc_epochs=200, bc_batch=128, rollout_chunks=500, iterations=70, eval_every=5, buffer_iterations=20, eval_episodes=100,
    gamma=0.99, td_lambda=0.0, value_samples=2, target_momentum=0.998, critic_steps=64, critic_batch=50_000, critic_lr=1e-3, segments=100,
    segment_chunks=500, critic_layer_norm=False, critic_init="normal", warmup_factor=1, warmup_iterations=2, actor_lr_end=1.0, actor_steps=2, actor_batch=6250,
    n_particles=8, zero_fraction=0.0, warmup_lambda=0.0, actor_lr=2e-5, transport_loss="authors", bf16=False,
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


class Critic(nn.Module):
    """Two Q networks on (normalised observation, action chunk), evaluated as one batched product."""

    def __init__(self, obs_dim: int, action_size: int, width: int, depth: int, layer_norm: bool, init: str):
        super().__init__()
        self.layer_norm = layer_norm
        sizes = [obs_dim + action_size] + [width] * depth + [1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(n_in)
            weight, bias = torch.empty(2, n_in, n_out), torch.zeros(2, 1, n_out)
            if init == "normal":
                weight.normal_(0, 0.1)
            else:
                weight.uniform_(-bound, bound), bias.uniform_(-bound, bound)
            self.weights.append(weight), self.biases.append(bias)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """obs (B, obs_dim), action (B, D) -> Q (2, B)."""
        x = torch.cat([obs, action], -1).expand(2, -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w)
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round Q = 100 to steps of 0.5
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


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


def gradient_norm(parameters) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters])))


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


# ------------------------------------------------------------------------------------- replay
class Replay:
    """The last `buffer_iterations` rollouts, each (rollout_chunks, num_envs), on the device."""

    def __init__(self, args: Args, obs_dim: int, action_size: int):
        shape = args.buffer_iterations, args.rollout_chunks, args.num_envs
        sizes = dict(obs=(obs_dim,), action=(action_size,), reward=(), terminated=(), truncated=(), next_obs=(obs_dim,))
        self.data = {name: torch.zeros(*shape, *size, device=args.device) for name, size in sizes.items()}
        self.added = 0

    def rollout(self) -> dict[str, torch.Tensor]:
        """The slot of the next rollout, to be written in place."""
        self.added += 1
        return self.newest()

    def newest(self) -> dict[str, torch.Tensor]:
        return {name: value[(self.added - 1) % len(value)] for name, value in self.data.items()}

    def draw(self, segments: int, length: int, fresh_fraction: float) -> dict[str, torch.Tensor]:
        """Random segments, time first: values (length, segments, ...); a share of them from the newest rollout."""
        capacity, T, N = self.data["reward"].shape
        filled, device = min(self.added, capacity), self.data["reward"].device
        slot = torch.randint(filled, (segments,), device=device)
        slot[: math.ceil(max(fresh_fraction, 1 / filled) * segments)] = (self.added - 1) % capacity
        start = torch.randint(T - length + 1, (segments,), device=device)
        column = torch.randint(N, (segments,), device=device)
        t = start + torch.arange(length, device=device)[:, None]  # (length, segments)
        return {name: value[slot, t, column] for name, value in self.data.items()}


# ------------------------------------------------------------------------------------ updates
def td_lambda(reward, terminated, truncated, next_value, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of segments, time first, all (T, L).

    y_t = r_t + gamma (1 - terminated_t) [(1 - lam) V(s_{t+1}) + lam y_{t+1}]; after a truncation and
    at the segment's end V(s_{t+1}) stands alone.
    """
    target, y = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        y = torch.where(truncated[t] > 0, next_value[t], (1 - lam) * next_value[t] + lam * y)
        y = reward[t] + gamma * (1 - terminated[t]) * y
        target[t] = y
    return target


@torch.no_grad()
def critic_target(policy: FlowPolicy, target: Critic, batch: dict, reward_scale: float, args: Args, lam: float | None = None) -> torch.Tensor:
    """TD(lambda) targets (T, L); V(s') = mean over sampled actions of the minimum of the target networks."""
    T, L = batch["reward"].shape
    obs = batch["next_obs"].flatten(0, 1).repeat(args.value_samples, 1)  # (value_samples * T * L, obs_dim)
    with autocast(args):
        value = target(obs, policy.sample(obs)).min(0).values
    value = value.view(args.value_samples, T, L).mean(0)
    lam = args.td_lambda if lam is None else lam
    return td_lambda(batch["reward"] / reward_scale, batch["terminated"], batch["truncated"], value, args.gamma, lam)


def update_critic(critic: Critic, target: Critic, optimizer, obs, action, y, args: Args) -> dict[str, torch.Tensor]:
    """One step on obs (B, obs_dim), action (B, D), targets y (B,), and one of the target networks."""
    with autocast(args):
        q = critic(obs, action)  # (2, B)
    loss = (q - y).square().mean(1).sum()
    optimizer.zero_grad()
    loss.backward()
    parameters = list(critic.parameters())
    average_gradients(parameters)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), parameters, 1 - args.target_momentum)
    return {"losses/critic": loss.detach(), "diagnostics/q": q.detach().mean()}


def actor_losses(velocity, reference, critic: Critic, obs, trajectory, args: Args, k: torch.Tensor | None = None):
    """The three losses of eq. (16) on states obs (B, obs_dim) with trajectories (K + 1, B, P, D), at steps k (B, P)."""
    K, (_, B, P, D) = args.euler_steps, trajectory.shape
    device, action = obs.device, trajectory[-1]  # a, (B, P, D)
    obs = obs[:, None].expand(-1, P, -1)  # (B, P, obs_dim)
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K
    x_c = interpolate(action, torch.randn_like(action), t_c)
    with autocast(args):
        v, v_c = velocity(torch.stack([x, x_c]), torch.stack([t, t_c]), obs.expand(2, -1, -1, -1))  # both in one pass
        with torch.no_grad():
            v_ref = reference(x_c, t_c, obs)
    a_dagger = expected_target(x, t, v)  # eq. (8)

    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(obs.reshape(B * P, -1), particles.view(B * P, D)).mean(0)
    (grad_q,) = torch.autograd.grad(q.sum(), particles)
    particles = particles.detach()
    phi = transport_field(query, particles, grad_q, args.alpha, args.kernel)  # eq. (6)

    if args.transport_loss == "literal":
        transport = (a_dagger - (query + phi)).square().sum(-1).mean() / K  # eq. (13)
    else:
        transport = -((v * phi).sum(-1) / (K * (1 - t))).mean()  # the authors' form of eq. (13), docs/rldt_gym.md
    consistency = ((a_dagger - action).square().sum(-1) / (K * (1 - t)).square()).mean()  # eq. (14)
    constraint = (v_c - v_ref).square().sum(-1).mean()  # eq. (15)
    distance = torch.cdist(action, action).sum() / max(1, B * P * (P - 1))
    metrics = {
        "losses/transport": transport, "losses/consistency": consistency, "losses/constraint": constraint,
        "diagnostics/phi_norm": phi.norm(dim=-1).mean(), "diagnostics/grad_q_norm": grad_q.norm(dim=-1).mean(),
        "diagnostics/q_policy": q.mean(), "diagnostics/particle_distance": distance,
    }  # fmt: skip
    return transport, consistency, constraint, {key: value.detach() for key, value in metrics.items()}


def update_actor(velocity, reference, critic: Critic, optimizer, obs, trajectory, args: Args) -> dict[str, torch.Tensor]:
    """One step of L = L_transport + 0.5 L_consistency + 0.2 L_constraint, eq. (16)."""
    transport, consistency, constraint, metrics = actor_losses(velocity, reference, critic, obs, trajectory, args)
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint  # eq. (16)
    optimizer.zero_grad()
    loss.backward()
    parameters = list(velocity.parameters())
    average_gradients(parameters)
    optimizer.step()
    return metrics | {"diagnostics/actor_grad_norm": gradient_norm(parameters)}


# ------------------------------------------------------------------------------ rollouts, evaluation
@torch.no_grad()
def collect(policy: FlowPolicy, envs: VectorEnv, slot: dict, tape: list, returns: np.ndarray, args: Args):
    """Fills one rollout `slot` with exploration; returns (env steps, returns of the episodes that ended)."""
    steps, finished, K = 0, [], args.euler_steps
    for t in range(args.rollout_chunks):
        obs = policy.normalize(envs.obs)  # (N, obs_dim)
        with autocast(args):
            x0 = torch.randn(len(obs), policy.action_size, device=obs.device)
            x0[: round(args.zero_fraction * len(obs))] = 0
            x = policy.sample(obs, x0, trajectory=True)  # (K + 1, N, D)
        action = x[-1]
        if args.exploration_steps:
            k = K - 1 - torch.randint(args.exploration_steps, (len(obs),), device=obs.device)
            n = torch.arange(len(obs), device=obs.device)
            x_k, x_next = x[k, n], x[k + 1, n]
            a_dagger = expected_target(x_k, k / K, (x_next - x_k) * K)  # eq. (8), the velocity read off the trajectory
            action = action + (action - a_dagger).norm(dim=-1, keepdim=True) * torch.randn_like(action)
        chunks = policy.to_env(action)
        next_obs, reward, terminated, truncated, length = envs.step(chunks)
        tape.append(chunks)
        row = dict(obs=obs, action=action, next_obs=policy.normalize(next_obs), reward=reward, terminated=terminated, truncated=truncated)
        for name, value in row.items():
            slot[name][t] = torch.as_tensor(value, device=obs.device)
        returns += reward
        done = terminated | truncated
        finished.extend(returns[done])
        returns[done] = 0
        steps += int(length.sum())
    return steps, finished


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
    "iteration,env_steps,wall_s,rollout_s,critic_s,actor_s,train_return,eval_return,eval_return_std,eval_return_sampled,"
    "eval_return_sampled_std,losses/critic,losses/transport,losses/consistency,losses/constraint,diagnostics/q,"
    "diagnostics/q_policy,diagnostics/grad_q_norm,diagnostics/phi_norm,diagnostics/particle_distance,"
    "diagnostics/base_distance,diagnostics/actor_grad_norm,diagnostics/reward_scale"
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
    args.iterations = args.iterations or (NO_LIMIT if args.wall_budget_s else 25 if args.env_id == "Hopper-v4" else 85)
    args.segment_chunks = min(args.segment_chunks, args.rollout_chunks)
    counts = "chunk euler_steps n_particles num_envs rollout_chunks rounds segments value_samples critic_steps critic_batch actor_batch buffer_iterations"
    for name in f"{counts} eval_every eval_episodes final_eval_episodes threads".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.actor_depth < 3 or args.actor_depth % 2 == 0:
        raise SystemExit(f"--actor-depth must be odd and at least 3 (a block has two layers), got {args.actor_depth}")
    if not 0 <= args.exploration_steps <= args.euler_steps:
        raise SystemExit("--exploration-steps must lie between 0 and --euler-steps")
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
    reference = copy.deepcopy(base)
    critic = Critic(envs.obs_dim, policy.action_size, args.critic_width, args.critic_depth, args.critic_layer_norm, args.critic_init)
    critic.to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    if args.compile:
        policy.velocity.compile(), critic.compile(), target.compile(), reference.compile()
    replay = Replay(args, envs.obs_dim, policy.action_size)
    state = dict(iteration=0, env_steps=0, wall_s=0.0, trained=0, actor_step=0, reward_scale=0.0, env_seed=0, best=-math.inf)
    best_policy, tape, returns = copy.deepcopy(policy.state_dict()), [], np.zeros(args.num_envs)
    torch.manual_seed(args.seed + 1000 * rank)
    modules = dict(policy=policy, reference=reference, critic=critic, target=target,
                   actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)  # fmt: skip
    checkpoint_path = run_dir / f"checkpoint{rank or ''}.pt"

    def save_checkpoint():
        saved = {key: module.state_dict() for key, module in modules.items()}
        saved |= dict(state=state, best_policy=best_policy, replay=replay.data, added=replay.added, rng=torch.get_rng_state(),
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

    if args.resume:
        try:
            saved = torch.load(checkpoint_path, map_location=args.device, weights_only=True)
        except Exception as error:  # torch.load raises many types
            raise SystemExit(f"{checkpoint_path}: cannot be loaded ({error})") from error
        for key, module in modules.items():
            module.load_state_dict(saved[key])
        state, best_policy = saved["state"], saved["best_policy"]
        replay.data, replay.added = saved["replay"], saved["added"]
        reset_envs(state["env_seed"])  # simulators cannot be saved: replay their actions since the last reset
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
            steps, finished = collect(policy, envs, replay.rollout(), tape, returns, args)
            state["env_steps"] += steps * world
            magnitude = replay.newest()["reward"].abs().mean().clamp_min(1e-8)
            if world > 1:
                dist.all_reduce(magnitude), magnitude.div_(world)
            rate = args.reward_ema if state["reward_scale"] else 1.0
            state["reward_scale"] = (1 - rate) * state["reward_scale"] + rate * magnitude.item()
            row["train_return"] = float(np.mean(finished)) if finished else ""
            row["rollout_s"], row["critic_s"], row["actor_s"] = time.perf_counter() - tick, 0.0, 0.0
            warm = state["trained"] < args.warmup_iterations
            critic_steps = args.critic_steps * (args.warmup_factor if warm else 1)
            for _ in range(args.rounds):
                start = time.perf_counter()
                batch = replay.draw(args.segments, args.segment_chunks, args.fresh_fraction)
                lam = args.warmup_lambda if warm else args.td_lambda
                y = critic_target(policy, target, batch, state["reward_scale"], args, lam).flatten()
                obs, action = batch["obs"].flatten(0, 1), batch["action"].flatten(0, 1)  # (segments * length, .)
                order = torch.cat([torch.randperm(len(y), device=y.device) for _ in range(-(-critic_steps * args.critic_batch // len(y)))])
                for i in order[: critic_steps * args.critic_batch].split(args.critic_batch):
                    for key, value in update_critic(critic, target, critic_optimizer, obs[i], action[i], y[i], args).items():
                        sums[key].append(value)
                row["critic_s"] += time.perf_counter() - start
                start = time.perf_counter()
                for _ in range(0 if warm else args.actor_steps):
                    states = obs[torch.randint(len(obs), (args.actor_batch,), device=obs.device)]
                    with torch.no_grad(), autocast(args):
                        x0 = torch.randn(args.actor_batch, args.n_particles, policy.action_size, device=obs.device)
                        x0 *= torch.rand(*x0.shape[:2], 1, device=obs.device) >= args.zero_fraction
                        trajectory = policy.sample(states[:, None].expand(-1, args.n_particles, -1), x0, trajectory=True)
                    state["actor_step"] += 1
                    decay = 1 + (args.actor_lr_end - 1) * spent
                    actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * min(1.0, state["actor_step"] / args.actor_warmup)
                    for key, value in update_actor(policy.velocity, reference, critic, actor_optimizer, states, trajectory, args).items():
                        sums[key].append(value)
                row["actor_s"] += time.perf_counter() - start
            state["trained"] += 1
            with torch.no_grad():  # how far the velocity has moved from the base, at a_0 ~ N(0, I), t = 0
                states = obs[:512]
                noise, zero = torch.randn(len(states), policy.action_size, device=obs.device), torch.zeros((), device=obs.device)
                sums["diagnostics/base_distance"] = [(policy.velocity(noise, zero, states) - base(noise, zero, states)).norm(dim=-1).mean()]
            row |= {key: torch.stack(value).mean().item() for key, value in sums.items()} | {"diagnostics/reward_scale": state["reward_scale"]}
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"{key} became {value} in iteration {iteration}; the last good checkpoint is {checkpoint_path}")
            if args.reference == "previous":
                reference.load_state_dict(policy.velocity.state_dict())

        elapsed = torch.tensor(time.perf_counter() - tick, device=args.device)
        if world > 1:
            dist.all_reduce(elapsed), elapsed.div_(world)
        state["iteration"], state["wall_s"] = args.iterations + 1 if spent >= 1 else iteration + 1, state["wall_s"] + elapsed.item()
        row |= {"env_steps": state["env_steps"], "wall_s": state["wall_s"]}
        if rank == 0:
            rows.append(row)
            write_atomically(csv_path, lambda p: write_rows(p, rows))
            for key, value in row.items():
                if value != "" and key != "iteration":
                    writer.add_scalar(key if "/" in key else f"charts/{key}", value, state["env_steps"])
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
            raise SystemExit(f"Stopped after iteration {iteration}, saved. Continue with: python rldt_gym.py --resume {run_dir}")

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
