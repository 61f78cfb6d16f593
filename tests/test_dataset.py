"""demos/dataset.py: files that are read, files that are refused, and demonstrations made here."""

import pickle

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pickle_bomb import LOADED, Bomb

from demos import dataset
from demos.dataset import DatasetError, load
from envs.vector import VectorEnv


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


@pytest.fixture
def dppo(tmp_path):
    """Writes train.npz and normalization.npz; keywords replace arrays, None leaves one out. Returns the path."""
    rng = np.random.default_rng(1)
    raw = rng.normal(2, 3, (9, 3)).astype(np.float32), rng.uniform(-0.5, 0.4, (9, 2)).astype(np.float32)
    stats = {}
    scaled = {}
    for name, x in zip(("obs", "action"), raw, strict=True):
        low, high = x.min(0), x.max(0)
        stats[f"{name}_min"], stats[f"{name}_max"] = low, high
        scaled[name] = 2 * (x - low) / (high - low + 1e-6) - 1

    def write(**changes):
        train = dict(states=scaled["obs"], actions=scaled["action"], traj_lengths=np.array([5, 4]))
        for key, value in changes.items():
            (stats if key in stats else train)[key] = value
        for name, arrays in ("train", train), ("normalization", stats):
            np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in arrays.items() if v is not None})
        return tmp_path / "train.npz"

    write.raw = raw
    return write


def message(source):
    with pytest.raises(DatasetError) as error:
        load(source)
    text = str(error.value)
    assert str(source) in text or "normalization.npz" in text
    assert "\n" not in text
    return text


def test_d4rl_round_trip(tmp_path, d4rl_arrays):
    data = load(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))
    for key in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(data, key), d4rl_arrays[key])
        assert getattr(data, key).dtype == np.float32
    assert data.episode_ends.tolist() == [5, 9]
    r = d4rl_arrays["rewards"]
    np.testing.assert_allclose(data.returns(), [r[:5].sum(), r[5:].sum()], rtol=1e-6)
    assert data.normalization is None


def test_d4rl_file_that_stops_inside_an_episode_ends_it_there(tmp_path, d4rl_arrays):
    d4rl_arrays["timeouts"][:] = False
    assert load(write_hdf5(tmp_path / "a.h5", d4rl_arrays)).episode_ends.tolist() == [5, 9]
    d4rl_arrays["terminals"][:] = False
    assert load(write_hdf5(tmp_path / "b.h5", d4rl_arrays)).episode_ends.tolist() == [9]


@pytest.mark.parametrize("key", dataset.KEYS)
def test_d4rl_file_without_a_key_is_refused_with_the_key(tmp_path, d4rl_arrays, key):
    del d4rl_arrays[key]
    assert f"lacks {key}" in message(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_d4rl_file_with_a_non_finite_number_is_refused_with_key_and_step(tmp_path, d4rl_arrays, key, value):
    d4rl_arrays[key][6] = value
    assert f"{key} contain NaN or Inf, first at step 6" in message(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_truncated_hdf5_is_refused(tmp_path, d4rl_arrays, keep):
    path = write_hdf5(tmp_path / "a.hdf5", d4rl_arrays)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert "cannot be read as HDF5, is it truncated?" in message(path)


@pytest.mark.parametrize("key, shape", [
    ("observations", (9,)), ("observations", (9, 3, 1)), ("actions", (8, 2)), ("actions", (9,)),
    ("rewards", (9, 1)), ("rewards", (4,)), ("terminals", (7,)), ("timeouts", (9, 1)),
])  # fmt: skip
def test_d4rl_file_of_wrong_shapes_is_refused_with_the_shape(tmp_path, d4rl_arrays, key, shape):
    d4rl_arrays[key] = np.zeros(shape, d4rl_arrays[key].dtype)
    assert f"{key} {shape}" in message(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))


@pytest.mark.parametrize("value", [np.float32(1.0), np.array([b"text"] * 9), None])
@pytest.mark.parametrize("key", dataset.KEYS)
def test_d4rl_file_without_numbers_in_an_array_is_refused(tmp_path, d4rl_arrays, key, value):
    path = write_hdf5(tmp_path / "a.hdf5", {k: v for k, v in d4rl_arrays.items() if k != key})
    with h5py.File(path, "a") as file:
        if value is None:
            file.create_group(key)
        else:
            file[key] = value
    message(path)


def test_empty_d4rl_file_is_refused(tmp_path, d4rl_arrays):
    path = write_hdf5(tmp_path / "a.hdf5", {key: value[:0] for key, value in d4rl_arrays.items()})
    assert "same number of steps" in message(path)


def test_dppo_round_trip(dppo):
    data = load(dppo())
    np.testing.assert_allclose(data.observations, dppo.raw[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.actions, dppo.raw[1], rtol=1e-5, atol=1e-6)
    assert data.episode_ends.tolist() == [5, 9]
    assert data.rewards is None
    np.testing.assert_array_equal(data.normalization["obs_min"], dppo.raw[0].min(0))
    np.testing.assert_array_equal(data.normalization["action_max"], dppo.raw[1].max(0))


def test_dppo_rewards_are_kept(dppo):
    np.testing.assert_allclose(load(dppo(rewards=np.arange(9))).returns(), [0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8])


@pytest.mark.parametrize("key", ["states", "actions", "traj_lengths", "obs_min", "action_max"])
def test_dppo_file_without_a_key_is_refused_with_the_key(dppo, key):
    assert f"lacks {key}" in message(dppo(**{key: None}))


@pytest.mark.parametrize("key, named", [
    ("states", "observations"), ("actions", "actions"), ("obs_min", "observations"),
])  # fmt: skip
def test_dppo_file_with_nan_is_refused_with_the_array(dppo, key, named):
    value = np.full({"states": (9, 3), "actions": (9, 2), "obs_min": (3,)}[key], np.nan, np.float32)
    assert f"{named} contain NaN or Inf, first at step 0" in message(dppo(**{key: value}))


@pytest.mark.parametrize("lengths", [[5, 5], [9, 0], [5, 3], [10, -1], []])
def test_dppo_episode_lengths_that_do_not_fit_the_steps_are_refused(dppo, lengths):
    assert "episode lengths do not add up to the 9 steps" in message(dppo(traj_lengths=np.array(lengths, int)))


@pytest.mark.parametrize("key, shape, named", [
    ("obs_min", (4,), "obs_min and obs_max"), ("action_max", (1,), "action_min and action_max"),
    ("states", (9,), "obs_min and obs_max"),
])  # fmt: skip
def test_dppo_normalization_of_wrong_shape_is_refused(dppo, key, shape, named):
    assert f"{named} do not fit" in message(dppo(**{key: np.zeros(shape, np.float32)}))


@pytest.mark.parametrize("key", ["states", "actions", "traj_lengths", "obs_min"])
def test_dppo_file_with_texts_in_place_of_numbers_is_refused(dppo, key):
    shape = {"states": (9, 3), "actions": (9, 2), "traj_lengths": (2,), "obs_min": (3,)}[key]
    message(dppo(**{key: np.full(shape, "text")}))


def test_dppo_actions_of_another_length_are_refused(dppo):
    assert "actions (8, 2)" in message(dppo(actions=np.zeros((8, 2), np.float32)))


def test_dppo_without_its_normalization_is_refused(dppo):
    path = dppo()
    path.with_name("normalization.npz").unlink()
    assert "normalization.npz must lie beside it" in message(path)


@pytest.mark.parametrize("name", ["train", "normalization"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_truncated_npz_is_refused(dppo, name, keep):
    path = dppo()
    file = path.with_name(f"{name}.npz")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    assert any(word in message(path) for word in ("truncated", "damaged"))


def test_npz_of_damaged_content_is_refused(dppo):
    path = dppo()
    content = bytearray(path.read_bytes())
    for i in range(150, 190):  # inside the first array; the archive's checksum no longer fits
        content[i] ^= 0xFF
    path.write_bytes(content)
    assert "damaged" in message(path)


def test_bomb_explodes_where_it_is_unpickled():
    pickle.loads(pickle.dumps(Bomb()))
    assert LOADED.pop() == 1


@pytest.mark.parametrize("key", ["states", "obs_max"])
def test_npz_with_pickled_objects_is_refused_and_not_unpickled(dppo, key):
    value = np.empty(1, object)
    value[0] = Bomb()
    assert "pickled objects, which are never loaded" in message(dppo(**{key: value}))
    assert LOADED == []


@pytest.mark.parametrize("suffix", [".pkl", ".npz"])
def test_pickle_file_is_refused_and_not_unpickled(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    assert any(word in message(path) for word in ("unknown format", "pickled objects"))
    assert LOADED == []


def test_array_file_in_place_of_an_archive_is_refused(tmp_path):
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "cannot be read as .npz" in message(tmp_path / "data.npz")


@pytest.mark.parametrize("name", ["gone.hdf5", "gone.h5", "gone.npz"])
def test_missing_file_is_refused(tmp_path, name):
    assert "no such file" in message(tmp_path / name)


def write_minari(monkeypatch, tmp_path, observations):
    """A Minari dataset of two episodes, of 3 and 2 steps, below tmp_path; returns its id."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    if isinstance(observations[0], dict):
        space = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (3,), np.float32)})
    else:
        space = spaces.Box(-np.inf, np.inf, observations[0].shape[1:], np.float32)
    buffers = []
    for i, (obs, steps) in enumerate(zip(observations, (3, 2), strict=True)):
        actions = np.arange(2 * steps, dtype=np.float32).reshape(steps, 2) / 10 + i
        done = [False] * (steps - 1) + [True]
        buffers.append(EpisodeBuffer(id=i, observations=obs, actions=actions, rewards=[1.0 + i] * steps,
                                     terminations=done, truncations=[False] * steps))  # fmt: skip
    minari.create_dataset_from_buffers(
        "rldt/tiny-v0", buffers, observation_space=space, action_space=spaces.Box(-9, 9, (2,), np.float32),
        algorithm_name="test", author="test", author_email="test@test", code_permalink="https://test",
        description="test",
    )  # fmt: skip
    return "rldt/tiny-v0"


def test_minari_round_trip_by_id_and_by_folder(monkeypatch, tmp_path):
    observations = [np.arange(3.0 * n, dtype=np.float32).reshape(n, 3) for n in (4, 3)]  # with the last next state
    name = write_minari(monkeypatch, tmp_path, observations)
    for source in (name, tmp_path / "minari" / name, tmp_path / "minari" / name / "data"):
        data = load(source)
        np.testing.assert_array_equal(data.observations, np.concatenate([observations[0][:3], observations[1][:2]]))
        np.testing.assert_allclose(data.actions[:, 0], [0, 0.2, 0.4, 1, 1.2], rtol=1e-6)
        assert data.episode_ends.tolist() == [3, 5]
        assert data.returns().tolist() == [3, 4]


def test_minari_dataset_without_flat_observations_is_refused(monkeypatch, tmp_path):
    name = write_minari(monkeypatch, tmp_path, [{"x": np.zeros((n, 3), np.float32)} for n in (4, 3)])
    assert "not flat arrays" in message(name)


def test_unknown_minari_name_and_other_folders_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert "Minari cannot load it" in message("nobody/nothing-v3")
    assert "Minari cannot load it" in message(tmp_path)


def make(tmp_path, name, seed=0, **changes):
    # Walker2d: its demonstrator and Hopper's are the same code
    fields = dict(env_id="Walker2d-v4", steps=95, num_envs=4, seed=seed, out=tmp_path / name) | changes
    return dataset.make(dataset.Args(**fields))


def contents(path):
    with h5py.File(path, "r") as file:
        return {key: file[key][()] for key in file}


def test_recorded_demonstrations_are_the_same_for_the_same_seed(tmp_path):
    first, second, other = (contents(make(tmp_path, f"{n}.hdf5", seed)) for n, seed in enumerate((0, 0, 1)))
    for key in dataset.KEYS:
        np.testing.assert_array_equal(first[key], second[key])
    assert np.abs(first["observations"] - other["observations"]).max() > 0
    assert np.abs(first["actions"] - other["actions"]).max() > 0


def test_recording_leaves_the_random_stream_of_a_run_as_it_was(tmp_path):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    make(tmp_path, "a.hdf5")
    assert torch.equal(torch.randn(3), expected)


def test_recorded_demonstrations_are_a_d4rl_file_of_as_many_steps_as_asked(tmp_path):
    path = make(tmp_path, "a.hdf5")
    arrays = contents(path)
    assert set(arrays) == set(dataset.KEYS)
    assert {len(v) for v in arrays.values()} == {95}
    assert arrays["terminals"].dtype == arrays["timeouts"].dtype == bool
    assert np.abs(arrays["actions"]).max() <= 1
    assert not (arrays["terminals"] & arrays["timeouts"]).any()
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    assert {24, 48, 72, 95} <= set(ends.tolist())  # 4 environments of 24 steps, the last one cut at 95
    assert load(path).episode_ends.tolist() == ends.tolist()
    assert not list(tmp_path.glob("*.partial"))


def test_recorded_observations_follow_from_the_recorded_actions(tmp_path):
    arrays = contents(make(tmp_path, "a.hdf5", num_envs=1, steps=20))
    envs = VectorEnv("Walker2d-v4", 1)
    envs.reset(0)
    for t in range(20):
        np.testing.assert_array_equal(arrays["observations"][t], envs.obs[0])
        step = envs.step(arrays["actions"][t][None, None])
        assert arrays["rewards"][t] == pytest.approx(step.reward[0], rel=1e-6)


def test_noise_zero_records_the_mean_action(tmp_path):
    first, second = (contents(make(tmp_path, f"{n}.hdf5", noise=0.0, num_envs=1, steps=5)) for n in range(2))
    noisy = contents(make(tmp_path, "noisy.hdf5", num_envs=1, steps=5))
    np.testing.assert_array_equal(first["actions"], second["actions"])
    np.testing.assert_array_equal(first["observations"][0], noisy["observations"][0])
    assert np.abs(first["actions"][0] - noisy["actions"][0]).max() > 1e-3


def test_recording_a_task_without_a_demonstrator_names_the_way_out(tmp_path):
    with pytest.raises(DatasetError, match=r"No demonstrator for Ant-v4.*--dataset"):
        make(tmp_path, "a.hdf5", env_id="Ant-v4")


def test_demonstrations_of_other_sizes_than_the_task_are_refused(tmp_path, d4rl_arrays):
    path = str(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))
    with pytest.raises(DatasetError, match=r"a\.hdf5: .* sizes \(3, 2\) are not Hopper-v4's \(11, 3\)"):
        dataset.get("Hopper-v4", path, VectorEnv("Hopper-v4", 1))


def test_demonstrations_are_those_given_or_recorded_when_first_needed(tmp_path, monkeypatch):
    envs, recorded, make_file = VectorEnv("Walker2d-v4", 1), [], dataset.make

    def make_few(args):
        recorded.append(args.env_id)
        args.steps, args.out = 95, tmp_path / "Walker2d-v4" / "medium.hdf5"
        with monkeypatch.context() as patch:
            patch.setattr(dataset, "DEMOS", shipped)
            return make_file(args)

    shipped = dataset.DEMOS
    given = make(tmp_path, "given.hdf5", steps=40)
    monkeypatch.setattr(dataset, "DEMOS", tmp_path)
    monkeypatch.setattr(dataset, "make", make_few)
    for _ in range(2):
        assert len(dataset.get("Walker2d-v4", None, envs).observations) == 95
    assert recorded == ["Walker2d-v4"]
    assert len(dataset.get("Walker2d-v4", str(given), envs).observations) == 40
