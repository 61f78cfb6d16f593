"""Best of N (EMaQ, Ghasemipour et al. 2021): the base policy stays; a critic chooses among its samples.

    python -m baselines.best_of_n --env-id Hopper-v4

Rollouts, replay and critic are RLDT's; there is no actor to update. docs/baselines.md has the equations.
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import rldt_gym as family
from common.flow import sample
from common.runs import Run, derive_seed, evaluate_stored
from common.settings import Count, Share, Size, Weight, launch, set_up


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(family.TaskArgs):
    """Those of replay and critic are RLDT's."""

    exp_name: str = "best-of-n"  # name of the experiment, part of the run directory's name

    # acting and replay
    candidates: Count = 4  # N, samples of the base from which the critic takes one (EMaQ: 5 to 100)
    buffer_iterations: Count = 40  # rollouts kept in the replay (paper: 20)
    segments: Count = 128  # of SEGMENT chunks, drawn from the replay per round (authors: 100 of 500)
    exploration_steps = 0  # no setting: the candidates are noise enough

    # critic
    gamma: Share = 0.97  # discount per chunk (paper: 0.99)
    td_lambda: Share = 0.5  # lambda of TD(lambda) (authors: 0)
    target_momentum: Share = 0.99  # Polyak momentum of the targets per critic step (paper: 0.998)
    rounds: Count = 16  # per iteration: draw segments, critic steps (authors: 16)
    critic_steps: Count = 32  # per round (paper: 64)
    critic_batch: Count = 1024  # chunks per critic step (authors: 50 000, all that were drawn)
    critic_lr: Weight = 5e-4  # Adam step size (paper: 1e-3 or 5e-4)
    critic_layer_norm: bool = True  # without: no LayerNorm, and weights from N(0, 0.1^2) (authors)
    warmup_iterations: Size = 3  # training iterations before the critic chooses


PRESETS = {
    "paper": dict(
        iterations=70, bf16=False, rollout_chunks=500, zero_fraction=0.0, eval_every=5,
        eval_episodes=100, candidates=32, buffer_iterations=20, segments=3125, gamma=0.99,
        td_lambda=0.0, target_momentum=0.998, critic_steps=64, critic_batch=50_000, critic_lr=1e-3,
        critic_layer_norm=False, warmup_iterations=2,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------- policy
class BestOfN(family.FlowPolicy):
    """A flow policy that stays as it is, and a critic that chooses among `candidates` samples."""

    def __init__(self, *sizes, critic_layer_norm=True, **network):
        super().__init__(*sizes, **network)
        self.config["critic_layer_norm"] = critic_layer_norm
        self.critic = family.Critic(self.obs_dim, self.action_size, critic_layer_norm)
        self.register_buffer("candidates", torch.tensor(1))  # N; 1 is the base policy itself
        self.velocity.requires_grad_(False)

    @torch.no_grad()
    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None, trajectory=False):
        """The candidate (B, D) of the highest smaller Q at cond (B, obs_dim), or its trajectory.

        The first candidate starts from x0 (B, D) where it is given, the others from noise.
        """
        B, N = len(cond), int(self.candidates)
        start = torch.randn(B, N, self.action_size, device=cond.device)
        if x0 is not None:
            start[:, 0] = x0
        obs = cond[:, None].expand(-1, N, -1)  # (B, N, obs_dim)
        points = sample(self.velocity, obs, start, self.euler_steps, trajectory)
        action = points[-1] if trajectory else points  # (B, N, D)
        q = self.critic(obs.flatten(0, 1), action.flatten(0, 1)).min(0).values.view(B, N)
        return points[..., torch.arange(B, device=cond.device), q.argmax(1), :]


def make_policy(base: family.FlowPolicy, args: Args) -> BestOfN:
    """The base policy with a new critic."""
    policy = BestOfN(**base.config, critic_layer_norm=args.critic_layer_norm)
    policy.load_state_dict(base.state_dict(), strict=False)
    return policy.to(args.device)


def evaluate(policy: BestOfN, args: Args, episodes: int, seed: int) -> dict[str, float]:
    """The family's evaluation, whose candidates are the same ones whenever it is asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        return family.evaluate(policy, args, episodes, seed)


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    set_up(args)
    if args.iterations == 0 and args.wall_budget_s == 0:
        args.iterations = 24 if args.env_id == "Hopper-v4" else 78
    measure = partial(evaluate, args=args)
    if args.evaluate:
        return evaluate_stored(args, BestOfN, measure)

    envs = family.make_envs(args, args.num_envs)
    run = Run(args, f"{args.env_id}__{args.exp_name}__{args.seed}")
    policy = make_policy(family.get_base(args, run, envs), args)
    critic = policy.critic
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    replay = family.Replay(args, policy.obs_dim, policy.action_size)
    state = dict(env_steps=0, trained=0, reward_scale=1.0, rewarded=0)
    run.checkpoints(state, policy, target=target, envs=envs, replay=replay, optimizer=optimizer)

    for iteration, spent in run.iterations():
        row, warm = {}, state["trained"] < args.warmup_iterations
        policy.candidates.fill_(1 if warm else args.candidates)  # the base, until the critic knows it
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_return", measure)
            envs.reset(derive_seed(args.seed, "rollouts", iteration, run.rank))
        else:
            # 1. roll out the best of N candidates
            with run.timer(row, "rollout_s"):
                steps, returns = family.collect(policy, envs, replay.next(), args)
            state["env_steps"] += steps * run.world
            if returns:
                row["train_return"] = np.mean(returns)
            reward_scale = family.average_magnitude(state, replay.newest()["reward"])
            row["diagnostics/reward_scale"] = reward_scale

            # 2. the critic: TD(lambda) targets of the best of N, then steps on minibatches of them
            with run.timer(row, "critic_s"):
                for _ in range(args.rounds):
                    batch = replay.draw(args.segments)
                    lam = family.WARMUP_LAMBDA if warm else args.td_lambda
                    y = family.critic_target(policy, target, batch, reward_scale, lam, args).flatten()
                    obs, action = batch["obs"].flatten(0, 1), batch["action"].flatten(0, 1)
                    for _ in range(args.critic_steps * (family.WARMUP_FACTOR if warm else 1)):
                        i = torch.randint(len(y), (args.critic_batch,), device=args.device)
                        rows = obs[i], action[i], y[i]
                        run.add(family.update_critic(critic, target, optimizer, *rows, args))
            state["trained"] += 1
        run.log(row, state["env_steps"])
        run.save()

    envs.close()
    if args.capture_video and run.rank == 0:
        family.record_video(policy, args.env_id, run.path / "videos")
    return run.finish("eval_return", measure, task=args.env_id, env_steps=state["env_steps"])


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
