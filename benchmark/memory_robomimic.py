"""Measures the peak memory of whole runs of rldt_robomimic.py with 2, 4 and 8 simulators.

    python -m benchmark.memory_robomimic                # writes benchmark/results/memory_robomimic.csv

A short run of each setting (base evaluation, rollouts, critic and actor updates, final evaluation) is watched four times a second:
the sum over its processes of the memory that is resident, pages that several share counted once (PSS). Its replay holds two rollouts of
`chunks` rows per simulator; `replay_mib` is what one of them takes, which a longer run adds up to --buffer-iterations times.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from benchmark.tools import RESULTS, ROOT, provenance, write_csv


@dataclass
class Args:
    task: str = "square"
    """Task."""
    workers: tuple[int, ...] = (2, 4, 8)
    """Numbers of simulators."""
    settings: tuple[str, ...] = ("state", "image-frozen", "image-own")
    """Observations, with images also the value of --encoder."""
    chunks: int = 40
    """Chunks per simulator and rollout."""
    out: Path = RESULTS / "memory_robomimic.csv"
    """CSV to write."""


def resident_mib(process: psutil.Process) -> float:
    """Memory of a process and its children in MiB, shared pages once."""
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
    return total / 2**20


def measure(setting: str, workers: int, args: Args) -> dict:
    obs, _, encoder = setting.partition("-")
    flags = ["--task", args.task, "--obs", obs, *(["--encoder", encoder] if encoder else []), "--num-envs", workers, "--rollout-chunks", args.chunks]
    flags += ["--horizon", 80, "--iterations", 5, "--warmup-iterations", 1, "--rounds", 1, "--critic-steps", 4, "--actor-steps", 1, "--buffer-iterations", 2]
    flags += ["--eval-every", 100, "--final-eval-episodes", workers, "--threads", 1, "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "rldt_robomimic.py", *map(str, flags), "--runs", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        watched, peak, simulators = psutil.Process(process.pid), 0.0, 0
        while process.poll() is None:
            peak, simulators = max(peak, resident_mib(watched)), max(simulators, len(watched.children()))
            time.sleep(0.25)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed")
        replay = sum(path.stat().st_size for path in Path(folder).glob("*/replay0.pt")) / 2**20
    print(f"{setting}, {workers} simulators: {peak / 1024:.2f} GiB, {replay:.1f} MiB per rollout", flush=True)
    return {"task": args.task, "setting": setting, "workers": workers, "peak_mib": peak, "processes": simulators + 1, "chunks": args.chunks,
            "replay_mib": replay, **provenance()}  # fmt: skip


def main(args: Args):
    write_csv(args.out, [measure(setting, workers, args) for setting in args.settings for workers in args.workers])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
