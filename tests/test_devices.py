"""The update steps on every device of this machine against the same steps in float64 on the CPU."""

import copy

import pytest
import torch

import rldt_gym
from common.flow import VelocityMLP, sample
from common.svgd import particle_gradient

DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
K, B, P, D, OBS = 4, 16, 6, 5, 7


@pytest.fixture(params=DEVICES)
def device(request):
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = allowed


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.cpu().double() - expected).norm() / expected.norm()).item()


def networks():
    """Velocity, reference, critic, states and trajectories, in float64 on the CPU (critic: float32)."""
    velocity, reference = (VelocityMLP(D, OBS, 32, 3, 8).double() for _ in range(2))
    critic = rldt_gym.Critic(OBS, D, True, 32, 2)
    obs, x0 = torch.randn(B, OBS, dtype=torch.float64), torch.randn(B, P, D, dtype=torch.float64)
    trajectory = sample(velocity, obs[:, None].expand(-1, P, -1), x0, K, trajectory=True)
    return velocity, reference.requires_grad_(False), critic, obs, trajectory


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("form", ["authors", "literal"])
def test_actor_step_has_the_gradient_of_float64(device, kernel, form):
    *nets, obs, trajectory = networks()
    k, gradients = torch.randint(K, (B, P)), []
    for place, dtype in ("cpu", torch.float64), (device, torch.float32):
        velocity, reference, critic = (copy.deepcopy(net).to(place, dtype) for net in nets)
        settings = dict(precision="float32", device=place, kernel=kernel, transport_loss=form, alpha=0.3)
        if dtype == torch.float64:
            critic.forward = lambda s, a, net=critic: exact(net, s, a)
        inputs = obs.to(place, dtype), trajectory.to(place, dtype)
        nets_here, args = (velocity, reference, critic), rldt_gym.Args(**settings)
        losses = rldt_gym.actor_losses(*nets_here, *inputs, args, k=k.to(place))
        transport, consistency, constraint, _ = losses
        assert constraint > 0  # its times and noise are drawn on the device
        (transport + 0.5 * consistency).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in velocity.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def exact(critic, obs, action):
    """The critic's forward pass without its last layer's cast to float32."""
    x = torch.cat([obs, action], -1).expand(2, -1, -1)
    *hidden, (weight, bias) = zip(critic.weights, critic.biases, strict=True)
    for w, b in hidden:
        x = torch.nn.functional.silu(torch.nn.functional.layer_norm(x @ w + b, w.shape[-1:]))
    return (x @ weight + bias)[..., 0]


def test_critic_step_has_the_gradient_of_float64(device):
    *_, critic, obs, trajectory = networks()
    action, y = trajectory[-1, :, 0], torch.randn(B, dtype=torch.float64)
    expected = copy.deepcopy(critic).double()
    (exact(expected, obs, action) - y).square().mean(1).sum().backward()
    critic, args = critic.to(device), rldt_gym.Args(precision="float32", device=device)
    target, optimizer = copy.deepcopy(critic), torch.optim.SGD(critic.parameters(), 0.0)
    batch = (x.float().to(device) for x in (obs, action, y))
    rldt_gym.update_critic(critic, target, optimizer, *batch, args)
    for p, q in zip(critic.parameters(), expected.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-4


def test_particle_gradient_is_that_of_float64(device):
    q, particles = torch.randn(B, P, dtype=torch.float64), torch.randn(B, P, D, dtype=torch.float64)
    single = particle_gradient(q.float().to(device), particles.float().to(device))
    assert relative_error(single, particle_gradient(q, particles)) < 1e-5


def test_bfloat16_sampler_stays_near_float64(device):
    velocity, *_, obs, _ = networks()
    x0 = torch.randn(B, D, dtype=torch.float64)
    net = copy.deepcopy(velocity).float().to(device)
    with torch.no_grad(), rldt_gym.autocast(rldt_gym.Args(precision="bfloat16", device=device)):
        x = sample(net, obs.float().to(device), x0.float().to(device), K)
    assert 0 < relative_error(x, sample(velocity, obs, x0, K)) < 1e-2
