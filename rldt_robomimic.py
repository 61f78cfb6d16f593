"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for robomimic's tasks on robosuite.

    python rldt_robomimic.py --task square --obs image

finetunes a flow-matching policy, cloned from demonstrations, on the sparse reward of success by moving its action
density toward exp(Q / alpha) with Stein variational gradient descent. docs/rldt_robomimic.md says what differs from
rldt_gym.py, whose order and names this file keeps.
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

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.flow import VelocityMLP, expected_target, flow_matching_loss, interpolate, sample
from common.svgd import particle_gradient, transport_field
from demos import robomimic as dataset
from envs.robomimic import IMAGE_SIZE, TASKS, RobomimicVectorEnv, choose_renderer

DEMOS = Path(__file__).parent / "demos"
Obs = dict[str, torch.Tensor]  # "state" (..., state_dim) float32, normalised; "rgb" (..., 3 * cameras, 96, 96) uint8


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    task: Literal["lift", "can", "square", "transport"] = "square"
    """robomimic task."""
    obs: Literal["state", "image"] = "state"
    """Observations: proprioception with the objects' state, or with camera images."""
    preset: Literal["laptop", "paper"] = "laptop"
    """Which defaults: `laptop` (two CPU cores) or `paper` (the paper's settings, for a GPU and 64 simulators). Explicit flags win."""
    exp_name: str = "rldt"
    """Name of the experiment, part of the run directory's name."""
    seed: int = 1
    """Seed of networks, minibatches, noise and environments."""
    runs: Path = Path("runs")
    """Directory in which run directories are made."""
    device: str = "auto"
    """Torch device: cpu, cuda, cuda:0, ... `auto` takes CUDA where there is one."""
    threads: int = 2
    """CPU threads of torch; simulators are processes of their own."""
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
    """Record the base and the final policy side by side as mp4 (needs EGL or OSMesa)."""
    video_episodes: int = 3
    """Episodes of the video."""

    # base policy
    base: Path | None = None
    """Base policy (.safetensors); default demos/<task>/base_<obs>.safetensors where it exists, else it is pretrained."""
    pretrain: bool = False
    """Pretrain the base policy even where one exists; it is kept in the run directory."""
    dataset: Path | None = None
    """robomimic HDF5 file; default demos/<task>/low_dim.hdf5 or image.hdf5, made by scripted experts when missing."""
    bc_episodes: int = 0
    """Demonstrations to clone, 0: all in the file's mask/train."""
    bc_split: str = ""
    """Demonstrations to clone are those of mask/<this> in the file; empty: mask/train where there is one, else all."""
    bc_epochs: int = 0
    """Pretraining passes over the data; 0: 200 for states, 30 for images (paper: 2000 to 8000)."""
    bc_batch: int = 256
    """Pretraining batch, in action chunks (paper: 256)."""
    bc_lr: float = 1e-3
    """Initial learning rate of pretraining, AdamW with weight decay 1e-6 (paper: 1e-4)."""
    bc_lr_end: float = 1e-4
    """Final learning rate of pretraining, cosine schedule (paper: 1e-5)."""
    bc_head_steps: int = 20_000
    """With images, further pretraining steps of the velocity network alone, on encoded images; 0: none (paper, whose epochs are many more)."""
    bc_copies: int = 6
    """Shifted copies of every image that are encoded for those steps."""
    bc_ema: float = 0.995
    """Decay per step of the weight average that becomes the base policy (authors: 0.995)."""
    actor_width: int = 0
    """Hidden width of the velocity network; 0: 768 for images (paper), 512 for states (DPPO)."""
    actor_depth: int = 3
    """Hidden layers of the velocity network, odd (paper: 3)."""
    time_dim: int = 32
    """Size of the time embedding (paper: 32)."""
    chunk: int = 0
    """Actions per decision, executed open loop, in environment steps; 0: the task's, 4 or 8 for transport (paper)."""
    euler_steps: int = 8
    """K, Euler steps from noise to action (paper: 8)."""
    shift: int = 4
    """Random-shift augmentation of images, in pixels, in pretraining and updates; 0: none (DPPO: 4)."""

    # rollouts
    iterations: int = 0
    """Training iterations, the evaluation-only ones included; 0: 40 for lift, 120 else (paper: 200)."""
    num_envs: int = 4
    """Simulators, each a process of 0.5 to 1.2 GB (paper: 64)."""
    horizon: int = 0
    """Time limit of an episode in environment steps; 0: the task's, 300 (lift, can), 400 (square), 800 (transport)."""
    stop_on_success: bool = True
    """End an episode at success; else it runs to the time limit, and what follows success is masked (authors)."""
    fast_render: bool = True
    """Images without multisampling, shadows and reflections, 3 to 4 times as fast in software."""
    rollout_chunks: int = 0
    """Chunks per environment and iteration, in which episodes start anew; 0: 200 for lift, 400 else
    (paper: 200, of 64 environments; two rows more hold the states after two episodes)."""
    exploration_steps: int | None = None
    """Exploration noise |a - a_dagger_k| N(0, I) with k uniform over this many last ODE steps; 0: none (authors: 2). None: 2, or 0 for
    transport, where the noise on 112 numbers of a chunk leaves no episode that succeeds."""
    exploration_scale: float = 1.0
    """Factor on the exploration noise, whose length grows with the size of a chunk (authors: 1)."""
    zero_fraction: float = 0.25
    """Share of environments and of particles that start from x_0 = 0 instead of noise, as the evaluation does (authors: 0)."""
    buffer_iterations: int = 20
    """Rollouts kept in the replay, in iterations (paper: 10)."""
    replay_gib: float = 4.0
    """Bound on the replay's memory in GiB; fewer iterations are kept where buffer_iterations would exceed it."""
    eval_every: int = 20
    """Every n-th iteration only evaluates (authors: 10)."""
    eval_episodes: int = 30
    """Episodes per evaluation during training, from x_0 = 0 and again from noise."""
    final_eval_episodes: int = 100
    """Episodes of the base, final and best evaluations, from x_0 = 0 and again from noise."""

    # critic
    gamma: float = 0.99
    """Discount per chunk of actions (paper: 0.999)."""
    td_lambda: float = 0.5
    """lambda of TD(lambda) (authors: 0.5)."""
    time_limit: Literal["bootstrap", "terminal"] = "terminal"
    """What the time limit is to the critic: `terminal`, a failure (authors), or `bootstrap`, a cut that says nothing."""
    value_samples: int = 1
    """Policy actions per next state over which the target V(s') is averaged (authors: 2)."""
    target_momentum: float = 0.99
    """Polyak momentum of the target critics per critic step (paper: 0.995)."""
    rounds: int = 8
    """Rounds per iteration, each: draw segments, compute targets, critic steps, actor steps (authors: 16)."""
    critic_steps: int = 128
    """Critic steps per round (paper: 32, of larger batches)."""
    critic_batch: int = 256
    """Transitions per critic step (authors: all that were drawn)."""
    critic_lr: float = 5e-4
    """Adam step size of the critic (paper: 1e-3)."""
    critic_encoder_lr: float = 4e-5
    """Adam step size of the critic's own image encoder (paper: 4e-5)."""
    critic_width: int = 256
    """Hidden width of each critic (paper: 256)."""
    critic_depth: int = 3
    """Hidden layers of each critic (paper: 3)."""
    critic_layer_norm: bool = True
    """LayerNorm before each activation of the critic (authors: none)."""
    critic_init: Literal["default", "normal"] = "default"
    """Critic weights: torch's default U(+-1/sqrt(fan_in)), or N(0, 0.1^2) with zero bias (authors)."""
    encoder: Literal["frozen", "shared", "own"] = "frozen"
    """Image encoders in RL. own: actor and critic each train theirs (paper). shared: the critic reads the actor's features, without a
    gradient. frozen: as shared, and the actor's stays as pretrained: an image is encoded once, when it is seen."""
    balanced: bool = True
    """Draw as many segments from episodes that succeeded as from those that failed (authors)."""
    segments: int = 128
    """Replay segments drawn per round."""
    segment_chunks: int = 16
    """Length of a segment in chunks, less than rollout_chunks (authors: 200, the whole rollout)."""
    fresh_fraction: float = 0.33
    """Least fraction of the segments that comes from the newest rollout (authors: 0.33)."""
    warmup_iterations: int = 12
    """Training iterations before the actor starts (paper: 2)."""
    warmup_lambda: float = 0.5
    """lambda before the actor starts (authors: as td_lambda)."""
    warmup_factor: int = 1
    """Factor on critic_steps before the actor starts (authors: 1)."""

    # actor
    actor_steps: int = 4
    """Actor steps per round (authors: 2)."""
    actor_batch: int = 512
    """States per actor step, each with n_particles particles (authors: 6250)."""
    n_particles: int = 4
    """P, particles per state (paper: 8)."""
    kernel: Literal["rbf", "delta"] = "rbf"
    """Kernel of the transport field; `delta` is the ablation RLDT-Delta (paper: rbf)."""
    q_gradient: Literal["critic", "particles"] = "critic"
    """The gradient of Q in the transport field: `critic`, its derivative (paper), or `particles`, the way to those of a state's particles
    that have a high Q, by `particle_gradient` (ours; it wants 16 particles and more)."""
    alpha: float = 1e-3
    """Temperature: weight of the repulsion, relative to |grad Q| (paper: 1e-3)."""
    transport_loss: Literal["literal", "authors"] = "authors"
    """Transport loss: eq. (13) as printed (weight 1 - t), or as in the authors' code (weight 1 / (1 - t))."""
    transport_scale: float = 30.0
    """Factor on grad Q in the transport field: values of success are below 1, those of dense rewards near 50 (authors: 1)."""
    consistency_weight: float = 0.05
    """Weight of the consistency loss, eq. (14) (paper: 0.5); alone it moves the policy, and success hangs on centimetres."""
    constraint_weight: float = 0.2
    """Weight of the Fisher-divergence constraint, eq. (15) (paper: 0.2)."""
    reference: Literal["previous", "pretrained"] = "previous"
    """Policy of the constraint: an earlier one (authors) or the pretrained one (paper's text)."""
    reference_every: int = 10
    """Training iterations after which the previous policy is replaced by the current one (authors: 1)."""
    actor_lr: float = 2e-5
    """Adam step size of the actor (paper: 2e-5)."""
    actor_lr_end: float = 0.3
    """Factor on actor_lr that is reached linearly by the last iteration (authors: 1)."""
    actor_warmup: int = 32
    """Actor steps over which the step size rises linearly (paper: 32)."""


PAPER = dict(
    bc_epochs=4000, bc_head_steps=0, bc_lr=1e-4, bc_lr_end=1e-5, iterations=200, num_envs=64, stop_on_success=False, fast_render=False, buffer_iterations=10,
    replay_gib=16.0, eval_every=10, eval_episodes=64, gamma=0.999, time_limit="terminal", value_samples=2, target_momentum=0.995, rounds=16,
    critic_steps=32, critic_batch=1024, critic_lr=1e-3, critic_layer_norm=False, critic_init="normal", encoder="own", exploration_steps=2, segments=64, segment_chunks=201,
    warmup_iterations=2, actor_steps=2, actor_batch=1024, n_particles=8, zero_fraction=0.0, consistency_weight=0.5, reference_every=1,
    rollout_chunks=202, transport_scale=1.0, actor_lr_end=1.0, bf16=False,
)  # fmt: skip


# ----------------------------------------------------------------------------------- networks
class ViT(nn.Module):
    """Images of one camera -> patch features, with the two-convolution patch embedding of IBRL (Hu et al. 2023) and DPPO."""

    def __init__(self, dim: int = 128, heads: int = 4, depth: int = 1):
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, dim, 8, stride=4), nn.ReLU(), nn.Conv2d(dim, dim, 3, stride=2))
        side = ((IMAGE_SIZE - 8) // 4 + 1 - 3) // 2 + 1  # 11
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(side**2, dim), std=0.02))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, 96, 96) -> (B, 121, dim)."""
        x = (rgb.float() / 255 - 0.5).to(memory_format=torch.channels_last)
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.transformer(x + self.position)


class SpatialEmbedding(nn.Module):
    """Patch features and proprioception -> one vector: each channel's map over the patches is projected, then channels are summed."""

    def __init__(self, patches: int, dim: int, state_dim: int, out: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(patches + state_dim, out), nn.LayerNorm(out), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(dim, out))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(B, patches, dim), (B, state_dim) -> (B, out)."""
        x = x.transpose(1, 2)  # (B, dim, patches)
        x = torch.cat([x, state[:, None].expand(-1, x.shape[1], -1).to(x.dtype)], -1)
        return (self.weight * self.project(x)).sum(1)


class Encoder(nn.Module):
    """A ViT and a spatial embedding per camera; features are those of the cameras followed by the state."""

    def __init__(self, cameras: int, state_dim: int, dim: int = 128):
        super().__init__()
        self.vits = nn.ModuleList(ViT(dim) for _ in range(cameras))
        patches = len(self.vits[0].position)
        self.embeddings = nn.ModuleList(SpatialEmbedding(patches, dim, state_dim, dim) for _ in range(cameras))

    def forward(self, obs: Obs) -> torch.Tensor:
        """Observations (B, ...) -> (B, 128 * cameras + state_dim)."""
        views = obs["rgb"].split(3, dim=1)
        features = [embed(vit(view), obs["state"]) for vit, embed, view in zip(self.vits, self.embeddings, views, strict=True)]
        return torch.cat([*features, obs["state"]], -1).float()


class FlowPolicy(nn.Module):
    """A velocity network, an image encoder where there are cameras, and the demonstrations' min-max scaling."""

    SCALING = ("obs_min", "obs_max", "action_min", "action_max")

    def __init__(self, state_dim: int, action_dim: int, cameras: int, chunk: int, euler_steps: int, width: int, depth: int, time_dim: int):
        super().__init__()
        self.config = dict(state_dim=state_dim, action_dim=action_dim, cameras=cameras, chunk=chunk, euler_steps=euler_steps,
                           width=width, depth=depth, time_dim=time_dim)  # fmt: skip
        self.chunk, self.euler_steps, self.action_size = chunk, euler_steps, chunk * action_dim
        self.encoder = Encoder(cameras, state_dim) if cameras else None
        self.cond_dim = state_dim + 128 * cameras
        self.velocity = VelocityMLP(self.action_size, self.cond_dim, width, depth, time_dim)
        for name in self.SCALING:
            dim = state_dim if name.startswith("obs") else action_dim
            self.register_buffer(name, torch.full((dim,), -1.0 if name.endswith("min") else 1.0))

    def observe(self, obs: dict[str, np.ndarray]) -> Obs:
        """Raw observations -> tensors on the device, the state scaled to [-1, 1] on the range of the demonstrations."""
        obs = {name: torch.as_tensor(value, device=self.obs_min.device) for name, value in obs.items()}
        obs["state"] = (2 * (obs["state"] - self.obs_min) / (self.obs_max - self.obs_min + 1e-6) - 1).clamp(-5, 5)
        return obs

    def encode(self, obs: Obs) -> torch.Tensor:
        """Observations (B, ...) -> what the velocity is conditioned on, (B, cond_dim); observations without images as they are."""
        return self.encoder(obs) if "rgb" in obs else obs["state"]

    def to_env(self, action: torch.Tensor) -> np.ndarray:
        """Flat normalised chunks (N, chunk * action_dim) -> raw actions (N, chunk, action_dim)."""
        action = action.float().view(len(action), self.chunk, -1)
        return ((action + 1) / 2 * (self.action_max - self.action_min + 1e-6) + self.action_min).cpu().numpy()

    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None, trajectory: bool = False) -> torch.Tensor:
        """Action chunks (..., D) for cond (..., cond_dim), from x0 or from noise; see common.flow.sample."""
        if x0 is None:
            x0 = torch.randn(*cond.shape[:-1], self.action_size, device=cond.device)
        return sample(self.velocity, cond, x0, self.euler_steps, trajectory)


class Critic(nn.Module):
    """Two Q networks on (features, action chunk), evaluated as one batched product, with an image encoder of their own or none."""

    def __init__(self, cond_dim: int, action_size: int, width: int, depth: int, layer_norm: bool, init: str, encoder: Encoder | None = None):
        super().__init__()
        self.layer_norm, self.encoder = layer_norm, encoder
        sizes = [cond_dim + action_size] + [width] * depth + [1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(n_in)
            weight, bias = torch.empty(2, n_in, n_out), torch.zeros(2, 1, n_out)
            if init == "normal":
                weight.normal_(0, 0.1)
            else:
                weight.uniform_(-bound, bound), bias.uniform_(-bound, bound)
            self.weights.append(weight), self.biases.append(bias)

    def encode(self, obs: Obs, policy: FlowPolicy) -> torch.Tensor:
        """Observations (B, ...) -> (B, cond_dim), by its own encoder or by the policy's, to which no gradient goes."""
        if self.encoder is not None:
            return self.encoder(obs)
        with torch.no_grad():
            return policy.encode(obs)

    def forward(self, cond: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """cond (B, cond_dim), action (B, D) -> Q (2, B)."""
        x = torch.cat([cond, action], -1).expand(2, -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w)
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


def autocast(args: Args):
    """bfloat16 matrix products, where asked for."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16)


def gradient_norm(parameters) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])))


def random_shift(rgb: torch.Tensor, pixels: int) -> torch.Tensor:
    """Shifts each image (B, C, H, W) by up to `pixels` in both directions, repeating its border (DrQ, Kostrikov et al. 2020)."""
    B, C, H, W = rgb.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, B, 1), device=rgb.device)
    rows = (torch.arange(H, device=rgb.device) + dy).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=rgb.device) + dx).clamp(0, W - 1)  # (B, W)
    rgb = rgb.gather(2, rows[:, None, :, None].expand(-1, C, -1, W))
    return rgb.gather(3, columns[:, None, None, :].expand(-1, C, H, -1))


def augment(obs: Obs, args: Args) -> Obs:
    return obs | {"rgb": random_shift(obs["rgb"], args.shift)} if "rgb" in obs and args.shift else obs


def take(obs: Obs, index) -> Obs:
    return {name: value[index] for name, value in obs.items()}


# -------------------------------------------------------------------------------- base policy
def pretrain(args: Args, data: dict, log=print, checkpoint: Path | None = None) -> FlowPolicy:
    """Flow matching on demonstrations, eq. (1)-(2); returns the policy with averaged weights.

    Every 500 steps all that it needs to go on goes into `checkpoint`, where given; if that file exists, it goes on from there.
    """
    starts = np.r_[0, data["episode_ends"][:-1]]
    first = np.concatenate([np.arange(s, e - args.chunk + 1) for s, e in zip(starts, data["episode_ends"], strict=True)])
    if len(first) < 20:
        raise SystemExit(f"{len(first)} chunks to clone are too few; every demonstration must be as long as a chunk ({args.chunk} steps), and 20 chunks are the least.")
    cameras = len(TASKS[args.task].cameras) if args.obs == "image" else 0
    policy = FlowPolicy(data["state"].shape[1], data["action"].shape[1], cameras, args.chunk, args.euler_steps,
                        args.actor_width, args.actor_depth, args.time_dim)  # fmt: skip
    for key, name in ("obs", "state"), ("action", "action"):  # DPPO's: zero is always inside the range
        getattr(policy, f"{key}_min").copy_(torch.as_tensor(data[name].min(0)).clamp_max(0))
        getattr(policy, f"{key}_max").copy_(torch.as_tensor(data[name].max(0)).clamp_min(0))
    policy.to(args.device)
    obs, first = policy.observe({name: data[name] for name in ("state", "rgb") if name in data}), torch.as_tensor(first, device=args.device)
    action = torch.as_tensor(data["action"], device=args.device)[first[:, None] + torch.arange(args.chunk, device=args.device)]
    action = 2 * (action - policy.action_min) / (policy.action_max - policy.action_min + 1e-6) - 1
    action = action.flatten(1)  # (n, D)
    shuffled = torch.randperm(len(action), device=args.device)
    held_out, train = shuffled[: len(action) // 20].split(1024)[0], shuffled[len(action) // 20 :]
    averaged = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), args.bc_lr, weight_decay=1e-6, fused=True)
    steps = max(1, args.bc_epochs * len(train) // args.bc_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, args.bc_lr_end)
    modules = dict(policy=policy, averaged=averaged, optimizer=optimizer, schedule=schedule)
    settings = dict(policy=policy.config, steps=steps, chunks=len(action), **{k: v for k, v in vars(args).items() if k.startswith("bc_") or k == "seed"})
    done = 0
    if checkpoint and checkpoint.exists():
        try:
            saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        except Exception as error:  # torch.load raises many types
            raise SystemExit(f"{checkpoint}: cannot be loaded ({error}); delete it to pretrain from the start") from error
        if saved.get("settings") != settings:
            raise SystemExit(f"{checkpoint}: an unfinished pretraining with other settings or data; finish it with those, or delete it.")
        for key, module in modules.items():
            module.load_state_dict(saved[key])
        done, validation, held_out, train = (saved[key] for key in ("done", "validation", "held_out", "train"))
        set_rng(saved["rng"], args)
    progress = tqdm(range(done, steps), desc="pretraining", mininterval=1, initial=done, total=steps)
    for step in progress:
        i = train[torch.randint(len(train), (args.bc_batch,), device=args.device)]
        with autocast(args):
            loss = flow_matching_loss(policy.velocity, action[i], policy.encode(augment(take(obs, first[i]), args)))  # eq. (2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - args.bc_ema)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            with torch.no_grad(), autocast(args):
                validation = flow_matching_loss(averaged.velocity, action[held_out], averaged.encode(take(obs, first[held_out]))).item()
            if not math.isfinite(validation):
                raise FloatingPointError("the flow-matching loss is not finite; lower --bc-lr")
            progress.set_postfix(validation=f"{validation:.4f}")
            if checkpoint:
                saved = {key: module.state_dict() for key, module in modules.items()}
                saved |= dict(settings=settings, done=step + 1, validation=validation, held_out=held_out, train=train, rng=get_rng(args))
                write_atomically(checkpoint, lambda p, saved=saved: torch.save(saved, p))
    log(f"base policy: {steps} steps, validation loss {validation:.4f}, {len(data['episode_ends'])} demonstrations")
    averaged.validation_loss = validation
    if averaged.encoder is not None and args.bc_head_steps:
        averaged.validation_loss = pretrain_head(args, averaged, obs, action, first, train, held_out)
        log(f"velocity network alone: {args.bc_head_steps} steps, validation loss {averaged.validation_loss:.4f}")
    return averaged


def pretrain_head(args: Args, policy: FlowPolicy, obs: Obs, action, first, train, held_out) -> float:
    """Pretrains the velocity network alone, in place; returns the validation loss.

    The encoder's part of a step costs many times the velocity network's, which needs more steps. So `bc_copies` shifted copies of the
    images are encoded once. Chunk i, action[i] (D,), starts at row first[i] of obs; train and held_out are indices of chunks.
    """
    def encode(chunks, shifted: Args) -> torch.Tensor:
        return torch.cat([policy.encode(augment(take(obs, first[i]), shifted)).float() for i in chunks.split(512)])

    with torch.no_grad(), autocast(args):
        copies = [encode(train, args) for _ in tqdm(range(args.bc_copies), desc="encoding")]
        cond, plain = torch.stack(copies), encode(held_out, dataclasses.replace(args, shift=0))  # (copies, n, cond_dim), (m, cond_dim)
    averaged = copy.deepcopy(policy.velocity)
    optimizer = torch.optim.AdamW(policy.velocity.parameters(), args.bc_lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.bc_head_steps, args.bc_lr_end)
    for _ in tqdm(range(args.bc_head_steps), desc="velocity network", mininterval=1):
        i, which = (torch.randint(n, (max(args.bc_batch, 256),), device=args.device) for n in (len(train), len(cond)))
        with autocast(args):
            loss = flow_matching_loss(policy.velocity, action[train[i]], cond[which, i])  # eq. (2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.velocity.parameters()), 1 - args.bc_ema)
    policy.velocity.load_state_dict(averaged.state_dict())
    with torch.no_grad(), autocast(args):
        validation = flow_matching_loss(policy.velocity, action[held_out], plain).item()
    if not math.isfinite(validation):
        raise FloatingPointError("the flow-matching loss is not finite; lower --bc-lr")
    return validation


def save_base(policy: FlowPolicy, path: Path, **info):
    """Writes weights (half precision), scaling and sizes of a policy as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value if key in FlowPolicy.SCALING else value.half() for key, value in policy.state_dict().items()}
    save_file(state, path, metadata={"config": json.dumps(policy.config), "info": json.dumps(info)})


def load_base(path: Path, args: Args) -> FlowPolicy:
    """Reads a base policy and checks that it fits the task and the arguments."""
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            info = json.loads(file.metadata().get("info", "{}"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}
        policy = FlowPolicy(**config)
        policy.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path}: not a base policy written by this project ({str(error).splitlines()[0]})") from error
    spec, images = TASKS[args.task], args.obs == "image"
    want = dict(state_dim=spec.state_dim(images), action_dim=7 * spec.robots, cameras=len(spec.cameras) * images, chunk=args.chunk,
                euler_steps=args.euler_steps, width=args.actor_width, depth=args.actor_depth, time_dim=args.time_dim)  # fmt: skip
    for key, value in want.items():
        if config[key] != value:
            raise SystemExit(f"{path}: has {key} {config[key]}, the run wants {value}; change the flag or use --pretrain.")
    if images and info.get("fast_render", args.fast_render) != args.fast_render:
        raise SystemExit(f"{path}: cloned from images with --{'no-' * args.fast_render}fast-render; use the same, or --pretrain.")
    return policy.to(args.device)


def get_demonstrations(args: Args) -> dict:
    """The given dataset, or that of the scripted expert, made when first needed."""
    images, folder = args.obs == "image", DEMOS / args.task
    source = args.dataset or folder / ("image.hdf5" if images else "low_dim.hdf5")

    def make(message: str, *flags):  # in a process of its own: a renderer must not be open when simulators are forked
        print(message)
        if subprocess.run([sys.executable, "-m", "demos.make_robomimic_demos", "--task", args.task, *map(str, flags)], cwd=DEMOS.parent).returncode:
            raise SystemExit("The demonstrations could not be made, see above.")

    if args.dataset is None and not source.exists():
        states = folder / "low_dim.hdf5"
        if not states.exists():
            make(f"Recording demonstrations of the scripted expert to {states} ...", "--out", states)
        if images:
            make(f"Rendering the images of {states} to {source} ...", "--images-from", states, "--out", source,
                 "--fast-render" if args.fast_render else "--no-fast-render")  # fmt: skip
    return dataset.load(source, args.task, images, args.bc_episodes, args.bc_split or None, args.fast_render)


def get_base(args: Args, run_dir: Path) -> FlowPolicy:
    """The base policy: given, shipped, or pretrained here; one pretrained here is kept in the run directory."""
    shipped = DEMOS / args.task / f"base_{args.obs}.safetensors"
    path = args.base or (shipped if shipped.exists() and args.dataset is None else None)
    if path and not args.pretrain:
        return load_base(Path(path), args)
    checkpoint = run_dir / "pretraining.pt"
    policy = pretrain(args, get_demonstrations(args), checkpoint=checkpoint)
    save_base(policy, run_dir / "base.safetensors", task=args.task, validation_loss=policy.validation_loss, fast_render=args.fast_render)
    checkpoint.unlink(missing_ok=True)
    return load_base(run_dir / "base.safetensors", args)  # in half precision, as a resumed run finds it


# ------------------------------------------------------------------------------------- replay
class Replay:
    """The last `buffer_iterations` rollouts, each (rollout_chunks, num_envs), on the device.

    A row is a state, with the action taken in it, or without: where an episode was cut, a row of valid = 0 holds the
    state that it ended in, so that the next state is always the next row and images are kept once, as uint8.
    """

    def __init__(self, args: Args, obs: Obs, action_size: int):
        per_row = sum(value[0].numel() * value.element_size() for value in obs.values()) + 4 * (action_size + 5)
        per_slot = per_row * args.rollout_chunks * args.num_envs
        slots = min(args.buffer_iterations, int(args.replay_gib * 2**30 / per_slot))
        if slots < 1:
            raise SystemExit(f"One rollout takes {per_slot / 2**30:.1f} GiB, more than --replay-gib {args.replay_gib}: "
                             "raise it, or lower --rollout-chunks or --num-envs.")  # fmt: skip
        if slots < args.buffer_iterations:
            print(f"--replay-gib {args.replay_gib} keeps {slots} rollouts, not {args.buffer_iterations}.")
        replay, simulators = slots * per_slot * (args.device == "cpu") / 2**30, args.num_envs * (0.7 if args.obs == "image" else 0.5)  # GiB
        if replay + simulators > 0.9 * (free := free_gib()):
            raise SystemExit(f"The replay takes {replay:.1f} GiB and {args.num_envs} simulators about {simulators:.1f}, "
                             f"and {free:.1f} GiB are free: lower --replay-gib or --num-envs.")  # fmt: skip
        shape = slots, args.rollout_chunks, args.num_envs
        device = args.device
        self.data = {name: torch.zeros(*shape, *value.shape[1:], dtype=value.dtype, device=device) for name, value in obs.items()}
        self.data["action"] = torch.zeros(*shape, action_size, device=device)
        for name in "reward", "terminated", "truncated", "valid", "succeeded":
            self.data[name] = torch.zeros(shape, device=device)
        self.obs_names, self.added = tuple(obs), 0

    def rollout(self) -> dict[str, torch.Tensor]:
        """The slot of the next rollout, cleared, to be written in place."""
        self.added += 1
        for name in "reward", "terminated", "truncated", "valid", "succeeded":
            self.newest()[name].zero_()
        return self.newest()

    def slot(self) -> int:
        return (self.added - 1) % len(self.data["reward"])

    def newest(self) -> dict[str, torch.Tensor]:
        return {name: value[self.slot()] for name, value in self.data.items()}

    def starts(self, length: int, fresh_fraction: float, balanced: bool, segments: int) -> torch.Tensor:
        """Where segments begin, (segments, 3) rows of (slot, time, environment): valid, and half of them in successful episodes."""
        valid = self.data["valid"].clone() > 0
        valid[:, valid.shape[1] - length :] = False
        succeeded, chosen = self.data["succeeded"] > 0, []
        groups = [valid & succeeded, valid & ~succeeded] if balanced else [valid]
        groups = [group for group in groups if group.any()]
        for k, group in enumerate(groups):
            count = segments // len(groups) + (k < segments % len(groups))
            fresh = torch.zeros_like(group)
            fresh[self.slot()] = group[self.slot()]
            n_fresh = math.ceil(fresh_fraction * count) if fresh.any() else 0
            for mask, n in (fresh, n_fresh), (group, count - n_fresh):
                index = mask.nonzero()
                if n:
                    chosen.append(index[torch.randint(len(index), (n,), device=index.device)])
        return torch.cat(chosen)

    def draw(self, segments: int, length: int, fresh_fraction: float, balanced: bool) -> dict[str, torch.Tensor]:
        """Random segments, time first: observations (length + 1, segments, ...), all else (length, segments, ...)."""
        slot, start, column = self.starts(length, fresh_fraction, balanced, segments).T
        t = start + torch.arange(length + 1, device=start.device)[:, None]  # (length + 1, segments)
        return {name: value[slot, t if name in self.obs_names else t[:-1], column] for name, value in self.data.items()}


# ------------------------------------------------------------------------------------ updates
def td_lambda(reward, terminated, truncated, next_value, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of segments, time first, all (T, L); values of success lie in [0, 1], and so do the targets.

    y_t = r_t + gamma (1 - terminated_t) [(1 - lam) V(s_{t+1}) + lam y_{t+1}]; after a truncation and
    at the segment's end V(s_{t+1}) stands alone.
    """
    target, y = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        y = torch.where(truncated[t] > 0, next_value[t], (1 - lam) * next_value[t] + lam * y)
        y = (reward[t] + gamma * (1 - terminated[t]) * y).clamp(0, 1)
        target[t] = y
    return target


@torch.no_grad()
def critic_target(policy: FlowPolicy, target: Critic, batch: dict, args: Args, lam: float | None = None) -> torch.Tensor:
    """TD(lambda) targets (T, L); V(s') = mean over sampled actions of the minimum of the target networks."""
    T, L = batch["reward"].shape
    obs = augment({name: batch[name][1:].flatten(0, 1) for name in ("state", "rgb") if name in batch}, args)
    with autocast(args):
        cond = policy.encode(obs)  # once per state, whatever value_samples and K are
        features = target.encode(obs, policy) if target.encoder is not None else cond
        repeated = cond.repeat(args.value_samples, 1)  # (value_samples * T * L, cond_dim)
        value = target(features.repeat(args.value_samples, 1), policy.sample(repeated)).min(0).values
    value = value.view(args.value_samples, T, L).mean(0)
    lam = args.td_lambda if lam is None else lam
    return td_lambda(batch["reward"], batch["terminated"], batch["truncated"], value, args.gamma, lam)


def update_critic(critic: Critic, target: Critic, policy: FlowPolicy, optimizer, obs: Obs, action, y, args: Args) -> dict[str, torch.Tensor]:
    """One step on obs (B, ...), action (B, D), targets y (B,), and one of the target networks."""
    with autocast(args):
        q = critic(critic.encode(augment(obs, args), policy), action)  # (2, B)
    loss = (q - y).square().mean(1).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(critic.parameters()), 1 - args.target_momentum)
    return {"losses/critic": loss.detach(), "diagnostics/q": q.detach().mean()}


def start_noise(shape, args: Args) -> torch.Tensor:
    """x_0 of the particles (B, P, D): N(0, I), and zero for a share `zero_fraction` of them."""
    return torch.randn(shape, device=args.device) * (torch.rand(*shape[:-1], 1, device=args.device) >= args.zero_fraction)


def actor_losses(velocity, reference, critic: Critic, cond, cond_ref, cond_q, trajectory, args: Args, k: torch.Tensor | None = None):
    """The three losses of eq. (16) on B states with trajectories (K + 1, B, P, D), at steps k (B, P).

    The states' features are those of the actor, of the reference policy and of the critic, (B, .) each.
    """
    K, (_, B, P, D) = args.euler_steps, trajectory.shape
    device, action = cond.device, trajectory[-1]  # a, (B, P, D)
    cond, cond_ref, cond_q = (c[:, None].expand(-1, P, -1) for c in (cond, cond_ref, cond_q))  # (B, P, .)
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K
    x_c = interpolate(action, start_noise(action.shape, args), t_c)
    with autocast(args):
        v, v_c = velocity(torch.stack([x, x_c]), torch.stack([t, t_c]), cond.expand(2, -1, -1, -1))  # both in one pass
        with torch.no_grad():
            v_ref = reference(x_c, t_c, cond_ref)
    a_dagger = expected_target(x, t, v)  # eq. (8)

    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(cond_q.reshape(B * P, -1), particles.view(B * P, D)).mean(0)
    if args.q_gradient == "critic":
        (grad_q,) = torch.autograd.grad(q.sum(), particles)
    else:
        grad_q = particle_gradient(q.detach().to(particles.dtype).view(B, P), particles.detach())
    particles, grad_q = particles.detach(), args.transport_scale * grad_q
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


def update_actor(policy: FlowPolicy, reference: FlowPolicy, critic: Critic, optimizer, obs: Obs, args: Args) -> dict[str, torch.Tensor]:
    """Samples P particles for each of obs (B, ...), then one step of L_transport, L_consistency and L_constraint by their weights, eq. (16)."""
    obs = augment(obs, args)
    with autocast(args):
        cond = policy.encode(obs)  # once per state: all K Euler steps, P particles and both losses share it
        with torch.no_grad():
            cond_ref = reference.encode(obs) if "rgb" in obs else cond
            cond_q = critic.encode(obs, policy) if critic.encoder is not None else cond.detach()
            x0 = start_noise((len(cond), args.n_particles, policy.action_size), args)
            trajectory = policy.sample(cond.detach()[:, None].expand(-1, args.n_particles, -1), x0, trajectory=True)
    losses = actor_losses(policy.velocity, reference.velocity, critic, cond, cond_ref, cond_q, trajectory, args)
    transport, consistency, constraint, metrics = losses
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint  # eq. (16)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return metrics | {"diagnostics/actor_grad_norm": gradient_norm(optimizer.param_groups[0]["params"])}


# ------------------------------------------------------------------------------ rollouts, evaluation
def make_envs(args: Args, num_envs: int, record: bool = False, stop_on_success: bool = True) -> RobomimicVectorEnv:
    return RobomimicVectorEnv(num_envs, task=args.task, images=args.obs == "image", fast_render=args.fast_render,
                              stop_on_success=stop_on_success, horizon=args.horizon, chunk=args.chunk, record=record)  # fmt: skip


@torch.no_grad()
def observe(policy: FlowPolicy, obs: dict[str, np.ndarray], args: Args) -> Obs:
    """What the networks see: normalised states and images, or with a frozen encoder the features of both."""
    obs = policy.observe(obs)
    if args.encoder == "frozen":
        with autocast(args):
            return {"state": policy.encode(obs)}
    return obs


@torch.no_grad()
def collect(policy: FlowPolicy, envs: RobomimicVectorEnv, slot: dict, seeds, args: Args):
    """Fills one rollout `slot` with exploration, episodes seeded from the iterator `seeds`; returns env steps and the episodes' successes."""
    T, N, K, steps, finished = args.rollout_chunks, args.num_envs, args.euler_steps, 0, []
    row, first = np.zeros(N, int), np.zeros(N, int)  # where each environment writes, and where its episode began
    solved, everyone = np.zeros(N, bool), np.arange(N)
    obs = observe(policy, envs.reset([next(seeds) for _ in range(N)], np.ones(N, bool)), args)
    while (active := row < T - 1).any():  # the last row can only hold a final state
        with autocast(args):
            x0 = torch.randn(N, policy.action_size, device=args.device)
            x0[: round(args.zero_fraction * N)] = 0
            x = policy.sample(policy.encode(obs), x0, trajectory=True)  # (K + 1, N, D)
        action = x[-1]
        if args.exploration_steps:
            k = K - 1 - torch.randint(args.exploration_steps, (N,), device=action.device)
            n = torch.arange(N, device=action.device)
            x_k, x_next = x[k, n], x[k + 1, n]
            a_dagger = expected_target(x_k, k / K, (x_next - x_k) * K)  # eq. (8), the velocity read off the trajectory
            action = action + args.exploration_scale * (action - a_dagger).norm(dim=-1, keepdim=True) * torch.randn_like(action)
        raw, _, _, truncated, success, length = envs.step(policy.to_env(action), active)
        next_obs, now = observe(policy, raw, args), active & ~solved
        success = success & now  # the first one counts
        ids = everyone[active]
        values = dict(action=action, reward=success, terminated=success, valid=now,
                      truncated=truncated & (args.time_limit == "bootstrap"))  # fmt: skip
        if args.time_limit == "terminal":
            values["terminated"] = success | truncated
        for name, value in (obs | values).items():
            slot[name][row[ids], ids] = torch.as_tensor(value, device=args.device)[ids].to(slot[name].dtype)
        steps += int(length.sum())
        row[ids] += 1
        solved |= success
        over = active & (truncated | (solved & args.stop_on_success))
        cut = active & ~over & (row == T - 1)
        for i in everyone[over | cut]:
            for name, value in next_obs.items():
                slot[name][row[i], i] = value[i]
            slot["succeeded"][first[i] : row[i] + 1, i] = float(solved[i])
            if cut[i] and not solved[i]:
                slot["truncated"][row[i] - 1, i] = 1  # the rollout ends here, not the episode
            elif over[i]:
                finished.append(solved[i])
        row[over], solved = row[over] + 1, solved & ~over
        first[over] = row[over]
        obs, renew = next_obs, over & (row < T - 1)
        if renew.any():
            obs = observe(policy, envs.reset([next(seeds) if r else 0 for r in renew], renew), args)
    return steps, np.array(finished, bool)


@torch.no_grad()
def evaluate(policy: FlowPolicy, envs: RobomimicVectorEnv, args: Args, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Successes, (episodes,) bool each, from x_0 = 0 ("zero") and from x_0 ~ N(0, I) ("noise"), from the same initial states."""
    generator = torch.Generator(args.device).manual_seed(seed)
    success = np.zeros(2 * episodes, bool)
    waiting, N = list(range(2 * episodes)), envs.num_envs
    job = np.array([waiting.pop(0) if waiting else -1 for _ in range(N)])
    raw = envs.reset([seed + j % episodes for j in job], np.ones(N, bool))
    while (job >= 0).any():
        x0 = torch.randn(N, policy.action_size, device=args.device, generator=generator)
        x0[torch.as_tensor(job < episodes)] = 0
        with autocast(args):
            chunks = policy.to_env(policy.sample(policy.encode(policy.observe(raw)), x0))
        raw, _, _, truncated, solved, _ = envs.step(chunks, job >= 0)
        success[job[solved & (job >= 0)]] = True
        over = (job >= 0) & (truncated | solved)
        job[over] = [waiting.pop(0) if waiting else -1 for _ in range(over.sum())]
        if (renew := over & (job >= 0)).any():
            raw = envs.reset([seed + j % episodes for j in job], renew)
    return {"zero": success[:episodes], "noise": success[episodes:]}


def rate(success: np.ndarray) -> tuple[float, float, float]:
    """Success rate with Wilson's 95 % interval."""
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    return float(success.mean()), float(interval.low), float(interval.high)


@torch.no_grad()
def record_video(policies: dict[str, FlowPolicy], args: Args, path: Path):
    """Episodes of each policy from the same initial states and x_0 = 0, side by side, as mp4 of 20 frames per second."""
    import imageio.v2 as imageio

    try:
        choose_renderer()
        films = {name: [] for name in policies}
        envs = make_envs(args, 1, record=True)
        for name, policy in policies.items():
            for episode in range(args.video_episodes):
                raw, over, film = envs.reset([1_000_000 * (args.seed + 1) + episode], np.ones(1, bool)), False, []
                while not over:
                    with autocast(args):
                        action = policy.sample(policy.encode(policy.observe(raw)), torch.zeros(1, policy.action_size, device=args.device))
                    raw, _, _, truncated, success, _ = envs.step(policy.to_env(action), np.ones(1, bool))
                    film += envs.envs.call("take_frames")[0]
                    over = truncated[0] or success[0]
                films[name].append(film)
        envs.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        with imageio.get_writer(path, fps=20) as writer:
            for episode in range(args.video_episodes):
                parts = [films[name][episode] for name in policies]
                for t in range(max(map(len, parts)) + 10):
                    writer.append_data(np.concatenate([film[min(t, len(film) - 1)] for film in parts], 1))
        print(f"Video ({', '.join(policies)} from left to right): {path}")
    except (SystemExit, Exception) as error:  # GL drivers fail in many ways; none of them may cost the trained policy
        print(f"No video: {error}")


# ------------------------------------------------------------------------------- run directory
COLUMNS = (
    "iteration,env_steps,wall_s,rollout_s,critic_s,actor_s,train_success,eval_success,eval_success_low,eval_success_high,"
    "eval_success_sampled,eval_success_sampled_low,eval_success_sampled_high,losses/critic,losses/transport,losses/consistency,"
    "losses/constraint,diagnostics/q,diagnostics/q_policy,diagnostics/grad_q_norm,diagnostics/phi_norm,diagnostics/particle_distance,"
    "diagnostics/base_distance,diagnostics/actor_grad_norm,diagnostics/memory_gib"
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


def get_rng(args: Args) -> dict[str, torch.Tensor]:
    """States of torch's random number generators, of the CPU and of the run's device."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(args.device)} if args.device.startswith("cuda") else {})


def set_rng(states: dict[str, torch.Tensor], args: Args):
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and args.device.startswith("cuda"):
        torch.cuda.set_rng_state(states["cuda"].cpu(), args.device)


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
    """Success rate of evaluation, with its interval, and of training against environment steps."""
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(csv_path.open()))
    figure, axis = plt.subplots(figsize=(6, 4))
    labels = {"train_success": "training (exploring)", "eval_success_sampled": "x_0 ~ N(0, I)", "eval_success": "x_0 = 0"}
    for key, label in labels.items():
        points = [r for r in rows if r[key] != ""]
        x, y = [int(r["env_steps"]) for r in points], [float(r[key]) for r in points]
        axis.plot(x, y, "-" if key == "train_success" else "o-", label=label, alpha=0.4 if key == "train_success" else 1)
        if key != "train_success" and points:
            axis.fill_between(x, *([float(r[f"{key}_{end}"]) for r in points] for end in ("low", "high")), alpha=0.15)
    axis.set(xlabel="environment steps", ylabel="success rate", title=title, ylim=(-0.02, 1.02))
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


def memory_gib() -> float:
    """Memory of this process and its simulators in GiB; pages that they share count once (where the system does not say, not at all)."""
    process, total = psutil.Process(), 0
    for p in [process, *process.children(recursive=True)]:
        try:
            info = p.memory_full_info()
            total += getattr(info, "pss", info.uss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**30


def free_gib() -> float:
    """Memory that this process can still take, in GiB: the machine's, or that of its container (cgroup v2 or v1) less its own."""
    free = psutil.virtual_memory().available / 2**30
    for limit in Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if limit.exists() and limit.read_text().strip() != "max":
            free = min(free, int(limit.read_text()) / 2**30 - memory_gib())
    return free


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args: the preset sets the defaults, explicit flags win."""
    argv = sys.argv[1:] if argv is None else argv
    paper = "--preset=paper" in argv or any(pair == ("--preset", "paper") for pair in itertools.pairwise(argv))
    default = Args(preset="paper", **PAPER) if paper else Args()
    return tyro.cli(Args, args=argv, default=default, description=__doc__)


def resolve(args: Args) -> Args:
    """Fills in the device and the task's settings, checks ranges, and on --resume and --evaluate takes the stored arguments."""
    if args.resume or args.evaluate:
        stored = Path(args.resume or args.evaluate) / "args.json"
        if not stored.exists():
            raise SystemExit(f"{stored.parent}: not a run directory (it has no args.json)")
        try:
            values = json.loads(stored.read_text())
            if args.resume:
                ignored = [f.name.replace("_", "-") for f in dataclasses.fields(Args) if f.name != "resume" and getattr(args, f.name) != f.default]
                if ignored:
                    print(f"--resume takes the stored arguments; not used: --{', --'.join(ignored)}")
                args = Args(**values | {"resume": args.resume})
            else:
                keep = ("task", "obs", "chunk", "euler_steps", "horizon", "encoder", "fast_render", "bf16")
                args = dataclasses.replace(args, **{key: values[key] for key in keep})
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{stored}: cannot be read ({error})") from error
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: this torch sees no CUDA device; use --device cpu.")
    spec = TASKS[args.task]
    args.horizon, args.chunk = args.horizon or spec.horizon, args.chunk or spec.chunk
    args.actor_width = args.actor_width or (768 if args.obs == "image" else 512)
    args.bc_epochs = args.bc_epochs or (30 if args.obs == "image" else 200)
    args.iterations = args.iterations or (40 if args.task == "lift" else 120)
    args.rollout_chunks = args.rollout_chunks or (200 if args.task == "lift" else 400)
    if args.exploration_steps is None:
        args.exploration_steps = 0 if args.task == "transport" else 2
    if args.obs == "state":
        args.encoder = "frozen"  # there is none
    counts = "chunk euler_steps n_particles num_envs horizon iterations rollout_chunks rounds reference_every segments value_samples eval_every"
    for name in f"{counts} eval_episodes final_eval_episodes critic_steps critic_batch actor_steps actor_batch bc_epochs bc_batch threads".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.actor_depth < 3 or args.actor_depth % 2 == 0:
        raise SystemExit(f"--actor-depth must be odd and at least 3 (a block has two layers), got {args.actor_depth}")
    if not 1 <= args.segment_chunks < args.rollout_chunks:
        raise SystemExit(f"--segment-chunks {args.segment_chunks} must lie between 1 and --rollout-chunks {args.rollout_chunks} - 1")
    if args.q_gradient == "particles" and args.n_particles < 2:
        raise SystemExit("--q-gradient particles needs --n-particles of at least 2, better 16")
    if args.exploration_scale < 0:
        raise SystemExit(f"--exploration-scale must be at least 0, got {args.exploration_scale}")
    if not 0 <= args.exploration_steps <= args.euler_steps:
        raise SystemExit("--exploration-steps must lie between 0 and --euler-steps")
    if args.horizon % args.chunk:
        raise SystemExit(f"--horizon {args.horizon} must be a multiple of --chunk {args.chunk}")
    return args


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    args = resolve(args)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.obs == "image":
        choose_renderer()
    if args.evaluate:
        policy = load_policy(Path(args.evaluate) / "policy.pt", args.device)
        envs = make_envs(args, args.num_envs)
        scores = evaluate(policy, envs, args, args.final_eval_episodes, 1_000_000 * (args.seed + 1))
        envs.close()
        for start, s in scores.items():
            mean, low, high = rate(s)
            print(f"{args.task}-{args.obs}, {len(s)} episodes from x_0 {'= 0' if start == 'zero' else '~ N(0, I)'}: "
                  f"success {100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]")  # fmt: skip
        if args.capture_video:
            base = load_policy(Path(args.evaluate) / "base_policy.pt", args.device)
            record_video({"base": base, "finetuned": policy}, args, Path(args.evaluate) / "videos" / "base_and_finetuned.mp4")
        return {start: s.mean() for start, s in scores.items()}

    task = f"{args.task}-{args.obs}"
    run_dir = Path(args.resume or Path(args.runs) / f"{task}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # networks
    if not (run_dir / "args.json").exists():
        values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
        write_atomically(run_dir / "args.json", lambda p: p.write_text(json.dumps(values, indent=2)))
    if args.resume and (run_dir / "base.safetensors").exists():
        args.base, args.pretrain = run_dir / "base.safetensors", False
    first = run_dir / "base_policy.pt"  # a resumed run keeps the base that it started from
    policy = load_policy(first, args.device) if args.resume and first.exists() else get_base(args, run_dir)
    save_policy(policy, first)
    torch.manual_seed(args.seed)  # the same networks however the base policy was come by
    if args.encoder == "frozen" and policy.encoder is not None:
        policy.encoder.requires_grad_(False)
    base = copy.deepcopy(policy).requires_grad_(False)
    reference = copy.deepcopy(base)
    own = Encoder(policy.config["cameras"], policy.config["state_dim"]) if args.encoder == "own" else None
    critic = Critic(policy.cond_dim, policy.action_size, args.critic_width, args.critic_depth, args.critic_layer_norm, args.critic_init, own)
    critic.to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], args.actor_lr, fused=True)
    groups = [dict(params=[*critic.weights, *critic.biases])]
    groups += [dict(params=list(own.parameters()), lr=args.critic_encoder_lr)] if own else []
    critic_optimizer = torch.optim.Adam(groups, args.critic_lr, fused=True)
    if args.compile:
        policy.velocity.compile(), critic.compile(), target.compile(), reference.velocity.compile()
    envs = make_envs(args, args.num_envs, stop_on_success=args.stop_on_success)
    blank = {name: np.zeros((1, *space.shape), space.dtype) for name, space in envs.observation_space.items()}
    replay = Replay(args, observe(policy, blank, args), policy.action_size)
    state = dict(iteration=0, env_steps=0, wall_s=0.0, trained=0, actor_step=0, best=-math.inf)
    best_policy = copy.deepcopy(policy.state_dict())
    modules = dict(policy=policy, reference=reference, critic=critic, target=target,
                   actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)  # fmt: skip
    checkpoint_path = run_dir / "checkpoint.pt"
    torch.manual_seed(args.seed)

    def save_checkpoint(new_rollout: bool):
        if new_rollout:  # one file per rollout: what was saved before stays as it is
            write_atomically(run_dir / f"replay{replay.slot()}.pt", lambda p: torch.save({k: v.clone() for k, v in replay.newest().items()}, p))
        saved = {key: module.state_dict() for key, module in modules.items()}
        saved |= dict(state=state, best_policy=best_policy, added=replay.added, rng=get_rng(args))
        write_atomically(checkpoint_path, lambda p: torch.save(saved, p))

    if args.resume and not checkpoint_path.exists():
        print(f"{run_dir}: no iteration was finished; it starts at the first.")
    elif args.resume:
        try:
            saved = torch.load(checkpoint_path, map_location=args.device, weights_only=True)
            replay.added = saved["added"]
            for slot in range(min(replay.added, len(replay.data["reward"]))):
                for name, value in torch.load(run_dir / f"replay{slot}.pt", map_location=args.device, weights_only=True).items():
                    replay.data[name][slot] = value
        except Exception as error:  # torch.load raises many types
            raise SystemExit(f"{checkpoint_path}: cannot be loaded ({error})") from error
        for key, module in modules.items():
            module.load_state_dict(saved[key])
        state, best_policy = saved["state"], saved["best_policy"]
        set_rng(saved["rng"], args)

    # logging
    writer = SummaryWriter(str(run_dir), purge_step=state["env_steps"] + 1 if args.resume else None)
    writer.add_text("args", "|name|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    csv_path = run_dir / "metrics.csv"
    rows = list(csv.DictReader(csv_path.open())) if args.resume and csv_path.exists() else []
    rows = [row for row in rows if int(row["iteration"]) < state["iteration"]]
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, name=run_dir.name, config=vars(args), dir=str(run_dir))
    progress = tqdm(total=args.iterations, initial=min(args.iterations, state["iteration"]), desc=task, dynamic_ncols=True)

    interrupted = []
    if threading.current_thread() is threading.main_thread():  # Ctrl-C: finish the iteration and save; twice: stop at once
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler) and interrupted.append(1))

    # training
    row, eval_seed = rows[-1] if rows else {}, 1_000_000 * (args.seed + 1)
    for iteration in range(state["iteration"], args.iterations + 1):
        tick, trained = time.perf_counter(), False
        row, sums = {"iteration": iteration}, defaultdict(list)
        if iteration % args.eval_every == 0 or iteration == args.iterations:  # evaluation only
            final = iteration in (0, args.iterations)
            scores = evaluate(policy, envs, args, args.final_eval_episodes if final else args.eval_episodes, eval_seed)
            for start, name in ("zero", "eval_success"), ("noise", "eval_success_sampled"):
                row[name], row[f"{name}_low"], row[f"{name}_high"] = rate(scores[start])
            if row["eval_success"] > state["best"] and iteration < args.iterations:
                state["best"], best_policy = row["eval_success"], copy.deepcopy(policy.state_dict())
            if iteration == 0:
                state["base"] = {key: row[key] for key in row if key.startswith("eval_success")}
        else:
            trained = True
            seeds = itertools.count(100_000_000 * (args.seed % 20 + 1) + 10_000 * iteration)
            steps, finished = collect(policy, envs, replay.rollout(), seeds, args)
            state["env_steps"] += steps
            row["train_success"] = float(finished.mean()) if len(finished) else ""
            row["rollout_s"], row["critic_s"], row["actor_s"] = time.perf_counter() - tick, 0.0, 0.0
            warm = state["trained"] < args.warmup_iterations
            critic_steps = args.critic_steps * (args.warmup_factor if warm else 1)
            for _ in range(args.rounds):
                start = time.perf_counter()
                batch = replay.draw(args.segments, args.segment_chunks, args.fresh_fraction, args.balanced)
                y = critic_target(policy, target, batch, args, args.warmup_lambda if warm else args.td_lambda).flatten()
                valid = batch["valid"].flatten() > 0  # states after success, and those an episode ended in, are left out
                obs = {name: batch[name][:-1].flatten(0, 1)[valid] for name in replay.obs_names}
                action, y = batch["action"].flatten(0, 1)[valid], y[valid]
                order = torch.cat([torch.randperm(len(y), device=y.device) for _ in range(-(-critic_steps * args.critic_batch // len(y)))])
                for i in order[: critic_steps * args.critic_batch].split(args.critic_batch):
                    for key, value in update_critic(critic, target, policy, critic_optimizer, take(obs, i), action[i], y[i], args).items():
                        sums[key].append(value)
                row["critic_s"] += time.perf_counter() - start
                start = time.perf_counter()
                for _ in range(0 if warm else args.actor_steps):
                    i = torch.randint(len(y), (args.actor_batch,), device=y.device)
                    state["actor_step"] += 1
                    decay = 1 + (args.actor_lr_end - 1) * iteration / args.iterations
                    actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * min(1.0, state["actor_step"] / args.actor_warmup)
                    for key, value in update_actor(policy, reference, critic, actor_optimizer, take(obs, i), args).items():
                        sums[key].append(value)
                row["actor_s"] += time.perf_counter() - start
            state["trained"] += 1
            with torch.no_grad():  # how far the velocity has moved from the base, at a_0 ~ N(0, I), t = 0
                few = take(obs, slice(256))
                noise, zero = torch.randn(len(few["state"]), policy.action_size, device=args.device), torch.zeros((), device=args.device)
                moved = policy.velocity(noise, zero, policy.encode(few)) - base.velocity(noise, zero, base.encode(few))
                sums["diagnostics/base_distance"] = [moved.norm(dim=-1).mean()]
            row |= {key: torch.stack(value).mean().item() for key, value in sums.items()} | {"diagnostics/memory_gib": memory_gib()}
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"{key} became {value} in iteration {iteration}; the last good checkpoint is {checkpoint_path}")
            if args.reference == "previous" and state["trained"] % args.reference_every == 0:
                reference.load_state_dict(policy.state_dict())

        state["iteration"], state["wall_s"] = iteration + 1, state["wall_s"] + time.perf_counter() - tick
        row |= {"env_steps": state["env_steps"], "wall_s": state["wall_s"]}
        rows.append(row)
        write_atomically(csv_path, lambda p: write_rows(p, rows))
        for key, value in row.items():
            if value != "" and key != "iteration":
                writer.add_scalar(key if "/" in key else f"charts/{key}", value, state["env_steps"])
        if args.track:
            wandb.log(row, step=state["env_steps"])
        if "eval_success" in row:
            tqdm.write(f"{state['env_steps']:8d} steps {state['wall_s']:6.0f} s  success {100 * row['eval_success']:3.0f} % from x_0 = 0, "
                       f"{100 * row['eval_success_sampled']:3.0f} % from noise")  # fmt: skip
        current = row.get("eval_success", row.get("train_success"))
        if current not in ("", None):
            progress.set_postfix_str(f"success {100 * current:.0f} %")
        progress.update(min(args.iterations, state["iteration"]) - progress.n)
        save_checkpoint(trained)
        if interrupted:
            envs.close()
            raise SystemExit(f"Stopped after iteration {iteration}, saved. Continue with: python rldt_robomimic.py --resume {run_dir}")

    # results
    save_policy(policy, run_dir / "policy.pt")
    final = {key: float(row[key]) for key in state["base"]}
    best = final
    if state["best"] > final["eval_success"]:  # measured again, on other episodes than those that selected it
        best_net = copy.deepcopy(policy)
        best_net.load_state_dict(best_policy)
        save_policy(best_net, run_dir / "best_policy.pt")
        scores = evaluate(best_net, envs, args, args.final_eval_episodes, eval_seed + 500_000)
        measured = {"eval_success": scores["zero"].mean(), "eval_success_sampled": scores["noise"].mean()}
        best = max(final, measured, key=lambda scores: scores["eval_success"])
    envs.close()
    named = lambda prefix, values: {key.replace("eval", prefix): value for key, value in values.items()}
    result = {
        "task": task, "method": args.exp_name, "preset": args.preset, "seed": args.seed, **named("base", state["base"]), **named("final", final),
        "best_success": float(best["eval_success"]), "best_success_sampled": float(best["eval_success_sampled"]),
        "episodes": args.final_eval_episodes, "env_steps": state["env_steps"], "wall_s": round(state["wall_s"], 1), "threads": args.threads,
        "num_envs": args.num_envs, "device": args.device, "commit": git_commit(), "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in ("torch", "numpy", "mujoco", "robosuite", "robomimic")},
        "args": json.loads((run_dir / "args.json").read_text()),
    }  # fmt: skip
    write_atomically(run_dir / "result.json", lambda p: p.write_text(json.dumps(result, indent=2)))
    plot_curve(csv_path, run_dir / "curve.png", f"{task}, seed {args.seed}")
    writer.close()
    progress.close()
    if args.capture_video:
        record_video({"base": base, "finetuned": policy}, args, run_dir / "videos" / "base_and_finetuned.mp4")
    print(f"{task}: success {100 * result['base_success']:.0f} % -> {100 * result['final_success']:.0f} % (x_0 = 0), "
          f"{100 * result['base_success_sampled']:.0f} % -> {100 * result['final_success_sampled']:.0f} % (sampled), "
          f"{state['env_steps']} env steps, {state['wall_s']:.0f} s. Results in {run_dir}")  # fmt: skip
    return result


if __name__ == "__main__":
    main(parse_args())
