"""QAM (Q-learning with Adjoint Matching, arXiv 2601.14234).

    python -m baselines.qam --task Hopper-v4        # or one_leg-low, square-state, transport-state

finetunes a pretrained flow policy toward base * exp(inv_temp * Q) by adjoint matching. Rollouts, replay
and critic are RLDT's; QAM has its own actor and its own V(s'). docs/baselines.md has the equations.
In the comments "official" is this method's own code; "paper" and "authors" are those of RLDT.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from baselines import families, offpolicy
from common.runs import autocast, average_gradients
from common.settings import Count, Size, Weight
from rldt_gym import ACTOR_WARMUP, Critic


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    """Those of replay and critic are RLDT's."""

    exp_name: str = "qam"  # name of the experiment, part of the run directory's name

    # critic
    pessimism: Weight = 0.5  # V(s') = mean - pessimism * std of the targets; 1: minimum (official: 0.5)

    # exploration and actor
    exploration_steps: Size = 2  # noise |a - a_dagger_k|, k of this many last Euler steps (authors: 2)
    actor_steps: Size = 8  # per round (authors: 2)
    actor_batch: Count = 128  # states per actor step, a trajectory each (authors: 6250; official: 256)
    inv_temp: Weight = 15.0  # inverse temperature; on Gym Q is in mean chunk rewards (paper: 0.3)
    actor_lr: Weight = 1e-4  # Adam step size (authors: 2e-5; official: 3e-4)
    actor_lr_end: Weight = 0.1  # factor on actor_lr, reached linearly at the end (official: 1)


SHARED = offpolicy.SHARED
PRESETS = {
    **{task: dict(inv_temp=100.0) for task in ("lift", "can", "square")},  # Q is at most 1
    **{task: dict(inv_temp=150.0, exploration_steps=0) for task in ("transport", "one_leg", "lamp")},
    "paper": dict(actor_steps=2, actor_batch=6250, inv_temp=0.3, actor_lr=2e-5, actor_lr_end=1.0),
}
MAX_GRAD_NORM = 1.0  # the actor's gradient is scaled down to it (official: that of actor and critic)


# ------------------------------------------------------------------------------------- critic
class Pessimistic:
    """Target networks as one: mean - pessimism * std of their Q at the clipped action."""

    def __init__(self, target: Critic, pessimism: float, bound: float):
        self.target, self.pessimism, self.bound = target, pessimism, bound

    def encode(self, obs):
        return self.target.encode(obs)

    def __call__(self, seen: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """seen (B, .), action (B, D) -> (1, B)."""
        q = self.target(seen, action.clamp(-self.bound, self.bound))  # (networks, B)
        return (q.mean(0) - self.pessimism * q.std(0, correction=0))[None]


# -------------------------------------------------------------------------------------- actor
def noise_level(t: torch.Tensor, K: int) -> torch.Tensor:
    """sigma_t of the memoryless SDE, sigma_t^2 = 2 (1 - t + h) / (t + h), h = 1 / K."""
    return (2 * (1 - t + 1 / K) / (t + 1 / K)).sqrt()


@torch.no_grad()
def sample_memoryless(velocity, base, obs: torch.Tensor, x0: torch.Tensor, K: int) -> torch.Tensor:
    """Points x_0 .. x_K, (K + 1, B, D), of the memoryless SDE; the last is an Euler step of the base."""
    h, x, points = 1 / K, x0, [x0]
    for k in range(K - 1):
        t = torch.tensor(k * h, device=x.device)
        drift = 2 * velocity(x, t, obs) - x / (t + h)
        noise = noise_level(t, K) * torch.randn_like(x)
        x = x + h * drift + math.sqrt(h) * noise  # (Q1) of docs/baselines.md
        points.append(x)
    points.append(x + h * base(x, torch.tensor((K - 1) * h, device=x.device), obs))
    return torch.stack(points)


def lean_adjoint(base, q_of: Callable, obs: torch.Tensor, points: torch.Tensor, inv_temp: float):
    """Adjoint states g at x_0 .. x_{K-1}, (K, B, D), of points (K + 1, B, D) on states obs (B, obs_dim).

    g_1 = -inv_temp grad_a mean Q(s, a), then backwards g_t = g_{t+h} + h J^T g_{t+h} with
    J = d/dx [2 v_base(x, t + h, s) - x / (t + h)] at x_t. `q_of` maps actions (B, D) to Q (networks, B).
    Also returns Q and grad_a Q (B, D).
    """
    K = len(points) - 1
    h, action = 1 / K, points[-1].clone().requires_grad_()
    q = q_of(action)
    (grad_q,) = torch.autograd.grad(q.mean(0).sum(), action)
    g, adjoints = -inv_temp * grad_q, []
    for k in reversed(range(K)):
        x, t = points[k].clone().requires_grad_(), torch.tensor((k + 1) * h, device=g.device)
        (pulled,) = torch.autograd.grad(2 * base(x, t, obs) - x / t, x, g)
        g = g + h * pulled  # (Q2)
        adjoints.append(g)
    return torch.stack(adjoints[::-1]), q.detach(), grad_q


def adjoint_losses(velocity, base, obs, points: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
    """|(2 / sigma_t) (v_theta - v_base) + sigma_t g_t|^2 at x_0 .. x_{K-1}, (K,), means over states."""
    K = len(adjoint)
    t = torch.arange(K, device=obs.device)[:, None] / K  # (K, 1)
    sigma = noise_level(t, K)[..., None]
    with torch.no_grad():
        v_base = base(points[:-1], t, obs)
    v = velocity(points[:-1], t, obs)
    return (2 / sigma * (v - v_base) + sigma * adjoint).square().sum(2).mean(1)  # (Q3)


def update_actor(policy, base, critic: Critic, optimizer, seen: torch.Tensor, args, bound=1.0) -> dict:
    """One step of adjoint matching on states seen (B, .); `critic` gives g_1 at clipped actions."""
    obs = seen[:, : policy.obs_dim]
    q_of = lambda action: critic(seen, action.clamp(-bound, bound))
    x0 = torch.randn(len(obs), policy.action_size, device=obs.device)
    x0 *= torch.rand(len(obs), 1, device=obs.device) >= args.zero_fraction
    networks = policy.velocity, base.velocity
    with autocast(args):
        points = sample_memoryless(*networks, obs, x0, policy.euler_steps)  # (K + 1, B, D)
        adjoint, q, grad_q = lean_adjoint(base.velocity, q_of, obs, points, args.inv_temp)  # (K, B, D)
        loss = adjoint_losses(*networks, obs, points, adjoint).sum()
    optimizer.zero_grad()
    loss.backward()
    parameters = list(policy.velocity.parameters())
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    return {
        "losses/adjoint": loss.detach(), "diagnostics/q_policy": q.mean(),
        "diagnostics/grad_q_norm": grad_q.norm(dim=-1).mean(),
        "diagnostics/adjoint_norm": adjoint.norm(dim=-1).mean(), "diagnostics/actor_grad_norm": norm,
    }  # fmt: skip


# ------------------------------------------------------------------------------------- method
class QAM(offpolicy.Method):
    """The policy is the base at first; its V(s') is pessimistic."""

    def __init__(self, base, family, args):
        super().__init__(base, family, args)
        self.bound, self.count = family.bound, dict(actor_steps=0)
        self.optimizer = torch.optim.Adam(self.policy.velocity.parameters(), args.actor_lr, fused=True)
        self.parts = dict(actor_optimizer=self.optimizer, count=self.count)

    def value_of(self, target):
        return self.policy, Pessimistic(target, self.args.pessimism, self.bound)

    def update(self, seen, action, target, warm, spent):
        args = self.args
        for _ in range(0 if warm else args.actor_steps):
            i = torch.randint(len(seen), (args.actor_batch,), device=args.device)
            self.count["actor_steps"] += 1
            decay = 1 + (args.actor_lr_end - 1) * spent
            rise = min(1.0, self.count["actor_steps"] / ACTOR_WARMUP)
            self.optimizer.param_groups[0]["lr"] = args.actor_lr * decay * rise
            rest = self.optimizer, seen[i], args, self.bound
            yield update_actor(self.policy, self.base, target, *rest)


def main(args) -> dict | None:
    return offpolicy.main(args, QAM)


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
