"""Flow-matching policy: velocity network, loss, Euler sampler and expected target."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS = {"relu": nn.ReLU, "mish": nn.Mish, "silu": nn.SiLU, "gelu": nn.GELU}


def time_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017) of t in [0, 1]: (...) -> (..., dim), dim even."""
    frequency = 100 * torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / (dim // 2 - 1)))
    angle = t[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class ResidualBlock(nn.Module):
    """x + W2 act(W1 act(x)), each activation optionally after a LayerNorm."""

    def __init__(self, width: int, activation: str, layer_norm: bool):
        super().__init__()
        norm = lambda: nn.LayerNorm(width) if layer_norm else nn.Identity()
        act = ACTIVATIONS[activation]
        self.layers = nn.Sequential(norm(), act(), nn.Linear(width, width), norm(), act(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class VelocityMLP(nn.Module):
    """Velocity v_theta(x, t, s) of a flow-matching policy, a residual MLP as in DPPO (Ren et al. 2024).

    Args:
        action_size: D, the size of a flattened action chunk.
        cond_dim: size of the conditioning vector s.
        width, depth: hidden width, and number of hidden layers; depth 3 is one residual block.
        time_dim: size of the time embedding.
        activation: relu, mish, silu or gelu.
        layer_norm: LayerNorm inside the residual blocks.
        cond_mlp: sizes of an MLP through which s goes first, or () for none.
    """

    def __init__(
        self,
        action_size: int,
        cond_dim: int,
        width: int = 512,
        depth: int = 3,
        time_dim: int = 16,
        activation: str = "relu",
        layer_norm: bool = False,
        cond_mlp: Sequence[int] = (),
    ):
        super().__init__()
        if depth < 3 or depth % 2 == 0:
            raise ValueError(f"depth must be odd and at least 3 (blocks have two layers), got {depth}")
        self.config = dict(action_size=action_size, cond_dim=cond_dim, width=width, depth=depth, time_dim=time_dim,
                           activation=activation, layer_norm=layer_norm, cond_mlp=tuple(cond_mlp))  # fmt: skip
        self.action_size, self.time_dim = action_size, time_dim
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim))
        layers, size = [], cond_dim
        for hidden in cond_mlp:
            layers += [nn.Linear(size, hidden), ACTIVATIONS[activation]()]
            size = hidden
        self.cond_mlp = nn.Sequential(*layers[:-1])  # no activation after its last layer
        self.trunk = nn.Sequential(
            nn.Linear(action_size + time_dim + size, width),
            *[ResidualBlock(width, activation, layer_norm) for _ in range((depth - 1) // 2)],
            nn.Linear(width, action_size),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """x (..., D), t (...) or one number for all, cond (..., cond_dim) -> velocity (..., D)."""
        dtype = self.trunk[0].weight.dtype
        time = self.time_mlp(time_embedding(t, self.time_dim).to(dtype)).expand(*x.shape[:-1], -1)
        cond = self.cond_mlp(cond.to(dtype))
        return self.trunk(torch.cat([x.to(dtype), time, cond], -1)).to(x.dtype)


Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def interpolate(action: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The straight path x_t = (1 - t) noise + t action, eq. (1); t (...) for actions (..., D)."""
    return (1 - t[..., None]) * noise + t[..., None] * action


def flow_matching_loss(velocity: Velocity, action: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Mean over batch and dimensions of |v(x_t, t, s) - (a - eps)|^2, t ~ U[0, 1], eps ~ N(0, I), eq. (2)."""
    noise = torch.randn_like(action)
    t = torch.rand(action.shape[:-1], device=action.device)
    return F.mse_loss(velocity(interpolate(action, noise, t), t, cond), action - noise)


@torch.no_grad()
def sample(velocity: Velocity, cond: torch.Tensor, x0: torch.Tensor, steps: int, trajectory: bool = False) -> torch.Tensor:
    """Euler integration x_{k+1} = x_k + v(x_k, k/K, s) / K from x0 (..., D) at t = 0 to the action at t = 1.

    Returns the action (..., D), or with `trajectory` all points x_0 .. x_K, (K + 1, ..., D).
    """
    x, points = x0, [x0]
    for k in range(steps):
        x = x + velocity(x, torch.full((), k / steps, device=x.device), cond) / steps
        if trajectory:
            points.append(x)
    return torch.stack(points) if trajectory else x


def expected_target(x: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Where the straight path through x at time t ends: a_dagger = x + (1 - t) v, eq. (8); t (...)."""
    return x + (1 - t[..., None]) * v
