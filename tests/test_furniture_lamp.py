import numpy as np
import pytest

from demos.furniture_lamp import BASE, BULB, HOOD, Lamp, heading
from demos.furniture_skills import Arm, facing_down
from envs.furniture_mujoco import PITCH, POSITION_TOLERANCE, TAG, FurnitureEnv, rotation

SEATED = np.array([0, -0.088324, 0])  # of the hood, in the base's frame


@pytest.fixture(scope="module")
def env():
    return FurnitureEnv("lamp")


def test_hand_screws_the_bulb_in_by_the_pitch_and_the_hood_stays_on_it(env):
    env.reset(seed=5)
    arm = Arm(env, np.random.default_rng(5))
    depth, yaw, after = [], [], 0
    for action in Lamp(arm).steps():
        env.step(action)
        position, matrix = env.relative_pose(BASE, BULB)
        if action[9] > 0 and not env.assembled[0] and -0.0755 < position[1] < -0.069:
            depth.append(-position[1])
            yaw.append(np.arctan2(matrix[0, 2], -matrix[0, 0]))
        after += env.assembled.all()
        if after == 15 or env.t == env.horizon:
            break
    assert env.assembled.all()
    turns = np.unwrap(yaw) / (2 * np.pi)
    assert len(turns) > 5 and abs(np.polyfit(turns, depth, 1)[0]) == pytest.approx(PITCH, rel=0.15)
    away = env.relative_pose(BASE, HOOD)[0] - SEATED
    assert np.abs(away).max() < POSITION_TOLERANCE  # also without the hand
    assert env.gripper_width() > 0.06


@pytest.mark.parametrize("offset", [0.0, 0.008])
def test_dropped_hood_seats_within_tolerance(env, offset):
    env.reset(seed=5)
    env.resting = None
    turn, center = TAG[0] @ rotation(np.pi / 2, 0, 0), np.array([0.5, 0.2, 0.0172])
    position, matrix = env.ee_pose()
    away = np.array([*position[:2], 0.4, *matrix[:2].reshape(6), -1.0])
    env.place(BASE, center, turn)
    env.place(BULB, center + turn @ [0, -0.0678, 0], turn @ rotation(0, 0, np.pi))
    env.place(HOOD, center + turn @ [offset, -0.115, 0], turn)
    env.refresh()
    for _ in range(15):
        env.step(away)
    assert np.abs(env.relative_pose(BASE, HOOD)[0] - SEATED).max() < POSITION_TOLERANCE
    assert env.assembled.all()


def test_heading_covers_the_wrists_range():
    for yaw in np.radians([-130, -45, 0, 90, 180, 220]):
        for lean in (-0.8, 0.0, 0.8):  # about the axis along which the fingers close
            matrix = rotation(0, 0, yaw) @ rotation(0, lean, 0) @ facing_down(0)
            assert heading(matrix) == pytest.approx(yaw)
