"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for Gymnasium tasks.

    python rldt_gym.py --env-id Hopper-v4 --n-particles 4

finetunes a pretrained flow-matching policy by moving its action density toward exp(Q / alpha) with
Stein variational gradient descent. docs/rldt_gym.md walks through this file, equation by equation.
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
from common.runs import Run, autocast, average, average_gradients, derive_seed, evaluate_stored
from common.settings import Count, Precision, Seed, Share, Size, Threads, Weight, launch, set_up
from common.svgd import transport_field
from demos import dataset
from envs.vector import VectorEnv, record_video


# ---------------------------------------------------------------------------------- arguments
@dataclass
class TaskArgs:
    """Settings of every method on these tasks; in comments, paper is its text, authors their code."""

    # the run
    env_id: str = "Hopper-v4"  # Gymnasium task with flat Box observations and actions
    preset: Literal["laptop", "paper"] = "laptop"  # defaults: laptop, for two cores, or paper; flags win
    exp_name: str = "rldt"  # name of the experiment, part of the run directory's name
    seed: Seed = 1  # of networks, minibatches, noise and environments
    iterations: Size = 0  # training iterations, evaluations included (paper: 70); 0: the task's
    wall_budget_s: Weight = 0.0  # seconds until a run ends, or sooner by --iterations; 0: none
    runs: Path = Path("runs")  # directory in which run directories are made
    device: str = "auto"  # torch device: cpu, cuda, cuda:0, ...; auto: CUDA where there is one
    threads: Threads = 1  # CPU threads of torch and EnvPool; one repeats bit for bit, in one precision
    precision: Precision = "auto"  # of matrix products (autocast); auto: the faster one here, measured
    resume: Path | None = None  # run directory to continue from its last checkpoint, with its arguments
    evaluate: Path | None = None  # run directory whose final policy to evaluate
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    capture_video: bool = False  # film an episode after training (needs a MuJoCo GL backend)

    # base policy
    base: Path | None = None  # base policy (.safetensors); default: shipped (laptop's), or made here
    dataset: str | None = None  # to clone without --base: D4RL .hdf5, DPPO .npz, Minari id or folder

    # rollouts and evaluation
    num_envs: Count = 100  # parallel environments, per process under torchrun (paper: 100)
    rollout_chunks: Count = 32  # chunks of actions per environment and iteration (paper: 500)
    zero_fraction: Share = 0.25  # share of environments and particles with x_0 = 0 (authors: 0)
    eval_every: Count = 6  # every n-th iteration evaluates and resets the environments (authors: 5)
    eval_episodes: Count = 20  # from x_0 = 0, and again from noise, during training (authors: 100)
    final_eval_episodes: Count = 100  # of the base, the final and the best policy (authors: 100)


@dataclass
class CriticArgs(TaskArgs):  # of methods with RLDT's critic; docs/ says why they are not the paper's
    # replay
    buffer_iterations: Count = 40  # rollouts kept in the replay (paper: 20)
    segments: Count = 128  # of SEGMENT chunks, drawn from the replay per round (authors: 100 of 500)

    # critic
    gamma: Share = 0.97  # discount per chunk (paper: 0.99)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0)
    target_momentum: Share = 0.99  # Polyak momentum of the targets per critic step (paper: 0.998)
    rounds: Count = 16  # per iteration: draw segments, critic steps, actor steps (authors: 16)
    critic_steps: Count = 32  # per round (paper: 64)
    critic_batch: Count = 1024  # chunks per critic step (authors: 50 000, all that were drawn)
    critic_lr: Weight = 5e-4  # Adam step size (paper: 1e-3 or 5e-4)
    critic_layer_norm: bool = True  # without: no LayerNorm, and weights from N(0, 0.1^2) (authors)
    warmup_iterations: Size = 3  # training iterations before the actor starts (authors: none on Gym)


@dataclass
class Args(CriticArgs):
    # exploration and actor
    exploration_steps: Size = 2  # noise |a - a_dagger_k|, k of this many last Euler steps (authors: 2)
    actor_steps: Size = 8  # per round (authors: 2)
    actor_batch: Count = 64  # states per actor step, n_particles particles in each (authors: 6250)
    n_particles: Count = 4  # P, particles per state (paper: 8, and 4 are enough)
    kernel: Literal["rbf", "delta"] = "rbf"  # of the field: rbf, or delta (RLDT-Delta)
    alpha: Weight = 1e-3  # temperature, the weight of the repulsion relative to |grad Q| (paper: 1e-3)
    transport_loss: Literal["literal", "authors"] = "authors"  # eq. (13), or the authors' form of it
    gradient_norm: Weight = 1.0  # what the first mean |grad Q| is scaled to; 0: not scaled (authors)
    consistency_weight: Weight = 0.5  # of eq. (14) (paper: 0.5)
    constraint_weight: Weight = 0.2  # of eq. (15) (paper: 0.2)
    reference_every: Size = 1  # iterations until the constraint's policy follows (authors: 1); 0: never
    actor_lr: Weight = 1e-4  # Adam step size (paper: 2e-5)
    anneal: Share = 0.1  # factor on actor_lr, reached linearly at the end (authors: 1)


PRESETS = {
    "paper": dict(
        iterations=70, precision="float32", rollout_chunks=500, zero_fraction=0.0, eval_every=5,
        eval_episodes=100, buffer_iterations=20, segments=3125, gamma=0.99, td_lambda=0.0,
        target_momentum=0.998, critic_steps=64, critic_batch=50_000, critic_lr=1e-3,
        critic_layer_norm=False, warmup_iterations=0, actor_steps=2, actor_batch=6250, n_particles=8,
        gradient_norm=0.0, actor_lr=2e-5, anneal=1.0,
    )
}  # fmt: skip
NETWORK = dict(chunk=4, euler_steps=8, width=512, depth=3, time_dim=16)  # paper
PRETRAINING = {  # of a base policy that is made here; pretrain_fm.py has these as flags
    "laptop": dict(epochs=40, batch=512, lr=1e-3) | NETWORK,
    "paper": dict(epochs=200, batch=128, lr=1e-3) | NETWORK,
}
SEGMENT = 16  # chunks of a replay segment (authors: the whole rollout, 500)
FRESH = 0.33  # least share of the segments that comes from the newest rollout (authors)
REWARD_RATE = 0.01  # of the average of |reward|, by which rewards are divided (authors)
WARMUP_LAMBDA = 0.95  # lambda before the actor starts, so that values reach their scale first
WARMUP_FACTOR = 3  # on the critic's steps before the actor starts
ACTOR_WARMUP = 32  # actor steps over which its step size rises linearly (paper)


# ----------------------------------------------------------------------------------- networks
class Critic(nn.Module):
    """Two Q networks on (normalised observation, action chunk), evaluated as one batched product."""

    def __init__(self, obs_dim: int, action_size: int, layer_norm: bool, width=256, depth=3):
        super().__init__()
        self.layer_norm = layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise([obs_dim + action_size] + [width] * depth + [1]):
            weight, bias = torch.empty(2, n_in, n_out), torch.zeros(2, 1, n_out)
            if layer_norm:
                bound = 1 / math.sqrt(n_in)  # torch's default
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            else:
                weight.normal_(0, 0.1)  # authors
            self.weights.append(weight)
            self.biases.append(bias)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """obs (B, obs_dim), action (B, D) -> Q (2, B)."""
        x = torch.cat([obs, action], -1).expand(2, -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w)
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 rounds Q = 100 to steps of 0.5
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


# -------------------------------------------------------------------------------- base policy
def pretrain(args: TaskArgs, data: dataset.Demonstrations, checkpoint: Path, epochs, batch, lr, **sizes):
    """Flow matching on demonstrations, eq. (1)-(2): a policy of these sizes, its weights averaged."""
    policy = FlowPolicy(data.observations.shape[1], data.actions.shape[1], **sizes).to(args.device)
    policy.set_limits(**data.limits())
    first = dataset.chunk_starts(data.episode_ends, policy.chunk)  # (n,)
    obs = policy.normalize(data.observations[first])  # (n, obs_dim)
    action = policy.from_env(data.actions[first[:, None] + np.arange(policy.chunk)])  # (n, D)

    def loss():
        i = torch.randint(len(obs), (batch,), device=args.device)
        return flow_matching_loss(policy.velocity, action[i], obs[i])  # eq. (2)

    averaged = fit(policy, loss, max(1, epochs * len(obs) // batch), lr, args, checkpoint)
    averaged.info = dict(env_id=args.env_id)
    return averaged


def get_base(args: TaskArgs, run: Run, envs: VectorEnv) -> FlowPolicy:
    """The base policy: given, shipped, or pretrained here; the run keeps a copy of its own."""
    shipped = dataset.DEMOS / args.env_id / "base.safetensors"

    def make(checkpoint: Path) -> FlowPolicy:
        if args.base:
            return FlowPolicy.load(args.base, env_id=args.env_id, script="rldt_gym", form="flow")
        if shipped.exists() and not args.dataset:
            return FlowPolicy.load(shipped)
        data = dataset.get(args.env_id, args.dataset, envs)
        return pretrain(args, data, checkpoint, **PRETRAINING[args.preset])

    policy = run.keep_base(make, FlowPolicy)
    if (policy.obs_dim, policy.action_dim) != (envs.obs_dim, envs.action_dim):
        raise SystemExit(f"{args.base or shipped}: states or actions have other sizes than the task's.")
    return policy


# ------------------------------------------------------------------------------------- replay
class Replay(Ring):
    """The last rollouts, (rollout_chunks, num_envs, ...) each; row t is chunk t, ending in next_obs."""

    def __init__(self, args: Args, policy: FlowPolicy):
        rows, obs_dim = (args.rollout_chunks, args.num_envs), policy.obs_dim
        shapes = {name: rows for name in ("reward", "terminated", "truncated")}
        shapes |= dict(obs=(*rows, obs_dim), next_obs=(*rows, obs_dim))
        shapes["action"] = *rows, policy.action_size
        super().__init__(args.buffer_iterations, shapes, args.device)

    def draw(self, segments: int) -> dict[str, torch.Tensor]:
        """Random segments, (SEGMENT, segments, ...), some of them from the newest rollout."""
        _, T, N = self.slots["reward"].shape
        device, length = self.slots["reward"].device, min(SEGMENT, T)
        slot = torch.randint(self.filled, (segments,), device=device)
        slot[: math.ceil(max(FRESH, 1 / self.filled) * segments)] = self.slot
        start = torch.randint(T - length + 1, (segments,), device=device)
        env = torch.randint(N, (segments,), device=device)
        t = start + torch.arange(length, device=device)[:, None]  # (length, segments)
        return {name: value[slot, t, env] for name, value in self.slots.items()}


# -------------------------------------------------------------------- exploration and rollout
def make_envs(args: TaskArgs, num_envs: int) -> VectorEnv:
    require_memory(num_envs * 2 * 2**20, "cpu", f"{num_envs} environments")
    return VectorEnv(args.env_id, num_envs, args.threads)


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


@torch.no_grad()
def collect(policy: FlowPolicy, envs: VectorEnv, rollout: dict, args: Args) -> tuple[int, list[float]]:
    """Fills a rollout with exploration; returns environment steps and the returns of ended episodes."""
    steps, returns, device = 0, [], args.device
    for t in range(args.rollout_chunks):
        obs = policy.normalize(envs.obs)  # (N, obs_dim)
        x0 = torch.randn(len(obs), policy.action_size, device=device)
        x0[: round(args.zero_fraction * len(obs))] = 0
        with autocast(args):
            action = explore(policy.sample(obs, x0, trajectory=True), args)
        step = envs.step(policy.to_env(action))
        row = dict(obs=obs, action=action, next_obs=policy.normalize(step.next_obs), reward=step.reward,
                   terminated=step.terminated, truncated=step.truncated)  # fmt: skip
        for name, value in row.items():
            rollout[name][t] = torch.as_tensor(value, device=device)
        returns.extend(step.score[step.terminated | step.truncated])
        steps += int(step.length.sum())
    return steps, returns


# ------------------------------------------------------------------------------------- critic
def average_magnitude(state: dict, reward: torch.Tensor) -> float:
    """What rewards are divided by: the slow average of |reward| over rollouts with some; else 1."""
    magnitude = average(reward.abs().mean()).item()
    if magnitude > 0:
        state["rewarded"] += 1
        rate = REWARD_RATE / (1 - (1 - REWARD_RATE) ** state["rewarded"])  # 1 for the first
        state["reward_scale"] += rate * (magnitude - state["reward_scale"])
    return state["reward_scale"]


def td_lambda(reward, terminated, truncated, next_value, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of segments, time first, all (T, L).

    y_t = r_t + gamma (1 - terminated_t) [(1 - lam) V(s_{t+1}) + lam y_{t+1}]; after a truncation and
    at the segment's end V(s_{t+1}) stands alone: a time limit is not an end.
    """
    target, y = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        y = torch.where(truncated[t] > 0, next_value[t], (1 - lam) * next_value[t] + lam * y)
        y = reward[t] + gamma * (1 - terminated[t]) * y
        target[t] = y
    return target


@torch.no_grad()
def critic_target(policy, target: Critic, batch: dict, reward_scale: float, lam: float, args: Args):
    """TD(lambda) targets (T, L); V(s') is the minimum of the targets at a sampled action."""
    obs = batch["next_obs"].flatten(0, 1)  # (T * L, obs_dim)
    with autocast(args):
        value = target(obs, policy.sample(obs)).min(0).values.view_as(batch["reward"])
    reward = batch["reward"] / reward_scale
    return td_lambda(reward, batch["terminated"], batch["truncated"], value, args.gamma, lam)


def update_critic(critic: Critic, target: Critic, optimizer, obs, action, y, args: Args) -> dict:
    """One step on obs (B, obs_dim), action (B, D) and targets y (B,); the target networks follow."""
    with autocast(args):
        q = critic(obs, action)  # (2, B)
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


def actor_losses(velocity, reference, critic: Critic, obs, trajectory, args: Args, unit=0.0, k=None):
    """The three losses of eq. (16) on states obs (B, obs_dim) with trajectories (K + 1, B, P, D).

    Each particle has one step k (B, P) of its trajectory, drawn where it is not given. The field is in
    units of `unit`, a length of grad Q; 0: its mean here.
    """
    K, (_, B, P, D) = len(trajectory) - 1, trajectory.shape
    device, action = obs.device, trajectory[-1]  # a, (B, P, D)
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K  # of a fresh point x_c of the path, for eq. (15)
    x_c = interpolate(action, start_noise(action.shape, args), t_c)
    with autocast(args):
        v, v_c = velocity(torch.stack([x, x_c]), torch.stack([t, t_c]), obs[:, None])
        with torch.no_grad():
            v_ref = reference(x_c, t_c, obs[:, None])
    a_dagger = expected_target(x, t, v)  # eq. (8), x + (1 - t) v

    # transport: the expected targets move along the field, which grad Q at the particles makes
    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(obs.repeat_interleave(P, 0), particles.view(B * P, D)).mean(0)
    (grad_q,) = torch.autograd.grad(q.sum(), particles)
    grad_q_norm = grad_q.norm(dim=-1).mean()
    if args.gradient_norm:  # moves are as long on a task with large values as on one with small ones
        grad_q = grad_q * (args.gradient_norm / (unit or grad_q_norm.clamp_min(1e-8)))
    phi = transport_field(query, particles.detach(), grad_q, args.alpha, args.kernel)  # eq. (6)
    if args.transport_loss == "literal":
        transport = (a_dagger - (query + phi)).square().sum(-1).mean() / K  # eq. (13)
    else:
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
        "diagnostics/grad_q_norm": grad_q_norm,
        "diagnostics/phi_norm": phi.norm(dim=-1).mean(), "diagnostics/particle_distance": distance,
    }  # fmt: skip
    return transport, consistency, constraint, {key: value.detach() for key, value in metrics.items()}


def update_actor(policy, reference, critic: Critic, optimizer, obs, args: Args, unit=0.0) -> dict:
    """Samples P particles in each state of obs (B, obs_dim), then takes a step on eq. (16)."""
    x0 = start_noise((len(obs), args.n_particles, policy.action_size), args)
    with torch.no_grad(), autocast(args):
        trajectory = policy.sample(obs[:, None], x0, trajectory=True)
    losses = actor_losses(policy.velocity, reference.velocity, critic, obs, trajectory, args, unit)
    transport, consistency, constraint, metrics = losses  # the terms of eq. (16)
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint
    optimizer.zero_grad()
    loss.backward()
    average_gradients(policy.velocity.parameters())
    optimizer.step()
    norm = nn.utils.get_total_norm([p.grad for p in policy.velocity.parameters()])
    return metrics | {"diagnostics/actor_grad_norm": norm}


# --------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy: FlowPolicy, args: TaskArgs, episodes: int, seed: int) -> dict[str, float]:
    """Mean and deviation of undiscounted returns, from x_0 = 0 and, as `sampled`, from x_0 ~ N(0, I)."""
    N, device = 2 * episodes, args.device
    envs = make_envs(args, N)
    envs.reset(seed)
    generator = torch.Generator(device).manual_seed(seed)
    returns, alive = np.zeros(N), np.ones(N, bool)
    while alive.any():
        x0 = torch.randn(N, policy.action_size, device=device, generator=generator)
        x0[:episodes] = 0
        chunks = np.zeros((N, policy.chunk, envs.action_dim), np.float32)
        with autocast(args):
            obs = policy.normalize(envs.obs)[alive]
            chunks[alive] = policy.to_env(policy.sample(obs, x0[alive]))
        step = envs.step(chunks, alive)
        done = step.terminated | step.truncated
        returns[done] = step.score[done]
        alive &= ~done
    envs.close()
    scores = {}
    for name, values in ("eval_return", returns[:episodes]), ("eval_return_sampled", returns[episodes:]):
        scores |= {name: float(values.mean()), f"{name}_std": float(values.std())}
    return scores


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    set_up(args)
    if args.iterations == 0 and args.wall_budget_s == 0:
        args.iterations = 24 if args.env_id == "Hopper-v4" else 78
    measure = partial(evaluate, args=args)
    if args.evaluate:
        return evaluate_stored(args, FlowPolicy, measure)
    rows = max(args.segments * SEGMENT, args.critic_batch, args.actor_batch * args.n_particles)
    require_memory(24 * 2**10 * rows, args.device, "A batch")

    envs = make_envs(args, args.num_envs)
    run = Run(args, f"{args.env_id}__{args.exp_name}__{args.seed}")
    policy = get_base(args, run, envs)
    base, reference = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    critic = Critic(policy.obs_dim, policy.action_size, args.critic_layer_norm).to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    replay = Replay(args, policy)
    state = dict(env_steps=0, trained=0, actor_steps=0, reward_scale=1.0, rewarded=0, unit=0.0)
    run.checkpoints(
        state, policy, reference=reference, critic=critic, target=target, envs=envs, replay=replay,
        actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():  # spent: the share of the run's iterations or seconds
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_return", measure)
            envs.reset(derive_seed(args.seed, "rollouts", iteration, run.rank))
        else:
            # 1. roll out with exploration
            with run.timer(row, "rollout_s"):
                steps, returns = collect(policy, envs, replay.next(), args)
            state["env_steps"] += steps * run.world
            if returns:
                row["train_return"] = np.mean(returns)
            reward_scale = average_magnitude(state, replay.newest()["reward"])
            row["diagnostics/reward_scale"] = reward_scale

            warm, lengths = state["trained"] < args.warmup_iterations, []
            for _ in range(args.rounds):
                # 2. the critic: TD(lambda) targets of some segments, then steps on minibatches of them
                with run.timer(row, "critic_s"):
                    batch = replay.draw(args.segments)
                    lam = WARMUP_LAMBDA if warm else args.td_lambda
                    y = critic_target(policy, target, batch, reward_scale, lam, args).flatten()
                    obs, action = batch["obs"].flatten(0, 1), batch["action"].flatten(0, 1)
                    for _ in range(args.critic_steps * (WARMUP_FACTOR if warm else 1)):
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
                        seen = obs[i], args, state["unit"]
                        metrics = update_actor(policy, reference, critic, actor_optimizer, *seen)
                        lengths.append(metrics["diagnostics/grad_q_norm"])
                        run.add(metrics)
            if lengths and not state["unit"]:  # that of the actor's first iteration
                state["unit"] = average(torch.stack(lengths).double().mean()).item()
            # 4. the reference of the constraint follows, or stays the base
            state["trained"] += 1
            run.add({"diagnostics/base_distance": policy.distance(base, obs[:512])})
            if args.reference_every and state["trained"] % args.reference_every == 0:
                reference.load_state_dict(policy.state_dict())
        run.log(row, state["env_steps"])
        run.save()

    envs.close()
    result = run.finish("eval_return", measure, task=args.env_id, env_steps=state["env_steps"])
    if args.capture_video and run.rank == 0:
        record_video(policy, args.env_id, run.path / "videos")
    return result


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
