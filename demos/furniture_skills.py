"""Skills of the scripted assemblers: generators of actions that read the state anew for each."""

from collections.abc import Callable, Iterator

import numpy as np

from demos.make_robomimic_demos import CLOSED, OPEN, wrap
from envs.furniture_mujoco import FurnitureEnv, rotation, rotation_6d, rotation_vector

Pose = tuple[np.ndarray, np.ndarray]  # position (3,), rotation (3, 3)
Skill = Iterator[np.ndarray]  # of actions (10,)


class Lost(Exception):
    """A part is not where the skill needs it; the assembler starts over from an earlier skill."""


def guarded(skill: Skill, holds: Callable[[], bool], patience: int = 2) -> Skill:
    """A skill that needs a condition; raises Lost when, after `patience` steps, it is not met."""
    for k, action in enumerate(skill):
        if k >= patience and not holds():
            raise Lost
        yield action


def square_yaw(matrix: np.ndarray) -> float:
    """Yaw (rad) of the face of an upright square part that is closest to the robot's own."""
    return wrap(np.arctan2(matrix[1, 0], matrix[0, 0]), np.pi / 2)


def facing_down(yaw: float) -> np.ndarray:
    """Rotation (3, 3) of a gripper that points down, turned by `yaw` (rad); at 0 it closes along y."""
    return rotation(0, 0, yaw) @ rotation(np.pi, 0, 0)


def from_rotation_vector(vector: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) -> rotation matrix (3, 3), by Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def tilt(matrix: np.ndarray, axis: np.ndarray) -> float:
    """Angle (rad) between the y axis of a rotation and another axis (3,)."""
    return float(np.arccos(np.clip(matrix[:, 1] @ axis, -1, 1)))


def align(matrix: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Smallest rotation (3, 3) that brings the y axis of a rotation to another axis (3,)."""
    cross = np.cross(matrix[:, 1], axis)
    return from_rotation_vector(cross / max(np.linalg.norm(cross), 1e-9) * tilt(matrix, axis))


class Arm:
    """The robot; `rough` is set while it moves freely, where noise on its actions does no harm."""

    def __init__(self, env: FurnitureEnv, rng: np.random.Generator):
        self.env, self.rng, self.gripper, self.rough = env, rng, OPEN, False
        self.part, self.width = env.part_pose, env.gripper_width
        self.speed = rng.uniform(0.85, 1.0)  # per episode, so that demonstrations differ

    @property
    def pose(self) -> Pose:
        return self.env.ee_pose()

    def placed(self, index: int, goal: np.ndarray, turn: np.ndarray, near: float, turned: float) -> bool:
        """Whether a part is within `near` of `goal` (3,), and a turn (3, 3) is smaller than `turned`."""
        away, angle = goal - self.part(index)[0], rotation_vector(turn)
        return np.linalg.norm(away) < near and np.linalg.norm(angle) < turned

    def shifted(self, offset: np.ndarray) -> Pose:
        """The gripper's pose, moved by `offset` (3,)."""
        position, matrix = self.pose
        return position + offset, matrix

    def bringing(self, index: int, goal: np.ndarray, turn: np.ndarray) -> Pose:
        """The gripper's pose that brings a held part to `goal` (3,) and turns it by `turn` (3, 3)."""
        position, matrix = self.pose
        return goal + turn @ (position - self.part(index)[0]), turn @ matrix

    def act(self, target: Pose, reach: float = 0.10, turn: float = 0.6) -> np.ndarray:
        """The action (10,) toward a pose, at most `reach` (m) and `turn` (rad) from where it is."""
        (position, matrix), (goal, goal_matrix) = self.pose, target
        move, spin = goal - position, rotation_vector(goal_matrix @ matrix.T)
        move *= min(1, self.speed * reach / max(np.linalg.norm(move), 1e-9))
        spin *= min(1, turn / max(np.linalg.norm(spin), 1e-9))
        rows = rotation_6d(from_rotation_vector(spin) @ matrix)
        return np.concatenate([position + move, rows, [self.gripper]])

    def at(self, target: Pose, near: float, turned: float) -> bool:
        """Whether the gripper is within `near` (m) and `turned` (rad) of a pose."""
        position, matrix = self.pose
        angle = np.linalg.norm(rotation_vector(target[1] @ matrix.T))
        return np.linalg.norm(target[0] - position) < near and angle < turned

    def go(self, target: Pose | Callable[[], Pose], steps: int, near: float = 0.0,
           turned: float = np.inf, reach: float = 0.10, turn: float = 0.6, rough: bool = False,
           until: Callable[[], bool] | None = None) -> Skill:  # fmt: skip
        """Moves for 1 to `steps` to a pose, or one read in every step: until near it, or `until`."""
        for _ in range(steps):
            goal = target() if callable(target) else target
            self.rough = rough
            yield self.act(goal, reach, turn)
            if until() if until else self.at(goal, near, turned):
                break
        self.rough = False

    def close(self, target: Pose, width: float, least: int = 3, most: int = 12) -> Skill:
        """Closes the fingers at a pose until they are `width` (m) apart."""
        self.gripper = CLOSED
        for taken in range(most):
            if taken >= least and self.width() < width:
                break
            yield self.act(target)

    def open(self, width: float, most: int = 10) -> Skill:
        """Opens the fingers in place until they are `width` (m) apart."""
        self.gripper = OPEN
        yield from self.go(self.pose, most, until=lambda: self.width() > width)

    def rise(self, height: float, steps: int = 30) -> Skill:
        """Opens the fingers and moves straight up to z = `height` (m)."""
        self.gripper = OPEN
        position, matrix = self.pose
        yield from self.go((np.array([*position[:2], height]), matrix), steps, 0.02, 0.4, rough=True)
