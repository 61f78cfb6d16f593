"""Success of a furniture base policy against its training steps, by how it is cloned.

    python -m benchmark.pretraining_furniture --bc-epochs 15 --threads 1 --every 1000 --variant "scaled by standard deviations"
    python -m benchmark.pretraining_furniture --bc-epochs 15 --threads 1 --every 1000 --variant "by range" --bc-spread 0 --cond-mlp

write benchmark/results/pretraining_furniture.csv.

A row is the averaged policy after `step` steps: its validation loss, and success rate and assembled pairs of `episodes` episodes from
x_0 = 0 and again from noise, in MuJoCo. The rows are those of one training, so before the last one the step size is not yet at its end.
Rows of other variants in the CSV are kept.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

import rldt_furniture as script
from benchmark.tools import RESULTS, provenance, pyplot, read_csv, save_figure, write_csv


@dataclass
class Args:
    settings: script.Args = field(default_factory=script.Args)
    """Settings of rldt_furniture.py; those of the task and the base policy matter here."""
    variant: str = ""
    """Name of this training in the CSV and the figure; default the number of demonstrations."""
    every: int = 2000
    """Steps between evaluations, a multiple of 500."""
    episodes: int = 50
    """Episodes per evaluation, from x_0 = 0 and again from noise."""
    save: Path | None = None
    """Folder for the policies that are evaluated, <variant>_<step>.safetensors; none if empty."""
    out: Path = RESULTS / "pretraining_furniture.csv"
    """CSV to write."""


def main(args: Args):
    config = script.resolve(args.settings)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    data = script.get_demonstrations(config)
    envs = script.FurnitureVectorEnv(config.num_envs, config.furniture, config.randomness, config.chunk, threads=config.threads, stop_on_success=True)
    variant = args.variant or f"{len(data['episode_ends'])} demonstrations"
    task = f"{config.furniture}-{config.randomness}"
    rows = [row for row in read_csv(args.out) if (row["task"], row["variant"]) != (task, variant)]
    start, evaluating = time.perf_counter(), 0.0

    def each(step: int, policy: script.FlowPolicy, validation: float):
        nonlocal evaluating
        if step % args.every:
            return
        tick = time.perf_counter()
        scores = script.evaluate(policy, envs, config, args.episodes, 1_000_000)
        row = dict(task=task, variant=variant, demonstrations=len(data["episode_ends"]), width=config.actor_width, depth=config.actor_depth,
                   batch=config.bc_batch, step=step, train_s=tick - start - evaluating, validation_loss=validation)  # fmt: skip
        for name, stages in ("zero", scores["zero"]), ("sampled", scores["noise"]):
            row |= script.summary(stages, f"success_{name}", config)
        rows.append(row | {"episodes": args.episodes, "threads": config.threads} | provenance())
        write_csv(args.out, rows)
        if args.save:
            script.save_base(policy, args.save / f"{variant}_{step}.safetensors", **row)
        print(f"{step} steps: success {100 * row['success_zero']:.0f} % from x_0 = 0, {100 * row['success_sampled']:.0f} % from noise", flush=True)
        evaluating += time.perf_counter() - tick

    script.pretrain(config, data, each=each)
    envs.close()
    draw(args.out)


def draw(path: Path):
    """Success from x_0 = 0, with its interval, against training steps."""
    plt, rows = pyplot(), read_csv(path)
    figure, axis = plt.subplots(figsize=(6, 4))
    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        points = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
        x, y, low, high = ([float(row[key]) for row in points] for key in ("step", "success_zero", "success_zero_low", "success_zero_high"))
        axis.plot(x, y, "o-", label=f"{task}, {variant}")
        axis.fill_between(x, low, high, alpha=0.15)
    axis.set(xlabel="training steps", ylabel="success rate from $x_0=0$ (MuJoCo)", ylim=(-0.02, 1.02))
    axis.legend(loc="center right", fontsize=8)
    save_figure(figure, script.DEMOS.parent / "docs" / "images" / "pretraining_furniture.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
