"""What DPPO, ReinFlow and FPO share: PPO on rollouts of a flow policy, one decision per chunk.

A `Method` gives `main` its policy, how it acts, what it learns from and its update.
docs/baselines.md has the equations.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn

import rldt_furniture
import rldt_gym
import rldt_robomimic
from baselines.families import Family, Recorder, family_of, mix
from common.flow import FlowPolicy, ResidualBlock
from common.runs import Run, average, average_gradients, evaluate_stored
from common.settings import Count, Share, Size, Weight, set_up


# ---------------------------------------------------------------------------------- arguments
@dataclass
class PPOArgs:
    """Settings of the PPO family, each method's own besides."""

    # value
    gamma: Share = 0.99  # discount per chunk (DPPO: 0.99)
    gae_lambda: Share = 0.95  # lambda of generalised advantage estimation (DPPO: 0.95)
    value_lr: Weight = 1e-3  # Adam step size of the value network (DPPO: 1e-3)
    warmup_iterations: Size = 0  # training iterations before the actor starts (DPPO: 0)

    # updates
    epochs: Count = 5  # passes over each rollout (DPPO: 5)
    repeats: Count = 1  # times that a pass takes each of its rows (DPPO: 1, ReinFlow: 10)
    target_kl: Weight = 1.0  # KL divergence beyond which an iteration's updates end (DPPO: 1)
    lr_warmup: Count = 2  # iterations of the actor over which its step size rises linearly (DPPO: 10)

    exploration_steps: ClassVar[int] = 0  # no settings: the method's own noise explores
    buffer_iterations: ClassVar[int] = 1
    demos: ClassVar[bool] = False


@dataclass
class GymArgs(rldt_gym.TaskArgs):
    """The rollouts of DPPO; other tasks' are RLDT's."""

    # rollouts and evaluation
    num_envs: Count = 40  # parallel environments, per process under torchrun (DPPO: 40)
    rollout_chunks: Count = 250  # chunks of actions per environment and iteration (DPPO: 500)


SHARED = {
    "rldt_gym": GymArgs, "rldt_robomimic": rldt_robomimic.TaskArgs,
    "rldt_furniture": rldt_furniture.TaskArgs,
}  # fmt: skip


# -------------------------------------------------------------------------------------- value
class Value(nn.Module):
    """V(s) of what critics see (..., size) -> (...), the residual MLP of DPPO."""

    def __init__(self, size: int, width=256, depth=3):
        super().__init__()
        blocks = [ResidualBlock(width, nn.Mish, False) for _ in range((depth - 1) // 2)]
        self.layers = nn.Sequential(nn.Linear(size, width), *blocks, nn.Linear(width, 1))

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return self.layers(seen)[..., 0]


class RewardScale(nn.Module):
    """Divides rewards by the running deviation of the discounted return (Engstrom et al. 2020)."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        for name in ("mean", "var", "count"):  # of the returns in rollouts with reward
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        carry = torch.zeros(num_envs, dtype=torch.float64)
        self.register_buffer("carry", carry)  # discounted return of running episodes

    def forward(self, reward: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        """Rewards and ends of episodes (T, N) -> scaled rewards, clipped to +-10 deviations."""
        returns = torch.empty_like(reward, dtype=torch.float64)
        for t in range(len(reward)):
            returns[t] = self.carry = reward[t] + self.gamma * self.carry
            self.carry = self.carry * (1 - done[t])
        if average(reward.abs().mean()) > 0:
            self.update(returns)
        return (reward / self.scale()).float().clamp(-10, 10)

    def update(self, returns: torch.Tensor):
        """Merges mean and variance of the returns with those of earlier ones (Chan et al. 1979)."""
        mean = average(returns.mean())
        var = average((returns - mean).square().mean())
        total = self.count + returns.numel()
        weight = returns.numel() / total
        between = weight * (1 - weight) * (mean - self.mean).square()
        self.var = (1 - weight) * self.var + weight * var + between
        self.mean, self.count = self.mean + weight * (mean - self.mean), total

    def scale(self) -> torch.Tensor:
        """The deviation, at least a tenth of the mean's size; 1 before any reward."""
        deviation = torch.maximum(self.var.sqrt(), 0.1 * self.mean.abs())
        return torch.where(self.count > 0, deviation, 1.0)


def gae(reward, terminated, truncated, value, next_value, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), time first, all (T, N).

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t); V(s_{t+1}) is dropped
    where the episode terminated, A_{t+1} where it ended in either way: a time limit bootstraps.
    """
    advantage, a = torch.empty_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * (1 - terminated[t]) * next_value[t] - value[t]
        a = advantage[t] = delta + gamma * lam * (1 - terminated[t]) * (1 - truncated[t]) * a
    return advantage


@torch.no_grad()
def advantages(value: Value, reward_scale: RewardScale, rollout: dict, args: PPOArgs) -> dict:
    """The chunks of a rollout (T, N, ...), with their advantages and the targets of V: (rows, ...)."""
    terminated, truncated = rollout["terminated"], rollout["truncated"]
    reward = reward_scale(rollout["reward"], terminated + truncated)  # (T, N)
    v, next_v = value(torch.stack([rollout["seen"], rollout["next_seen"]]))
    advantage = gae(reward, terminated, truncated, v, next_v, args.gamma, args.gae_lambda)
    rollout |= {"advantage": advantage, "target": advantage + v}
    valid = rollout["valid"] > 0  # in Isaac Gym an episode goes on after success
    return {name: x[valid] for name, x in rollout.items()}


def update_value(value: Value, optimizer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One step of V(s) toward A + V(s), `target` (B,)."""
    loss = 0.5 * (value(batch["seen"]) - batch["target"]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    average_gradients(value.parameters())
    optimizer.step()
    return {"losses/value": loss.detach()}


# -------------------------------------------------------------------------------------- actor
def normalize(advantage: torch.Tensor) -> torch.Tensor:
    """Advantages of a minibatch (B,) with mean 0 and standard deviation 1."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """PPO's objective min(rho A, clip(rho, 1 - c, 1 + c) A), to be maximised."""
    return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))


@torch.no_grad()
def ratio_metrics(log_ratio: torch.Tensor, clip: float) -> dict[str, torch.Tensor]:
    """How far the policy is from the one that acted, in all processes."""
    ratio = log_ratio.exp()
    outside = ((ratio - 1).abs() > clip).float().mean()
    kl = average((ratio - 1 - log_ratio).mean())
    return {"diagnostics/kl": kl, "diagnostics/clip_fraction": outside}


# -------------------------------------------------------------------- exploration and rollout
def collect(family: Family, policy: FlowPolicy, act: Callable, storage, run: Run, iteration: int, row):
    """A rollout, values (T, N, ...), and its environment steps; the row learns how episodes ended."""
    recorder = Recorder(policy, lambda obs, x0: act(policy, obs, x0, family.args))
    kept = storage.next()
    steps = family.rollout(recorder, kept, run, iteration, row)
    rollout = family.transitions(kept)
    rollout |= dict(seen=rollout.pop("obs"), next_seen=rollout.pop("next_obs"))
    rollout["obs"] = rollout["seen"][..., : policy.obs_dim]
    for name in recorder.kept[0]:
        rollout[name] = torch.stack([kept[name] for kept in recorder.kept])
    return rollout, steps


# --------------------------------------------------------------------------------------- main
class Method(NamedTuple):
    """What a method gives to `main`."""

    policy_class: type[FlowPolicy]
    make_policy: Callable
    """(policy_class, base, family): a policy of that class, with the weights of the base policy."""
    act: Callable
    """(policy, obs, x0, args): actions (N, D) and, by name, what else the rollout is to keep."""
    make_batch: Callable
    """(policy, rows, args): rows of obs, seen, advantage, target and what `update_actor` needs."""
    update_actor: Callable
    """(policy, optimizer, batch, args): a step on some of these rows; returns metrics."""
    get_base: Callable = lambda family, run: family.base(run)
    """(family, run): the base policy."""
    schedule: Callable = lambda policy, spent, args: {}
    """(policy, spent, args): what changes over the run; returns metrics."""


def main(args, method: Method) -> dict | None:
    if args.preset == "paper" and not isinstance(args, rldt_gym.TaskArgs):
        raise SystemExit("--preset paper: the PPO family's are of Gym's tasks.")
    set_up(args)
    family = family_of(args, iterations=(31, 106))
    policy_class = mix(method.policy_class, family)
    if args.evaluate:
        return evaluate_stored(args, policy_class, family.measure)

    run = Run(args, f"{family.task}__{args.exp_name}__{args.seed}")
    base = method.get_base(family, run)
    value = Value(base.obs_dim + family.extra).to(args.device)
    policy = method.make_policy(policy_class, base, family).to(args.device)
    reward_scale = RewardScale(args.num_envs, args.gamma).to(args.device)
    tuned = [p for p in policy.parameters() if p.requires_grad]
    actor_optimizer = torch.optim.Adam(tuned, args.actor_lr, fused=True)
    value_optimizer = torch.optim.Adam(value.parameters(), args.value_lr, fused=True)
    storage = family.make_replay(policy)
    state = dict(env_steps=0, trained=0)
    run.checkpoints(
        state, policy, value=value, reward_scale=reward_scale, **family.parts,
        actor_optimizer=actor_optimizer, value_optimizer=value_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate(family.score, family.measure)
            family.reset(run, iteration)
            reward_scale.carry.zero_()
        else:
            # 1. roll out
            row |= method.schedule(policy, spent, args)
            with run.timer(row, "rollout_s"):
                if family.starts_anew:
                    reward_scale.carry.zero_()
                rollout, steps = collect(family, policy, method.act, storage, run, iteration, row)
            state["env_steps"] += steps

            with run.timer(row, "update_s"):
                # 2. advantages of the rollout's chunks
                rows = advantages(value, reward_scale, rollout, args)
                batch = method.make_batch(policy, rows, args)
                # 3. passes over all rows, until the policy is too far from the one that acted
                n = len(batch["obs"])
                decay = 1 + (args.actor_lr_end - 1) * spent
                rise = min(1.0, (state["trained"] + 1 - args.warmup_iterations) / args.lr_warmup)
                actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * rise
                m, device = n * args.repeats, args.device
                passes = (torch.randperm(m, device=device) % n for _ in range(args.epochs))
                for i in itertools.chain.from_iterable(each.split(args.batch) for each in passes):
                    minibatch = {name: x[i] for name, x in batch.items()}
                    metrics = update_value(value, value_optimizer, minibatch)
                    if state["trained"] >= args.warmup_iterations:
                        metrics |= method.update_actor(policy, actor_optimizer, minibatch, args)
                    run.add(metrics)
                    if metrics.get("diagnostics/kl", 0) > args.target_kl:
                        break
            state["trained"] += 1
            unexplained = rows["advantage"].var() / rows["target"].var().clamp_min(1e-8)
            row["diagnostics/explained_variance"] = 1 - unexplained.item()
            row["diagnostics/reward_scale"] = reward_scale.scale().item()
            obs = batch["obs"][:512]
            run.add({"diagnostics/base_distance": policy.distance(base, obs)})
        run.log(row, state["env_steps"])
        run.save()
    return family.finish(run, policy, state)
