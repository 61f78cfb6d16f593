"""DPPO (Diffusion Policy Policy Optimization, Ren et al. 2024, arXiv 2409.00588).

    python -m baselines.dppo --task Hopper-v4       # or one_leg-low, square-state, transport-state
    python -m baselines.dppo --task Hopper-v4 --form diffusion      # the original, on a diffusion policy

finetunes a pretrained policy by PPO in the decision process of its last denoising steps, each a
Gaussian. baselines/ppo.py has the loop, docs/baselines.md the equations.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import families, ppo
from common.flow import FlowPolicy, fit
from common.runs import autocast, average_gradients
from common.settings import Count, Share, Size, Weight
from demos.dataset import chunk_starts
from rldt_gym import PRETRAINING, TaskArgs

Deviation = Annotated[float, 1e-6, 1e9]  # the type of a setting, with its bounds


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(ppo.PPOArgs):
    """`official` are the settings of DPPO's own code."""

    exp_name: str = "dppo"  # name of the experiment, part of the run directory's name

    # DPPO
    form: Literal["flow", "diffusion"] = "flow"  # finetune RLDT's flow, or a diffusion of its own
    tuned_steps: Size = 0  # K', the last steps, noisy and trained (official: 10 of 20); 0: half of them
    sigma: Deviation = 0.1  # least of a noisy step, in normalised actions (official: 0.1)
    gamma_denoising: Share = 0.99  # factor on the advantage per step still to come (official: 0.99)
    batch: Count = 2500  # denoising steps per update (official: 50 000)
    clip: Weight = 0.02  # PPO's clipping range of the ratio (official: 0.01)
    actor_lr: Weight = 3e-4  # Adam step size of the actor (official: 1e-4)
    actor_lr_end: Weight = 1.0  # factor on actor_lr, reached linearly at the end (official: 1)


SHARED = ppo.SHARED
# official: 1e-4, and a clip that rises to 0.01 over the steps
ROBOMIMIC = dict(actor_lr=3e-5, clip=0.01, warmup_iterations=2)
FURNITURE = ROBOMIMIC | dict(actor_lr=1e-5, clip=0.001, sigma=0.04, gamma_denoising=0.9)  # official
PRESETS = {
    **dict.fromkeys(("lift", "can", "square", "transport"), ROBOMIMIC),
    **dict.fromkeys(("one_leg", "lamp"), FURNITURE),
    "paper": dict(
        iterations=1000, precision="float32", rollout_chunks=500, zero_fraction=0.0, eval_every=10,
        eval_episodes=40, batch=50_000, clip=0.01, actor_lr=1e-4, lr_warmup=10,
    )
}  # fmt: skip
DIFFUSION_STEPS = 20  # of a diffusion that is pretrained here (official)
LIKELIHOOD_SIGMA = 0.1  # least deviation in likelihoods, where steps may have less (official)


# ------------------------------------------------------------------------------------- policy
def noise_schedule(K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """abar (K + 1,) of points x_0 .. x_K and alpha (K,) of the steps between them, a cosine schedule.

    x_k = sqrt(abar_k) a + sqrt(1 - abar_k) eps (Nichol and Dhariwal 2021); x_K is the action a.
    """
    level = torch.arange(K, -1, -1, dtype=torch.float64) / K  # 1 at k = 0
    signal = torch.cos((level + 0.008) / 1.008 * math.pi / 2).square()
    alpha = (signal[:-1] / signal[1:]).clamp_min(1e-3)
    alpha_bar = torch.cat([alpha.flip(0).cumprod(0).flip(0), torch.ones(1)])
    return alpha_bar.float(), alpha.float()


def noise_loss(policy: FlowPolicy, action: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the noise in actions (B, D) at obs (B, obs_dim) (Ho et al. 2020)."""
    K, device = policy.euler_steps, action.device
    k = torch.randint(K, (len(action),), device=device)
    noise, signal = torch.randn_like(action), noise_schedule(K)[0].to(device)[k][:, None]
    x = signal.sqrt() * action + (1 - signal).sqrt() * noise
    return F.mse_loss(policy.velocity(x, k / K, obs), noise)


class DenoisingPolicy(FlowPolicy):
    """A policy whose point k of K + 1 is x_k, from noise x_0 to the action x_K, in both forms.

    `flow` steps along a velocity. `diffusion` steps along the posterior of a DDPM (Ho et al. 2020), and
    its network predicts the noise. The steps before the last `tuned_steps` stay the base's, `frozen`.
    """

    def __init__(self, *sizes, form="flow", tuned_steps=0, **network):
        super().__init__(*sizes, **network)
        self.config |= dict(form=form, tuned_steps=tuned_steps)
        self.form, self.tuned_steps = form, tuned_steps
        self.frozen = copy.deepcopy(self.velocity).requires_grad_(False)
        alpha_bar, alpha = noise_schedule(self.euler_steps)
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("alpha", alpha, persistent=False)

    def step(self, network, x: torch.Tensor, k: torch.Tensor, obs: torch.Tensor):
        """Mean (..., D) of x_{k+1} given x_k (..., D), k (...) and obs; its standard deviation (...)."""
        output = network(x, k / self.euler_steps, obs)
        if self.form == "flow":
            return x + output / self.euler_steps, torch.zeros_like(k, dtype=x.dtype)
        now, after, alpha = self.alpha_bar[k], self.alpha_bar[k + 1], self.alpha[k]
        action = (x - (1 - now).sqrt()[..., None] * output) / now.sqrt()[..., None]
        to_action, to_x = after.sqrt() * (1 - alpha) / (1 - now), alpha.sqrt() * (1 - after) / (1 - now)
        mean = to_action[..., None] * action.clamp(-1, 1) + to_x[..., None] * x
        return mean, ((1 - alpha) * (1 - after) / (1 - now)).sqrt()

    def network(self, k: int) -> nn.Module:
        """The network of step k: the tuned one in the last steps."""
        return self.velocity if k >= self.euler_steps - self.tuned_steps else self.frozen

    @torch.no_grad()
    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None) -> torch.Tensor:
        """Action chunks (..., D) for cond (..., obs_dim), without the noise of training.

        The diffusion draws its own noise, except where x0 is 0: there it follows the means of its steps.
        """
        if x0 is None:
            x0 = torch.randn(*cond.shape[:-1], self.action_size, device=cond.device)
        x, moving = x0, (x0 != 0).any(-1, keepdim=True)
        for k in range(self.euler_steps):
            x, std = self.step(self.network(k), x, torch.tensor(k, device=cond.device), cond)
            if self.form == "diffusion":
                x = x + std * moving * torch.randn(x.shape, device=x.device)
        return x


def make_policy(policy_class: type, base: FlowPolicy, family: families.Family) -> DenoisingPolicy:
    """The base policy, whose last steps are to be tuned."""
    args = family.args
    if args.tuned_steps > base.euler_steps:
        raise SystemExit(f"--tuned-steps {args.tuned_steps}: the base has {base.euler_steps} steps.")
    tuned = args.tuned_steps or base.euler_steps // 2
    policy = policy_class(**base.config, form=args.form, tuned_steps=tuned)
    policy.load_state_dict(base.state_dict(), strict=False)
    policy.frozen.load_state_dict(base.velocity.state_dict())
    return policy


# -------------------------------------------------------------------------------- base policy
def pretrain(family, checkpoint: Path, epochs: int, batch: int, lr: float, **sizes) -> FlowPolicy:
    """The family's pretraining, by the loss of the noise: the base of the diffusion."""
    data, args = family.demonstrations(), family.args
    policy = FlowPolicy(data.obs.shape[1], data.action.shape[1], **sizes).to(args.device)
    policy.set_limits(**data.limits)
    first = chunk_starts(data.episode_ends, policy.chunk)  # (n,)
    obs = policy.normalize(data.obs[first])  # (n, obs_dim)
    action = policy.from_env(data.action[first[:, None] + np.arange(policy.chunk)])  # (n, D)

    def loss():
        i = torch.randint(len(obs), (batch,), device=args.device)
        return noise_loss(policy, action[i], obs[i])

    averaged = fit(policy, loss, max(1, epochs * len(obs) // batch), lr, args, checkpoint)
    averaged.info = dict(env_id=family.task, form="diffusion")
    return averaged


def get_base(family: families.Family, run) -> FlowPolicy:
    """The family's base policy; the diffusion's is given, or pretrained here."""
    args, settings = family.args, PRETRAINING[family.args.preset] | dict(euler_steps=DIFFUSION_STEPS)

    def make(checkpoint: Path) -> FlowPolicy:
        if not args.base:
            return pretrain(family, checkpoint, **settings)
        policy = FlowPolicy.load(args.base, env_id=family.task)
        if "form" not in policy.info or policy.obs_dim != family.envs.obs_dim:
            raise SystemExit(f"{args.base}: no diffusion for {family.task}.")
        return policy

    return run.keep_base(make, FlowPolicy) if args.form == "diffusion" else family.base(run)


# -------------------------------------------------------------------- exploration and rollout
def act(policy: DenoisingPolicy, obs: torch.Tensor, x0: torch.Tensor, args: Args):
    """Actions (N, D) by noisy tuned steps, and the chain of these, (N, K' + 1, D)."""
    x, chain, K = x0, [], policy.euler_steps
    for k in range(K):
        tuned = k >= K - policy.tuned_steps
        with autocast(args):
            mean, std = policy.step(policy.network(k), x, torch.tensor(k, device=obs.device), obs)
        if tuned:
            chain.append(x)
            std = std.clamp_min(args.sigma)
        x = mean + std * torch.randn_like(x).clamp(-3, 3)
    return x, {"chain": torch.stack([*chain, x], 1)}


# -------------------------------------------------------------------------------------- actor
def step_log_prob(policy: DenoisingPolicy, batch: dict, args: Args) -> torch.Tensor:
    """log N(x_{k+1}; mean_k, max(sigma_k, sigma, 0.1)^2) of steps (B,), clamped and averaged over D."""
    with autocast(args):
        mean, std = policy.step(policy.velocity, batch["x"], batch["k"], batch["obs"])
    std = std.clamp_min(max(args.sigma, LIKELIHOOD_SIGMA))
    steps = torch.distributions.Normal(mean, std[..., None].expand_as(mean))
    return steps.log_prob(batch["x_next"]).clamp(-5, 2).mean(-1)  # (D1) of docs/baselines.md


@torch.no_grad()
def make_batch(policy: DenoisingPolicy, rows: dict, args: Args) -> dict[str, torch.Tensor]:
    """Rows of a rollout as denoising steps (n * K', ...), with their log-probabilities."""
    chain, K = rows["chain"], policy.euler_steps  # (rows, K' + 1, D)
    batch = {"x": chain[:, :-1].flatten(0, 1), "x_next": chain[:, 1:].flatten(0, 1)}
    k = torch.arange(K - policy.tuned_steps, K, device=chain.device)
    batch["k"] = k.repeat(len(chain))
    for name in ("obs", "seen", "advantage", "target"):
        batch[name] = rows[name].repeat_interleave(len(k), 0)
    old = []
    for i in torch.arange(len(batch["k"]), device=chain.device).split(args.batch):
        old.append(step_log_prob(policy, {name: x[i] for name, x in batch.items()}, args))
    return batch | {"old_log_prob": torch.cat(old)}


def update_actor(policy: DenoisingPolicy, optimizer, batch: dict, args: Args) -> dict:
    """One step of PPO on denoising steps, a ratio each; later steps discount a step's advantage."""
    log_ratio = step_log_prob(policy, batch, args) - batch["old_log_prob"]
    later = policy.euler_steps - 1 - batch["k"]
    advantage = ppo.normalize(batch["advantage"]) * args.gamma_denoising**later
    loss = -ppo.clipped(log_ratio.exp(), advantage, args.clip).mean()  # (D2)
    optimizer.zero_grad()
    loss.backward()
    parameters = list(policy.velocity.parameters())
    average_gradients(parameters)
    optimizer.step()
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    metrics = {"losses/policy": loss.detach(), "diagnostics/actor_grad_norm": norm}
    return metrics | ppo.ratio_metrics(log_ratio, args.clip)


# --------------------------------------------------------------------------------------- main
def main(args) -> dict | None:
    if args.form == "diffusion" and not isinstance(args, TaskArgs):
        raise SystemExit("--form diffusion: has a base on Gym's tasks alone; use --form flow.")
    functions = make_policy, act, make_batch, update_actor, get_base
    return ppo.main(args, ppo.Method(DenoisingPolicy, *functions))


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
