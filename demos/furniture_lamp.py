"""Scripted assembler of Lamp: sets the base into a corner, screws the bulb in and puts the hood on."""

import itertools
from collections.abc import Callable

import numpy as np

from demos.furniture_skills import Arm, Lost, Pose, Skill, align, facing_down, guarded, square_yaw, wrap
from envs.furniture_mujoco import rotation

BASE, BULB, HOOD = 0, 1, 2  # parts
GLOBE = np.array([0, 0.038, 0])  # center of the bulb's globe, of radius 0.03, in the bulb's frame
FLANGE = 0.041  # height of the base's flange, by which it is carried, over its origin
FOOT = 0.0423  # half width of the base's foot
SEATED = 0.0678  # height of the bulb's origin over the base's once it is screwed in
LEAN = np.radians(45)  # of the gripper: one way to grasp the lying bulb, the other to hold it upright
RIM = 0.045  # height over the hood's origin at which the fingers hold it from outside
FIRST, LAST = np.radians(170), np.radians(-100)  # yaw of the gripper at the ends of a screwing stroke
AWKWARD = np.radians(120)  # beyond this course a lying bulb's globe is toward the robot: see `awkward`
SLOW = 0.02  # m per step down on a part, so that a policy's chunk does not reach from afar to the grasp
HIGH = 0.012  # height over the globe's center to grasp a crowded bulb: the fingers are over the obstacle
HAND = np.array(  # points of it (n, 3), in the gripper's frame
    list(itertools.product((-0.032, 0, 0.032), np.linspace(-0.104, 0.104, 9), (-0.105, -0.07, -0.037)))
)


def heading(matrix: np.ndarray) -> float:
    """Yaw of a gripper that may lean, in the range that the wrist reaches: [-135, 225) degrees."""
    low = np.radians(-135)
    return (np.arctan2(matrix[0, 1], -matrix[1, 1]) - low) % (2 * np.pi) + low


class Lamp:
    """Assembles with `arm`; `steps` yields actions (10,) for ever."""

    def __init__(self, arm: Arm):
        self.arm, self.env = arm, arm.env

    def steps(self) -> Skill:
        while True:
            try:
                if not self.env.assembled[0]:
                    if np.abs(self.arm.part(BASE)[0][:2] - self.corner()).max() >= 0.015:
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
                back = self.toward([0.5, 0.0, 0.2], np.radians(45))
                yield from self.arm.go(back, 15, 0.05, 0.3, rough=True)

    def leaning(self, yaw: float, lean: float = 0.0) -> np.ndarray:
        """Rotation (3, 3) by `yaw`, then backward by `lean`: both at once end at the wrist's limit."""
        now = heading(self.arm.pose[1])
        error = heading(facing_down(yaw)) - now
        lean *= np.clip(1.5 - abs(error) / 0.4, 0, 1)
        return rotation(0, 0, now + np.clip(error, -1.2, 1.2)) @ rotation(0, lean, 0) @ facing_down(0)

    def toward(self, position, yaw: float = 0.0) -> Callable[[], Pose]:
        """A position (3,), at which the gripper points down, turned by `yaw`."""
        position = np.array(position)
        return lambda: (position, self.leaning(yaw))

    def corner(self) -> np.ndarray:
        """Where the base touches the front and the left obstacle, x and y."""
        front, left = self.env.obstacle_position(0), self.env.obstacle_position(2)
        return np.array([front[0], left[1]]) - (0.01 + FOOT)  # half the thickness of the obstacles

    def holds_base(self) -> bool:
        away = self.arm.pose[0] - self.arm.part(BASE)[0]
        return self.arm.width() > 0.04 and np.linalg.norm(away) < FLANGE + 0.03

    def place_base(self) -> Skill:
        """Grasps the base by its flange and carries it into the corner, sides along the obstacles."""
        arm, holds = self.arm, self.holds_base
        position, matrix = arm.part(BASE)
        yaw = square_yaw(matrix)
        away = (arm.part(HOOD)[0] - position)[:2]
        sideways = abs(away @ [-np.sin(yaw), np.cos(yaw)]) > abs(away @ [np.cos(yaw), np.sin(yaw)])
        # A quarter of a turn, if the hand would else touch the hood.
        quarter = np.pi / 2 if np.linalg.norm(away) < 0.16 and sideways else 0.0

        def flange(height: float) -> Pose:
            position, matrix = arm.part(BASE)
            return position + [0, 0, height], self.leaning(square_yaw(matrix) + quarter)

        yield from arm.go(lambda: flange(FLANGE + 0.06), 60, 0.02, 0.2, rough=True)
        yield from arm.go(lambda: flange(FLANGE), 40, 0.005, 0.06, reach=SLOW)
        yield from arm.close(flange(FLANGE), 0.058, least=2)
        high = lambda: arm.pose[0][2] > 0.11
        yield from guarded(arm.go(arm.shifted([0, 0, 0.08]), 12, until=high), holds)
        (x, y), low = self.corner(), FLANGE + 0.018
        over = self.toward([x - 0.005, y - 0.005, 0.125], quarter)
        down = self.toward([x - 0.005, y - 0.005, low], quarter)
        aside = self.toward([x + 0.004, y + 0.004, low], quarter)
        yield from guarded(arm.go(over, 45, 0.008, 0.06, rough=True), holds)
        yield from guarded(arm.go(down, 20, 0.006, 0.06), holds)
        yield from guarded(arm.go(aside, 6, 0.004, 0.06), holds)
        yield from arm.open(0.062)
        yield from arm.rise(0.14)

    def globe(self) -> np.ndarray:
        """Center of the globe (3,)."""
        position, matrix = self.arm.part(BULB)
        return position + matrix @ GLOBE

    def inserted(self) -> bool:
        """Whether the bulb stands in the hole."""
        position, matrix = self.env.relative_pose(BASE, BULB)
        upright = matrix[1, 1] < -0.87
        return upright and np.hypot(position[0], position[2]) < 0.022 and position[1] > -0.105

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
            at_base = np.abs(self.arm.part(BASE)[0][:2] - [x, y]).max() < 0.047
            if beside or at_base or x > front[0] - 0.012:
                return True
        return False

    def awkward(self) -> bool:
        """Whether to set the bulb down elsewhere first: a wrist that leans forward is singular."""
        return abs(self.course()) > AWKWARD or self.crowded()

    def around_lying(self, awkward: bool) -> tuple[np.ndarray, float, float]:
        """Where the gripper grasps the lying bulb: center (3,), yaw, lean away from the socket."""
        course = self.course()
        flipped = course < np.radians(-45)  # the other way around, which keeps the wrist's range
        if awkward:
            return self.globe() + [0, 0, HIGH * self.crowded()], course + np.pi * flipped, 0.0
        lean = max(LEAN - np.arcsin(np.clip(self.arm.part(BULB)[1][2, 1], -1, 1)), 0.0)
        return self.globe(), course + np.pi * flipped, -lean if flipped else lean

    def hood_in_way(self, awkward: bool) -> bool:
        """Whether the hand would touch the hood when it grasps the lying bulb."""
        position, yaw, lean = self.around_lying(awkward)
        turn = rotation(0, 0, yaw) @ rotation(0, lean, 0) @ facing_down(0)
        points = position + HAND @ turn.T - self.arm.part(HOOD)[0]
        margin, radius, height = 0.01, np.hypot(points[:, 0], points[:, 1]), points[:, 2]
        inside = (radius < 0.037 - 0.14 * height + margin) & (height < 0.0514 + margin)
        return bool(inside.any())

    def pick_bulb(self, awkward: bool) -> Skill:
        """Grasps the lying bulb by its globe and lifts it."""
        arm = self.arm

        def grasp(height: float = 0.0) -> Pose:
            position, yaw, lean = self.around_lying(awkward)
            return position + [0, 0, height], self.leaning(yaw, lean)

        def touching() -> Pose:  # close enough to the bulb's origin for the environment to let go of it
            position, matrix = arm.part(BULB)
            return position + 0.022 * matrix[:, 1] + [0, 0, 0.018], grasp()[1]

        yield from arm.go(lambda: grasp(0.11), 60, 0.02, 0.15, rough=True)
        if self.env.resting is not None:
            touches = lambda: np.abs(arm.pose[0] - arm.part(BULB)[0]).max() < 0.028
            yield from arm.go(touching, 20, until=touches)
        yield from arm.go(grasp, 30, 0.006, 0.12, reach=SLOW)
        if not arm.at(grasp(), 0.012, 0.25):  # a finger stands on the globe, or something is in the way
            raise Lost
        yield from arm.close(grasp(), 0.0615, least=3)
        high = lambda: arm.pose[0][2] > 0.11
        yield from guarded(arm.go(arm.shifted([0, 0, 0.12]), 20, until=high), self.holds_bulb)

    def turn_bulb(self) -> Skill:
        """Sets the bulb down where there is room, with its globe to the left."""
        arm = self.arm
        flipped = abs(wrap(heading(arm.pose[1]) - self.course())) >= np.pi / 2
        left = -np.pi / 2 if flipped else np.pi / 2
        over, down = self.toward([0.53, 0.02, 0.12], left), self.toward([0.53, 0.02, 0.03], left)
        there = lambda: arm.at(over(), 0.03, np.inf) and abs(heading(arm.pose[1]) - left) < 0.2
        lying = lambda: self.globe()[2] < 0.036
        yield from guarded(arm.go(over, 40, until=there, turn=1.0, rough=True), self.holds_bulb)
        yield from guarded(arm.go(down, 20, reach=0.06, until=lying), self.holds_bulb)
        yield from arm.open(0.067, 8)
        yield from arm.rise(0.12)

    def insert(self) -> Skill:
        """Turns the bulb upright over the base, lowers it into the hole and lets go."""
        arm = self.arm
        course = self.course()
        final = np.sign(course) * np.clip(abs(course), np.radians(60), np.radians(100))  # not forward
        if abs(wrap(heading(arm.pose[1]) - course)) > np.pi / 2:  # held the other way around
            final += np.pi

        def error(height: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the bulb's origin shall be (3,), and how the bulb must turn (3, 3)."""
            (base, turn), bulb = arm.part(BASE), arm.part(BULB)[1]
            up = -turn[:, 1]
            upright = align(bulb, up)
            yaw = np.clip(final - heading(upright @ arm.pose[1]), -1.0, 1.0)
            return base + height * up, rotation(0, 0, yaw) @ upright

        def to(height: float, steps: int, reach: float, near: float, turned: float) -> Skill:
            aligned = lambda: arm.placed(BULB, *error(height), near, turned)
            pose = lambda: arm.bringing(BULB, *error(height))
            return guarded(arm.go(pose, steps, reach=reach, until=aligned), self.holds_bulb)

        way = self.toward([0.54, 0.05, 0.23], final)
        turned = lambda: abs(heading(arm.pose[1]) - final) < 0.4
        yield from guarded(arm.go(way, 40, until=turned, turn=1.25, rough=True), self.holds_bulb)
        for _ in range(4):
            yield from to(SEATED + 0.055, 40, 0.10, 0.005, 0.08)
            yield from to(SEATED + 0.02, 25, 0.04, 0.006, np.inf)
            if self.inserted():
                break
        yield from arm.open(0.067, 8)
        yield from arm.go(arm.shifted(-0.08 * arm.pose[1][:, 2]), 15, 0.02, 0.3)

    def screw_in(self) -> Skill:
        """Turns the bulb clockwise from above until it is assembled. Raises Lost if it falls over."""
        arm, env = self.arm, self.env
        around = lambda height: (self.globe() + [0, 0, height], self.leaning(FIRST))

        def approach(height: float, near: float, rough: bool = False) -> Skill:
            def ready() -> bool:
                away = np.linalg.norm(arm.pose[0] - self.globe() - [0, 0, height])
                return away < near and abs(heading(arm.pose[1]) - FIRST) < 0.15

            return arm.go(lambda: around(height), 40, until=ready, turn=1.25, rough=rough)

        def stroke() -> Skill:
            axis = arm.part(BASE)[0][:2]
            for _ in range(40):
                now = heading(arm.pose[1])
                if env.assembled[0] or now < LAST:
                    return
                down = np.array([*axis, arm.pose[0][2] - 0.003])
                yield arm.act((down, facing_down(now - 0.7)), turn=0.7)

        yield from guarded(approach(0.08, 0.02, rough=True), self.inserted)
        for _ in range(8):
            yield from guarded(approach(0.0, 0.006), self.inserted)
            yield from guarded(arm.close(around(0.0), 0.0615, most=8), self.inserted)
            yield from guarded(stroke(), self.inserted)
            yield from arm.open(0.067, 6)
            if env.assembled[0]:
                break
        yield from arm.rise(0.25)

    def holds_hood(self) -> bool:
        away = self.arm.pose[0] - self.arm.part(HOOD)[0]
        return self.arm.width() > 0.04 and np.hypot(*away[:2]) < 0.015 and abs(away[2] - RIM) < 0.02

    def lift_hood(self) -> Skill:
        """Grasps the hood's narrow end and lifts it a little: high over its foot the arm is singular."""
        arm = self.arm
        over = lambda height: (arm.part(HOOD)[0] + [0, 0, height], self.leaning(0.0))
        yield from arm.go(lambda: over(RIM + 0.10), 60, 0.03, 0.3, rough=True)
        yield from arm.go(lambda: over(RIM + 0.03), 40, 0.008, 0.1, reach=2 * SLOW)
        yield from arm.go(lambda: over(RIM), 20, 0.004, 0.06, reach=SLOW)
        yield from arm.close(over(RIM), 0.0665, least=3, most=8)
        low = arm.pose[0][2]
        lifted = lambda: arm.pose[0][2] > low + 0.035
        yield from guarded(arm.go(arm.shifted([0, 0, 0.06]), 20, until=lifted), self.holds_hood)

    def move_hood(self) -> Skill:
        """Sets the hood down where it leaves room around the lying bulb."""
        arm, spots = self.arm, ((0.44, 0.28), (0.47, -0.25))
        x, y = max(spots, key=lambda spot: np.linalg.norm(self.globe()[:2] - spot))
        yield from self.lift_hood()
        over, down = self.toward([x, y, 0.18]), self.toward([x, y, 0.05 + RIM])
        yield from guarded(arm.go(over, 40, 0.02, 0.2, rough=True), self.holds_hood)
        yield from guarded(arm.go(down, 20, 0.008), self.holds_hood)
        yield from arm.open(0.069, 8)
        yield from arm.rise(0.16)

    def place_hood(self) -> Skill:
        """Lowers the hood over the bulb."""
        arm, holds = self.arm, self.holds_hood

        def over(height: float) -> Pose:
            """The gripper's pose that brings the hood over the base."""
            base, turn = arm.part(BASE)
            return base - turn[:, 1] * height + arm.pose[0] - arm.part(HOOD)[0], self.leaning(0.0)

        yield from self.lift_hood()
        way, seated = self.toward([0.53, 0.03, 0.27]), lambda: self.env.assembled[1]
        yield from guarded(arm.go(way, 40, 0.04, 0.5, rough=True), holds)
        yield from guarded(arm.go(lambda: over(0.215), 40, 0.006, 0.1, rough=True), holds)
        yield from guarded(arm.go(lambda: over(0.086), 25, 0.004, 0.1, reach=0.06, until=seated), holds)
        yield from arm.open(0.069, 8)
