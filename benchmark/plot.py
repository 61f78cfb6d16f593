"""Draws the results from the committed CSVs and prints them as a table.

    python -m benchmark.plot                            # writes figures to docs/images

Figures of the paper: 2 and the reliability of its claim (baselines*.png, by benchmark.plot_baselines, which needs baselines/requirements.txt),
3 (success*.png), 4 (gradient_norms.png), 5 and 8 (kernels*.png), 6 and 7 (ablations.png).
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark.tools import (
    COLORS,
    IMAGES,
    RESULTS,
    group,
    markdown,
    mean_std,
    pyplot,
    read_csv,
    save_figure,
)

SIMULATORS = {"mujoco": " (MuJoCo)", "isaac": " (Isaac Gym)"}  # backends of furniture
STARTS = {  # column in the curves, label, base column, colour
    "eval_return": ("x₀ = 0", "base_return", COLORS["blue"]),
    "eval_return_sampled": ("sampled, x₀ ~ N(0, I)", "base_return_sampled", COLORS["orange"]),
}
DIAGNOSTICS = {"diagnostics/phi_norm": "mean |φ|", "losses/constraint": "constraint loss, eq. (15)"}


@dataclass
class Args:
    results: Path = RESULTS
    """Directory with the CSVs and curves."""
    images: Path = IMAGES
    """Directory to write figures to."""
    method: str = "rldt"
    """Method of gym.csv to draw."""


def curves(folder: Path, rows: list[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Curves of runs, interpolated to common points: x (100,), y (runs, 100), as far as all of them go."""
    found = []
    for row in rows:
        curve = read_csv(folder / f"{row['task']}__{row['method']}__{row['seed']}.csv")
        points = [(float(point[x]), float(point[y])) for point in curve if point.get(y)]
        if points:
            found.append(np.array(points).T)
    if not found:
        return np.zeros(0), np.zeros((0, 0))
    grid = np.linspace(max(xs[0] for xs, _ in found), min(xs[-1] for xs, _ in found), 100)
    return grid, np.stack([np.interp(grid, xs, ys) for xs, ys in found])


def band(axis, grid: np.ndarray, values: np.ndarray, label: str, color: str):
    """Mean and range over seeds."""
    axis.plot(grid, values.mean(0), color=color, label=label)
    axis.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)


def plot_returns(plt, rows: list[dict], args: Args):
    """Return against environment steps and wall time, one column per task."""
    tasks = group(rows, "task")
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.6 * len(tasks) + 0.4, 5.6), squeeze=False, sharey="col")
    scales = {"env_steps": (1e6, "environment steps (millions)"), "wall_s": (60, "wall time (minutes)")}
    for column, (task, runs) in enumerate(tasks.items()):
        for axis, (x, (scale, label)) in zip(axes[:, column], scales.items(), strict=True):
            for y, (name, base, color) in STARTS.items():
                grid, values = curves(args.results / "curves", runs, x, y)
                if len(grid):
                    band(axis, grid / scale, values, name, color)
                axis.axhline(np.mean([float(row[base]) for row in runs]), color=color, lw=1, ls="--")
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axes[0, column].set_title(f"{task} ({seeds})")
    for axis in axes[:, 0]:
        axis.set_ylabel("return")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color=COLORS["grey"], lw=1, ls="--"))
    figure.legend(handles, [*labels, "base policy"], loc="outside lower center", ncols=3)
    save_figure(figure, args.images / "returns.png")


def plot_ablations(plt, rows: list[dict], args: Args):
    """Final returns per variant, and what the kernel does to the update."""
    variants = group(rows, "method")
    ratios = [1.6] + [1] * len(DIAGNOSTICS)
    height = 1.6 + 0.3 * len(variants)
    figure, axes = plt.subplots(1, 1 + len(DIAGNOSTICS), figsize=(11, height), width_ratios=ratios)
    columns = {"final_return": "eval_return", "final_return_sampled": "eval_return_sampled"}
    for column, start in columns.items():
        label, base, color = STARTS[start]
        offset = -0.14 if column == "final_return" else 0.14
        for i, runs in enumerate(variants.values()):
            values = [float(row[column]) for row in runs]
            axes[0].scatter(values, [i + offset] * len(values), s=14, color=color, alpha=0.5, linewidths=0)
            mean = np.mean(values)
            axes[0].plot([mean, mean], [i + offset - 0.13, i + offset + 0.13], color=color, lw=2.5)
        axes[0].scatter([], [], s=14, color=color, label=label)
        axes[0].axvline(np.mean([float(row[base]) for row in rows]), color=color, lw=1, ls="--", zorder=0)
    axes[0].axvline(np.nan, color=COLORS["grey"], lw=1, ls="--", label="base policy")
    axes[0].set(yticks=range(len(variants)), yticklabels=variants, xlabel="final return (dots: seeds, bars: mean)")
    axes[0].set_title(rows[0]["task"])
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.09), ncols=3, columnspacing=1, handletextpad=0.4)
    kernels = {"rldt": ("RBF kernel", COLORS["green"]), "delta": ("delta kernel", COLORS["purple"])}
    for axis, (column, title) in zip(axes[1:], DIAGNOSTICS.items(), strict=True):
        for variant, (label, color) in kernels.items():
            folder = args.results / "curves_ablations"
            grid, values = curves(folder, variants.get(variant, []), "iteration", column)
            if len(grid):
                band(axis, grid, values, label, color)
        axis.set(xlabel="iteration", title=title)
        axis.set_ylim(bottom=0)
        axis.legend()
    save_figure(figure, args.images / "ablations.png")


def table(rows: list[dict], key: str) -> str:
    """A markdown table of mean ± standard deviation over seeds, a line per task or variant."""
    lines = []
    for name, runs in group(rows, key).items():
        cell = lambda column, scale=1, digits=0: mean_std([float(r[column]) / scale for r in runs], digits)
        lines.append({
            key: name, "seeds": len(runs), "base, x₀ = 0": cell("base_return"), "final, x₀ = 0": cell("final_return"),
            "base, sampled": cell("base_return_sampled"), "final, sampled": cell("final_return_sampled"),
            "best, x₀ = 0": cell("best_return"), "env steps (10⁶)": cell("env_steps", 1e6, 2),
            "wall (min)": cell("wall_s", 60, 1),
        })  # fmt: skip
    return markdown(lines)


def measured(task: str) -> tuple[str, int]:
    """What a task with sparse rewards is measured by in the curves, and the most it can be."""
    return ("stages", 2) if task.startswith("lamp") else ("success", 1)


def plot_success(plt, rows: list[dict], args: Args, name: str):
    """Success rate, or pairs where a task assembles several, against wall time, a panel per task, a line per method; dots are evaluations, faint lines rollouts."""
    tasks = group(rows, "task")
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks) + 0.4, 3.4), squeeze=False)
    colors = dict(zip(dict.fromkeys(row["method"] for row in rows), itertools.cycle(COLORS.values()), strict=False))
    for axis, (task, runs) in zip(axes[0], tasks.items(), strict=True):
        what, most = measured(task)
        for row in runs:
            curve = read_csv(args.results / "curves" / f"{row['task']}__{row['method']}__{row['seed']}.csv")
            rollouts = [(float(p["wall_s"]) / 60, float(p[f"train_{what}"])) for p in curve if p.get(f"train_{what}")]
            axis.plot(*zip(*rollouts, strict=True), color=colors[row["method"]], lw=0.6, alpha=0.3)
            for key, style, start in ((f"eval_{what}", "o-", "x₀ = 0"), (f"eval_{what}_sampled", "o:", "sampled")):
                points = [(float(p["wall_s"]) / 60, float(p[key])) for p in curve if p.get(key)]
                axis.plot(*zip(*points, strict=True), style, ms=3, lw=1.2, color=colors[row["method"]], label=f"{row['method']}, {start}")
        axis.set(title=task + SIMULATORS.get(runs[0].get("backend"), ""), xlabel="wall time (minutes)",
                 ylabel="assembled pairs" if most > 1 else "success rate", ylim=(-0.02 * most, 1.02 * most))  # fmt: skip
    entries = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2)
    save_figure(figure, args.images / name)


def plot_kernels(plt, rows: list[dict], folder: Path, path: Path):
    """RBF beside delta kernel (the paper's figures 5 and 8): return, success or pairs, constraint loss and |phi| against iterations, a line of panels per task."""
    tasks = group(rows, "task")
    figure, axes = plt.subplots(len(tasks), 4, figsize=(12.8, 0.4 + 2.8 * len(tasks)), squeeze=False)
    for line, (task, runs) in zip(axes, tasks.items(), strict=True):
        measure, most = ("return", None) if "base_return" in runs[0] else measured(task)
        name = "assembled pairs" if measure == "stages" else measure
        panels = {f"eval_{measure}": f"{name}, x₀ = 0", f"eval_{measure}_sampled": f"{name}, sampled"} | {k: v for k, v in reversed(DIAGNOSTICS.items())}
        for axis, (column, title) in zip(line, panels.items(), strict=True):
            for method, (label, color) in {"rldt": ("RBF kernel", COLORS["green"]), "rldt-delta": ("delta kernel", COLORS["purple"])}.items():
                for row in [row for row in runs if row["method"] == method]:
                    curve = read_csv(folder / f"{task}__{method}__{row['seed']}.csv")
                    points = [(int(p["iteration"]), float(p[column])) for p in curve if p.get(column)]
                    axis.plot(*zip(*points, strict=True), color=color, lw=1.2, marker="o" if measure in column else None, ms=3, label=label)
            axis.set(title=title, xlabel="iteration", ylim=(0, most if measure in column else None))
        line[0].set_ylabel(task + SIMULATORS.get(runs[0].get("backend"), ""))
    entries = {label: handle for handle, label in zip(*axes[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


def plot_gradient_norms(plt, rows: list[dict], path: Path):
    """Share of each ODE step in the norm of the actor's gradient (the paper's figure 4), a panel per loss; rows of gradient_norms.csv."""
    titles = {"literal": "eq. (13) as printed: weight 1 - t", "authors": "authors' code: weight 1 / (1 - t)", "adjoint": "QAM: adjoint matching"}
    losses = group([row for row in rows if row["term"] == "total"], "loss")
    figure, axes = plt.subplots(1, len(losses), figsize=(0.6 + 4.2 * len(losses), 3.2), sharey=True, squeeze=False)
    for axis, (loss, members) in zip(axes[0], losses.items(), strict=True):
        stages = group(members, "stage")
        for (stage, steps), offset, color in zip(stages.items(), (-0.2, 0.2), (COLORS["blue"], COLORS["orange"]), strict=True):
            axis.bar([int(row["k"]) + offset for row in steps], [float(row["share"]) for row in steps], 0.38, color=color, label=stage)
        axis.axhline(1 / len(steps), color=COLORS["grey"], lw=1, ls="--", label="even")
        axis.set(title=titles[loss], xlabel="ODE step k", xticks=range(len(steps)))
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("share of the gradient norm")
    axes[0, 0].legend()
    save_figure(figure, path)


def pairs(row: dict) -> dict[str, str]:
    """Cells with the assembled pairs of a row of furniture, before and after, from x_0 = 0 / sampled."""
    if "base_stages" not in row:
        return {}
    return {f"{when} pairs": f"{float(row[when + '_stages']):.2f} / {float(row[when + '_stages_sampled']):.2f}" for when in ("base", "final")}


def success_table(rows: list[dict]) -> str:
    """A markdown table of success rates in percent with their 95 % intervals, a line per run, and of pairs where there are any."""
    lines = []
    for row in rows:
        rate = lambda key, row=row: f"{100 * float(row[key]):.0f} [{100 * float(row[key + '_low']):.0f}, {100 * float(row[key + '_high']):.0f}]"
        lines.append({
            "task": row["task"], "method": row["method"], "seed": row["seed"], "base, x₀ = 0": rate("base_success"),
            "final, x₀ = 0": rate("final_success"), "base, sampled": f"{100 * float(row['base_success_sampled']):.0f}",
            "final, sampled": rate("final_success_sampled"), **pairs(row), "env steps (10³)": f"{float(row['env_steps']) / 1e3:.0f}",
            "wall (min)": f"{float(row['wall_s']) / 60:.0f}",
        })  # fmt: skip
    return markdown(lines)


def main(args: Args):
    plt = pyplot()
    rows = [row for row in read_csv(args.results / "gym.csv") if row["method"] == args.method]
    ablations = read_csv(args.results / "ablations_hopper.csv")
    families = {name: read_csv(args.results / f"{name}.csv") for name in ("robomimic", "furniture")}
    if not rows and not ablations and not any(families.values()):
        raise SystemExit(f"{args.results}: no gym.csv, ablations_hopper.csv, robomimic.csv or furniture.csv; run benchmark.returns first.")
    if rows:
        plot_returns(plt, rows, args)
        print(table(rows, "task"))
    if ablations:
        plot_ablations(plt, ablations, args)
        print(table(ablations, "method"))
    for family, runs in families.items():
        if runs:
            suffix = "" if family == "robomimic" else f"_{family}"
            defaults = [row for row in runs if row["method"] in ("rldt", "rldt-delta")]
            plot_success(plt, defaults if family == "furniture" and defaults else runs, args, f"success{suffix}.png")
            both = {row["task"] for row in runs if row["method"] == "rldt-delta"}
            if both:
                plot_kernels(plt, [row for row in runs if row["task"] in both], args.results / "curves", args.images / f"kernels{suffix}.png")
            print(success_table(runs))
    norms = read_csv(args.results / "gradient_norms.csv")
    if norms:
        plot_gradient_norms(plt, norms, args.images / "gradient_norms.png")
    if read_csv(args.results / "baselines.csv"):
        from benchmark import plot_baselines

        try:
            plot_baselines.main(plot_baselines.Args(args.results, args.images))
        except SystemExit as error:  # no rliable
            print(error)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
