"""Scripted assembler of Lamp: sets the base into the obstacle's corner, screws the bulb into it and puts the hood over the bulb."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from demos.furniture_skills import Arm, Lost, Pose, facing_down, from_rotation_vector, tilt, wrap
from envs.furniture_mujoco import rotation, rotation_vector

BASE, BULB, HOOD = 0, 1, 2  # parts
GLOBE = np.array([0, 0.038, 0])  # center of the bulb's globe, of radius 0.03, in the bulb's frame
FLANGE = 0.041  # height of the base's flange, by which it is carried, over its origin
FOOT = 0.0423  # half width of the base's foot
SEATED = 0.0678  # height of the bulb's origin over the base's once it is screwed in
LEAN = np.radians(45)  # of the gripper, one way when it grasps the lying bulb and the other way when it holds the bulb upright
RIM = 0.045  # height over the hood's origin at which the fingers hold it from outside
FIRST, LAST = np.radians(170), np.radians(-100)  # yaw of the gripper at the ends of a screwing stroke
AWKWARD = np.radians(120)  # beyond this course a lying bulb's globe is toward the robot: see `awkward`
SLOW = 0.02  # m per step with which the gripper comes down on a part, so that a policy's chunk of actions does not reach from afar to the grasp
HIGH = 0.012  # height over the globe's center at which a crowded bulb is grasped: the fingers are over the obstacle
HAND = np.array(list(itertools.product((-0.032, 0, 0.032), np.linspace(-0.104, 0.104, 9), (-0.105, -0.07, -0.037))))  # points of it, in the gripper's frame


def heading(matrix: np.ndarray) -> float:
    """Yaw of a gripper that may lean about the axis along which its fingers close, in the range that the wrist reaches: [-135, 225) degrees."""
    low = np.radians(-135)
    return (np.arctan2(matrix[0, 1], -matrix[1, 1]) - low) % (2 * np.pi) + low


class Lamp:
    """Assembles with `arm`; `steps` yields actions (10,) for ever."""

    def __init__(self, arm: Arm):
        self.arm, self.env = arm, arm.env

    def steps(self) -> Iterator[np.ndarray]:
        while True:
            try:
                if not self.env.assembled[0]:
                    if not self.in_corner():
                        yield from self.place_base()
                    if not self.inserted():
                        awkward = self.awkward()
                        if self.hood_in_way(awkward):
                            yield from self.move_hood()
                        yield from self.pick_bulb(awkward)
                        if awkward:
                            yield from self.turn_bulb()
                            continue
                        yield from self.insert()
                    yield from self.screw_in()
                if not self.env.assembled[1]:
                    yield from self.place_hood()
                yield from self.arm.rise(0.25)
            except Lost:
                yield from self.arm.rise(0.2)
                yield from self.arm.go(lambda: (np.array([0.5, 0.0, 0.2]), self.leaning(np.radians(45), 0.0)), 15, 0.05, 0.3, rough=True)

    def guarded(self, skill: Iterator[np.ndarray], holds: Callable[[], bool], patience: int = 2) -> Iterator[np.ndarray]:
        """A skill that needs a condition; raises Lost when, after `patience` steps, it is not met."""
        for k, action in enumerate(skill):
            if k >= patience and not holds():
                raise Lost
            yield action

    def leaning(self, yaw: float, lean: float) -> np.ndarray:
        """Rotation (3, 3) toward a gripper that is turned by `yaw` and leans backward by `lean`.

        It turns the way that the wrist can go, upright, and leans only then: an arm of seven joints that does both at once ends up
        with its elbow elsewhere and the wrist at its limit.
        """
        now = heading(self.arm.pose[1])
        error = heading(facing_down(yaw)) - now
        lean *= np.clip(1.5 - abs(error) / 0.4, 0, 1)
        return rotation(0, 0, now + np.clip(error, -1.2, 1.2)) @ rotation(0, lean, 0) @ facing_down(0)

    # ---- base
    def in_corner(self) -> bool:
        return np.abs(self.arm.part(BASE)[0][:2] - self.corner()).max() < 0.015

    def corner(self) -> np.ndarray:
        """Where the base touches the front and the left obstacle, x and y."""
        wall = 0.01 + FOOT  # half the thickness of the obstacles
        return np.array([self.env.obstacle_position(0)[0] - wall, self.env.obstacle_position(2)[1] - wall])

    def place_base(self) -> Iterator[np.ndarray]:
        """Grasps the base by its flange and carries it into the corner, its sides along the obstacles."""
        arm = self.arm
        position, matrix = arm.part(BASE)
        yaw = wrap(np.arctan2(matrix[1, 0], matrix[0, 0]), np.pi / 2)
        away = (arm.part(HOOD)[0] - position)[:2]
        quarter = 0.0  # of a turn, if the hand would else touch the hood
        if np.linalg.norm(away) < 0.16 and abs(away @ [-np.sin(yaw), np.cos(yaw)]) > abs(away @ [np.cos(yaw), np.sin(yaw)]):
            quarter = np.pi / 2

        def flange(height: float) -> Callable[[], Pose]:
            def pose() -> Pose:
                position, matrix = arm.part(BASE)
                yaw = wrap(np.arctan2(matrix[1, 0], matrix[0, 0]), np.pi / 2)
                return position + [0, 0, height], self.leaning(yaw + quarter, 0)

            return pose

        def holds() -> bool:
            return arm.width() > 0.04 and np.linalg.norm(arm.pose[0] - arm.part(BASE)[0]) < FLANGE + 0.03

        def along() -> np.ndarray:
            return self.leaning(quarter, 0)

        yield from arm.go(flange(FLANGE + 0.06), 60, 0.02, 0.2, rough=True)
        yield from arm.go(flange(FLANGE), 40, 0.005, 0.06, reach=SLOW)
        yield from arm.close(flange(FLANGE)(), 0.058, least=2)
        position, matrix = arm.pose
        yield from self.guarded(arm.go((position + [0, 0, 0.08], matrix), 12, until=lambda: arm.pose[0][2] > 0.11), holds)
        goal = np.array([*(self.corner() - 0.005), 0.125])
        yield from self.guarded(arm.go(lambda: (goal, along()), 45, 0.008, 0.06, rough=True), holds)
        goal[2] = FLANGE + 0.018
        yield from self.guarded(arm.go(lambda: (goal, along()), 20, 0.006, 0.06), holds)
        goal[:2] = self.corner() + 0.004
        yield from self.guarded(arm.go(lambda: (goal, along()), 6, 0.004, 0.06), holds)
        yield from arm.open(0.062)
        yield from arm.rise(0.14)

    # ---- bulb
    def globe(self) -> np.ndarray:
        """Center of the globe (3,)."""
        position, matrix = self.arm.part(BULB)
        return position + matrix @ GLOBE

    def inserted(self) -> bool:
        """Whether the bulb stands in the hole."""
        position, matrix = self.env.relative_pose(BASE, BULB)
        return np.hypot(position[0], position[2]) < 0.022 and position[1] > -0.105 and matrix[1, 1] < -0.87

    def holds_bulb(self) -> bool:
        return self.arm.width() > 0.04 and np.linalg.norm(self.arm.pose[0] - self.globe()) < 0.025

    def course(self) -> float:
        """Direction (rad) on the table from the bulb's socket to its globe; 0 is away from the robot."""
        axis = self.arm.part(BULB)[1][:, 1]
        return float(np.arctan2(axis[1], axis[0]))

    def crowded(self) -> bool:
        """Whether the obstacle or the base leaves no room for a finger beside the lying bulb's globe."""
        course = self.course()
        side = 0.052 * np.array([-np.sin(course), np.cos(course)])
        front, right, left = (self.env.obstacle_position(i) for i in range(3))
        for x, y in (self.globe()[:2] + side, self.globe()[:2] - side):
            beside = x > left[0] - 0.087 and not right[1] + 0.012 < y < left[1] - 0.012
            if x > front[0] - 0.012 or beside or np.abs(self.arm.part(BASE)[0][:2] - [x, y]).max() < 0.047:
                return True
        return False

    def awkward(self) -> bool:
        """Whether the lying bulb must be set down elsewhere first, grasped from straight above.

        Around a bulb that points to the robot, the gripper would have to lean forward, where it lines up with the forearm: there
        the wrist is singular.
        """
        return abs(self.course()) > AWKWARD or self.crowded()

    def around_lying(self, awkward: bool) -> tuple[np.ndarray, float, float]:
        """Where the gripper grasps the lying bulb: the globe's center (3,), yaw, and how it leans away from the socket, if not awkward."""
        course = self.course()
        flipped = course < np.radians(-45)  # the other way around, which keeps the wrist's range
        if awkward:
            return self.globe() + [0, 0, HIGH * self.crowded()], course + np.pi * flipped, 0.0
        lean = max(LEAN - np.arcsin(np.clip(self.arm.part(BULB)[1][2, 1], -1, 1)), 0.0)
        return self.globe(), course + np.pi * flipped, -lean if flipped else lean

    def hood_in_way(self, awkward: bool) -> bool:
        """Whether the hand would touch the hood when it grasps the lying bulb."""
        position, yaw, lean = self.around_lying(awkward)
        points = position + HAND @ (rotation(0, 0, yaw) @ rotation(0, lean, 0) @ facing_down(0)).T - self.arm.part(HOOD)[0]
        margin = 0.01
        inside = (np.hypot(points[:, 0], points[:, 1]) < 0.037 - 0.14 * points[:, 2] + margin) & (points[:, 2] < 0.0514 + margin)
        return bool(inside.any())

    def pick_bulb(self, awkward: bool) -> Iterator[np.ndarray]:
        """Grasps the lying bulb by its globe and lifts it."""
        arm = self.arm

        def grasp() -> Pose:
            position, yaw, lean = self.around_lying(awkward)
            return position, self.leaning(yaw, lean)

        def above() -> Pose:
            position, matrix = grasp()
            return position + [0, 0, 0.11], matrix

        def touching() -> Pose:  # close enough to the bulb's origin for the environment to let go of the bulb
            position, matrix = arm.part(BULB)
            return position + 0.022 * matrix[:, 1] + [0, 0, 0.018], grasp()[1]

        yield from arm.go(above, 60, 0.02, 0.15, rough=True)
        if self.env.resting is not None:
            yield from arm.go(touching, 20, until=lambda: np.abs(arm.pose[0] - arm.part(BULB)[0]).max() < 0.028)
        yield from arm.go(grasp, 30, 0.006, 0.12, reach=SLOW)
        if not arm.at(grasp(), 0.012, 0.25):  # a finger stands on the globe, or something is in the way
            raise Lost
        yield from arm.close(grasp(), 0.0615, least=3)
        position, matrix = arm.pose
        yield from self.guarded(arm.go((position + [0, 0, 0.12], matrix), 20, until=lambda: arm.pose[0][2] > 0.11), self.holds_bulb)

    def turn_bulb(self) -> Iterator[np.ndarray]:
        """Sets the bulb down where there is room, with its globe to the left."""
        arm = self.arm
        left = np.pi / 2 if abs(wrap(heading(arm.pose[1]) - self.course())) < np.pi / 2 else -np.pi / 2

        def at(height: float) -> Callable[[], Pose]:
            return lambda: (np.array([0.53, 0.02, height]), self.leaning(left, 0.0))

        yield from self.guarded(arm.go(at(0.12), 40, until=lambda: arm.at(at(0.12)(), 0.03, np.inf) and abs(heading(arm.pose[1]) - left) < 0.2,
                                       turn=1.0, rough=True), self.holds_bulb)  # fmt: skip
        yield from self.guarded(arm.go(at(0.03), 20, reach=0.06, until=lambda: self.globe()[2] < 0.036), self.holds_bulb)
        yield from arm.open(0.067, 8)
        yield from arm.rise(0.12)

    def insert(self) -> Iterator[np.ndarray]:
        """Turns the bulb upright over the base, lowers it into the hole and lets go."""
        arm = self.arm
        course = self.course()
        final = np.sign(course) * np.clip(abs(course), np.radians(60), np.radians(100))  # where the gripper leans to: not forward
        if abs(wrap(heading(arm.pose[1]) - course)) > np.pi / 2:  # it holds the bulb the other way around
            final += np.pi

        def error(height: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the bulb's origin shall be (3,), and how the bulb must turn (3, 3)."""
            (base, turn), bulb = arm.part(BASE), arm.part(BULB)[1]
            up = -turn[:, 1]
            cross = np.cross(bulb[:, 1], up)
            upright = from_rotation_vector(cross / max(np.linalg.norm(cross), 1e-9) * tilt(bulb, up))
            yaw = np.clip(final - heading(upright @ arm.pose[1]), -1.0, 1.0)
            return base + height * up, rotation(0, 0, yaw) @ upright

        def gripper(height: float) -> Callable[[], Pose]:
            def pose() -> Pose:
                goal, turn = error(height)
                (position, matrix), bulb = arm.pose, arm.part(BULB)[0]
                return goal + turn @ (position - bulb), turn @ matrix

            return pose

        def aligned(height: float, near: float, turned: float) -> Callable[[], bool]:
            def test() -> bool:
                goal, turn = error(height)
                return np.linalg.norm(goal - arm.part(BULB)[0]) < near and np.linalg.norm(rotation_vector(turn)) < turned

            return test

        def toward() -> Pose:
            return np.array([0.54, 0.05, 0.23]), self.leaning(final, 0.0)

        over, start = SEATED + 0.055, SEATED + 0.02
        yield from self.guarded(arm.go(toward, 40, until=lambda: abs(heading(arm.pose[1]) - final) < 0.4, turn=1.25, rough=True), self.holds_bulb)
        for _ in range(4):
            yield from self.guarded(arm.go(gripper(over), 40, until=aligned(over, 0.005, 0.08)), self.holds_bulb)
            yield from self.guarded(arm.go(gripper(start), 25, reach=0.04, until=aligned(start, 0.006, np.inf)), self.holds_bulb)
            if self.inserted():
                break
        yield from arm.open(0.067, 8)
        position, matrix = arm.pose
        yield from arm.go((position - 0.08 * matrix[:, 2], matrix), 15, 0.02, 0.3)

    def screw_in(self) -> Iterator[np.ndarray]:
        """Turns the bulb clockwise by its globe, from above, until it is assembled. Raises Lost where it no longer stands in the hole."""
        arm, env = self.arm, self.env

        def around(height: float) -> Callable[[], Pose]:
            return lambda: (self.globe() + [0, 0, height], self.leaning(FIRST, 0.0))

        def ready(height: float, near: float) -> Callable[[], bool]:
            return lambda: np.linalg.norm(arm.pose[0] - self.globe() - [0, 0, height]) < near and abs(heading(arm.pose[1]) - FIRST) < 0.15

        def stroke() -> Iterator[np.ndarray]:
            axis = arm.part(BASE)[0][:2]
            for _ in range(40):
                now = heading(arm.pose[1])
                if env.assembled[0] or now < LAST:
                    return
                yield arm.act((np.array([*axis, arm.pose[0][2] - 0.003]), facing_down(now - 0.7)), turn=0.7)

        yield from self.guarded(arm.go(around(0.08), 40, until=ready(0.08, 0.02), turn=1.25, rough=True), self.inserted)
        for _ in range(8):
            yield from self.guarded(arm.go(around(0.0), 40, until=ready(0.0, 0.006), turn=1.25), self.inserted)
            yield from self.guarded(arm.close(around(0.0)(), 0.0615, most=8), self.inserted)
            yield from self.guarded(stroke(), self.inserted)
            yield from arm.open(0.067, 6)
            if env.assembled[0]:
                break
        yield from arm.rise(0.25)

    # ---- hood
    def holds_hood(self) -> bool:
        away = self.arm.pose[0] - self.arm.part(HOOD)[0]
        return self.arm.width() > 0.04 and np.hypot(*away[:2]) < 0.015 and abs(away[2] - RIM) < 0.02

    def lift_hood(self) -> Iterator[np.ndarray]:
        """Grasps the hood from above, its narrow end between the fingers, and lifts it a little: high over the robot's foot the arm is singular."""
        arm = self.arm

        def over(height: float) -> Callable[[], Pose]:
            return lambda: (arm.part(HOOD)[0] + [0, 0, height], self.leaning(0.0, 0.0))

        yield from arm.go(over(RIM + 0.10), 60, 0.03, 0.3, rough=True)
        yield from arm.go(over(RIM + 0.03), 40, 0.008, 0.1, reach=2 * SLOW)
        yield from arm.go(over(RIM), 20, 0.004, 0.06, reach=SLOW)
        yield from arm.close(over(RIM)(), 0.0665, least=3, most=8)
        position, matrix = arm.pose
        yield from self.guarded(arm.go((position + [0, 0, 0.06], matrix), 20, until=lambda: arm.pose[0][2] > position[2] + 0.035), self.holds_hood)

    def move_hood(self) -> Iterator[np.ndarray]:
        """Sets the hood down where it leaves room around the lying bulb."""
        arm = self.arm
        x, y = max(((0.44, 0.28), (0.47, -0.25)), key=lambda spot: np.linalg.norm(self.globe()[:2] - spot))
        yield from self.lift_hood()
        yield from self.guarded(arm.go(lambda: (np.array([x, y, 0.18]), self.leaning(0.0, 0.0)), 40, 0.02, 0.2, rough=True), self.holds_hood)
        yield from self.guarded(arm.go(lambda: (np.array([x, y, 0.05 + RIM]), self.leaning(0.0, 0.0)), 20, 0.008), self.holds_hood)
        yield from arm.open(0.069, 8)
        yield from arm.rise(0.16)

    def place_hood(self) -> Iterator[np.ndarray]:
        """Lowers the hood over the bulb."""
        arm = self.arm

        def set_down(height: float) -> Callable[[], Pose]:
            """The gripper's pose that brings the hood over the base."""
            def pose() -> Pose:
                (position, _), hood, (base, turn) = arm.pose, arm.part(HOOD)[0], arm.part(BASE)
                return base - turn[:, 1] * height + position - hood, self.leaning(0.0, 0.0)

            return pose

        yield from self.lift_hood()
        way = np.array([0.53, 0.03, 0.27])
        yield from self.guarded(arm.go(lambda: (way, self.leaning(0.0, 0.0)), 40, 0.04, 0.5, rough=True), self.holds_hood)
        yield from self.guarded(arm.go(set_down(0.215), 40, 0.006, 0.1, rough=True), self.holds_hood)
        yield from self.guarded(arm.go(set_down(0.086), 25, 0.004, 0.1, reach=0.06, until=lambda: self.env.assembled[1]), self.holds_hood)
        yield from arm.open(0.069, 8)
