"""Which ODE steps the actor's gradient comes from (the paper's figure 4).

    python -m benchmark.gradient_norms RUN_DIR --qam QAM_RUN_DIR         # run directories with checkpoint.pt

The norm of the gradient of the actor loss, eq. (16), with every particle at the same ODE step k, for both
transport losses, at the base policy and at the policy of the checkpoint, with the critic of the checkpoint
(or for RLDT's base policy that of a shorter run, `--early`). States come from the run's replay. `share` is the
norm divided by the sum over k. The reference of the constraint is the policy itself, as in the first
actor step of an iteration, so the constraint adds nothing here. Of QAM it is the gradient of the adjoint loss at step k.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rldt_gym
from baselines import qam_gym
from benchmark.plot import plot_gradient_norms
from benchmark.tools import IMAGES, RESULTS, Run, load_run, pyplot, write_csv


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory."""
    early: Path | None = None
    """Run directory, e.g. of a few iterations, whose critic goes with the base policy of RLDT."""
    qam: Path | None = None
    """Run directory of baselines.qam_gym to compare with."""
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


def qam_norms(policy: rldt_gym.FlowPolicy, run: Run, inv_temp: float, args: Args):
    """Gradient norms of QAM's loss at each ODE step, (1, K), averaged over batches."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    base, parameters, K = copy.deepcopy(run.base.velocity).requires_grad_(False), list(policy.velocity.parameters()), run.args.euler_steps
    result = torch.zeros(1, K)
    for _ in range(args.batches):
        states = run.states[torch.randint(len(run.states), (run.args.actor_batch,), generator=generator)]
        with torch.no_grad():
            points = qam_gym.sample_memoryless(policy.velocity, base, states, torch.randn(len(states), policy.action_size), K)
        adjoint, _, _ = qam_gym.lean_adjoint(base, run.critic, states, points, inv_temp)
        losses = qam_gym.adjoint_losses(policy.velocity, base, states, points, adjoint)
        for k in range(K):
            gradients = torch.autograd.grad(losses[k], parameters, retain_graph=k < K - 1)
            result[0, k] += torch.stack(torch._foreach_norm(gradients)).norm() / args.batches
    return result


def main(args: Args):
    torch.set_num_threads(1)
    run = load_run(args.run)
    early = load_run(args.early) if args.early else run
    stages = {"base policy": (run.base, early.critic), "end of the run": (run.policy, run.critic)}
    measured = {
        (run.name, stage, loss): norms(policy, critic, run, loss, args) for stage, (policy, critic) in stages.items() for loss in ("literal", "authors")
    }
    if args.qam:
        qam = load_run(args.qam, critic_key="target")
        inv_temp = json.loads((args.qam / "args.json").read_text())["inv_temp"]
        for stage, policy in zip(stages, (qam.base, qam.policy), strict=True):
            measured[qam.name, stage, "adjoint"] = qam_norms(policy, qam, inv_temp, args)
    rows = []
    for (name, stage, loss), terms in measured.items():
        for term, values in zip(("total", "transport"), terms, strict=False):
            share = values / values.sum()
            rows += [{"run": name, "stage": stage, "loss": loss, "term": term, "k": k, "norm": values[k].item(), "share": share[k].item()}
                     for k in range(len(values))]  # fmt: skip
            print(f"{stage:15} {loss:8} {term:10} sum {values.sum():9.4g}, shares {' '.join(f'{x:.3f}' for x in share.tolist())}")
    write_csv(args.out, rows)
    plot_gradient_norms(pyplot(), rows, args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
