"""common/flow.py: velocity network, flow matching, sampler, pretraining loop and policy."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import rldt_gym
from common.checkpoints import read_checked, read_tensors, write_checked, write_tensors
from common.flow import (
    FlowPolicy,
    VelocityMLP,
    fit,
    flow_matching_loss,
    sample,
    time_embedding,
)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_trajectory_holds_the_euler_steps_from_the_start_to_the_action(steps):
    velocity = VelocityMLP(3, 4, width=8)
    x0, cond = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    points = sample(velocity, cond, x0, steps, trajectory=True)
    assert points.shape == (steps + 1, 5, 2, 3)
    assert torch.equal(points[0], x0)
    assert torch.equal(points[-1], sample(velocity, cond, x0, steps))
    for k in range(steps):  # with the velocity at the start of each
        v = velocity(points[k], torch.tensor(k / steps), cond)
        torch.testing.assert_close(points[k + 1], points[k] + v / steps)
    assert not points.requires_grad


def test_flow_matching_loss_is_the_mean_square_at_uniform_times():
    seen = []
    zero = lambda x, t, cond: seen.append(t) or torch.zeros_like(x)
    loss = flow_matching_loss(zero, torch.full((200_000, 2), 2.0), torch.zeros(200_000, 0))
    assert loss.item() == pytest.approx(5.0, abs=0.05)  # E|a - eps|^2 per dimension = |a|^2 + 1
    assert seen[0].shape == (200_000,)
    histogram = torch.histc(seen[0], 10, 0, 1) / 20_000
    assert (histogram - 1).abs().max() < 0.035  # 5 standard errors


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Mish])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("cond_mlp", [(), (7,), (9, 6)])
def test_every_weight_of_every_velocity_network_has_a_gradient(activation, layer_norm, cond_mlp):
    velocity = VelocityMLP(3, 5, 8, 5, 4, activation, layer_norm, cond_mlp)
    x, cond = torch.randn(6, 2, 3), torch.randn(6, 2, 5)
    out = velocity(x, torch.full((6, 2), 0.3), cond)
    torch.testing.assert_close(velocity(x, torch.tensor(0.3), cond), out)  # one time for all
    assert out.shape == (6, 2, 3)
    out.square().sum().backward()
    for name, parameter in velocity.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert any(isinstance(m, torch.nn.LayerNorm) for m in velocity.modules()) == layer_norm


def test_velocity_network_is_the_published_one():
    velocity = VelocityMLP(3, 5, width=8, depth=3, time_dim=4, cond_mlp=(7, 6))
    x, t, cond = torch.randn(6, 3), torch.rand(6), torch.randn(6, 5)
    time = velocity.time_mlp(time_embedding(t, 4))
    first, block, last = velocity.trunk
    cond_first, _, cond_last = velocity.cond_mlp
    hidden = first(torch.cat([x, time, cond_last(F.relu(cond_first(cond)))], -1))
    hidden = hidden + block.layers[5](F.relu(block.layers[2](F.relu(hidden))))
    torch.testing.assert_close(velocity(x, t, cond), last(hidden))


def test_depth_counts_the_hidden_layers():
    for depth in 3, 5, 7:
        trunk = VelocityMLP(2, 2, width=8, depth=depth).trunk
        assert sum(isinstance(m, torch.nn.Linear) for m in trunk.modules()) == depth + 1
    for depth in 1, 4:
        with pytest.raises(ValueError, match=f"odd and at least 3.*{depth}"):
            VelocityMLP(2, 2, depth=depth)


def fitted(checkpoint=None, stop=None, lr=1e-2, **settings):
    """1200 steps on a small network: its weights before each step and after them, and their average."""
    torch.manual_seed(5)
    net, weights = torch.nn.Linear(3, 2), []

    def loss():
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        if len(weights) == stop:
            raise KeyboardInterrupt
        return net(torch.randn(4, 3)).sum()

    args = rldt_gym.Args(device="cpu", precision="float32", **settings)
    averaged = fit(net, loss, 1200, lr, args, checkpoint)
    loss()
    return weights, torch.cat([p.detach().flatten() for p in averaged.parameters()])


def test_fit_averages_the_weights_of_steps_that_shrink_to_a_tenth():
    weights, averaged = fitted()
    expected = weights[0]
    for i, value in enumerate(weights[1:], 1):  # the mean of the first 200, then a moving average
        expected = expected + max(0.005, 1 / i) * (value - expected)
    torch.testing.assert_close(averaged, expected)
    bias = torch.stack(weights)[:, -1]  # its gradient is constant: Adam's steps are the step sizes
    k = torch.arange(1200)
    sizes = 1e-2 * (0.1 + 0.9 * (1 + torch.cos(torch.pi * k / 1200)) / 2)
    torch.testing.assert_close(bias[:-1] - bias[1:], sizes, rtol=1e-2, atol=1e-6)


def test_fit_that_was_killed_goes_on_to_the_same_weights(tmp_path):
    weights, averaged = fitted()
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "new" / "fit.pt", stop=1150)
    for name, value in ("lr", 2e-2), ("env_id", "Ant-v4"):
        with pytest.raises(SystemExit, match=rf"fit\.pt: cannot be resumed .*another {name}"):
            fitted(tmp_path / "new" / "fit.pt", **{name: value})
    later_weights, later = fitted(tmp_path / "new" / "fit.pt")
    assert len(later_weights) == 201  # from step 1000 on
    assert torch.equal(later_weights[-1], weights[-1]) and torch.equal(later, averaged)


# ---------------------------------------------------------------------------------- FlowPolicy
def scaled_policy():
    policy = FlowPolicy(2, 2, chunk=3, euler_steps=4, width=8, depth=3, time_dim=4)
    limits = dict(obs_min=[-2.0, 0], obs_max=[4.0, 10], action_min=[-0.5, -1], action_max=[0.5, 3])
    policy.set_limits(**limits)
    return policy


def test_limits_of_observations_and_actions_become_minus_one_and_one():
    policy = scaled_policy()
    obs = policy.normalize(np.array([[-2, 0], [4, 10], [1, 5], [-99, 99]]))
    expected = torch.tensor([[-1.0, -1], [1, 1], [0, 0], [-5, 5]])  # at most +-5
    torch.testing.assert_close(obs, expected, atol=1e-6, rtol=0)
    raw = np.array([[[-0.5, -1], [0.5, 3], [0, 1]]], np.float32)  # a chunk of three actions
    flat = policy.from_env(raw)
    torch.testing.assert_close(flat, torch.tensor([[-1.0, -1, 1, 1, 0, 0]]), atol=3e-6, rtol=0)
    np.testing.assert_allclose(policy.to_env(flat), raw, atol=1e-6)


def test_policy_samples_from_noise_unless_a_start_is_given():
    policy, cond = scaled_policy(), torch.randn(5, 2)
    torch.manual_seed(3)
    x0 = torch.randn(5, 6)
    torch.manual_seed(3)
    assert torch.equal(policy.sample(cond), policy.sample(cond, x0))
    assert torch.equal(policy.sample(cond, x0), sample(policy.velocity, cond, x0, 4))
    assert policy.sample(cond, x0, trajectory=True).shape == (5, 5, 6)


def test_distance_of_two_policies_is_that_of_their_velocities():
    policy, other = scaled_policy(), scaled_policy()
    other.load_state_dict(policy.state_dict())
    assert policy.distance(other, torch.randn(5, 2)) == 0
    with torch.no_grad():
        other.velocity.trunk[-1].bias[1] += 3
        other.velocity.trunk[-1].bias[4] -= 4
    assert policy.distance(other, torch.randn(5, 2)).item() == pytest.approx(5)


def test_saved_policy_comes_back_with_its_scaling_sizes_and_info(tmp_path):
    policy, cond = scaled_policy(), torch.randn(5, 2)
    policy.save(tmp_path / "new" / "a.safetensors", task="some", loss=0.25)
    loaded = FlowPolicy.load(tmp_path / "new" / "a.safetensors", task="some", script="rldt_gym")
    assert loaded.config == policy.config
    assert loaded.info == dict(task="some", loss=0.25)
    assert torch.equal(loaded.sample(cond, torch.zeros(5, 6)), policy.sample(cond, torch.zeros(5, 6)))
    for name in "obs_min", "obs_max", "action_min", "action_max":
        assert torch.equal(getattr(loaded, name), getattr(policy, name))
    with pytest.raises(SystemExit, match="its task is some, not another"):
        FlowPolicy.load(tmp_path / "new" / "a.safetensors", task="another")


def test_a_policy_whose_writing_is_cut_short_is_no_file(tmp_path, monkeypatch):
    half = lambda state, path, **_: path.write_bytes(b"half") / 0
    monkeypatch.setattr("common.checkpoints.save_file", half)
    with pytest.raises(ZeroDivisionError):
        scaled_policy().save(tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def rewrite(path, config):
    tensors, texts = read_tensors(path)
    write_tensors(path, tensors, texts | {"config": config})


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"garbage that is no safetensors file"),
    lambda path: path.write_bytes(path.read_bytes()[:2000]),
    lambda path: path.unlink(),
    lambda path: save_file({"w": torch.zeros(2)}, path),
    lambda path: rewrite(path, "{"),
    lambda path: rewrite(path, "[]"),
    lambda path: rewrite(path, json.dumps(scaled_policy().config | {"width": 16})),
    lambda path: rewrite(path, json.dumps(scaled_policy().config | {"depth": 4})),
], ids="empty garbage half missing foreign broken list size depth".split())  # fmt: skip
def test_damaged_policy_stops_with_its_name_in_one_line(tmp_path, damage):
    path = tmp_path / "mine.safetensors"
    scaled_policy().save(path)
    damage(path)
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a policy") as stop:
        FlowPolicy.load(path)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("kind", ["policy", "checkpoint"])
def test_no_flipped_byte_goes_unnoticed(tmp_path, kind):
    rng, path = random.Random(0), tmp_path / "file"
    read = FlowPolicy.load if kind == "policy" else lambda path: read_checked(path, {"a": "b"}, "cpu")
    if kind == "policy":
        scaled_policy().save(path, env_id="Hopper-v4")
    else:
        write_checked(path, dict(belongs_to={"a": "b"}, x=torch.arange(9.0)))
    read(path)
    data = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises((SystemExit, ValueError), match=r"not a policy|its bytes are damaged"):
            read(path)
