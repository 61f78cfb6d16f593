"""Runs an experiment, methods x tasks x seeds, through Ray, and collects its runs in a CSV.

    pip install -r baselines/requirements.txt
    python -m benchmark.run gym                        # RLDT on Gym; also: robomimic, furniture
    python -m benchmark.run baselines                  # every method on Gym, for equal time
    python -m benchmark.run sparse                     # peers on sparse rewards, for equal time
    python -m benchmark.run ablations                  # one setting of RLDT changed at a time
    python -m benchmark.run search                     # settings of each method, on seeds of their own
    python -m benchmark.run search-sparse              # and of its peers on One-Leg
    python -m benchmark.run controls                   # what each addition gives on sparse rewards

A row per run goes to benchmark/results/<experiment>.csv, its curve to curves.csv beside it. What the CSV
holds is not run again, so this can be stopped and started again; a run that was cut off starts over.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from baselines import families
from benchmark.tools import RESULTS, ROOT, read_csv, replace_rows

GYM = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
METHODS = {  # module and flags
    "rldt": ("rldt", ""),  # the script of the task
    "rldt-delta": ("rldt", "--kernel delta"),
    "qam": ("baselines.qam", ""),
    "reinflow": ("baselines.reinflow", ""),
    "dppo": ("baselines.dppo", ""),
    "dppo-diffusion": ("baselines.dppo", "--form diffusion"),
    "fpo": ("baselines.fpo", "--form fpo"),
    "fpo++": ("baselines.fpo", "--form fpo++"),
    "best-of-n": ("baselines.best_of_n", ""),
    "qc": ("baselines.best_of_n", "--candidates 16 --clone-steps 32"),
    "dsrl": ("baselines.dsrl", ""),
    "dsrl-sac": ("baselines.dsrl", "--form sac"),
    "sac": ("baselines.sac", ""),
}
VARIANTS = {  # of RLDT, 24 iterations each: a whole run on Hopper
    "rldt": "", "literal-loss": "--transport-loss literal", "delta": "--kernel delta",
    "no-layernorm": "--no-critic-layer-norm", "unscaled": "--gradient-norm 0", "alpha0": "--alpha 0",
    "double-field": "--gradient-norm 2", "steady": "--anneal 1", "alpha1e-4": "--alpha 1e-4",
    "P2": "--n-particles 2", "P8": "--n-particles 8", "P16": "--n-particles 16",
    "no-consistency": "--consistency-weight 0", "no-constraint": "--constraint-weight 0",
    "base-reference": "--reference-every 0", "batch-256": "--critic-batch 256",
    "updates-0.25": "--critic-steps 8 --actor-steps 2",
    "updates-4": "--critic-steps 128 --actor-steps 32",
}  # fmt: skip
TRIES = {  # four settings of each method, numbered from 1; `earlier-` in the CSV: of former lists
    "rldt": ("", "--actor-lr 2e-4", "--actor-batch 128", "--constraint-weight 0.1 --actor-lr 2e-4"),
    "qam": ("--inv-temp 2", "--inv-temp 5", "--inv-temp 15", "--inv-temp 5 --actor-lr 3e-4"),
    "reinflow": ("", "--clone-weight 0", "--batch 1250", "--clip 0.02 --batch 2500"),
    "dppo": ("", "--actor-lr 1e-4", "--clip 0.01 --batch 5000", "--sigma 0.15"),
    "fpo++": ("", "--actor-lr 1e-4", "--clip 0.01", "--actor-lr 1e-4 --clip 0.05"),
    "best-of-n": ("--candidates 4", "--candidates 8", "--candidates 2", "--candidates 16"),
    "dsrl": ("", "--bound 1", "--bound 2.5", "--actor-steps 32"),
    "sac": ("", "--lr 1e-4", "--gradient-steps 100", "--entropy-start 0.01"),
}  # fmt: skip
SPARSE_TRIES = {  # two settings of each peer
    "dppo": ("", "--clip 0.01"), "qam-demos": ("", "--inv-temp 30"),
    "dsrl-demos": ("", "--bound 1"), "best-of-n-demos": ("--candidates 4", "--candidates 16"),
}  # fmt: skip
RECIPE = (  # all that may be added on sparse rewards
    "--demos --bc-weight 0.1 --critics 4 --best-of 16 --q-gradient particles --n-particles 16"
    " --actor-batch 64 --transport-scale 20 --reference-every 0 --warmup-iterations 12 --actor-lr 1e-4"
)
CONTROLS = {  # what undoes a part of it
    "all": "", "no-demos": "--no-demos", "no-cloning": "--bc-weight 0", "two-critics": "--critics 2",
    "no-best-of": "--best-of 1", "no-field": "--transport-scale 0", "derivative": "--q-gradient critic",
}  # fmt: skip
SECONDS = {"Hopper-v4": 300, "one_leg-low": 2700, "square-state": 2700, "transport-state": 3600}


def numbered(methods: dict[str, tuple[str, str]], tries: dict[str, tuple[str, ...]]):
    """The tries of each method, as methods of their own."""
    return {
        f"{name}#{number}": (methods[name][0], f"{methods[name][1]} {flags}".strip())
        for name, options in tries.items()
        for number, flags in enumerate(options, 1)
    }


@dataclass
class Experiment:
    methods: dict[str, tuple[str, str]]  # module and flags
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    timed: bool = False  # runs end after the SECONDS of their task
    curves: bool = True  # keep them in curves.csv


RLDT = {name: METHODS[name] for name in ("rldt", "rldt-delta")}
DELTA = {"rldt-delta": ("rldt", "--kernel delta --q-gradient critic")}  # on furniture
PEERS = {name: METHODS[name] for name in ("rldt", "dppo", "qam", "dsrl", "best-of-n", "qc", "dsrl-sac")}
for name in ("qam", "dsrl", "best-of-n", "qc"):  # with demonstrations in the replay
    PEERS[f"{name}-demos"] = (METHODS[name][0], f"{METHODS[name][1]} --demos".strip())
PARTS = {f"control-{name}": ("rldt", f"{RECIPE} {flags}") for name, flags in CONTROLS.items()}
SHORT = {name: ("rldt", f"{flags} --iterations 24".strip()) for name, flags in VARIANTS.items()}
EXPERIMENTS = {
    "gym": Experiment({"rldt": METHODS["rldt"]}, GYM, (1, 2, 3, 4, 5)),
    "robomimic": Experiment(RLDT, ("lift-image", "square-state"), (1, 2, 3)),
    "furniture": Experiment(RLDT | DELTA, ("one_leg-low", "lamp-low"), (1, 2, 3)),
    "controls": Experiment(PARTS, ("one_leg-low", "square-state"), (1, 2, 3)),
    "baselines": Experiment(METHODS, GYM, (1, 2, 3), timed=True),
    "sparse": Experiment(PEERS, ("one_leg-low", "square-state"), (1, 2, 3), timed=True),
    "ablations": Experiment(SHORT, ("Hopper-v4", "Walker2d-v4"), (1, 2, 3, 4, 5), curves=False),
    "search": Experiment(
        numbered(METHODS, TRIES), ("Hopper-v4", "Walker2d-v4"), (11, 12), timed=True, curves=False
    ),
    "search-sparse": Experiment(numbered(PEERS, SPARSE_TRIES), ("one_leg-low",), (11,), timed=True),
}
SCORES = (  # rows of metrics.csv that have one of these go into curves.csv
    "eval_return", "eval_return_sampled", "train_success", "eval_success", "eval_success_sampled",
    "train_stages", "eval_stages", "eval_stages_sampled", "diagnostics/phi_norm",
)  # fmt: skip
CURVE = (  # columns of curves.csv
    "table", "task", "method", "seed", "iteration", "env_steps", "wall_s", *SCORES,
    "losses/constraint", "diagnostics/base_distance",
)  # fmt: skip


@dataclass
class Args:
    experiment: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]  # what to run
    methods: tuple[str, ...] = ()  # of the experiment's, all by default; of the search `qam` or `qam#3`
    tasks: tuple[str, ...] = ()  # the experiment's by default; or others, as square-image
    seeds: tuple[int, ...] = ()  # the experiment's by default
    extra: str = ""  # flags for every run, as --extra="--kernel delta"; give them an --out of their own
    out: Path | None = None  # CSV to append to; default benchmark/results/<experiment>.csv
    runs: Path = Path("runs/benchmark")  # directory for the run directories and the logs
    parallel: int = 2  # runs side by side on this machine, one core each
    address: str | None = None  # Ray cluster, this checkout on every node: auto, or host:port


@dataclass
class Cell:
    """One run."""

    task: str
    method: str
    seed: int
    module: str
    flags: str  # all but task, seed and name

    @property
    def name(self) -> str:
        return f"{self.task}__{self.method}__{self.seed}"

    def command(self, runs: Path) -> list[str]:
        family, named = families.flags_of(self.task)
        script = family.script.__name__, *named
        start = script if self.module == "rldt" else (self.module, "--task", self.task)
        given = f"--seed {self.seed} --exp-name {self.method} --threads 1 {self.flags}"
        return [sys.executable, "-m", *start, *shlex.split(given), "--runs", str(runs.resolve())]


def cells(args: Args) -> list[Cell]:
    """What is to be run, seed by seed: every method, task and seed that the CSV does not hold."""
    experiment = EXPERIMENTS[args.experiment]
    known = {*experiment.methods, *(name.partition("#")[0] for name in experiment.methods)}
    if unknown := {*args.methods} - known:
        raise SystemExit(f"--methods: {min(unknown)} is none of {', '.join(experiment.methods)}")
    held = {(row["task"], row["method"], row["seed"]) for row in read_csv(args.out)}
    found = []
    for seed in args.seeds or experiment.seeds:
        for task in [task.replace("one-leg", "one_leg") for task in args.tasks or experiment.tasks]:
            seconds = SECONDS.get(task, 600 if "-v" in task else 3600)
            budget = f"--wall-budget-s {seconds}" if experiment.timed else ""
            for method, (module, own) in experiment.methods.items():
                wanted = not args.methods or {method, method.partition("#")[0]} & {*args.methods}
                flags = " ".join(filter(None, (own, budget, args.extra)))
                if wanted and (task, method, str(seed)) not in held:
                    found.append(Cell(task, method, seed, module, flags))
    return found


def execute(cell: Cell, runs: Path) -> dict[str, str]:
    """Runs a cell to its end, on whichever node; returns the files of its run, or what went wrong."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / f"{cell.name}.log"
    with path.open("w") as log:
        code = subprocess.run(cell.command(runs), stdout=log, stderr=log, cwd=ROOT).returncode
    if code:
        tail = "\n  ".join(path.read_text().strip().splitlines()[-3:])
        return {"error": f"failed with {code}:\n  {tail}"}
    run = max(run for run in runs.glob(f"{cell.name}__*") if run.is_dir())  # names end with the time
    return {file: (run / file).read_text() for file in ("metrics.csv", "result.json")}


def append(path: Path, points: list[dict]):
    """Appends points to curves.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, CURVE, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(points)


def keep(cell: Cell, files: dict[str, str], args: Args) -> str:
    """Writes what a run returned into the CSVs; returns the line to report."""
    if "error" in files:
        return f"{cell.name} {files['error']}"
    result = json.loads(files["result.json"])
    settings, _ = result.pop("args"), result.pop("versions")
    result = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    row = {"task": cell.task, "method": cell.method, "seed": cell.seed}
    if EXPERIMENTS[args.experiment].curves:
        points = []
        for point in csv.DictReader(files["metrics.csv"].splitlines()):
            if any(point.get(column) for column in SCORES):
                point = {k: f"{float(v):.6g}" if "." in v else v for k, v in point.items()}
                points.append(point | {"table": args.experiment} | row)
        append(args.out.with_name("curves.csv"), points)
    kept = ("backend", "preset", "threads", "device", "num_envs", "precision")
    row |= {key: settings.get(key) for key in kept}
    row |= {"episodes": settings["final_eval_episodes"], "args": cell.flags} | result
    replace_rows(args.out, [row], ("task", "method", "seed"))
    measure = "return" if "base_return" in row else "success"
    change = f"{row[f'base_{measure}']} -> {row[f'final_{measure}']}"
    return f"{cell.name}: {change}, {float(row['wall_s']) / 60:.1f} min"


def launch(todo: list[Cell], args: Args) -> int:
    """Runs the cells through Ray and keeps each result as it comes; returns how many failed."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default would slow the timed runs
    cores = {} if args.address else {"num_cpus": args.parallel, "include_dashboard": False}
    ray.init(args.address, log_to_driver=False, **cores)
    remote = ray.remote(execute).options(num_cpus=1, max_retries=0)
    waiting = {remote.remote(cell, args.runs.resolve()): cell for cell in todo}
    failed = 0
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
    print(f"results in {args.out}, {failed} runs failed")
    return failed


def main(args: Args):
    args.out = args.out or RESULTS / f"{args.experiment}.csv"
    args.runs /= args.experiment  # two of them side by side
    todo = cells(args)
    print(f"{len(todo)} runs to do", flush=True)
    sys.exit(1 if todo and launch(todo, args) else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
