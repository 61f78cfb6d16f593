"""QAM (Q-learning with Adjoint Matching, arXiv 2601.14234).

    python -m baselines.qam --env-id Hopper-v4

finetunes a pretrained flow policy toward base * exp(inv_temp * Q) by adjoint matching. Rollouts, replay
and critic are RLDT's; QAM has its own actor and its own V(s'). docs/baselines.md has the equations.
In the comments "official" is this method's own code; "paper" and "authors" are those of RLDT.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn

import rldt_gym as family
from common.runs import Run, autocast, average_gradients, derive_seed, evaluate_stored
from common.settings import Count, Share, Size, Weight, launch, set_up


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(family.TaskArgs):
    """Those of replay and critic are RLDT's."""

    exp_name: str = "qam"  # name of the experiment, part of the run directory's name

    # exploration and replay
    exploration_steps: Size = 2  # noise |a - a_dagger_k|, k of this many last Euler steps (authors: 2)
    buffer_iterations: Count = 40  # rollouts kept in the replay (paper: 20)
    segments: Count = 128  # of SEGMENT chunks, drawn from the replay per round (authors: 100 of 500)

    # critic
    gamma: Share = 0.97  # discount per chunk (paper: 0.99)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0)
    pessimism: Weight = 0.5  # V(s') = mean - pessimism * std of the targets; 1: minimum (official: 0.5)
    target_momentum: Share = 0.99  # Polyak momentum of the targets per critic step (paper: 0.998)
    rounds: Count = 16  # per iteration: draw segments, critic steps, actor steps (authors: 16)
    critic_steps: Count = 32  # per round (paper: 64)
    critic_batch: Count = 1024  # chunks per critic step (authors: 50 000, all that were drawn)
    critic_lr: Weight = 5e-4  # Adam step size (paper: 1e-3 or 5e-4)
    critic_layer_norm: bool = True  # without: no LayerNorm, and weights from N(0, 0.1^2) (authors)
    warmup_iterations: Size = 3  # training iterations before the actor starts (authors: none on Gym)

    # actor
    actor_steps: Size = 8  # per round (authors: 2)
    actor_batch: Count = 128  # states per actor step, a trajectory each (authors: 6250; official: 256)
    inv_temp: Weight = 15.0  # inverse temperature; Q is in units of the mean chunk reward (paper: 0.3)
    actor_lr: Weight = 1e-4  # Adam step size (authors: 2e-5; official: 3e-4)
    actor_lr_end: Weight = 0.1  # factor on actor_lr, reached linearly at the end (official: 1)


PRESETS = {
    "paper": dict(
        iterations=70, bf16=False, rollout_chunks=500, zero_fraction=0.0, eval_every=5,
        eval_episodes=100, buffer_iterations=20, segments=3125, gamma=0.99, td_lambda=0.0,
        target_momentum=0.998, critic_steps=64, critic_batch=50_000, critic_lr=1e-3,
        critic_layer_norm=False, warmup_iterations=0, actor_steps=2, actor_batch=6250, inv_temp=0.3,
        actor_lr=2e-5, actor_lr_end=1.0,
    )
}  # fmt: skip
MAX_GRAD_NORM = 1.0  # the actor's gradient is scaled down to it (official: that of actor and critic)


# ------------------------------------------------------------------------------------- critic
@torch.no_grad()
def critic_target(policy, target, batch: dict, reward_scale: float, lam: float, args: Args):
    """TD(lambda) targets (T, L); V(s') = mean - pessimism * std of the targets at a clipped action."""
    obs = batch["next_obs"].flatten(0, 1)  # (T * L, obs_dim)
    with autocast(args):
        q = target(obs, policy.sample(obs).clamp(-1, 1))  # (2, T * L)
    value = (q.mean(0) - args.pessimism * q.std(0, correction=0)).view_as(batch["reward"])
    reward = batch["reward"] / reward_scale
    return family.td_lambda(reward, batch["terminated"], batch["truncated"], value, args.gamma, lam)


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


def lean_adjoint(base, critic: family.Critic, obs: torch.Tensor, points: torch.Tensor, inv_temp: float):
    """Adjoint states g at x_0 .. x_{K-1}, (K, B, D), of points (K + 1, B, D) on states obs (B, obs_dim).

    g_1 = -inv_temp grad_a mean Q(s, clip(a)), then backwards g_t = g_{t+h} + h J^T g_{t+h} with
    J = d/dx [2 v_base(x, t + h, s) - x / (t + h)] at x_t. Also returns Q (2, B) and grad_a Q (B, D).
    """
    K = len(points) - 1
    h, action = 1 / K, points[-1].clone().requires_grad_()
    q = critic(obs, action.clamp(-1, 1))
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
    obs, sigma = obs.expand(K, -1, -1), noise_level(t, K)[..., None]
    with torch.no_grad():
        v_base = base(points[:-1], t, obs)
    v = velocity(points[:-1], t, obs)
    return (2 / sigma * (v - v_base) + sigma * adjoint).square().sum(2).mean(1)  # (Q3)


def update_actor(policy, base, critic: family.Critic, optimizer, obs, args: Args) -> dict:
    """One step of adjoint matching on states obs (B, obs_dim); `critic` gives g_1."""
    x0 = torch.randn(len(obs), policy.action_size, device=obs.device)
    x0 *= torch.rand(len(obs), 1, device=obs.device) >= args.zero_fraction
    networks = policy.velocity, base.velocity
    with autocast(args):
        points = sample_memoryless(*networks, obs, x0, policy.euler_steps)  # (K + 1, B, D)
        adjoint, q, grad_q = lean_adjoint(base.velocity, critic, obs, points, args.inv_temp)  # (K, B, D)
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


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    set_up(args)
    if args.iterations == 0 and args.wall_budget_s == 0:
        args.iterations = 24 if args.env_id == "Hopper-v4" else 78
    measure = partial(family.evaluate, args=args)
    if args.evaluate:
        return evaluate_stored(args, family.FlowPolicy, measure)

    envs = family.make_envs(args, args.num_envs)
    run = Run(args, f"{args.env_id}__{args.exp_name}__{args.seed}")
    policy = family.get_base(args, run, envs)
    base = copy.deepcopy(policy).requires_grad_(False)
    critic = family.Critic(policy.obs_dim, policy.action_size, args.critic_layer_norm).to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    replay = family.Replay(args, policy.obs_dim, policy.action_size)
    state = dict(env_steps=0, trained=0, actor_steps=0, reward_scale=1.0, rewarded=0)
    run.checkpoints(
        state, policy, critic=critic, target=target, envs=envs, replay=replay,
        actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_return", measure)
            envs.reset(derive_seed(args.seed, "rollouts", iteration, run.rank))
        else:
            # 1. roll out with exploration
            with run.timer(row, "rollout_s"):
                steps, returns = family.collect(policy, envs, replay.next(), args)
            state["env_steps"] += steps * run.world
            if returns:
                row["train_return"] = np.mean(returns)
            reward_scale = family.average_magnitude(state, replay.newest()["reward"])
            row["diagnostics/reward_scale"] = reward_scale

            warm = state["trained"] < args.warmup_iterations
            for _ in range(args.rounds):
                # 2. the critic: TD(lambda) targets of some segments, then steps on minibatches of them
                with run.timer(row, "critic_s"):
                    batch = replay.draw(args.segments)
                    lam = family.WARMUP_LAMBDA if warm else args.td_lambda
                    y = critic_target(policy, target, batch, reward_scale, lam, args).flatten()
                    obs, action = batch["obs"].flatten(0, 1), batch["action"].flatten(0, 1)
                    for _ in range(args.critic_steps * (family.WARMUP_FACTOR if warm else 1)):
                        i = torch.randint(len(y), (args.critic_batch,), device=args.device)
                        rows = obs[i], action[i], y[i]
                        run.add(family.update_critic(critic, target, critic_optimizer, *rows, args))
                # 3. the actor: adjoint matching in some of the same states
                with run.timer(row, "actor_s"):
                    for _ in range(0 if warm else args.actor_steps):
                        i = torch.randint(len(obs), (args.actor_batch,), device=args.device)
                        state["actor_steps"] += 1
                        decay = 1 + (args.actor_lr_end - 1) * spent
                        rise = min(1.0, state["actor_steps"] / family.ACTOR_WARMUP)
                        actor_optimizer.param_groups[0]["lr"] = args.actor_lr * decay * rise
                        run.add(update_actor(policy, base, target, actor_optimizer, obs[i], args))
            state["trained"] += 1
            run.add({"diagnostics/base_distance": policy.distance(base, obs[:512])})
        run.log(row, state["env_steps"])
        run.save()

    envs.close()
    if args.capture_video and run.rank == 0:
        family.record_video(policy, args.env_id, run.path / "videos")
    return run.finish("eval_return", measure, task=args.env_id, env_steps=state["env_steps"])


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
