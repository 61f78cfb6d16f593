"""Which ODE steps the actor's gradient comes from (the paper's figure 4).

    python -m benchmark.gradient_norms RUN_DIR          # a run directory with checkpoint.pt

The norm of the gradient of the actor loss, eq. (16), with every particle at the same ODE step k, for both
transport losses, at the base policy and at the policy of the checkpoint, with the critic of the checkpoint
(or for the base policy that of a shorter run, `--early`). States come from the run's replay. `share` is the
norm divided by the sum over k. The reference of the constraint is the policy itself, as in the first
actor step of an iteration, so the constraint adds nothing here.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rldt_gym
from benchmark.tools import COLORS, IMAGES, RESULTS, Run, load_run, pyplot, save_figure, write_csv


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory."""
    early: Path | None = None
    """Run directory, e.g. of a few iterations, whose critic goes with the base policy."""
    batches: int = 16
    """Batches of actor_batch states over which the norm is averaged."""
    seed: int = 1
    """Seed of states and noise."""
    out: Path = RESULTS / "gradient_norms.csv"
    """CSV to write."""
    figure: Path = IMAGES / "gradient_norms.png"
    """Figure to write."""


def norms(policy: rldt_gym.FlowPolicy, critic: rldt_gym.Critic, run: Run, transport_loss: str, args: Args):
    """Gradient norms of the total and of the transport loss, (2, K), averaged over batches."""
    cfg = copy.copy(run.args)
    cfg.transport_loss, cfg.bf16 = transport_loss, False
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    reference, parameters = copy.deepcopy(policy.velocity).requires_grad_(False), list(policy.velocity.parameters())
    result = torch.zeros(2, cfg.euler_steps)
    for _ in range(args.batches):
        states = run.states[torch.randint(len(run.states), (cfg.actor_batch,), generator=generator)]
        trajectory = policy.sample(states[:, None].expand(-1, cfg.n_particles, -1), trajectory=True)
        for k in range(cfg.euler_steps):
            steps = torch.full((cfg.actor_batch, cfg.n_particles), k)
            losses = rldt_gym.actor_losses(policy.velocity, reference, critic, states, trajectory, cfg, k=steps)
            transport, consistency, constraint, _ = losses
            total = transport + cfg.consistency_weight * consistency + cfg.constraint_weight * constraint  # eq. (16)
            for row, loss in enumerate((total, transport)):
                gradients = torch.autograd.grad(loss, parameters, retain_graph=row == 0)
                result[row, k] += torch.stack(torch._foreach_norm(gradients)).norm() / args.batches
    return result


def main(args: Args):
    torch.set_num_threads(1)
    run = load_run(args.run)
    early = load_run(args.early) if args.early else run
    stages = {"base policy": (run.base, early.critic), "end of the run": (run.policy, run.critic)}
    rows = []
    for stage, (policy, critic) in stages.items():
        for transport_loss in "literal", "authors":
            measured = norms(policy, critic, run, transport_loss, args)
            for term, values in zip(("total", "transport"), measured, strict=True):
                for k, value in enumerate(values.tolist()):
                    rows.append({
                        "run": run.name, "stage": stage, "transport_loss": transport_loss, "term": term, "k": k,
                        "norm": value, "share": value / values.sum().item(),
                    })  # fmt: skip
                shares = " ".join(f"{share:.3f}" for share in (values / values.sum()).tolist())
                print(f"{stage:15} {transport_loss:8} {term:10} sum {values.sum():9.4g}, shares {shares}")
    write_csv(args.out, rows)

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, transport_loss in zip(axes, ("literal", "authors"), strict=True):
        for stage, offset, color in zip(stages, (-0.2, 0.2), (COLORS["blue"], COLORS["orange"]), strict=True):
            chosen = [r for r in rows if (r["stage"], r["transport_loss"]) == (stage, transport_loss)]
            total = [r["share"] for r in chosen if r["term"] == "total"]
            axis.bar([k + offset for k in range(len(total))], total, 0.38, color=color, label=stage)
        axis.axhline(1 / len(total), color=COLORS["grey"], lw=1, ls="--", label="even")
        titles = {"literal": "eq. (13) as printed: weight 1 - t", "authors": "authors' code: weight 1 / (1 - t)"}
        axis.set(title=titles[transport_loss], xlabel="ODE step k", xticks=range(len(total)))
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("share of the gradient norm")
    axes[0].legend()
    save_figure(figure, args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
