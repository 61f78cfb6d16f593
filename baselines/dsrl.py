"""DSRL (Wagenmaker et al. 2025, arXiv 2506.15799), its form with noise aliasing.

    python -m baselines.dsrl --env-id Hopper-v4

leaves a pretrained flow policy as it is, and learns the noise from which it starts. Rollouts, replay and
critic are RLDT's. A second critic learns from the first how good each noise is, and an actor over the
noise follows it. Of the two evaluations, that from x_0 = 0 starts the flow from the actor's mean, the
`sampled` one from a draw of it. In the comments "official" is this method's own code; "paper" and
"authors" are those of RLDT. docs/baselines.md has the equations.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import rldt_gym as family
from common.runs import Run, autocast, average_gradients, derive_seed, evaluate_stored
from common.settings import Count, Share, Size, Weight, launch, set_up


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(family.TaskArgs):
    """Those of replay and critic are RLDT's."""

    exp_name: str = "dsrl"  # name of the experiment, part of the run directory's name

    # replay
    buffer_iterations: Count = 40  # rollouts kept in the replay (paper: 20)
    segments: Count = 128  # of SEGMENT chunks, drawn from the replay per round (authors: 100 of 500)
    exploration_steps = 0  # no setting: the actor's own noise explores

    # critic of actions
    gamma: Share = 0.97  # discount per chunk (paper: 0.99)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0)
    target_momentum: Share = 0.99  # Polyak momentum of the targets per critic step (paper: 0.998)
    rounds: Count = 16  # per iteration: draw segments, critic steps, actor steps (authors: 16)
    critic_steps: Count = 32  # per round (paper: 64)
    critic_batch: Count = 1024  # chunks per critic step (authors: 50 000, all that were drawn)
    critic_lr: Weight = 5e-4  # Adam step size of both critics (paper: 1e-3 or 5e-4)
    critic_layer_norm: bool = True  # without: no LayerNorm, and weights from N(0, 0.1^2) (authors)
    warmup_iterations: Size = 3  # training iterations before the actor starts (official: 2001 steps)

    # critic of noise, and actor
    noise_steps: Count = 16  # of the critic of noise per round (official: 10 for 20 critic steps)
    actor_steps: Size = 16  # per round (official: as many as critic steps)
    actor_batch: Count = 256  # states per step of the actor and of the critic of noise (official: 256)
    actor_lr: Weight = 3e-4  # Adam step size of actor and entropy coefficient (official: 3e-4)
    bound: Weight = 1.5  # the actor's noise lies between -bound and bound (official: 1.5, Walker2d 2.5)
    entropy_start: Weight = 0.1  # first entropy coefficient, in units of Q (official: 1)


PRESETS = {
    "paper": dict(
        iterations=70, bf16=False, rollout_chunks=500, zero_fraction=0.0, eval_every=5,
        eval_episodes=100, buffer_iterations=20, segments=3125, gamma=0.99, td_lambda=0.0,
        target_momentum=0.998, critic_steps=64, critic_batch=50_000, critic_lr=1e-3,
        critic_layer_norm=False, warmup_iterations=2, noise_steps=32, actor_steps=64,
    )
}  # fmt: skip
TARGET_ENTROPY = 0.0  # of the actor's noise, scaled to +-1 (official)
ACTOR = dict(width=128, depth=3)  # official, on Hopper


# ------------------------------------------------------------------------------------- policy
class NoiseActor(nn.Module):
    """Mean and deviation of the noise before its bound, obs (..., obs_dim) -> (..., D) each.

    It starts as N(0, I), so that the policy starts as a flow from bounded normal noise.
    """

    def __init__(self, obs_dim: int, size: int, width: int, depth: int):
        super().__init__()
        layers = []
        for n_in in [obs_dim] + [width] * (depth - 1):
            layers += [nn.Linear(n_in, width), nn.LayerNorm(width), nn.Tanh()]
        last = nn.Linear(width, 2 * size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.layers(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2).exp()


class SteeredPolicy(family.FlowPolicy):
    """A flow policy that stays as it is, and an actor that turns x_0 into the noise it starts from."""

    def __init__(self, *sizes, bound=1.5, **network):
        super().__init__(*sizes, **network)
        self.config["bound"], self.bound = bound, bound  # other policies do not load this one
        self.actor = NoiseActor(self.obs_dim, self.action_size, **ACTOR)
        self.log_alpha = nn.Parameter(torch.zeros(()))  # log of the entropy coefficient
        self.register_buffer("steered", torch.tensor(False))  # False: the base policy itself
        self.velocity.requires_grad_(False)

    def noise(self, obs: torch.Tensor, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w = bound tanh(mean + std x_0), (..., D), and the log-density (...) of w / bound there.

        x_0 = 0 gives the middle of the actor's density, x_0 ~ N(0, I) a draw of it.
        """
        mean, std = self.actor(obs)
        u = mean + std * x0
        log_prob = torch.distributions.Normal(mean, std).log_prob(u)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
        return self.bound * u.tanh(), (log_prob - log_slope).sum(-1)  # (S1) of docs/baselines.md

    @torch.no_grad()
    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None, trajectory=False):
        """Action chunks (..., D) for cond (..., obs_dim) by the flow from the actor's noise at x0."""
        if x0 is None:
            x0 = torch.randn(*cond.shape[:-1], self.action_size, device=cond.device)
        if self.steered:
            with torch.autocast(cond.device.type, enabled=False):
                x0, _ = self.noise(cond, x0)
        return super().sample(cond, x0, trajectory)

    def flow(self, cond: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Action chunks (..., D) by the flow from noise w (..., D)."""
        return super().sample(cond, w)


def make_policy(base: family.FlowPolicy, args: Args) -> SteeredPolicy:
    """The base policy with a new actor."""
    policy = SteeredPolicy(**base.config, bound=args.bound)
    policy.load_state_dict(base.state_dict(), strict=False)
    policy.log_alpha.data.fill_(math.log(args.entropy_start + 1e-8))
    return policy.to(args.device)


# ------------------------------------------------------------------------------------- critic
def update_noise_critic(policy, critic, noise_critic, optimizer, obs, args: Args) -> dict:
    """One step of Q_W(s, w) toward Q_A(s, flow(s, w)) on obs (B, obs_dim), w ~ N(0, I) or 0."""
    w = torch.randn(len(obs), policy.action_size, device=obs.device)
    w *= torch.rand(len(obs), 1, device=obs.device) >= args.zero_fraction
    with autocast(args):
        with torch.no_grad():
            y = critic(obs, policy.flow(obs, w))  # (2, B)
        q = noise_critic(obs, w)  # (2, B), each network has its own target
    loss = (q - y).square().mean(1).sum()  # (S2)
    optimizer.zero_grad()
    loss.backward()
    average_gradients(noise_critic.parameters())
    optimizer.step()
    return {"losses/noise_critic": loss.detach()}


# -------------------------------------------------------------------------------------- actor
def update_actor(policy: SteeredPolicy, noise_critic: family.Critic, optimizer, obs, args: Args) -> dict:
    """One step of SAC's actor and entropy coefficient on states obs (B, obs_dim)."""
    w, log_prob = policy.noise(obs, torch.randn(len(obs), policy.action_size, device=obs.device))
    with autocast(args):
        q = noise_critic(obs, w).min(0).values  # (B,)
    alpha, entropy = policy.log_alpha.detach().exp(), -log_prob.detach().mean()
    loss = (alpha * log_prob - q).mean()  # (S3)
    parameters = [*policy.actor.parameters(), policy.log_alpha]
    optimizer.zero_grad()
    total = loss + policy.log_alpha * (entropy - TARGET_ENTROPY)
    total.backward(inputs=parameters)
    average_gradients(parameters)
    optimizer.step()
    return {
        "losses/actor": loss.detach(), "losses/entropy": entropy,
        "diagnostics/q_policy": q.detach().mean(), "diagnostics/entropy_coefficient": alpha,
        "diagnostics/noise": w.detach().abs().mean(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    set_up(args)
    if args.iterations == 0 and args.wall_budget_s == 0:
        args.iterations = 24 if args.env_id == "Hopper-v4" else 78
    measure = partial(family.evaluate, args=args)
    if args.evaluate:
        return evaluate_stored(args, SteeredPolicy, measure)

    envs = family.make_envs(args, args.num_envs)
    run = Run(args, f"{args.env_id}__{args.exp_name}__{args.seed}")
    policy = make_policy(family.get_base(args, run, envs), args)
    make_critic = lambda: family.Critic(policy.obs_dim, policy.action_size, args.critic_layer_norm)
    critic, noise_critic = make_critic().to(args.device), make_critic().to(args.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    steering = [*policy.actor.parameters(), policy.log_alpha]
    actor_optimizer = torch.optim.Adam(steering, args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    noise_optimizer = torch.optim.Adam(noise_critic.parameters(), args.critic_lr, fused=True)
    replay = family.Replay(args, policy.obs_dim, policy.action_size)
    state = dict(env_steps=0, trained=0, reward_scale=1.0, rewarded=0)
    run.checkpoints(
        state, policy, critic=critic, target=target, noise_critic=noise_critic, envs=envs,
        replay=replay, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
        noise_optimizer=noise_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():
        row, warm = {}, state["trained"] < args.warmup_iterations
        policy.steered.fill_(not warm)  # the base acts until its critics know it
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_return", measure)
            envs.reset(derive_seed(args.seed, "rollouts", iteration, run.rank))
        else:
            # 1. roll out from the actor's noise
            with run.timer(row, "rollout_s"):
                steps, returns = family.collect(policy, envs, replay.next(), args)
            state["env_steps"] += steps * run.world
            if returns:
                row["train_return"] = np.mean(returns)
            reward_scale = family.average_magnitude(state, replay.newest()["reward"])
            row["diagnostics/reward_scale"] = reward_scale

            for _ in range(args.rounds):
                # 2. the critics: TD(lambda) targets for actions, and those values for noise
                with run.timer(row, "critic_s"):
                    batch = replay.draw(args.segments)
                    lam = family.WARMUP_LAMBDA if warm else args.td_lambda
                    y = family.critic_target(policy, target, batch, reward_scale, lam, args).flatten()
                    obs, action = batch["obs"].flatten(0, 1), batch["action"].flatten(0, 1)
                    for _ in range(args.critic_steps * (family.WARMUP_FACTOR if warm else 1)):
                        i = torch.randint(len(y), (args.critic_batch,), device=args.device)
                        rows = obs[i], action[i], y[i]
                        run.add(family.update_critic(critic, target, critic_optimizer, *rows, args))
                    for _ in range(args.noise_steps):
                        i = torch.randint(len(obs), (args.actor_batch,), device=args.device)
                        critics = critic, noise_critic, noise_optimizer
                        run.add(update_noise_critic(policy, *critics, obs[i], args))
                # 3. the actor: SAC on the critic of noise in some of the same states
                with run.timer(row, "actor_s"):
                    for _ in range(0 if warm else args.actor_steps):
                        i = torch.randint(len(obs), (args.actor_batch,), device=args.device)
                        run.add(update_actor(policy, noise_critic, actor_optimizer, obs[i], args))
            state["trained"] += 1
        run.log(row, state["env_steps"])
        run.save()

    envs.close()
    if args.capture_video and run.rank == 0:
        family.record_video(policy, args.env_id, run.path / "videos")
    return run.finish("eval_return", measure, task=args.env_id, env_steps=state["env_steps"])


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
