"""DSRL (Wagenmaker et al. 2025, arXiv 2506.15799), both forms: with noise aliasing, and as SAC.

    python -m baselines.dsrl --task Hopper-v4       # or one_leg-low, square-state, transport-state

leaves a pretrained flow policy as it is, and learns the noise from which it starts. Rollouts, replay and
critic are RLDT's. With noise aliasing (`na`) a second critic learns from the first how good each noise
is; `sac` has one critic, of noise, and can use no demonstrations, whose noise is unknown. An actor over
the noise follows. Of the two evaluations, that from x_0 = 0 starts the flow from the actor's mean, the
`sampled` one from a draw of it. In the comments "official" is this method's own code; "paper" and
"authors" are those of RLDT. docs/baselines.md has the equations.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import families, offpolicy
from common.flow import FlowPolicy
from common.runs import autocast, average_gradients
from common.settings import Count, Size, Weight


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    """Those of replay and critic are RLDT's."""

    exp_name: str = "dsrl"  # name of the experiment, part of the run directory's name

    # critic of noise, and actor
    form: Literal["na", "sac"] = "na"  # noise aliasing, or one critic alone, of noise
    noise_steps: Count = 16  # of the critic of noise per round (official: 10 for 20 critic steps)
    actor_steps: Size = 16  # per round (official: as many as critic steps)
    actor_batch: Count = 256  # states per step of the actor and of the critic of noise (official: 256)
    actor_lr: Weight = 3e-4  # Adam step size of actor and entropy coefficient (official: 3e-4)
    bound: Weight = 1.5  # the actor's noise lies between -bound and bound (official: 1.5, Walker2d 2.5)
    entropy_start: Weight = 0.1  # first entropy coefficient, in units of Q (official: 1)
    exploration_steps: ClassVar[int] = 0  # no setting: the actor's own noise explores


SHARED = offpolicy.SHARED
SPARSE = "lift", "can", "square", "transport", "one_leg", "lamp"  # where Q is at most 2, not near 30
PRESETS = {task: dict(entropy_start=0.003) for task in SPARSE}
PRESETS["paper"] = dict(warmup_iterations=2, noise_steps=32, actor_steps=64)
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


class SteeredPolicy(FlowPolicy):
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


# ------------------------------------------------------------------------------------- critic
def update_noise_critic(policy, critic, noise_critic, optimizer, seen: torch.Tensor, args) -> dict:
    """One step of Q_W(s, w) toward Q_A(s, flow(s, w)) on states seen (B, .), w ~ N(0, I) or 0."""
    w = torch.randn(len(seen), policy.action_size, device=seen.device)
    w *= torch.rand(len(seen), 1, device=seen.device) >= args.zero_fraction
    with autocast(args):
        with torch.no_grad():
            y = critic(seen, policy.flow(seen[:, : policy.obs_dim], w))  # (networks, B)
        q = noise_critic(seen, w)  # (networks, B), each network has its own target
    loss = (q - y).square().mean(1).sum()  # (S2)
    optimizer.zero_grad()
    loss.backward()
    average_gradients(noise_critic.parameters())
    optimizer.step()
    return {"losses/noise_critic": loss.detach()}


class Soft:
    """Actor and target networks of SAC, for `critic_target`: noise acts, V(s') may have a bonus."""

    def __init__(self, policy: SteeredPolicy, target, bonus: torch.Tensor | float):
        self.policy, self.target, self.bonus = policy, target, bonus

    def encode(self, obs):
        return self.policy.encode(obs)

    def sample(self, cond: torch.Tensor) -> torch.Tensor:
        x0 = torch.randn(len(cond), self.policy.action_size, device=cond.device)
        w, self.log_prob = self.policy.noise(cond, x0)
        return w

    def __call__(self, seen: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Q - bonus log p (networks, B) of the noise that was sampled last."""
        return self.target(seen, w) - self.bonus * self.log_prob  # (S4)


# -------------------------------------------------------------------------------------- actor
def update_actor(policy: SteeredPolicy, noise_critic, optimizer, seen: torch.Tensor, args) -> dict:
    """One step of SAC's actor and entropy coefficient on states seen (B, .)."""
    obs = seen[:, : policy.obs_dim]
    w, log_prob = policy.noise(obs, torch.randn(len(obs), policy.action_size, device=obs.device))
    with autocast(args):
        q = noise_critic(seen, w).min(0).values  # (B,)
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


# ------------------------------------------------------------------------------------- method
class DSRL(offpolicy.Method):
    policy_class = SteeredPolicy

    def __init__(self, base, family, args):
        super().__init__(base, family, args)
        steering = [*self.policy.actor.parameters(), self.policy.log_alpha]
        self.optimizer = torch.optim.Adam(steering, args.actor_lr, fused=True)
        self.parts = dict(actor_optimizer=self.optimizer)
        self.noise_critic, self.sparse = self.critic, isinstance(family, families.Sparse)
        if args.form == "na":
            self.noise_critic = family.make_critic(self.policy)
            networks = self.noise_critic.parameters()
            self.noise_optimizer = torch.optim.Adam(networks, args.critic_lr, fused=True)
            self.parts |= dict(noise_critic=self.noise_critic, noise_optimizer=self.noise_optimizer)

    def make_policy(self, policy_class, family):
        policy = policy_class(**self.base.config, bound=self.args.bound)
        policy.load_state_dict(self.base.state_dict(), strict=False)
        policy.log_alpha.data.fill_(math.log(self.args.entropy_start + 1e-8))
        return policy.to(self.args.device)

    def begin(self, warm):
        self.policy.steered.fill_(not warm)  # the base acts until its critics know it

    def actor(self):
        if self.args.form == "na":
            return self.policy
        self.recorder = families.Recorder(self.policy, self.act)
        return self.recorder

    def act(self, obs, x0):
        w = self.policy.noise(obs, x0)[0] if self.policy.steered else x0
        return self.policy.flow(obs, w), w

    def collected(self, rollout):
        if self.args.form == "sac":  # whose actions are noise
            rollout["action"].copy_(torch.stack(self.recorder.kept))

    def value_of(self, target):
        if self.args.form == "na":
            return self.policy, target
        # where targets end at 1, a bonus in each chunk would make all of them 1
        soft = Soft(self.policy, target, 0.0 if self.sparse else self.policy.log_alpha.exp())
        return soft, soft

    def update(self, seen, action, target, warm, spent):
        for _ in range(self.args.noise_steps if self.args.form == "na" else 0):
            i = torch.randint(len(seen), (self.args.actor_batch,), device=seen.device)
            critics = self.critic, self.noise_critic, self.noise_optimizer
            yield update_noise_critic(self.policy, *critics, seen[i], self.args)
        for _ in range(0 if warm else self.args.actor_steps):
            i = torch.randint(len(seen), (self.args.actor_batch,), device=seen.device)
            yield update_actor(self.policy, self.noise_critic, self.optimizer, seen[i], self.args)


def main(args) -> dict | None:
    if args.form == "sac" and getattr(args, "demos", False):
        raise SystemExit("--form sac learns from noise, which demonstrations have none of: --no-demos.")
    return offpolicy.main(args, DSRL)


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
