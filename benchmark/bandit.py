"""Density transport on a bandit with two modes, as a picture.

    python -m benchmark.bandit                          # writes docs/images/bandit.png

A flow policy over two-dimensional actions is pretrained on a broad distribution, then finetuned by
rldt_gym.update_actor toward exp(Q / alpha) of an analytic Q with two peaks of different height.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

import rldt_gym
from benchmark.tools import IMAGES, pyplot, save_figure
from common.flow import VelocityMLP, flow_matching_loss, sample
from common.svgd import transport_field

MODES = torch.tensor([[-0.55, 0.25], [0.55, -0.1]])
HEIGHTS = torch.tensor([0.8, 1.0])
WIDTH = 0.32
XLIM, YLIM = (-1.3, 1.2), (-0.75, 0.9)


@dataclass
class Args:
    steps: int = 800
    """Actor steps; the middle panel shows the policy after a quarter of them."""
    pretrain_steps: int = 1500
    """Flow-matching steps of the base policy."""
    states: int = 64
    """States per actor step; all are the same, so this is a batch of independent sets of particles."""
    n_particles: int = 16
    """P, particles per state."""
    alpha: float = 0.05
    """Temperature: weight of the repulsion."""
    constraint_weight: float = 0.2
    """Weight of the constraint toward the policy of `reference_every` steps ago."""
    reference_every: int = 20
    """Actor steps after which the reference policy is renewed."""
    lr: float = 1e-4
    """Adam step size of the actor."""
    samples: int = 600
    """Samples drawn for the figure."""
    seed: int = 1
    """Seed."""
    out: Path = IMAGES / "bandit.png"
    """Figure to write."""


class TwoModes(nn.Module):
    """Q(a): two bumps, in place of the two critics."""

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """action (B, 2) -> Q (2, B)."""
        return q_value(action.float()).expand(2, -1)


def q_value(action: torch.Tensor) -> torch.Tensor:
    """Q of actions (..., 2): height * exp(-distance^2 / (2 width^2)), summed over the modes."""
    distance2 = (action[..., None, :] - MODES).square().sum(-1)
    return (HEIGHTS * torch.exp(-distance2 / (2 * WIDTH**2))).sum(-1)


def pretrain(args: Args) -> VelocityMLP:
    """A base policy whose samples are a broad Gaussian over both modes."""
    velocity = VelocityMLP(2, 1, width=128)
    optimizer = torch.optim.Adam(velocity.parameters(), 1e-3)
    for _ in range(args.pretrain_steps):
        action = torch.randn(512, 2) * torch.tensor([0.55, 0.3]) + torch.tensor([0.0, 0.1])
        loss = flow_matching_loss(velocity, action, torch.zeros(512, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return velocity


def finetune(velocity: VelocityMLP, args: Args, steps: int):
    """Actor steps of RLDT on the bandit; with the policy of a few steps ago as reference."""
    cfg = rldt_gym.Args(device="cpu", n_particles=args.n_particles, alpha=args.alpha, bf16=False,
                        constraint_weight=args.constraint_weight)  # fmt: skip
    critic, state = TwoModes(), torch.zeros(args.states, 1)
    reference = VelocityMLP(2, 1, width=128).requires_grad_(False)
    optimizer = torch.optim.Adam(velocity.parameters(), args.lr)
    for step in range(steps):
        if step % args.reference_every == 0:
            reference.load_state_dict(velocity.state_dict())
        cond = state[:, None].expand(-1, args.n_particles, -1)
        noise = torch.randn(args.states, args.n_particles, 2)
        trajectory = sample(velocity, cond, noise, cfg.euler_steps, trajectory=True)
        rldt_gym.update_actor(velocity, reference, critic, optimizer, state, trajectory, cfg)


def field(actions: torch.Tensor, points: torch.Tensor, args: Args) -> torch.Tensor:
    """phi (n, 2) at points (n, 2), with the policy's samples as particles."""
    particles = actions.clone().requires_grad_()
    (grad_q,) = torch.autograd.grad(q_value(particles).sum(), particles)
    return transport_field(points[None], actions[None], grad_q[None], args.alpha, "rbf")[0]


def draw(axis, actions: torch.Tensor, title: str, scale: float, args: Args):
    """Contours of Q, samples of the policy, and the transport field where the policy has samples."""
    x, y = torch.meshgrid(torch.linspace(*XLIM, 260), torch.linspace(*YLIM, 170), indexing="xy")
    q = q_value(torch.stack([x, y], -1))
    axis.contourf(x, y, q, np.linspace(0, 1.05, 22), cmap="YlOrBr", alpha=0.8, vmax=1.3)
    axis.contour(x, y, q, np.linspace(0.1, 1, 10), colors="white", linewidths=0.5)
    axis.scatter(*actions.T, s=8, color="#08519c", alpha=0.6, linewidths=0, zorder=2)
    grid = torch.stack(torch.meshgrid(torch.arange(*XLIM, 0.17), torch.arange(*YLIM, 0.17), indexing="xy"), -1)
    grid = grid.flatten(0, 1) + 0.085
    grid = grid[torch.cdist(grid, actions).sort(-1).values[:, 3] < 0.17]
    phi = field(actions, grid, args) * scale
    axis.quiver(*grid.T, *phi.T, angles="xy", scale_units="xy", scale=1, pivot="mid", width=0.005,
                headwidth=4.2, headlength=4.5, headaxislength=4, color="black", zorder=3)  # fmt: skip
    near = torch.cdist(actions, MODES) < 1.5 * WIDTH  # (n, 2)
    for (place, _), height, share in zip(MODES.tolist(), HEIGHTS.tolist(), near.float().mean(0).tolist(), strict=True):
        axis.text(place, YLIM[0] + 0.05, f"peak {height:.1f}: {share:.0%}", ha="center", zorder=4)
    axis.set(xticks=[], yticks=[], xlim=XLIM, ylim=YLIM, aspect="equal")
    axis.set_title(f"{title}: mean Q {q_value(actions).mean():.2f}")
    axis.spines[:].set_visible(False)


def main(args: Args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    velocity = pretrain(args)
    snapshots, done = [], 0
    for step in (0, args.steps // 4, args.steps):
        finetune(velocity, args, step - done)
        done = step
        title = f"after {step} steps" if step else "pretrained"
        snapshots.append((title, sample(velocity, torch.zeros(args.samples, 1), torch.randn(args.samples, 2), 8)))
    plt = pyplot()
    figure, axes = plt.subplots(1, len(snapshots), figsize=(11, 3.1))
    longest = field(snapshots[0][1], snapshots[0][1], args).norm(dim=-1).quantile(0.95).item()
    for axis, (title, actions) in zip(axes, snapshots, strict=True):
        axis.grid(False)
        draw(axis, actions, title, 0.2 / longest, args)
        print(f"{title}: mean Q {q_value(actions).mean():.3f}")
    caption = "Contours: Q(a).  Dots: actions of the policy, with the share near each peak.  Arrows: transport field."
    figure.supxlabel(caption, fontsize=10, color="#444444")
    save_figure(figure, args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
