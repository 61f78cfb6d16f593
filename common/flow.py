"""Flow-matching policy: velocity network, pretraining, Euler sampler, expected target, file."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoints import identity, load_parts, read_tensors, save_parts, write_tensors
from common.runs import autocast


def time_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017) of t in [0, 1]: (...) -> (..., dim), dim even."""
    index = torch.arange(dim // 2, device=t.device)
    frequency = 100 * torch.exp(index * (-math.log(10000) / (dim // 2 - 1)))
    angle = t[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class ResidualBlock(nn.Module):
    """x + W2 act(W1 act(x)), each activation optionally after a LayerNorm."""

    def __init__(self, width: int, activation: type[nn.Module], layer_norm: bool):
        super().__init__()
        layers = []
        for _ in range(2):
            norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
            layers += [norm, activation(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class VelocityMLP(nn.Module):
    """Velocity v_theta(x, t, s) of a flow-matching policy, a residual MLP as in DPPO (Ren et al. 2024).

    action_size is D, the size of a flattened action chunk, and cond_dim that of s. depth counts hidden
    layers, two in each residual block. cond_mlp has the sizes of an MLP through which s goes first.
    """

    def __init__(self, action_size: int, cond_dim: int, width=512, depth=3, time_dim=16,
                 activation=nn.ReLU, layer_norm=False, cond_mlp: Sequence[int] = ()):  # fmt: skip
        super().__init__()
        if depth < 3 or depth % 2 == 0:
            raise ValueError(f"depth must be odd and at least 3 (blocks have two layers), got {depth}")
        self.time_dim = time_dim
        widen, narrow = nn.Linear(time_dim, 2 * time_dim), nn.Linear(2 * time_dim, time_dim)
        self.time_mlp = nn.Sequential(widen, nn.Mish(), narrow)
        layers, size = [], cond_dim
        for hidden in cond_mlp:
            layers += [nn.Linear(size, hidden), activation()]
            size = hidden
        self.cond_mlp = nn.Sequential(*layers[:-1])  # no activation after its last layer
        layers = [nn.Linear(action_size + time_dim + size, width)]
        layers += [ResidualBlock(width, activation, layer_norm) for _ in range((depth - 1) // 2)]
        self.trunk = nn.Sequential(*layers, nn.Linear(width, action_size))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """x (..., D), t (...), cond (..., cond_dim) -> velocity (..., D); t and cond broadcast to x."""
        dtype = self.trunk[0].weight.dtype
        time = self.time_mlp(time_embedding(t, self.time_dim).to(dtype))
        seen = [part.expand(*x.shape[:-1], -1) for part in (time, self.cond_mlp(cond.to(dtype)))]
        return self.trunk(torch.cat([x.to(dtype), *seen], -1)).to(x.dtype)


def interpolate(action: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The straight path x_t = (1 - t) noise + t action, eq. (1); t (...) for actions (..., D)."""
    return (1 - t[..., None]) * noise + t[..., None] * action


def flow_matching_loss(velocity: Callable, action: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Mean over batch and dimensions of |v(x_t, t, s) - (a - eps)|^2, t uniform, eps normal, eq. (2)."""
    noise = torch.randn_like(action)
    t = torch.rand(action.shape[:-1], device=action.device)
    return F.mse_loss(velocity(interpolate(action, noise, t), t, cond), action - noise)


def fit(network: nn.Module, loss, steps: int, lr: float, args, checkpoint: Path | None = None):
    """AdamW on `loss()`, steps falling to a tenth; gives averaged weights. Goes on from `checkpoint`."""
    averaged, progress = copy.deepcopy(network), dict(done=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 10)
    belongs_to = identity(args) | dict(steps=steps, lr=lr)
    parts = dict(progress=progress, network=network, averaged=averaged)
    parts |= dict(optimizer=optimizer, schedule=schedule)
    if checkpoint and checkpoint.exists():
        load_parts(checkpoint, belongs_to, parts, args.device)
    for step in tqdm(range(progress["done"], steps), desc="pretraining", mininterval=1):
        with autocast(args):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            rate = max(0.005, 1 / (step + 1))  # at first the plain mean: none of the random start stays
            torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), rate)
        progress["done"] = step + 1
        if checkpoint and (step + 1) % 500 == 0:
            save_parts(checkpoint, belongs_to, parts)
    return averaged


@torch.no_grad()
def sample(velocity: Callable, cond: torch.Tensor, x0: torch.Tensor, steps: int, trajectory=False):
    """x_{k+1} = x_k + v(x_k, k/K, s) / K from x0 (..., D): the action, or all points (K + 1, ..., D)."""
    points = [x0]
    for k in range(steps):
        t = torch.full((), k / steps, device=x0.device)
        points.append(points[-1] + velocity(points[-1], t, cond) / steps)
    return torch.stack(points) if trajectory else points[-1]


def expected_target(x: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Where the straight path through x at time t ends: a_dagger = x + (1 - t) v, eq. (8); t (...)."""
    return x + (1 - t[..., None]) * v


class FlowPolicy(nn.Module):
    """A velocity network with the scaling of its demonstrations, which stays as it is after pretraining.

    chunk is the number of actions per decision, euler_steps K, the steps from noise to action. The
    velocity may see `feature_dim` features besides the observation; `network` is VelocityMLP's.
    """

    def __init__(self, obs_dim, action_dim, chunk, euler_steps, feature_dim=0, **network):
        super().__init__()
        sizes = dict(obs_dim=obs_dim, action_dim=action_dim, chunk=chunk, euler_steps=euler_steps)
        self.config, self.info = sizes | network, {}
        self.obs_dim, self.action_dim, self.chunk, self.euler_steps = sizes.values()
        self.action_size, self.cond_dim = chunk * action_dim, obs_dim + feature_dim
        self.velocity = VelocityMLP(self.action_size, self.cond_dim, **network)
        for name, dim in ("obs", obs_dim), ("action", action_dim):
            self.register_buffer(f"{name}_min", -torch.ones(dim))
            self.register_buffer(f"{name}_max", torch.ones(dim))

    def set_limits(self, **limits):
        """Sets obs_min, obs_max, action_min, action_max and the like, which become -1 and 1."""
        for name, value in limits.items():
            getattr(self, name).copy_(torch.as_tensor(value))

    def normalize(self, obs, name="obs") -> torch.Tensor:
        """Raw observations (..., obs_dim), or others that have limits -> about [-1, 1], at most +-5."""
        low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
        obs = torch.as_tensor(obs, dtype=torch.float32, device=low.device)
        return (2 * (obs - low) / (high - low + 1e-6) - 1).clamp(-5, 5)

    def from_env(self, action) -> torch.Tensor:
        """Raw actions (N, chunk, action_dim) -> flat normalised chunks (N, D)."""
        action = torch.as_tensor(action, device=self.action_min.device)
        scale = self.action_max - self.action_min + 1e-6
        return (2 * (action - self.action_min) / scale - 1).flatten(1)

    def to_env(self, action: torch.Tensor) -> np.ndarray:
        """Flat normalised chunks (N, D) -> raw actions (N, chunk, action_dim)."""
        action = action.float().view(len(action), self.chunk, -1)
        scale = self.action_max - self.action_min + 1e-6
        return ((action + 1) / 2 * scale + self.action_min).cpu().numpy()

    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None, trajectory=False):
        """Action chunks (..., D) for cond (..., cond_dim), from x0 or from noise; see `sample` above."""
        if x0 is None:
            x0 = torch.randn(*cond.shape[:-1], self.action_size, device=cond.device)
        return sample(self.velocity, cond, x0, self.euler_steps, trajectory)

    @torch.no_grad()
    def distance(self, other: "FlowPolicy", cond: torch.Tensor) -> torch.Tensor:
        """Mean distance of the two velocities at x_0 ~ N(0, I), t = 0, for cond (B, cond_dim)."""
        x0, t = torch.randn(len(cond), self.action_size, device=cond.device), cond.new_zeros(())
        return (self.velocity(x0, t, cond) - other.velocity(x0, t, cond)).norm(dim=-1).mean()

    def save(self, path: Path, **info):
        """Writes weights and scaling as safetensors, with the sizes and what else is to be known."""
        texts = {"config": json.dumps(self.config), "info": json.dumps(info)}
        write_tensors(path, self.state_dict(), texts)

    @classmethod
    def load(cls, path: Path, **expected) -> "FlowPolicy":
        """Reads what `save` wrote. Raises SystemExit on any other file, or where its info is another."""
        try:
            tensors, texts = read_tensors(path)
            policy = cls(**json.loads(texts["config"]))
            policy.load_state_dict({key: value.float() for key, value in tensors.items()})
            policy.info = json.loads(texts["info"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(f"{path}: not a policy written by this project ({reason})") from error
        for key, value in expected.items():
            if policy.info.get(key, value) != value:
                raise SystemExit(f"{path}: its {key} is {policy.info[key]}, not {value}")
        return policy
