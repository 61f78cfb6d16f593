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
    """Writes train.npz and normalization.npz, with other arrays where given; None leaves one out."""
    rng = np.random.default_rng(1)
    obs = rng.normal(2, 3, (9, 3)).astype(np.float32)
    action = rng.uniform(-0.5, 0.4, (9, 2)).astype(np.float32)
    train, normalization = dict(traj_lengths=np.array([5, 4])), {}
    for name, key, x in ("obs", "states", obs), ("action", "actions", action):
        low, high = x.min(0), x.max(0)
        normalization |= {f"{name}_min": low, f"{name}_max": high}
        train[key] = 2 * (x - low) / (high - low + 1e-6) - 1

    def write(**changes):
        for key, value in changes.items():
            (normalization if key in normalization else train)[key] = value
        for name, arrays in ("train", train), ("normalization", normalization):
            kept = {key: value for key, value in arrays.items() if value is not None}
            np.savez(tmp_path / f"{name}.npz", **kept)
        return tmp_path / "train.npz"

    write.raw = obs, action
    return write


def refusal(source):
    with pytest.raises(DatasetError) as error:
        load(source)
    text = str(error.value)
    assert str(source) in text or "normalization.npz" in text
    assert "\n" not in text
    assert LOADED == []
    return text


# ---------------------------------------------------------------------------------------- D4RL
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_d4rl_file_with_a_non_finite_number_is_refused(tmp_path, d4rl_arrays, key, value):
    d4rl_arrays[key][6] = value
    text = refusal(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))
    assert f"{key} contain NaN or Inf, first at step 6" in text


@pytest.mark.parametrize("key, shape", [
    ("observations", (9,)), ("observations", (9, 3, 1)), ("actions", (8, 2)), ("actions", (9,)),
    ("rewards", (9, 1)), ("rewards", (4,)), ("terminals", (7,)), ("timeouts", (9, 1)),
])  # fmt: skip
def test_d4rl_file_of_wrong_shapes_is_refused(tmp_path, d4rl_arrays, key, shape):
    d4rl_arrays[key] = np.zeros(shape, d4rl_arrays[key].dtype)
    assert f"{key} {shape}" in refusal(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))


@pytest.mark.parametrize("value", [None, np.float32(1.0), np.array([b"text"] * 9), "group"])
@pytest.mark.parametrize("key", dataset.KEYS)
def test_d4rl_file_without_an_array_is_refused(tmp_path, d4rl_arrays, key, value):
    del d4rl_arrays[key]
    path = write_hdf5(tmp_path / "a.hdf5", d4rl_arrays)
    if value is None:
        assert f"lacks {key}" in refusal(path)
        return
    with h5py.File(path, "a") as file:
        if isinstance(value, str):
            file.create_group(key)
        else:
            file[key] = value
    refusal(path)


# ---------------------------------------------------------------------------------------- DPPO
def test_dppo_round_trip(dppo):
    data = load(dppo())
    np.testing.assert_allclose(data.observations, dppo.raw[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.actions, dppo.raw[1], rtol=1e-5, atol=1e-6)
    assert data.episode_ends.tolist() == [5, 9]
    assert data.rewards is None
    np.testing.assert_array_equal(data.normalization["obs_min"], dppo.raw[0].min(0))
    np.testing.assert_array_equal(data.normalization["action_max"], dppo.raw[1].max(0))
    returns = load(dppo(rewards=np.arange(9))).returns()
    np.testing.assert_allclose(returns, [0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8])


NAN, LENGTHS = "contain NaN or Inf, first at step 0", "episode lengths do not add up to the 9 steps"
PICKLED = np.array([Bomb()], object)


@pytest.mark.parametrize("key, value, words", [
    *[(key, None, f"lacks {key}") for key in ("states", "actions", "traj_lengths", "obs_min")],
    ("states", np.full((9, 3), np.nan), f"observations {NAN}"),
    ("obs_min", np.full(3, np.nan), f"observations {NAN}"),
    ("actions", np.full((9, 2), np.nan), f"actions {NAN}"),
    ("actions", np.zeros((8, 2)), "actions (8, 2)"),
    *[("traj_lengths", np.array(n, int), LENGTHS) for n in ([5, 5], [9, 0], [5, 3], [10, -1], [])],
    ("obs_min", np.zeros(4), "obs_min and obs_max do not fit"),
    ("action_max", np.zeros(1), "action_min and action_max do not fit"),
    ("states", np.zeros(9), "obs_min and obs_max do not fit"),
    ("states", np.full((9, 3), "text"), ""), ("actions", np.full((9, 2), "text"), ""),
    ("traj_lengths", np.full(2, "text"), ""), ("obs_min", np.full(3, "text"), ""),
    *[(key, PICKLED, "pickled objects, which are never loaded") for key in ("states", "obs_max")],
])  # fmt: skip
def test_dppo_file_with_a_wrong_array_is_refused(dppo, key, value, words):
    assert words in refusal(dppo(**{key: value}))


# ------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("name", ["a.hdf5", "train.npz", "normalization.npz"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path, dppo, d4rl_arrays, name, keep):
    write_hdf5(tmp_path / "a.hdf5", d4rl_arrays)
    dppo()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content))])
    text = refusal(tmp_path / ("a.hdf5" if name == "a.hdf5" else "train.npz"))
    assert "truncated" in text or "damaged" in text


def test_bomb_explodes_where_it_is_unpickled():
    pickle.loads(pickle.dumps(Bomb()))
    assert LOADED.pop() == 1


@pytest.mark.parametrize("suffix, words", [(".pkl", "unknown format"), (".npz", "pickled objects")])
def test_pickle_file_is_refused_and_not_unpickled(tmp_path, suffix, words):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    assert words in refusal(path)


def test_missing_files_and_arrays_in_place_of_archives_are_refused(tmp_path, dppo):
    path = dppo()
    path.with_name("normalization.npz").unlink()
    assert "normalization.npz" in refusal(path)
    for name in "gone.hdf5", "gone.h5", "gone.npz":
        assert "no such file" in refusal(tmp_path / name)
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "cannot be read as .npz" in refusal(tmp_path / "data.npz")


# -------------------------------------------------------------------------------------- Minari
def write_minari(monkeypatch, tmp_path, observations, space):
    """A Minari dataset of two episodes, of 3 and 2 steps, below tmp_path; returns its id."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = []
    for i, (obs, steps) in enumerate(zip(observations, (3, 2), strict=True)):
        actions = np.arange(2 * steps, dtype=np.float32).reshape(steps, 2) / 10 + i
        done = [False] * (steps - 1) + [True]
        buffers.append(EpisodeBuffer(id=i, observations=obs, actions=actions, rewards=[1.0 + i] * steps,
                                     terminations=done, truncations=[False] * steps))  # fmt: skip
    minari.create_dataset_from_buffers(
        "rldt/tiny-v0", buffers, observation_space=space, algorithm_name="test", author="test",
        action_space=spaces.Box(-9, 9, (2,), np.float32), author_email="test@test",
        code_permalink="https://test", description="test",
    )  # fmt: skip
    return "rldt/tiny-v0"


BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_round_trip_by_id_and_by_folder(monkeypatch, tmp_path):
    # each episode with its last next state
    observations = [np.arange(3.0 * n, dtype=np.float32).reshape(n, 3) for n in (4, 3)]
    name = write_minari(monkeypatch, tmp_path, observations, BOX)
    expected = np.concatenate([observations[0][:3], observations[1][:2]])
    for source in (name, tmp_path / "minari" / name, tmp_path / "minari" / name / "data"):
        data = load(source)
        np.testing.assert_array_equal(data.observations, expected)
        np.testing.assert_allclose(data.actions[:, 0], [0, 0.2, 0.4, 1, 1.2], rtol=1e-6)
        assert data.episode_ends.tolist() == [3, 5]
        assert data.returns().tolist() == [3, 4]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_minari_datasets_and_folders_are_refused(monkeypatch, tmp_path):
    observations = [{"x": np.zeros((n, 3), np.float32)} for n in (4, 3)]
    name = write_minari(monkeypatch, tmp_path, observations, spaces.Dict({"x": BOX}))
    assert "not flat arrays" in refusal(name)
    assert "Minari cannot load it" in refusal("nobody/nothing-v3")
    assert "Minari cannot load it" in refusal(tmp_path)


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


def test_a_task_without_a_demonstrator_names_the_way_out(tmp_path):
    with pytest.raises(DatasetError, match=r"No demonstrator for Ant-v4.*--dataset"):
        make(tmp_path, "a.hdf5", env_id="Ant-v4")


def test_demonstrations_of_other_sizes_than_the_task_are_refused(tmp_path, d4rl_arrays):
    path = str(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays))
    with pytest.raises(DatasetError, match=r"a\.hdf5: .* sizes \(3, 2\) are not Hopper-v4's \(11, 3\)"):
        dataset.get("Hopper-v4", path, VectorEnv("Hopper-v4", 1))


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
