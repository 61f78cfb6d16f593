"""The scripts in benchmark/ that run, collect, draw and diagnose."""

import dataclasses
import importlib
import itertools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import ROOT, parse

import rldt_gym
from baselines import qam
from baselines.families import settings_of
from benchmark import critic_diagnostics, gradient_norms, plot, run, throughput
from benchmark.critic_diagnostics import load_run
from benchmark.tools import read_csv, write_csv

TINY = (
    "--device cpu --num-envs 4 --rollout-chunks 12 --iterations 4 --eval-episodes 2 "
    "--final-eval-episodes 2 --rounds 2 --critic-steps 3 --critic-batch 16 --segments 8 "
    "--warmup-iterations 1 --actor-steps 1 --actor-batch 8 --buffer-iterations 2"
)


def test_what_a_csv_holds_is_not_run_again(tmp_path):
    held = [dict(task="Hopper-v4", method="qam", seed=1), dict(task="Hopper-v4", method="fpo++", seed=2)]
    write_csv(tmp_path / "b.csv", held)
    chosen = dict(methods=("rldt", "qam", "fpo++"), tasks=("Hopper-v4",), seeds=(1, 2))
    cells = run.cells(run.Args("baselines", out=tmp_path / "b.csv", extra="--threads 2", **chosen))
    found = [(cell.method, cell.seed) for cell in cells]
    assert found == [("rldt", 1), ("fpo++", 1), ("rldt", 2), ("qam", 2)]
    assert cells[1].flags == "--form fpo++ --wall-budget-s 300 --threads 2"


def test_every_method_gets_the_same_time_on_a_task(tmp_path):
    cells = run.cells(run.Args("baselines", out=tmp_path / "none.csv"))
    cells += run.cells(run.Args("sparse", tasks=("one-leg-low",), out=tmp_path / "none.csv"))
    times = {(cell.task, int(cell.flags.split("-s ")[1].split()[0])) for cell in cells}
    assert times == {("Hopper-v4", 300), ("one_leg-low", 2700), *((task, 600) for task in run.GYM[1:])}


@pytest.mark.parametrize("experiment", run.EXPERIMENTS)
def test_scripts_understand_what_every_run_is_given(experiment, tmp_path):
    tasks = run.EXPERIMENTS[experiment].tasks
    tasks = tasks[:1] if tasks[0] in run.GYM else tasks  # Gym's flags are the same
    for cell in run.cells(run.Args(experiment, seeds=(7,), tasks=tasks, out=tmp_path / "none.csv")):
        _, _, module, *flags = cell.command(tmp_path)
        args = parse(importlib.import_module(module), flags)
        assert (args.seed, args.exp_name, args.threads, args.runs) == (7, cell.method, 1, tmp_path)


def row(task, method, seed, final):
    returns = dict(base_return="100", final_return=str(final), base_return_sampled="0")
    return dict(task=task, method=method, seed=str(seed), final_return_sampled="0") | returns


def test_scores_are_zero_at_the_base_and_one_at_the_best_method_of_complete_seeds():
    rows = [row("A", "rldt", 1, 300), row("A", "rldt", 2, 300)]
    rows += [row("B", "rldt", 1, 500), row("B", "rldt", 2, 500)]
    rows += [row("A", "qam", 1, 200), row("A", "qam", 3, 250), row("B", "qam", 1, 100)]  # no seed 3 of B
    rows += [row("A", "dppo", 1, 400)]  # lacks B
    scores = plot.final_scores(rows)
    assert list(scores) == ["rldt", "qam"]
    assert plot.METHODS.keys() == run.METHODS.keys() | run.PEERS.keys()
    np.testing.assert_allclose(scores["rldt"], [[1, 1], [1, 1]])
    np.testing.assert_allclose(scores["qam"], [[0.5, 0]])


def test_figures_and_table_of_sparse_tasks_are_made_from_the_csvs(tmp_path, capsys, monkeypatch):
    rows, points, drawn = [], [], []
    for seed, (method, final) in itertools.product((1, 2), (("rldt", 0.75), ("rldt-delta", 0.5))):
        known = dict(task="lamp-low", method=method, seed=seed)
        line = dict(backend="mujoco", env_steps=2000, wall_s=120, episodes=40)
        for key, value in ("base", 0.25), ("final", final):
            for start in ("", "_sampled"):
                line |= {f"{key}_success{start}": value, f"{key}_stages{start}": 2 * value}
        rows.append(known | line)
        for i, y in (0, 0.25), (2, final):
            point = dict(iteration=i, env_steps=i, wall_s=60 * i)
            for start in ("", "_sampled"):
                point |= {f"eval_success{start}": y, f"eval_stages{start}": 2 * y}
            point |= known | {"diagnostics/phi_norm": 1 + i, "losses/constraint": i}
            points += [point | {"table": table} for table in ("furniture", "sparse")]
    for table in "furniture", "sparse":
        write_csv(tmp_path / f"{table}.csv", rows)
    write_csv(tmp_path / "curves.csv", points)
    monkeypatch.setattr(plot, "REPS", 50)
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: drawn.append(path.name))
    plot.main(plot.Args(results=tmp_path, images=tmp_path))
    assert {"success_furniture.png", "kernels_furniture.png", "baselines_sparse.png"} <= {*drawn}
    cells = "lamp-low | RLDT | 1, 2 | 25 [17, 35] | 75 [65, 83] | 25 [17, 35] | 75 [65, 83]"  # of 80
    line = f"| {cells} | 0.50 / 0.50 | 1.50 / 1.50 | 2 | 2 |"
    assert capsys.readouterr().out.count(line) == 2


def test_monte_carlo_returns_go_on_after_a_time_limit_and_stop_after_an_end():
    alive = np.array([[1, 1], [1, 1], [1, 0]], bool)  # the second episode ends after two chunks
    truncated = np.zeros_like(alive)
    truncated[2, 0] = True
    reward = np.array([[2.0, 2.0], [4.0, 4.0], [6.0, 0.0]])
    data = dict(reward=reward, alive=alive, truncated=truncated)
    y = critic_diagnostics.monte_carlo(data, reward_scale=2.0, gamma=0.5, tail=2)
    last = 3 + 0.5 * 2.5 / 0.5  # the mean of the last two rewards, 2 and 3, for ever
    cut_off, ended = [1 + 0.5 * (2 + 0.5 * last), 2 + 0.5 * last, last], [1 + 0.5 * 2, 2, 0]
    np.testing.assert_allclose(y.T, [cut_off, ended])


def test_values_are_compared_where_episodes_run_and_over_episodes_at_each_time():
    q, y = np.array([[3.0, 5], [4, 9]]), np.array([[2.0, 3], [0, 99]])  # errors 1, 2, 4
    found = critic_diagnostics.compare(q, y, np.array([[True, True], [True, False]]))
    assert (found["bias"], found["rmse"]) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7)))
    assert found["correlation"] == pytest.approx(np.corrcoef([3, 5, 4], [2, 3, 0])[0, 1])
    assert found["correlation_within_time"] == pytest.approx(1)


def test_moved_chunks_climb_the_critic_by_the_length_on_average():
    start, goal = torch.randn(50, 4), torch.full((4,), 9.0)
    critic = lambda obs, action: -(action - goal).norm(dim=-1).expand(2, -1)
    policy = critic_diagnostics.moved(SimpleNamespace(sample=lambda obs, x0: start), critic, 0.5)
    way = policy.sample(torch.zeros(50, 1)) - start
    torch.testing.assert_close(way, 0.5 * F.normalize(goal - start, dim=-1))


def test_diagnostics_of_a_run_are_written_in_place_of_its_former_ones(finished_run, tmp_path):
    chosen = dict(episodes=2, steps=(0.0, 0.1), out=tmp_path / "d.csv")
    args = critic_diagnostics.Args((finished_run[0],), **chosen)
    critic_diagnostics.main(args)
    critic_diagnostics.main(args)
    (row,) = read_csv(args.out)
    assert (row["task"], row["run"], row["seed"]) == ("Hopper-v4", "rldt", "3")
    assert "--actor-batch 8" in row["args"]
    columns = ("q", "bias", "rmse", "correlation", "moved_zero_0", "moved_noise_0.1")
    assert all(math.isfinite(float(row[column])) for column in columns)


def test_parts_of_an_iteration_are_timed_and_counted(capsys):
    torch.set_num_threads(1)
    throughput.step_times(1, 1e-9, "cpu")
    parts = json.loads(capsys.readouterr().out)
    calls = {name: calls for name, (calls, *_) in parts.items()}
    assert calls == dict(ceiling=0, critic_target=16, update_critic=16 * 32, update_actor=16 * 8)
    for _, milliseconds, gflop in parts.values():
        assert milliseconds > 0 and gflop > 1


def test_gradient_norms_of_rldt_and_qam(finished_run, tiny_flags, tmp_path):
    path, _ = finished_run
    flags = [flag for flag in tiny_flags if "n-particles" not in flag]
    qam.main(parse(qam, [*flags, f"--runs={tmp_path / 'runs'}", "--inv-temp=2"]))
    (other,) = (tmp_path / "runs").iterdir()
    out = tmp_path / "norms.csv"
    gradient_norms.main(gradient_norms.Args(run=path, qam=other, batches=2, out=out))
    rows = read_csv(out)
    assert {row["loss"] for row in rows if row["run"] == other.name} == {"adjoint"}
    for loss in ("literal", "authors", "adjoint"):
        for stage in ("base policy", "end of the run"):
            steps = [row for row in rows if (row["loss"], row["stage"]) == (loss, stage)]
            shares = [float(row["share"]) for row in steps]
            assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-4)  # K = 4

    loaded = load_run(path)
    args = gradient_norms.Args(run=path, batches=1)
    shorter = dataclasses.replace(loaded, unit=1e3 * loaded.unit)  # of which the field is in units
    norms = [gradient_norms.norms(loaded.base, each, "authors", args)[-1] for each in (loaded, shorter)]
    assert norms[0] > 10 * norms[1] > 0  # of the last step, where no constraint pulls: v is the base's

    loaded = load_run(other, settings_of(qam.Args, rldt_gym.CriticArgs))
    norms = [gradient_norms.qam_norms(loaded.base, loaded, inv_temp, args) for inv_temp in (2.0, 4.0)]
    torch.testing.assert_close(2 * norms[0], norms[1])  # where v = v_base: linear in inv_temp
    assert (norms[0] > 0).all() and len(set(norms[0].tolist())) == 4  # each step has its own


# -------------------------------------------------------------- with Ray and rliable
def test_comparison_through_ray_runs_each_cell_once_and_keeps_what_does_not_fail(tiny_base, tmp_path):
    extra, out = f"{TINY} --base {tiny_base}", tmp_path / "b.csv"
    out.write_text("task,method,seed\nOld-v0,qam,1\n")  # of a time with fewer columns
    command = [sys.executable, "-m", "benchmark.run", "baselines", "--methods", "qam"]
    command += ["--tasks", "Hopper-v4", "Nothing-v0", "--seeds", "1", f"--extra={extra}"]
    command += ["--out", out, "--runs", tmp_path / "runs"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "Cannot make the environment 'Nothing-v0'" in process.stdout
    assert "1 runs failed" in process.stdout + process.stderr
    old, row = read_csv(out)
    assert (old["task"], row["task"], row["method"]) == ("Old-v0", "Hopper-v4", "qam")
    known = dict(task="Hopper-v4", backend="", seed="1", threads="1")  # "": no choice
    (result,) = tmp_path.glob("runs/*/*qam*/result.json")
    final = json.loads(result.read_text())["final_return"]
    assert float(row["final_return"]) == pytest.approx(final, rel=1e-4)
    assert (known | {"args": f"--wall-budget-s 300 {extra}"}).items() <= row.items()
    curve = read_csv(tmp_path / "curves.csv")
    known = {("baselines", "Hopper-v4", "qam", "1")}
    assert {(p["table"], p["task"], p["method"], p["seed"]) for p in curve} == known
    assert curve[-1]["iteration"] == "4" and float(curve[-1]["eval_return"]) > 0
    args = tyro.cli(run.Args, args=[str(word) for word in command[3:]])
    assert [cell.task for cell in run.cells(args)] == ["Nothing-v0"]


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
