"""The ablations: one setting changed at a time, three seeds each.

    python -m benchmark.ablations                       # writes benchmark/results/ablations_hopper.csv

Variants whose flags are the defaults of rldt_gym.py are the run `rldt` and are not run again; rows of `rldt`
with the same flags are taken over from the main results.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import rldt_gym
from benchmark.returns import COLUMNS, Job, append_row, finished, run_jobs
from benchmark.tools import RESULTS, parse, read_csv

VARIANTS = {
    "rldt": "",
    "literal-loss": "--transport-loss literal",
    "authors-loss": "--transport-loss authors",
    "rbf": "--kernel rbf",
    "delta": "--kernel delta",
    "P2": "--n-particles 2",
    "P4": "--n-particles 4",
    "P8": "--n-particles 8",
    "P16": "--n-particles 16",
    "alpha1e-3": "--alpha 1e-3",
    "alpha1e-4": "--alpha 1e-4",
    "alpha0": "--alpha 0",
    "layernorm": "--critic-layer-norm",
    "no-layernorm": "--no-critic-layer-norm",
}
CURVES = "curves_ablations"  # folder next to the CSV


@dataclass
class Args:
    task: str = "Hopper-v4"
    """Task."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to run."""
    iterations: int | None = None
    """Shorten all runs alike, to this many iterations."""
    extra: str = ""
    """Flags for all runs, in one string."""
    out: Path = RESULTS / "ablations_hopper.csv"
    """CSV to append to."""
    shared: Path = RESULTS / "gym.csv"
    """CSV from which to take over rows of `rldt` on the same task, with the same flags."""
    runs: Path = Path("runs/ablations")
    """Directory for the run directories and the logs."""
    parallel: int = 2
    """Runs side by side, each with one thread."""


def distinct(variants: tuple[str, ...]) -> dict[str, str]:
    """The variants without those that are the default run under another name."""
    default = rldt_gym.parse_args([])
    is_default = {name: rldt_gym.parse_args(VARIANTS[name].split()) == default for name in variants}
    return {name: VARIANTS[name] for name in variants if name == "rldt" or not is_default[name]}


def main(args: Args):
    common = " ".join(filter(None, [f"--iterations {args.iterations}" if args.iterations else "", args.extra]))
    flags = {name: " ".join(filter(None, [flag, common])) for name, flag in distinct(args.variants).items()}
    folder = args.out.parent / CURVES
    for row in read_csv(args.shared):
        same = row["task"] == args.task and row["method"] == "rldt" and row["args"] == common
        if same and int(row["seed"]) in args.seeds and (args.task, "rldt", row["seed"]) not in finished(args.out):
            name = Job(args.task, "rldt", int(row["seed"])).name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(args.shared.parent / "curves" / f"{name}.csv", folder)
            append_row(args.out, row, COLUMNS["gym"])
    jobs = [Job(args.task, name, seed, flag) for seed in args.seeds for name, flag in flags.items()]
    run_jobs(jobs, args.out, args.runs, args.parallel, CURVES)


if __name__ == "__main__":
    main(parse(Args, __doc__))
