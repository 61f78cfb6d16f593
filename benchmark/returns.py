"""Trains every (task, seed) and collects the results in one CSV.

    python -m benchmark.returns                         # writes benchmark/results/gym.csv and curves/
    python -m benchmark.returns --script rldt_robomimic.py --tasks square-state --seeds 1 2 3 --parallel 1   # robomimic.csv

Every run is a process of its own, `--parallel` of them side by side. What the CSV holds already is skipped,
so this can be stopped and started again; a run that was cut off, in --runs, goes on from its checkpoint if its flags are the same. Each run's curve goes to
curves/<task>__<method>__<seed>.csv next to the CSV.
"""

import csv
import fcntl
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmark.tools import RESULTS, ROOT, parse, read_csv, shown

COLUMNS = {  # by family
    "gym": (
        "task,method,preset,seed,base_return,final_return,best_return,final_return_sampled,env_steps,wall_s,threads,device,"
        "commit,date,args,base_return_sampled,best_return_sampled"
    ).split(","),
    "robomimic": (
        "task,method,preset,seed,base_success,final_success,best_success,final_success_sampled,env_steps,wall_s,threads,device,"
        "commit,date,args,base_success_sampled,best_success_sampled,base_success_low,base_success_high,final_success_low,"
        "final_success_high,final_success_sampled_low,final_success_sampled_high,episodes,num_envs"
    ).split(","),
    "furniture": (
        "task,backend,method,preset,seed,base_success,final_success,best_success,final_success_sampled,base_stages,final_stages,best_stages,"
        "final_stages_sampled,env_steps,wall_s,threads,device,commit,date,args,base_success_sampled,best_success_sampled,base_stages_sampled,"
        "base_success_low,base_success_high,final_success_low,final_success_high,final_success_sampled_low,final_success_sampled_high,"
        "base_stages_std,final_stages_std,episodes,num_envs"
    ).split(","),
}


@dataclass
class Args:
    tasks: tuple[str, ...] = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
    """Tasks; of rldt_robomimic.py: lift-image, square-state, ...; of rldt_furniture.py: one_leg-low, lamp-med, ..."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds."""
    method: str = "rldt"
    """Name under which the rows go into the CSV."""
    extra: str = ""
    """Flags for the script, in one string, e.g. "--kernel delta"."""
    script: Path = Path("rldt_gym.py")
    """Script to run, relative to the repository."""
    out: Path | None = None
    """CSV to append to; default benchmark/results/<family>.csv."""
    runs: Path = Path("runs")
    """Directory for the run directories and the logs."""
    parallel: int = 2
    """Runs side by side, each with one thread unless `extra` says otherwise."""


@dataclass
class Job:
    """One run of a script."""

    task: str
    method: str
    seed: int
    extra: str = ""
    script: Path = Path("rldt_gym.py")

    @property
    def name(self) -> str:
        return f"{self.task}__{self.method}__{self.seed}"

    def key(self) -> tuple[str, str, str]:
        return self.task, self.method, str(self.seed)

    @property
    def family(self) -> str:
        """gym, robomimic or furniture, from the name of the script."""
        return self.script.stem.removeprefix("rldt_")

    def start(self, runs: Path) -> subprocess.Popen:
        task, _, kind = self.task.rpartition("-")
        chosen = {
            "gym": ["--env-id", self.task], "robomimic": ["--task", task, "--obs", kind], "furniture": ["--furniture", task, "--randomness", kind],
        }[self.family]  # fmt: skip
        flags = [*chosen, "--seed", str(self.seed), "--exp-name", self.method, "--runs", str(runs.resolve()), *shlex.split(self.extra)]
        runs.mkdir(parents=True, exist_ok=True)
        record = runs / f"{self.name}.flags"
        same = record.exists() and record.read_text() == shlex.join(flags)
        cut_off = [path for path in self.run_dirs(runs) if (path / "checkpoint.pt").exists() and not (path / "result.json").exists()]
        record.write_text(shlex.join(flags))
        if same and cut_off:
            flags = ["--resume", str(max(cut_off))]
        with (runs / f"{self.name}.log").open("a" if same and cut_off else "w") as log:
            return subprocess.Popen([sys.executable, ROOT / self.script, *flags], stdout=log, stderr=log, cwd=ROOT)

    def run_dirs(self, runs: Path) -> list[Path]:
        return [path for path in runs.glob(f"{self.name}__*") if path.is_dir()]

    def run_dir(self, runs: Path) -> Path:
        """The newest run directory of this job; names end with the time."""
        return max(self.run_dirs(runs))


def finished(out: Path) -> set[tuple[str, str, str]]:
    return {(row["task"], row["method"], row["seed"]) for row in read_csv(out)}


def append_row(out: Path, row: dict, columns: list[str]):
    """Appends a row, under a lock, unless one of the same task, method and seed is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, 2)  # to the end, where another process may have written meanwhile
        if (row["task"], row["method"], str(row["seed"])) in finished(out):
            return
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        digits = lambda key: 4 if "success" in key or "stages" in key else 1
        writer.writerow({k: round(v, digits(k)) if isinstance(v, float) else v for k, v in row.items()})


def collect(job: Job, run_dir: Path, out: Path, curves: str):
    """Copies the curve of a finished run, then appends its row."""
    rows = read_csv(run_dir / "metrics.csv")
    charts = ("train_", "eval_", "losses/", "diagnostics/")
    columns = ["iteration", "env_steps", "wall_s", *(key for key in rows[0] if key.startswith(charts) and not key.endswith("_std"))]
    curve = out.parent / curves / f"{job.name}.csv"
    curve.parent.mkdir(parents=True, exist_ok=True)
    with curve.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: short(v) for k, v in row.items()} for row in rows)
    result = json.loads((run_dir / "result.json").read_text())
    append_row(out, result | {"task": job.task, "method": job.method, "seed": job.seed, "args": job.extra}, COLUMNS[job.family])


def short(value: str) -> str:
    """A number of a CSV with at most six significant digits; integers and empty cells as they are."""
    return f"{float(value):.6g}" if "." in value else value


def run_jobs(jobs: list[Job], out: Path, runs: Path, parallel: int, curves: str = "curves"):
    """Runs what `out` does not hold yet, with curves in a folder next to it; reports runs that fail."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    waiting = [job for job in jobs if job.key() not in finished(out)]
    print(f"{len(waiting)} of {len(jobs)} runs to do, {parallel} side by side", flush=True)
    running: list[tuple[Job, subprocess.Popen, float]] = []
    failed = 0
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running.append((job, job.start(runs), time.perf_counter()))
            time.sleep(0.5)
            for job, process, start in [entry for entry in running if entry[1].poll() is not None]:
                running.remove((job, process, start))
                minutes = (time.perf_counter() - start) / 60
                if process.returncode == 0:
                    collect(job, job.run_dir(runs), out, curves)
                    row = next(row for row in read_csv(out) if (row["task"], row["method"], row["seed"]) == job.key())
                    measure = "return" if job.family == "gym" else "success"
                    print(f"{job.name}: {row[f'base_{measure}']} -> {row[f'final_{measure}']}, {minutes:.1f} min", flush=True)
                else:
                    failed += 1
                    tail = (runs / f"{job.name}.log").read_text().strip().splitlines()[-3:]
                    print(f"{job.name} failed with {process.returncode}:", *tail, sep="\n  ", flush=True)
    finally:
        for _, process, _ in running:
            process.terminate()
    print(f"results in {shown(out)}" + (f", {failed} runs failed" if failed else ""))


def main(args: Args):
    jobs = [Job(task, args.method, seed, args.extra, args.script) for seed in args.seeds for task in args.tasks]
    run_jobs(jobs, args.out or RESULTS / f"{jobs[0].family}.csv", args.runs, args.parallel)


if __name__ == "__main__":
    main(parse(Args, __doc__))
