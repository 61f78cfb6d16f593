"""What does a critic of a sparse task learn from a base policy's episodes, and does an actor that follows it improve?

    python rldt_robomimic.py --task square --iterations 25 --warmup-iterations 100 --buffer-iterations 30 --eval-every 1000
    python -m benchmark.critic_probe_robomimic RUN_DIR  # writes benchmark/results/critic_probe_robomimic.csv

The first command only collects: 24 rollouts of the base policy. The second trains critics on all but the last four of them, for each
number of steps, lambda, and sampling. A row of the CSV says how well Q tells the successful from the failed episodes of rollouts that it
has seen and has not (area under the ROC curve), and the success rate of the base policy with each chunk moved by `move` along the
critic's gradient in two steps, from x_0 = 0 and from noise.
"""

import copy
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from scipy.stats import mannwhitneyu

import rldt_robomimic as script
from benchmark.tools import RESULTS, provenance, write_csv


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory with rollouts of the base policy."""
    steps: tuple[int, ...] = (3000, 12000)
    """Critic steps."""
    td_lambda: tuple[float, ...] = (0.95, 0.5)
    """lambda of TD(lambda)."""
    balanced: tuple[bool, ...] = (True,)
    """Whether half of the segments comes from successful episodes."""
    moves: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)
    """Lengths of the move, in the norm of a normalised chunk."""
    episodes: int = 60
    """Episodes per move, from x_0 = 0 and again from noise."""
    held_out: int = 4
    """Rollouts that the critic does not see."""
    seed: int = 0
    """Seed of the critic and of the evaluation."""
    threads: int = 1
    """CPU threads of torch."""
    out: Path = RESULTS / "critic_probe_robomimic.csv"
    """CSV to write."""


def train_critic(policy: script.FlowPolicy, replay: script.Replay, args: script.Args, steps: int) -> script.Critic:
    """A critic after `steps` steps on targets of the fixed policy, drawn anew every 32 steps."""
    critic = script.Critic(policy.cond_dim, policy.action_size, args.critic_width, args.critic_depth, args.critic_layer_norm, args.critic_init)
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    for _ in range(steps // 32):
        batch = replay.draw(args.segments, args.segment_chunks, 0.0, args.balanced)
        y = script.critic_target(policy, target, batch, args).flatten()
        valid = batch["valid"].flatten() > 0
        state, action, y = batch["state"][:-1].flatten(0, 1)[valid], batch["action"].flatten(0, 1)[valid], y[valid]
        for _ in range(32):
            i = torch.randint(len(y), (args.critic_batch,))
            script.update_critic(critic, target, policy, optimizer, {"state": state[i]}, action[i], y[i], args)
    return critic


def area(critic: script.Critic, rollouts: list[dict]) -> float:
    """Area under the ROC curve of Q(s, a) as a score of the episode's success."""
    state, action, valid, succeeded = (torch.cat([r[name].flatten(0, 1) for r in rollouts]) for name in ("state", "action", "valid", "succeeded"))
    with torch.no_grad():
        q = critic(state, action).mean(0)
    won, lost = q[(valid > 0) & (succeeded > 0)], q[(valid > 0) & (succeeded == 0)]
    return float(mannwhitneyu(won, lost).statistic / (len(won) * len(lost)))


def moved(policy: script.FlowPolicy, critic: script.Critic, move: float) -> script.FlowPolicy:
    """The policy with each action moved by `move` along the normalised gradient of Q, in two steps."""
    result = copy.deepcopy(policy)

    def sample(cond, x0=None, trajectory=False):
        action = policy.sample(cond, x0).float()
        with torch.enable_grad():
            for _ in range(2 if move else 0):
                action = action.detach().requires_grad_()
                (grad,) = torch.autograd.grad(critic(cond.float(), action).mean(0).sum(), action)
                action = action + move / 2 * grad / (grad.norm(dim=-1, keepdim=True) + 1e-6)
        return action.detach()

    result.sample = sample
    return result


def main(args: Args):
    torch.set_num_threads(args.threads)
    config = script.resolve(script.Args(**json.loads((args.run / "args.json").read_text()) | {"device": "cpu", "resume": None}))
    policy = script.load_policy(args.run / "base_policy.pt", "cpu")
    rollouts = [torch.load(path, weights_only=True) for path in sorted(args.run.glob("replay*.pt"), key=lambda p: int(p.stem[6:]))]
    config.buffer_iterations = len(rollouts) - args.held_out
    replay = script.Replay(config, {"state": rollouts[0]["state"].flatten(0, 1)[:1]}, policy.action_size)
    for rollout in rollouts[: -args.held_out]:
        for name, value in replay.rollout().items():
            value.copy_(rollout[name])
    envs, rows = script.make_envs(config, config.num_envs), []
    for steps, lam, balanced in itertools.product(args.steps, args.td_lambda, args.balanced):
        config.td_lambda, config.balanced = lam, balanced
        torch.manual_seed(args.seed)
        critic = train_critic(policy, replay, config, steps)
        seen, unseen = area(critic, rollouts[: args.held_out]), area(critic, rollouts[-args.held_out :])
        for move in args.moves:
            scores = script.evaluate(moved(policy, critic, move), envs, config, args.episodes, 1_000_000 + args.seed)
            row = dict(task=config.task, critic_steps=steps, td_lambda=lam, balanced=balanced, auc_seen=seen, auc_unseen=unseen, move=move)
            for start, success in scores.items():
                row[f"success_{start}"], row[f"success_{start}_low"], row[f"success_{start}_high"] = script.rate(success)
            rows.append(row | {"threads": args.threads} | provenance())
            print(f"{steps} steps, lambda {lam}: AUC {seen:.3f} / {unseen:.3f}, moved by {move}: "
                  f"{100 * row['success_zero']:.0f} % from x_0 = 0, {100 * row['success_noise']:.0f} % from noise", flush=True)  # fmt: skip
        write_csv(args.out, rows)
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
