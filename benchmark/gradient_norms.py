"""Which ODE steps the actor's gradient comes from (the paper's figure 4).

    python rldt_gym.py
    python -m baselines.qam
    python -m benchmark.gradient_norms RUN_DIR --qam QAM_RUN_DIR     # writes results/gradient_norms.csv

Measures the norm of the gradient of the actor loss, eq. (16), with every particle at the same step k,
for both transport losses, at the base policy and at the end of a run, with the run's last critic. States
come from its replay. `share` is the norm divided by the sum over k. The reference of the constraint is
the policy itself, so the constraint adds nothing. Of QAM it is the adjoint loss at step k.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rldt_gym
from baselines import qam as method
from baselines.families import settings_of
from benchmark.critic_diagnostics import Run, load_run
from benchmark.tools import RESULTS, write_csv
from common.flow import FlowPolicy


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # run directory of rldt_gym.py
    qam: Path | None = None  # run directory of baselines.qam to compare with
    batches: int = 16  # batches of actor_batch states over which the norm is averaged
    seed: int = 1  # of states and noise
    out: Path = RESULTS / "gradient_norms.csv"  # CSV to write


def norm(loss: torch.Tensor, policy: FlowPolicy) -> torch.Tensor:
    """Norm of a loss's gradient; the graph stays."""
    gradients = torch.autograd.grad(loss, list(policy.velocity.parameters()), retain_graph=True)
    return torch.stack(torch._foreach_norm(gradients)).norm()


def norms(policy: FlowPolicy, run: Run, transport_loss: str, args: Args) -> torch.Tensor:
    """Gradient norms of the total loss (K,), averaged over batches."""
    cfg = dataclasses.replace(run.args, transport_loss=transport_loss, precision="float32")
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    reference = copy.deepcopy(policy.velocity).requires_grad_(False)
    result = torch.zeros(policy.euler_steps)
    for _ in range(args.batches):
        states = run.states[torch.randint(len(run.states), (run.args.actor_batch,), generator=generator)]
        trajectory = policy.sample(states[:, None].expand(-1, cfg.n_particles, -1), trajectory=True)
        for k in range(policy.euler_steps):
            steps = torch.full((cfg.actor_batch, cfg.n_particles), k)
            networks = policy.velocity, reference, run.critic
            losses = rldt_gym.actor_losses(*networks, states, trajectory, cfg, run.unit, k=steps)
            transport, consistency, constraint, _ = losses
            total = transport + cfg.consistency_weight * consistency + cfg.constraint_weight * constraint
            result[k] += norm(total, policy) / args.batches
    return result


def qam_norms(policy: FlowPolicy, run: Run, inv_temp: float, args: Args) -> torch.Tensor:
    """Gradient norms of QAM's loss at each ODE step (K,), averaged over batches."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    base, K = copy.deepcopy(run.base.velocity).requires_grad_(False), policy.euler_steps
    result = torch.zeros(K)
    for _ in range(args.batches):
        states = run.states[torch.randint(len(run.states), (run.args.actor_batch,), generator=generator)]
        x0 = torch.randn(len(states), policy.action_size)
        with torch.no_grad():
            points = method.sample_memoryless(policy.velocity, base, states, x0, K)
        q_of = lambda action, seen=states: run.target(seen, action.clamp(-1, 1))
        adjoint, _, _ = method.lean_adjoint(base, q_of, states, points, inv_temp)
        losses = method.adjoint_losses(policy.velocity, base, states, points, adjoint)
        result += torch.stack([norm(loss, policy) for loss in losses]) / args.batches
    return result


def main(args: Args):
    torch.set_num_threads(1)
    run = load_run(args.run)
    measured = {}
    for stage, policy in {"base policy": run.base, "end of the run": run.policy}.items():
        for loss in ("literal", "authors"):
            measured[run.name, stage, loss] = norms(policy, run, loss, args)
    if args.qam:
        qam = load_run(args.qam, settings_of(method.Args, rldt_gym.CriticArgs))
        for stage, policy in {"base policy": qam.base, "end of the run": qam.policy}.items():
            measured[qam.name, stage, "adjoint"] = qam_norms(policy, qam, qam.args.inv_temp, args)
    rows = []
    for (name, stage, loss), values in measured.items():
        shares = values / values.sum()
        print(f"{stage:15} {loss:8}", " ".join(f"{share:.3f}" for share in shares))
        for k, (value, share) in enumerate(zip(values.tolist(), shares.tolist(), strict=True)):
            rows.append(dict(run=name, stage=stage, loss=loss, k=k, norm=value, share=share))
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
