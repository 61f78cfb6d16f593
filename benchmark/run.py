"""Runs the comparison of methods, tasks and seeds through Ray, and collects it in CSVs.

    pip install -r baselines/requirements.txt
    python -m benchmark.run --parallel 2                       # here, two runs side by side
    python -m benchmark.run --address auto                     # on a Ray cluster whose nodes have this checkout at the same path

writes a row per run to benchmark/results/baselines.csv and its curve to baselines/<task>__<method>__<seed>.csv next to it.
Every run of a task gets the same wall time. What the CSV holds when it starts is not run again, so this can be stopped and started again; a run
that was cut off starts over.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmark.returns import Job, collect, finished
from benchmark.tools import RESULTS, ROOT, parse, read_csv, shown

METHODS = {  # module and flags
    "rldt": ("rldt_gym", ""),
    "rldt-delta": ("rldt_gym", "--kernel delta"),
    "qam": ("baselines.qam_gym", ""),
    "reinflow": ("baselines.reinflow_gym", ""),
    "dppo": ("baselines.dppo_gym", ""),
    "dppo-diffusion": ("baselines.dppo_gym", "--form diffusion"),
    "fpo": ("baselines.fpo_gym", "--form fpo"),
    "fpo++": ("baselines.fpo_gym", "--form fpo++"),
    "best-of-n": ("baselines.best_of_n_gym", ""),
    "sac": ("baselines.sac_gym", ""),
}
BUDGETS = {"Hopper-v4": 300.0}  # seconds of training and evaluation per run; other tasks: 600


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods, of: rldt, rldt-delta, qam, reinflow, dppo, dppo-diffusion, fpo, fpo++, best-of-n, sac."""
    tasks: tuple[str, ...] = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
    """Gymnasium tasks."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds."""
    wall_budget_s: float = 0.0
    """Seconds of training and evaluation per run; 0: 300 of Hopper-v4, 600 of other tasks."""
    extra: str = ""
    """Flags for every script, in one string, e.g. "--preset paper", whose runs still end with the wall budget; give them an --out of their own, rows are known by task, method and seed alone."""
    out: Path = RESULTS / "baselines.csv"
    """CSV to append to; curves go to a folder of its name next to it."""
    runs: Path = Path("runs/comparison")
    """Directory for the run directories and the logs."""
    parallel: int = 2
    """Runs side by side on this machine, one core each."""
    address: str | None = None
    """Ray cluster to run on, `auto` or host:port; `parallel` is then the cluster's number of cores."""


@dataclass
class Cell(Job):
    """One run of the comparison."""

    family = "gym"

    def start(self, runs: Path) -> subprocess.Popen:
        module, flags = METHODS[self.method.partition("#")[0]]  # qam#3: the third try of benchmark.search
        command = [sys.executable, "-m", module, "--env-id", self.task, "--seed", str(self.seed), "--exp-name", self.method]
        command += ["--runs", runs.resolve(), *shlex.split(flags), *shlex.split(self.extra)]
        runs.mkdir(parents=True, exist_ok=True)
        with (runs / f"{self.name}.log").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def check_methods(methods: tuple[str, ...], known):
    """Stops where one of the methods is not known."""
    unknown = set(methods) - set(known)
    if unknown:
        raise SystemExit(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(known)}")


def cells(args: Args) -> list[Cell]:
    """What is to be run: every method, task and seed that no CSV holds, seed by seed."""
    check_methods(args.methods, METHODS)
    held = finished(args.out)
    budgets = {task: args.wall_budget_s or BUDGETS.get(task, 600.0) for task in args.tasks}
    chosen = [Cell(task, method, seed, f"{args.extra} --wall-budget-s {budgets[task]:g}".strip())
              for seed in args.seeds for task in args.tasks for method in args.methods]  # fmt: skip
    return [cell for cell in chosen if cell.key() not in held]


def execute(cell: Cell, runs: Path) -> dict[str, str]:
    """Runs a cell to its end, on whichever node; returns the name and the files of its run, or what went wrong."""
    process = cell.start(runs)
    try:
        code = process.wait()
    finally:
        process.terminate()
    if code:
        return {"error": f"failed with {code}:\n  " + "\n  ".join((runs / f"{cell.name}.log").read_text().strip().splitlines()[-3:])}
    run_dir = cell.run_dir(runs)
    return {"name": run_dir.name} | {file: (run_dir / file).read_text() for file in ("metrics.csv", "result.json")}


def keep(cell: Cell, files: dict[str, str], args: Args) -> str:
    """Writes what a run returned into the CSVs; returns the line to report."""
    if "error" in files:
        return f"{cell.name} {files['error']}"
    run_dir = args.runs / files["name"]  # exists already unless the run was on another node
    run_dir.mkdir(parents=True, exist_ok=True)
    for file in ("metrics.csv", "result.json"):
        (run_dir / file).write_text(files[file])
    collect(cell, run_dir, args.out, args.out.stem)
    row = next(row for row in read_csv(args.out) if (row["task"], row["method"], row["seed"]) == cell.key())
    return f"{cell.name}: {row['base_return']} -> {row['final_return']}, {float(row['wall_s']) / 60:.1f} min"


def launch(todo: list[Cell], args) -> int:
    """Runs the cells through Ray, as many side by side as there are cores, and keeps each result as it comes; returns how many failed."""
    if not todo:
        return 0
    try:
        import ray
    except ImportError as error:
        raise SystemExit("The comparison needs Ray: pip install -r baselines/requirements.txt") from error
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would give its workers, and so the timed runs, what others leave over
    if args.address:
        ray.init(args.address, log_to_driver=False)
    else:
        ray.init(num_cpus=args.parallel, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(execute).options(num_cpus=1, max_retries=0)
    waiting, failed = {remote.remote(cell, args.runs.resolve()): cell for cell in todo}, 0
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        cell = waiting.pop(done)
        try:
            files = ray.get(done)
        except ray.exceptions.RayError as error:  # its node went away
            files = {"error": f"was lost ({type(error).__name__}: {error})"}
        failed += "error" in files
        print(keep(cell, files, args), flush=True)
    ray.shutdown()
    print(f"results in {shown(args.out)}" + (f", {failed} runs failed" if failed else ""))
    return failed


def main(args: Args):
    todo = cells(args)
    print(f"{len(todo)} of {len(args.methods) * len(args.tasks) * len(args.seeds)} runs to do", flush=True)
    sys.exit(1 if launch(todo, args) else 0)


if __name__ == "__main__":
    main(parse(Args, __doc__))
