"""baselines/sac.py; needs Stable-Baselines3, see baselines/requirements.txt."""

import copy
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import assert_same, metrics, parse
from test_baselines import SMALL, TINY, arguments, weak_demonstrations  # noqa: F401

from baselines import families, sac
from common.flow import FlowPolicy
from demos import dataset
from envs.interface import Step


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "a.hdf5"
    return dataset.make(dataset.Args(steps=400, num_envs=8, out=out))


@pytest.fixture(scope="module")
def make_args(demonstrations):
    fields = TINY["sac"] | dict(dataset=demonstrations)
    return lambda runs, **changes: arguments(sac, **fields | dict(runs=runs) | changes)


@pytest.fixture(scope="module")
def finished(make_args, tmp_path_factory):
    """Directory and result of a complete tiny run; not to be written to."""
    runs = tmp_path_factory.mktemp("sac")
    handler = signal.getsignal(signal.SIGINT)
    result = sac.main(make_args(runs))
    signal.signal(signal.SIGINT, handler)
    return next(runs.iterdir()), result


def test_run_writes_what_a_run_of_rldt_writes(finished):
    run, result = finished
    rows = metrics(run)
    assert [row["eval_return"] != "" for row in rows] == [True, False, False, True, False, True]
    assert [row["losses/critic"] != "" for row in rows] == [False, False, True, False, True, False]
    assert result["env_steps"] == 3 * 4 * 12
    policy = sac.GaussianPolicy.load(run / "policy.safetensors")
    assert policy.info["script"] == "sac"
    with pytest.raises(SystemExit, match="not a policy"):
        FlowPolicy.load(run / "policy.safetensors")


@pytest.mark.parametrize("cloned", [False, True])
def test_run_killed_before_its_first_checkpoint_clones_as_it_would_have(finished, tmp_path, cloned):
    run = shutil.copytree(finished[0], tmp_path / "copy")
    for path in run.iterdir():
        if path.name != "args.json" and not (cloned and path.name == "base.safetensors"):
            path.unlink()
    sac.main(parse(sac, ["--resume", run]))
    assert_same(run, finished[0])


def test_actor_and_entropy_coefficient_stand_still_while_the_critics_are_trained_alone(make_args):
    args, during = make_args("runs"), []
    model = sac.make_sac(args, 11, 3)
    replay = families.rldt_gym.Replay(args, sac.GaussianPolicy(11, 3))
    for value in replay.next().values():
        value.normal_()
    model.replay_buffer = sac.Transitions(families.Gym, replay, 11)
    before, step = copy.deepcopy(model.policy.state_dict()), model.critic.optimizer.step
    model.critic.optimizer.step = lambda: (during.append(model.actor.mu.weight.clone()), step())
    for critic_only in True, False:
        logged = sac.update(model, 3, 8, critic_only)["diagnostics/entropy_coefficient"]
        assert (logged == pytest.approx(0.1, abs=1e-7)) == critic_only  # the mean over the steps
        after = model.policy.state_dict()
        moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
        assert "critic.qf0.0.weight" in moved
        assert ("actor.mu.weight" in moved) != critic_only
        assert (model.log_ent_coef.exp().item() == pytest.approx(0.1, abs=1e-7)) == critic_only
    assert all(torch.equal(weight, before["actor.mu.weight"]) for weight in during[:3])
    assert model.ent_coef_optimizer.state_dict()["state"][0]["step"] == 3


def test_cloned_actor_has_the_mean_and_the_spread_of_the_demonstrator():
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (4000, 3)).astype(np.float32)
    action = np.tanh(obs[:, :2] * 0.5 + 0.3 * rng.normal(size=(4000, 2))).astype(np.float32)
    action[:2] = [[-1, -1], [1, 1]]  # the scaling is the identity
    policy = sac.GaussianPolicy(3, 2)
    data = dataset.Demonstrations(obs, action, np.array([4000]))
    data = families.Demonstrations(obs, action, data.episode_ends, data.limits())
    sac.clone(policy, data, epochs=30, batch=128, lr=1e-3)
    obs = policy.normalize(obs)
    with torch.no_grad():
        mean, log_std, _ = policy.actor.get_action_dist_params(obs)
        sampled, middle = (policy.sample(obs, x0) for x0 in (torch.ones(4000, 2), torch.zeros(4000, 2)))
    assert (mean - obs[:, :2] * 0.5).abs().mean() < 0.05
    assert log_std.exp().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(sampled, (mean + log_std.exp()).tanh())
    torch.testing.assert_close(middle, mean.tanh())
    np.testing.assert_allclose(policy.to_env(middle)[:, 0], middle, atol=1e-5)


def test_replay_draws_from_all_that_it_holds_and_a_time_limit_is_no_end(make_args):
    class Envs:
        obs = np.zeros((2, 11), np.float32)

        def step(self, chunks):
            ends = np.array([True, False]), np.array([False, True])
            return Step(self.obs, np.ones(2), *ends, np.ones(2, int), np.ones(2))

    args = make_args("runs", rollout_chunks=1, num_envs=2)
    policy = sac.GaussianPolicy(11, 3)
    replay = families.rldt_gym.Replay(args, policy)
    steps, returns = families.rldt_gym.collect(policy, Envs(), replay.next(), args)
    assert (steps, returns) == (2, [1, 1])
    transitions = sac.Transitions(families.Gym, replay, 11)
    drawn = transitions.sample(50)
    assert set(drawn.dones.flatten().tolist()) == {0, 1} and (drawn.rewards == 1).all()
    for n in 2, 3:  # the oldest rollout is written anew
        replay.next()["reward"].fill_(n)
    assert set(transitions.sample(50).rewards.flatten().tolist()) == {2, 3}


def test_sac_improves_an_actor_that_does_not_look(monkeypatch, weak_demonstrations, tmp_path):  # noqa: F811
    monkeypatch.setattr(dataset, "get", lambda *_: weak_demonstrations)
    args = arguments(sac, **SMALL | dict(
        runs=tmp_path, iterations=12, gradient_steps=60, batch=64, lr=3e-3, gamma=0.0,
        warmup_iterations=1, critic_iterations=2, entropy_start=0.01, buffer_iterations=12,
    ))  # fmt: skip
    result = sac.main(args)
    assert result["base_return_sampled"] < -2.3
    assert result["final_return_sampled"] > -1.5


def test_without_stable_baselines_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match=r"pip install -r baselines/requirements\.txt"):
        sac.make_sac(sac.Args(), 3, 2)
