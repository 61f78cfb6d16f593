"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for robomimic's tasks.

    python rldt_robomimic.py --task square --obs image

finetunes a flow-matching policy, cloned from demonstrations, on the sparse reward of success. Order and
names are those of rldt_gym.py; docs/rldt_robomimic.md says what a sparse reward and images change.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.checkpoints import Ring, require_memory
from common.flow import FlowPolicy, expected_target, fit, flow_matching_loss, interpolate
from common.runs import Run, autocast, average_gradients, derive_seed, evaluate_stored
from common.settings import Count, Precision, Seed, Several, Share, Size, Threads, Weight, launch, set_up
from common.svgd import particle_gradient, transport_field
from demos import robomimic as dataset
from demos.dataset import as_rollouts, chunk_rows, chunk_starts
from envs.interface import success_rate
from envs.robomimic import IMAGE_SIZE, TASKS, RobomimicVectorEnv, record_video

# "state" (..., obs_dim); with images also "object" (..., object_size), and "features" (..., cond_dim) of
# frozen encoders or "rgb" (..., 3 * cameras, 96, 96)
Obs = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------- arguments
@dataclass
class TaskArgs:
    """Settings of every method on these tasks; in comments, paper is its text, authors their code."""

    # the run
    task: Literal["lift", "can", "square", "transport"] = "square"  # transport has its own defaults
    obs: Literal["state", "image"] = "state"  # proprioception, with the objects' state or camera images
    preset: Literal["laptop", "paper"] = "laptop"  # defaults for two cores, or the paper's; flags win
    exp_name: str = "rldt"  # name of the experiment, part of the run directory's name
    seed: Seed = 1  # of networks, minibatches, noise and environments
    iterations: Size = 0  # training iterations, evaluations included (paper: 200); 0: the task's
    wall_budget_s: Weight = 0.0  # seconds until a run ends, or sooner by --iterations; 0: none
    runs: Path = Path("runs")  # directory in which run directories are made
    device: str = "auto"  # torch device: cpu, cuda, cuda:0, ...; auto: CUDA where there is one
    threads: Threads = 2  # CPU threads of torch; simulators are processes of their own
    precision: Precision = "auto"  # of matrix products (autocast); auto: the faster one here, measured
    resume: Path | None = None  # run directory to continue from its last checkpoint, with its arguments
    evaluate: Path | None = None  # run directory whose final policy to evaluate
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    capture_video: bool = False  # film an episode after training (needs a MuJoCo GL backend)

    # base policy
    base: Path | None = None  # base policy (.safetensors); default: shipped (laptop's), or made here
    dataset: Path | None = None  # HDF5, of --demos, and to clone without --base; default: scripted
    encoder: Literal["frozen", "own"] = "frozen"  # of images; own: it learns, the critic has another

    # rollouts and evaluation
    num_envs: Count = 4  # simulators, each a process of 0.5 to 1.2 GB (paper: 64)
    horizon: Size = 0  # time limit of an episode in environment steps; 0: the task's, 300 to 800
    rollout_chunks: Size = 0  # chunks per environment and iteration (paper: 200); 0: the task's
    zero_fraction: Share = 0.25  # share of environments and particles with x_0 = 0 (authors: 0)
    eval_every: Count = 20  # every n-th iteration only evaluates (authors: 10)
    eval_episodes: Count = 30  # from x_0 = 0, and again from noise, during training
    final_eval_episodes: Count = 100  # of the base, the final and the best policy


@dataclass
class CriticArgs(TaskArgs):  # of methods with RLDT's critic; docs/ says why they are not the paper's
    # replay
    buffer_iterations: Count = 20  # rollouts kept in the replay (paper: 10)
    demos: bool = False  # demonstrations are in the replay, as episodes that succeed (authors: not)
    segments: Count = 128  # of SEGMENT chunks, drawn from the replay per round

    # critic
    gamma: Share = 0.99  # discount per chunk (paper: 0.999)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0.5)
    target_momentum: Share = 0.99  # Polyak momentum of the targets per critic step (paper: 0.995)
    rounds: Count = 8  # per iteration: draw segments, critic steps, actor steps (authors: 16)
    critic_steps: Count = 128  # per round (paper: 32, of larger batches)
    critic_batch: Count = 256  # chunks per critic step (authors: all that were drawn)
    critics: Several = 2  # Q networks; targets take the minimum of a random two (paper: 2)
    critic_lr: Weight = 5e-4  # Adam step size (paper: 1e-3)
    critic_layer_norm: bool = True  # without: no LayerNorm, and weights from N(0, 0.1^2) (authors)
    warmup_iterations: Size = 12  # training iterations before the actor starts (paper: 2)


@dataclass
class Args(CriticArgs):
    # exploration and actor
    exploration_steps: Size = 2  # noise |a - a_dagger_k|, k of this many last Euler steps (authors: 2)
    best_of: Count = 1  # samples; after half of the warm-up half of the simulators act on the best
    actor_steps: Size = 4  # per round (authors: 2)
    actor_batch: Count = 512  # states per actor step, n_particles particles in each (authors: 6250)
    n_particles: Count = 4  # P, particles per state (paper: 8)
    kernel: Literal["rbf", "delta"] = "rbf"  # of the field; delta: RLDT-Delta, with --q-gradient critic
    q_gradient: Literal["critic", "particles"] = "critic"  # of Q, or toward particles of a high Q (ours)
    alpha: Weight = 1e-3  # temperature, the weight of the repulsion relative to |grad Q| (paper: 1e-3)
    transport_scale: Weight = 30.0  # factor on grad Q, as values are below 1 (authors: 1)
    consistency_weight: Weight = 0.05  # of eq. (14) (paper: 0.5)
    constraint_weight: Weight = 0.2  # of eq. (15) (paper: 0.2)
    bc_weight: Weight = 0.0  # of eq. (2) on chunks of episodes that succeed (paper: 0)
    reference_every: Size = 10  # iterations until the constraint's policy follows (authors: 1); 0: never
    actor_lr: Weight = 2e-5  # Adam step size (paper: 2e-5)
    anneal: Share = 0.3  # factor on actor_lr, reached linearly at the end (authors: 1)


PRESETS = {
    "paper": dict(
        iterations=200, precision="float32", num_envs=64, rollout_chunks=200, zero_fraction=0.0,
        eval_every=10, eval_episodes=64, exploration_steps=2, best_of=1, buffer_iterations=10, rounds=16,
        demos=False, segments=804, encoder="own", gamma=0.999, target_momentum=0.995, critic_steps=32,
        critic_batch=1024, critics=2, critic_lr=1e-3, critic_layer_norm=False, warmup_iterations=2,
        actor_steps=2, actor_batch=1024, n_particles=8, q_gradient="critic", transport_scale=1.0,
        consistency_weight=0.5, bc_weight=0.0, reference_every=1, anneal=1.0, actor_lr=2e-5,
    ),
    "transport": dict(
        exploration_steps=0, best_of=16, demos=True, critics=4, warmup_iterations=8, actor_batch=64,
        n_particles=16, q_gradient="particles", transport_scale=20.0, bc_weight=0.5, reference_every=0,
        actor_lr=1e-4,
    ),
}  # fmt: skip
STATE = dict(batch=256, head_steps=0, euler_steps=8, width=512, depth=3, time_dim=32)
IMAGE = STATE | dict(width=768)  # paper
PRETRAINING = {  # of a base policy that is made here; pretrain_fm.py has these as flags
    "laptop": {
        "state": dict(epochs=200, lr=1e-3) | STATE,
        "image": dict(epochs=30, lr=1e-3) | IMAGE | dict(head_steps=20_000),
    },
    "paper": {"state": dict(epochs=4000, lr=1e-4) | STATE, "image": dict(epochs=4000, lr=1e-4) | IMAGE},
}
FAST_RENDER = {"laptop": True, "paper": False}  # images of those demonstrations without shadows
OBS = "state", "object", "rgb", "features"  # names of observations
COPIES = 6  # of every image, shifted, on which the velocity network is pretrained alone
SHIFT = 4  # pixels by which images, where there are some, are shifted in training (DPPO)
SEGMENT = 16  # chunks of a replay segment (authors: the whole rollout, 200)
FRESH = 0.33  # least share, of either kind that the newest rollout has, which comes from it (authors)
ENCODER_LR = 4e-5  # Adam step size of the critic's own encoder (paper)
BC_BATCH = 256  # chunks on which eq. (2) goes on, an actor step
ACTOR_WARMUP = 32  # actor steps over which its step size rises linearly (paper)


# ----------------------------------------------------------------------------------- networks
class ViT(nn.Module):
    """Images of one camera, and the state -> features (IBRL, Hu et al. 2023).

    Two convolutions embed patches, and a transformer layer relates them. The map of each channel is
    projected beside the state, then channels are summed.
    """

    def __init__(self, state_dim: int, dim: int = 128, heads: int = 4):
        super().__init__()
        first, second = nn.Conv2d(3, dim, 8, stride=4), nn.Conv2d(dim, dim, 3, stride=2)
        self.patches = nn.Sequential(first, nn.ReLU(), second)
        patches = (((IMAGE_SIZE - 8) // 4 + 1 - 3) // 2 + 1) ** 2  # 121
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(patches, dim), std=0.02))
        form = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, **form)
        self.transformer = nn.TransformerEncoder(layer, 1, nn.LayerNorm(dim), False)
        self.project = nn.Sequential(nn.Linear(patches + state_dim, dim), nn.LayerNorm(dim), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, rgb: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, 96, 96), (B, state_dim) -> (B, dim)."""
        x = (rgb.float() / 255 - 0.5).to(memory_format=torch.channels_last)
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, 121, dim)
        x = self.transformer(x + self.position).transpose(1, 2)  # (B, dim, 121)
        x = torch.cat([x, state[:, None].expand(-1, x.shape[1], -1).to(x.dtype)], -1)
        return (self.weight * self.project(x)).sum(1)


class Encoder(nn.Module):
    """Observations (B, ...) -> features of each camera, then the state: (B, 128 cameras + state_dim)."""

    def __init__(self, cameras: int, state_dim: int):
        super().__init__()
        self.vits = nn.ModuleList(ViT(state_dim) for _ in range(cameras))

    def forward(self, obs: Obs) -> torch.Tensor:
        views = zip(self.vits, obs["rgb"].split(3, dim=1), strict=True)
        features = [vit(view, obs["state"]) for vit, view in views]
        return torch.cat([*features, obs["state"]], -1).float()


class Policy(FlowPolicy):
    """A FlowPolicy that also sees the encoded images of its cameras, and scales objects for critics."""

    def __init__(self, obs_dim, action_dim, chunk, euler_steps, cameras, object_size=0, **network):
        super().__init__(obs_dim, action_dim, chunk, euler_steps, 128 * cameras, **network)
        self.config |= dict(cameras=cameras, object_size=object_size)
        self.cameras, self.frozen = cameras, False
        self.encoder = Encoder(cameras, obs_dim) if cameras else None
        for end, sign in ("min", -1.0), ("max", 1.0):
            self.register_buffer(f"object_{end}", torch.full((object_size,), sign) if cameras else None)

    def observe(self, raw: dict[str, np.ndarray]) -> Obs:
        """Raw observations -> what networks see: states normalised; of frozen encoders, features."""
        obs = {"state": self.normalize(raw["state"])}
        if self.cameras:
            obs["object"] = self.normalize(raw["object"], "object")
            obs["rgb"] = torch.as_tensor(raw["rgb"], device=self.obs_min.device)
        if self.frozen and self.cameras:
            obs["features"] = self.encoder(obs)
            del obs["rgb"]
        return obs

    def encode(self, obs: Obs) -> torch.Tensor:
        """Observations (B, ...) -> what the velocity is conditioned on, (B, cond_dim)."""
        return self.encoder(obs) if "rgb" in obs else obs.get("features", obs["state"])


class Critic(nn.Module):
    """Q networks, one batched product, of action chunks and what `encode` makes of observations."""

    def __init__(self, cond_dim, action_size, layer_norm, networks=2, encoder=None, width=256, depth=3):
        super().__init__()
        self.layer_norm, self.encoder = layer_norm, encoder
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise([cond_dim + action_size] + [width] * depth + [1]):
            weight, bias = torch.empty(networks, n_in, n_out), torch.zeros(networks, 1, n_out)
            if layer_norm:
                bound = 1 / math.sqrt(n_in)  # torch's default
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            else:
                weight.normal_(0, 0.1)  # authors
            self.weights.append(weight)
            self.biases.append(bias)

    def encode(self, obs: Obs) -> torch.Tensor:
        """Observations (B, ...) -> what Q is conditioned on: images, if it has an encoder."""
        if self.encoder:
            return self.encoder(obs)
        return torch.cat([obs["state"], obs["object"]], -1) if "object" in obs else obs["state"]

    def forward(self, cond: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """cond (B, cond_dim), action (B, D) -> Q (networks, B)."""
        x = torch.cat([cond, action], -1).expand(len(self.biases[0]), -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w)
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has three digits only
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


def augment(obs: Obs) -> Obs:
    """Shifts each image by up to SHIFT pixels, repeating its border (Kostrikov et al. 2020)."""
    if "rgb" not in obs:
        return obs
    B, _, H, W = obs["rgb"].shape
    padded = F.pad(obs["rgb"].float(), [SHIFT] * 4, mode="replicate")
    shifted = padded.unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 2 SHIFT + 1, 2 SHIFT + 1, H, W)
    dy, dx = torch.randint(2 * SHIFT + 1, (2, B), device=padded.device)
    return obs | {"rgb": shifted[torch.arange(B, device=dy.device), :, dy, dx]}


def take(obs: Obs, index) -> Obs:
    return {name: value[index] for name, value in obs.items()}


# -------------------------------------------------------------------------------- base policy
def pretrain(args: TaskArgs, data: dict, checkpoint, epochs, batch, lr, head_steps, **sizes) -> Policy:
    """Flow matching on demonstrations, eq. (1)-(2): a policy of these sizes, its weights averaged.

    The velocity network needs more steps than an encoder of images can afford. So shifted copies of all
    images are then encoded once, for `head_steps` further steps of the velocity network alone.
    """
    spec, images = TASKS[args.task], args.obs == "image"
    seen = dict(cameras=len(spec.cameras) * images, object_size=spec.object_size * images)
    policy = Policy(data["state"].shape[1], data["action"].shape[1], **seen, **sizes).to(args.device)
    policy.set_limits(**dataset.limits(data))
    first = chunk_starts(data["episode_ends"], policy.chunk)  # (n,)
    action = policy.from_env(data["action"][first[:, None] + np.arange(policy.chunk)])  # (n, D)
    obs = policy.observe(data)  # of all steps
    first = torch.as_tensor(first, device=args.device)

    def loss():
        i = torch.randint(len(first), (batch,), device=args.device)
        cond = policy.encode(augment(take(obs, first[i])))
        return flow_matching_loss(policy.velocity, action[i], cond)  # eq. (2)

    policy = fit(policy, loss, max(1, epochs * len(first) // batch), lr, args, checkpoint)
    if policy.cameras and head_steps:
        encode = lambda i: policy.encode(augment(take(obs, i))).float()
        with torch.no_grad(), autocast(args):
            cond = torch.cat([encode(i) for i in first.repeat(COPIES).split(512)])  # (COPIES * n, .)

        def head_loss():
            i = torch.randint(len(cond), (batch,), device=args.device)
            return flow_matching_loss(policy.velocity, action[i % len(first)], cond[i])  # eq. (2)

        policy.velocity = fit(policy.velocity, head_loss, head_steps, lr, args)
    policy.info = dict(task=args.task, obs=args.obs, fast_render=FAST_RENDER[args.preset])
    return policy


def get_base(args: TaskArgs, run: Run) -> Policy:
    """The base policy: given, shipped, or pretrained here; the run keeps a copy of its own."""
    shipped = dataset.DEMOS / args.task / f"base_{args.obs}.safetensors"
    spec, images = TASKS[args.task], args.obs == "image"

    def make(checkpoint: Path) -> Policy:
        if args.base:
            return Policy.load(args.base, task=args.task, obs=args.obs, script="rldt_robomimic")
        if shipped.exists() and not args.dataset:
            return Policy.load(shipped)
        data = dataset.get(args.task, args.obs, args.dataset, FAST_RENDER[args.preset])
        settings = PRETRAINING[args.preset][args.obs] | dict(chunk=spec.chunk)
        return pretrain(args, data, checkpoint, **settings)

    policy = run.keep_base(make, Policy)
    wanted = spec.state_dim(images), 7 * spec.robots, spec.object_size * images
    if (policy.obs_dim, policy.action_dim, policy.config["object_size"]) != wanted:
        raise SystemExit(f"{args.base or shipped}: not a policy for {args.task} with --obs {args.obs}.")
    policy.frozen = args.encoder == "frozen"
    if policy.cameras:
        policy.encoder.requires_grad_(not policy.frozen)
    return policy


# ------------------------------------------------------------------------------------- replay
class Replay(Ring):
    """The last rollouts, (rollout_chunks, num_envs, ...) each; row t is chunk t. Demonstrations follow.

    Observations have a row more, where the rollout ends. `succeeded`: whether the episode does later.
    """

    def __init__(self, args: Args, policy: Policy):
        T, N = args.rollout_chunks, args.num_envs
        shapes = {name: (T, N) for name in ("reward", "terminated", "valid", "succeeded")}
        shapes["action"] = T, N, policy.action_size
        shapes["state"] = T + 1, N, policy.obs_dim
        if policy.cameras:
            shapes["object"] = T + 1, N, TASKS[args.task].object_size
            pixels = T + 1, N, 3 * policy.cameras, IMAGE_SIZE, IMAGE_SIZE
            shapes |= {"features": (T + 1, N, policy.cond_dim)} if policy.frozen else {"rgb": pixels}
        super().__init__(args.buffer_iterations, shapes, args.device, {"rgb": torch.uint8})
        if args.demos:
            shown = demonstrations(policy, T, N, args)
            self.slots = {name: torch.cat([value, shown[name]]) for name, value in self.slots.items()}

    def draw(self, segments: int) -> dict[str, torch.Tensor | Obs]:
        """Segments (SEGMENT, segments, ...): half of episodes that succeed, some of the last rollout."""
        T = self.slots["reward"].shape[1]
        length = min(SEGMENT, T)
        valid, succeeded = (self.slots[name][:, : T - length + 1] for name in ("valid", "succeeded"))
        weight = torch.zeros_like(valid)
        for kind in succeeded[valid > 0].unique():  # equal shares of episodes that succeed and that fail
            rows = valid * (succeeded == kind)
            share, newest = (1 - FRESH) * rows / rows.sum(), rows[self.slot]
            share[self.slot] += FRESH * newest / newest.sum().clamp_min(1)
            weight += share / share.sum()
        chosen = torch.multinomial(weight.flatten(), segments, replacement=True)
        slot, start, env = torch.unravel_index(chosen, weight.shape)
        t = start + torch.arange(length, device=start.device)[:, None]  # (length, segments)
        batch = {name: value[slot, t, env] for name, value in self.slots.items()}
        obs = {name: batch.pop(name) for name in OBS if name in batch}
        next_obs = {name: self.slots[name][slot, t + 1, env] for name in obs}
        return batch | {"obs": obs, "next_obs": next_obs}


def demonstrations(policy: Policy, T: int, N: int, args: Args) -> dict[str, torch.Tensor]:
    """Demonstrations as rollouts (., T, N, ...): each from every step of its first chunk on."""
    data = dataset.get(args.task, args.obs, args.dataset, policy.info.get("fast_render", True))
    first, end = chunk_rows(data["episode_ends"], policy.chunk)  # (n,)
    before = ~data["solved"][first]  # not the rest of an episode that goes on after success
    first, end = first[before], end[before]
    steps = np.minimum(first[:, None] + np.arange(policy.chunk), end[:, None] - 1)  # (n, chunk)
    solved = data["solved"][np.minimum(first + policy.chunk, end - 1)]
    last = torch.as_tensor(solved | (first + policy.chunk >= end), device=args.device).float()
    rows = dict(reward=last, terminated=last, succeeded=torch.ones_like(last))
    rows["action"] = policy.from_env(data["action"][steps])
    with torch.no_grad(), autocast(args):
        raw = {name: data[name] for name in OBS if name in data}
        seen = [policy.observe(take(raw, part)) for part in np.array_split(first, 100)]
    obs = {name: torch.cat([part[name] for part in seen]) for name in seen[0]}
    return as_rollouts(rows, obs, T, N)


# -------------------------------------------------------------------- exploration and rollout
def make_envs(args: TaskArgs, policy: Policy) -> RobomimicVectorEnv:
    """Simulators whose images are rendered as the policy's demonstrations were."""
    require_memory(args.num_envs * 2**29, "cpu", f"{args.num_envs} environments")
    options = dict(images=args.obs == "image", fast_render=policy.info.get("fast_render", True))
    return RobomimicVectorEnv(args.num_envs, task=args.task, horizon=args.horizon, **options)


def explore(trajectory: torch.Tensor, args: Args) -> torch.Tensor:
    """Actions of trajectories (K + 1, N, D), with noise |a - a_dagger_k| N(0, I): none if k = K - 1."""
    action = trajectory[-1]
    if args.exploration_steps == 0:
        return action
    K, N, device = len(trajectory) - 1, len(action), action.device
    k = K - 1 - torch.randint(min(args.exploration_steps, K), (N,), device=device)
    n = torch.arange(N, device=device)
    x_k, x_next = trajectory[k, n], trajectory[k + 1, n]
    a_dagger = expected_target(x_k, k / K, (x_next - x_k) * K)  # eq. (8), its velocity from the steps
    return action + (action - a_dagger).norm(dim=-1, keepdim=True) * torch.randn_like(action)


def best_of(policy: Policy, critic: Critic, obs: Obs, args: Args) -> torch.Tensor:
    """The mean of the best quarter by Q of `best_of` sampled actions, (N, D)."""
    cond, cond_q = (x.encode(obs)[:, None].expand(-1, args.best_of, -1) for x in (policy, critic))
    action = policy.sample(cond)  # (N, M, D)
    q = critic(cond_q.flatten(0, 1), action.flatten(0, 1)).mean(0).view(action.shape[:2])
    best = q.topk(math.ceil(args.best_of / 4)).indices[..., None]  # (N, M / 4, 1)
    return action.gather(1, best.expand(-1, -1, action.shape[-1])).mean(1)


@torch.no_grad()
def collect(policy: Policy, critic, envs: RobomimicVectorEnv, rollout: dict, seed: int, args: Args):
    """Fills a rollout from new episodes of `seed` on; returns steps, and success of ended episodes.

    With a critic, half of the simulators act on the best of their samples.
    """
    steps, successes, device = 0, [], args.device
    envs.reset(seed)
    for t in range(args.rollout_chunks):
        x0 = torch.randn(args.num_envs, policy.action_size, device=device)
        x0[: round(args.zero_fraction * args.num_envs)] = 0
        with autocast(args):
            obs = policy.observe(envs.obs)
            action = explore(policy.sample(policy.encode(obs), x0, trajectory=True), args)
            if critic:
                half = args.num_envs // 2
                action[half:] = best_of(policy, critic, take(obs, slice(half, None)), args)
        step = envs.step(policy.to_env(action))
        ended = step.terminated | step.truncated  # a time limit is a failure
        row = dict(action=action, reward=step.reward, terminated=ended, succeeded=step.score, valid=1.0)
        for name, value in (obs | row).items():
            rollout[name][t] = torch.as_tensor(value, device=device)
        successes.extend(step.score[ended])
        steps += int(step.length.sum())
    with autocast(args):
        for name, value in policy.observe(envs.obs).items():
            rollout[name][-1] = value
    succeeded, terminated = rollout["succeeded"], rollout["terminated"] > 0
    for t in reversed(range(len(succeeded) - 1)):  # an episode's rows learn how it ends
        succeeded[t] = torch.where(terminated[t], succeeded[t], succeeded[t + 1])
    return steps, successes


# ------------------------------------------------------------------------------------- critic
def td_lambda(reward, terminated, next_value, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of segments, time first, all (T, L), in [0, 1] as values of success are.

    y_t = r_t + gamma (1 - terminated_t) [(1 - lam) V(s_{t+1}) + lam y_{t+1}]; at the segment's end
    V(s_{t+1}) stands alone. Unlike on Gym, a time limit is an end: the task was not solved.
    """
    target, y = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        y = (1 - lam) * next_value[t] + lam * y
        y = (reward[t] + gamma * (1 - terminated[t]) * y).clamp(0, 1)
        target[t] = y
    return target


@torch.no_grad()
def critic_target(policy: Policy, target: Critic, batch: dict, args: Args) -> torch.Tensor:
    """TD(lambda) targets (T, L); V(s') is the minimum of two targets at an action of the policy."""
    obs = augment({name: value.flatten(0, 1) for name, value in batch["next_obs"].items()})
    with autocast(args):
        action = policy.sample(policy.encode(obs))
        q = target(target.encode(obs), action)  # (networks, T * L)
    value = q[torch.randperm(len(q))[:2]].min(0).values.view_as(batch["reward"])
    return td_lambda(batch["reward"], batch["terminated"], value, args.gamma, args.td_lambda)


def update_critic(critic: Critic, target: Critic, optimizer, obs: Obs, action, y, args: Args) -> dict:
    """One step on obs (B, ...), action (B, D) and targets y (B,); the target networks follow."""
    with autocast(args):
        q = critic(critic.encode(augment(obs)), action)  # (networks, B)
    loss = (q - y).square().mean(1).sum()
    optimizer.zero_grad()
    loss.backward()
    average_gradients(critic.parameters())
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_([*target.parameters()], [*critic.parameters()], 1 - args.target_momentum)
    return {"losses/critic": loss.detach(), "diagnostics/q": q.detach().mean()}


# -------------------------------------------------------------------------------------- actor
def start_noise(shape, args: TaskArgs) -> torch.Tensor:
    """x_0 of particles, and of the constraint's paths: N(0, I), zero for a share `zero_fraction`."""
    x0 = torch.randn(shape, device=args.device)
    return x0 * (torch.rand(*shape[:-1], 1, device=args.device) >= args.zero_fraction)


def actor_losses(velocity, reference, critic, cond, cond_ref, cond_q, trajectory, args: Args, k=None):
    """The three losses of eq. (16) on B states with trajectories (K + 1, B, P, D).

    The states' features are those of the actor, of the reference policy and of the critic, (B, .) each.
    Each particle has one step k (B, P) of its trajectory, drawn where it is not given.
    """
    K, (_, B, P, D) = len(trajectory) - 1, trajectory.shape
    device, action = cond.device, trajectory[-1]  # a, (B, P, D)
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K  # of a fresh point x_c of the path, for eq. (15)
    x_c = interpolate(action, start_noise(action.shape, args), t_c)
    with autocast(args):
        v, v_c = velocity(torch.stack([x, x_c]), torch.stack([t, t_c]), cond[:, None])
        with torch.no_grad():
            v_ref = reference(x_c, t_c, cond_ref[:, None])
    a_dagger = expected_target(x, t, v)  # eq. (8), x + (1 - t) v

    # transport: the expected targets move along the field, which grad Q at the particles makes
    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(cond_q.repeat_interleave(P, 0), particles.view(B * P, D)).mean(0)
    if args.q_gradient == "critic":
        (grad_q,) = torch.autograd.grad(q.sum(), particles)
    else:  # toward those of a state's particles that have a high Q
        grad_q = particle_gradient(q.detach().to(particles.dtype).view(B, P), particles.detach())
    grad_q = args.transport_scale * grad_q
    phi = transport_field(query, particles.detach(), grad_q, args.alpha, args.kernel)  # eq. (6)
    # the authors' form of eq. (13): its gradient, divided by 2 (1 - t)^2
    transport = -((v * phi).sum(-1) / (K * (1 - t))).mean()

    # consistency: every step of a trajectory points at the action that it ends in
    consistency = ((a_dagger - action).square().sum(-1) / (K * (1 - t)).square()).mean()  # eq. (14)

    # constraint: on fresh points of the path, the velocity stays near the reference's
    constraint = (v_c - v_ref).square().sum(-1).mean()  # eq. (15)
    distance = torch.cdist(action, action).sum() / max(1, B * P * (P - 1))
    metrics = {
        "losses/transport": transport, "losses/consistency": consistency,
        "losses/constraint": constraint, "diagnostics/q_policy": q.mean(),
        "diagnostics/grad_q_norm": grad_q.norm(dim=-1).mean(),
        "diagnostics/phi_norm": phi.norm(dim=-1).mean(), "diagnostics/particle_distance": distance,
    }  # fmt: skip
    return transport, consistency, constraint, {key: value.detach() for key, value in metrics.items()}


def update_actor(policy: Policy, reference, critic: Critic, optimizer, obs: Obs, good, args: Args):
    """Samples P particles in each state of obs (B, ...), then takes one step on the loss of eq. (16).

    `good` are observations and actions of episodes that succeed, on which eq. (2) goes on.
    """
    obs = augment(obs)
    with autocast(args):
        cond = policy.encode(obs)  # once per state: Euler steps, particles and losses share it
        with torch.no_grad():
            cond_ref = reference.encode(obs)
            cond_q = critic.encode(obs)
            x0 = start_noise((len(cond), args.n_particles, policy.action_size), args)
            trajectory = policy.sample(cond[:, None], x0, trajectory=True)
    rows = cond, cond_ref, cond_q, trajectory
    losses = actor_losses(policy.velocity, reference.velocity, critic, *rows, args)
    transport, consistency, constraint, metrics = losses  # the terms of eq. (16)
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint
    if args.bc_weight and len(good[1]):
        with autocast(args):
            cloning = flow_matching_loss(policy.velocity, good[1], policy.encode(augment(good[0])))
        loss += args.bc_weight * policy.action_size * cloning  # eq. (2), a sum over dimensions
        metrics["losses/cloning"] = cloning.detach()
    optimizer.zero_grad()
    loss.backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    average_gradients(trained)
    optimizer.step()
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    return metrics | {"diagnostics/actor_grad_norm": norm}


# --------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy: Policy, envs: RobomimicVectorEnv, args: TaskArgs, episodes: int, seed: int):
    """Success from x_0 = 0 and, as `sampled`, from noise in the same initial states."""
    generator = torch.Generator(args.device).manual_seed(seed)
    success = np.zeros(2 * episodes, bool)  # first those from x_0 = 0
    envs.reset(iter(2 * [*range(seed, seed + episodes)]))
    while (envs.episode >= 0).any():
        episode = envs.episode.copy()  # that each environment runs; -1: none is left
        x0 = torch.randn(len(episode), policy.action_size, device=args.device, generator=generator)
        x0[torch.as_tensor(episode < episodes)] = 0
        with autocast(args):
            action = policy.sample(policy.encode(policy.observe(envs.obs)), x0)
        step = envs.step(policy.to_env(action))
        success[episode[episode >= 0]] = step.score[episode >= 0]
    sampled = success_rate(success[episodes:], "eval_success_sampled")
    return success_rate(success[:episodes], "eval_success") | sampled


# --------------------------------------------------------------------------------------- main
def resolve(args: TaskArgs):
    """Fills in what depends on the task."""
    args.horizon = args.horizon or TASKS[args.task].horizon
    args.rollout_chunks = args.rollout_chunks or (200 if args.task == "lift" else 400)
    if args.iterations == 0 and args.wall_budget_s == 0:
        args.iterations = 40 if args.task == "lift" else 120


def main(args: Args) -> dict | None:
    set_up(args)
    resolve(args)
    if args.q_gradient == "particles" and (args.n_particles < 2 or args.kernel == "delta"):
        raise SystemExit("--q-gradient particles: needs --kernel rbf and --n-particles 2 or more, as 16")
    if args.evaluate:
        measure = lambda policy, **of: evaluate(policy, make_envs(args, policy), args, **of)
        return evaluate_stored(args, Policy, measure)
    rows = max(args.segments * SEGMENT, args.critic_batch, args.actor_batch * args.n_particles)
    require_memory(24 * 2**10 * rows, args.device, "A batch")

    task = f"{args.task}-{args.obs}"
    run = Run(args, f"{task}__{args.exp_name}__{args.seed}")
    policy = get_base(args, run)
    base, reference = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    own = Encoder(policy.cameras, policy.obs_dim) if policy.cameras and not policy.frozen else None
    sees = policy.cond_dim if own else TASKS[args.task].state_dim(images=False)
    critic = Critic(sees, policy.action_size, args.critic_layer_norm, args.critics, own).to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.parameters(), args.actor_lr, fused=True)
    groups = [{"params": [*critic.weights, *critic.biases]}]
    groups += [{"params": own.parameters(), "lr": ENCODER_LR}] if own else []
    critic_optimizer = torch.optim.Adam(groups, args.critic_lr, fused=True)
    envs, replay = make_envs(args, policy), Replay(args, policy)
    measure = partial(evaluate, envs=envs, args=args)
    state = dict(env_steps=0, trained=0, actor_steps=0)
    run.checkpoints(
        state, policy, reference=reference, critic=critic, target=target, replay=replay,
        actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():  # spent: the share of the run's iterations or seconds
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_success", measure)
        else:
            # 1. roll out with exploration
            with run.timer(row, "rollout_s"):
                seed = derive_seed(args.seed, "rollouts", iteration, run.rank)
                knows = args.best_of > 1 and 2 * state["trained"] >= args.warmup_iterations
                explorer = critic if knows else None
                steps, successes = collect(policy, explorer, envs, replay.next(), seed, args)
            state["env_steps"] += steps * run.world
            if successes:
                row["train_success"] = np.mean(successes)

            warm = state["trained"] < args.warmup_iterations
            for _ in range(args.rounds):
                # 2. the critic: TD(lambda) targets of some segments, then steps on minibatches of them
                with run.timer(row, "critic_s"):
                    batch = replay.draw(args.segments)
                    y = critic_target(policy, target, batch, args)
                    valid = batch["valid"] > 0  # not behind the last demonstration
                    obs, action, y = take(batch["obs"], valid), batch["action"][valid], y[valid]
                    good = batch["succeeded"][valid].nonzero()[:, 0]
                    for _ in range(args.critic_steps):
                        i = torch.randint(len(y), (args.critic_batch,), device=args.device)
                        minibatch = take(obs, i), action[i], y[i]
                        run.add(update_critic(critic, target, critic_optimizer, *minibatch, args))
                # 3. the actor: particles in some of the same states follow the transport field
                with run.timer(row, "actor_s"):
                    for _ in range(0 if warm else args.actor_steps):
                        i = torch.randint(len(y), (args.actor_batch,), device=args.device)
                        state["actor_steps"] += 1
                        decay = 1 + (args.anneal - 1) * spent
                        rise = min(1.0, state["actor_steps"] / ACTOR_WARMUP)
                        actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * rise
                        j = good[torch.randint(max(1, len(good)), (min(len(good), BC_BATCH),))]
                        seen = take(obs, i), (take(obs, j), action[j])
                        run.add(update_actor(policy, reference, critic, actor_optimizer, *seen, args))
            # 4. the reference of the constraint follows, or stays the base
            state["trained"] += 1
            if not own:  # the base's velocity knows no other features than its own
                cond = policy.encode(take(obs, slice(512)))
                run.add({"diagnostics/base_distance": policy.distance(base, cond)})
            if args.reference_every and state["trained"] % args.reference_every == 0:
                reference.load_state_dict(policy.state_dict())
        run.log(row, state["env_steps"])
        run.save()

    result = run.finish("eval_success", measure, task=task, env_steps=state["env_steps"])
    if args.capture_video and run.rank == 0:
        record_video(policy, envs, run.path / "videos")
    envs.close()
    return result


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
