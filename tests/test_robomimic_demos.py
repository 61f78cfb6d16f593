import functools
import json
import shutil
from contextlib import closing

import h5py
import numpy as np
import pytest

from demos import make_robomimic_demos as maker
from demos.make_robomimic_demos import Args, make, render_images, run_episode
from demos.robomimic import DatasetError, limits, load
from envs.robomimic import IMAGE_SIZE, TASKS, choose_renderer, control_step, import_robomimic

EPISODES = 3
LIFT_KEYS = TASKS["lift"].state_keys(False)


@pytest.fixture(scope="module", autouse=True)
def _renderer():
    choose_renderer(log=lambda text: None)  # before robosuite is imported


@pytest.fixture(scope="module")
def environment():
    """Environments without images, each built once."""
    build = maker.make_robosuite  # which a test replaces
    return functools.cache(lambda task: build(task, images=False))


@pytest.fixture(scope="module")
def lift_file(environment, tmp_path_factory):
    """Three episodes of Lift, one of them for validation; copy it before changing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker, "make_robosuite", lambda task, images: environment(task))
        patch.setattr(maker, "VALID", 0.34)
        out = tmp_path_factory.mktemp("demos") / "lift.hdf5"
        return make(Args(task="lift", episodes=EPISODES, seed=5, out=out))


@pytest.fixture(scope="module")
def short_file(lift_file):
    """The first 12 steps of two episodes of Lift, which are quick to render."""
    path = lift_file.with_name("short.hdf5")
    shutil.copy(lift_file, path)
    with h5py.File(path, "r+") as file:
        del file["mask"], file["data/demo_2"]
        for demo in file["data"].values():
            for name in ("states", "actions", "rewards", *(f"obs/{key}" for key in LIFT_KEYS)):
                value = demo[name][-12:] if name == "rewards" else demo[name][:12]
                del demo[name]
                demo[name] = value
    return path


@pytest.fixture(scope="module")
def image_file(short_file):
    return render_images(short_file, short_file.with_name("image.hdf5"))


def pixels(path):
    """agentview of both demonstrations of a file, (T, 96, 96, 3) each."""
    with h5py.File(path) as file:
        return [file[f"data/demo_{i}/obs/agentview_image"][()] for i in (0, 1)]


SOLVED = {"can": (0, 2), "square": (0, 1), "transport": (0,)}  # lift: see lift_file


@pytest.mark.parametrize(("task", "seed"), [(task, seed) for task in SOLVED for seed in SOLVED[task]])
def test_expert_solves_the_task(environment, task, seed):
    episode = run_episode(environment(task), task, seed)
    steps, spec = len(episode["actions"]), TASKS[task]
    assert steps < spec.horizon and episode["actions"].shape == (steps, 7 * spec.robots)
    assert np.abs(episode["actions"]).max() <= 1
    last = np.arange(steps - maker.STEPS_AFTER_SUCCESS - 1, steps)
    np.testing.assert_array_equal(np.flatnonzero(episode["rewards"]), last)  # an early stop
    for key in spec.state_keys(False):
        np.testing.assert_array_equal(episode["obs"][key][1:], episode["next_obs"][key][:-1])
    assert len(episode["states"]) == len(episode["obs"]["object"]) == steps


def test_robomimic_reads_the_file(environment, lift_file):
    environment("lift")  # tells robomimic which keys there are
    import_robomimic()
    from robomimic.utils.dataset import SequenceDataset

    settings = dict(dataset_keys=["actions"], load_next_obs=True, filter_by_attribute="train")
    data = SequenceDataset(str(lift_file), LIFT_KEYS, seq_length=1, **settings)
    with closing(data.hdf5_file) as file:
        first, second = file["data/demo_0"], file["data/demo_1"]
        assert len(data) == len(first["actions"]) + len(second["actions"])
        item = data[len(first["actions"]) + 7]
        np.testing.assert_array_equal(item["actions"][0], second["actions"][7])
        for kind in ("obs", "next_obs"):
            for key in LIFT_KEYS:
                np.testing.assert_array_equal(item[kind][key][0], second[kind][key][7])


def test_load_reads_the_file(lift_file):
    read = lambda **choice: load(lift_file, "lift", images=False, **choice)
    data = read()
    with h5py.File(lift_file) as file:
        demos = [file[f"data/demo_{i}"] for i in range(3)]
        actions = [demo["actions"][()] for demo in demos]
        np.testing.assert_array_equal(data["action"], np.concatenate(actions[:2]))
        states = [np.concatenate([demo["obs"][key] for key in LIFT_KEYS], 1) for demo in demos]
        np.testing.assert_array_equal(data["state"], np.concatenate(states[:2]))
    assert data["episode_ends"].tolist() == np.cumsum([len(actions[0]), len(actions[1])]).tolist()
    np.testing.assert_array_equal(read(split="valid")["action"], actions[2])
    np.testing.assert_array_equal(read(max_episodes=1)["action"], actions[0])


def test_images_are_those_of_the_environment(image_file, tmp_path):
    env = maker.make_robosuite("lift", images=True)  # after image_file: it renders in the newest context
    sim = env.env
    with closing(sim), h5py.File(image_file) as file:
        demo = file["data/demo_1"]
        images = demo["obs/agentview_image"][()]
        assert images.shape == (12, IMAGE_SIZE, IMAGE_SIZE, 3) and images.dtype == np.uint8
        np.random.seed(int(demo.attrs["seed"]))  # noqa: NPY002
        np.testing.assert_array_equal(images[0], env.reset()["agentview_image"])
        for action in demo["actions"][:11]:
            control_step(sim, action, observe=False)
        sim.sim.forward()
        expected = sim.sim.render(height=IMAGE_SIZE, width=IMAGE_SIZE, camera_name="agentview")[::-1]
        different = (images[11] != expected).any(-1).mean()
        assert different < 1e-3  # the state in the file is rounded
        assert (images[0] != expected).any(-1).mean() > 0.02
    data = load(image_file, "lift", images=True)
    np.testing.assert_array_equal(data["rgb"], np.concatenate(pixels(image_file)).transpose(0, 3, 1, 2))
    assert data["state"].shape == (24, 9)
    states = load(image_file, "lift", images=False)["state"]
    np.testing.assert_array_equal(np.concatenate([data["state"], data["object"]], 1), states)
    of_states = limits(load(image_file, "lift", images=False))["obs_max"]
    found = limits(data)["object_max"]
    np.testing.assert_array_equal(found[found > 0.1], of_states[9:][found > 0.1])  # no widened ones
    load(image_file, "lift", images=True, fast_render=True)
    with pytest.raises(DatasetError, match="rendered without shadows"):
        load(image_file, "lift", images=True, fast_render=False)
    theirs = shutil.copy(image_file, tmp_path)
    with h5py.File(theirs, "r+") as file:
        del file["data"].attrs["fast_render"]  # as robomimic's own tool, which renders shadows
    with pytest.raises(DatasetError, match="rendered with shadows"):
        load(theirs, "lift", images=True, fast_render=True)


def test_a_file_with_its_own_model_is_rendered_with_that(environment, image_file, short_file, tmp_path):
    sim = environment("lift").env.sim
    cube = sim.model.geom_name2id("cube_g0_vis")
    xml = sim.model.get_xml()
    size = " ".join(f"{x:.6g}" for x in sim.model.geom_size[cube])
    assert xml.count(size) >= 1

    def give_models(file):
        file["data/demo_0"].attrs["model_file"] = xml
        file["data/demo_1"].attrs["model_file"] = xml.replace(size, "0.04 0.04 0.04")

    changed = damage(short_file, tmp_path / "own.hdf5", give_models)
    own = pixels(render_images(changed, tmp_path / "image.hdf5"))
    same, larger = [(a != b).any(-1).mean() for a, b in zip(own, pixels(image_file), strict=True)]
    assert same < 1e-3 and larger > 3e-3


def damage(path, copy, change):
    """A changed copy of an HDF5 file."""
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        change(file)
    return copy


def replace(name, value):
    """A change that replaces a dataset by value(old)."""

    def change(file):
        new = value(file[name][()])
        del file[name]
        file[name] = new

    return change


def change_meta(change):
    def apply(file):
        meta = json.loads(file["data"].attrs["env_args"])
        file["data"].attrs["env_args"] = json.dumps(change(meta) or meta)

    return apply


def controllers(value):
    return change_meta(lambda meta: meta["env_kwargs"].update(controller_configs=value))


OBJECT = "data/demo_1/obs/object"
ERRORS = {
    "other task": (lambda file: None, dict(task="square"), "Lift"),
    "no metadata": (lambda file: file["data"].attrs.pop("env_args"), {}, "env_args"),
    "metadata in a list": (change_meta(lambda meta: [meta]), {}, "env_args are no metadata"),
    "list of controllers": (controllers([{}, {}]), {}, "list of controllers"),
    "other controller": (controllers({"control_delta": False}), {}, "control_delta False, not True"),
    "shaped rewards": (
        change_meta(lambda meta: meta["env_kwargs"].update(reward_shaping=True)), {}, "shaping True, n",
    ),
    "missing key": (lambda file: file["data/demo_1/obs"].pop("object"), {}, f"lacks {OBJECT}"),
    "other width": (replace(OBJECT, lambda x: x[:, :9]), {}, ", 9) should be ("),
    "missing images": (lambda file: None, dict(images=True), "--images-from"),
    "no success": (replace("data/demo_2/rewards", np.zeros_like), dict(split="valid"), "(1 failed)"),
    "nan observation": (replace(OBJECT, lambda x: x * np.nan), {}, f"{OBJECT} contains NaN"),
    "nan action": (replace("data/demo_0/actions", lambda x: x * np.nan), {}, "actions contains NaN"),
    "absolute poses": (replace("data/demo_0/actions", lambda a: a * 0 + 3.14), {}, "an action is 3.14"),
    "short actions": (replace("data/demo_0/actions", lambda a: a[:, :6]), {}, "(40, 6) should be ("),
    "fewer actions": (replace("data/demo_0/actions", lambda a: a[:-1]), {}, "(40,) should be (39,)"),
    "unknown split": (lambda file: None, dict(split="test"), "mask/test is missing or empty"),
    "empty mask": (replace("mask/train", lambda names: names[:0]), {}, "mask/train is missing or empty"),
    "unknown demo": (lambda file: file["data"].pop("demo_1"), {}, "mask/train names demo_1, which"),
}


def message(path, task="lift", images=False, split=None):
    with pytest.raises(DatasetError) as error:
        load(path, task, images, split=split)
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize("name", ERRORS)
def test_load_says_what_is_wrong(lift_file, tmp_path, name):
    change, arguments, expected = ERRORS[name]
    assert expected in message(damage(lift_file, tmp_path / "a.hdf5", change), **arguments)


def test_odd_names_and_missing_rewards_do_no_harm(lift_file, tmp_path):
    def change(file):
        del file["mask"], file["data/demo_0/rewards"]
        file["data/demo_1/rewards"][3] = np.nan
        file.move("data/demo_0", "data/the first")

    data = load(damage(lift_file, tmp_path / "a.hdf5", change), "lift", images=False)
    first = load(lift_file, "lift", images=False)["action"]
    assert len(data["episode_ends"]) == EPISODES
    np.testing.assert_array_equal(data["action"][: len(first)], first)
    np.testing.assert_array_equal(limits(data)["obs_min"], np.minimum(data["state"].min(0), 0))
    np.testing.assert_array_equal(limits(data)["action_max"], np.maximum(data["action"].max(0), 0))


@pytest.mark.parametrize("change, expected", [
    (lambda x: x[:, ::2, ::2], "(12, 48, 48, 3) should be (12, 96, 96, 3)"),
    (lambda x: x / np.float32(255), "holds float32, not uint8"), (lambda x: x[:-3], "(9, 96, 96, 3)"),
])  # fmt: skip
def test_load_says_what_is_wrong_with_images(image_file, tmp_path, change, expected):
    change = replace("data/demo_0/obs/agentview_image", change)
    text = message(damage(image_file, tmp_path / "a.hdf5", change), images=True)
    assert expected in text and "--images-from" in text


def test_render_images_says_what_is_wrong(image_file, lift_file, tmp_path):
    door = change_meta(lambda meta: meta | {"env_name": "Door"})
    for change, text in (door, "Door"), (lambda file: file["data/demo_0"].pop("states"), "states"):
        with pytest.raises(DatasetError, match=text):
            render_images(damage(lift_file, tmp_path / "a.hdf5", change), tmp_path / "out.hdf5")
    with pytest.raises(SystemExit, match="another --out"):
        render_images(image_file, image_file)
    assert not (tmp_path / "out.hdf5").exists()
