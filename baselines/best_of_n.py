"""Best of N (EMaQ, Ghasemipour et al. 2021; QC, Li et al. 2025): a critic chooses among samples.

    python -m baselines.best_of_n --task Hopper-v4  # or one_leg-low, square-state, transport-state

The base policy stays as it is (EMaQ), or goes on cloning what is in the replay (QC, `--clone-steps`).
Rollouts, replay and critic are RLDT's. docs/baselines.md has the equations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import rldt_gym
from baselines import families, offpolicy
from common.flow import FlowPolicy, flow_matching_loss, sample
from common.runs import autocast, average_gradients
from common.settings import Count, Size, Weight


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    """Those of replay and critic are RLDT's."""

    exp_name: str = "best-of-n"  # name of the experiment, part of the run directory's name

    # acting
    candidates: Count = 4  # N, samples of which the critic takes one (EMaQ: 5 to 100; QC: 32)
    exploration_steps: ClassVar[int] = 0  # no setting: the candidates are noise enough

    # cloning
    clone_steps: Size = 0  # of eq. (2) per round (EMaQ: 0; QC: as many as critic steps)
    clone_batch: Count = 256  # replayed chunks per step (QC: 256)
    clone_lr: Weight = 3e-4  # Adam step size (QC: 3e-4)


SHARED = offpolicy.SHARED
PRESETS = {"paper": dict(candidates=32, warmup_iterations=2)}


# ------------------------------------------------------------------------------------- policy
def narrow(critic: type, obs_dim: int) -> type:
    """A critic that sees the policy's state alone; furniture's also sees the pairs assembled."""

    class Narrow(critic):
        def forward(self, seen: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            return super().forward(seen[..., :obs_dim], action)

    return Narrow


class BestOfN(FlowPolicy):
    """A flow policy, and a critic of these sizes that chooses among `candidates` samples."""

    script = rldt_gym  # of the critic

    def __init__(self, *sizes, critic_sizes: Sequence, **network):
        super().__init__(*sizes, **network)
        self.config["critic_sizes"] = list(critic_sizes)
        self.critic = narrow(self.script.Critic, self.obs_dim)(*critic_sizes)
        self.register_buffer("candidates", torch.tensor(1))  # N; 1 is the flow policy itself

    @torch.no_grad()
    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None, trajectory=False):
        """The candidate (B, D) of the highest smallest Q at cond (B, obs_dim), or its trajectory.

        The first candidate starts from x0 (B, D) where it is given, the others from noise.
        """
        B, N = len(cond), int(self.candidates)
        start = torch.randn(B, N, self.action_size, device=cond.device)
        if x0 is not None:
            start[:, 0] = x0
        points = sample(self.velocity, cond[:, None], start, self.euler_steps, trajectory)
        action = points[-1] if trajectory else points  # (B, N, D)
        q = self.critic(cond.repeat_interleave(N, 0), action.flatten(0, 1)).min(0).values.view(B, N)
        return points[..., torch.arange(B, device=cond.device), q.argmax(1), :]


def update_clone(policy: BestOfN, optimizer, obs, action, args) -> dict[str, torch.Tensor]:
    """One step on eq. (2) with chunks of the replay, obs (B, obs_dim) and action (B, D)."""
    with autocast(args):
        loss = flow_matching_loss(policy.velocity, action, obs)  # eq. (2)
    optimizer.zero_grad()
    loss.backward()
    average_gradients(policy.velocity.parameters())
    optimizer.step()
    return {"losses/cloning": loss.detach()}


# ------------------------------------------------------------------------------------- method
class Choice(offpolicy.Method):
    policy_class = BestOfN

    def __init__(self, base, family, args):
        super().__init__(base, family, args)
        velocity = self.policy.velocity.requires_grad_(args.clone_steps > 0)
        self.optimizer = torch.optim.Adam(velocity.parameters(), args.clone_lr, fused=True)
        self.parts = dict(clone_optimizer=self.optimizer)

    def make_policy(self, policy_class, family):
        _, *sizes = family.critic_sizes(self.base)
        critic_sizes = self.base.obs_dim, *sizes
        policy = policy_class(**self.base.config, critic_sizes=critic_sizes)
        policy.load_state_dict(self.base.state_dict(), strict=False)
        return policy.to(self.args.device)

    def make_critic(self, family):
        return self.policy.critic

    def begin(self, warm):
        self.policy.candidates.fill_(1 if warm else self.args.candidates)  # the critic knows nothing yet

    def update(self, seen, action, target, warm, spent):
        for _ in range(self.args.clone_steps):
            i = torch.randint(len(seen), (self.args.clone_batch,), device=seen.device)
            obs = seen[i, : self.policy.obs_dim]
            yield update_clone(self.policy, self.optimizer, obs, action[i], self.args)


def main(args) -> dict | None:
    return offpolicy.main(args, Choice)


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
