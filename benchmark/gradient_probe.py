"""Is the critic's gradient right, and is the actor keeping up with it?

    python -m benchmark.gradient_probe RUN_DIR ...      # writes benchmark/results/gradient_probe.csv

Runs the policy of each checkpoint with every action chunk moved by `step` along the critic's gradient,
normalised by its mean length, and reports the real return. Rising with the step: the gradient is right and
the actor lags behind it. Falling: the gradient is not to be trusted at this policy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmark.tools import RESULTS, Run, load_run, write_csv
from envs.vector import VectorEnv


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    steps: tuple[float, ...] = (-0.2, 0.0, 0.1, 0.2, 0.4, 0.8)
    """Lengths of the move, in the norm of a normalised chunk."""
    episodes: int = 40
    """Episodes per step and start."""
    seed: int = 7
    """Seed of environments and noise."""
    out: Path = RESULTS / "gradient_probe.csv"
    """CSV to write."""


def moved_return(run: Run, step: float, start: str, args: Args) -> np.ndarray:
    """Undiscounted returns (episodes,) of the policy moved by `step` along grad Q, from x_0 = 0 or noise."""
    envs = VectorEnv(run.args.env_id, args.episodes, run.policy.chunk, run.args.backend, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    envs.reset()
    returns, alive = np.zeros(args.episodes), np.ones(args.episodes, bool)
    while alive.any():
        obs = run.policy.normalize(envs.obs)
        x0 = torch.randn(args.episodes, run.policy.action_size, generator=generator) * (start == "noise")
        action = run.policy.sample(obs, x0).requires_grad_()
        (grad,) = torch.autograd.grad(run.critic(obs, action).mean(0).sum(), action)
        action = action.detach() + step * grad / grad.norm(dim=-1).mean()
        _, reward, terminated, truncated, _ = envs.step(run.policy.to_env(action), alive)
        returns += reward
        alive &= ~(terminated | truncated)
    envs.close()
    return returns


def main(args: Args):
    torch.set_num_threads(1)
    rows = []
    for path in args.runs:
        run = load_run(path)
        for start in ("zero", "noise"):
            for step in args.steps:
                r = moved_return(run, step, start, args)
                rows.append({"run": path.name, "gamma": run.args.gamma, "start": start, "step": step, "return": r.mean(), "return_std": r.std()})
                print(f"{path.name} {start:5s} {step:5.2f} {r.mean():7.0f} +- {r.std():.0f}")
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
