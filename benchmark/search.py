"""Searches the laptop settings of the baselines: equal time for each try, on a seed that the comparison does not use.

    pip install -r baselines/requirements.txt
    python -m benchmark.search                          # writes benchmark/results/search.csv and search/

A try is scored by the mean of its final returns from x_0 = 0 and from noise. What the CSV holds is not run again, so lines can be
added to TRIES. The settings that win become the presets by hand.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmark import run
from benchmark.returns import finished
from benchmark.run import Cell, check_methods, launch
from benchmark.tools import RESULTS, group, markdown, parse, read_csv

TRIES = {  # flags that replace a preset's, in the order in which they are numbered from 1
    "qam": (
        "--inv-temp 2", "--inv-temp 5", "--inv-temp 15", "--inv-temp 5 --actor-lr 3e-4", "--inv-temp 15 --actor-lr 3e-4", "--inv-temp 5 --actor-steps 16",
    ),
    "reinflow": (
        "--actor-lr 1e-4 --clip 0.01 --batch 2500", "--actor-lr 3e-4 --clip 0.01 --batch 2500", "--actor-lr 1e-4 --clip 0.02 --batch 2500",
        "--actor-lr 1e-4 --clip 0.01 --batch 2500 --entropy-weight 0", "--actor-lr 1e-4 --clip 0.01 --batch 2500 --sigma-min 0.05 --sigma-max 0.15",
        "--actor-lr 2e-4 --clip 0.02 --batch 1250",
    ),
    "dppo": (
        "--actor-lr 1e-4 --clip 0.01 --batch 5000", "--actor-lr 3e-4 --clip 0.01 --batch 5000", "--actor-lr 3e-4 --clip 0.02 --batch 2500",
        "--actor-lr 3e-4 --clip 0.02 --batch 2500 --sigma 0.15", "--actor-lr 3e-4 --clip 0.05 --batch 2500 --epochs 10",
    ),
    "dppo-diffusion": (
        "--actor-lr 1e-4 --clip 0.01 --batch 5000", "--actor-lr 3e-4 --clip 0.01 --batch 5000", "--actor-lr 3e-4 --clip 0.02 --batch 2500",
        "--actor-lr 3e-4 --clip 0.05 --batch 2500", "--actor-lr 3e-4 --clip 0.02 --batch 2500 --sigma 0.15", "--actor-lr 1e-3 --clip 0.02 --batch 5000",
    ),
    "fpo": (
        "--actor-lr 1e-4 --clip 0.05", "--actor-lr 3e-4 --clip 0.05", "--actor-lr 3e-4 --clip 0.02", "--actor-lr 3e-4 --clip 0.1",
        "--actor-lr 3e-4 --clip 0.05 --samples 16", "--actor-lr 3e-4 --clip 0.05 --batch 1250",
    ),
    "fpo++": (
        *(f"{flags} --batch 2500 --actor-lr-end 1" for flags in (
            "--actor-lr 1e-4 --clip 0.01", "--actor-lr 3e-4 --clip 0.01", "--actor-lr 3e-4 --clip 0.04", "--actor-lr 3e-4 --clip 0.1")),
        "--actor-lr 2e-4 --clip 0.04 --batch 5000 --actor-lr-end 0.1", "--actor-lr 1e-4 --clip 0.04 --batch 10000 --samples 16 --actor-lr-end 1",
    ),
    "best-of-n": ("--candidates 4", "--candidates 8", "--candidates 2", "--candidates 16", "--candidates 4 --critic-steps 64", "--candidates 2 --critic-steps 64"),
    "sac": (
        "--lr 3e-4", "--lr 1e-4", "--lr 1e-4 --entropy-start 0.01", "--lr 1e-4 --entropy-start 0.01 --gamma 0.98",
        "--lr 3e-4 --entropy-start 0.01 --gradient-steps 1000 --critic-iterations 4", "--lr 3e-4 --gradient-steps 1000 --critic-iterations 4 --batch 128",
    ),
}  # fmt: skip


@dataclass
class Args(run.Args):
    methods: tuple[str, ...] = tuple(TRIES)
    """Methods, of: qam, reinflow, dppo, dppo-diffusion, fpo, fpo++, best-of-n, sac."""
    tasks: tuple[str, ...] = ("Hopper-v4",)
    """Gymnasium tasks."""
    seeds: tuple[int, ...] = (11,)
    """Seeds of each try, none of the comparison's."""
    wall_budget_s: float = 300.0
    """Seconds of training and evaluation per try, on one core."""
    out: Path = RESULTS / "search.csv"
    """CSV to append to; curves go to a folder of its name next to it."""


def tries(args: Args) -> list[Cell]:
    """What is to be run: the tries that the CSV does not hold, named <method>#<number>; every method's first, then the second ones."""
    check_methods(args.methods, TRIES)
    budget = f"--wall-budget-s {args.wall_budget_s:g}"
    chosen = [Cell(task, f"{method}#{number}", seed, " ".join(filter(None, (flags, budget, args.extra))))
              for number in range(1, 1 + max(map(len, TRIES.values()))) for task in args.tasks for seed in args.seeds
              for method in args.methods for flags in TRIES[method][number - 1 : number]]  # fmt: skip
    held = finished(args.out)
    return [cell for cell in chosen if cell.key() not in held]


def score(row: dict[str, str]) -> float:
    """Mean of the final returns from x_0 = 0 and from noise."""
    return (float(row["final_return"]) + float(row["final_return_sampled"])) / 2


def table(rows: list[dict[str, str]]) -> str:
    """A markdown table of the tries, each task's and method's best first."""
    lines = []
    for task, members in group(rows, "task").items():
        for row in sorted(members, key=lambda row: (row["method"].partition("#")[0], -score(row))):
            lines.append({
                "task": task, "try": row["method"], "settings": row["args"].partition(" --wall-budget-s")[0], "score": f"{score(row):.0f}",
                "final, x₀ = 0": f"{float(row['final_return']):.0f}", "final, sampled": f"{float(row['final_return_sampled']):.0f}",
                "env steps (10⁶)": f"{float(row['env_steps']) / 1e6:.2f}",
            })  # fmt: skip
    return markdown(lines)


def main(args: Args):
    todo = tries(args)
    print(f"{len(todo)} tries to do", flush=True)
    failed = launch(todo, args)
    print(table(read_csv(args.out)) if read_csv(args.out) else "no try finished")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(parse(Args, __doc__))
