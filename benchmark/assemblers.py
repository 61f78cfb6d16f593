"""Success of the scripted assemblers of the furniture tasks, in MuJoCo.

    python -m benchmark.assemblers                      # writes benchmark/results/assemblers.csv

A row is `episodes` episodes with seeds from `seed`, none of which the assemblers were developed on, with the noise that demonstrations
are recorded with: the rate of episodes that assembled all pairs with its 95 % interval (Wilson), the mean number of pairs, and the mean
length of the successes in steps of 0.1 s. Rows of other tasks in the CSV are kept.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from benchmark.tools import RESULTS, provenance, read_csv, write_csv
from demos.make_furniture_demos import ASSEMBLERS, run_episode, wilson
from envs.furniture_mujoco import FurnitureEnv, PhysicsError


@dataclass
class Args:
    furniture: tuple[str, ...] = ("one_leg", "lamp")
    """Tasks."""
    randomness: tuple[str, ...] = ("low", "med")
    """Ranges of the initial states."""
    episodes: int = 100
    """Episodes of each."""
    seed: int = 1000
    """Seed of the first episode; the others follow one by one."""
    noise: float = 0.004
    """Noise on the executed positions (m), see demos.make_furniture_demos."""
    out: Path = RESULTS / "assemblers.csv"
    """CSV to write."""


def main(args: Args):
    for furniture in args.furniture:
        for randomness in args.randomness:
            env, pairs, lengths, diverged = FurnitureEnv(furniture, randomness), [], [], 0
            for seed in tqdm(range(args.seed, args.seed + args.episodes), desc=f"{furniture} {randomness}"):
                try:
                    episode = run_episode(env, ASSEMBLERS[furniture], seed, args.noise)
                except PhysicsError:
                    diverged += 1
                    pairs.append(0)
                    continue
                pairs.append(int(episode["rewards"].sum()))
                if pairs[-1] == len(env.furniture.pairs):
                    lengths.append(len(episode["actions"]))
            low, high = wilson(len(lengths), args.episodes)
            row = dict(task=f"{furniture}-{randomness}", episodes=args.episodes, first_seed=args.seed, noise=args.noise, success=len(lengths) / args.episodes,
                       success_low=low, success_high=high, stages=float(np.mean(pairs)), steps=float(np.mean(lengths)) if lengths else "",
                       diverged=diverged) | provenance()  # fmt: skip
            write_csv(args.out, [r for r in read_csv(args.out) if r["task"] != row["task"]] + [row])
            print(f"{row['task']}: {len(lengths)} of {args.episodes} [{100 * low:.0f}, {100 * high:.0f}] %", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
