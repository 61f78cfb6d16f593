"""Demonstrations and base policies of rldt_furniture.py, and what its other tests share with these."""

import h5py
import numpy as np
import pytest
import torch
from fakes import demonstrations, pretrain

import rldt_furniture
from demos import furniture as dataset
from demos import make_furniture_demos


# -------------------------------------------------------------------------------- base policies
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_scaling_is_by_the_range_or_by_standard_deviations(spread):
    data = demonstrations(44, 10)
    limits = dataset.limits(data, spread)
    for name, values in ("obs", data["state"]), ("action", data["action"]):
        low, high = values.min(0), values.max(0)
        if spread:
            low, high = (values.mean(0) + sign * spread * values.std(0) for sign in (-1, 1))
        np.testing.assert_allclose(limits[f"{name}_min"], low, rtol=1e-5)
        np.testing.assert_allclose(limits[f"{name}_max"], high, rtol=1e-5)


def test_pretraining_starts_from_another_base_with_its_scaling(tmp_path):
    data, path = demonstrations(44, 10), tmp_path / "first.safetensors"
    first = pretrain(rldt_furniture, data)
    first.save(path)
    data["state"] = 3 * data["state"] + 1
    second = pretrain(rldt_furniture, data, lr=1e-9, start=path)
    torch.testing.assert_close(second.state_dict(), first.state_dict())
    with pytest.raises(SystemExit, match=f"--start {path}: has sizes"):
        pretrain(rldt_furniture, demonstrations(58, 10), start=path)


# ------------------------------------------------------------------------------ demonstrations
def write_demos(path, furniture="one_leg", lengths=(24, 30), rewards=None, obs_dim=None, action_dim=10,
                scale=1.0, spoil=lambda demo: None):  # fmt: skip
    """Random demonstrations that assemble everything at their end; rewards: sums that replace those."""
    rng, spec = np.random.default_rng(0), dataset.FURNITURE[furniture]
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(furniture=furniture, randomness="low", backend="mujoco")
        for i, length in enumerate(lengths):
            demo, reward = data.create_group(f"demo_{i}"), np.zeros(length, np.float32)
            reward[-2:] = (rewards[i] if rewards else len(spec.pairs)) / 2
            demo["actions"] = scale * rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
            demo["rewards"] = reward
            demo["obs/state"] = rng.normal(size=(length, obs_dim or spec.obs_dim)).astype(np.float32)
            spoil(demo)
    return path


def test_successful_demonstrations_are_read_in_their_order(tmp_path):
    rewards = [2] * 5 + [1] + [2] * 6  # the sixth is incomplete
    path = write_demos(tmp_path / "d.hdf5", "lamp", range(3, 15), rewards=rewards)
    data, lengths = dataset.load(path, "lamp"), [3, 4, 5, 6, 7, *range(9, 15)]
    assert np.diff(data["episode_ends"], prepend=0).tolist() == lengths
    assert (data["state"].shape, data["action"].shape) == ((sum(lengths), 44), (sum(lengths), 10))
    assert data["state"].dtype == data["action"].dtype == np.float32
    with h5py.File(path) as file:
        made = {"furniture": "lamp", "randomness": "low", "backend": "mujoco"}
        assert dict(file["data"].attrs) == made
        np.testing.assert_array_equal(data["state"][-14:], file["data/demo_11/obs/state"])
        np.testing.assert_array_equal(data["action"][3:7], file["data/demo_1/actions"])
    few = dataset.load(path, "lamp", max_episodes=2)
    assert few["episode_ends"].tolist() == [3, 7]
    np.testing.assert_array_equal(few["state"], data["state"][:7])
    assert few["stage"].tolist() == [0, 0, 1, 0, 0, 0, 1]  # before each action
    path = write_demos(path, spoil=lambda demo: demo.pop("rewards"))
    assert dataset.load(path, "one_leg")["episode_ends"].tolist() == [24, 54]


@pytest.mark.parametrize("written, message", [
    (dict(furniture="lamp"), "holds lamp, not one_leg"),
    (dict(obs_dim=44), r"demo_0/obs/state .*\(24, 44\).* \(24, 58\)"),
    (dict(action_dim=7), r"demo_0/actions .*\(24, 7\).* \(any, 10\)"),
    (dict(rewards=[0, 0]), r"no successful demonstration \(2 failed\)"),
    (dict(lengths=()), r"no successful demonstration \(0 failed\)"),
    (dict(spoil=lambda demo: demo.pop("actions")), "lacks data/demo_0/actions"),
    (dict(spoil=lambda demo: demo["obs/state"].__setitem__(3, np.nan)), "obs/state contains NaN"),
    (dict(scale=1.8), "an action is .* in dimension"),
    (dict(spoil=lambda demo: demo.parent.attrs.clear()), "holds no furniture task, not one_leg"),
])  # fmt: skip
def test_demonstrations_that_do_not_fit_stop_in_one_line(tmp_path, written, message):
    path = write_demos(tmp_path / "d.hdf5", **written)
    with pytest.raises(dataset.DatasetError, match=message) as stop:
        dataset.load(path, "one_leg")
    assert str(stop.value).startswith(f"{path}: ") and "\n" not in str(stop.value)


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
