"""Draws the comparison of methods from the committed CSVs, with rliable (Agarwal et al. 2021), and prints it as a table.

    pip install -r baselines/requirements.txt
    python -m benchmark.plot_baselines                  # writes docs/images/baselines.png, baselines_reliability.png and kernels_gym.png

Lines and ticks are interquartile means over seeds (and tasks), bands and bars 95 % stratified bootstrap intervals; with three seeds and one
task these are the mean and the range of the seeds. The table has plain means over seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark.plot import curves, plot_kernels
from benchmark.tools import IMAGES, RESULTS, group, markdown, pyplot, read_csv, save_figure

COLORS = {
    "rldt": "#d6604d", "rldt-delta": "#f4a582", "qam": "#2166ac", "reinflow": "#1b7837", "dppo": "#762a83", "dppo-diffusion": "#c2a5cf", "fpo": "#e08214",
    "fpo++": "#fdb863", "best-of-n": "#4d4d4d", "sac": "#969696",
}  # fmt: skip
NAMES = {
    "rldt": "RLDT", "rldt-delta": "RLDT-Delta", "qam": "QAM", "reinflow": "ReinFlow", "dppo": "DPPO (flow)", "dppo-diffusion": "DPPO (diffusion)", "fpo": "FPO",
    "fpo++": "FPO++", "best-of-n": "best of N", "sac": "SAC",
}  # fmt: skip

CLAIMS = {  # what the methods' own papers report, from other base policies and at other budgets (docs/baselines.md); most show curves only
    "rldt": "above the others (curves, 11 M steps)", "rldt-delta": "slightly above RLDT (curves)", "qam": "other tasks", "fpo++": "other tasks", "fpo": "other tasks",
    "dppo": "diffusion form (curves, 80 M steps)", "dppo-diffusion": "curves, 80 M steps", "reinflow": "curves, 80 M steps",
    ("reinflow", "Hopper-v4"): "1432 → 3205, 80 M steps", ("reinflow", "Walker2d-v4"): "2739 → 4109, 80 M steps",
}  # fmt: skip


@dataclass
class Args:
    results: Path = RESULTS
    """Directory with baselines.csv, baselines/ and update_speed.csv."""
    images: Path = IMAGES
    """Directory to write figures to."""
    column: str = "eval_return"
    """What is compared: `eval_return` from x_0 = 0, or `eval_return_sampled`."""
    reps: int = 2000
    """Bootstrap repetitions."""


def load(results: Path) -> list[dict]:
    """Rows of the comparison, method by method, each with the folder of its curve."""
    rows = [row | {"curves": results / "baselines"} for row in read_csv(results / "baselines.csv") if row["method"] in NAMES]
    return sorted(rows, key=lambda row: list(NAMES).index(row["method"]))


def interval(scores: dict[str, np.ndarray], func, reps: int):
    """Estimates and 95 % intervals of func over runs and tasks, scores (runs, tasks, ...), by stratified bootstrap."""
    from rliable import library

    np.random.seed(0)  # noqa: NPY002, rliable draws from numpy's global generator, whatever random_state it is given
    return library.get_interval_estimates(scores, func, reps=reps)


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile means over runs and tasks of scores (runs, tasks, points), (points,): rliable's, for all points at once."""
    from scipy.stats import trim_mean

    return trim_mean(values.reshape(-1, values.shape[-1]), 0.25, axis=0)


def plot_returns(plt, rows: list[dict], args: Args):
    """Return against environment steps and wall time, a column per task, a line per method."""
    tasks = group(rows, "task")
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.6 * len(tasks) + 0.4, 6), squeeze=False, sharey="col")
    scales = {"env_steps": (1e6, "environment steps (millions)"), "wall_s": (60, "wall time (minutes)")}
    for column, (task, members) in enumerate(tasks.items()):
        for axis, (x, (scale, label)) in zip(axes[:, column], scales.items(), strict=True):
            for method, runs in group(members, "method").items():
                grid, values = curves(runs[0]["curves"], runs, x, args.column)  # (100,), (seeds, 100)
                if len(grid) == 0:
                    continue
                middle, limits = interval({method: values[:, None]}, iqm, args.reps)
                axis.plot(grid / scale, middle[method], color=COLORS[method], label=NAMES[method])
                axis.fill_between(grid / scale, *limits[method], color=COLORS[method], alpha=0.18, lw=0)
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
        axes[0, column].set_title(task)
    for axis in axes[:, 0]:
        axis.set_ylabel("return, IQM over seeds")
    entries = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(5, 2 * len(tasks)))
    save_figure(figure, args.images / "baselines.png")


def final_scores(rows: list[dict], column: str) -> dict[str, np.ndarray]:
    """Final returns (seeds, tasks) of each method, 0 at the task's base policy and 1 at its best method's mean.

    Methods that lack a task are left out, and so are seeds that a method lacks on any task.
    """
    final, base = column.replace("eval", "final"), column.replace("eval", "base")
    tasks, scores = group(rows, "task"), {}
    for method, runs in group(rows, "method").items():
        by_task = group(runs, "task")
        if len(by_task) < len(tasks):
            continue
        seeds = set.intersection(*({row["seed"] for row in members} for members in by_task.values()))
        values = {(row["task"], row["seed"]): float(row[final]) for row in runs}
        if seeds:
            scores[method] = np.array([[values[task, seed] for task in tasks] for seed in sorted(seeds, key=int)])
    flow = [row for row in rows if row["method"] in ("rldt", "qam", "dppo", "fpo", "fpo++")] or rows  # that start from the same flow
    low = np.array([np.mean([float(row[base]) for row in flow if row["task"] == task]) for task in tasks])
    high = np.max([values.mean(0) for values in scores.values()], 0) if scores else low + 1
    return {method: (values - low) / (high - low) for method, values in scores.items()}


def plot_reliability(plt, scores: dict[str, np.ndarray], args: Args):
    """Interquartile means, performance profiles, and the probability that RLDT ends above each other method."""
    from rliable import library, metrics

    figure, axes = plt.subplots(1, 3, figsize=(12, 0.9 + 0.35 * max(6, len(scores))))
    middle, limits = interval(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), args.reps)
    order = sorted(scores, key=lambda method: middle[method][0])
    for y, method in enumerate(order):
        axes[0].barh(y, np.ptp(limits[method][:, 0]), left=limits[method][0, 0], color=COLORS[method], alpha=0.35, height=0.6)
        axes[0].plot([middle[method][0]] * 2, [y - 0.3, y + 0.3], color=COLORS[method], lw=2)
    axes[0].set(yticks=range(len(order)), yticklabels=[NAMES[method] for method in order], xlabel="normalised final return", title="IQM over tasks and seeds")

    tau = np.linspace(min(0, *(x.min() for x in scores.values())), max(x.max() for x in scores.values()), 101)
    share, bounds = library.create_performance_profile(scores, tau, reps=args.reps)
    for method in reversed(order):
        axes[1].plot(tau, share[method], color=COLORS[method], label=NAMES[method])
        axes[1].fill_between(tau, *bounds[method], color=COLORS[method], alpha=0.15, lw=0)
    axes[1].set(xlabel="normalised final return τ", ylabel="share of runs above τ", title="performance profiles")

    others = [method for method in order if method != "rldt"]
    if "rldt" in scores and others:
        pairs = {method: (scores["rldt"], scores[method]) for method in others}
        middle, limits = interval(pairs, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), args.reps)
        for y, method in enumerate(others):
            axes[2].barh(y, np.ptp(limits[method][:, 0]), left=limits[method][0, 0], color=COLORS[method], alpha=0.35, height=0.6)
            axes[2].plot([middle[method][0]] * 2, [y - 0.3, y + 0.3], color=COLORS[method], lw=2)
        axes[2].axvline(0.5, color="#777777", lw=1, ls="--")
        axes[2].set(yticks=range(len(others)), yticklabels=[NAMES[method] for method in others], xlim=(0, 1), xlabel="P(RLDT > method)",
                    title="probability of improvement")  # fmt: skip
    else:
        axes[2].set_axis_off()
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    save_figure(figure, args.images / "baselines_reliability.png")


def table(rows: list[dict], speeds: list[dict], reps: int) -> str:
    """A markdown table, a line per task and method: means over seeds with 95 % bootstrap intervals; speeds are rows of update_speed.csv."""
    lines, speeds = [], {(row["task"], row["method"]): row for row in speeds}
    for task, members in group(rows, "task").items():
        for method, runs in group(members, "method").items():
            def mean(column, scale=1.0, digits=0, runs=runs):
                return f"{np.mean([float(row[column]) for row in runs]) / scale:.{digits}f}"
            def bounded(column, runs=runs):
                values = np.array([[float(row[column])] for row in runs])
                middle, limits = interval({"": values}, lambda x: np.array([x.mean()]), reps)
                return f"{middle[''][0]:.0f} [{limits[''][0, 0]:.0f}, {limits[''][1, 0]:.0f}]"
            speed = speeds.get((task, method), {})
            lines.append({
                "task": task, "method": NAMES[method], "seeds": len(runs), "base, x₀ = 0": mean("base_return"),
                "final, x₀ = 0": bounded("final_return"), "best, x₀ = 0": bounded("best_return"), "base, sampled": mean("base_return_sampled"),
                "final, sampled": bounded("final_return_sampled"), "env steps (10⁶)": mean("env_steps", 1e6, 2), "wall (min)": mean("wall_s", 60, 1),
                "updates/s": f"{float(speed['gradient_steps_per_s']):.1f}" if speed else "",
                "updates per 1000 env steps": f"{float(speed['gradient_steps_per_1000_env_steps']):.1f}" if speed else "",
                "its authors report": CLAIMS.get((method, task), CLAIMS.get(method, "")),
            })  # fmt: skip
    return markdown(lines)


def main(args: Args):
    rows = load(args.results)
    if not rows:
        raise SystemExit(f"{args.results}: no baselines.csv; run benchmark.run first.")
    try:
        import rliable  # noqa: F401
    except ImportError as error:
        raise SystemExit("The figures need rliable: pip install -r baselines/requirements.txt") from error
    plt = pyplot()
    plot_returns(plt, rows, args)
    kernels = [row for row in rows if row["method"] in ("rldt", "rldt-delta")]
    if any(row["method"] == "rldt-delta" for row in kernels):
        plot_kernels(plt, kernels, args.results / "baselines", args.images / "kernels_gym.png")
    scores = final_scores(rows, args.column)
    if scores:
        plot_reliability(plt, scores, args)
    for column in ("eval_return", "eval_return_sampled"):
        middle = {NAMES[method]: iqm(values[..., None])[0] for method, values in final_scores(rows, column).items()}
        print(f"{column}, 0 at the base and 1 at the best mean, IQM: " + ", ".join(f"{name} {value:.2f}" for name, value in middle.items()))
    print(table(rows, read_csv(args.results / "update_speed.csv"), args.reps))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
