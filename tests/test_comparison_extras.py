"""Needs Ray and rliable, see baselines/requirements.txt."""

import subprocess
import sys

import numpy as np
import tyro
from conftest import ROOT
from test_comparison import TINY

from benchmark import plot, run
from benchmark.tools import read_csv, write_csv


def test_comparison_through_ray_runs_each_cell_once(tiny_base, tmp_path):
    command = [sys.executable, "-m", "benchmark.run", "baselines", "--methods", "rldt", "qam"]
    command += ["--tasks", "Hopper-v4", "--seeds", "1", "--parallel", "1"]
    command += ["--out", tmp_path / "b.csv", "--runs", tmp_path / "runs"]
    command += [f"--extra={TINY} --base {tiny_base}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = read_csv(tmp_path / "b.csv")
    assert sorted(row["method"] for row in rows) == ["qam", "rldt"]
    assert {point["method"] for point in read_csv(tmp_path / "curves.csv")} == {"qam", "rldt"}
    args = tyro.cli(run.Args, args=[str(word) for word in command[3:]])
    assert run.cells(args) == []


def test_figures_and_table_of_the_comparison_are_made_from_the_csvs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "REPS", 50)
    rng, rows, points = np.random.default_rng(0), [], []
    for method, level in ("qam", 200), ("rldt", 300):
        for task in ("A", "B"):
            for seed in (1, 2, 3):
                known, final = dict(task=task, method=method, seed=seed), level + rng.uniform(0, 10)
                values = dict(base_return=100, best_return=final, base_return_sampled=90, wall_s=60)
                values |= dict(final_return=final, final_return_sampled=final, env_steps=1000)
                rows.append(known | values)
                for steps, y in (0, 100), (500, ""), (1000, final):
                    point = dict(table="baselines", env_steps=steps, wall_s=steps / 10, eval_return=y)
                    points.append(known | point)
    write_csv(tmp_path / "baselines.csv", rows)
    write_csv(tmp_path / "curves.csv", points)
    plot.main(plot.Args(results=tmp_path, images=tmp_path / "images"))
    for name in ("baselines.png", "baselines_reliability.png"):
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    finals = [row["final_return"] for row in rows[3:6]]  # QAM on B
    cell = f"{np.mean(finals):.0f} [{min(finals):.0f}, {max(finals):.0f}]"
    cells = f"100 [100, 100] | {cell} | {cell} | 90 [90, 90] | {cell}"
    assert f"| B | QAM | 3 | {cells} | 0.00 | 1.0 |" in printed
    scores = np.sort(plot.final_scores(rows)["qam"].ravel())
    iqm = np.mean(scores[1:-1])  # of six, the lowest and the highest go
    assert f"IQM x₀ = 0, 0 at the base and 1 at the best mean: RLDT 1.00, QAM {iqm:.2f}" in printed
