"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for FurnitureBench's assembly.

    python rldt_furniture.py --furniture one_leg --randomness low

finetunes a flow-matching policy, cloned from demonstrations, on the sparse reward of assembled pairs of
parts, in MuJoCo or in FurnitureSim (Isaac Gym). Order and names are those of rldt_gym.py;
docs/rldt_furniture.md says what differs.
"""

try:  # Isaac Gym cannot be imported after torch
    import isaacgym  # noqa: F401
except (ImportError, RuntimeError):  # the latter on another Python than its own
    pass

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
from demos import furniture as dataset
from demos.dataset import as_rollouts, chunk_rows, chunk_starts
from envs.furniture_isaac import IsaacVectorEnv, isaac_missing
from envs.furniture_mujoco import FURNITURE, FurnitureVectorEnv, record_video
from envs.interface import success_rate


# ---------------------------------------------------------------------------------- arguments
@dataclass
class TaskArgs:
    """Settings of every method on these tasks; in comments, paper is its text, authors their code."""

    # the run
    furniture: Literal["one_leg", "lamp"] = "one_leg"  # a table's leg; a lamp, with its own defaults
    randomness: Literal["low", "med"] = "low"  # range of the initial states (FurnitureBench)
    backend: Literal["auto", "isaac", "mujoco"] = "auto"  # simulator; auto: Isaac Gym if installed
    preset: Literal["laptop", "paper"] = "laptop"  # defaults for two cores, or the paper's; flags win
    exp_name: str = "rldt"  # name of the experiment, part of the run directory's name
    seed: Seed = 1  # of networks, minibatches, noise and environments
    iterations: Size = 0  # training iterations, evaluations included (paper: 250; med: 500); 0: 60
    wall_budget_s: Weight = 0.0  # seconds until a run ends, or sooner by --iterations; 0: none
    runs: Path = Path("runs")  # directory in which run directories are made
    device: str = "auto"  # torch device: cpu, cuda, cuda:0, ...; auto: CUDA where there is one
    threads: Threads = 2  # CPU threads of torch and of the environments in MuJoCo
    precision: Precision = "auto"  # of matrix products (autocast); auto: the faster one here, measured
    resume: Path | None = None  # run directory to continue from its last checkpoint, with its arguments
    evaluate: Path | None = None  # run directory whose final policy to evaluate
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    capture_video: bool = False  # film an episode after training (needs a MuJoCo GL backend)

    # base policy
    base: Path | None = None  # base policy (.safetensors); default: shipped (laptop's), or made here
    dataset: Path | None = None  # to pretrain on (.hdf5); default: the scripted assembler's

    # rollouts and evaluation
    num_envs: Count = 16  # parallel environments (paper: 1000)
    horizon: Size = 0  # time limit in steps of 0.1 s; 0: the task's, 700 (one_leg) or 1000 (lamp)
    zero_fraction: Share = 0.25  # share of environments and particles with x_0 = 0 (authors: 0)
    eval_every: Count = 40  # every n-th iteration only evaluates (authors: 10)
    eval_episodes: Count = 30  # from x_0 = 0, and again from noise, during training
    final_eval_episodes: Count = 100  # of the base, the final and the best policy


@dataclass
class CriticArgs(TaskArgs):  # of methods with RLDT's critic; docs/ says why they are not the paper's
    # replay
    buffer_iterations: Count = 60  # rollouts kept in the replay (authors: 20)
    demos: bool = False  # demonstrations are in the replay, as episodes that reach all (authors: not)
    segments: Count = 128  # of SEGMENT chunks, drawn from the replay per round

    # critic
    gamma: Share = 0.99  # discount per chunk (paper: 0.995)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0.5)
    target_momentum: Share = 0.99  # Polyak momentum of the targets per critic step (paper: 0.998)
    rounds: Count = 8  # per iteration: draw segments, critic steps, actor steps (authors: 16)
    critic_steps: Count = 128  # per round (paper: 128, of larger batches)
    critic_batch: Count = 256  # chunks per critic step (authors: all that were drawn)
    critics: Several = 2  # Q networks; targets take the minimum of a random two (paper: 2)
    critic_lr: Weight = 5e-4  # Adam step size (paper: 5e-4)
    critic_layer_norm: bool = True  # without: no LayerNorm, and weights from N(0, 0.1^2) (authors)
    warmup_iterations: Size = 22  # training iterations before the actor starts (paper: 2)


@dataclass
class Args(CriticArgs):
    # exploration and actor
    exploration_steps: Size = 0  # noise |a - a_dagger_k|, k of this many last Euler steps (authors: 2)
    best_of: Count = 1  # samples; after half of the warm-up half of the environments act on the best
    actor_steps: Size = 6  # per round (authors: 2)
    actor_batch: Count = 64  # states per actor step, n_particles particles in each (authors: 6250)
    n_particles: Count = 16  # P, particles per state (paper: 8)
    kernel: Literal["rbf", "delta"] = "rbf"  # of the field; delta: RLDT-Delta, with --q-gradient critic
    q_gradient: Literal["critic", "particles"] = "particles"  # grad Q (paper), or to particles of high Q
    alpha: Weight = 1e-3  # temperature, the weight of the repulsion relative to |grad Q| (paper: 1e-3)
    transport_scale: Weight = 30.0  # factor on grad Q (authors: 1); 2 for the lamp
    consistency_weight: Weight = 0.05  # of eq. (14) (paper: 0.5)
    constraint_weight: Weight = 0.2  # of eq. (15) (paper: 0.2)
    bc_weight: Weight = 0.0  # of eq. (2) on chunks that led to a further pair (paper: 0)
    reference_every: Size = 0  # iterations until the constraint's policy follows (authors: 1); 0: never
    actor_lr: Weight = 2e-4  # Adam step size (paper: 2e-5)
    anneal: Share = 0.3  # factor on actor_lr, reached linearly at the end (authors: 1)


PRESETS = {
    "paper": dict(
        precision="float32", num_envs=1000, zero_fraction=0.0, eval_every=10,
        eval_episodes=500, final_eval_episodes=500, exploration_steps=2, buffer_iterations=20,
        segments=3125, gamma=0.995, target_momentum=0.998, rounds=16, critic_batch=8192,
        critic_layer_norm=False, warmup_iterations=2, actor_steps=2, actor_batch=6250, n_particles=8,
        q_gradient="critic", transport_scale=1.0, consistency_weight=0.5, reference_every=1, anneal=1.0,
        actor_lr=2e-5, bc_weight=0.0,
    ),
    "lamp": dict(transport_scale=2.0, bc_weight=0.5, actor_lr=1e-4),  # its critic tells little
}  # fmt: skip
PRETRAINING = {  # of a base policy that is made here; pretrain_fm.py has these as flags
    "laptop": dict(epochs=200, batch=256, lr=1e-3, spread=1.0, start=None, chunk=8, euler_steps=8,
                   width=512, depth=5, time_dim=32, layer_norm=True, cond_mlp=[512, 256]),
    "paper": dict(epochs=8000, batch=256, lr=1e-4, spread=0.0, start=None, chunk=8, euler_steps=32,
                  width=1024, depth=7, time_dim=32, layer_norm=True, cond_mlp=[512, 64]),
}  # fmt: skip
CRITIC_WIDTH = {"laptop": 256, "paper": 512}
SEGMENT = 16  # chunks of a replay segment (authors: the whole rollout)
FRESH = 0.33  # least share, of either kind that the newest rollout has, which comes from it (authors)
BC_BATCH = 256  # chunks on which eq. (2) goes on, an actor step
ACTOR_WARMUP = 32  # actor steps over which its step size rises linearly (paper)


# ----------------------------------------------------------------------------------- networks
class Critic(nn.Module):
    """Q networks on (observation, action chunk), evaluated as one batched product."""

    def __init__(self, obs_dim, action_size, layer_norm, networks=2, width=256, depth=3):
        super().__init__()
        self.layer_norm = layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise([obs_dim + action_size] + [width] * depth + [1]):
            weight, bias = torch.empty(networks, n_in, n_out), torch.zeros(networks, 1, n_out)
            if layer_norm:
                bound = 1 / math.sqrt(n_in)  # torch's default
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            else:
                weight.normal_(0, 0.1)  # authors
            self.weights.append(weight)
            self.biases.append(bias)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """obs (B, obs_dim), action (B, D) -> Q (networks, B)."""
        x = torch.cat([obs, action], -1).expand(len(self.biases[0]), -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w)
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round Q
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


# -------------------------------------------------------------------------------- base policy
def pretrain(args: TaskArgs, data: dict, checkpoint: Path, epochs: int, batch: int, lr: float,
             spread: float, start: Path | None, **sizes) -> FlowPolicy:  # fmt: skip
    """Flow matching on demonstrations, eq. (1)-(2): a policy of these sizes, its weights averaged.

    It begins with the weights and the scaling of `start`, where given.
    """
    policy = FlowPolicy(data["state"].shape[1], data["action"].shape[1], **sizes).to(args.device)
    policy.set_limits(**dataset.limits(data, spread))
    if start:
        other = FlowPolicy.load(start, furniture=args.furniture)
        if other.config != policy.config:
            raise SystemExit(f"--start {start}: has sizes {other.config}, to train are {policy.config}.")
        policy.load_state_dict(other.state_dict())
    first = chunk_starts(data["episode_ends"], policy.chunk)  # (n,)
    obs = policy.normalize(data["state"][first])  # (n, obs_dim)
    action = policy.from_env(data["action"][first[:, None] + np.arange(policy.chunk)])  # (n, D)

    def loss():
        i = torch.randint(len(obs), (batch,), device=args.device)
        return flow_matching_loss(policy.velocity, action[i], obs[i])  # eq. (2)

    averaged = fit(policy, loss, max(1, epochs * len(obs) // batch), lr, args, checkpoint)
    averaged.info = dict(furniture=args.furniture, randomness=args.randomness)
    return averaged


def get_base(args: TaskArgs, run: Run, envs) -> FlowPolicy:
    """The base policy: given, shipped, or pretrained here; the run keeps a copy of its own."""
    shipped = dataset.DEMOS / args.furniture / f"base_{args.randomness}.safetensors"

    def make(checkpoint: Path) -> FlowPolicy:
        if args.base:
            return FlowPolicy.load(args.base, furniture=args.furniture, script="rldt_furniture")
        if shipped.exists() and not args.dataset:
            return FlowPolicy.load(shipped)
        data = dataset.get(args.furniture, args.randomness, args.dataset)
        return pretrain(args, data, checkpoint, **PRETRAINING[args.preset])

    policy = run.keep_base(make, FlowPolicy)
    if (policy.obs_dim, policy.action_dim) != (envs.obs_dim, envs.action_dim):
        raise SystemExit(f"{args.base or shipped}: states or actions have other sizes than the task's.")
    return policy


# ------------------------------------------------------------------------------------- replay
class Replay(Ring):
    """The last rollouts, (chunks of an episode, num_envs, ...) each; row t is chunk t.

    Observations have one row more, for where the rollout ends. `valid` is 1 while something is left to
    assemble; `reached` is the number of pairs that the episode comes to in the end. Demonstrations
    follow the rollouts in the same layout.
    """

    def __init__(self, args: Args, policy: FlowPolicy):
        T, N = math.ceil(args.horizon / policy.chunk), args.num_envs
        shapes = {name: (T, N) for name in ("reward", "terminated", "valid", "reached")}
        shapes["action"] = T, N, policy.action_size
        shapes["obs"] = T + 1, N, policy.obs_dim + 1
        super().__init__(args.buffer_iterations, shapes, args.device)
        if args.demos:
            shown = demonstrations(policy, T, N, args)
            self.slots = {name: torch.cat([value, shown[name]]) for name, value in self.slots.items()}

    def draw(self, segments: int) -> dict[str, torch.Tensor]:
        """Segments (SEGMENT, segments, ...): as many of each `reached`, some of the newest rollout."""
        T = self.slots["reward"].shape[1]
        length = min(SEGMENT, T)
        valid, reached = (self.slots[name][:, : T - length + 1] for name in ("valid", "reached"))
        weight = torch.zeros_like(valid)
        for kind in reached[valid > 0].unique():
            rows = valid * (reached == kind)
            share, newest = (1 - FRESH) * rows / rows.sum(), rows[self.slot]
            share[self.slot] += FRESH * newest / newest.sum().clamp_min(1)
            weight += share / share.sum()
        chosen = torch.multinomial(weight.flatten(), segments, replacement=True)
        slot, start, env = torch.unravel_index(chosen, weight.shape)
        t = start + torch.arange(length, device=start.device)[:, None]  # (length, segments)
        batch = {name: value[slot, t, env] for name, value in self.slots.items()}
        return batch | {"next_obs": self.slots["obs"][slot, t + 1, env]}


def demonstrations(policy: FlowPolicy, T: int, N: int, args: Args) -> dict[str, torch.Tensor]:
    """Demonstrations as rollouts (., T, N, ...): each from every step of its first chunk on."""
    data, most = dataset.get(args.furniture, args.randomness, args.dataset), stages_of(args)
    first, end = chunk_rows(data["episode_ends"], policy.chunk)  # (n,)
    steps = np.minimum(first[:, None] + np.arange(policy.chunk), end[:, None] - 1)  # (n, chunk)
    last, stage = first + policy.chunk >= end, data["stage"][first]
    after = np.where(last, most, np.roll(stage, -1))
    share = torch.as_tensor(stage / most, device=args.device)
    obs = torch.cat([policy.normalize(data["state"][first]), share[:, None]], -1)
    rows = dict(reward=after - stage, terminated=last, reached=np.full(len(first), most))
    rows = {name: torch.as_tensor(value, device=args.device).float() for name, value in rows.items()}
    rows["action"] = policy.from_env(data["action"][steps])
    return as_rollouts(rows, {"obs": obs.float()}, T, N)


# -------------------------------------------------------------------- exploration and rollout
def make_envs(args: TaskArgs, num_envs: int):
    require_memory(num_envs * 8 * 2**20, "cpu", f"{num_envs} environments")
    if args.backend == "isaac":
        return IsaacVectorEnv(num_envs, args.furniture, args.randomness, args.horizon)
    return FurnitureVectorEnv(num_envs, args.furniture, args.randomness, args.horizon, args.threads)


def stages_of(args: TaskArgs) -> int:
    """Pairs of parts that the task assembles: the largest return of an episode."""
    return len(FURNITURE[args.furniture].pairs)


def observe(policy: FlowPolicy, envs, args: Args) -> torch.Tensor:
    """What the critic sees, (N, obs_dim + 1): the policy's state, and the share of pairs assembled."""
    stage = torch.as_tensor(envs.score / stages_of(args), device=args.device)
    return torch.cat([policy.normalize(envs.obs), stage[:, None]], -1).float()


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


def best_of(policy: FlowPolicy, critic: Critic, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """The mean of the best quarter by Q of `best_of` sampled actions, (N, D), for obs (N, .)."""
    obs = obs[:, None].expand(-1, args.best_of, -1)  # (N, M, .)
    action = policy.sample(obs[..., :-1])  # (N, M, D)
    q = critic(obs.flatten(0, 1), action.flatten(0, 1)).mean(0).view(action.shape[:2])
    best = q.topk(math.ceil(args.best_of / 4)).indices[..., None]  # (N, M / 4, 1)
    return action.gather(1, best.expand(-1, -1, action.shape[-1])).mean(1)


@torch.no_grad()
def collect(policy: FlowPolicy, critic, envs, rollout: dict, seed: int, args: Args) -> int:
    """Fills a rollout with exploration, from new episodes of `seed` on; returns environment steps.

    With a critic, half of the environments act on the best of their samples.
    """
    steps, device = 0, args.device
    envs.reset(seed)
    for t in range(len(rollout["action"])):
        obs = observe(policy, envs, args)  # (N, obs_dim + 1)
        x0 = torch.randn(len(obs), policy.action_size, device=device)
        x0[: round(args.zero_fraction * len(obs))] = 0
        with autocast(args):
            action = explore(policy.sample(obs[:, :-1], x0, trajectory=True), args)
            if critic:
                half = len(obs) // 2
                action[half:] = best_of(policy, critic, obs[half:], args)
        step = envs.step(policy.to_env(action))
        ended = step.terminated | step.truncated  # a time limit is a failure
        row = dict(obs=obs, action=action, reward=step.reward, valid=obs[:, -1] < 1, reached=step.score)
        row["terminated"] = ended | (step.score == stages_of(args))
        for name, value in row.items():
            rollout[name][t] = torch.as_tensor(value, device=device)
        steps += int(step.length.sum())
    rollout["obs"][-1] = observe(policy, envs, args)
    reached, terminated = rollout["reached"], rollout["terminated"] > 0
    for t in reversed(range(len(reached) - 1)):  # an episode's rows learn what it reaches later
        reached[t] = torch.where(terminated[t], reached[t], reached[t + 1])
    return steps


# ------------------------------------------------------------------------------------- critic
def td_lambda(reward, terminated, next_value, gamma: float, lam: float, most: float) -> torch.Tensor:
    """TD(lambda) targets of segments, time first, all (T, L), in [0, most] as returns are.

    y_t = r_t + gamma (1 - terminated_t) [(1 - lam) V(s_{t+1}) + lam y_{t+1}]; at the segment's end
    V(s_{t+1}) stands alone.
    """
    target, y = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        y = (1 - lam) * next_value[t] + lam * y
        y = (reward[t] + gamma * (1 - terminated[t]) * y).clamp(0, most)
        target[t] = y
    return target


@torch.no_grad()
def critic_target(policy: FlowPolicy, target: Critic, batch: dict, args: Args) -> torch.Tensor:
    """TD(lambda) targets (T, L); V(s') is the minimum of two targets at a sampled action."""
    obs = batch["next_obs"].flatten(0, 1)  # (T * L, obs_dim + 1)
    with autocast(args):
        q = target(obs, policy.sample(obs[:, :-1]))  # (networks, T * L)
    value = q[torch.randperm(len(q))[:2]].min(0).values.view_as(batch["reward"])
    reward, terminated, most = batch["reward"], batch["terminated"], stages_of(args)
    return td_lambda(reward, terminated, value, args.gamma, args.td_lambda, most)


def update_critic(critic: Critic, target: Critic, optimizer, obs, action, y, args: Args) -> dict:
    """One step on obs (B, .), action (B, D) and targets y (B,); the target networks follow."""
    with autocast(args):
        q = critic(obs, action)  # (networks, B)
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


def actor_losses(velocity, reference, critic: Critic, obs, trajectory, args: Args, k=None):
    """The three losses of eq. (16) on obs (B, obs_dim + 1) with trajectories (K + 1, B, P, D).

    Each particle has one step k (B, P) of its trajectory, drawn where it is not given.
    """
    K, (_, B, P, D) = len(trajectory) - 1, trajectory.shape
    device, action = obs.device, trajectory[-1]  # a, (B, P, D)
    state = obs[:, None, :-1]  # (B, 1, obs_dim), of all particles
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K  # of a fresh point x_c of the path, for eq. (15)
    x_c = interpolate(action, start_noise(action.shape, args), t_c)
    with autocast(args):
        v, v_c = velocity(torch.stack([x, x_c]), torch.stack([t, t_c]), state)
        with torch.no_grad():
            v_ref = reference(x_c, t_c, state)
    a_dagger = expected_target(x, t, v)  # eq. (8), x + (1 - t) v

    # transport: the expected targets move along the field, which grad Q at the particles makes
    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(obs.repeat_interleave(P, 0), particles.view(B * P, D)).mean(0)
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


def update_actor(policy: FlowPolicy, reference, critic: Critic, optimizer, obs, good, args: Args):
    """Samples P particles for each of obs (B, obs_dim + 1), then takes a step on eq. (16).

    `good` are observations and actions that led to a further pair, on which eq. (2) goes on.
    """
    x0 = start_noise((len(obs), args.n_particles, policy.action_size), args)
    with torch.no_grad(), autocast(args):
        trajectory = policy.sample(obs[:, None, :-1], x0, trajectory=True)
    losses = actor_losses(policy.velocity, reference.velocity, critic, obs, trajectory, args)
    transport, consistency, constraint, metrics = losses  # the terms of eq. (16)
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint
    if args.bc_weight and len(good[1]):
        with autocast(args):
            cloning = flow_matching_loss(policy.velocity, good[1], good[0][:, :-1])
        loss += args.bc_weight * policy.action_size * cloning  # eq. (2), a sum over dimensions
        metrics["losses/cloning"] = cloning.detach()
    optimizer.zero_grad()
    loss.backward()
    average_gradients(policy.velocity.parameters())
    optimizer.step()
    norm = nn.utils.get_total_norm([p.grad for p in policy.velocity.parameters()])
    return metrics | {"diagnostics/actor_grad_norm": norm}


# --------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy: FlowPolicy, envs, args: TaskArgs, episodes: int, seed: int) -> dict[str, float]:
    """Success and pairs assembled, from x_0 = 0 and, as `sampled`, from noise in the same states."""
    generator = torch.Generator(args.device).manual_seed(seed)
    stages = np.zeros(2 * episodes)  # first those from x_0 = 0
    envs.reset(iter(2 * [*range(seed, seed + episodes)]))
    while (envs.episode >= 0).any():
        episode = envs.episode.copy()  # which of them each environment runs; -1: none is left
        x0 = torch.randn(len(episode), policy.action_size, device=args.device, generator=generator)
        x0[torch.as_tensor(episode < episodes)] = 0
        with autocast(args):
            action = policy.sample(policy.normalize(envs.obs), x0)
        step = envs.step(policy.to_env(action))
        stages[episode[episode >= 0]] = step.score[episode >= 0]
    return summary(stages[:episodes], "", args) | summary(stages[episodes:], "_sampled", args)


def summary(stages: np.ndarray, name: str, args: TaskArgs) -> dict[str, float]:
    """Success of episodes that assembled `stages` pairs, its interval, and their mean."""
    scores = success_rate(stages == stages_of(args), f"eval_success{name}")
    scores |= {f"eval_stages{name}": float(stages.mean())}
    return scores | {f"eval_stages{name}_std": float(stages.std())}


# --------------------------------------------------------------------------------------- main
def resolve(args: TaskArgs):
    """Fills in what depends on the machine, on the preset and on the task."""
    if args.backend == "auto":
        args.backend = "mujoco" if isaac_missing() else "isaac"
    if args.backend == "isaac" and isaac_missing():
        raise SystemExit(f"--backend isaac: {isaac_missing()}; use --backend mujoco.")
    if args.backend == "isaac" and args.capture_video:
        raise SystemExit("--capture-video films in MuJoCo: use --backend mujoco, or leave it out.")
    args.horizon = args.horizon or FURNITURE[args.furniture].horizon
    if args.iterations == 0 and args.wall_budget_s == 0:
        paper = 500 if args.randomness == "med" else 250
        args.iterations = paper if args.preset == "paper" else 60


def main(args: Args) -> dict | None:
    set_up(args)
    resolve(args)
    if args.q_gradient == "particles" and (args.n_particles < 2 or args.kernel == "delta"):
        raise SystemExit("--q-gradient particles: needs --kernel rbf and --n-particles 2 or more, as 16")
    envs = make_envs(args, args.num_envs)
    measure = partial(evaluate, envs=envs, args=args)
    if args.evaluate:
        return evaluate_stored(args, FlowPolicy, measure)
    rows = max(args.segments * SEGMENT, args.critic_batch, args.actor_batch * args.n_particles)
    require_memory(24 * 2**10 * rows, args.device, "A batch")

    task = f"{args.furniture}-{args.randomness}"
    run = Run(args, f"{task}__{args.exp_name}__{args.seed}")
    policy = get_base(args, run, envs)
    base, reference = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    width = CRITIC_WIDTH[args.preset]
    sizes = policy.obs_dim + 1, policy.action_size, args.critic_layer_norm, args.critics, width
    critic = Critic(*sizes).to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    replay = Replay(args, policy)
    state = dict(env_steps=0, trained=0, actor_steps=0)
    run.checkpoints(
        state, policy, reference=reference, critic=critic, target=target, replay=replay,
        actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():  # spent: the share of the run's iterations or seconds
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_stages", measure)
        else:
            # 1. roll out with exploration
            with run.timer(row, "rollout_s"):
                seed = derive_seed(args.seed, "rollouts", iteration, run.rank)
                knows = args.best_of > 1 and 2 * state["trained"] >= args.warmup_iterations
                steps = collect(policy, critic if knows else None, envs, replay.next(), seed, args)
            state["env_steps"] += steps * run.world
            pairs = replay.newest()["reached"][0]  # of first episodes: the rollout's end cuts later ones
            row["train_success"] = (pairs == stages_of(args)).float().mean()
            row["train_stages"] = pairs.mean()

            warm = state["trained"] < args.warmup_iterations
            for _ in range(args.rounds):
                # 2. the critic: TD(lambda) targets of some segments, then steps on minibatches of them
                with run.timer(row, "critic_s"):
                    batch = replay.draw(args.segments)
                    y = critic_target(policy, target, batch, args)
                    valid = batch["valid"] > 0  # in Isaac Gym an episode goes on after success
                    obs, action, y = batch["obs"][valid], batch["action"][valid], y[valid]
                    further = batch["reached"][valid] > obs[:, -1] * stages_of(args) + 0.5
                    good = further.nonzero()[:, 0]
                    for _ in range(args.critic_steps):
                        i = torch.randint(len(y), (args.critic_batch,), device=args.device)
                        minibatch = obs[i], action[i], y[i]
                        run.add(update_critic(critic, target, critic_optimizer, *minibatch, args))
                # 3. the actor: particles in some of the same states follow the transport field
                with run.timer(row, "actor_s"):
                    for _ in range(0 if warm else args.actor_steps):
                        i = torch.randint(len(obs), (args.actor_batch,), device=args.device)
                        state["actor_steps"] += 1
                        decay = 1 + (args.anneal - 1) * spent
                        rise = min(1.0, state["actor_steps"] / ACTOR_WARMUP)
                        actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * rise
                        j = good[torch.randint(max(1, len(good)), (min(len(good), BC_BATCH),))]
                        seen = obs[i], (obs[j], action[j])
                        run.add(update_actor(policy, reference, critic, actor_optimizer, *seen, args))
            # 4. the reference of the constraint follows, or stays the base
            state["trained"] += 1
            run.add({"diagnostics/base_distance": policy.distance(base, obs[:512, :-1])})
            if args.reference_every and state["trained"] % args.reference_every == 0:
                reference.load_state_dict(policy.state_dict())
        run.log(row, state["env_steps"])
        run.save()

    result = run.finish("eval_stages", measure, task=task, env_steps=state["env_steps"])
    if args.capture_video and run.rank == 0:
        record_video(policy, args.furniture, args.randomness, args.horizon, run.path / "videos")
    envs.close()
    return result


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
