"""Speed of FurnitureBench's tasks on MuJoCo, in control steps of 1/10 s.

    python -m benchmark.throughput_furniture            # writes benchmark/results/throughput_furniture.csv

vector   FurnitureVectorEnv with 1, 8 and 32 environments that replay the scripted assembler's episodes in chunks, in `threads` threads:
         per second of wall time, and `cpu`, per second of the process's CPU time
single   one environment that the assembler steers, its own time left out, per second of CPU time: `default`, and `fine` with steps of
         1/480 s throughout
phase    milliseconds of CPU time per control step of both, by what the robot does: open or closed fingers, far from or near a thread
physics  share of the simulator's time in `default`: finding contacts, setting up constraints, solving them, and the rest

Run it on an idle machine.
"""

import copy
import dataclasses
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import tyro

from benchmark.tools import RESULTS, provenance, write_csv
from demos.make_furniture_demos import ASSEMBLERS, run_episode
from envs.furniture_mujoco import FurnitureEnv, FurnitureVectorEnv


@dataclass
class Args:
    furniture: tuple[str, ...] = ("one_leg", "lamp")
    """Tasks."""
    randomness: str = "low"
    """Range of the initial states."""
    envs: tuple[int, ...] = (1, 8, 32)
    """Numbers of environments."""
    threads: int = 2
    """Threads of the vector environment."""
    episodes: int = 4
    """Episodes of the assembler, with seeds from 0, which all measurements use."""
    out: Path = RESULTS / "throughput_furniture.csv"
    """CSV to write."""


class TimedEnv(FurnitureEnv):
    """Times its control steps by phase; with `fine`, all of MuJoCo's steps are of 1/480 s."""

    def __init__(self, furniture: str, randomness: str, fine: bool):
        super().__init__(furniture, randomness)
        self.seconds, self.profile = defaultdict(list), np.zeros(4)
        if fine:
            self.furniture = dataclasses.replace(self.furniture, steps=(8, 8, 8))
            self.models = {key: copy.copy(model) for key, model in self.models.items()}
            for model in self.models.values():
                model.opt.timestep = 1 / 480

    def step(self, action):
        phase = f"{'near' if self.near_thread() else 'far'}, {'closed' if action[9] > 0 else 'open'}"
        timers = [self.data.timer[getattr(mujoco.mjtTimer, f"mjTIMER_{name}")] for name in ("STEP", "POS_COLLISION", "POS_MAKE", "CONSTRAINT")]
        before = [timer.duration for timer in timers]
        start = time.thread_time()
        result = super().step(action)
        self.seconds[phase].append(time.thread_time() - start)
        self.profile += [timer.duration - old for timer, old in zip(timers, before, strict=True)]
        return result


def time_single(furniture: str, args: Args, fine: bool) -> tuple[TimedEnv, int]:
    """The environment with the times of `args.episodes` episodes of the assembler, and how many of them succeeded."""
    env = TimedEnv(furniture, args.randomness, fine)
    rewards = [run_episode(env, ASSEMBLERS[furniture], seed)["rewards"].sum() for seed in range(args.episodes)]
    return env, sum(reward == len(env.furniture.pairs) for reward in rewards)


def time_vector(furniture: str, args: Args, number: int, actions: list[np.ndarray]) -> tuple[float, float]:
    """Control steps per second of wall time and of CPU time, resets left out."""
    vector = FurnitureVectorEnv(number, furniture, args.randomness, threads=args.threads)
    everyone, seeds = np.ones(number, bool), np.arange(number) % args.episodes
    vector.reset(seeds, everyone)
    steps, wall, cpu = 0, 0.0, 0.0
    for start in range(0, min(map(len, actions)) - vector.chunk + 1, vector.chunk):
        chunks = np.stack([actions[seed][start : start + vector.chunk] for seed in seeds])
        begin = time.perf_counter(), time.process_time()
        length = vector.step(chunks, everyone)[-1]
        wall, cpu, steps = wall + time.perf_counter() - begin[0], cpu + time.process_time() - begin[1], steps + length.sum()
    vector.close()
    return steps / wall, steps / cpu


def measure(furniture: str, args: Args) -> list[dict]:
    """The rows of one task."""
    rows, source, speed = [], provenance(), {}
    add = lambda name, variant, value, unit: rows.append(dict(name=name, variant=variant, value=value, unit=unit, furniture=furniture,
                                                              threads=args.threads, **source))  # fmt: skip
    for fine in (False, True):
        variant = "fine" if fine else "default"
        env, successes = time_single(furniture, args, fine)
        everything = [value for values in env.seconds.values() for value in values]
        speed[variant] = len(everything) / sum(everything)
        add("single", variant, speed[variant], "control steps/s")
        print(f"{furniture}, {variant}: {speed[variant]:.0f} control steps/s, {successes} of {args.episodes} episodes succeeded", flush=True)
        for phase, values in sorted(env.seconds.items()):
            add("phase", f"{variant}, {phase}", 1e3 * statistics.mean(values), "ms")
            add("phase steps", f"{variant}, {phase}", len(values) / args.episodes, "control steps/episode")
        if not fine:
            total, collision, make, solve = env.profile
            for part, value in (("contacts", collision), ("constraints", make), ("solver", solve), ("rest", total - collision - make - solve)):
                add("physics", part, value / total, "share")
    print(f"default is {speed['default'] / speed['fine']:.2f} times as fast", flush=True)
    env = FurnitureEnv(furniture, args.randomness)
    actions = [run_episode(env, ASSEMBLERS[furniture], seed, noise=0.0)["actions"] for seed in range(args.episodes)]
    for number in args.envs:
        wall, cpu = time_vector(furniture, args, number, actions)
        add("vector", str(number), wall, "control steps/s")
        add("vector", f"{number}, cpu", cpu, "control steps/s")
        print(f"{number} environments, {args.threads} threads: {wall:.0f} control steps/s, {cpu:.0f} per CPU second", flush=True)
    return rows


def main(args: Args):
    write_csv(args.out, [row for furniture in args.furniture for row in measure(furniture, args)])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
