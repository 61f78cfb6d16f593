import importlib.metadata
import itertools
import subprocess
import sys

import h5py
import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

import envs.furniture_mujoco as module
from common.flow import FlowPolicy
from demos import make_furniture_demos
from demos.furniture_one_leg import OneLeg
from demos.furniture_skills import CLOSED, Arm, Lost, from_rotation_vector
from demos.make_furniture_demos import run_episode, wilson
from envs.furniture_mujoco import (
    FURNITURE,
    HOLES,
    HOME,
    RANDOMNESS,
    FurnitureEnv,
    FurnitureVectorEnv,
    PhysicsError,
    matrix_from_6d,
    rotation,
    rotation_6d,
    rotation_vector,  # fmt: skip
)

TASKS = ("one_leg", "lamp")
# kg/m^3, of the original's sim_config.py
DENSITY = {"top": 498.68, "leg": 369.98, "base": 341.54, "bulb": 545.09, "hood": 762.31}
OBSTACLES = [[0.6815, 0, 0.015], [0.6065, -0.175, 0.015], [0.6065, 0.175, 0.015]]  # front, right, left


@pytest.fixture(scope="module")
def envs():
    """One environment per task and randomness, built once."""
    built = {}

    def get(furniture="one_leg", randomness="low"):
        if (furniture, randomness) not in built:
            built[furniture, randomness] = FurnitureEnv(furniture, randomness)
        return built[furniture, randomness]

    return get


def stay(env) -> np.ndarray:
    """The action that holds the present pose, fingers open."""
    position, matrix = env.ee_pose()
    return np.array([*position, *rotation_6d(matrix), -1])


def wander(env, rng, steps: int) -> list[np.ndarray]:
    return [stay(env) + rng.normal(0, 0.02, 10) for _ in range(steps)]


# ----------------------------------------------------------------------------------- interface
@pytest.mark.parametrize("furniture", TASKS)
def test_observation_layout(envs, furniture):
    env = envs(furniture)
    env.reset(seed=3)
    for action in wander(env, np.random.default_rng(0), 4):
        obs = env.step(action)[0]
    before, dt = env.ee_pose(), 1e-5
    velocity, angular = obs[9:12], obs[12:15]
    hand, model, data = Rotation.from_matrix(before[1]), env.model, env.data
    np.testing.assert_allclose(obs[:3], before[0], atol=1e-6)
    np.testing.assert_allclose(obs[3:9], hand.as_matrix()[:2].ravel(), atol=1e-6)
    np.testing.assert_allclose(obs[15], data.qpos[7] + data.qpos[8], atol=1e-6)
    tag = np.eye(4)
    tag[:3, :3] = Rotation.from_euler("xyz", [np.pi, 0, np.pi / 2]).as_matrix()
    tag[:3, 3] = [0.3015, 0, 0]
    names = [*(part.name for part in FURNITURE[furniture].parts), "front_obstacle"]
    for i, name in enumerate(names):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = data.body(name).xmat.reshape(3, 3), data.body(name).xpos
        pose = np.linalg.inv(tag) @ pose
        seen = obs[16 + 7 * i : 23 + 7 * i]
        np.testing.assert_allclose(seen[:3], pose[:3, 3], atol=1e-6)
        matrix = Rotation.from_quat(seen[3:]).as_matrix()  # x, y, z, w
        np.testing.assert_allclose(matrix, pose[:3, :3], atol=1e-5)
        assert seen[6] >= 0
    assert len(obs) == 16 + 7 * len(names) == {"one_leg": 58, "lamp": 44}[furniture]
    assert obs.dtype == np.float32 and model.nv == 9 + 6 * len(FURNITURE[furniture].parts)
    data.qpos[:7] += dt * data.qvel[:7]  # velocities by finite differences
    env.refresh()
    after = env.ee_pose()
    np.testing.assert_allclose(velocity, (after[0] - before[0]) / dt, atol=1e-3)
    turned = (Rotation.from_matrix(after[1]) * hand.inv()).as_rotvec()
    np.testing.assert_allclose(angular, turned / dt, atol=1e-3)


def test_rotations_agree_with_scipy():
    rng = np.random.default_rng(0)
    for turn in Rotation.random(20, random_state=0):
        matrix = turn.as_matrix()
        for scale in (1, 3):  # rows need not be unit vectors
            np.testing.assert_allclose(matrix_from_6d(rotation_6d(matrix) * scale), matrix, atol=1e-12)
        np.testing.assert_allclose(rotation_vector(matrix), turn.as_rotvec(), atol=1e-9)
        np.testing.assert_allclose(from_rotation_vector(turn.as_rotvec()), matrix, atol=1e-12)
        angles = rng.uniform(-3, 3, 3)
        expected = Rotation.from_euler("xyz", angles).as_matrix()
        np.testing.assert_allclose(rotation(*angles), expected, atol=1e-12)
    assert np.isfinite(matrix_from_6d(np.zeros(6))).all()


def test_actions_are_absolute_poses(envs):
    env = envs()
    env.reset(seed=1)
    position, matrix = env.ee_pose()
    goal, turn = position + [0.03, -0.04, 0.05], matrix @ rotation(0.1, 0.2, 0.3)
    for _ in range(25):
        obs = env.step(np.array([*goal, *rotation_6d(turn), -1]))[0]
    np.testing.assert_allclose(obs[:3], goal, atol=1e-3)
    np.testing.assert_allclose(obs[3:9], turn[:2].ravel(), atol=5e-3)


def test_gripper_closes_on_a_positive_value_beyond_the_margin(envs):
    env = envs()
    env.reset(seed=1)
    action, widths = stay(env), []
    for value in (0.018, 0.5, 0.5, 0.5, -0.018, -0.5, -0.5, -0.5):
        action[9] = value
        env.step(action)
        widths.append(env.gripper_width())
    assert widths[0] > 0.06  # a change of sign within the margin is not one, but then the sign counts
    assert widths[3] < 0.005 and widths[-1] > 0.06


def test_missing_wheel_is_one_line(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(SystemExit, match=r"pip install --no-deps furniture-bench==0\.1$") as error:
        module.build_xml("one_leg")
    assert "\n" not in str(error.value)


def test_rendering():
    code = (
        "from envs.robomimic import choose_renderer; choose_renderer(log=lambda text: None)\n"
        "from envs.furniture_mujoco import FurnitureEnv\n"
        "env = FurnitureEnv('lamp'); env.reset(seed=0); image = env.render()\n"
        "print(image.shape, image.dtype, image.std() > 10)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "(240, 320, 3) uint8 True", result.stderr


# -------------------------------------------------------------------------------------- reward
def put_together(env, second: int, position, matrix):
    """Puts the second part at a pose in the frame of the first, without a step of physics."""
    base, turn = np.array([0.5, 0.0, 0.1]), rotation(0.3, -0.2, 0.5)
    env.place(0, base, turn)
    env.place(second, base + turn @ position, turn @ matrix)
    env.refresh()
    return env.newly_assembled()


UPSIDE_DOWN = rotation(0, 0, np.pi)
ASSEMBLED = {  # furniture, part, and its position and rotation in the frame of the first part
    **{f"hole{i}": ("one_leg", 4, (x, 0.046875, z), np.eye(3)) for i, (x, z) in enumerate(HOLES)},
    "bulb": ("lamp", 1, (0, -0.0678, 0), UPSIDE_DOWN),
    "hood": ("lamp", 2, (0, -0.088324, 0), rotation(1, 2, 3)),
}
PAIR = "furniture", "part", "position", "matrix"


@pytest.mark.parametrize(PAIR, ASSEMBLED.values(), ids=ASSEMBLED)
def test_a_pair_is_rewarded_once_within_the_tolerance(envs, furniture, part, position, matrix):
    env = envs(furniture)
    for axis, sign in itertools.product(range(3), (-1, 1)):
        inside = position + sign * np.full(3, 0.00499)
        outside = inside + sign * 2e-5 * np.eye(3)[axis]
        env.reset(seed=0)
        assert put_together(env, part, outside, matrix) == 0 and env.assembled.sum() == 0
        assert put_together(env, part, inside, matrix) == 1 and env.assembled.sum() == 1
        for place in (inside, outside, inside):
            assert put_together(env, part, place, matrix) == 0  # not again, whatever comes
    assert env.step(stay(env))[4] == {"success": furniture == "one_leg"}


@pytest.mark.parametrize(PAIR, [ASSEMBLED["hole3"], ASSEMBLED["bulb"]], ids=TASKS)
def test_rotation_tolerance_is_a_cosine_of_rows(envs, furniture, part, position, matrix):
    env = envs(furniture)
    for axis, sign in itertools.product(range(3), (-1, 1)):
        env.reset(seed=0)
        for cosine, reward in (0.93999, 0), (0.94001, 1):
            turn = rotation(*(sign * np.arccos(cosine) * np.eye(3)[axis]))
            assert put_together(env, part, position, turn @ matrix) == reward


def test_what_is_rewarded_and_what_is_not(envs):
    env = envs()
    env.reset(seed=0)
    legs = [put_together(env, leg, (0.05625, 0.046875, 0.05625), np.eye(3)) for leg in (1, 2, 3, 4)]
    assert legs == [0, 0, 0, 1]  # only the last has a thread
    lamp = envs("lamp")
    lamp.reset(seed=0)
    assert put_together(lamp, 1, (0, -0.0678, 0), np.eye(3)) == 0  # the bulb must be upside down
    assert put_together(lamp, 2, (0, -0.0834, 0), rotation(1, 2, 3)) == 1  # the hood at any angle
    assert put_together(lamp, 1, (0, -0.0678, 0), UPSIDE_DOWN) == 1
    assert lamp.assembled.all()


# ----------------------------------------------------------------------------------- resetting
RANGES = {"low": (5, 0.02, 0.2, 0.007), "med": (10, 0.04, 0.5, 0.01)}  # joint, obstacle, force, torque
PARTS = {  # multipliers of force and torque, and masses
    "one_leg": ((25, 1, 1, 1, 1), (70, 1, 1, 1, 1), (0.4115, 0.0265, 0.0265, 0.0265, 0.0265)),
    "lamp": ((8, 15, 30), (16, 20, 60), (0.1143, 0.1109, 0.3316)),
}


@pytest.mark.parametrize("randomness", RANGES)
@pytest.mark.parametrize("furniture", PARTS)
def test_randomisation_covers_its_ranges(envs, monkeypatch, furniture, randomness):
    joint, obstacle, force, torque = RANGES[randomness]
    forces, torques, masses = PARTS[furniture]
    env, drawn, calls = envs(furniture, randomness), [], []
    record = lambda blocks: calls.append((blocks, env.data.xfrc_applied[env.parts]))
    monkeypatch.setattr(env, "simulate", record)
    for seed in range(1000):
        calls.clear()
        env.reset(seed=seed)
        (blocks, push), *later = calls
        assert blocks == 1 and not np.any([wrench for _, wrench in later])  # a push takes 1/60 s
        assert not env.data.xfrc_applied.any()
        assert (env.data.ctrl[:7] == env.data.qpos[:7]).all()  # the arm stays
        shift = [env.obstacle_position(i) - pos for i, pos in enumerate(OBSTACLES)]
        drawn.append((env.data.qpos[:7] - HOME, shift, push))
    joints, shifts, pushes = map(np.array, zip(*drawn, strict=True))
    assert np.ptp(shifts, axis=1).max() < 1e-12 and not shifts[..., 2].any()  # the obstacle moves as one
    assert not pushes[..., 2:5].any()  # horizontal forces, vertical torques
    # What accelerates the hulls' masses as it does the parts'.
    pushes *= (masses / env.model.body_mass[env.parts])[:, None]
    size = np.linalg.norm(pushes[..., :2], axis=2)
    strength = size / (force * np.array(forces))
    toward = (pushes[..., :2] / size[..., None]).reshape(1000, -1)
    turns = pushes[..., 5] / (torque * np.array(torques))
    signed = np.hstack([joints / np.radians(joint), shifts[:, 0, :2] / obstacle, turns, toward])
    assert strength.max() < 1 and (strength.max(0) > 0.985).all()
    assert np.abs(signed).max() < 1 + 1e-9
    assert (signed.max(0) > 0.985).all() and (signed.min(0) < -0.985).all()
    every = np.hstack([strength, signed]).T
    assert np.abs(np.corrcoef(every) - np.eye(len(every))).max() < 0.15  # each is drawn on its own


@pytest.mark.parametrize("randomness", ["low", "med"])
def test_pushes_of_a_reset_move_the_parts(envs, randomness):
    env, ranges, speed, spin = envs("one_leg", randomness), RANDOMNESS[randomness], [], []
    for seed in range(60):
        env.reset(seed=seed)
        speed.append([np.linalg.norm(joint.qvel[:2]) for joint in env.joints])
        spin.append(abs(env.joints[0].qvel[4]))  # around the top's y axis, which is vertical
    parts = FURNITURE["one_leg"].parts
    masses = [part.hull_mass for part in parts]
    push = ranges["force"] * np.array(FURNITURE["one_leg"].force) / masses / 60  # m/s, without friction
    fastest = np.sort(speed, 0)[-6]  # a hand that starts inside the top throws it; that is rare
    assert (fastest < push).all() and (fastest > 0.4 * push).all()
    inertia = masses[0] * (2 * 0.08125) ** 2 / 6  # of a square plate
    assert 0.3 < np.sort(spin)[-6] * inertia / (ranges["torque"] * 70 / 60) < 1


@pytest.mark.parametrize("furniture", TASKS)
def test_hull_masses_are_those_of_the_meshes(envs, furniture):
    model = envs(furniture).model
    for part in FURNITURE[furniture].parts:
        mesh = model.mesh(part.name).id
        start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        volume = ConvexHull(model.mesh_vert[start : start + count]).volume
        assert volume * DENSITY[part.name.rstrip("1234")] == pytest.approx(part.hull_mass, rel=0.01)


def test_episodes_repeat_bit_for_bit(envs):
    first, second = envs(), FurnitureEnv()
    actions, states = None, []
    for env, seed in ((first, 5), (first, 6), (second, 5), (first, 5)):
        obs = [env.reset(seed=seed)[0]]
        actions = actions or wander(env, np.random.default_rng(0), 6)
        states.append(np.array(obs + [env.step(action)[0] for action in actions]))
    np.testing.assert_array_equal(states[0], states[2])
    np.testing.assert_array_equal(states[0], states[3])
    assert (states[0] != states[1]).any()


def test_bulb_stays_until_the_hand_is_close(envs):
    env = envs("lamp")
    env.reset(seed=0)
    start = env.part_pose(1)
    for action in wander(env, np.random.default_rng(0), 5):
        env.step(action)
    np.testing.assert_allclose(env.part_pose(1)[0], start[0], atol=1e-3)  # at most within a physics step
    assert env.resting is not None
    env.place(1, env.ee_pose()[0] + [0.029, -0.029, -0.029], np.eye(3))
    env.resting = env.ee_pose()[0] + [0.031, 0, 0], np.eye(3)
    env.step(stay(env))
    assert env.resting is not None
    env.resting = env.ee_pose()[0] + [0.029, -0.029, 0.029], np.eye(3)
    env.step(stay(env))
    assert env.resting is None


# ------------------------------------------------------------------------------------- physics
@pytest.mark.parametrize("furniture", TASKS)
@pytest.mark.parametrize("closes", [False, True])
def test_turning_screws_in_by_the_pitch(envs, furniture, closes):
    """A free screw over its hole, pushed by 0.5 N, goes in by a pitch per clockwise turn, not before."""
    leg = furniture == "one_leg"
    part, start, flip, level = (4, 0.064, 0.0, 0.0156) if leg else (1, -0.0850, np.pi, 0.0172)
    env = envs(furniture)
    model = env.models[True, closes]
    env.reset(seed=0)
    env.resting = None
    turn = module.TAG[0] @ rotation(*FURNITURE[furniture].parts[0].angles)
    center, (x, z) = np.array([0.5, 0.0, level]), FURNITURE[furniture].holes[0]
    upside = rotation(0, 0, flip)
    env.place(part, center + turn @ [x, start, z], turn @ upside @ rotation(0, 1.0, 0))
    env.place(0, center, turn)
    env.refresh()
    body, joint, data = env.parts[part], env.joints[part], env.data
    depth, yaw = [], []
    for step in range(28):
        for _ in range(round(0.1 / model.opt.timestep)):
            env.place(0, center, turn)
            matrix = data.xmat[body].reshape(3, 3)
            sway = joint.qvel[3:] * [1, 0, 1]
            spin = np.clip(4e-3 * (-3 - joint.qvel[4]), -0.03, 0.03) if step >= 8 else 0.0
            upright = 0.3 * np.cross(matrix[:, 1], [0, 0, 1.0])
            torque = matrix @ [0, spin, 0] + upright - 2e-4 * matrix @ sway
            data.xfrc_applied[body] = [0, 0, -0.5, *torque]
            mujoco.mj_step(model, data)
        env.refresh()
        relative, matrix = env.relative_pose(0, part)
        matrix = upside @ matrix
        yaw.append(np.arctan2(matrix[0, 2], matrix[0, 0]))
        depth.append(abs(relative[1]))
    data.xfrc_applied[:] = 0
    depth, turns = np.array(depth), np.unwrap(yaw) / (2 * np.pi)
    turns -= turns[7]
    assert np.ptp(depth[4:8]) < 3e-4 and abs(turns[4:8]).max() < 0.02  # not by itself
    way = (turns < -0.05) & (turns > -0.8)
    assert way.sum() > 4
    slope = np.polyfit(turns[way], depth[way], 1)[0]  # deeper is closer to the first part's origin
    assert slope == pytest.approx(0.00955, rel=0.04)


@pytest.mark.parametrize("furniture", TASKS)
def test_a_control_step_takes_a_tenth_of_a_second(envs, furniture, monkeypatch):
    env = envs(furniture)
    env.reset(seed=0)
    for near in False, True:
        monkeypatch.setattr(env, "near_thread", lambda: near)
        for gripper in -1, 1:
            before, action = env.data.time, stay(env)
            action[9] = gripper
            env.step(action)
            assert env.data.time - before == pytest.approx(0.1)


@pytest.mark.parametrize("value", [np.nan, 1e15])
def test_divergence_is_an_error(envs, value):
    env = FurnitureEnv()
    env.reset(seed=0)
    action = stay(env)
    env.data.qvel[20] = value
    with pytest.raises(PhysicsError, match="diverged in step 0"):
        env.step(action)
    np.testing.assert_array_equal(env.reset(seed=4)[0], envs().reset(seed=4)[0])


def test_a_part_thrown_out_of_the_numbers_range_is_not_near_a_thread(monkeypatch):
    env = FurnitureEnv()
    env.reset(seed=0)
    for *signs, far in itertools.product((-1, 1), (-1, 1), (-1, 1), (1e200, np.inf, np.nan)):
        monkeypatch.setattr(env, "tip", np.array(signs) * far)
        assert not env.near_thread()


def test_an_error_of_mujoco_is_one_of_the_physics(monkeypatch):
    env = FurnitureEnv()
    env.reset(seed=0)

    def stopped(*_):
        raise mujoco.FatalError("mj_makeMesh: no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "mj_step", stopped)
        with pytest.raises(PhysicsError, match="stopped in step 0 of the episode: mj_makeMesh"):
            env.step(stay(env))
    assert np.isfinite(env.reset(seed=1)[0]).all()


@pytest.mark.parametrize("randomness, seeds", [("low", (0, 1, 2)), ("med", (13, 20, 38))])
def test_assembler_succeeds(envs, randomness, seeds):
    for seed in seeds:
        episode = run_episode(envs("one_leg", randomness), OneLeg, seed)
        assert episode["rewards"].sum() == 1 and episode["rewards"][-1] == 1
        assert len(episode["actions"]) == len(episode["state"]) < 450
        assert np.abs(episode["actions"]).max() <= 1
        distance = np.linalg.norm(episode["actions"][:, :3] - episode["state"][:, :3], axis=1)
        assert distance.max() < 0.11


def test_pushes_move_the_hand_but_not_what_is_recorded(envs, monkeypatch):
    env, executed, arms, free = envs(), [], [], []
    step = env.step

    def recorded(action):
        executed.append(action.copy())
        free.append(arms[-1].rough or arms[-1].gripper != CLOSED)
        return step(action)

    monkeypatch.setattr(env, "step", recorded)
    for pushes, sideways in (0.0, 0.0), (0.3, 0.02):
        executed.clear()
        free.clear()
        assembler = lambda arm: arms.append(arm) or OneLeg(arm)
        episode = run_episode(env, assembler, 0, noise=0.0, pushes=pushes)
        away = np.array(executed)[:, :3] - episode["actions"][:, :3]
        assert np.abs(np.array(executed)[:, 3:] - episode["actions"][:, 3:]).max() < 1e-6
        assert np.abs(away[~np.array(free)]).max() < 1e-6  # never a part that is held where it matters
        assert sideways <= np.abs(away[:, :2]).max() <= 2 * sideways + 1e-6
        assert -1e-6 < away[:, 2].min() and sideways <= away[:, 2].max() <= 2 * sideways + 1e-6
        share = (np.abs(away).max(1) > 1e-6).mean()
        assert share == 0 if pushes == 0 else 0.3 < share < 0.95


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_clone_moves_the_hand_for_whole_chunks_and_is_not_recorded(envs, monkeypatch, share):
    env, executed, seen = envs(), [], []
    step = env.step
    monkeypatch.setattr(env, "horizon", 64)
    monkeypatch.setattr(env, "step", lambda action: executed.append(action.copy()) or step(action))

    def clone(state, rng):  # a hand that stays where it is, told from the assembler's by its height
        seen.append(state)
        return np.repeat(np.r_[state[:2], 0.2345, state[3:9], 1.0][None], 8, 0)

    plain = run_episode(env, OneLeg, 0, noise=0.002)
    executed.clear()
    episode = run_episode(env, OneLeg, 0, noise=0.002, clone=clone, clone_share=share)
    executed = np.array(executed)
    moved = np.isclose(executed[:, 2], 0.2345, atol=1e-7)
    turns = moved.reshape(8, 8)
    assert (turns.all(1) | ~turns.any(1)).all() and len(seen) == turns.all(1).sum()
    assert 0 < moved.mean() < 1 if share == 0.4 else moved.mean() == share
    for chunk, state in zip(np.flatnonzero(turns.all(1)), seen, strict=True):
        assert np.array_equal(state, episode["state"][8 * chunk])  # what it sees when its turn begins
    assert (executed[:, 9] == episode["actions"][:, 9]).all()  # the fingers stay the assembler's
    assert (np.abs(executed - episode["actions"])[moved].max(1) > 1e-5).all()
    distance = np.linalg.norm(episode["actions"][:, :3] - episode["state"][:, :3], axis=1)
    assert distance.max() < 0.11  # what is recorded leads back from where the clone has brought the hand
    if share == 0:
        assert all(np.array_equal(episode[name], plain[name]) for name in plain)


def test_recording_follows_a_base_policy_from_its_file(tmp_path):
    args = dict(furniture="lamp", episodes=1, seed=6, clone_share=0.3)
    base = make_furniture_demos.DEMOS / "lamp" / "base_low.safetensors"
    make = lambda **more: make_furniture_demos.make(make_furniture_demos.Args(**args, **more))
    with h5py.File(make(out=tmp_path / "clone.hdf5", clone=base)) as file:
        attributes = file["data"].attrs
        assert (attributes["clone"], attributes["clone_share"]) == (str(base), 0.3)
        recorded = file["data/demo_0/obs/state"][()]
    policy = FlowPolicy.load(base)
    state, noise = recorded[0], np.random.default_rng(5).standard_normal((1, 80), np.float32)
    expected = policy.to_env(policy.sample(policy.normalize(state)[None], torch.from_numpy(noise)))[0]
    clone = make_furniture_demos.load_clone(base, "lamp")
    assert np.array_equal(clone(state, np.random.default_rng(5)), expected)
    plain = run_episode(FurnitureEnv("lamp"), make_furniture_demos.ASSEMBLERS["lamp"], 6)["state"]
    assert np.array_equal(recorded[0], plain[0]) and not np.array_equal(recorded, plain)
    with pytest.raises(SystemExit, match="no-base"):
        make(out=tmp_path / "x.hdf5", clone=tmp_path / "no-base")


@pytest.mark.parametrize("name, value", [
    ("episodes", 0), ("noise", -0.1), ("pushes", -0.1), ("pushes", 1.5), ("clone_share", 1.1),
])  # fmt: skip
def test_settings_of_the_recording_are_checked(name, value, tmp_path):
    with pytest.raises(SystemExit, match="--episodes must be at least 1"):
        make_furniture_demos.make(make_furniture_demos.Args(out=tmp_path / "x.hdf5", **{name: value}))


def test_assembler_notices_a_lost_leg(envs):
    env = envs()
    env.reset(seed=0)
    assembler = OneLeg(Arm(env, np.random.default_rng(0)))
    assembler.arm.gripper = CLOSED
    with pytest.raises(Lost):
        for action in assembler.holding(assembler.arm.go(env.ee_pose(), 10)):
            env.data.qpos[7:9] = 0.0  # closed, with nothing between the fingers
            env.step(action)


def test_demonstrations_are_written(tmp_path, capsys):
    args = make_furniture_demos.Args(episodes=1, seed=2, out=tmp_path / "demos.hdf5")
    with h5py.File(make_furniture_demos.make(args)) as file:
        attributes, demo = file["data"].attrs, file["data/demo_0"]
        found = [attributes[name] for name in ("furniture", "randomness", "backend", "seed")]
        assert found == ["one_leg", "low", "MuJoCo", 2]
        steps = demo.attrs["num_samples"]
        for name, shape in {"actions": (10,), "obs/state": (58,), "rewards": ()}.items():
            assert demo[name].shape == (steps, *shape) and demo[name].dtype == np.float32
        assert demo["rewards"][()].sum() == 1 and np.isfinite(demo["obs/state"][()]).all()
        np.testing.assert_array_equal(demo["obs/state"][0], first_state(int(demo.attrs["seed"])))
    printed = capsys.readouterr().out
    assert "1 of 1 attempts succeeded (100%)" in printed and "95 % interval 21% to 100%" in printed
    np.testing.assert_allclose(wilson(90, 100), (0.8256, 0.9448), atol=1e-4)


# --------------------------------------------------------------------------- vector environment
def vector_envs(num_envs, horizon=None, threads=1):
    return FurnitureVectorEnv(num_envs, "one_leg", "low", horizon, threads)


def chunk_of(vector, rng, length) -> np.ndarray:
    return np.stack([wander(env, rng, length) for env in vector.envs])


def first_state(seed):
    return FurnitureEnv().reset(seed=seed)[0]


def test_vector_environment_agrees_with_single_ones(envs):
    vector, single = vector_envs(3, threads=2), envs()
    vector.reset(7)
    first, rng = vector.obs.copy(), np.random.default_rng(0)
    chunks = [chunk_of(vector, rng, 4) for _ in range(2)]
    steps = [vector.step(chunk) for chunk in chunks]
    np.testing.assert_array_equal(vector.obs, steps[1].next_obs)
    for i in range(3):
        np.testing.assert_array_equal(single.reset(seed=7 + i)[0], first[i])
        for chunk, step in zip(chunks, steps, strict=True):
            for action in chunk[i]:
                state = single.step(action)[0]
            np.testing.assert_array_equal(step.next_obs[i], state)
            found = step.reward[i], step.terminated[i], step.truncated[i], step.score[i], step.length[i]
            assert found == (0, False, False, 0, 4)
    vector.close()


def test_what_is_not_active_stays_as_it_is():
    vector, rng = vector_envs(3, threads=2), np.random.default_rng(0)
    vector.reset(1)
    chunk, before = chunk_of(vector, rng, 2), vector.obs.copy()
    chunk[1] = np.nan  # never read
    step = vector.step(chunk, np.array([True, False, True]))
    np.testing.assert_array_equal(step.next_obs[1], before[1])
    assert step.length.tolist() == [2, 0, 2]
    assert (step.next_obs[[0, 2]] != before[[0, 2]]).any(1).all()
    with pytest.raises(FloatingPointError, match="policy"):
        vector.step(chunk)
    vector.close()


def test_time_limit_and_success_end_episodes_and_the_next_seeds_begin_new_ones(monkeypatch):
    vector, rng = vector_envs(3, horizon=6), np.random.default_rng(0)
    vector.reset(iter([1, 2, 3, 4, 5]))
    assert vector.episode.tolist() == [0, 1, 2]
    step = vector.step(chunk_of(vector, rng, 4))
    assert not (step.terminated | step.truncated).any()
    actions, first = chunk_of(vector, rng, 4), vector.envs[0]
    with monkeypatch.context() as patch:
        patch.setattr(first, "newly_assembled", lambda: float(first.assembled.fill(True) is None))
        step = vector.step(actions)
    assert (step.reward.tolist(), step.score.tolist()) == ([1, 0, 0], [1, 0, 0])
    assert step.terminated.tolist() == [True, False, False]
    assert step.truncated.tolist() == [False, True, True]
    assert step.length.tolist() == [1, 2, 2]
    assert vector.episode.tolist() == [3, 4, -1]  # no seed is left for the last
    for i, seed in enumerate((4, 5)):
        np.testing.assert_array_equal(vector.obs[i], first_state(seed))
        assert not np.array_equal(step.next_obs[i], vector.obs[i])
    step = vector.step(chunk_of(vector, rng, 4))
    assert (step.length.tolist(), step.score.tolist()) == ([4, 4, 0], [0, 0, 0])
    vector.close()


def test_time_limits_are_those_of_furniturebench():
    env = FurnitureEnv(horizon=2)
    env.reset(seed=0)
    assert [env.step(stay(env))[2:4] for _ in range(2)] == [(False, False), (False, True)]
    assert [FURNITURE[name].horizon for name in TASKS] == [700, 1000]


def test_a_reset_that_diverges_is_drawn_again():
    vector = vector_envs(2)
    env, calls = vector.envs[0], []
    reset = env.reset

    def diverging(seed=None):
        calls.append(seed)
        result = reset(seed=seed)
        if len(calls) < 3:
            raise PhysicsError("diverged")
        return result

    env.reset = diverging
    vector.reset(1)
    assert calls == [1, None, None] and vector.diverged.tolist() == [2, 0]
    assert np.isfinite(vector.obs).all() and not np.array_equal(vector.obs[0], first_state(1))
    np.testing.assert_array_equal(vector.obs[1], first_state(2))
    env.reset = lambda seed=None: diverging(calls.clear())
    with pytest.raises(PhysicsError, match="ten resets"):
        vector.reset(1)
    vector.close()


def test_divergence_truncates_an_episode_with_the_last_finite_observation():
    vector, rng = FurnitureVectorEnv(2, "lamp", "low", threads=1), np.random.default_rng(0)
    vector.reset(1)
    last, chunk = vector.obs.copy(), chunk_of(vector, rng, 2)
    vector.envs[0].data.qvel[:], vector.envs[0].assembled[0] = np.nan, True
    step = vector.step(chunk)
    np.testing.assert_array_equal(step.next_obs[0], last[0])
    assert step.truncated.tolist() == [True, False] and not step.terminated.any()
    assert not step.reward.any() and step.score.tolist() == [1, 0]
    assert vector.diverged.tolist() == [1, 0]
    step = vector.step(chunk_of(vector, rng, 2))
    assert np.isfinite(step.next_obs).all() and step.score.tolist() == [0, 0]
    vector.close()
