"""Needs Ray and rliable, see baselines/requirements.txt."""

import csv
import subprocess
import sys

import numpy as np
from conftest import ROOT
from test_comparison import TINY, write

from benchmark import plot_baselines
from benchmark.tools import read_csv, write_csv


def test_comparison_through_ray_runs_each_cell_once(tiny_base, tmp_path):
    command = [sys.executable, "-m", "benchmark.run", "--methods", "reinflow", "fpo++", "--tasks", "Hopper-v4", "--seeds", "1", "--parallel", "1"]
    command += ["--extra", f"{TINY} --base {tiny_base}", "--out", tmp_path / "b.csv", "--runs", tmp_path / "runs"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = read_csv(tmp_path / "b.csv")
    assert sorted(row["method"] for row in rows) == ["fpo++", "reinflow"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["Hopper-v4__fpo++__1.csv", "Hopper-v4__reinflow__1.csv"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "0 of 2 runs to do" in again.stdout
    assert read_csv(tmp_path / "b.csv") == rows


def test_figures_and_table_are_made_from_the_csvs(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "baselines").mkdir()
    for method, level in ("rldt", 300), ("qam", 200):
        for task in ("A", "B"):
            for seed in (1, 2, 3):
                final = level + rng.uniform(0, 10)
                values = dict(base_return=100, final_return=final, best_return=final, base_return_sampled=90, final_return_sampled=final)
                rows.append(dict(task=task, method=method, seed=seed, env_steps=1000, wall_s=60) | values)
                with (tmp_path / "baselines" / f"{task}__{method}__{seed}.csv").open("w", newline="") as out:
                    writer = csv.writer(out)
                    writer.writerows([["env_steps", "wall_s", "eval_return", "eval_return_sampled"], [0, 1, 100, 90], [500, 30, "", ""], [1000, 60, final, final]])
    write(tmp_path / "baselines.csv", rows)
    speed = dict(task="B", method="qam", gradient_steps_per_s="7.25", gradient_steps_per_1000_env_steps="3")
    write_csv(tmp_path / "update_speed.csv", [speed])
    plot_baselines.main(plot_baselines.Args(results=tmp_path, images=tmp_path / "images", reps=400))
    for name in ("baselines.png", "baselines_reliability.png"):
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    finals = [row["final_return"] for row in rows if (row["task"], row["method"]) == ("B", "qam")]
    bounded = f"{np.mean(finals):.0f} [{min(finals):.0f}, {max(finals):.0f}]"  # of three seeds, 1 of 27 resamples is the lowest alone
    assert f"| B | QAM | 3 | 100 | {bounded} | {bounded} | 90 | {bounded} | 0.00 | 1.0 | 7.2 | 3.0 | other tasks |" in printed
    assert "|  |  | other tasks |" in next(line for line in printed.splitlines() if line.startswith("| A | QAM |"))  # whose speed was not measured
    scores = sorted((row["final_return"] - 100) / (np.mean([r["final_return"] for r in rows if (r["task"], r["method"]) == (row["task"], "rldt")]) - 100)
                    for row in rows if row["method"] == "qam")  # fmt: skip
    assert f"eval_return, 0 at the base and 1 at the best mean, IQM: RLDT 1.00, QAM {np.mean(scores[1:-1]):.2f}\n" in printed  # a sixth off each end
    hopper = plot_baselines.table([row | {"task": "Hopper-v4", "method": "reinflow"} for row in rows[:2]], [], 50)
    assert hopper.endswith("|  |  | 1432 → 3205, 80 M steps |")  # a claim on this task goes before what holds for all


def test_intervals_are_the_same_in_every_call():
    scores = {"a": np.random.default_rng(1).normal(size=(5, 2))}
    first, second = (plot_baselines.interval(scores, lambda x: np.array([x.mean()]), 50)[1]["a"] for _ in range(2))
    assert first.tolist() == second.tolist() and first[0, 0] < first[1, 0]
