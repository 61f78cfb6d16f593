"""demos/dataset.py and demos/hdf5.py: files that are read, that are refused, and that are made."""

import dataclasses
import faulthandler
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pickle_bomb import LOADED, Bomb
from safetensors.torch import save_file

from demos import dataset, furniture, hdf5, robomimic, train_demonstrator
from demos.dataset import DatasetError, load
from envs.robomimic import TASKS, metadata
from envs.vector import VectorEnv

FLIPS = int(os.environ.get("TEST_FLIPS", 60))  # damaged copies of a file of each format


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def write_dppo(folder, **changes):
    """Writes train.npz and normalization.npz, with other arrays where given; None leaves one out."""
    rng = np.random.default_rng(1)
    obs, action = rng.normal(2, 3, (9, 3)), rng.uniform(-0.5, 0.4, (9, 2))
    train, normalization = dict(traj_lengths=np.array([5, 4])), {}
    for name, key, x in ("obs", "states", obs), ("action", "actions", action):
        low, high = x.min(0), x.max(0)
        normalization |= {f"{name}_min": low, f"{name}_max": high}
        train[key] = 2 * (x - low) / (high - low + 1e-6) - 1
    for key, value in changes.items():
        (normalization if key in normalization else train)[key] = value
    for name, arrays in ("train", train), ("normalization", normalization):
        kept = {key: value for key, value in arrays.items() if value is not None}
        np.savez(folder / f"{name}.npz", **kept)
    return folder / "train.npz", obs, action


def refusal(source, read=load):
    with pytest.raises(SystemExit) as error:
        read(source)
    text = str(error.value)
    assert str(source) in text or "normalization.npz" in text
    assert "\n" not in text
    assert LOADED == []
    return text


# ---------------------------------------------------------------------------------------- D4RL
def test_d4rl_round_trip(tmp_path, d4rl_arrays):
    d4rl_arrays["rewards"][3] = np.nan  # cloning does not read them
    data = load(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))
    for key in ("observations", "actions"):
        np.testing.assert_array_equal(getattr(data, key), d4rl_arrays[key])
        assert getattr(data, key).dtype == np.float32
    assert data.episode_ends.tolist() == [5, 9]
    for name, x in ("obs", data.observations), ("action", data.actions):
        np.testing.assert_array_equal(data.limits()[f"{name}_min"], x.min(0))
        np.testing.assert_array_equal(data.limits()[f"{name}_max"], x.max(0))
    d4rl_arrays["terminals"][:], d4rl_arrays["timeouts"][:] = False, False  # it stops inside an episode
    assert load(write_hdf5(tmp_path / "b.h5", d4rl_arrays)).episode_ends.tolist() == [9]


D4RL = ["observations", "actions", "terminals", "timeouts"]


@pytest.mark.parametrize("key, value, words", [
    *[(key, None, f"lacks {key}") for key in D4RL], *[(key, np.ones(()), f"{key} ()") for key in D4RL],
    *[(key, np.array([b"text"] * 9), key) for key in D4RL],
    *[("actions", np.full((9, 2), x), "NaN, Inf or more than 1e+09") for x in (np.nan, -np.inf, 1e30)],
    *[("observations", np.zeros(n), f"{n} should be (any") for n in ((9,), (9, 3, 1), (0, 3))],
    *[("actions", np.zeros(n), f"{n} should be (9, any)") for n in ((9,), (8, 2))],
    ("terminals", np.zeros(7), "(7,) should be (9,)"), ("timeouts", np.zeros((9, 1)), "(9, 1) should"),
])  # fmt: skip
def test_d4rl_file_with_a_wrong_array_is_refused(tmp_path, d4rl_arrays, key, value, words):
    arrays = d4rl_arrays | {key: value}
    kept = {key: value for key, value in arrays.items() if value is not None}
    assert words in refusal(write_hdf5(tmp_path / "a.hdf5", kept))


# ---------------------------------------------------------------------------------------- DPPO
def test_dppo_round_trip(tmp_path):
    path, obs, action = write_dppo(tmp_path, rewards=np.full(9, np.nan))
    data = load(path)
    np.testing.assert_allclose(data.observations, obs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.actions, action, rtol=1e-5, atol=1e-6)
    assert data.episode_ends.tolist() == [5, 9]
    np.testing.assert_allclose(data.limits()["obs_min"], obs.min(0))
    np.testing.assert_allclose(data.limits()["action_max"], action.max(0))


LENGTHS = "traj_lengths do not add up to the 9 steps"
PICKLED = np.array([Bomb()], object)


@pytest.mark.parametrize("key, value, words", [
    *[(key, None, f"lacks {key}") for key in ("states", "actions", "traj_lengths", "obs_min")],
    ("states", np.full((9, 3), np.nan), "states contains NaN"), ("actions", np.zeros((8, 2)), "(8, 2)"),
    ("obs_min", np.full(3, np.nan), "obs_min contains NaN"),
    *[("traj_lengths", np.array(n, int), LENGTHS) for n in ([5, 5], [9, 0], [5, 3], [10, -1])],
    ("traj_lengths", np.zeros(0, int), "traj_lengths (0,)"),
    ("obs_min", np.zeros(4), "obs_min (4,) should be (3,)"),
    ("action_max", np.zeros(1), "action_max (1,)"), ("states", np.zeros(9), "states (9,)"),
    *[(key, np.full(n, "text"), "not float") for key, n in (("states", (9, 3)), ("obs_min", 3))],
    *[(key, PICKLED, "pickled objects are never loaded") for key in ("states", "obs_max")],
    ("states", np.full((9, 3), 7.0), "obs reaches 7, where scaled numbers lie in [-1, 1]; if they are"),
    ("obs_min", np.array([-99, 99, 99]), "obs_min exceeds obs_max in dimensions [1 2]"),
])  # fmt: skip
def test_dppo_file_with_a_wrong_array_is_refused(tmp_path, key, value, words):
    assert words in refusal(write_dppo(tmp_path, **{key: value})[0])


# ------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("suffix", [".pkl", ".npz", ".hdf5"])
def test_files_are_read_by_content_and_never_unpickled(tmp_path, d4rl_arrays, suffix):
    pickle.loads(pickle.dumps(Bomb()))
    assert LOADED.pop() == 1  # the bomb works
    path = tmp_path / f"data{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    assert "unknown format" in refusal(path)
    assert len(load(write_hdf5(path, d4rl_arrays)).actions) == 9  # a wrong suffix does no harm
    shutil.copy(write_dppo(tmp_path)[0], path)
    assert len(load(path).actions) == 9


READERS = [load, lambda p: furniture.load(p, "lamp"), lambda p: robomimic.load(p, "lift", False)]


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.hdf5")
    (tmp_path / "folder.hdf5").mkdir()
    for name in "pipe.hdf5", "folder.hdf5", "gone.hdf5":
        text = refusal(tmp_path / name, read)
        assert "no such file" in text or "a folder, a pipe or a device" in text
    assert "a folder, a pipe or a device" in refusal(Path("/dev/zero"), read)


@pytest.mark.parametrize("steps", [10**8, 10**12])
def test_small_files_that_claim_much_are_refused_unread(monkeypatch, tmp_path, steps):
    names = {"d4rl": ("observations", 3), "furniture": ("data/demo_0/actions", 10)}
    names |= {"robomimic": ("data/demo_0/actions", 7), "minari": ("episode_0/actions", 2)}
    for kind, (name, width) in names.items():
        path, read = FORMATS[kind](tmp_path)
        with h5py.File(path, "a") as file:
            del file[name]
            file.create_dataset(name, (steps, width), "f4", chunks=(1, width))  # none of them written
        with pytest.raises(DatasetError, match=r"GiB in .* bytes: the file is damaged"):
            read()
    path, read = npz(tmp_path)
    np.savez_compressed(path, states=np.zeros((2**27, 1), bool))
    monkeypatch.setattr(hdf5, "PACKED", 10)  # a zip's claims may be true, and too large all the same
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    with pytest.raises(DatasetError, match=r"it claims 0.125 GiB in .* bytes: the file is damaged"):
        read()


# One writer a format: it makes a small file and a function that reads it.
def d4rl(folder):
    rng = np.random.default_rng(0)
    arrays = dict(observations=rng.normal(size=(9, 3)), actions=rng.uniform(-1, 1, (9, 2)))
    arrays |= dict(terminals=np.arange(9) == 4, timeouts=np.arange(9) == 8)
    path = write_hdf5(folder / "d4rl.hdf5", arrays)
    return path, lambda: load(path)


def npz(folder):
    path = write_dppo(folder)[0]
    return path, lambda: load(path)


def minari(folder):
    (folder / "minari" / "data").mkdir(parents=True, exist_ok=True)
    path, arrays = folder / "minari" / "data" / "main_data.hdf5", {}
    for name in "episode_0", "episode_1":
        arrays |= {f"{name}/observations": np.zeros((5, 3)), f"{name}/actions": np.ones((4, 2))}
    write_hdf5(path, arrays)
    return path, lambda: load(folder / "minari")


def write_demos(path, arrays, **attributes):
    """Two equal demonstrations in the layout of robomimic."""
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            for i in range(2):
                file.create_dataset(f"data/demo_{i}/{name}", data=value, compression="gzip")
        file["data"].attrs.update(attributes)
        file["mask/train"] = [b"demo_0", b"demo_1"]
    return path


def lift(folder, images=False):
    arrays = {"actions": np.zeros((6, 7)), "rewards": np.eye(6)[5]}
    if images:
        arrays["obs/agentview_image"] = np.zeros((6, 96, 96, 3), "u1")
    for key, width in zip(TASKS["lift"].state_keys(False), (3, 4, 2, 10), strict=True):
        arrays[f"obs/{key}"] = np.full((6, width), 0.5)
    path = write_demos(folder / "lift.hdf5", arrays, env_args=json.dumps(metadata("lift", images)))
    return path, lambda: robomimic.load(path, "lift", images)


def lamp(folder):
    arrays = {"actions": np.zeros((6, 10)), "rewards": 2 * np.eye(6)[5], "obs/state": np.ones((6, 44))}
    path = write_demos(folder / "lamp.hdf5", arrays, furniture="lamp")
    return path, lambda: furniture.load(path, "lamp")


FORMATS = {"d4rl": d4rl, "dppo": npz, "minari": minari, "robomimic": lift, "furniture": lamp}
FORMATS["images"] = lambda folder: lift(folder, images=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_are_refused_in_one_line_or_do_no_harm(tmp_path, kind):
    path, read = FORMATS[kind](tmp_path)
    content, rng, refused = path.read_bytes(), np.random.default_rng(len(kind)), 0
    read()
    for _ in range(FLIPS):
        damaged = bytearray(content)
        for bit in rng.integers(8 * len(content), size=rng.integers(1, 9)):
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        faulthandler.dump_traceback_later(60, exit=True)  # it hangs
        try:
            read()
        except DatasetError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(f"{kind}: {refused} of {FLIPS} refused")  # seen with pytest -s
    assert refused > FLIPS / 10


def test_error_of_two_lines_is_told_in_one():
    assert str(DatasetError("two\nlines")) == "two lines"


# -------------------------------------------------------------------------------------- Minari
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_round_trip_by_id_and_by_folder(monkeypatch, tmp_path):
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    observations, buffers = [np.arange(3.0 * n).reshape(n, 3) for n in (4, 3)], []
    for i, obs in enumerate(observations):  # each with its last next state
        n = len(obs) - 1
        actions = np.arange(2 * n, dtype=np.float32).reshape(n, 2) / 10 + i
        flags = dict(rewards=[1.0] * n, terminations=[False] * n, truncations=[False] * n)
        buffers.append(EpisodeBuffer(id=i, observations=obs, actions=actions, **flags))
    box = lambda n: spaces.Box(-9, 9, (n,), np.float32)
    create_dataset_from_buffers("rldt/tiny-v0", buffers, observation_space=box(3), action_space=box(2),
                                algorithm_name="-", author="-", author_email="-@-", description="-",
                                code_permalink="https://test")  # fmt: skip
    folder = tmp_path / "rldt/tiny-v0"
    expected = np.concatenate([obs[:-1] for obs in observations])
    for source in "rldt/tiny-v0", folder, folder / "data":
        data = load(source)
        np.testing.assert_array_equal(data.observations, expected)
        np.testing.assert_allclose(data.actions[:, 0], [0, 0.2, 0.4, 1, 1.2], rtol=1e-6)
        assert data.episode_ends.tolist() == [3, 5]
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        file.move("episode_1/observations", "x")
        file.move("x", "episode_1/observations/x")
    with pytest.raises(DatasetError, match=r"episode_1/observations \(\) should be \(any, 3\)"):
        load(folder)
    for name in "nobody/nothing-v3", tmp_path:
        assert "no Minari dataset in HDF5" in refusal(name)


# ------------------------------------------------------------------------------------ recorded
def make(tmp_path, name, seed=0, **changes):
    # Walker2d: its demonstrator and Hopper's are the same code
    fields = dict(env_id="Walker2d-v4", steps=95, num_envs=4, seed=seed, out=tmp_path / name) | changes
    return dataset.make(dataset.Args(**fields))


def contents(path):
    with h5py.File(path, "r") as file:
        return {key: file[key][()] for key in file}


def test_recorded_demonstrations_follow_the_seed_and_leave_the_random_stream_of_a_run(tmp_path):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    first, second, other = (contents(make(tmp_path, "a.hdf5", seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.randn(3), expected)
    for key in dataset.KEYS:
        np.testing.assert_array_equal(first[key], second[key])
    assert np.abs(first["observations"] - other["observations"]).max() > 0
    assert np.abs(first["actions"] - other["actions"]).max() > 0
    assert {len(values) for values in first.values()} == {95} and np.abs(first["actions"]).max() <= 1
    assert not (other["terminals"] & other["timeouts"]).any()
    ends = np.flatnonzero(other["terminals"] | other["timeouts"]) + 1
    assert {24, 48, 72, 95} <= set(ends.tolist())  # 4 environments of 24 steps, the last one cut at 95
    assert load(tmp_path / "a.hdf5").episode_ends.tolist() == ends.tolist()
    envs = VectorEnv("Walker2d-v4", 4)
    envs.reset(1)
    np.testing.assert_array_equal(other["observations"][[0, 24, 48, 72]], envs.obs)
    step = envs.step(other["actions"][[0, 24, 48, 72], None])
    np.testing.assert_allclose(other["rewards"][[0, 24, 48, 72]], step.reward, rtol=1e-6)
    np.testing.assert_array_equal(other["observations"][[1, 25, 49, 73]], envs.obs)


@pytest.mark.parametrize("changes, words", [
    (dict(env_id="Ant-v4"), "No demonstrator for Ant-v4.*--dataset"), (dict(steps=0), "--steps 0: must"),
    (dict(num_envs=-1), "--num-envs -1: must lie between"), (dict(noise=np.nan), "--noise nan"),
    (dict(seed=-1), "--seed -1"), (dict(steps=4), "a.hdf5: cannot be written .it is a folder"),
])  # fmt: skip
def test_what_cannot_be_recorded_is_said_first(tmp_path, changes, words):
    (tmp_path / "a.hdf5").mkdir()
    with pytest.raises(SystemExit, match=words):
        make(tmp_path, "a.hdf5", **changes)


def test_two_recordings_at_once_do_not_share_a_partial_file(tmp_path):
    with hdf5.replacing(tmp_path / "a.hdf5") as first, hdf5.replacing(tmp_path / "a.hdf5") as second:
        first["x"], second["x"] = 1, 2
        assert len(list(tmp_path.glob("a.hdf5.*.partial"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.hdf5"]
    assert contents(tmp_path / "a.hdf5") == {"x": 1}  # the first one ends last
    with pytest.raises(SystemExit, match="interrupted, nothing"), hdf5.replacing(tmp_path / "a.hdf5"):
        raise KeyboardInterrupt
    assert contents(tmp_path / "a.hdf5") == {"x": 1}


def test_demonstrations_that_cannot_be_of_the_task_are_refused(tmp_path):
    envs = VectorEnv("Walker2d-v4", 1)
    path = make(tmp_path, "a.hdf5", steps=1010, num_envs=1)
    get = lambda source: dataset.get("Walker2d-v4", source, envs)
    get(path)
    arrays = contents(path)
    arrays["terminals"][:], arrays["timeouts"][:] = False, False
    assert "one episode of 1010 steps, where Walker2d-v4's" in refusal(write_hdf5(path, arrays), get)
    arrays["actions"][7, 2] = -1.8
    text = refusal(write_hdf5(path, arrays), get)
    assert "an action is -1.8 in dimension 2, outside the environment's box: absolute poses" in text
    arrays["actions"] = arrays["actions"][:, :5]
    assert "sizes (17, 5) are not Walker2d-v4's (17, 6)" in refusal(write_hdf5(path, arrays), get)


def test_dimensions_that_hardly_vary_get_a_range_and_are_named(capsys):
    low, high = np.float32([0, 3, -1, 2]), np.float32([2, 3, 1, 2.001])
    limits = hdf5.widen("obs", low, high)
    np.testing.assert_allclose(limits["obs_min"], [0, 2.9, -1, 1.9005])
    np.testing.assert_allclose(limits["obs_max"], [2, 3.1, 1, 2.1005])
    assert "obs 1, 3 hardly varies in the demonstrations" in capsys.readouterr().out
    limits = hdf5.widen("action", np.zeros(2), np.zeros(2))  # nothing varies
    assert (limits["action_max"] - limits["action_min"] == 0.1).all()
    capsys.readouterr()
    low[1], low[3] = 2.9, 1.9
    limits = hdf5.widen("obs", low, high)
    assert (limits["obs_min"] == low).all() and (limits["obs_max"] == high).all()
    assert capsys.readouterr().out == ""


def test_demonstrations_are_those_given_or_recorded_when_first_needed(tmp_path, monkeypatch):
    envs, recorded = VectorEnv("Walker2d-v4", 1), make(tmp_path, "a.hdf5")
    made, given = [], make(tmp_path, "given.hdf5", steps=40)

    def record(args):
        made.append(args.env_id)
        recorded.rename(tmp_path / "Walker2d-v4" / "medium.hdf5")

    (tmp_path / "Walker2d-v4").mkdir()
    monkeypatch.setattr(dataset, "DEMOS", tmp_path)
    monkeypatch.setattr(dataset, "make", record)
    for source, steps in (str(given), 40), (None, 95), (None, 95):
        assert len(dataset.get("Walker2d-v4", source, envs).observations) == steps
    assert made == ["Walker2d-v4"]


# ------------------------------------------------------------ demos/train_demonstrator.py
@pytest.fixture
def training(tmp_path, monkeypatch):
    """A training that ends at its first evaluation, after two rollouts."""
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(train_demonstrator, "EPISODES", 2)
    monkeypatch.setattr(train_demonstrator, "EVAL_EVERY", 2)
    out = tmp_path / "Hopper-v4" / "demonstrator.safetensors"
    return train_demonstrator.Args(target_return=1.0, max_steps=256, num_envs=2, out=out)


def test_demonstrator_acts_as_the_policy_that_ppo_trained(training, tmp_path):
    model, *_ = train_demonstrator.train(training, training.target_return)
    assert model.num_timesteps == 256
    save_file(train_demonstrator.export(model), tmp_path / "a.safetensors")
    policy = train_demonstrator.Demonstrator(tmp_path / "a.safetensors")
    obs = np.random.default_rng(0).normal(0, 3, (50, 11))
    normalized = torch.as_tensor(model.get_vec_normalize_env().normalize_obs(obs))
    expected = model.policy.get_distribution(normalized).distribution
    torch.testing.assert_close(policy.act(obs, 0.0), expected.mean)
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    action = policy.act(obs, 1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(action, expected.mean + expected.stddev * noise)


def test_recording_reads_what_training_writes(training, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="short of 100000; nothing was written"):
        train_demonstrator.main(dataclasses.replace(training, target_return=1e5))
    assert not training.out.exists()
    train_demonstrator.main(training)
    assert '"env_steps": 256' in capsys.readouterr().out
    monkeypatch.setattr(dataset, "DEMOS", tmp_path)
    assert len(dataset.load(dataset.make(dataset.Args(steps=20, num_envs=2))).actions) == 20


@pytest.mark.parametrize("changes, words", [
    (dict(env_id="Ant-v4"), "pass --target-return"), (dict(target_return=np.nan), "--target-return nan"),
    (dict(env_id="BipedalWalker-v3", target_return=1.0), "Cannot make the env"),  # EnvPool has it
    (dict(num_envs=0), "--num-envs 0: must lie"), (dict(out=Path("/proc/x/y")), "cannot be written"),
    (dict(out=Path("/tmp")), "is a folder"), (dict(), r"pip install -r baselines/requirements.txt"),
])  # fmt: skip
def test_what_keeps_it_from_training_is_said_first(monkeypatch, changes, words):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match=words):
        train_demonstrator.main(train_demonstrator.Args(**changes))
