"""Needs Stable-Baselines3, see baselines/requirements.txt."""

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch

import rldt_gym
from baselines import sac_gym
from demos import dataset

WALL = ("wall_s", "rollout_s", "update_s")
TINY = dict(
    env_id="Hopper-v4", device="cpu", seed=3, actor_width=16, iterations=4, eval_every=3, num_envs=4, rollout_steps=12, eval_episodes=2,
    final_eval_episodes=3, buffer_size=70, warmup_iterations=1, critic_iterations=0, gradient_steps=3, batch=8, bc_epochs=1, bc_batch=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return dataset.make(dataset.Args(steps=400, num_envs=8, out=tmp_path_factory.mktemp("data") / "a.hdf5"))


def make_args(demonstrations, runs, **changes):
    fields = TINY | dict(dataset=demonstrations, runs=runs) | changes
    return sac_gym.parse_args([f"--{key.replace('_', '-')}={value}" for key, value in fields.items()])


def metrics(run):
    return [{key: value for key, value in row.items() if key not in WALL} for row in csv.DictReader((run / "metrics.csv").open())]


def only(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def finished(demonstrations, tmp_path_factory):
    runs = tmp_path_factory.mktemp("sac")
    handler = signal.getsignal(signal.SIGINT)
    result = sac_gym.main(make_args(demonstrations, runs))
    signal.signal(signal.SIGINT, handler)
    return only(runs), result


def test_run_writes_what_a_run_of_rldt_writes(finished, finished_run):
    run, result = finished
    assert set(result) == set(finished_run[1])
    assert json.loads((run / "result.json").read_text())["final_return"] == result["final_return"]
    rows = metrics(run)
    assert [row["eval_return"] != "" for row in rows] == [True, False, False, True, True]
    assert [row["losses/critic"] != "" for row in rows] == [False, False, True, False, False]
    assert result["env_steps"] == 2 * 4 * 12


def test_run_stopped_by_ctrl_c_and_resumed_equals_one_never_stopped(monkeypatch, finished, demonstrations, tmp_path):
    collect, calls = sac_gym.collect, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return collect(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sac_gym, "collect", pressed)
        with pytest.raises(SystemExit) as stop:
            sac_gym.main(make_args(demonstrations, tmp_path))
    command = str(stop.value).split("python -m baselines.sac_gym ")[1]
    result = sac_gym.main(sac_gym.parse_args(command.split()))
    assert metrics(only(tmp_path)) == metrics(finished[0])
    assert result["final_return"] == finished[1]["final_return"]


def test_evaluating_a_run_gives_the_returns_of_its_last_evaluation(finished):
    run, result = finished
    scores = sac_gym.main(sac_gym.parse_args([f"--evaluate={run}", "--final-eval-episodes=3", "--seed=3", "--device=cpu"]))
    assert scores == {"zero": result["final_return"], "noise": result["final_return_sampled"]}


def test_actor_stands_still_while_the_critics_are_trained_alone(demonstrations, tmp_path, finished, monkeypatch):
    def parts(run):
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        return saved["policy"], {key: value for key, value in saved["networks"].items() if key.startswith("critic.")}

    during, make_sac = [], sac_gym.make_sac

    def watched(*args):
        model = make_sac(*args)
        step = model.critic.optimizer.step
        model.critic.optimizer.step = lambda *a, **k: (during.append(model.actor.mu.weight.clone()), step(*a, **k))[1]
        return model

    with monkeypatch.context() as patch:
        patch.setattr(sac_gym, "make_sac", watched)
        sac_gym.main(make_args(demonstrations, tmp_path / "some", critic_iterations=5))
    assert len(during) > 1 and all(torch.equal(weight, during[0]) for weight in during)  # in the targets, too, it is the clone
    actor, critic = parts(only(tmp_path / "some"))
    sac_gym.main(make_args(demonstrations, tmp_path / "none", warmup_iterations=9))
    cloned, fresh = parts(only(tmp_path / "none"))
    assert all(torch.equal(value, cloned[key]) for key, value in actor.items())
    assert not any(torch.equal(value, fresh[key]) for key, value in critic.items())
    trained, _ = parts(finished[0])
    assert not torch.equal(trained["actor.mu.weight"], cloned["actor.mu.weight"])


def test_wall_budget_ends_the_run(demonstrations, tmp_path):
    result = sac_gym.main(make_args(demonstrations, tmp_path, iterations=1000, wall_budget_s=0.01))
    assert result["env_steps"] == 0
    assert len(metrics(only(tmp_path))) == 2


def test_cloned_actor_has_the_mean_and_the_spread_of_the_demonstrator():
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (4000, 3)).astype(np.float32)
    action = np.tanh(obs[:, :2] * 0.5 + 0.3 * rng.normal(size=(4000, 2))).astype(np.float32)
    action[:2] = [[-1, -1], [1, 1]]  # the scaling is the identity
    data = dataset.Demonstrations(obs, action, np.array([4000]))
    args = sac_gym.Args(device="cpu", actor_width=64, bc_epochs=30, bc_batch=128)
    policy = sac_gym.GaussianPolicy(sac_gym.make_sac(args, 3, 2).actor, 3, 2)
    sac_gym.clone(args, policy, data, log=lambda line: None)
    with torch.no_grad():
        mean, log_std, _ = policy.actor.get_action_dist_params(policy.normalize(obs))
        sampled = policy.sample(policy.normalize(obs), torch.ones(4000, 2))
        middle = policy.sample(policy.normalize(obs), torch.zeros(4000, 2))
    assert (mean - torch.as_tensor(obs[:, :2] * 0.5)).abs().mean() < 0.05
    assert log_std.exp().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(sampled, (mean + log_std.exp()).tanh())
    torch.testing.assert_close(middle, mean.tanh())
    np.testing.assert_allclose(policy.to_env(middle)[:, 0], middle, atol=1e-5)


def test_replay_overwrites_the_oldest_and_a_time_limit_is_no_end():
    args = sac_gym.Args(device="cpu", buffer_size=10)
    replay = sac_gym.Replay(args, 1, 1)
    for n in range(5):
        value = torch.arange(3.0) + 3 * n
        replay.add(observations=value, actions=value, next_observations=value, dones=np.array([True, False, False]), rewards=value)
    drawn = replay.sample(2000)
    assert set(drawn.rewards.flatten().tolist()) == set(range(5, 15))
    assert torch.equal(drawn.dones.flatten() == 1, drawn.rewards.flatten() % 3 == 0)
    assert torch.equal(drawn.observations, drawn.next_observations)
    assert drawn.discounts is None


def test_only_terminations_are_stored_as_ends(demonstrations):
    class Envs:
        obs = np.zeros((2, 11), np.float32)

        def step(self, chunks):
            return self.obs, np.ones(2), np.array([True, False]), np.array([False, True]), np.ones(2, int)

    args = sac_gym.Args(device="cpu", rollout_steps=1, num_envs=2, buffer_size=4, actor_width=8)
    policy, replay = sac_gym.GaussianPolicy(sac_gym.make_sac(args, 11, 3).actor, 11, 3), sac_gym.Replay(args, 11, 3)
    steps, finished = sac_gym.collect(policy, Envs(), replay, [], np.zeros(2), args)
    assert replay.data["dones"][:2].flatten().tolist() == [1, 0]
    assert (steps, finished) == (2, [1, 1])


def test_sac_improves_an_actor_that_does_not_look(tmp_path):
    from test_baselines import SMALL  # registers Track-v0

    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (2000, 2)), rng.normal(0, 0.5, (2000, 2)).clip(-1, 1)
    obs[:2], action[:2] = [[-1, -1], [1, 1]], [[-1, -1], [1, 1]]
    data = dataset.Demonstrations(obs.astype(np.float32), action.astype(np.float32), np.array([2000]))
    args = sac_gym.Args(**{key: SMALL[key] for key in ("env_id", "backend", "num_envs", "final_eval_episodes", "seed", "device")}, runs=tmp_path,
                        actor_width=32, iterations=12, eval_every=100, rollout_steps=16, gradient_steps=60, batch=64, lr=3e-3, gamma=0.0,
                        warmup_iterations=1, critic_iterations=2, entropy_start=0.01, buffer_size=5000)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac_gym, "get_demonstrations", lambda args, envs: data)
        result = sac_gym.main(args)
    assert result["base_return_sampled"] < -2.3
    assert result["final_return_sampled"] > -1.5


def test_without_stable_baselines_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match=r"pip install -r baselines/requirements\.txt"):
        sac_gym.make_sac(sac_gym.Args(device="cpu"), 3, 2)


@pytest.mark.parametrize("name", ["num_envs", "rollout_steps", "gradient_steps", "batch", "eval_every"])
def test_numbers_below_one_stop_with_the_flag(name):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        sac_gym.resolve(sac_gym.Args(**{name: 0}))


def test_the_evaluation_is_that_of_rldt():
    assert sac_gym.evaluate is rldt_gym.evaluate


def test_best_policy_is_measured_again_on_episodes_that_did_not_choose_it(scripted_evaluations, demonstrations, tmp_path):
    episodes, policies = scripted_evaluations(sac_gym, [8.0, 9.0, 1.0, 5.0])
    result = sac_gym.main(make_args(demonstrations, tmp_path))
    assert (result["base_return"], result["final_return"], result["best_return"]) == (8.0, 1.0, 5.0)
    assert not any(episodes[-1] & others for others in episodes[:-1])
    for key, value in policies[1].state_dict().items():
        assert torch.equal(policies[-1].state_dict()[key], value)
