"""Scripted assembler of One-Leg: pushes the table top into the obstacle's corner, picks the leg, inserts it and screws it in."""

from collections.abc import Iterator

import numpy as np

from demos.furniture_skills import Arm, Lost, Pose, facing_down, tilt
from envs.furniture_mujoco import HOLES, TAG, rotation, rotation_vector

TOP, LEG = 0, 4  # parts
LEAN = rotation(0, -np.pi / 5, 0)  # how the gripper leans when it picks the leg, so that it can later hold it upright
LEG_OFFSET = np.array([0, 0, -0.000625])  # of the leg's axis from its origin
WALL = 0.078  # m from the table top's center to the middle of its rim


class OneLeg:
    """Assembles with `arm`; `steps` yields actions (10,) for ever."""

    def __init__(self, arm: Arm):
        self.arm, self.env = arm, arm.env

    def steps(self) -> Iterator[np.ndarray]:
        yield from self.push_top()
        while True:
            try:
                if self.leg_tilt() > np.radians(30) or self.env.relative_pose(TOP, LEG)[0][1] > 0.08:
                    yield from self.pick_leg()
                    yield from self.insert()
                yield from self.arm.screw_in(LEG, 0.012, 0.032, lambda: self.leg_tilt() < np.radians(30))
            except Lost:
                yield from self.arm.rise(0.12)

    def leg_tilt(self) -> float:
        """Angle (rad) between the leg and the normal of the table top."""
        return tilt(self.arm.part(LEG)[1], self.arm.part(TOP)[1][:, 1])

    def push_top(self) -> Iterator[np.ndarray]:
        """Grasps the rim that is closest to the robot and moves the top into the corner of the front and the left obstacle."""
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
        front, left, height = self.env.obstacle_position(0), self.env.obstacle_position(2), arm.pose[0][2]
        half = 0.01  # half the thickness of the obstacles
        corner = np.array([front[0] - half - 2 * 0.08125 + 0.009, left[1] - half - 0.08125 + 0.006, height])
        yield from arm.go((corner, facing_down(np.pi / 2)), 45, 0.008, 0.15, reach=0.0625, turn=0.3)
        yield from arm.open(0.05)
        yield from arm.rise(0.12)

    def holding(self, skill: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """A skill that needs the leg between the fingers; raises Lost without it."""
        for k, action in enumerate(skill):
            if k > 2 and self.arm.width() < 0.02:
                raise Lost
            yield action

    def pick_leg(self) -> Iterator[np.ndarray]:
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
        position, matrix = arm.pose
        yield from self.holding(arm.go((position + [0, 0, 0.12], matrix), 30, 0.02, 0.3))
        scatter = arm.rng.normal(0, 0.005, 3)
        yield from self.holding(arm.go((np.array([0.48, 0.10, 0.16]) + scatter, matrix), 40, 0.025, 0.3, rough=True))
        yield from self.holding(arm.go((np.array([0.54, 0.10, 0.17]) + scatter, LEAN @ facing_down(0)), 60, 0.025, 0.2, turn=0.5, rough=True))

    def insert(self) -> Iterator[np.ndarray]:
        """Holds the leg over the hole that is farthest towards the corner of front and left obstacle, lowers it and lets go."""
        arm = self.arm
        top, matrix = arm.part(TOP)
        x, z = max(HOLES, key=lambda hole: (top + matrix @ [hole[0], 0, hole[1]])[:2].sum())
        relative = self.env.relative_pose(TOP, LEG)[1]
        quarter = np.round(np.arctan2(relative[0, 2], relative[0, 0]) / (np.pi / 2)) * np.pi / 2  # to which the leg's yaw is closest

        def error(height: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the leg shall be (3,), and how it must turn (3, 3)."""
            (top, turn), leg = arm.part(TOP), arm.part(LEG)[1]
            upright = turn @ rotation(0, quarter, 0)
            return top + turn @ [x, height, z] - upright @ LEG_OFFSET, upright @ leg.T

        def gripper(height: float) -> Pose:
            """The gripper's pose that brings the leg there, however it is held."""
            goal, turn = error(height)
            (position, matrix), leg = arm.pose, arm.part(LEG)[0]
            return goal + turn @ (position - leg), turn @ matrix

        def aligned(height: float, near: float, turned: float) -> bool:
            goal, turn = error(height)
            return np.linalg.norm(goal - arm.part(LEG)[0]) < near and np.linalg.norm(rotation_vector(turn)) < turned

        for _ in range(5):
            yield from self.holding(arm.go(lambda: gripper(0.095), 60, reach=0.075, turn=0.5, until=lambda: aligned(0.095, 0.004, 0.05)))
            yield from self.holding(arm.go(lambda: gripper(0.0605), 18, reach=0.03, turn=0.5, until=lambda: aligned(0.0605, 0.004, np.inf)))
            if aligned(0.0605, 0.004, np.inf):
                break
        yield from self.holding(arm.go(lambda: gripper(0.050), 13, reach=0.03, turn=0.5))
        yield from arm.open(0.055, 8)
        position, matrix = arm.pose
        yield from arm.go((position - 0.07 * matrix[:, 2], matrix), 25, 0.015, 0.3)
