"""Scripted assembler of One-Leg: pushes the top into the obstacles' corner and screws the leg in."""

from collections.abc import Callable

import numpy as np

from demos.furniture_skills import Arm, Lost, Pose, Skill, facing_down, guarded, square_yaw, tilt
from envs.furniture_mujoco import HOLES, TAG, rotation

TOP, LEG = 0, 4  # parts
LEAN = rotation(0, -np.pi / 5, 0)  # of the gripper that picks the leg, to hold it upright later
LEG_OFFSET = np.array([0, 0, -0.000625])  # of the leg's axis from its origin
UPRIGHT = np.radians(30)  # largest tilt of the leg that still stands in its hole
TURN_STEP = 0.16  # rad per step of a screwing stroke
WALL = 0.078  # m from the table top's center to the middle of its rim


class OneLeg:
    """Assembles with `arm`; `steps` yields actions (10,) for ever."""

    def __init__(self, arm: Arm):
        self.arm, self.env = arm, arm.env

    def steps(self) -> Skill:
        yield from self.push_top()
        while True:
            try:
                if self.leg_tilt() > UPRIGHT or self.env.relative_pose(TOP, LEG)[0][1] > 0.08:
                    yield from self.pick_leg()
                    yield from self.insert()
                yield from self.screw_in()
            except Lost:
                yield from self.arm.rise(0.12)

    def leg_tilt(self) -> float:
        """Angle (rad) between the leg and the normal of the table top."""
        return tilt(self.arm.part(LEG)[1], self.arm.part(TOP)[1][:, 1])

    def push_top(self) -> Skill:
        """Grasps the closest rim and moves the top into the corner of front and left obstacle."""
        arm = self.arm

        def rim(height: float) -> Pose:
            position, matrix = arm.part(TOP)
            normal = min((s * matrix[:, axis] for s in (1, -1) for axis in (0, 2)), key=lambda v: v[0])
            down = np.array([0, 0, -1.0])
            grasp = position + normal * WALL
            grasp[2] = height
            return grasp, np.stack([np.cross(-normal, down), -normal, down], 1)

        yield from arm.go(lambda: rim(max(arm.pose[0][2], 0.08)), 60, 0.006, 0.08, rough=True)
        yield from arm.go(lambda: rim(0.0195), 60, 0.005, 0.08)
        yield from arm.close(arm.pose, 0.012, least=1)
        half = 0.01  # half the thickness of the obstacles
        x = self.env.obstacle_position(0)[0] - half - 2 * 0.08125 + 0.009
        y = self.env.obstacle_position(2)[1] - half - 0.08125 + 0.006
        corner = np.array([x, y, arm.pose[0][2]])
        yield from arm.go((corner, facing_down(np.pi / 2)), 45, 0.008, 0.15, reach=0.0625, turn=0.3)
        yield from arm.open(0.05)
        yield from arm.rise(0.12)

    def holding(self, skill: Skill) -> Skill:
        """A skill that needs the leg between the fingers; raises Lost without it."""
        yield from guarded(skill, lambda: self.arm.width() >= 0.02, patience=3)

    def pick_leg(self) -> Skill:
        """Grasps the lying leg, lifts it and turns it upright over the table."""
        arm = self.arm

        def lying() -> Pose:
            position, matrix = arm.part(LEG)
            yaw = (np.arctan2(matrix[1, 1], matrix[0, 1]) + np.pi / 2) % np.pi - np.pi / 2
            return position, rotation(0, 0, yaw) @ LEAN @ TAG[0] @ rotation(np.pi / 2, -np.pi / 2, 0)

        def above() -> Pose:
            position, matrix = lying()
            position = position - 0.10 * matrix[:, 2]
            return np.array([*position[:2], max(position[2], 0.11)]), matrix

        def around() -> Pose:
            position, matrix = lying()
            return position + [0, 0, 0.002], matrix

        yield from arm.go(above, 60, 0.012, 0.12, rough=True)
        yield from arm.go(around, 60, 0.005, 0.12, reach=0.075)
        yield from arm.close(around(), 0.032, least=4)
        lifted, upright = arm.shifted([0, 0, 0.12]), LEAN @ facing_down(0)
        yield from self.holding(arm.go(lifted, 30, 0.02, 0.3))
        scatter = arm.rng.normal(0, 0.005, 3)
        beside, over = np.array([0.48, 0.10, 0.16]) + scatter, np.array([0.54, 0.10, 0.17]) + scatter
        yield from self.holding(arm.go((beside, lifted[1]), 40, 0.025, 0.3, rough=True))
        yield from self.holding(arm.go((over, upright), 60, 0.025, 0.2, turn=0.5, rough=True))

    def insert(self) -> Skill:
        """Holds the leg over the hole closest to the obstacles' corner, lowers it and lets go."""
        arm = self.arm
        top, matrix = arm.part(TOP)
        x, z = max(HOLES, key=lambda hole: (top + matrix @ [hole[0], 0, hole[1]])[:2].sum())
        relative = self.env.relative_pose(TOP, LEG)[1]
        quarters = np.round(np.arctan2(relative[0, 2], relative[0, 0]) / (np.pi / 2))  # turns

        def error(height: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the leg shall be (3,), and how it must turn (3, 3)."""
            (top, turn), leg = arm.part(TOP), arm.part(LEG)[1]
            upright = turn @ rotation(0, quarters * np.pi / 2, 0)
            return top + turn @ [x, height, z] - upright @ LEG_OFFSET, upright @ leg.T

        def to(height: float, steps: int, reach: float, until: Callable | None = None) -> Skill:
            pose = lambda: arm.bringing(LEG, *error(height))
            return self.holding(arm.go(pose, steps, reach=reach, turn=0.5, until=until))

        aligned = lambda height, turned: arm.placed(LEG, *error(height), 0.004, turned)
        at_mouth = lambda: aligned(0.0605, np.inf)
        for _ in range(5):
            yield from to(0.095, 60, 0.075, lambda: aligned(0.095, 0.05))
            yield from to(0.0605, 18, 0.03, at_mouth)
            if at_mouth():
                break
        yield from to(0.050, 13, 0.03)
        yield from arm.open(0.055, 8)
        yield from arm.go(arm.shifted(-0.07 * arm.pose[1][:, 2]), 25, 0.015, 0.3)

    def screw_in(self) -> Skill:
        """Turns the upright leg clockwise, regrasping it after every stroke; raises Lost if it falls."""
        arm = self.arm
        standing = lambda skill: guarded(skill, lambda: self.leg_tilt() < UPRIGHT, patience=0)

        def above(height: float) -> Pose:
            position, matrix = arm.part(LEG)
            return position + [0, 0, height], facing_down(square_yaw(matrix))

        def stroke() -> Skill:
            yaw, (x, y, _) = square_yaw(arm.part(LEG)[1]), arm.pose[0]
            for k in range(1, 16):
                angle = max(-np.radians(100), -TURN_STEP * k)
                down = np.array([x, y, arm.pose[0][2] - 0.004])
                yield arm.act((down, facing_down(yaw + angle)), turn=1.25)

        position, leg = arm.pose[0], arm.part(LEG)[0]
        beside = np.hypot(*(position - leg)[:2]) > 0.02
        if beside and position[2] < leg[2] + 0.06:  # rise first
            over = np.array([*position[:2], leg[2] + 0.10])
            yield from arm.go((over, above(0)[1]), 15, 0.03, 0.5, rough=True)
        yield from standing(arm.go(lambda: above(0.10), 45, 0.012, 0.1, rough=True))
        for _ in range(20):
            yield from standing(arm.go(lambda: above(0.012), 45, 0.004, 0.1))
            yield from standing(arm.close(above(0.012), 0.032, most=10))
            yield from stroke()
            yield from standing(arm.open(0.045, 6))
            turned = arm.pose[1]
            higher = lambda: (arm.part(LEG)[0] + [0, 0, 0.05], turned)
            yield from standing(arm.go(higher, 8, 0.012, 0.2))
