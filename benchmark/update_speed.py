"""Measures how often each method of the comparison updates its networks, per environment step and per second, on one core.

    pip install -r baselines/requirements.txt
    python -m benchmark.update_speed                    # writes benchmark/results/update_speed.csv

Every method runs its laptop preset for a few iterations; those after its warm-up are measured, evaluations are not. A gradient step
is a call of an optimizer's step: of the actor, of the critic or value network, or of SAC's entropy coefficient. A row replaces that of its
task and method, others stay.
"""

import importlib
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmark.run import METHODS, check_methods
from benchmark.tools import RESULTS, markdown, parse, provenance, read_csv, write_csv

WARMUP = {"rldt_gym": 1, "baselines.qam_gym": 1, "baselines.best_of_n_gym": 1, "baselines.sac_gym": 1}  # iterations; none in the PPO family


@dataclass
class Args:
    tasks: tuple[str, ...] = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
    """Gymnasium tasks."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods, of: rldt, rldt-delta, qam, reinflow, dppo, dppo-diffusion, fpo, fpo++, best-of-n, sac."""
    measured: int = 4
    """Training iterations that are measured."""
    seed: int = 1
    """Seed of the runs."""
    extra: str = ""
    """Flags for every script, in one string."""
    out: Path = RESULTS / "update_speed.csv"
    """CSV to write."""


def measure(task: str, method: str, args: Args) -> dict:
    """Runs a method on a task for a few iterations in this process; its rates over the last `measured` of them."""
    name, flags = METHODS[method]
    module, warmup = importlib.import_module(name), WARMUP.get(name, 0)
    critic_only = ["--critic-iterations", "0"] if name == "baselines.sac_gym" else []
    count, marks = 0, {}  # env steps -> (gradient steps, seconds) at the end of that iteration

    def counted(*_):
        nonlocal count
        count += 1

    class Recorder(module.SummaryWriter):
        def add_scalar(self, tag, value, step, **rest):
            marks.setdefault(step, (count, time.perf_counter()))
            super().add_scalar(tag, value, step, **rest)

    hook, writer = register_optimizer_step_post_hook(counted), module.SummaryWriter
    module.SummaryWriter = Recorder
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = [*shlex.split(flags), "--env-id", task, "--seed", args.seed, "--runs", folder, "--threads", 1, *shlex.split(args.extra)]
            flags += ["--warmup-iterations", warmup, *critic_only, "--iterations", warmup + args.measured + 2, "--eval-every", 1000]
            module.main(module.parse_args([str(flag) for flag in [*flags, "--eval-episodes", 2, "--final-eval-episodes", 2]]))
    finally:
        hook.remove()
        module.SummaryWriter = writer
    first, last = sorted(marks)[-1 - args.measured], max(marks)
    steps, seconds = marks[last][0] - marks[first][0], marks[last][1] - marks[first][1]
    return {
        "task": task, "method": method, "iterations": args.measured, "env_steps_per_s": (last - first) / seconds, "gradient_steps_per_s": steps / seconds,
        "gradient_steps_per_1000_env_steps": 1000 * steps / (last - first), "iteration_s": seconds / args.measured, **provenance(),
    }  # fmt: skip


def main(args: Args):
    check_methods(args.methods, METHODS)
    torch.set_num_threads(1)
    rows = []
    for task in args.tasks:
        for method in args.methods:
            rows.append(measure(task, method, args))
            others = [row for row in read_csv(args.out) if (row["task"], row["method"]) != (task, method)]
            write_csv(args.out, [*others, rows[-1]])
    print(markdown([{
        "task": row["task"], "method": row["method"], "env steps/s": f"{row['env_steps_per_s']:.0f}", "gradient steps/s": f"{row['gradient_steps_per_s']:.1f}",
        "gradient steps per 1000 env steps": f"{row['gradient_steps_per_1000_env_steps']:.1f}", "s per iteration": f"{row['iteration_s']:.1f}",
    } for row in rows]))  # fmt: skip


if __name__ == "__main__":
    main(parse(Args, __doc__))
