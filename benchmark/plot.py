"""Draws every figure of the README and docs from the committed CSVs, and prints the tables in markdown.

    python -m benchmark.plot                            # writes docs/images/*.png, but for bandit.png

The figures *_reliability.png need rliable (Agarwal et al. 2021), see baselines/requirements.txt.

Figures of the paper: 2 (baselines.png), 3 (baselines_sparse.png, success*.png), 4 (gradient_norms.png),
5 and 8 (kernels*.png), 6 and 7 (ablations.png). Lines are means and bands the range over seeds.
"""

import importlib.util
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark.tools import COLORS, IMAGES, RESULTS, group, markdown, pyplot, read_csv, save_figure
from envs.interface import success_rate

STARTS = {"": "x₀ = 0", "_sampled": "sampled"}  # what the flow starts from, by its suffix in the CSVs
AXES = {"env_steps": (1e6, "environment steps (millions)"), "wall_s": (60, "wall time (minutes)")}
KERNELS = {"rldt": ("RBF kernel", COLORS["green"]), "rldt-delta": ("delta kernel", COLORS["purple"])}
DIAGNOSTICS = {"losses/constraint": "constraint loss, eq. (15)", "diagnostics/phi_norm": "mean |φ|"}
METHODS = {  # name and colour in the comparison, in its order
    "rldt": ("RLDT", "#d6604d"), "rldt-delta": ("RLDT-Delta", "#f4a582"), "qam": ("QAM", "#2166ac"),
    "reinflow": ("ReinFlow", "#1b7837"), "dppo": ("DPPO (flow)", "#762a83"),
    "dppo-diffusion": ("DPPO (diffusion)", "#c2a5cf"), "fpo": ("FPO", "#e08214"),
    "fpo++": ("FPO++", "#fdb863"), "best-of-n": ("best of N", "#4d4d4d"), "sac": ("SAC", "#969696"),
    "dsrl": ("DSRL", "#01665e"), "dsrl-sac": ("DSRL (SAC)", "#80cdc1"), "qc": ("QC", "#8c510a"),
    "qam-demos": ("QAM, demos", "#2166ac"), "dsrl-demos": ("DSRL, demos", "#01665e"),
    "best-of-n-demos": ("best of N, demos", "#4d4d4d"), "qc-demos": ("QC, demos", "#8c510a"),
}  # fmt: skip
REPS = 2000  # bootstrap repetitions


@dataclass
class Args:
    results: Path = RESULTS  # directory with the CSVs
    images: Path = IMAGES  # directory to write figures to


def load_curves(path: Path) -> dict[tuple[str, str, str, str], list[dict]]:
    """The points of each run in curves.csv, by table, task, method and seed."""
    curves = defaultdict(list)
    for point in read_csv(path):
        curves[point["table"], point["task"], point["method"], point["seed"]].append(point)
    return curves


def series(points: list[dict], x: str, y: str) -> np.ndarray:
    """Columns x and y (2, n) of a run's points, where y was measured."""
    measured = [(float(point[x]), float(point[y])) for point in points if point[y]]
    return np.array(measured).reshape(-1, 2).T


def interpolated(runs: list[list[dict]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Curves of runs at common points: x (100,), y (runs, 100). A run that ended keeps its last."""
    found = [series(points, x, y) for points in runs]
    grid = np.linspace(min(xs[0] for xs, _ in found), max(xs[-1] for xs, _ in found), 100)
    return grid, np.stack([np.interp(grid, xs, ys) for xs, ys in found])


def legend_below(figure, axes, columns: int):
    """One legend below the panels, with each label once."""
    entries = {}
    for axis in np.ravel(axes):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def mean(rows: list[dict], column: str) -> float:
    return float(np.mean([float(row[column]) for row in rows]))


def titled(row: dict) -> str:
    """A run's task, and its simulator where there are two."""
    return row["task"] + {"mujoco": " (MuJoCo)", "isaac": " (Isaac Gym)"}.get(row.get("backend"), "")


def measured(row: dict) -> tuple[str, float | None]:
    """What a task is measured by in the curves, and the most it can be."""
    if "base_return" in row:
        return "return", None
    return ("stages", 2.0) if row["task"].startswith("lamp") else ("success", 1.0)


def plot_scores(plt, rows, curves, table: str, path: Path, starts=tuple(STARTS), apart: bool = False):
    """Scores from the base policy's on, mean and range over seeds, against steps and wall time.

    A column per task, a colour per method; sampled ones are dashed, or in columns apart.
    """
    columns = {}
    parts = zip(starts, strict=True) if apart else [starts]
    for (row, *_), part in itertools.product(group(rows, "task").values(), parts):
        columns[titled(row) + (f", {STARTS[part[0]]}" if apart else "")] = row["task"], part
    size = (3.6 * len(columns) + 0.4, 6)
    figure, axes = plt.subplots(2, len(columns), figsize=size, squeeze=False, sharey="col")
    for column, (title, (task, part)) in zip(axes.T, columns.items(), strict=True):
        members = [row for row in rows if row["task"] == task]
        what, most = measured(members[0])
        for axis, (x, (scale, label)) in zip(column, AXES.items(), strict=True):
            for (method, seeds), start in itertools.product(group(members, "method").items(), part):
                name, color = METHODS[method]
                runs = [curves[table, task, method, row["seed"]] for row in seeds]
                grid, values = interpolated(runs, x, f"eval_{what}{start}")
                grid, low, high = grid / scale, values.min(0), values.max(0)
                name += f", {STARTS[start]}" if len(part) > 1 else ""
                dashed = len(part) > 1 and start
                axis.plot(grid, values.mean(0), "--" if dashed else "-", color=color, label=name)
                axis.fill_between(grid, low, high, color=color, alpha=0.18, lw=0)
            axis.set(xlabel=label, ylabel="assembled pairs" if what == "stages" else what)
            axis.set(xlim=(0, None), ylim=(0, 1.02 * most) if most else None)
        column[0].set_title(title)
    legend_below(figure, axes, 5 if len(group(rows, "method")) > 2 else 2)
    save_figure(figure, path)


def plot_ablations(plt, rows: list[dict], path: Path):
    """Final returns per variant: dots are seeds, bars their mean."""
    variants = group(rows, "method")
    figure, axis = plt.subplots(figsize=(6, 1.6 + 0.3 * len(variants)))
    looks = ((-0.14, COLORS["blue"]), (0.14, COLORS["orange"]))
    for (start, label), (offset, color) in zip(STARTS.items(), looks, strict=True):
        for i, runs in enumerate(variants.values()):
            values = [float(row[f"final_return{start}"]) for row in runs]
            axis.scatter(values, [i + offset] * len(values), s=14, color=color, alpha=0.5, lw=0)
            ends = [i + offset - 0.13, i + offset + 0.13]
            axis.plot([np.mean(values)] * 2, ends, color=color, lw=2.5)
        axis.scatter([], [], s=14, color=color, label=label)
        axis.axvline(mean(rows, f"base_return{start}"), color=color, lw=1, ls="--", zorder=0)
    axis.axvline(np.nan, color=COLORS["grey"], lw=1, ls="--", label="base policy")
    axis.set(yticks=range(len(variants)), yticklabels=variants, title=rows[0]["task"])
    axis.set_xlabel("final return (dots: seeds, bars: mean)")
    axis.invert_yaxis()
    legend_below(figure, axis, 3)
    save_figure(figure, path)


def plot_kernels(plt, rows: list[dict], curves: dict, table: str, path: Path):
    """RBF beside delta kernel: scores, constraint loss and |phi| against iterations, a line per task."""
    both = {row["task"] for row in rows if row["method"] == "rldt-delta"}
    tasks = group([row for row in rows if row["task"] in both], "task")
    figure, axes = plt.subplots(len(tasks), 4, figsize=(12.8, 0.4 + 2.8 * len(tasks)), squeeze=False)
    for line, (task, members) in zip(axes, tasks.items(), strict=True):
        what, most = measured(members[0])
        name = "assembled pairs" if what == "stages" else what
        scores = {f"eval_{what}": f"{name}, x₀ = 0", f"eval_{what}_sampled": f"{name}, sampled"}
        for axis, (column, title) in zip(line, (scores | DIAGNOSTICS).items(), strict=True):
            for row in members:
                label, color = KERNELS[row["method"]]
                points = curves[table, task, row["method"], row["seed"]]
                marker = "o" if column in scores else None
                xs, ys = series(points, "iteration", column)
                axis.plot(xs, ys, color=color, lw=1.2, marker=marker, ms=3, label=label)
            axis.set(title=title, xlabel="iteration", ylim=(0, most if column in scores else None))
        line[0].set_ylabel(titled(row))
    legend_below(figure, axes[0, 0], 2)
    save_figure(figure, path)


def plot_gradient_norms(plt, rows: list[dict], path: Path):
    """Share of each ODE step in the norm of the actor's gradient, a panel per loss."""
    titles = {"literal": "eq. (13) as printed: weight 1 - t", "adjoint": "QAM: adjoint matching"}
    titles |= {"authors": "authors' code: weight 1 / (1 - t)"}
    losses = group(rows, "loss")
    figure, axes = plt.subplots(1, len(losses), figsize=(0.6 + 4.2 * len(losses), 3.2), sharey=True)
    looks = ((-0.2, COLORS["blue"]), (0.2, COLORS["orange"]))
    for axis, (loss, members) in zip(axes, losses.items(), strict=True):
        for (stage, steps), (offset, color) in zip(group(members, "stage").items(), looks, strict=True):
            ks = [int(row["k"]) + offset for row in steps]
            axis.bar(ks, [float(row["share"]) for row in steps], 0.38, color=color, label=stage)
        axis.axhline(1 / len(steps), color=COLORS["grey"], lw=1, ls="--", label="even")
        axis.set(title=titles[loss], xlabel="ODE step k", xticks=range(len(steps)))
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("share of the gradient norm")
    axes[0].legend()
    save_figure(figure, path)


def final_scores(rows: list[dict], start: str = "") -> dict[str, np.ndarray]:
    """Final scores (seeds, tasks) of each method, 0 at RLDT's base policy and 1 at a task's best mean.

    `start` is empty for x_0 = 0, or `_sampled`. Methods that lack a task are left out, and so are seeds
    that a method lacks on any task.
    """
    tasks, scores = list(group(rows, "task")), {}
    what, _ = measured(rows[0])
    for method, runs in group(rows, "method").items():
        values = {(row["task"], row["seed"]): float(row[f"final_{what}{start}"]) for row in runs}
        seeds = sorted({seed for _, seed in values}, key=int)
        complete = [seed for seed in seeds if all((task, seed) in values for task in tasks)]
        if complete:
            scores[method] = np.array([[values[task, seed] for task in tasks] for seed in complete])
    bases = group([row for row in rows if row["method"] == "rldt"], "task")
    low = np.array([mean(bases[task], f"base_{what}{start}") for task in tasks])
    high = np.max([values.mean(0) for values in scores.values()], 0)
    return {method: (values - low) / (high - low) for method, values in scores.items()}


def interval(scores: dict[str, np.ndarray], func) -> tuple[dict, dict]:
    """Estimates and 95 % intervals of func over scores (seeds, tasks), by stratified bootstrap."""
    from rliable import library

    np.random.seed(0)  # noqa: NPY002, rliable draws from numpy's global generator
    return library.get_interval_estimates(scores, lambda *x: np.array([func(*x)]), reps=REPS)


def plot_bars(axis, methods: list[str], middle: dict, limits: dict):
    """A bar from the lower to the upper limit of each method, with a tick at its estimate."""
    for y, method in enumerate(methods):
        low, high = limits[method][:, 0]
        color = METHODS[method][1]
        axis.barh(y, high - low, left=low, color=color, alpha=0.35, height=0.6)
        axis.plot([middle[method][0]] * 2, [y - 0.3, y + 0.3], color=color, lw=2)
    axis.set(yticks=range(len(methods)), yticklabels=[METHODS[method][0] for method in methods])


def plot_reliability(plt, scores: dict[str, np.ndarray], sampled: dict[str, np.ndarray], path: Path):
    """Interquartile means, performance profiles, and the probability that RLDT ends above each other."""
    from rliable import library, metrics

    size = (12, 0.9 + 0.35 * max(6, len(scores)))
    for label, values in {"x₀ = 0": scores, "sampled": sampled}.items():
        cells = [f"{METHODS[m][0]} {metrics.aggregate_iqm(v):.2f}" for m, v in values.items()]
        print(f"IQM {label}, 0 at the base and 1 at the best mean: {', '.join(cells)}")
    figure, (means, profiles, chances) = plt.subplots(1, 3, figsize=size)
    middle, limits = interval(scores, metrics.aggregate_iqm)
    order = sorted(scores, key=lambda method: middle[method][0])
    plot_bars(means, order, middle, limits)
    means.set(xlabel="normalised final score", title="IQM over tasks and seeds")

    every = np.concatenate([values.ravel() for values in scores.values()])
    tau = np.linspace(min(0, every.min()), every.max(), 101)
    share, bounds = library.create_performance_profile(scores, tau, reps=REPS)
    for method in reversed(order):
        name, color = METHODS[method]
        profiles.plot(tau, share[method], color=color, label=name)
        profiles.fill_between(tau, *bounds[method], color=color, alpha=0.15, lw=0)
    profiles.set(xlabel="normalised final score τ", ylabel="share of runs above τ")
    profiles.set_title("performance profiles")

    others = [method for method in order if method != "rldt"]
    versus = {method: (scores["rldt"], scores[method]) for method in others}
    middle, limits = interval(versus, metrics.probability_of_improvement)
    plot_bars(chances, others, middle, limits)
    chances.axvline(0.5, color=COLORS["grey"], lw=1, ls="--")
    chances.set(xlim=(0, 1), xlabel="P(RLDT > method)", title="probability of improvement")
    legend_below(figure, profiles, 5)
    save_figure(figure, path)


def mean_std(values: np.ndarray) -> str:
    return f"{values.mean():.0f} ± {values.std():.0f}"


def mean_range(values: np.ndarray) -> str:
    return f"{values.mean():.0f} [{values.min():.0f}, {values.max():.0f}]"


def returns_table(rows: list[dict], spread: Callable[[np.ndarray], str], throughput: list[dict]) -> str:
    """Returns over seeds, a line per task and method, and how often it updates its networks."""
    updates = [row for row in throughput if row["name"] == "training" and not row["args"]]
    speeds = {(row["task"], row["variant"], row["unit"]): row["value"] for row in updates}
    columns = {
        "base, x₀ = 0": "base_return", "final, x₀ = 0": "final_return", "best, x₀ = 0": "best_return",
        "base, sampled": "base_return_sampled", "final, sampled": "final_return_sampled",
    }  # fmt: skip
    lines = []
    for task, members in group(rows, "task").items():
        for method, runs in group(members, "method").items():
            name, _ = METHODS.get(method, (method, None))
            line = {"task": task, "method": name, "seeds": len(runs)}
            for title, column in columns.items():
                line[title] = spread(np.array([float(row[column]) for row in runs]))
            line["env steps (10⁶)"] = f"{mean(runs, 'env_steps') / 1e6:.2f}"
            line["wall (min)"] = f"{mean(runs, 'wall_s') / 60:.1f}"
            for unit in ("gradient steps/s", "gradient steps/1000 env steps") if throughput else ():
                speed = speeds.get((task, method, unit), "")
                line[unit] = f"{float(speed):.1f}" if speed else ""
            lines.append(line)
    return markdown(lines)


def success_table(rows: list[dict]) -> str:
    """Success in percent with 95 % intervals over the episodes of all seeds, and pairs if any."""
    titles = {"base_success": "base, x₀ = 0", "final_success": "final, x₀ = 0"}
    titles |= {"base_success_sampled": "base, sampled", "final_success_sampled": "final, sampled"}
    lines = []
    for runs in group([row | {"run": (row["task"], row["method"])} for row in rows], "run").values():
        line = dict(task=runs[0]["task"], method=METHODS.get(runs[0]["method"], [runs[0]["method"]])[0])
        line["seeds"] = ", ".join(row["seed"] for row in runs)
        for key, title in titles.items():
            episodes = [int(row["episodes"]) for row in runs]
            succeeded = np.dot(episodes, [float(row[key]) for row in runs]).round()
            share, low, high = success_rate(np.arange(sum(episodes)) < succeeded, key).values()
            line[title] = f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
        for when in ("base", "final") if all(row.get("base_stages") for row in rows) else ():
            zero, sampled = mean(runs, f"{when}_stages"), mean(runs, f"{when}_stages_sampled")
            line[f"{when} pairs"] = f"{zero:.2f} / {sampled:.2f}"
        line["env steps (10³)"] = f"{mean(runs, 'env_steps') / 1e3:.0f}"
        line["wall (min)"] = f"{mean(runs, 'wall_s') / 60:.0f}"
        lines.append(line)
    return markdown(lines)


def main(args: Args):
    plt, curves = pyplot(), load_curves(args.results / "curves.csv")
    names = "gym ablations robomimic furniture baselines sparse gradient_norms"
    tables = {name: read_csv(args.results / f"{name}.csv") for name in names.split()}
    if not any(tables.values()):
        raise SystemExit(f"{args.results}: no results; run benchmark.run first.")
    if rows := tables["gym"]:
        plot_scores(plt, rows, curves, "gym", args.images / "returns.png")
        print(returns_table(rows, mean_std, []))
    if rows := [row for row in tables["ablations"] if row["task"] == "Hopper-v4"]:
        plot_ablations(plt, rows, args.images / "ablations.png")
        print(returns_table(rows, mean_std, []))
    for table, suffix in {"robomimic": "", "furniture": "_furniture", "baselines": "_gym"}.items():
        rows = [row for row in tables[table] if row["method"] in KERNELS]
        if rows and table != "baselines":
            plot_scores(plt, rows, curves, table, args.images / f"success{suffix}.png")
            print(success_table(tables[table]))
        if any(row["method"] == "rldt-delta" for row in rows):
            plot_kernels(plt, rows, curves, table, args.images / f"kernels{suffix}.png")
    if rows := tables["gradient_norms"]:
        plot_gradient_norms(plt, rows, args.images / "gradient_norms.png")
    for table, name in {"baselines": "baselines", "sparse": "baselines_sparse"}.items():
        rows = sorted(tables[table], key=lambda row: list(METHODS).index(row["method"]))
        if not rows:
            continue
        shown = dict(apart=True) if table == "sparse" else dict(starts=("",))
        plot_scores(plt, rows, curves, table, args.images / f"{name}.png", **shown)
        updates = read_csv(args.results / "throughput.csv")
        print(success_table(rows) if table == "sparse" else returns_table(rows, mean_range, updates))
        scores = final_scores(rows), final_scores(rows, "_sampled")
        several = len(scores[0]) > 1 and all(len(seeds) > 1 for seeds in scores[0].values())
        if importlib.util.find_spec("rliable") and several:
            plot_reliability(plt, *scores, args.images / f"{name}_reliability.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
