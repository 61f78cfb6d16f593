"""Stein variational gradient descent (Liu and Wang 2016): the transport field of eq. (6)."""

import math

import torch


def rbf_kernel(query: torch.Tensor, particles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RBF kernel with one bandwidth per query point, by the median heuristic.

    kappa(x, a) = exp(-|x - a|^2 / (2 h)),  h_i = median_j |x_i - a_j|^2 / (2 log(P + 1)), at least 1e-8

    Args: query (B, M, D), particles (B, P, D).
    Returns: kappa (B, M, P) and h (B, M, 1), in squared units of the actions.
    """
    P = particles.shape[1]
    difference = query[:, :, None] - particles[:, None]  # (B, M, P, D)
    distance2 = difference.square().sum(-1)  # (B, M, P)
    ordered = distance2.detach().sort(-1).values
    median = 0.5 * (ordered[..., (P - 1) // 2] + ordered[..., P // 2])
    h = (median / (2 * math.log(P + 1))).clamp_min(1e-8)[..., None]  # (B, M, 1)
    return torch.exp(-distance2 / (2 * h)), h


def transport_field(
    query: torch.Tensor,
    particles: torch.Tensor,
    grad_q: torch.Tensor,
    alpha: float,
    kernel: str = "rbf",
) -> torch.Tensor:
    """The direction phi in which the action density at `query` moves toward exp(Q / alpha), eq. (6).

    rbf:   phi(x_i) = 1/P sum_j kappa(x_i, a_j) [ grad Q(a_j) + alpha' (x_i - a_j) / h_i ]
    delta: phi(x_i) = grad Q(x_i), so `particles` must be the query points themselves

    The repulsion is scaled to the critic, alpha' = alpha * mean_j |grad Q(a_j)|, one number per state.

    Args: query (B, M, D), particles (B, P, D), grad_q (B, P, D), the gradient of Q at the particles.
    Returns: phi (B, M, D), in units of Q per unit of action.
    Raises: ValueError on an unknown kernel or shapes that do not fit.
    """
    if particles.shape != grad_q.shape or query.shape[::2] != particles.shape[::2]:
        shapes = tuple(query.shape), tuple(particles.shape), tuple(grad_q.shape)
        raise ValueError("shapes of query {}, particles {} and grad_q {} do not fit".format(*shapes))
    if kernel == "delta":
        if query.shape != particles.shape:
            raise ValueError("the delta kernel needs the gradient of Q at the query points themselves")
        return grad_q
    if kernel != "rbf":
        raise ValueError(f"unknown kernel {kernel!r}: choose rbf or delta")
    kappa, h = rbf_kernel(query, particles)
    alpha = alpha * grad_q.norm(dim=-1).mean(1)[:, None, None]  # (B, 1, 1)
    attraction = kappa @ grad_q
    repulsion = (query * kappa.sum(-1, keepdim=True) - kappa @ particles) / h
    return (attraction + alpha * repulsion) / particles.shape[1]


def particle_gradient(q: torch.Tensor, particles: torch.Tensor) -> torch.Tensor:
    """A gradient of Q (B, P) at particles (B, P, D) without its derivative, (B, P, D).

    It points from each particle to the mean of its state's particles, weighted by exp(Q / tau), the
    weights of self-normalised importance sampling: so weighted, they stand for pi exp(Q / tau). tau is
    the root mean square, over states, of the deviation of Q over particles. Where Q hardly depends on
    the action, the weights are equal. Q is needed only where the policy already goes. Ours.
    """
    away = q - q.mean(-1, keepdim=True)
    weight = torch.softmax(away / (away.square().mean().sqrt() + 1e-8), -1)
    return (weight[..., None] * particles).sum(-2, keepdim=True) - particles
