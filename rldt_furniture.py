"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for FurnitureBench's assembly tasks.

    python rldt_furniture.py --furniture one_leg --randomness low

finetunes a flow-matching policy, cloned from demonstrations, on the sparse reward of assembled pairs of parts by moving its
action density toward exp(Q / alpha) with Stein variational gradient descent. It runs in MuJoCo on any machine, and in
FurnitureSim where Isaac Gym is installed. docs/rldt_furniture.md says what differs from rldt_gym.py, whose order and names
this file keeps.
"""

try:  # Isaac Gym cannot be imported after torch
    import isaacgym  # noqa: F401
except (ImportError, RuntimeError):  # the latter on another Python than its own
    pass

import copy
import csv
import dataclasses
import importlib
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

import mujoco
import numpy as np
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
from demos import furniture as dataset
from envs.furniture_isaac import IsaacVectorEnv, isaac_missing
from envs.furniture_mujoco import FURNITURE, FurnitureEnv, FurnitureVectorEnv

DEMOS = Path(__file__).parent / "demos"


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    furniture: Literal["one_leg", "lamp"] = "one_leg"
    """FurnitureBench task: one leg of a square table, or a lamp's bulb and hood."""
    randomness: Literal["low", "med"] = "low"
    """Range of the initial states (FurnitureBench)."""
    backend: Literal["auto", "isaac", "mujoco"] = "auto"
    """Simulator: FurnitureSim in Isaac Gym, or the same task in MuJoCo; auto: Isaac Gym where it is installed."""
    preset: Literal["laptop", "paper"] = "laptop"
    """Which defaults: `laptop` (two CPU cores) or `paper` (the paper's settings, for a GPU and 1000 environments). Explicit flags win."""
    exp_name: str = "rldt"
    """Name of the experiment, part of the run directory's name."""
    seed: int = 1
    """Seed of networks, minibatches, noise and environments."""
    runs: Path = Path("runs")
    """Directory in which run directories are made."""
    device: str = "auto"
    """Torch device: cpu, cuda, cuda:0, ... `auto` takes CUDA where there is one."""
    threads: int = 2
    """CPU threads of torch, and of the simulators in MuJoCo."""
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
    """Record the base and the final policy side by side as mp4 (in MuJoCo; needs EGL, or OSMesa and MUJOCO_GL=osmesa)."""
    video_episodes: int = 3
    """Episodes of the video."""

    # base policy
    base: Path | None = None
    """Base policy (.safetensors); default demos/<furniture>/base_<randomness>.safetensors where it exists, else it is pretrained."""
    pretrain: bool = False
    """Pretrain the base policy even where one exists; it is kept in the run directory."""
    dataset: Path | None = None
    """Demonstrations (.hdf5); default demos/<furniture>/<randomness>.hdf5, made by a scripted assembler when missing."""
    bc_from: Path | None = None
    """Base policy (.safetensors) whose weights and scaling pretraining starts from, for demonstrations recorded with `--clone`."""
    bc_episodes: int = 0
    """Demonstrations to clone, 0: all in the file."""
    bc_epochs: int = 200
    """Pretraining passes over the data (paper: 8000)."""
    bc_batch: int = 256
    """Pretraining batch, in action chunks (paper: 256)."""
    bc_lr: float = 1e-3
    """Initial learning rate of pretraining, AdamW with weight decay 1e-6 (paper: 1e-4)."""
    bc_lr_end: float = 1e-4
    """Final learning rate of pretraining, cosine schedule (paper: 1e-5)."""
    bc_spread: float = 1.0
    """Standard deviations from the demonstrations' mean that are scaled to 1, per dimension of observations and actions; 0: their range is
    scaled to [-1, 1] (DPPO)."""
    bc_ema: float = 0.995
    """Decay per step of the weight average that becomes the base policy (authors: 0.995)."""
    actor_width: int = 512
    """Hidden width of the velocity network (paper: 1024)."""
    actor_depth: int = 5
    """Hidden layers of the velocity network, odd (paper: 7)."""
    actor_layer_norm: bool = True
    """LayerNorm in the velocity network's residual blocks (paper)."""
    cond_mlp: tuple[int, ...] = (512, 256)
    """Hidden sizes of an MLP that the state passes before the velocity network, none if empty (paper: 512 64)."""
    time_dim: int = 32
    """Size of the time embedding (paper: 32)."""
    chunk: int = 8
    """Actions per decision, executed open loop, in environment steps of 0.1 s (paper: 8)."""
    euler_steps: int = 8
    """K, Euler steps from noise to action (paper: 32)."""

    # rollouts
    iterations: int = 60
    """Training iterations, the evaluation-only ones included (paper: 250 for low and 500 for med; the preset has 250)."""
    num_envs: int = 16
    """Environments, stepped by threads in MuJoCo (paper: 1000)."""
    horizon: int = 0
    """Time limit of an episode in environment steps of 0.1 s; 0: the task's, 700 (one_leg) or 1000 (lamp)."""
    stop_on_success: bool = True
    """End an episode when all pairs are assembled; else it runs to the time limit, and what follows is masked (authors; always in
    Isaac Gym, where a reset disturbs the other environments)."""
    rollout_chunks: int = 0
    """Rows per environment and iteration: one for each chunk, and one for the state after the last; episodes start anew in every iteration, and
    the critic bootstraps where one is cut. 0: a whole episode, 89 (one_leg) or 126 (lamp) (paper: 88 or 125, without that state)."""
    rollout_end: Literal["bootstrap", "failure"] = "bootstrap"
    """What the end of a rollout is to the critic where it cuts an episode that began with it: a cut, or `failure`, as if time was up (later
    episodes are cut in either case)."""
    exploration_steps: int = 0
    """Exploration noise |a - a_dagger_k| N(0, I) with k uniform over this many last ODE steps; 0: none (authors: 2 of 32 steps; with
    8 steps the same noise is so long that no leg is ever assembled)."""
    exploration_scale: float = 1.0
    """Factor on the exploration noise, whose length grows with the size of a chunk (authors: 1)."""
    zero_fraction: float = 0.25
    """Share of environments and of particles that start from x_0 = 0 instead of noise, as the evaluation does (authors: 0)."""
    noise_scale: float = 1.0
    """Standard deviation of x_0 in rollouts, particles and the critic's targets; the sampled evaluation keeps 1. Below 1 they stay near
    x_0 = 0, from where a clone of Lamp assembles more pairs (authors: 1)."""
    buffer_iterations: int = 60
    """Rollouts kept in the replay, in iterations (authors: 20)."""
    eval_every: int = 40
    """Every n-th iteration only evaluates (authors: 10)."""
    eval_episodes: int = 30
    """Episodes per evaluation during training, from x_0 = 0 and again from noise."""
    final_eval_episodes: int = 100
    """Episodes of the base, final and best evaluations, from x_0 = 0 and again from noise."""

    # critic
    gamma: float = 0.99
    """Discount per chunk of actions (paper: 0.995)."""
    td_lambda: float = 0.5
    """lambda of TD(lambda) (authors: 0.5)."""
    time_limit: Literal["bootstrap", "terminal"] = "terminal"
    """What the time limit is to the critic: `terminal`, a failure (authors), or `bootstrap`, a cut that says nothing."""
    value_samples: int = 1
    """Policy actions per next state over which the target V(s') is averaged (authors: 2)."""
    target_momentum: float = 0.99
    """Polyak momentum of the target critics per critic step (paper: 0.998)."""
    rounds: int = 8
    """Rounds per iteration, each: draw segments, compute targets, critic steps, actor steps (authors: 16)."""
    critic_steps: int = 128
    """Critic steps per round (paper: 128, of larger batches)."""
    critic_batch: int = 256
    """Transitions per critic step (authors: all that were drawn)."""
    critic_lr: float = 5e-4
    """Adam step size of the critic (paper: 5e-4)."""
    critic_width: int = 256
    """Hidden width of each critic (paper: 512)."""
    critic_depth: int = 3
    """Hidden layers of each critic (paper: 3)."""
    critic_layer_norm: bool = True
    """LayerNorm before each activation of the critic (authors: none)."""
    critic_init: Literal["default", "normal"] = "default"
    """Critic weights: torch's default U(+-1/sqrt(fan_in)), or N(0, 0.1^2) with zero bias (authors)."""
    critic_stage: bool = True
    """The critic also sees how many pairs are assembled, in tasks of several (authors: lamp)."""
    balanced: bool = True
    """Draw equally many segments from episodes of each number of pairs assembled (authors)."""
    segments: int = 128
    """Replay segments drawn per round."""
    segment_chunks: int = 16
    """Length of a segment in chunks, less than rollout_chunks; 0: the whole rollout (authors)."""
    fresh_fraction: float = 0.33
    """Least fraction of the segments that comes from the newest rollout (authors: 0.33)."""
    warmup_iterations: int = 22
    """Training iterations before the actor starts (paper: 2, of 1000 episodes each)."""
    warmup_lambda: float = 0.5
    """lambda before the actor starts (authors: as td_lambda)."""
    warmup_factor: int = 1
    """Factor on critic_steps before the actor starts (authors: 1)."""

    # actor
    actor_steps: int = 6
    """Actor steps per round (authors: 2)."""
    actor_batch: int = 64
    """States per actor step, each with n_particles particles (authors: 6250)."""
    n_particles: int = 16
    """P, particles per state (paper: 8)."""
    kernel: Literal["rbf", "delta"] = "rbf"
    """Kernel of the transport field; `delta` is the ablation RLDT-Delta (paper: rbf)."""
    q_gradient: Literal["critic", "particles"] = "particles"
    """The gradient of Q in the transport field: `critic`, its derivative (paper), or `particles`, the way to those of a state's particles
    that have a high Q, by `particle_gradient` (ours; it wants 16 particles and more)."""
    alpha: float = 1e-3
    """Temperature: weight of the repulsion, relative to |grad Q| (paper: 1e-3)."""
    transport_loss: Literal["literal", "authors"] = "authors"
    """Transport loss: eq. (13) as printed (weight 1 - t), or as in the authors' code (weight 1 / (1 - t))."""
    transport_scale: float = 0.0
    """Factor on grad Q in the transport field (authors: 1); 0: the task's, 30 (one_leg) or 8 (lamp, whose particles are spread more
    widely; in an earlier version it forgot with 30 what its base can do)."""
    consistency_weight: float = 0.05
    """Weight of the consistency loss, eq. (14) (paper: 0.5); at 0.5 it moves the policy by itself, and a few centimetres decide success."""
    constraint_weight: float = 0.2
    """Weight of the Fisher-divergence constraint, eq. (15) (paper: 0.2)."""
    reference: Literal["previous", "pretrained"] = "pretrained"
    """Policy of the constraint: an earlier one (authors) or the pretrained one (paper's text)."""
    reference_every: int = 1
    """Training iterations after which the previous policy is replaced by the current one (authors: 1)."""
    actor_lr: float = 2e-4
    """Adam step size of the actor (paper: 2e-5, with batches a hundred times as large)."""
    actor_lr_end: float = 0.3
    """Factor on actor_lr that is reached linearly by the last iteration, counted from the run's start (authors: 1)."""
    actor_warmup: int = 32
    """Actor steps over which the step size rises linearly (paper: 32)."""
    actor_ema: float = 0.0
    """Decay per actor step of the weight average that acts and is evaluated, 0: the actor itself acts (authors: 0)."""


PAPER = dict(
    bc_epochs=8000, bc_lr=1e-4, bc_lr_end=1e-5, bc_spread=0.0, actor_width=1024, actor_depth=7, cond_mlp=(512, 64), euler_steps=32, exploration_steps=2,
    iterations=250, num_envs=1000, stop_on_success=False, buffer_iterations=20, eval_every=10, eval_episodes=500, final_eval_episodes=500, gamma=0.995, value_samples=2,
    target_momentum=0.998, rounds=16, critic_steps=128, critic_batch=8192, critic_lr=5e-4, critic_width=512, critic_layer_norm=False,
    critic_init="normal", segments=500, segment_chunks=0, warmup_iterations=2, actor_steps=2, actor_batch=6250, n_particles=8, q_gradient="critic", zero_fraction=0.0,
    consistency_weight=0.5, reference="previous", actor_lr=2e-5, transport_scale=1.0, actor_lr_end=1.0, bf16=False,
)  # fmt: skip


# ----------------------------------------------------------------------------------- networks
class FlowPolicy(nn.Module):
    """A velocity network and a scaling of observations and actions by limits taken from the demonstrations (`--bc-spread`)."""

    SCALING = ("obs_min", "obs_max", "action_min", "action_max")

    def __init__(self, obs_dim: int, action_dim: int, chunk: int, euler_steps: int, width: int, depth: int, time_dim: int, layer_norm: bool, cond_mlp):
        super().__init__()
        self.config = dict(obs_dim=obs_dim, action_dim=action_dim, chunk=chunk, euler_steps=euler_steps, width=width, depth=depth,
                           time_dim=time_dim, layer_norm=layer_norm, cond_mlp=list(cond_mlp))  # fmt: skip
        self.chunk, self.euler_steps, self.action_size = chunk, euler_steps, chunk * action_dim
        self.velocity = VelocityMLP(self.action_size, obs_dim, width, depth, time_dim, layer_norm=layer_norm, cond_mlp=cond_mlp)
        for name in self.SCALING:
            dim = obs_dim if name.startswith("obs") else action_dim
            self.register_buffer(name, torch.full((dim,), -1.0 if name.endswith("min") else 1.0))

    def normalize(self, obs) -> torch.Tensor:
        """Observations (..., obs_dim) with the demonstrations' limits scaled to -1 and 1, clamped to +-5 (DPPO)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_min.device)
        return (2 * (obs - self.obs_min) / (self.obs_max - self.obs_min + 1e-6) - 1).clamp(-5, 5)

    def to_env(self, action: torch.Tensor) -> np.ndarray:
        """Flat normalised chunks (N, chunk * action_dim) -> raw actions (N, chunk, action_dim)."""
        action = action.float().view(len(action), self.chunk, -1)
        return ((action + 1) / 2 * (self.action_max - self.action_min + 1e-6) + self.action_min).cpu().numpy()

    def sample(self, obs: torch.Tensor, x0: torch.Tensor | None = None, trajectory: bool = False) -> torch.Tensor:
        """Action chunks (..., D) for normalised obs (..., obs_dim), from x0 or from noise; see common.flow.sample."""
        if x0 is None:
            x0 = torch.randn(*obs.shape[:-1], self.action_size, device=obs.device)
        return sample(self.velocity, obs, x0, self.euler_steps, trajectory)


class Critic(nn.Module):
    """Two Q networks on (state and stage, action chunk), evaluated as one batched product."""

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
        with torch.autocast(x.device.type, enabled=False):
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


def autocast(args: Args):
    """bfloat16 matrix products, where asked for."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16)


def gradient_norm(parameters) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])))


def stages_of(args: Args) -> int:
    """Pairs of parts that the task assembles, the largest return of an episode."""
    return len(FURNITURE[args.furniture].pairs)


def critic_obs(state: torch.Tensor, stage: torch.Tensor, args: Args) -> torch.Tensor:
    """States (..., obs_dim) and pairs assembled so far (...) -> what the critic sees: one more column where the task has several pairs."""
    if not args.critic_stage or stages_of(args) == 1:
        return state
    return torch.cat([state, stage[..., None] / stages_of(args)], -1)


# -------------------------------------------------------------------------------- base policy
def make_policy(args: Args, obs_dim: int, action_dim: int) -> FlowPolicy:
    return FlowPolicy(obs_dim, action_dim, args.chunk, args.euler_steps, args.actor_width, args.actor_depth, args.time_dim,
                      args.actor_layer_norm, args.cond_mlp)  # fmt: skip


def pretrain(args: Args, data: dict, log=print, checkpoint: Path | None = None, each=None) -> FlowPolicy:
    """Flow matching on demonstrations, eq. (1)-(2); returns the policy with averaged weights.

    Every 500 steps all that it needs to go on goes into `checkpoint`, where given; if that file exists, it goes on from there.
    `each`, where given, is called then with the step, the averaged policy and the validation loss.
    """
    starts = np.r_[0, data["episode_ends"][:-1]]
    first = np.concatenate([np.arange(s, e - args.chunk + 1) for s, e in zip(starts, data["episode_ends"], strict=True)])
    if len(first) < 20:
        raise SystemExit(f"{len(first)} chunks to clone are too few; every demonstration must be as long as a chunk ({args.chunk} steps), and 20 chunks are the least.")
    policy = make_policy(args, data["state"].shape[1], data["action"].shape[1])
    for key, name in ("obs", "state"), ("action", "action"):
        low, high = data[name].min(0), data[name].max(0)
        if args.bc_spread:
            mean, spread = data[name].mean(0, dtype=float), args.bc_spread * data[name].std(0, dtype=float)
            low, high = mean - spread, mean + spread
        getattr(policy, f"{key}_min").copy_(torch.as_tensor(low))
        getattr(policy, f"{key}_max").copy_(torch.as_tensor(high))
    if args.bc_from:
        policy.load_state_dict(load_base(args.bc_from, args).state_dict())
    policy.to(args.device)
    obs = policy.normalize(data["state"][first])  # (n, obs_dim)
    action = torch.as_tensor(data["action"][first[:, None] + np.arange(args.chunk)], device=args.device)
    action = 2 * (action - policy.action_min) / (policy.action_max - policy.action_min + 1e-6) - 1
    action = action.flatten(1)  # (n, D)
    shuffled = torch.randperm(len(action), device=args.device)
    held_out, train = shuffled[: len(action) // 20].split(1024)[0], shuffled[len(action) // 20 :]
    averaged = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), args.bc_lr, weight_decay=1e-6, fused=True)
    steps = max(1, args.bc_epochs * len(train) // args.bc_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, args.bc_lr_end)
    modules = dict(policy=policy, averaged=averaged, optimizer=optimizer, schedule=schedule)
    settings = dict(policy=policy.config, steps=steps, chunks=len(action), **{k: str(v) for k, v in vars(args).items() if k.startswith("bc_") or k == "seed"})
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
            loss = flow_matching_loss(policy.velocity, action[i], obs[i])  # eq. (2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - args.bc_ema)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            with torch.no_grad(), autocast(args):
                validation = flow_matching_loss(averaged.velocity, action[held_out], obs[held_out]).item()
            if not math.isfinite(validation):
                raise FloatingPointError("the flow-matching loss is not finite; lower --bc-lr")
            progress.set_postfix(validation=f"{validation:.4f}")
            if checkpoint:
                saved = {key: module.state_dict() for key, module in modules.items()}
                saved |= dict(settings=settings, done=step + 1, validation=validation, held_out=held_out, train=train, rng=get_rng(args))
                write_atomically(checkpoint, lambda p, saved=saved: torch.save(saved, p))
            if each:
                each(step + 1, averaged, validation)
    log(f"base policy: {steps} steps, validation loss {validation:.4f}, {len(data['episode_ends'])} demonstrations")
    averaged.validation_loss = validation
    return averaged


def save_base(policy: FlowPolicy, path: Path, **info):
    """Writes weights (half precision), scaling and sizes of a policy as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value if key in FlowPolicy.SCALING else value.half() for key, value in policy.state_dict().items()}
    save_file(state, path, metadata={"config": json.dumps(policy.config), "info": json.dumps(info)})


def load_base(path: Path, args: Args) -> FlowPolicy:
    """Reads a base policy and checks that it fits the task and the arguments."""
    try:
        with safe_open(path, "pt") as file:
            config, info = json.loads(file.metadata()["config"]), json.loads(file.metadata().get("info", "{}"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}
        policy = FlowPolicy(**config)
        policy.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path}: not a base policy written by this project ({str(error).splitlines()[0]})") from error
    want = make_policy(args, FURNITURE[args.furniture].obs_dim, 10).config
    for key, value in want.items():
        if config[key] != value:
            raise SystemExit(f"{path}: has {key} {config[key]}, the run wants {value}; change the flag or use --pretrain.")
    if args.backend not in ("auto", info.get("backend", args.backend)):
        print(f"{path}: a base policy of {info['backend']}, now used in {args.backend}, whose physics differ.")
    return policy.to(args.device)


def get_demonstrations(args: Args) -> dict:
    """The given dataset, or that of the scripted assembler, made when first needed."""
    source = args.dataset or DEMOS / args.furniture / f"{args.randomness}.hdf5"
    if args.dataset is None and not source.exists():
        print(f"Recording demonstrations of the scripted assembler in MuJoCo to {source} ...")
        command = [sys.executable, "-m", "demos.make_furniture_demos", "--furniture", args.furniture, "--randomness", args.randomness, "--out", source]
        if subprocess.run(list(map(str, command)), cwd=DEMOS.parent).returncode:
            raise SystemExit("The demonstrations could not be made, see above.")
    return dataset.load(source, args.furniture, args.bc_episodes)


def get_base(args: Args, run_dir: Path) -> FlowPolicy:
    """The base policy: given, shipped, or pretrained here; one pretrained here is kept in the run directory."""
    shipped = DEMOS / args.furniture / f"base_{args.randomness}.safetensors"
    path = args.base or (shipped if shipped.exists() and args.dataset is None else None)
    if path and not args.pretrain:
        return load_base(Path(path), args)
    checkpoint = run_dir / "pretraining.pt"
    policy = pretrain(args, get_demonstrations(args), checkpoint=checkpoint)
    made_in = {} if args.dataset else {"backend": "mujoco"}
    save_base(policy, run_dir / "base.safetensors", furniture=args.furniture, randomness=args.randomness, validation_loss=policy.validation_loss, **made_in)
    checkpoint.unlink(missing_ok=True)
    return load_base(run_dir / "base.safetensors", args)  # in half precision, as a resumed run finds it


# ------------------------------------------------------------------------------------- replay
class Replay:
    """The last `buffer_iterations` rollouts, each (rollout_chunks, num_envs), on the device.

    A row is a state, with the pairs assembled so far ("stage") and the action taken in it, or without: where an episode was
    cut, a row of valid = 0 holds the state that it ended in, so that the next state is always the next row. "reached" is the
    number of pairs that the row's episode assembled in the end.
    """

    def __init__(self, args: Args, obs_dim: int, action_size: int):
        shape = args.buffer_iterations, args.rollout_chunks, args.num_envs
        self.data = {name: torch.zeros(*shape, size, device=args.device) for name, size in (("state", obs_dim), ("action", action_size))}
        for name in "stage", "reward", "terminated", "truncated", "valid", "reached":
            self.data[name] = torch.zeros(shape, device=args.device)
        self.added = 0

    def rollout(self) -> dict[str, torch.Tensor]:
        """The slot of the next rollout, cleared, to be written in place."""
        self.added += 1
        for name in "reward", "terminated", "truncated", "valid", "reached":
            self.newest()[name].zero_()
        return self.newest()

    def slot(self) -> int:
        return (self.added - 1) % len(self.data["reward"])

    def newest(self) -> dict[str, torch.Tensor]:
        return {name: value[self.slot()] for name, value in self.data.items()}

    def starts(self, length: int, fresh_fraction: float, balanced: bool, segments: int) -> torch.Tensor:
        """Where segments begin, (segments, 3) rows of (slot, time, environment): valid, equally many for each number of pairs reached."""
        valid = self.data["valid"].clone() > 0
        valid[:, valid.shape[1] - length :] = False
        reached, chosen = self.data["reached"], []
        groups = [valid & (reached == n) for n in reached.unique()] if balanced else [valid]
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
        """Random segments, time first: state and stage (length + 1, segments, ...), all else (length, segments, ...)."""
        slot, start, column = self.starts(length, fresh_fraction, balanced, segments).T
        t = start + torch.arange(length + 1, device=start.device)[:, None]  # (length + 1, segments)
        return {name: value[slot, t if name in ("state", "stage") else t[:-1], column] for name, value in self.data.items()}


# ------------------------------------------------------------------------------------ updates
def td_lambda(reward, terminated, truncated, next_value, gamma: float, lam: float, most: float) -> torch.Tensor:
    """TD(lambda) targets of segments, time first, all (T, L); returns lie in [0, most], and so do the targets.

    y_t = r_t + gamma (1 - terminated_t) [(1 - lam) V(s_{t+1}) + lam y_{t+1}]; after a truncation and
    at the segment's end V(s_{t+1}) stands alone.
    """
    target, y = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        y = torch.where(truncated[t] > 0, next_value[t], (1 - lam) * next_value[t] + lam * y)
        y = (reward[t] + gamma * (1 - terminated[t]) * y).clamp(0, most)
        target[t] = y
    return target


@torch.no_grad()
def critic_target(policy: FlowPolicy, target: Critic, batch: dict, args: Args, lam: float | None = None) -> torch.Tensor:
    """TD(lambda) targets (T, L); V(s') = mean over sampled actions of the minimum of the target networks."""
    T, L = batch["reward"].shape
    state = batch["state"][1:].flatten(0, 1).repeat(args.value_samples, 1)  # (value_samples * T * L, obs_dim)
    stage = batch["stage"][1:].flatten().repeat(args.value_samples)
    with autocast(args):
        x0 = args.noise_scale * torch.randn(len(state), policy.action_size, device=state.device)
        value = target(critic_obs(state, stage, args), policy.sample(state, x0)).min(0).values
    value = value.view(args.value_samples, T, L).mean(0)
    lam = args.td_lambda if lam is None else lam
    return td_lambda(batch["reward"], batch["terminated"], batch["truncated"], value, args.gamma, lam, stages_of(args))


def update_critic(critic: Critic, target: Critic, optimizer, obs, action, y, args: Args) -> dict[str, torch.Tensor]:
    """One step on critic_obs (B, .), action (B, D), targets y (B,), and one of the target networks."""
    with autocast(args):
        q = critic(obs, action)  # (2, B)
    loss = (q - y).square().mean(1).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(critic.parameters()), 1 - args.target_momentum)
    return {"losses/critic": loss.detach(), "diagnostics/q": q.detach().mean()}


def start_noise(shape, args: Args) -> torch.Tensor:
    """x_0 of the particles (B, P, D): N(0, noise_scale^2 I), and zero for a share `zero_fraction` of them."""
    return args.noise_scale * torch.randn(shape, device=args.device) * (torch.rand(*shape[:-1], 1, device=args.device) >= args.zero_fraction)


def actor_losses(velocity, reference, critic: Critic, obs, obs_q, trajectory, args: Args, k: torch.Tensor | None = None):
    """The three losses of eq. (16) on B states with trajectories (K + 1, B, P, D), at steps k (B, P); obs_q is what the critic sees."""
    K, (_, B, P, D) = args.euler_steps, trajectory.shape
    device, action = obs.device, trajectory[-1]  # a, (B, P, D)
    obs, obs_q = (o[:, None].expand(-1, P, -1) for o in (obs, obs_q))  # (B, P, .)
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K
    x_c = interpolate(action, start_noise(action.shape, args), t_c)
    with autocast(args):
        v, v_c = velocity(torch.stack([x, x_c]), torch.stack([t, t_c]), obs.expand(2, -1, -1, -1))  # both in one pass
        with torch.no_grad():
            v_ref = reference(x_c, t_c, obs)
    a_dagger = expected_target(x, t, v)  # eq. (8)

    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(obs_q.reshape(B * P, -1), particles.view(B * P, D)).mean(0)
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


def update_actor(policy: FlowPolicy, reference: FlowPolicy, critic: Critic, optimizer, obs, obs_q, args: Args) -> dict[str, torch.Tensor]:
    """Samples P particles for each of obs (B, obs_dim), then one step of L_transport, L_consistency and L_constraint by their weights, eq. (16)."""
    with torch.no_grad(), autocast(args):
        x0 = start_noise((len(obs), args.n_particles, policy.action_size), args)
        trajectory = policy.sample(obs[:, None].expand(-1, args.n_particles, -1), x0, trajectory=True)
    transport, consistency, constraint, metrics = actor_losses(policy.velocity, reference.velocity, critic, obs, obs_q, trajectory, args)
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint  # eq. (16)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return metrics | {"diagnostics/actor_grad_norm": gradient_norm(optimizer.param_groups[0]["params"])}


# ------------------------------------------------------------------------------ rollouts, evaluation
def make_envs(args: Args, num_envs: int, stop_on_success: bool = True):
    kwargs = dict(furniture=args.furniture, randomness=args.randomness, chunk=args.chunk, horizon=args.horizon, stop_on_success=stop_on_success)
    if args.backend == "isaac":
        return IsaacVectorEnv(num_envs, **kwargs)
    return FurnitureVectorEnv(num_envs, threads=args.threads, **kwargs)


@torch.no_grad()
def collect(policy: FlowPolicy, envs, slot: dict, seeds, args: Args):
    """Fills one rollout `slot` with exploration, episodes seeded from the iterator `seeds`; returns env steps and the pairs (num_envs,) that
    the first episode of each environment assembled: of later ones, those that take long are not seen to their end."""
    T, N, K, steps, assembled = args.rollout_chunks, args.num_envs, args.euler_steps, 0, np.zeros(args.num_envs, int)
    row, first = np.zeros(N, int), np.zeros(N, int)  # where each environment writes, and where its episode began
    stage, everyone = np.zeros(N, int), np.arange(N)
    obs = policy.normalize(envs.reset([next(seeds) for _ in range(N)], np.ones(N, bool))["state"])
    while (active := row < T - 1).any():  # the last row can only hold a final state
        with autocast(args):
            x0 = args.noise_scale * torch.randn(N, policy.action_size, device=args.device)
            x0[: round(args.zero_fraction * N)] = 0
            x = policy.sample(obs, x0, trajectory=True)  # (K + 1, N, D)
        action = x[-1]
        if args.exploration_steps:
            k = K - 1 - torch.randint(args.exploration_steps, (N,), device=action.device)
            n = torch.arange(N, device=action.device)
            x_k, x_next = x[k, n], x[k + 1, n]
            a_dagger = expected_target(x_k, k / K, (x_next - x_k) * K)  # eq. (8), the velocity read off the trajectory
            action = action + args.exploration_scale * (action - a_dagger).norm(dim=-1, keepdim=True) * torch.randn_like(action)
        raw, reward, _, truncated, next_stage, length = envs.step(policy.to_env(action), active)
        next_obs, solved = policy.normalize(raw["state"]), next_stage == stages_of(args)
        ids = everyone[active]
        terminated = solved | truncated if args.time_limit == "terminal" else solved
        values = dict(state=obs, stage=stage, action=action, reward=reward, terminated=terminated, valid=stage < stages_of(args),
                      truncated=truncated & ~solved & (args.time_limit == "bootstrap"))  # fmt: skip
        for name, value in values.items():
            slot[name][row[ids], ids] = torch.as_tensor(value, device=args.device)[ids].to(slot[name].dtype)
        steps += int(length[active].sum())
        row[ids] += 1
        stage = np.where(active, next_stage, stage)
        over = active & (truncated | (solved & args.stop_on_success))
        cut = active & ~over & (row == T - 1)
        for i in everyone[over | cut]:
            slot["state"][row[i], i], slot["stage"][row[i], i] = next_obs[i], float(stage[i])
            slot["reached"][first[i] : row[i] + 1, i] = float(stage[i])
            if cut[i] and not solved[i]:
                failure = args.rollout_end == "failure" and first[i] == 0
                slot["terminated" if failure else "truncated"][row[i] - 1, i] = 1  # the rollout ends here, not the episode
            if first[i] == 0:
                assembled[i] = stage[i]
        row[over], stage[over] = row[over] + 1, 0
        first[over] = row[over]
        obs, renew = next_obs, over & (row < T - 1)
        if renew.any():
            obs = policy.normalize(envs.reset([next(seeds) if r else 0 for r in renew], renew)["state"])
    return steps, assembled


@torch.no_grad()
def evaluate(policy: FlowPolicy, envs, args: Args, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Pairs assembled, (episodes,) each, from x_0 = 0 ("zero") and from x_0 ~ N(0, I) ("noise"), from the same initial states."""
    generator = torch.Generator(args.device).manual_seed(seed)
    stages = np.zeros(2 * episodes, int)
    waiting, N = list(range(2 * episodes)), envs.num_envs
    job = np.array([waiting.pop(0) if waiting else -1 for _ in range(N)])
    raw = envs.reset([seed + j % episodes for j in job], np.ones(N, bool))
    while (job >= 0).any():
        x0 = torch.randn(N, policy.action_size, device=args.device, generator=generator)
        x0[torch.as_tensor(job < episodes)] = 0
        with autocast(args):
            chunks = policy.to_env(policy.sample(policy.normalize(raw["state"]), x0))
        raw, _, _, truncated, stage, _ = envs.step(chunks, active := job >= 0)
        stages[job[active]] = stage[active]
        job[truncated | (stage == stages_of(args))] = -1
        free = job < 0
        if args.backend == "isaac" and not free.all():
            continue  # there a reset disturbs the other environments
        job[free] = [waiting.pop(0) if waiting else -1 for _ in range(free.sum())]
        if (renew := free & (job >= 0)).any():
            raw = envs.reset([seed + j % episodes for j in job], renew)
    return {"zero": stages[:episodes], "noise": stages[episodes:]}


def rate(success: np.ndarray) -> tuple[float, float, float]:
    """Success rate with Wilson's 95 % interval."""
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    return float(success.mean()), float(interval.low), float(interval.high)


def summary(stages: np.ndarray, name: str, args: Args) -> dict[str, float]:
    """Success rate of episodes that assembled `stages` pairs, with its interval, and their mean number of pairs."""
    mean, low, high = rate(stages == stages_of(args))
    stage = name.replace("success", "stages")
    return {name: mean, f"{name}_low": low, f"{name}_high": high, stage: float(stages.mean()), f"{stage}_std": float(stages.std())}


@torch.no_grad()
def record_video(policies: dict[str, FlowPolicy], args: Args, path: Path):
    """Episodes of each policy in MuJoCo from the same initial states and x_0 = 0, side by side, as mp4 of 10 frames per second, real time."""
    import imageio.v2 as imageio

    try:
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")
        importlib.reload(mujoco.gl_context)  # it chose a renderer when MuJoCo was imported
        env = FurnitureEnv(args.furniture, args.randomness, render_mode="rgb_array", horizon=args.horizon)
        films = {name: [] for name in policies}
        for name, policy in policies.items():
            for episode in range(args.video_episodes):
                (obs, _), over, film = env.reset(seed=1_000_000 * (args.seed + 1) + episode), False, [env.render()]
                while not over:
                    obs = policy.normalize(obs)[None]
                    with autocast(args):
                        chunk = policy.to_env(policy.sample(obs, torch.zeros(1, policy.action_size, device=obs.device)))[0]
                    for action in chunk:
                        obs, _, _, truncated, info = env.step(action)
                        film.append(env.render())
                        over = truncated or info["stages"] == stages_of(args)
                        if over:
                            break
                films[name].append(film)
        env.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        with imageio.get_writer(path, fps=10) as writer:
            for episode in range(args.video_episodes):
                parts = [films[name][episode] for name in policies]
                for t in range(max(map(len, parts)) + 10):
                    writer.append_data(np.concatenate([film[min(t, len(film) - 1)] for film in parts], 1))
        print(f"Video (MuJoCo; {', '.join(policies)} from left to right): {path}")
    except (SystemExit, Exception) as error:  # GL drivers fail in many ways; none of them may cost the trained policy
        print(f"No video: {error}. MuJoCo needs a GL backend: install libegl1 or libosmesa6 and set MUJOCO_GL=egl or osmesa.")


# ------------------------------------------------------------------------------- run directory
COLUMNS = (
    "iteration,env_steps,wall_s,rollout_s,critic_s,actor_s,train_success,train_stages,eval_success,eval_success_low,eval_success_high,"
    "eval_stages,eval_stages_std,eval_success_sampled,eval_success_sampled_low,eval_success_sampled_high,eval_stages_sampled,"
    "eval_stages_sampled_std,losses/critic,losses/transport,losses/consistency,losses/constraint,diagnostics/q,diagnostics/q_policy,"
    "diagnostics/grad_q_norm,diagnostics/phi_norm,diagnostics/particle_distance,diagnostics/base_distance,diagnostics/actor_grad_norm"
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
                keep = ("furniture", "randomness", "chunk", "euler_steps", "horizon", "bf16", *(["backend"] if args.backend == "auto" else []))
                args = dataclasses.replace(args, **{key: values[key] for key in keep})
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{stored}: cannot be read ({error})") from error
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: this torch sees no CUDA device; use --device cpu.")
    if args.backend == "auto":
        args.backend = "mujoco" if isaac_missing() else "isaac"
        print(f"Simulator: {args.backend}" + (f" ({isaac_missing()})" if args.backend == "mujoco" else ""))
    elif args.backend == "isaac" and isaac_missing():
        raise SystemExit(f"--backend isaac: {isaac_missing()}; use --backend mujoco.")
    args.transport_scale = args.transport_scale or {"one_leg": 30.0, "lamp": 8.0}[args.furniture]
    args.horizon, args.cond_mlp = args.horizon or FURNITURE[args.furniture].horizon, tuple(args.cond_mlp)
    counts = "chunk euler_steps n_particles num_envs horizon iterations rounds reference_every segments value_samples buffer_iterations eval_every"
    counts += " eval_episodes final_eval_episodes critic_steps critic_batch actor_steps actor_batch actor_warmup warmup_factor bc_epochs bc_batch threads"
    for name in counts.split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.actor_depth < 3 or args.actor_depth % 2 == 0:
        raise SystemExit(f"--actor-depth must be odd and at least 3 (a block has two layers), got {args.actor_depth}")
    args.stop_on_success &= args.backend == "mujoco"
    args.rollout_chunks = args.rollout_chunks or max(math.ceil(args.horizon / args.chunk), args.segment_chunks) + 1
    args.segment_chunks = args.segment_chunks or args.rollout_chunks - 1
    if not 1 <= args.segment_chunks < args.rollout_chunks:
        raise SystemExit(f"--segment-chunks {args.segment_chunks} must lie between 1 and --rollout-chunks {args.rollout_chunks} - 1")
    if args.q_gradient == "particles" and args.n_particles < 2:
        raise SystemExit("--q-gradient particles needs --n-particles of at least 2, better 16")
    if args.bc_spread < 0:
        raise SystemExit(f"--bc-spread must be at least 0, got {args.bc_spread}")
    if not 0 <= args.actor_ema < 1:
        raise SystemExit(f"--actor-ema must lie in [0, 1), got {args.actor_ema}")
    if args.noise_scale <= 0:
        raise SystemExit(f"--noise-scale must be above 0, got {args.noise_scale}")
    if args.exploration_scale < 0:
        raise SystemExit(f"--exploration-scale must be at least 0, got {args.exploration_scale}")
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
        envs = make_envs(args, args.num_envs)
        scores = evaluate(policy, envs, args, args.final_eval_episodes, 1_000_000 * (args.seed + 1))
        envs.close()
        for start, stages in scores.items():
            mean, low, high = rate(stages == stages_of(args))
            print(f"{args.furniture}-{args.randomness} ({args.backend}), {len(stages)} episodes from x_0 {'= 0' if start == 'zero' else '~ N(0, I)'}: "
                  f"success {100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}], {stages.mean():.2f} pairs")  # fmt: skip
        if args.capture_video:
            base = load_policy(Path(args.evaluate) / "base_policy.pt", args.device)
            record_video({"base": base, "finetuned": policy}, args, Path(args.evaluate) / "videos" / "base_and_finetuned.mp4")
        return {start: (stages == stages_of(args)).mean() for start, stages in scores.items()}

    task = f"{args.furniture}-{args.randomness}"
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
    base = copy.deepcopy(policy).requires_grad_(False)
    reference, averaged = copy.deepcopy(base), copy.deepcopy(base)  # averaged: the policy that acts
    obs_dim = policy.config["obs_dim"]
    critic = Critic(critic_obs(torch.zeros(1, obs_dim), torch.zeros(1), args).shape[1], policy.action_size, args.critic_width, args.critic_depth,
                    args.critic_layer_norm, args.critic_init).to(args.device)  # fmt: skip
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    if args.compile:
        policy.velocity.compile(), averaged.velocity.compile(), critic.compile(), target.compile(), reference.velocity.compile()
    envs = make_envs(args, args.num_envs, stop_on_success=args.stop_on_success)
    replay = Replay(args, obs_dim, policy.action_size)
    state = dict(iteration=0, env_steps=0, wall_s=0.0, trained=0, actor_step=0, best=-math.inf)
    best_policy = copy.deepcopy(policy.state_dict())
    modules = dict(policy=policy, averaged=averaged, reference=reference, critic=critic, target=target,
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
            for key, module in modules.items():
                module.load_state_dict(saved[key])
        except Exception as error:  # torch.load raises many types
            raise SystemExit(f"{checkpoint_path}: cannot be loaded ({error})") from error
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
            scores = evaluate(averaged, envs, args, args.final_eval_episodes if final else args.eval_episodes, eval_seed)
            for start, name in ("zero", "eval_success"), ("noise", "eval_success_sampled"):
                row |= summary(scores[start], name, args)
            if row["eval_stages"] > state["best"] and iteration < args.iterations:
                state["best"], best_policy = row["eval_stages"], copy.deepcopy(averaged.state_dict())
            if iteration == 0:
                state["base"] = {key: row[key] for key in row if key.startswith("eval_")}
        else:
            trained = True
            seeds = itertools.count(100_000_000 * (args.seed % 20 + 1) + 10_000 * iteration)
            steps, assembled = collect(averaged, envs, replay.rollout(), seeds, args)
            state["env_steps"] += steps
            row["train_success"], row["train_stages"] = float((assembled == stages_of(args)).mean()), float(assembled.mean())
            row["rollout_s"], row["critic_s"], row["actor_s"] = time.perf_counter() - tick, 0.0, 0.0
            warm = state["trained"] < args.warmup_iterations
            critic_steps = args.critic_steps * (args.warmup_factor if warm else 1)
            for _ in range(args.rounds):
                start = time.perf_counter()
                batch = replay.draw(args.segments, args.segment_chunks, args.fresh_fraction, args.balanced)
                y = critic_target(averaged, target, batch, args, args.warmup_lambda if warm else args.td_lambda).flatten()
                valid = batch["valid"].flatten() > 0  # states after success, and those an episode ended in, are left out
                obs, action, y = batch["state"][:-1].flatten(0, 1)[valid], batch["action"].flatten(0, 1)[valid], y[valid]
                obs_q = critic_obs(obs, batch["stage"][:-1].flatten()[valid], args)
                order = torch.cat([torch.randperm(len(y), device=y.device) for _ in range(-(-critic_steps * args.critic_batch // len(y)))])
                for i in order[: critic_steps * args.critic_batch].split(args.critic_batch):
                    for key, value in update_critic(critic, target, critic_optimizer, obs_q[i], action[i], y[i], args).items():
                        sums[key].append(value)
                row["critic_s"] += time.perf_counter() - start
                start = time.perf_counter()
                for _ in range(0 if warm else args.actor_steps):
                    i = torch.randint(len(y), (args.actor_batch,), device=y.device)
                    state["actor_step"] += 1
                    decay = 1 + (args.actor_lr_end - 1) * iteration / args.iterations
                    actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * min(1.0, state["actor_step"] / args.actor_warmup)
                    for key, value in update_actor(policy, reference, critic, actor_optimizer, obs[i], obs_q[i], args).items():
                        sums[key].append(value)
                    with torch.no_grad():
                        torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - args.actor_ema)
                row["actor_s"] += time.perf_counter() - start
            state["trained"] += 1
            with torch.no_grad():  # how far the velocity has moved from the base, at a_0 ~ N(0, I), t = 0
                noise, zero = torch.randn(len(obs[:256]), policy.action_size, device=args.device), torch.zeros((), device=args.device)
                moved = averaged.velocity(noise, zero, obs[:256]) - base.velocity(noise, zero, obs[:256])
                sums["diagnostics/base_distance"] = [moved.norm(dim=-1).mean()]
            row |= {key: torch.stack(value).mean().item() for key, value in sums.items()}
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"{key} became {value} in iteration {iteration}; the last good checkpoint is {checkpoint_path}")
            if args.reference == "previous" and state["trained"] % args.reference_every == 0:
                reference.load_state_dict(averaged.state_dict())

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
            tqdm.write(f"{state['env_steps']:8d} steps {state['wall_s']:6.0f} s  success {100 * row['eval_success']:3.0f} % ({row['eval_stages']:.2f} pairs) from x_0 = 0, "
                       f"{100 * row['eval_success_sampled']:3.0f} % ({row['eval_stages_sampled']:.2f}) from noise")  # fmt: skip
        current = row.get("eval_success", row.get("train_success"))
        if current not in ("", None):
            progress.set_postfix_str(f"success {100 * current:.0f} %")
        progress.update(min(args.iterations, state["iteration"]) - progress.n)
        save_checkpoint(trained)
        if interrupted:
            envs.close()
            raise SystemExit(f"Stopped after iteration {iteration}, saved. Continue with: python rldt_furniture.py --resume {run_dir}")

    # results
    save_policy(averaged, run_dir / "policy.pt")
    final = {key: float(row[key]) for key in state["base"]}
    best = final
    if state["best"] > final["eval_stages"]:  # measured again, on other episodes than those that selected it
        best_net = copy.deepcopy(averaged)
        best_net.load_state_dict(best_policy)
        save_policy(best_net, run_dir / "best_policy.pt")
        scores = evaluate(best_net, envs, args, args.final_eval_episodes, eval_seed + 500_000)
        measured = summary(scores["zero"], "eval_success", args) | summary(scores["noise"], "eval_success_sampled", args)
        best = max(final, measured, key=lambda scores: scores["eval_stages"])
    envs.close()
    named = lambda prefix, values: {key.replace("eval", prefix): value for key, value in values.items()}
    result = {
        "task": task, "backend": args.backend, "method": args.exp_name, "preset": args.preset, "seed": args.seed, **named("base", state["base"]), **named("final", final),
        "best_success": best["eval_success"], "best_success_sampled": best["eval_success_sampled"], "best_stages": best["eval_stages"],
        "episodes": args.final_eval_episodes, "env_steps": state["env_steps"], "wall_s": round(state["wall_s"], 1), "threads": args.threads,
        "num_envs": args.num_envs, "device": args.device, "commit": git_commit(), "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in ("torch", "numpy", "mujoco")},
        "args": json.loads((run_dir / "args.json").read_text()),
    }  # fmt: skip
    write_atomically(run_dir / "result.json", lambda p: p.write_text(json.dumps(result, indent=2)))
    plot_curve(csv_path, run_dir / "curve.png", f"{task} ({args.backend}), seed {args.seed}")
    writer.close()
    progress.close()
    if args.capture_video:
        record_video({"base": base, "finetuned": averaged}, args, run_dir / "videos" / "base_and_finetuned.mp4")
    print(f"{task} ({args.backend}): success {100 * result['base_success']:.0f} % -> {100 * result['final_success']:.0f} %, {result['base_stages']:.2f} -> {result['final_stages']:.2f} pairs (x_0 = 0), success "
          f"{100 * result['base_success_sampled']:.0f} % -> {100 * result['final_success_sampled']:.0f} % (sampled), "
          f"{state['env_steps']} env steps, {state['wall_s']:.0f} s. Results in {run_dir}")  # fmt: skip
    return result


if __name__ == "__main__":
    main(parse_args())
