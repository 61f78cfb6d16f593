"""Kills tiny runs at random moments, resumes them, and compares them with runs that nobody killed.

    python tests/kills.py --moments 100        # of them all kinds of runs get their share

Prints in which phases the kills fell. metrics.csv, wall times aside, and policy.safetensors must be
equal to the last bit. Exits with 1 where they are not.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
WALL_COLUMNS = ("wall_s", "rollout_s", "critic_s", "actor_s", "update_s")
COMMON = "--iterations 9 --eval-every 4 --final-eval-episodes 2 --eval-episodes 2 --threads 1 "
COMMON += "--precision float32 "
ACTOR = COMMON + "--rounds 2 --segments 8 --critic-steps 2 --warmup-iterations 1 --actor-steps 1 "
GYM = ACTOR + "--actor-batch 8 --num-envs 4 --rollout-chunks 12 --buffer-iterations 2"
MANIPULATION = ACTOR + "--actor-batch 8 --num-envs 2"
TWO = "-m torch.distributed.run --nproc-per-node=2 rldt_gym.py"
RUNS = {  # kind -> script, flags
    "gym": ("rldt_gym.py", f"{GYM} --dataset DATA"),
    "robomimic": ("rldt_robomimic.py", f"{MANIPULATION} --task lift --rollout-chunks 6 --horizon 40"),
    "furniture": ("rldt_furniture.py", f"{MANIPULATION} --horizon 24 --buffer-iterations 2"),
    "qam": ("-m baselines.qam", GYM),
    "dppo": ("-m baselines.dppo", f"{COMMON} --num-envs 4 --rollout-chunks 12 --batch 16 --epochs 2"),
    "torchrun": (TWO, GYM),
}


class Failure(Exception):
    """A run that does not come to the result of one that nobody killed."""


def command(kind: str, folder: Path, data: Path) -> list[str]:
    """The command of a run below `folder`, which goes on where one was begun."""
    script, flags = RUNS[kind]
    begun = [path.parent for path in folder.glob("*/args.json")]
    if begun:
        return [sys.executable, *script.split(), "--resume", str(begun[0])]
    words = f"{script} {flags} --runs {folder} --device cpu".replace("DATA", str(data))
    return [sys.executable, *words.split()]


def phase(folder: Path) -> str:
    """In which phase a killed run was, by the files that it left."""
    iterations = [int(path.name.split(".")[1]) for path in folder.glob("*/checkpoint0.*.pt")]
    if list(folder.glob("*/*.partial")):
        return "saving"
    if not list(folder.glob("*/base.safetensors")):
        return "pretraining" if list(folder.glob("*/args.json")) else "start"
    if not iterations:
        return "base evaluation"
    return "final evaluation" if max(iterations) >= 9 else "iterations"


def wait(process: subprocess.Popen, folder: Path, seconds: float, saving: bool, file=None) -> bool:
    """Whether the process ended by itself within so many seconds, or before it wrote such a `file`.

    `saving` then waits for a write.
    """
    end = time.monotonic() + seconds
    while not any(folder.glob(file)) if file else time.monotonic() < end:
        if process.poll() is not None:
            return True
        time.sleep(0.01)
    while saving and process.poll() is None and not list(folder.glob("*/*.partial")):
        pass
    return process.poll() is not None


def kill(process: subprocess.Popen, one: bool):
    """SIGKILL to a process and its children, or to one of its children only."""
    children = psutil.Process(process.pid).children()
    if one and children:
        random.choice(children).kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(folder: Path) -> tuple[list, dict[str, bytes]]:
    """Metrics without wall times, and the policy's weights."""
    (run,) = folder.iterdir()
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    kept = [{key: value for key, value in row.items() if key not in WALL_COLUMNS} for row in rows]
    weights = load_file(run / "policy.safetensors")
    return kept, {name: value.tobytes() for name, value in weights.items()}


def kill_and_resume(kind, moments: int, parent: Path, data, rng: random.Random, file=None) -> Counter:
    """Kills runs of a kind at so many random moments; returns the phases that they were in.

    With `file`, a pattern below the runs' folder, the moment is when it is there.
    """
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    start = lambda folder: subprocess.Popen(
        command(kind, folder, data), cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    whole, began = parent / f"{kind}-whole", time.monotonic()
    whole.mkdir()
    if start(whole).wait():
        raise Failure(f"{kind}: the run that nobody kills does not end")
    expected, duration, phases, chain = outcome(whole), time.monotonic() - began, Counter(), 0
    while phases.total() < moments:
        chain += 1
        folder = parent / f"{kind}-{chain}"
        folder.mkdir()
        ended, tries = False, 0
        while not ended:
            process, began, tries = start(folder), time.monotonic(), tries + 1
            last = phases.total() == moments or tries == 8  # resumes may fall at one place for long
            seconds = 600 if last else rng.uniform(0.2, 1) * duration
            saving = not last and rng.random() < 0.3
            ended = wait(process, folder, seconds, saving, None if last else file)
            if ended:
                text = process.stderr.read()
                if process.returncode:
                    raise Failure(f"{kind}: {text.strip().splitlines()[-1]}")
                duration *= 1 if last else 0.9  # the machine is faster than at first
                break
            kill(process, one=kind == "torchrun")
            phases[phase(folder)] += 1
        if outcome(folder) != expected:
            raise Failure(f"{kind}: {folder} differs from {whole}")
        shutil.rmtree(folder)
    return phases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, total, parent = random.Random(args.seed), Counter(), Path(tempfile.mkdtemp())
    data = parent / "demonstrations.hdf5"
    make = "-m demos.dataset --steps 8000 --num-envs 8 --out".split()
    subprocess.run([sys.executable, *make, data], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for i, kind in enumerate(args.kinds):
        share = (args.moments + i) // len(args.kinds)
        try:
            phases = kill_and_resume(kind, share, parent, data, rng)
        except Failure as error:
            raise SystemExit(str(error)) from error
        print(f"{kind}: {phases.total()} kills, {dict(phases)}: equal", flush=True)
        total += phases
    shutil.rmtree(parent)
    print(f"all: {total.total()} kills, {dict(total)}: equal")


if __name__ == "__main__":
    main()
