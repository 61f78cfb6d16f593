"""FPO (Flow Policy Optimization, McAllister et al. 2025, arXiv 2507.21053) and FPO++.

    python -m baselines.fpo --task Hopper-v4                    # FPO++: a ratio per sample, and ASPO
    python -m baselines.fpo --task one_leg-low --form fpo       # FPO: one ratio per action

finetunes a pretrained flow policy by PPO whose likelihood ratio is that of flow-matching losses.
baselines/ppo.py has the loop, docs/baselines.md the equations.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from baselines import families, ppo
from common.flow import FlowPolicy, interpolate
from common.runs import autocast, average_gradients
from common.settings import Count, Share, Size, Weight


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(ppo.PPOArgs):
    """`official` are those of FPO++'s own finetuning, `paper` those of RLDT's authors."""

    exp_name: str = "fpo"  # name of the experiment, part of the run directory's name
    zero_fraction: Share = 0.0  # share of environments with x_0 = 0, without a valid ratio (official: 0)
    value_lr: Weight = 3e-4  # Adam step size of the value network (official: 1e-4)
    warmup_iterations: Size = 2  # training iterations before the actor starts (official: 1)

    # FPO
    form: Literal["fpo", "fpo++"] = "fpo++"  # a ratio of mean losses, or one per sample and ASPO
    samples: Count = 8  # N, pairs (epsilon, t) per action (official: 8 of FPO, 16 of FPO++)
    clip: Weight = 0.02  # trust region of the ratio (official: 0.01 to 0.03)
    batch: Count = 500  # chunks per update, each with N samples (official: about 375)
    actor_lr: Weight = 3e-5  # Adam step size of the actor (official: 1e-5)
    actor_lr_end: Weight = 1.0  # factor on actor_lr, reached linearly at the end (official: 1)


SHARED = ppo.SHARED
PRESETS = {
    "paper": dict(
        iterations=80, precision="float32", num_envs=100, rollout_chunks=500, eval_every=5,
        eval_episodes=100, batch=50_000, value_lr=1e-3, warmup_iterations=0, actor_lr=1e-4, lr_warmup=10,
        samples=16, clip=0.01,  # of FPO++; for --form fpo 8 and 0.05
    )
}  # fmt: skip
LOSS_CLAMP = 20.0  # at which flow-matching losses are cut off (official FPO++)
LOG_RATIO_CLAMP = 10.0  # at which log-ratios are cut off, both ways (official: 3 of FPO, 10 of FPO++)
MAX_GRAD_NORM = 1.0  # to which the actor's gradient is scaled down (official FPO++)


# -------------------------------------------------------------------- exploration and rollout
def make_policy(policy_class: type, base: FlowPolicy, family: families.Family) -> FlowPolicy:
    return copy.deepcopy(base)


def act(policy: FlowPolicy, obs: torch.Tensor, x0: torch.Tensor, args: Args):
    """Actions (N, D) of the flow, which are kept."""
    with autocast(args):
        action = policy.sample(obs, x0)
    return action, {"action": action}


# -------------------------------------------------------------------------------------- actor
def cfm_losses(policy: FlowPolicy, batch: dict, args: Args) -> torch.Tensor:
    """Flow-matching losses (B, N) of actions (B, D) at their N pairs noise (B, N, D) and t (B, N).

    The mean over the numbers of an action is summed over the actions of a chunk. FPO weighs it by t^2:
    that is the error of the noise, x_t - t v, in place of the velocity's.
    """
    action, noise, t = batch["action"][:, None], batch["noise"], batch["t"]
    with autocast(args):
        v = policy.velocity(interpolate(action, noise, t), t, batch["obs"][:, None])
    losses = policy.chunk * (v - (action - noise)).square().mean(-1)
    if args.form == "fpo":
        losses = t.square() * losses
    return losses.clamp_max(LOSS_CLAMP)


@torch.no_grad()
def make_batch(policy: FlowPolicy, rows: dict, args: Args) -> dict[str, torch.Tensor]:
    """Rows of a rollout, with pairs (epsilon, t) and losses at these."""
    shape, device = (len(rows["obs"]), args.samples), rows["obs"].device
    noise = torch.randn(*shape, policy.action_size, device=device)
    t = torch.randint(policy.euler_steps, shape, device=device) / policy.euler_steps
    batch, old = rows | {"noise": noise, "t": t}, []
    for i in torch.arange(len(noise), device=device).split(args.batch):
        old.append(cfm_losses(policy, {name: x[i] for name, x in batch.items()}, args))
    return batch | {"old_losses": torch.cat(old)}


def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, args: Args) -> torch.Tensor:
    """What is maximised, per ratio rho (B, N) and advantage A (B, 1).

    fpo:   min(rho A, clip(rho, 1 - c, 1 + c) A)
    fpo++: the same where A > 0, else SPO (Xie et al. 2024), rho A - |A| (rho - 1)^2 / (2 c)
    """
    clipped = ppo.clipped(ratio, advantage, args.clip)
    if args.form == "fpo":
        return clipped
    pulled_back = ratio * advantage - advantage.abs() * (ratio - 1).square() / (2 * args.clip)
    return torch.where(advantage > 0, clipped, pulled_back)  # (F2) of docs/baselines.md


def update_actor(policy: FlowPolicy, optimizer, batch: dict, args: Args) -> dict:
    """One step of PPO with the ratio exp(L_old - L_theta), of the mean losses or per sample."""
    log_ratio = batch["old_losses"] - cfm_losses(policy, batch, args)  # (B, N)
    if args.form == "fpo":
        log_ratio = log_ratio.mean(-1, keepdim=True)  # (B, 1)
    log_ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    advantage = ppo.normalize(batch["advantage"])[:, None]
    loss = -surrogate(log_ratio.exp(), advantage, args).mean()  # (F1)
    optimizer.zero_grad()
    loss.backward()
    parameters = list(policy.velocity.parameters())
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    metrics = {
        "losses/policy": loss.detach(), "losses/flow_matching": batch["old_losses"].mean(),
        "diagnostics/actor_grad_norm": norm,
    }  # fmt: skip
    return metrics | ppo.ratio_metrics(log_ratio, args.clip)


# --------------------------------------------------------------------------------------- main
def main(args) -> dict | None:
    functions = make_policy, act, make_batch, update_actor
    return ppo.main(args, ppo.Method(FlowPolicy, *functions))


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
