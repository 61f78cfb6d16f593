"""Skills of the scripted assemblers: an arm that moves to poses, grasps, regrasps and screws, reading the simulator's state.

A skill is a generator of actions. It reads the state anew for each, so that the action fits the state it is recorded with.
"""

from collections.abc import Callable, Iterator

import numpy as np

from envs.furniture_mujoco import FurnitureEnv, rotation, rotation_6d, rotation_vector

OPEN, CLOSED = -1.0, 1.0
Pose = tuple[np.ndarray, np.ndarray]  # position (3,), rotation (3, 3)
DOWN = rotation(np.pi, 0, 0)  # the gripper points down, its fingers close along y
TURN_STEP = 0.16  # rad per step of a screwing stroke


class Lost(Exception):
    """A part is not where the skill needs it; the assembler starts over from an earlier skill."""


def wrap(angle: float, period: float = 2 * np.pi) -> float:
    """The angle (rad) plus the multiple of `period` that brings it closest to 0."""
    return (angle + period / 2) % period - period / 2


def facing_down(yaw: float) -> np.ndarray:
    """Rotation (3, 3) of a gripper that points down, turned by `yaw` (rad)."""
    return rotation(0, 0, yaw) @ DOWN


def from_rotation_vector(vector: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) -> rotation matrix (3, 3), by Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def tilt(matrix: np.ndarray, axis: np.ndarray) -> float:
    """Angle (rad) between the y axis of a rotation and another axis (3,)."""
    return float(np.arccos(np.clip(matrix[:, 1] @ axis, -1, 1)))


class Arm:
    """The robot as the assemblers see it. `rough` is set while it moves freely, where noise on its actions does no harm."""

    def __init__(self, env: FurnitureEnv, rng: np.random.Generator):
        self.env, self.rng, self.gripper, self.rough = env, rng, OPEN, False
        self.speed = rng.uniform(0.85, 1.0)  # per episode, so that demonstrations differ

    @property
    def pose(self) -> Pose:
        return self.env.ee_pose()

    def part(self, index: int) -> Pose:
        return self.env.part_pose(index)

    def width(self) -> float:
        return self.env.gripper_width()

    def act(self, target: Pose, reach: float = 0.10, turn: float = 0.6) -> np.ndarray:
        """The action (10,) toward a pose, at most `reach` (m) and `turn` (rad) from the present one."""
        (position, matrix), (goal, goal_matrix) = self.pose, target
        move, spin = goal - position, rotation_vector(goal_matrix @ matrix.T)
        move *= min(1, self.speed * reach / max(np.linalg.norm(move), 1e-9))
        spin *= min(1, turn / max(np.linalg.norm(spin), 1e-9))
        return np.concatenate([position + move, rotation_6d(from_rotation_vector(spin) @ matrix), [self.gripper]])

    def at(self, target: Pose, near: float, turned: float) -> bool:
        """Whether the gripper is within `near` (m) and `turned` (rad) of a pose."""
        position, matrix = self.pose
        return np.linalg.norm(target[0] - position) < near and np.linalg.norm(rotation_vector(target[1] @ matrix.T)) < turned

    def go(self, target: Pose | Callable[[], Pose], steps: int, near: float = 0.0, turned: float = np.inf, reach: float = 0.10, turn: float = 0.6,
           rough: bool = False, until: Callable[[], bool] | None = None) -> Iterator[np.ndarray]:  # fmt: skip
        """Moves to a pose, or to one that is read in every step, for at most `steps`; at least one.

        Stops within `near` and `turned` of it, or, where `until` is given, as soon as that is true.
        """
        for _ in range(steps):
            goal = target() if callable(target) else target
            self.rough = rough
            yield self.act(goal, reach, turn)
            if until() if until else self.at(goal, near, turned):
                break
        self.rough = False

    def close(self, target: Pose, width: float, least: int = 3, most: int = 12) -> Iterator[np.ndarray]:
        """Closes the fingers at a pose until they are `width` (m) apart."""
        self.gripper, taken = CLOSED, 0

        def held() -> bool:
            nonlocal taken
            taken += 1
            return taken >= least and self.width() < width

        yield from self.go(target, most, until=held)

    def open(self, width: float, most: int = 10) -> Iterator[np.ndarray]:
        """Opens the fingers in place until they are `width` (m) apart."""
        self.gripper = OPEN
        yield from self.go(self.pose, most, until=lambda: self.width() > width)

    def rise(self, height: float, steps: int = 30) -> Iterator[np.ndarray]:
        """Opens the fingers and moves straight up to z = `height` (m)."""
        self.gripper = OPEN
        position, matrix = self.pose
        yield from self.go((np.array([*position[:2], height]), matrix), steps, 0.02, 0.4, rough=True)

    def screw_in(self, index: int, grasp: float, width: float, upright: Callable[[], bool], strokes: int = 20) -> Iterator[np.ndarray]:
        """Turns an upright part with a square cross-section clockwise, regrasping it after every stroke.

        The fingers close `grasp` (m) above the part's origin, to `width` (m). Raises Lost where `upright` turns false.
        """

        def face() -> float:
            """Yaw of the part's face that is closest to the robot's own."""
            matrix = self.part(index)[1]
            return wrap(np.arctan2(matrix[1, 0], matrix[0, 0]), np.pi / 2)

        def above(height: float) -> Callable[[], Pose]:
            return lambda: (self.part(index)[0] + [0, 0, height], facing_down(face()))

        def guarded(skill: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for action in skill:
                if not upright():
                    raise Lost
                yield action

        for stroke in range(strokes):
            if stroke == 0:
                position, part = self.pose[0], self.part(index)[0]
                if position[2] < part[2] + 0.06 and np.hypot(*(position - part)[:2]) > 0.02:  # beside it: rise first
                    yield from self.go((np.array([*position[:2], part[2] + 0.10]), facing_down(face())), 15, 0.03, 0.5, rough=True)
                yield from guarded(self.go(above(0.10), 45, 0.012, 0.1, rough=True))
            yield from guarded(self.go(above(grasp), 45, 0.004, 0.1))
            yield from guarded(self.close(above(grasp)(), width, most=10))
            yaw, (position, _) = face(), self.pose
            for k in range(1, 16):
                angle = max(-np.radians(100), -TURN_STEP * k)
                yield self.act((np.array([*position[:2], self.pose[0][2] - 0.004]), facing_down(yaw + angle)), turn=1.25)
            yield from guarded(self.open(0.045, 6))
            turned = self.pose[1]
            yield from guarded(self.go(lambda: (self.part(index)[0] + [0, 0, 0.05], turned), 8, 0.012, 0.2))
