"""Density transport on a bandit with two modes, as a picture.

    python -m benchmark.bandit                          # writes docs/images/bandit.png

A flow policy over two-dimensional actions is pretrained on a broad distribution, then finetuned by
rldt_gym.update_actor toward exp(Q / alpha) of an analytic Q with two peaks of different height.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import rldt_gym
from benchmark.tools import IMAGES, pyplot, save_figure
from common.flow import FlowPolicy, flow_matching_loss
from common.svgd import transport_field

MODES = torch.tensor([[-0.55, 0.25], [0.55, -0.1]])
HEIGHTS = torch.tensor([0.8, 1.0])
WIDTH = 0.32
XLIM, YLIM = (-1.3, 1.2), (-0.75, 0.9)


@dataclass
class Args:
    steps: int = 800  # of the actor; the middle panel shows the policy after a quarter of them
    n_particles: int = 16  # P, particles per state
    alpha: float = 0.05  # temperature: weight of the repulsion
    constraint_weight: float = 0.2  # toward the policy of up to 20 steps ago
    seed: int = 1
    out: Path = IMAGES / "bandit.png"  # figure to write


def q_value(action: torch.Tensor) -> torch.Tensor:
    """Q of actions (..., 2): height * exp(-distance^2 / (2 width^2)), summed over the modes."""
    distance2 = (action[..., None, :] - MODES).square().sum(-1)
    return (HEIGHTS * torch.exp(-distance2 / (2 * WIDTH**2))).sum(-1)


def pretrain() -> FlowPolicy:
    """A base policy whose samples are a broad Gaussian over both modes."""
    policy = FlowPolicy(obs_dim=1, action_dim=2, chunk=1, euler_steps=8, width=128)
    optimizer = torch.optim.Adam(policy.velocity.parameters(), 1e-3)
    for _ in range(1500):
        action = torch.randn(512, 2) * torch.tensor([0.55, 0.3]) + torch.tensor([0.0, 0.1])
        loss = flow_matching_loss(policy.velocity, action, torch.zeros(512, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def finetune(policy: FlowPolicy, args: Args, steps: int):
    """Actor steps of RLDT on the bandit; with the policy of a few steps ago as reference."""
    cfg = rldt_gym.Args(device="cpu", zero_fraction=0.0, n_particles=args.n_particles)
    cfg.alpha, cfg.constraint_weight = args.alpha, args.constraint_weight
    cfg.transport_loss, cfg.gradient_norm = "literal", 0.0  # eq. (13); the other form ends in one mode

    def critic(obs, action):  # -> (2, B), as of two networks
        return q_value(action.float()).expand(2, -1)

    state = torch.zeros(64, 1)  # one state, 64 independent sets of particles
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.velocity.parameters(), 1e-4)
    for step in range(steps):
        if step % 20 == 0:
            reference.load_state_dict(policy.state_dict())
        rldt_gym.update_actor(policy, reference, critic, optimizer, state, cfg)


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
    places = torch.arange(*XLIM, 0.17), torch.arange(*YLIM, 0.17)
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), -1).flatten(0, 1) + 0.085
    grid = grid[torch.cdist(grid, actions).sort(-1).values[:, 3] < 0.17]
    phi = field(actions, grid, args) * scale
    look = dict(width=0.005, headwidth=4.2, headlength=4.5, headaxislength=4, color="black")
    axis.quiver(*grid.T, *phi.T, angles="xy", scale_units="xy", scale=1, pivot="mid", zorder=3, **look)
    near = torch.cdist(actions, MODES) < 1.5 * WIDTH  # (n, 2)
    shares = near.float().mean(0).tolist()
    for (place, _), height, share in zip(MODES.tolist(), HEIGHTS.tolist(), shares, strict=True):
        axis.text(place, YLIM[0] + 0.05, f"peak {height:.1f}: {share:.0%}", ha="center", zorder=4)
    axis.set(xticks=[], yticks=[], xlim=XLIM, ylim=YLIM, aspect="equal")
    axis.set_title(f"{title}: mean Q {q_value(actions).mean():.2f}")
    axis.spines[:].set_visible(False)


def main(args: Args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    policy, snapshots, done = pretrain(), {}, 0
    for step in (0, args.steps // 4, args.steps):
        finetune(policy, args, step - done)
        done = step
        title = f"after {step} steps" if step else "pretrained"
        snapshots[title] = policy.sample(torch.zeros(600, 1))
    plt = pyplot()
    figure, axes = plt.subplots(1, len(snapshots), figsize=(11, 3.1))
    longest = field(snapshots["pretrained"], snapshots["pretrained"], args).norm(dim=-1).quantile(0.95)
    for axis, (title, actions) in zip(axes, snapshots.items(), strict=True):
        axis.grid(False)
        draw(axis, actions, title, 0.2 / longest.item(), args)
        print(f"{title}: mean Q {q_value(actions).mean():.3f}")
    caption = "Contours: Q(a).  Dots: actions, with the share near each peak.  Arrows: transport field."
    figure.supxlabel(caption, fontsize=10, color="#444444")
    save_figure(figure, args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
