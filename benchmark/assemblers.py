"""Success of the scripted assemblers of the furniture tasks, in MuJoCo.

    python -m benchmark.assemblers                      # writes benchmark/results/assemblers.csv

A row is `episodes` episodes with seeds from `seed`, on which the assemblers were not developed, with the
noise that demonstrations are recorded with: the rate of episodes that assembled all pairs with its
95 % interval (Wilson), the mean number of pairs, and the mean length of the successes in steps of 0.1 s.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from benchmark.tools import RESULTS, provenance, replace_rows
from demos.make_furniture_demos import ASSEMBLERS, run_episode
from envs.furniture_mujoco import FurnitureEnv, PhysicsError
from envs.interface import success_rate


@dataclass
class Args:
    furniture: tuple[str, ...] = ("one_leg", "lamp")  # tasks
    randomness: tuple[str, ...] = ("low", "med")  # ranges of the initial states
    episodes: int = 100  # of each
    seed: int = 1000  # of the first episode; the others follow one by one
    noise: float = 0.004  # on the executed positions (m), see demos.make_furniture_demos
    out: Path = RESULTS / "assemblers.csv"  # CSV to write


def measure(furniture: str, randomness: str, args: Args) -> dict:
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
    row = dict(task=f"{furniture}-{randomness}", episodes=args.episodes, first_seed=args.seed)
    success = success_rate(np.array(pairs) == len(env.furniture.pairs), "success")
    row |= dict(noise=args.noise) | success
    row |= dict(stages=float(np.mean(pairs)), steps=float(np.mean(lengths)) if lengths else "")
    return row | dict(diverged=diverged) | provenance()


def main(args: Args):
    for furniture in args.furniture:
        for randomness in args.randomness:
            row = measure(furniture, randomness, args)
            replace_rows(args.out, [row], ("task",))
            print(f"{row['task']}: {100 * row['success']:.0f} %", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
