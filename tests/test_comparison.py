import csv
import json

import numpy as np
import pytest
from conftest import ROOT

from benchmark import plot, plot_baselines, returns, run, search, update_speed
from benchmark.returns import COLUMNS
from benchmark.tools import provenance, read_csv, write_csv

TINY = ("--chunk 2 --euler-steps 4 --actor-width 16 --time-dim 8 --device cpu --num-envs 4 --rollout-chunks 12 --iterations 2 --eval-episodes 2 "
        "--final-eval-episodes 2 --batch 16 --epochs 1 --value-width 16")  # fmt: skip


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS["gym"])
        writer.writeheader()
        writer.writerows(rows)


def test_what_a_csv_holds_is_not_run_again(tmp_path):
    write(tmp_path / "baselines.csv", [dict(task="Hopper-v4", method="qam", seed=1), dict(task="Hopper-v4", method="fpo++", seed=2)])
    args = run.Args(methods=("rldt", "qam", "fpo++"), tasks=("Hopper-v4",), seeds=(1, 2), out=tmp_path / "baselines.csv", wall_budget_s=90, extra="--threads 2")
    cells = run.cells(args)
    assert [(cell.method, cell.seed) for cell in cells] == [("rldt", 1), ("fpo++", 1), ("rldt", 2), ("qam", 2)]
    assert {cell.extra for cell in cells} == {"--threads 2 --wall-budget-s 90"}


def test_every_method_gets_the_same_time_on_a_task(tmp_path):
    cells = run.cells(run.Args(seeds=(1,), out=tmp_path / "none.csv"))
    assert {(cell.task, cell.extra) for cell in cells} == {("Hopper-v4", "--wall-budget-s 300"), ("Walker2d-v4", "--wall-budget-s 600"), ("HalfCheetah-v4", "--wall-budget-s 600")}


def test_unknown_method_stops_before_its_speed_is_measured(tmp_path):
    with pytest.raises(SystemExit, match="--methods: ppo is none of rldt, "):
        update_speed.main(update_speed.Args(methods=("rldt", "ppo"), out=tmp_path / "s.csv"))


def test_unknown_method_stops_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"ppo is none of rldt, rldt-delta, qam, .*sac"):
        run.cells(run.Args(methods=("ppo", "qam")))


@pytest.mark.parametrize("method", run.METHODS)
def test_every_method_is_a_module_with_the_flags_that_the_launcher_gives(method):
    import importlib

    module, flags = run.METHODS[method]
    argv = ["--env-id=Hopper-v4", "--seed=2", f"--exp-name={method}", "--runs=x", *flags.split()]
    args = importlib.import_module(module).parse_args([*argv, "--wall-budget-s=3"])
    assert (args.seed, args.exp_name, args.wall_budget_s) == (2, method, 3)


def test_cell_is_run_and_its_row_and_curve_are_kept(tiny_base, tmp_path):
    args = run.Args(methods=("fpo",), tasks=("Hopper-v4",), seeds=(4,), extra=f"{TINY} --base {tiny_base}", out=tmp_path / "b.csv", runs=tmp_path / "runs")
    (cell,) = run.cells(args)
    files = run.execute(cell, args.runs)
    elsewhere = run.Args(out=args.out, runs=tmp_path / "driver")  # as if the run was on another node
    line = run.keep(cell, files, elsewhere)
    (row,) = read_csv(args.out)
    assert (row["task"], row["method"], row["seed"], row["args"]) == ("Hopper-v4", "fpo", "4", f"{args.extra} --wall-budget-s 300")
    assert line.startswith("Hopper-v4__fpo__4: ")
    assert json.loads(files["result.json"])["args"]["form"] == "fpo"
    curve = read_csv(tmp_path / "b" / "Hopper-v4__fpo__4.csv")
    assert [point["iteration"] for point in curve] == ["0", "1", "2"]
    assert {"env_steps", "wall_s", "eval_return", "eval_return_sampled", "losses/policy"} <= set(curve[0])
    assert run.cells(args) == []


SCRIPT = """
import json, sys
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
resumed = Path(flags["--resume"]) if "--resume" in flags else None
run = resumed or Path(flags["--runs"], f"{flags['--env-id']}__{flags['--exp-name']}__{flags['--seed']}__{len(list(Path(flags['--runs']).iterdir()))}")
run.mkdir(exist_ok=True)
(run / "checkpoint.pt").touch()
if not resumed:
    sys.exit(9)  # as if killed
(run / "metrics.csv").write_text("iteration,env_steps,wall_s,eval_return\\n0,0,1.5,7.0\\n")
(run / "result.json").write_text(json.dumps({"base_return": 1.0, "final_return": 7.0, "wall_s": 1.5}))
"""


def test_run_that_was_cut_off_is_resumed_with_the_same_flags_only(tmp_path):
    (tmp_path / "rldt_gym.py").write_text(SCRIPT)
    out, runs = tmp_path / "gym.csv", tmp_path / "runs"

    def start(extra):
        returns.run_jobs([returns.Job("Hopper-v4", "rldt", 3, extra, tmp_path / "rldt_gym.py")], out, runs, 1)

    start("--threads 1")
    start("--threads 2")
    assert len(list(runs.glob("Hopper-v4__rldt__3__*"))) == 2 and not read_csv(out)
    start("--threads 2")
    (row,) = read_csv(out)
    assert (row["task"], row["seed"], row["final_return"], row["args"]) == ("Hopper-v4", "3", "7.0", "--threads 2")
    assert len(list(runs.glob("Hopper-v4__rldt__3__*"))) == 2
    assert [point["eval_return"] for point in read_csv(tmp_path / "curves" / "Hopper-v4__rldt__3.csv")] == ["7"]


def test_run_that_fails_is_reported_and_not_kept(tmp_path):
    args = run.Args(methods=("qam",), tasks=("Nothing-v0",), seeds=(1,), out=tmp_path / "b.csv", runs=tmp_path / "runs")
    (cell,) = run.cells(args)
    files = run.execute(cell, args.runs)
    assert "Cannot make the environment 'Nothing-v0'" in run.keep(cell, files, args)
    assert not args.out.exists()


def test_launcher_exits_with_an_error_where_a_run_failed(monkeypatch, tmp_path):
    for failed, code in (0, 0), (2, 1):
        monkeypatch.setattr(run, "launch", lambda todo, args, failed=failed: failed)
        with pytest.raises(SystemExit) as stop:
            run.main(run.Args(out=tmp_path / "b.csv"))
        assert stop.value.code == code
    monkeypatch.setattr(search, "launch", lambda todo, args: 2)
    with pytest.raises(SystemExit) as stop:
        search.main(search.Args(out=tmp_path / "s.csv"))
    assert stop.value.code == 1


def row(task, method, seed, final):
    return dict(task=task, method=method, seed=str(seed), base_return="100", final_return=str(final), base_return_sampled="0", final_return_sampled="0")


def test_scores_are_zero_at_the_base_and_one_at_the_best_method_of_complete_seeds():
    rows = [row(task, "rldt", seed, final) for task, final in (("A", 300), ("B", 500)) for seed in (1, 2)]
    rows += [row("A", "qam", 1, 200), row("A", "qam", 3, 250), row("B", "qam", 1, 100), row("A", "dppo", 1, 400)]  # dppo lacks B, qam a seed 3 of B
    scores = plot_baselines.final_scores(rows, "eval_return")
    assert list(scores) == ["rldt", "qam"]
    np.testing.assert_allclose(scores["rldt"], [[1, 1], [1, 1]])
    np.testing.assert_allclose(scores["qam"], [[0.5, 0]])


def test_rows_of_known_methods_are_read_in_the_order_of_the_figures(tmp_path):
    write(tmp_path / "baselines.csv", [dict(task="A", method="qam", seed=1), dict(task="A", method="other", seed=1), dict(task="A", method="rldt", seed=1)])
    rows = plot_baselines.load(tmp_path)
    assert [(r["method"], r["curves"].name) for r in rows] == [("rldt", "baselines"), ("qam", "baselines")]


def test_interquartile_mean_leaves_out_the_lowest_and_the_highest_quarter():
    values = np.arange(8.0)[:, None, None] * np.array([1.0, 10.0])
    values[-1] = 1e9
    np.testing.assert_allclose(plot_baselines.iqm(values), [3.5, 35])


def test_plotting_without_results_stops(tmp_path):
    with pytest.raises(SystemExit, match=r"no baselines\.csv"):
        plot_baselines.main(plot_baselines.Args(results=tmp_path))


def test_update_speed_counts_the_steps_of_the_optimizers(tiny_base, tmp_path):
    args = update_speed.Args(methods=("fpo",), tasks=("Hopper-v4",), measured=2, extra=f"{TINY} --base {tiny_base}", out=tmp_path / "speed.csv")
    columns = "task method iterations env_steps_per_s gradient_steps_per_s gradient_steps_per_1000_env_steps iteration_s".split()
    held = dict.fromkeys([*columns, *provenance()], "1") | dict(task="Hopper-v4", method="qam")
    write_csv(args.out, [held, held | dict(method="fpo")])
    update_speed.main(args)
    other, row = read_csv(args.out)
    assert (other, row["method"]) == (held, "fpo")
    per_iteration = float(row["gradient_steps_per_s"]) * float(row["iteration_s"])
    assert per_iteration == pytest.approx(2 * 4 * 12 / 16, rel=1e-4)  # actor and value, minibatches of 16 of 4 x 12 chunks
    assert 0 < float(row["env_steps_per_s"]) * float(row["iteration_s"]) <= 4 * 12 * 2 + 1e-3


def test_pins_of_the_extras_do_not_contradict_those_of_the_project():
    pinned = lambda name: dict(line.split("==") for line in (ROOT / name).read_text().split() if "==" in line)
    ours, theirs = pinned("baselines/requirements.txt"), pinned("requirements.txt")
    assert {key: value for key, value in ours.items() if key in theirs} == {key: theirs[key] for key in ours if key in theirs}


@pytest.mark.parametrize(("method", "flags"), [(method, flags) for method, options in search.TRIES.items() for flags in options])
def test_every_try_of_the_search_is_understood_by_its_method(method, flags):
    import importlib

    module, own = run.METHODS[method]
    importlib.import_module(module).parse_args([*own.split(), *flags.split(), "--wall-budget-s=3"])


def test_search_runs_the_first_try_of_every_method_before_the_second_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "TRIES", {"fpo": ("--clip 0.1", "--clip 0.2"), "qam": ("--inv-temp 1",)})
    assert [cell.method for cell in search.tries(search.Args(methods=("fpo", "qam"), out=tmp_path / "s.csv"))] == ["fpo#1", "qam#1", "fpo#2"]


def test_search_runs_what_its_csv_lacks_and_ranks_by_the_mean_of_both_returns(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "TRIES", {"fpo": ("--clip 0.1", "--clip 0.2"), "qam": ("--inv-temp 1",)})
    args = search.Args(methods=("fpo",), wall_budget_s=60, extra=f"{TINY} --base {tiny_base}", out=tmp_path / "s.csv", runs=tmp_path / "runs")
    first, second = search.tries(args)
    assert (second.method, second.extra.split()[:4]) == ("fpo#2", ["--clip", "0.2", "--wall-budget-s", "60"])
    files = run.execute(first, args.runs)
    assert json.loads(files["result.json"])["args"]["clip"] == 0.1
    run.keep(first, files, args)
    assert [cell.method for cell in search.tries(args)] == ["fpo#2"]
    one = dict(read_csv(args.out)[0], final_return="100", final_return_sampled="0")
    two = dict(one, method="fpo#2", final_return="80", final_return_sampled="60")
    assert [line.split(" | ")[1] for line in search.table([one, two]).splitlines()[2:]] == ["fpo#2", "fpo#1"]


def test_figures_and_table_of_sparse_tasks_are_made_from_the_csvs(tmp_path, capsys, monkeypatch):
    (tmp_path / "curves").mkdir()
    rows, drawn = [], {}
    for method, final in ("rldt", 0.75), ("rldt-delta", 0.5):
        rates = {f"{when}_success{start}": value for when, value in (("base", 0.25), ("final", final)) for start in ("", "_sampled")}
        ends = {f"{key}_{end}": 0.1 for key in rates for end in ("low", "high")}
        stages = {f"{when}_stages{start}": value for when, value in (("base", 0.5), ("final", 2 * final)) for start in ("", "_sampled")}
        rows.append(dict(task="lamp-low", backend="mujoco", method=method, seed=1, env_steps=2000, wall_s=120) | rates | ends | stages)
        curve = [dict(iteration=i, wall_s=60 * i, train_stages=2 - i, **{f"eval_{what}{start}": value for what, value in (("success", y), ("stages", 2 * y)) for start in ("", "_sampled")},
                      **{"diagnostics/phi_norm": 1 + i, "losses/constraint": i}) for i, y in ((0, 0.25), (2, final))]  # fmt: skip
        write_csv(tmp_path / "curves" / f"lamp-low__{method}__1.csv", curve)
    write_csv(tmp_path / "furniture.csv", rows)
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    plot.main(plot.Args(results=tmp_path, images=tmp_path))
    lines = {name: [line.get_ydata().tolist() for axis in figure.axes for line in axis.lines] for name, figure in drawn.items()}
    assert [axis.get_title() for axis in drawn["success_furniture.png"].axes] == ["lamp-low (MuJoCo)"]
    assert lines["success_furniture.png"] == [[2, 0], [0.5, 1.5], [0.5, 1.5], [2, 0], [0.5, 1.0], [0.5, 1.0]]  # pairs: rollouts, from both starts
    assert lines["kernels_furniture.png"] == [[0.5, 1.5], [0.5, 1.0]] * 2 + [[0, 2]] * 2 + [[1, 3]] * 2
    assert "| lamp-low | rldt | 1 | 25 [10, 10] | 75 [10, 10] | 25 | 75 [10, 10] | 0.50 / 0.50 | 1.50 / 1.50 | 2 | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no gym\.csv"):
        plot.main(plot.Args(results=tmp_path / "none", images=tmp_path))
