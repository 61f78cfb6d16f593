"""RLDT (Reinforcement Learning with Density Transport, arXiv 2606.08602) for FurnitureBench's assembly tasks.

    python rldt_furniture.py --furniture one_leg --randomness low

finetunes a flow-matching policy, cloned from demonstrations, on the sparse reward of assembled pairs of
parts. It moves the policy's action density toward exp(Q / alpha) with Stein variational gradient descent.
It runs in MuJoCo on any machine, and in FurnitureSim where Isaac Gym is installed. The order and the names
are those of rldt_gym.py; docs/rldt_furniture.md says what differs.
"""

try:  # Isaac Gym cannot be imported after torch
    import isaacgym  # noqa: F401
except (ImportError, RuntimeError):  # the latter on another Python than its own
    pass

import copy
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import binomtest
from tqdm import tqdm

from common.flow import FlowPolicy, expected_target, flow_matching_loss, interpolate
from common.runs import Ring, Run, autocast, average_gradients, load_parts, save_parts, set_up
from common.settings import Count, Share, Size, Weight, parse_args
from common.svgd import particle_gradient, transport_field
from demos import furniture as dataset
from demos.dataset import chunk_starts
from envs.furniture_isaac import IsaacVectorEnv, isaac_missing
from envs.furniture_mujoco import FURNITURE, FurnitureVectorEnv


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    """Settings of RLDT. Where a default differs from the paper's, docs/rldt_furniture.md says why."""

    # the run
    furniture: Literal["one_leg", "lamp"] = "one_leg"  # one leg of a square table, or a lamp's bulb and hood
    randomness: Literal["low", "med"] = "low"  # range of the initial states (FurnitureBench)
    backend: Literal["auto", "isaac", "mujoco"] = "auto"  # simulator; auto: Isaac Gym where it is installed
    preset: Literal["laptop", "paper"] = "laptop"  # defaults for two CPU cores, or the paper's; flags win
    exp_name: str = "rldt"  # name of the method or experiment, part of the run directory's name
    seed: Size = 1  # of networks, minibatches, noise and environments
    iterations: Size = 60  # training iterations, those that only evaluate included (paper: 250, med: 500)
    wall_budget_s: Weight = 0.0  # seconds after which a run makes its last evaluation and ends; 0: no limit
    runs: Path = Path("runs")  # directory in which run directories are made
    device: str = "auto"  # torch device: cpu, cuda, cuda:0, ...; auto: CUDA where there is one
    threads: Count = 2  # CPU threads of torch and of MuJoCo's environments
    bf16: bool = True  # bfloat16 matrix products (autocast); weights and Euler states stay float32
    resume: Path | None = None  # run directory to continue from its last checkpoint, with its arguments
    evaluate: Path | None = None  # run directory whose final policy to evaluate, nothing else
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    capture_video: bool = False  # film an episode of the final policy in MuJoCo (needs a GL backend)

    # base policy
    base: Path | None = None  # base policy (.safetensors); default: demos/<furniture>, or pretrained here
    pretrain: bool = False  # pretrain a base policy even where there is one
    dataset: Path | None = None  # demonstrations (.hdf5); default: those of the scripted assembler

    # rollouts and evaluation
    num_envs: Count = 16  # parallel environments (paper: 1000)
    horizon: Size = 0  # time limit in steps of 0.1 s; 0: the task's, 700 (one_leg) or 1000 (lamp)
    rollout_chunks: Size = 0  # rows of a rollout; 0: one episode, and the state after it
    exploration_steps: Size = 0  # noise |a - a_dagger_k| N(0, I), k of this many last Euler steps (authors: 2)
    zero_fraction: Share = 0.25  # share of environments and particles with x_0 = 0, as evaluated (authors: 0)
    buffer_iterations: Count = 60  # rollouts kept in the replay (authors: 20)
    eval_every: Count = 40  # every n-th iteration only evaluates (authors: 10)
    eval_episodes: Count = 30  # episodes from x_0 = 0, and again from noise, during training
    final_eval_episodes: Count = 100  # the same for the base, the final and the best policy

    # critic
    gamma: Share = 0.99  # discount per chunk (paper: 0.995)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0.5)
    target_momentum: Share = 0.99  # Polyak momentum of the target critics per critic step (paper: 0.998)
    rounds: Count = 8  # per iteration; each draws segments, then critic steps, then actor steps (authors: 16)
    critic_steps: Count = 128  # per round (paper: 128, of larger batches)
    critic_batch: Count = 256  # chunks per critic step (authors: all that were drawn)
    critic_lr: Weight = 5e-4  # Adam step size (paper: 5e-4)
    critic_layer_norm: bool = True  # LayerNorm and small initial weights; without: N(0, 0.1^2) (authors)
    segments: Count = 128  # replay segments drawn per round
    warmup_iterations: Size = 22  # training iterations before the actor starts (paper: 2, of 1000 episodes)

    # actor
    actor_steps: Size = 6  # per round (authors: 2)
    actor_batch: Count = 64  # states per actor step, each with n_particles particles (authors: 6250)
    n_particles: Count = 16  # P, particles per state (paper: 8)
    kernel: Literal["rbf", "delta"] = "rbf"  # of the transport field; delta: the ablation RLDT-Delta
    q_gradient: Literal["critic", "particles"] = "particles"  # derivative of Q (paper), or the way to high Q
    alpha: Weight = 1e-3  # temperature: weight of the repulsion, relative to |grad Q| (paper: 1e-3)
    transport_loss: Literal["literal", "authors"] = "authors"  # weight 1 - t in eq. (13), or 1 / (1 - t)
    transport_scale: Weight = 0.0  # factor on grad Q (authors: 1); 0: the task's, 30 (one_leg) or 8 (lamp)
    consistency_weight: Weight = 0.05  # of eq. (14) (paper: 0.5)
    constraint_weight: Weight = 0.2  # of eq. (15) (paper: 0.2)
    reference_every: Size = 0  # iterations between updates of the constraint's policy (authors: 1); 0: none
    actor_lr: Weight = 2e-4  # Adam step size (paper: 2e-5)
    actor_lr_end: Weight = 0.3  # factor on actor_lr that is reached linearly at the end (authors: 1)


PRESETS = {
    "paper": dict(
        iterations=250, num_envs=1000, exploration_steps=2, zero_fraction=0.0, buffer_iterations=20,
        eval_every=10, eval_episodes=500, final_eval_episodes=500, gamma=0.995, target_momentum=0.998, rounds=16,
        critic_batch=8192, critic_layer_norm=False, segments=3125, warmup_iterations=2, actor_steps=2,
        actor_batch=6250, n_particles=8, q_gradient="critic", transport_scale=1.0, consistency_weight=0.5,
        reference_every=1, actor_lr=2e-5, actor_lr_end=1.0, bf16=False,
    )
}  # fmt: skip


PRETRAINING = {  # of a base policy that is made here; pretrain_fm.py has these as flags
    "laptop": dict(epochs=200, batch=256, lr=1e-3, spread=1.0, chunk=8, euler_steps=8, width=512, depth=5,
                   time_dim=32, layer_norm=True, cond_mlp=[512, 256]),
    "paper": dict(epochs=8000, batch=256, lr=1e-4, spread=0.0, chunk=8, euler_steps=32, width=1024, depth=7,
                  time_dim=32, layer_norm=True, cond_mlp=[512, 64]),
}  # fmt: skip
TRANSPORT_SCALE = {"one_leg": 30.0, "lamp": 8.0}  # Lamp's particles are spread more widely
CRITIC_WIDTH = {"laptop": 256, "paper": 512}
SEGMENT = 16  # chunks of a replay segment (authors: the whole rollout)
FRESH = 0.33  # least share of the segments that comes from the newest rollout (authors)
ACTOR_WARMUP = 32  # actor steps over which its step size rises linearly (paper)


# ----------------------------------------------------------------------------------- networks
class Critic(nn.Module):
    """Two Q networks on (state and stage, action chunk), evaluated as one batched product."""

    def __init__(self, obs_dim: int, action_size: int, layer_norm: bool, width: int, depth: int = 3):
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
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round Q
            return torch.baddbmm(bias, x.float(), weight)[..., 0]


def stages_of(args: Args) -> int:
    """Pairs of parts that the task assembles: the largest return of an episode."""
    return len(FURNITURE[args.furniture].pairs)


def critic_obs(state: torch.Tensor, stage: torch.Tensor, args: Args) -> torch.Tensor:
    """What the critic sees: states (..., obs_dim), and in tasks of several pairs how many are assembled (...)."""
    if stages_of(args) == 1:
        return state
    return torch.cat([state, stage[..., None] / stages_of(args)], -1)


# -------------------------------------------------------------------------------- base policy
def limits(data: dict, spread: float) -> dict[str, np.ndarray]:
    """What is scaled to -1 and 1: `spread` deviations about the mean, or with 0 the whole range (DPPO)."""
    limits = {}
    for name, x in ("obs", data["state"]), ("action", data["action"]):
        low, high = x.min(0), x.max(0)
        if spread:
            mean, deviation = x.mean(0, dtype=float), x.std(0, dtype=float)
            low, high = mean - spread * deviation, mean + spread * deviation
        limits |= {f"{name}_min": low, f"{name}_max": high}
    return limits


def pretrain(args: Args, data: dict, checkpoint: Path, epochs: int, batch: int, lr: float, spread: float,
             start: Path | None = None, **sizes) -> FlowPolicy:  # fmt: skip
    """Flow matching on demonstrations, eq. (1)-(2): a policy of these sizes, its weights averaged.

    `start` is a policy whose weights and scaling to begin with. Every 500 steps all is kept in `checkpoint`.
    """
    policy = FlowPolicy(data["state"].shape[1], data["action"].shape[1], **sizes)
    policy.set_limits(**limits(data, spread))
    if start:
        policy.load_state_dict(FlowPolicy.load(start).state_dict())
    policy.to(args.device)
    first = chunk_starts(data["episode_ends"], policy.chunk)  # (n,)
    obs = policy.normalize(data["state"][first])  # (n, obs_dim)
    action = policy.from_env(data["action"][first[:, None] + np.arange(policy.chunk)])  # (n, D)
    averaged = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.velocity.parameters(), lr, weight_decay=1e-6, fused=True)
    steps = max(1, epochs * (len(obs) - len(obs) // 20) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 10)
    settings = dict(sizes, epochs=epochs, batch=batch, lr=lr, spread=spread, start=str(start), chunks=len(obs))
    progress = dict(step=0, loss=math.inf, order=torch.randperm(len(obs), device=args.device))
    parts = dict(settings=settings, progress=progress, policy=policy, averaged=averaged,
                 optimizer=optimizer, schedule=schedule)  # fmt: skip
    if checkpoint.exists():
        load_parts(checkpoint, parts, args.device)
    held_out, train = progress["order"].tensor_split([len(obs) // 20])
    held_out = held_out[:1024]
    for step in tqdm(range(progress["step"] + 1, steps + 1), desc="pretraining", mininterval=1):
        i = train[torch.randint(len(train), (batch,), device=args.device)]
        with autocast(args):
            loss = flow_matching_loss(policy.velocity, action[i], obs[i])  # eq. (2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 0.005)
        if step % 500 == 0 or step == steps:
            with torch.no_grad(), autocast(args):
                loss = flow_matching_loss(averaged.velocity, action[held_out], obs[held_out]).item()
            if not math.isfinite(loss):
                raise FloatingPointError("the flow-matching loss is not finite: pretrain with smaller steps")
            progress.update(step=step, loss=loss)
            save_parts(checkpoint, parts)
    made_in = str(data["meta"].get("backend", "unknown")).lower()
    averaged.info = dict(furniture=args.furniture, randomness=args.randomness, backend=made_in,
                         validation_loss=progress["loss"])  # fmt: skip
    return averaged


def get_base(args: Args, run: Run) -> FlowPolicy:
    """The base policy: given, shipped, or pretrained here; the run keeps a copy of its own."""
    kept = run.path / "base.safetensors"
    shipped = dataset.DEMOS / args.furniture / f"base_{args.randomness}.safetensors"
    if run.rank == 0 and not kept.exists():
        if args.base:
            policy = FlowPolicy.load(args.base)
        elif shipped.exists() and not (args.pretrain or args.dataset):
            policy = FlowPolicy.load(shipped)
        else:
            data = dataset.get(args.furniture, args.randomness, args.dataset)
            checkpoint = run.path / "pretraining.pt"
            policy = pretrain(args, data, checkpoint, **PRETRAINING[args.preset])
            checkpoint.unlink()
        policy.save(kept, **policy.info)
    run.barrier()
    policy = FlowPolicy.load(kept).to(args.device)
    if (policy.obs_dim, policy.action_dim) != (FURNITURE[args.furniture].obs_dim, 10):
        raise SystemExit(f"{args.base}: observations or actions have other sizes than {args.furniture}'s.")
    made_in = policy.info.get("backend", args.backend)
    if made_in != args.backend:
        print(f"{kept}: a base policy of {made_in}, now used in {args.backend}, whose physics differ.")
    torch.manual_seed(args.seed)  # the networks to come are the same, wherever the base policy is from
    return policy


# ------------------------------------------------------------------------------------- replay
class Replay(Ring):
    """The last `buffer_iterations` rollouts, each (rollout_chunks, num_envs), on the device.

    A row is a state, with the pairs assembled so far ("stage") and the action taken in it, or without: where an
    episode was cut, a row of valid = 0 holds the state that it ended in, so that the next state is always the
    next row. "reached" is the number of pairs that the row's episode assembled in the end.
    """

    def __init__(self, args: Args, obs_dim: int, action_size: int):
        shape = args.buffer_iterations, args.rollout_chunks, args.num_envs
        sizes = dict(state=(obs_dim,), action=(action_size,), stage=(), reward=(), terminated=(), truncated=(),
                     valid=(), reached=())  # fmt: skip
        super().__init__({name: torch.zeros(*shape, *size, device=args.device) for name, size in sizes.items()})

    def next(self) -> dict[str, torch.Tensor]:
        rollout = super().next()
        for name in "reward", "terminated", "truncated", "valid", "reached":
            rollout[name].zero_()
        return rollout

    def starts(self, segments: int, length: int) -> torch.Tensor:
        """Where segments begin, rows of (slot, time, environment): valid, equally many for each number of pairs reached."""
        valid, reached = self.slots["valid"].clone() > 0, self.slots["reached"]
        valid[:, valid.shape[1] - length :] = False
        groups, chosen = [valid & (reached == n) for n in reached.unique()], []
        groups = [group for group in groups if group.any()]
        for k, group in enumerate(groups):
            count = segments // len(groups) + (k < segments % len(groups))
            fresh = torch.zeros_like(group)
            fresh[self.slot] = group[self.slot]
            n_fresh = math.ceil(FRESH * count) if fresh.any() else 0
            for mask, n in (fresh, n_fresh), (group, count - n_fresh):
                index = mask.nonzero()
                if n:
                    chosen.append(index[torch.randint(len(index), (n,), device=index.device)])
        return torch.cat(chosen)

    def draw(self, segments: int) -> dict[str, torch.Tensor]:
        """Random segments, time first: state and stage (length + 1, segments, ...), all else (length, segments, ...)."""
        length = min(SEGMENT, self.slots["reward"].shape[1] - 1)
        slot, start, env = self.starts(segments, length).T
        t = start + torch.arange(length + 1, device=start.device)[:, None]  # (length + 1, segments)
        return {name: value[slot, t if name in ("state", "stage") else t[:-1], env] for name, value in self.slots.items()}


# -------------------------------------------------------------------- exploration and rollout
def make_envs(args: Args, num_envs: int, chunk: int):
    if args.backend == "isaac":
        return IsaacVectorEnv(num_envs, args.furniture, args.randomness, chunk, args.horizon)
    return FurnitureVectorEnv(num_envs, args.furniture, args.randomness, chunk, args.horizon, args.threads, stop_on_success=True)


def explore(trajectory: torch.Tensor, args: Args) -> torch.Tensor:
    """The action of a trajectory (K + 1, N, D) with noise |a - a_dagger_k| N(0, I), k one of its last steps."""
    action = trajectory[-1]
    if args.exploration_steps == 0:
        return action
    K, N, device = len(trajectory) - 1, len(action), action.device
    k = K - 1 - torch.randint(args.exploration_steps, (N,), device=device)
    n = torch.arange(N, device=device)
    x_k, x_next = trajectory[k, n], trajectory[k + 1, n]
    a_dagger = expected_target(x_k, k / K, (x_next - x_k) * K)  # eq. (8), the velocity read off the trajectory
    return action + (action - a_dagger).norm(dim=-1, keepdim=True) * torch.randn_like(action)


@torch.no_grad()
def collect(policy: FlowPolicy, envs, rollout: dict, seeds, args: Args):
    """Fills a rollout with exploration, episodes seeded from the iterator `seeds`; returns env steps and the pairs (num_envs,)
    that the first episode of each environment assembled: of later ones, those that take long are not seen to their end."""
    T, N, steps, assembled = args.rollout_chunks, args.num_envs, 0, np.zeros(args.num_envs, int)
    row, first = np.zeros(N, int), np.zeros(N, int)  # where each environment writes, and where its episode began
    stage, everyone, stops = np.zeros(N, int), np.arange(N), args.backend == "mujoco"
    obs = policy.normalize(envs.reset([next(seeds) for _ in range(N)], np.ones(N, bool))["state"])
    while (active := row < T - 1).any():  # the last row can only hold a final state
        x0 = torch.randn(N, policy.action_size, device=args.device)
        x0[: round(args.zero_fraction * N)] = 0
        with autocast(args):
            action = explore(policy.sample(obs, x0, trajectory=True), args)
        raw, reward, _, truncated, next_stage, length = envs.step(policy.to_env(action), active)
        next_obs, solved = policy.normalize(raw["state"]), next_stage == stages_of(args)
        ids = everyone[active]
        values = dict(state=obs, stage=stage, action=action, reward=reward, terminated=solved | truncated, valid=stage < stages_of(args))
        for name, value in values.items():
            rollout[name][row[ids], ids] = torch.as_tensor(value, device=args.device)[ids].to(rollout[name].dtype)
        steps += int(length[active].sum())
        row[ids] += 1
        stage = np.where(active, next_stage, stage)
        over = active & (truncated | (solved & stops))
        cut = active & ~over & (row == T - 1)
        for i in everyone[over | cut]:
            rollout["state"][row[i], i], rollout["stage"][row[i], i] = next_obs[i], float(stage[i])
            rollout["reached"][first[i] : row[i] + 1, i] = float(stage[i])
            if cut[i] and not solved[i]:
                rollout["truncated"][row[i] - 1, i] = 1  # the rollout ends here, not the episode
            if first[i] == 0:
                assembled[i] = stage[i]
        row[over], stage[over] = row[over] + 1, 0
        first[over] = row[over]
        obs, renew = next_obs, over & (row < T - 1)
        if renew.any():
            obs = policy.normalize(envs.reset([next(seeds) if r else 0 for r in renew], renew)["state"])
    return steps, assembled


# ------------------------------------------------------------------------------------- critic
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
def critic_target(policy: FlowPolicy, target: Critic, batch: dict, args: Args) -> torch.Tensor:
    """TD(lambda) targets (T, L); V(s') is the minimum of the target networks at an action of the policy."""
    state = batch["state"][1:].flatten(0, 1)  # (T * L, obs_dim)
    stage = batch["stage"][1:].flatten()
    with autocast(args):
        value = target(critic_obs(state, stage, args), policy.sample(state)).min(0).values.view_as(batch["reward"])
    most = stages_of(args)
    return td_lambda(batch["reward"], batch["terminated"], batch["truncated"], value, args.gamma, args.td_lambda, most)


def minibatches(rows: int, batch: int, steps: int, device: str) -> tuple[torch.Tensor, ...]:
    """Indices of `steps` minibatches; no row comes again before all others have come."""
    passes = -(-steps * batch // rows)
    order = torch.cat([torch.randperm(rows, device=device) for _ in range(passes)])
    return order[: steps * batch].split(batch)


def update_critic(critic: Critic, target: Critic, optimizer, obs, action, y, args: Args) -> dict:
    """One step on critic_obs (B, .), action (B, D), targets y (B,), and one of the target networks."""
    with autocast(args):
        q = critic(obs, action)  # (2, B)
    loss = (q - y).square().mean(1).sum()
    optimizer.zero_grad()
    loss.backward()
    average_gradients(critic.parameters())
    optimizer.step()
    with torch.no_grad():
        momentum = args.target_momentum
        torch._foreach_lerp_(list(target.parameters()), list(critic.parameters()), 1 - momentum)
    return {"losses/critic": loss.detach(), "diagnostics/q": q.detach().mean()}


# -------------------------------------------------------------------------------------- actor
def start_noise(shape, args: Args) -> torch.Tensor:
    """x_0 of particles (..., D): N(0, I), and zero for a share `zero_fraction` of them."""
    noise = torch.randn(shape, device=args.device)
    return noise * (torch.rand(*shape[:-1], 1, device=args.device) >= args.zero_fraction)


def actor_losses(velocity, reference, critic: Critic, obs, obs_q, trajectory, args: Args, k=None):
    """The three losses of eq. (16) on states obs (B, obs_dim) with trajectories (K + 1, B, P, D).

    The critic sees them as obs_q (B, .). Each particle has one step k (B, P) of its trajectory, drawn
    where it is not given.
    """
    K, (_, B, P, D) = len(trajectory) - 1, trajectory.shape
    device, action = obs.device, trajectory[-1]  # a, (B, P, D)
    obs = obs[:, None].expand(-1, P, -1)  # (B, P, obs_dim)
    obs_q = obs_q[:, None].expand(-1, P, -1)
    k = torch.randint(K, (B, P), device=device) if k is None else k
    x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]  # x_{t_k}, (B, P, D)
    t = k / K
    t_c = torch.randint(K, (B, P), device=device) / K
    x_c = interpolate(action, start_noise(action.shape, args), t_c)
    with autocast(args):
        both = torch.stack([x, x_c]), torch.stack([t, t_c]), obs.expand(2, -1, -1, -1)
        v, v_c = velocity(*both)  # in one pass
        with torch.no_grad():
            v_ref = reference(x_c, t_c, obs)
    a_dagger = expected_target(x, t, v)  # eq. (8)

    # the transport field moves the expected targets along grad Q at the particles
    query = a_dagger.detach()
    particles = (query if args.kernel == "delta" else action).clone().requires_grad_()
    with autocast(args):
        q = critic(obs_q.reshape(B * P, -1), particles.view(B * P, D)).mean(0)
    if args.q_gradient == "critic":
        (grad_q,) = torch.autograd.grad(q.sum(), particles)
    else:  # where those particles of the state lie that have a high Q
        grad_q = particle_gradient(q.detach().to(particles.dtype).view(B, P), particles.detach())
    grad_q = args.transport_scale * grad_q
    phi = transport_field(query, particles.detach(), grad_q, args.alpha, args.kernel)  # eq. (6)
    if args.transport_loss == "literal":
        transport = (a_dagger - (query + phi)).square().sum(-1).mean() / K  # eq. (13)
    else:
        transport = -((v * phi).sum(-1) / (K * (1 - t))).mean()  # the authors' form of eq. (13)

    # each step of a trajectory points at the action that the trajectory ends in
    consistency = ((a_dagger - action).square().sum(-1) / (K * (1 - t)).square()).mean()  # eq. (14)

    # the velocity stays near the reference's, on fresh points of the path
    constraint = (v_c - v_ref).square().sum(-1).mean()  # eq. (15)

    distance = torch.cdist(action, action).sum() / max(1, B * P * (P - 1))
    metrics = {
        "losses/transport": transport, "losses/consistency": consistency, "losses/constraint": constraint,
        "diagnostics/phi_norm": phi.norm(dim=-1).mean(), "diagnostics/grad_q_norm": grad_q.norm(dim=-1).mean(),
        "diagnostics/q_policy": q.mean(), "diagnostics/particle_distance": distance,
    }  # fmt: skip
    return transport, consistency, constraint, {key: value.detach() for key, value in metrics.items()}


def update_actor(policy: FlowPolicy, reference: FlowPolicy, critic: Critic, optimizer, obs, obs_q, args: Args):
    """Samples P particles in each state of obs (B, obs_dim), then takes one step on the loss of eq. (16)."""
    P = args.n_particles
    with torch.no_grad(), autocast(args):
        x0 = start_noise((len(obs), P, policy.action_size), args)
        trajectory = policy.sample(obs[:, None].expand(-1, P, -1), x0, trajectory=True)
    losses = actor_losses(policy.velocity, reference.velocity, critic, obs, obs_q, trajectory, args)
    transport, consistency, constraint, metrics = losses
    loss = transport + args.consistency_weight * consistency + args.constraint_weight * constraint  # eq. (16)
    optimizer.zero_grad()
    loss.backward()
    average_gradients(policy.velocity.parameters())
    optimizer.step()
    norms = torch._foreach_norm([p.grad for p in policy.velocity.parameters()])
    return metrics | {"diagnostics/actor_grad_norm": torch.stack(norms).norm()}


@torch.no_grad()
def velocity_distance(policy: FlowPolicy, base: FlowPolicy, obs: torch.Tensor) -> torch.Tensor:
    """How far the policy's velocity has moved from the base's, at x_0 ~ N(0, I) in states (B, obs_dim)."""
    x0 = torch.randn(len(obs), policy.action_size, device=obs.device)
    t = torch.zeros((), device=obs.device)
    return (policy.velocity(x0, t, obs) - base.velocity(x0, t, obs)).norm(dim=-1).mean()


# --------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy: FlowPolicy, envs, args: Args, episodes: int, seed: int) -> dict[str, float]:
    """Success and pairs assembled, from x_0 = 0 and, as `sampled`, from x_0 ~ N(0, I), from the same initial states."""
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
    return summary(stages[:episodes], "", args) | summary(stages[episodes:], "_sampled", args)


def summary(stages: np.ndarray, name: str, args: Args) -> dict[str, float]:
    """Success rate of episodes that assembled `stages` pairs, with its 95 % interval (Wilson), and their mean."""
    success = stages == stages_of(args)
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    return {
        f"eval_success{name}": success.mean(),
        f"eval_success{name}_low": interval.low, f"eval_success{name}_high": interval.high,
        f"eval_stages{name}": stages.mean(), f"eval_stages{name}_std": stages.std(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    set_up(args)
    if args.backend == "auto":
        args.backend = "mujoco" if isaac_missing() else "isaac"
    args.horizon = args.horizon or FURNITURE[args.furniture].horizon
    args.transport_scale = args.transport_scale or TRANSPORT_SCALE[args.furniture]
    eval_seed = 1_000_000 * (args.seed + 1)
    if args.evaluate:
        policy = FlowPolicy.load(args.evaluate / "policy.safetensors").to(args.device)
        envs = make_envs(args, args.num_envs, policy.chunk)
        scores = evaluate(policy, envs, args, args.final_eval_episodes, eval_seed)
        print(scores)
        return scores

    run = Run(args, f"{args.furniture}-{args.randomness}__{args.exp_name}__{args.seed}")
    policy = get_base(args, run)
    args.rollout_chunks = args.rollout_chunks or math.ceil(args.horizon / policy.chunk) + 1
    envs = make_envs(args, args.num_envs, policy.chunk)
    base, reference = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    obs_dim = critic_obs(torch.zeros(1, policy.obs_dim), torch.zeros(1), args).shape[1]
    critic = Critic(obs_dim, policy.action_size, args.critic_layer_norm, CRITIC_WIDTH[args.preset]).to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    replay = Replay(args, policy.obs_dim, policy.action_size)
    state = dict(env_steps=0, trained=0, actor_steps=0)
    run.checkpoints(state, policy, reference=reference, critic=critic, target=target, replay=replay,
                    actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)  # fmt: skip

    for iteration, spent in run.iterations():
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:  # this iteration only evaluates
            if run.rank == 0:
                episodes = args.final_eval_episodes if iteration == 0 or spent == 1 else args.eval_episodes
                row = evaluate(policy, envs, args, episodes, eval_seed)
                run.keep_best(row["eval_stages"])
        else:
            # 1. roll out with exploration
            with run.timer(row, "rollout_s"):
                first = 10_000 * (run.rank + run.world * iteration)
                seeds = itertools.count(100_000_000 * (args.seed % 20 + 1) + first)
                steps, assembled = collect(policy, envs, replay.next(), seeds, args)
            state["env_steps"] += steps * run.world
            row["train_success"], row["train_stages"] = (assembled == stages_of(args)).mean(), assembled.mean()

            for _ in range(args.rounds):
                # 2. the critic: TD(lambda) targets of some segments, then steps on minibatches of them
                with run.timer(row, "critic_s"):
                    batch = replay.draw(args.segments)
                    y = critic_target(policy, target, batch, args).flatten()
                    valid = batch["valid"].flatten() > 0  # states after success are left out
                    obs, action, y = batch["state"][:-1].flatten(0, 1)[valid], batch["action"].flatten(0, 1)[valid], y[valid]
                    obs_q = critic_obs(obs, batch["stage"][:-1].flatten()[valid], args)
                    for i in minibatches(len(y), args.critic_batch, args.critic_steps, args.device):
                        run.add(update_critic(critic, target, critic_optimizer, obs_q[i], action[i], y[i], args))
                # 3. the actor: particles in some of the same states follow the transport field
                with run.timer(row, "actor_s"):
                    warm = state["trained"] < args.warmup_iterations
                    for _ in range(0 if warm else args.actor_steps):
                        i = torch.randint(len(obs), (args.actor_batch,), device=args.device)
                        state["actor_steps"] += 1
                        decay = 1 + (args.actor_lr_end - 1) * spent
                        rise = min(1.0, state["actor_steps"] / ACTOR_WARMUP)
                        actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * rise
                        run.add(update_actor(policy, reference, critic, actor_optimizer, obs[i], obs_q[i], args))
            # 4. the reference of the constraint follows, or stays the base
            state["trained"] += 1
            run.add({"diagnostics/base_distance": velocity_distance(policy, base, obs[:256])})
            if args.reference_every and state["trained"] % args.reference_every == 0:
                reference.load_state_dict(policy.state_dict())
        run.log(row, state["env_steps"])
        run.save()

    if run.rank > 0:
        return None
    measure = lambda policy: evaluate(policy, envs, args, args.final_eval_episodes, eval_seed + 500_000)
    result = run.finish("eval_stages", measure, task=f"{args.furniture}-{args.randomness}", backend=args.backend,
                        env_steps=state["env_steps"])  # fmt: skip
    envs.close()
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__))
