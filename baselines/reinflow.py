"""ReinFlow (Zhang et al. 2025, arXiv 2505.22094).

    python -m baselines.reinflow --task Hopper-v4   # or one_leg-low, square-state, transport-state

finetunes a pretrained flow policy by PPO on its chain of Euler steps, to which a small network adds
Gaussian noise of learned size. baselines/ppo.py has the loop, docs/baselines.md the equations.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from baselines import families, ppo
from common.flow import FlowPolicy, time_embedding
from common.runs import autocast, average_gradients
from common.settings import Count, Size, Weight


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(ppo.PPOArgs):
    """`official` are the settings of ReinFlow's own code; those of OFFICIAL differ by task."""

    exp_name: str = "reinflow"  # name of the experiment, part of the run directory's name
    value_lr: Weight | None = None  # Adam step size of the value network; None: the official one
    warmup_iterations: Size | None = 2  # training iterations before the actor starts; None: official

    # ReinFlow
    euler_steps: Size = 4  # K, Euler steps from noise to action (official: 4); 0: the base policy's
    batch: Count = 2500  # chunks per update, four updates a pass (official: 50 000, also four)
    clip: Weight = 0.01  # PPO's clipping range of the ratio (official: 0.01)
    entropy_weight: Weight = 0.03  # of the entropy rate per dimension of the noise (official: 0.03)
    clone_weight: Weight | None = None  # of the distance to the base's actions; None: the official one
    sigma_min: Weight = 0.1  # smallest deviation of the noise, in normalised actions (official: 0.10)
    sigma_max: Weight = 0.24  # largest deviation of the noise at the start (official: 0.24)
    actor_lr: Weight | None = None  # Adam step size of actor and noise; None: the official one
    actor_lr_end: Weight | None = None  # factor on actor_lr, reached linearly at the end; None: official


SHARED = ppo.SHARED
PRESETS = {
    "paper": dict(
        iterations=1000, precision="float32", rollout_chunks=500, zero_fraction=0.0, eval_every=10,
        eval_episodes=40, repeats=10, batch=50_000, warmup_iterations=None, lr_warmup=10,
    )
}  # fmt: skip
OFFICIAL = {  # in the official files of the tasks, which anneal actor_lr along a cosine
    "Hopper-v4": dict(
        actor_lr=4.5e-5, actor_lr_end=0.44, value_lr=6.5e-4, warmup_iterations=0, clone_weight=0.1,
    ),
    "Walker2d-v4": dict(
        actor_lr=4e-4, actor_lr_end=1.0, value_lr=4e-3, warmup_iterations=5, clone_weight=0.0,
    ),
    "HalfCheetah-v4": dict(
        actor_lr=3e-5, actor_lr_end=0.5, value_lr=3e-4, warmup_iterations=10, clone_weight=0.0,
    ),
}  # fmt: skip
SIGMA_HOLD = 0.35  # share of the run during which sigma_max holds (official)
SIGMA_END = 0.7  # to this share of the way from sigma_min to sigma_max it then falls (official)


# ------------------------------------------------------------------------------------- policy
class NoiseNet(nn.Module):
    """Deviation of the noise, (time embedding (..., time_dim), obs (..., obs_dim)) -> (..., D)."""

    def __init__(self, time_dim: int, obs_dim: int, action_size: int, width=64):
        super().__init__()
        hidden = nn.Linear(time_dim + obs_dim, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        self.layers = nn.Sequential(*hidden, nn.Linear(width, action_size))

    def forward(self, time: torch.Tensor, obs: torch.Tensor, least: float, most: float) -> torch.Tensor:
        """The log-variance lies between those of `least` and `most`, by a tanh."""
        low, high = 2 * math.log(least), 2 * math.log(most)
        share = (self.layers(torch.cat([time, obs], -1)).tanh() + 1) / 2
        return (0.5 * (low + (high - low) * share)).exp()


class NoisyPolicy(FlowPolicy):
    """A flow policy whose points are clipped to +-bound after every step, and its noise in training.

    `frozen` is the velocity of the base policy.
    """

    def __init__(self, obs_dim, action_dim, chunk, euler_steps, time_dim, bound=1.0, **network):
        noise = NoiseNet(time_dim, obs_dim, chunk * action_dim)
        super().__init__(obs_dim, action_dim, chunk, euler_steps, time_dim=time_dim, **network)
        self.config["bound"], self.bound = bound, bound  # other policies do not load this one
        self.noise = noise
        self.frozen = copy.deepcopy(self.velocity).requires_grad_(False)

    def step(self, velocity, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """Where a step goes without noise, clip(x + v(x, t, s) / K), x (..., D), t (...)."""
        return (x + velocity(x, t, obs) / self.euler_steps).clamp(-self.bound, self.bound)

    def transition(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor, args: Args):
        """Mean and deviation (..., D) of the next point, the latter between sigma_min and `limit`."""
        with autocast(args):
            mean = self.step(self.velocity, x, t, obs)
            time = self.velocity.time_mlp(time_embedding(t, self.velocity.time_dim))
        time = time.detach().float().expand(*x.shape[:-1], -1)
        return mean, self.noise(time, obs, args.sigma_min, self.limit)

    @torch.no_grad()
    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None) -> torch.Tensor:
        """Action chunks (..., D) for cond (..., obs_dim), from x0 or noise, without learned noise."""
        if x0 is None:
            x0 = torch.randn(*cond.shape[:-1], self.action_size, device=cond.device)
        return self.integrate(self.velocity, cond, x0)

    def integrate(self, velocity, cond: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Where the steps of a velocity lead from x (..., D), without learned noise."""
        for k in range(self.euler_steps):
            x = self.step(velocity, x, torch.tensor(k / self.euler_steps, device=cond.device), cond)
        return x


def make_policy(policy_class: type, base: FlowPolicy, family: families.Family) -> NoisyPolicy:
    """The base policy with new noise; a flow can be integrated in any number of steps."""
    steps = family.args.euler_steps or base.euler_steps
    policy = policy_class(**base.config | dict(euler_steps=steps, bound=family.bound))
    policy.load_state_dict(base.state_dict(), strict=False)
    policy.frozen.load_state_dict(base.velocity.state_dict())
    return policy


def set_limit(policy: NoisyPolicy, spent: float, args: Args) -> dict[str, float]:
    """The noise's largest deviation, `limit`, holds at first, then it falls along a cosine."""
    end = args.sigma_min + SIGMA_END * (args.sigma_max - args.sigma_min)
    fallen = max(0.0, spent - SIGMA_HOLD) / (1 - SIGMA_HOLD)
    policy.limit = end + (args.sigma_max - end) * (1 + math.cos(math.pi * fallen)) / 2
    return {"diagnostics/sigma_limit": policy.limit}


# -------------------------------------------------------------------- exploration and rollout
def act(policy: NoisyPolicy, obs: torch.Tensor, x0: torch.Tensor, args: Args):
    """Actions (N, D) by noisy steps, and their chain x_0 .. x_K, (N, K + 1, D)."""
    x, chain, K = x0, [x0], policy.euler_steps
    for k in range(K):
        mean, sigma = policy.transition(x, torch.tensor(k / K, device=obs.device), obs, args)
        x = mean + sigma * torch.randn_like(x).clamp(-3, 3)
        chain.append(x)
    action = chain[-1] = x.clamp(-policy.bound, policy.bound)
    return action, {"chain": torch.stack(chain, 1)}


# -------------------------------------------------------------------------------------- actor
def chain_log_prob(policy: NoisyPolicy, obs: torch.Tensor, chain: torch.Tensor, args: Args):
    """Log-probability and entropy rate (B,) of chains (B, K + 1, D), per number drawn.

    log p = log N(x_0; 0, I) + sum_k log N(x_{k+1}; clip(x_k + v(x_k, k / K, s) / K), sigma(s, k / K)^2).
    It shares the grid k / K with `act`, so that the ratio of the first update is 1.
    """
    K, D = policy.euler_steps, chain.shape[-1]
    t = torch.arange(K, device=obs.device) / K
    mean, sigma = policy.transition(chain[:, :-1], t, obs[:, None].expand(-1, K, -1), args)
    steps = torch.distributions.Normal(mean, sigma)  # (R1) of docs/baselines.md
    start = torch.distributions.Normal(torch.zeros_like(chain[:, 0]), 1.0)
    log_prob = start.log_prob(chain[:, 0]).sum(-1) + steps.log_prob(chain[:, 1:]).sum((1, 2))
    entropy = start.entropy().sum(-1) + steps.entropy().sum((1, 2))
    return (log_prob / ((K + 1) * D)).clamp(-1, 1), entropy / ((K + 1) * D)  # (R2)


@torch.no_grad()
def make_batch(policy: NoisyPolicy, rows: dict, args: Args) -> dict[str, torch.Tensor]:
    """Rows of a rollout, with the log-probabilities of their chains."""
    parts = zip(*(rows[name].split(args.batch) for name in ("obs", "chain")), strict=True)
    old = [chain_log_prob(policy, obs, chain, args)[0] for obs, chain in parts]
    return rows | {"old_log_prob": torch.cat(old)}


def clone_loss(policy: NoisyPolicy, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """Mean squared distance to the actions of the base policy from x_0 = 0, in states obs."""
    x0 = torch.zeros(len(obs), policy.action_size, device=obs.device)
    with autocast(args):
        action = policy.integrate(policy.velocity, obs, x0)
        with torch.no_grad():
            base_action = policy.integrate(policy.frozen, obs, x0)
    return (action - base_action).square().mean()  # (R3)


def update_actor(policy: NoisyPolicy, optimizer, batch: dict, args: Args) -> dict:
    """One step of PPO on whole chains, a ratio per chunk.

    The noise has an entropy bonus, and where `clone_weight` is not 0 the base policy attracts.
    """
    log_prob, entropy = chain_log_prob(policy, batch["obs"], batch["chain"], args)
    log_ratio = log_prob - batch["old_log_prob"]
    loss = -ppo.clipped(log_ratio.exp(), ppo.normalize(batch["advantage"]), args.clip).mean()
    total = loss - args.entropy_weight * entropy.mean()
    metrics = {"losses/policy": loss.detach(), "losses/entropy": entropy.detach().mean()}
    if args.clone_weight:
        clone = clone_loss(policy, batch["obs"], args)
        total += args.clone_weight * clone
        metrics["losses/clone"] = clone.detach()
    optimizer.zero_grad()
    total.backward()
    average_gradients([*policy.velocity.parameters(), *policy.noise.parameters()])
    optimizer.step()
    gradients = [p.grad for p in policy.velocity.parameters()]
    metrics["diagnostics/actor_grad_norm"] = nn.utils.get_total_norm(gradients)
    return metrics | ppo.ratio_metrics(log_ratio, args.clip)


# --------------------------------------------------------------------------------------- main
def main(args) -> dict | None:
    if not 0 < args.sigma_min <= args.sigma_max:
        raise SystemExit("--sigma-min must be above 0 and at most --sigma-max")
    official = OFFICIAL.get(getattr(args, "env_id", ""), OFFICIAL["Hopper-v4"])
    for name, value in official.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    functions = make_policy, act, make_batch, update_actor
    return ppo.main(args, ppo.Method(NoisyPolicy, *functions, schedule=set_limit))


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
