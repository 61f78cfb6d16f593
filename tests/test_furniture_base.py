"""Demonstrations and base policies of rldt_furniture.py, and what its other tests share with these."""

import math
import types

import h5py
import numpy as np
import pytest
import torch

import rldt_furniture
from common.flow import FlowPolicy
from demos import furniture as dataset
from demos import make_furniture_demos

DIMS = {"one_leg": 58, "lamp": 44}
STAGES = {"one_leg": 1, "lamp": 2}
SETTINGS = dict(
    epochs=1, batch=8, lr=1e-3, spread=1.0, chunk=4, euler_steps=4, width=16, depth=3, time_dim=8
)  # of a small and short pretraining


def arguments(**changes):
    """Arguments of the functions below main()."""
    values = dict(device="cpu", bf16=False, horizon=20, backend="mujoco", q_gradient="critic",
                  transport_scale=30.0)  # fmt: skip
    return rldt_furniture.Args(**values | changes)


def small_policy(obs_dim=4, action_dim=2, chunk=2):
    return FlowPolicy(obs_dim, action_dim, chunk, 4, width=16, depth=3, time_dim=8)


def same(module, state):
    """Whether a module has exactly these weights."""
    return all(torch.equal(value.cpu(), state[key].cpu()) for key, value in module.state_dict().items())


# -------------------------------------------------------------------------------- base policies
class Directory:
    """As much of a Run as get_base needs."""

    rank = 0
    barrier = staticmethod(lambda: None)

    def __init__(self, path):
        self.path = path


def demonstrations(obs_dim=44, lengths=(3, 17, 20)):
    """Episodes whose first state and action are the step number, whose second action is the episode."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)
    action = np.stack([steps, 1 + np.digitize(steps, ends)] + [steps + 2] * 8, 1).astype(np.float32)
    state = np.stack([steps] + [-1 - steps] * (obs_dim - 1), 1)
    return {"state": state, "action": action, "episode_ends": ends, "meta": {}}


def pretrain(tmp_path, data, **changes):
    args = arguments(furniture="lamp")
    return rldt_furniture.pretrain(args, data, tmp_path / "pretraining.pt", **SETTINGS | changes)


@pytest.mark.parametrize("shipped, changes, source", [
    (True, dict(), "shipped"), (False, dict(), "made"), (True, dict(pretrain=True), "made"),
    (True, dict(base="own"), "own"), (True, dict(dataset="mine.hdf5"), "made"),
])  # fmt: skip
def test_base_policy_is_given_shipped_or_made_and_kept(monkeypatch, tmp_path, shipped, changes, source):
    monkeypatch.setattr(dataset, "DEMOS", tmp_path / "demos")
    monkeypatch.setattr(dataset, "get", lambda *task: demonstrations(58))
    monkeypatch.setitem(rldt_furniture.PRETRAINING, "laptop", SETTINGS)
    shipped_at = tmp_path / "demos" / "one_leg" / "base_med.safetensors"
    paths = {"shipped": shipped_at, "own": tmp_path / "own"}
    policies = {name: small_policy(58, 10, chunk=4) for name in paths}
    for name, path in paths.items():
        if shipped or name == "own":
            policies[name].save(path)
    if "base" in changes:
        changes = dict(base=paths["own"])
    args = arguments(randomness="med", **changes)
    envs = types.SimpleNamespace(obs_dim=58, action_dim=10)
    policy = rldt_furniture.get_base(args, Directory(tmp_path), envs)
    kept = FlowPolicy.load(tmp_path / "base.safetensors")
    assert same(policy, kept.state_dict())
    assert not (tmp_path / "pretraining.pt").exists()
    if source in policies:
        assert same(policy, policies[source].state_dict())
    else:
        assert (kept.info["furniture"], kept.info["randomness"]) == ("one_leg", "med")
    args.base = tmp_path / "gone"
    again = rldt_furniture.get_base(args, Directory(tmp_path), envs)  # as on --resume
    assert same(again, kept.state_dict())


def test_base_policy_of_another_task_stops_in_one_line(tmp_path):
    path = tmp_path / "lamp.safetensors"
    small_policy(44, 10, chunk=4).save(path)
    envs = types.SimpleNamespace(obs_dim=58, action_dim=10)
    with pytest.raises(SystemExit, match=r"lamp\.safetensors: states or actions have other") as stop:
        rldt_furniture.get_base(arguments(base=path), Directory(tmp_path), envs)
    assert "\n" not in str(stop.value)


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch, tmp_path):
    seen, loss = [], rldt_furniture.flow_matching_loss
    recorded = lambda v, a, o: seen.append((a, o)) or loss(v, a, o)
    monkeypatch.setattr(rldt_furniture, "flow_matching_loss", recorded)
    policy = pretrain(tmp_path, demonstrations(), epochs=60, spread=0.0)
    chunk, obs = torch.cat([a for a, _ in seen]).view(-1, 4, 10), torch.cat([o for _, o in seen])
    raw = torch.as_tensor(policy.to_env(chunk.flatten(1))).round()
    assert (raw[:, 1:, 0] - raw[:, :-1, 0] == 1).all()
    assert (raw[:, :, 1] == raw[:, :1, 1]).all()
    assert ((obs[:, 0] + 1) / 2 * 39).round().tolist() == raw[:, 0, 0].tolist()
    assert set(raw[:, 0, 0].int().tolist()) == {*range(3, 17), *range(20, 37)}  # all but those too late


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_scaling_is_by_standard_deviations(spread):
    data = demonstrations()
    limits = dataset.limits(data, spread)
    for name, key in ("obs", "state"), ("action", "action"):
        low, high = limits[f"{name}_min"], limits[f"{name}_max"]
        np.testing.assert_allclose((low + high) / 2, data[key].mean(0), rtol=1e-5)
        np.testing.assert_allclose((high - low) / 2, spread * data[key].std(0), rtol=1e-5)


def test_scaling_is_the_range_of_the_demonstrations(tmp_path):
    policy = pretrain(tmp_path, demonstrations(), spread=0.0)
    assert (policy.obs_min[:2].tolist(), policy.obs_max[:2].tolist()) == ([0, -40], [39, -1])
    assert (policy.action_min[1], policy.action_max[1], policy.action_max[2]) == (1, 3, 41)


def test_pretraining_starts_from_another_base_with_its_scaling(tmp_path):
    first, path = pretrain(tmp_path, demonstrations(), epochs=20), tmp_path / "first.safetensors"
    first.save(path)
    other = demonstrations()
    other["state"] = 3 * other["state"] + 1
    second = pretrain(tmp_path, other, epochs=2, lr=1e-6, start=path)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    with pytest.raises(SystemExit, match="none"):
        pretrain(tmp_path, other, start=tmp_path / "none")


def test_pretraining_goes_on_where_it_was_cut_off_and_refuses_other_settings(monkeypatch, tmp_path):
    def run(folder, stop_at=math.inf, **changes):
        """The policy and the number of steps made here, or None where it is cut off."""
        loss, calls = rldt_furniture.flow_matching_loss, []

        def counted(v, a, o):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == stop_at:
                raise KeyboardInterrupt
            return loss(v, a, o)

        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(rldt_furniture, "flow_matching_loss", counted)
            try:
                return pretrain(folder, demonstrations(), **dict(epochs=170) | changes), sum(calls)
            except KeyboardInterrupt:
                return None

    torch.manual_seed(3)
    whole, steps = run(tmp_path / "whole")
    torch.manual_seed(3)
    assert run(tmp_path / "parts", stop_at=550) is None
    with pytest.raises(SystemExit, match="other settings or data"):
        run(tmp_path / "parts", lr=2e-3)
    torch.manual_seed(4)
    continued, steps_made = run(tmp_path / "parts")
    assert steps_made == steps - 500
    assert continued.info == whole.info
    assert same(continued, whole.state_dict())


def test_demonstrations_shorter_than_a_chunk_stop(tmp_path):
    with pytest.raises(SystemExit, match="0 chunks of 4 steps are too few to clone"):
        pretrain(tmp_path, demonstrations(lengths=(3, 2)))


# ------------------------------------------------------------------------------ demonstrations
def write_demos(path, furniture="one_leg", lengths=(24, 30), rewards=None, obs_dim=None, action_dim=10,
                spoil=lambda demo: None):  # fmt: skip
    """Random demonstrations that assemble everything at their end; rewards: sums that replace those."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(furniture=furniture, randomness="low", backend="mujoco")
        for i, length in enumerate(lengths):
            demo, reward = data.create_group(f"demo_{i}"), np.zeros(length, np.float32)
            reward[-2:] = (rewards[i] if rewards else STAGES.get(furniture, 1)) / 2
            demo["actions"] = rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
            demo["rewards"] = reward
            demo["obs/state"] = rng.normal(size=(length, obs_dim or DIMS[furniture])).astype(np.float32)
            spoil(demo)
    return path


def test_successful_demonstrations_are_read_in_their_order(tmp_path):
    rewards = [2] * 5 + [1] + [2] * 6  # the sixth is incomplete
    path = write_demos(tmp_path / "d.hdf5", "lamp", range(3, 15), rewards=rewards)
    data, lengths = dataset.load(path, "lamp"), [3, 4, 5, 6, 7, *range(9, 15)]
    assert np.diff(data["episode_ends"], prepend=0).tolist() == lengths
    assert (data["state"].shape, data["action"].shape) == ((sum(lengths), 44), (sum(lengths), 10))
    assert data["state"].dtype == data["action"].dtype == np.float32
    assert data["meta"] == {"furniture": "lamp", "randomness": "low", "backend": "mujoco"}
    with h5py.File(path) as file:
        np.testing.assert_array_equal(data["state"][-14:], file["data/demo_11/obs/state"])
        np.testing.assert_array_equal(data["action"][3:7], file["data/demo_1/actions"])
    few = dataset.load(path, "lamp", max_episodes=2)
    assert few["episode_ends"].tolist() == [3, 7]
    np.testing.assert_array_equal(few["state"], data["state"][:7])


def spoil(demo):
    demo["obs/state"][3, 1] = np.nan


@pytest.mark.parametrize("written, message", [
    (dict(furniture="lamp"), "holds lamp, not one_leg"),
    (dict(obs_dim=44), r"demo_0: obs/state are \(24, 44\), not \(24, 58\)"),
    (dict(action_dim=7), r"demo_0: actions are \(24, 7\), not \(24, 10\)"),
    (dict(rewards=[0, 0]), r"no successful demonstration \(2 failed\)"),
    (dict(lengths=()), r"no successful demonstration \(0 failed\)"),
    (dict(spoil=lambda demo: demo.pop("rewards")), "data/demo_0 lacks rewards"),
    (dict(spoil=spoil), "demo_0: obs/state contain NaN"),
])  # fmt: skip
def test_demonstrations_that_do_not_fit_stop_in_one_line(tmp_path, written, message):
    path = write_demos(tmp_path / "d.hdf5", **written)
    with pytest.raises(dataset.DatasetError, match=message) as stop:
        dataset.load(path, "one_leg")
    assert str(stop.value).startswith(f"{path}: ")
    assert "\n" not in str(stop.value)


def test_a_file_that_holds_no_demonstrations_stops(tmp_path):
    path = tmp_path / "d.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = np.zeros((3, 10))
    with pytest.raises(dataset.DatasetError, match="not demonstrations of a furniture task"):
        dataset.load(path, "one_leg")


def test_missing_demonstrations_are_made_once(monkeypatch, tmp_path):
    made = []

    def make(args):
        made.append(args)
        args.out.parent.mkdir()
        write_demos(args.out, "lamp")

    monkeypatch.setattr(dataset, "DEMOS", tmp_path)
    monkeypatch.setattr(make_furniture_demos, "make", make)
    for _ in range(2):
        assert dataset.get("lamp", "med", None, max_episodes=1)["episode_ends"].tolist() == [24]
    path = tmp_path / "lamp" / "med.hdf5"
    assert made == [make_furniture_demos.Args(furniture="lamp", randomness="med", out=path)]
    with pytest.raises(SystemExit, match="no such file"):
        dataset.get("lamp", "med", tmp_path / "none.hdf5")
