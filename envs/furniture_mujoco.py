"""FurnitureBench's One-Leg and Lamp (Heo et al. 2023) on MuJoCo, as DPPO (Ren et al. 2024) has them.

The original, FurnitureSim, needs Isaac Gym. This port has its frames, observations, actions, rewards,
time limits and randomisation (https://github.com/ankile/furniture-bench, furniture_rl_sim_env.py), but
its own physics: results of "One-Leg (MuJoCo)" and "Lamp (MuJoCo)" do not compare with Isaac Gym's.
Meshes come from the installed wheel: pip install --no-deps furniture-bench==0.1

Frames: the robot's poses are in its base frame, the world frame here, with the table's surface at z = 0;
parts are observed in the AprilTag frame on the table (`TAG`). Lengths in m, angles in rad.

Physics. From the original: masses, sizes, gravity, the arm's drive (stiffness 1000, damping 200), torque
limits, the fingers' 13 N, the friction of parts, 0.15, on the table 0.125 (PhysX averages 0.15 and the
table's 0.1; MuJoCo takes the larger: of Lamp's bulb and hood 0.15) and of fingers, 0.575 (with PhysX's
default of 1). Measured on the meshes: pitch, phase, radius and ends of the threads, helices of capsules
that collide, on the leg of spheres; nothing but contact makes a part go in. Our choice, not calibrated
against Isaac Gym: contact stiffness, the fingers' torsional friction, damping and friction, armature,
threads' thickness, primitives for concave parts, the mass that the reset's force moves (`hull_mass`).
"""

import copy
import functools
import importlib.metadata
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from envs import rendering
from envs.interface import Episodes

CONTROL_RATE = 10  # Hz
BLOCKS = 6  # per action, of 1/60 s: the original's physics step, in which its force of the reset acts
HOME = np.array([-0.02630888, 0.3758795, 0.12485036, -2.1383357, -0.09431414, 2.49649072, 0.01921718])
FINGER_FORCE = 13.0  # N, also in furniture.xml
GRASP_MARGIN = 0.019  # a change of sign of the gripper's action counts above this
POSITION_TOLERANCE = 0.005  # m per axis, of an assembled pair
COSINE_TOLERANCE = 0.94  # per row of the rotation


class PhysicsError(SystemExit):
    """The simulation diverged; the environment must be reset. Where nobody catches it, the run ends."""


# ------------------------------------------------------------------------------------ rotations
def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rz(z) Ry(y) Rx(x), (3, 3)."""
    (a, b, c), (p, q, r) = np.cos([x, y, z]), np.sin([x, y, z])
    rows = [c * b, c * q * p - r * a, c * q * a + r * p], [r * b, r * q * p + c * a, r * q * a - c * p]
    return np.array([*rows, [-q, b * p, b * a]])


def quaternion(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) -> quaternion w, x, y, z."""
    result = np.empty(4)
    mujoco.mju_mat2Quat(result, np.ascontiguousarray(matrix).reshape(9))
    return result


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) -> axis times angle (3,), the angle at most pi."""
    result = np.empty(3)
    mujoco.mju_quat2Vel(result, quaternion(matrix), 1.0)
    return result


def rotation_6d(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) -> its first two rows, (6,) (Zhou et al. 2019)."""
    return matrix[:2].reshape(6)


def matrix_from_6d(rows: np.ndarray) -> np.ndarray:
    """Two rows (6,) -> rotation matrix (3, 3), by Gram-Schmidt orthogonalisation (Zhou et al. 2019)."""
    (a, b, c), (d, e, f) = rows[:3].tolist(), rows[3:].tolist()
    n = max((a * a + b * b + c * c) ** 0.5, 1e-12)
    a, b, c = a / n, b / n, c / n
    s = a * d + b * e + c * f
    d, e, f = d - s * a, e - s * b, f - s * c
    n = max((d * d + e * e + f * f) ** 0.5, 1e-12)
    d, e, f = d / n, e / n, f / n
    return np.array([[a, b, c], [d, e, f], [b * f - c * e, c * d - a * f, a * e - b * d]])


TAG = rotation(np.pi, 0, np.pi / 2), np.array([0.3015, 0.0, 0.0])  # the AprilTag frame in the base frame
_w, _x, _y, _z = quaternion(TAG[0].T)
# Quaternions (w, x, y, z) in the base frame times this matrix are (x, y, z, w) in the tag's frame.
TAG_QUATERNION = np.array([[_x, _y, _z, _w], [_w, _z, -_y, -_x], [-_z, _w, _x, -_y], [_y, -_x, _w, -_z]])


# ---------------------------------------------------------------------------------- MJCF pieces
# What the tasks' XML leaves out. Each shape is of one of the default classes of furniture.xml.
THREAD = 8  # contact bit of a hole's thread
PITCH = 0.00955  # per turn of the right-handed threads: measured on the meshes of top, leg and lamp base


def numbers(values) -> str:
    return " ".join(f"{value:.8g}" for value in values)


def bundle(radius: float, low: float, high: float, mass: float, center=(0.0, 0.0)) -> str:
    """A cylinder around the y axis, of six capsules parallel to it, which collide in closed form."""
    rod, result = 0.0025, ""  # radius of a capsule
    size, away = (rod, (high - low) / 2 - rod), radius - rod
    for angle in np.pi / 3 * np.arange(6):
        pos = center[0] + away * np.cos(angle), (low + high) / 2, center[1] + away * np.sin(angle)
        result += f'<geom class="stub" size="{numbers(size)}" pos="{numbers(pos)}" mass="{mass / 6}"/>'
    return result


def ring(kind: str, count: int, radius: float, half, low: float, center=(0, 0), tilt=0.0, mass=0.0):
    """`count` boxes around the y axis, half sizes (radial, axial, tangential), lifted to y = `low`."""
    result = ""
    for angle in 2 * np.pi * np.arange(count) / count:
        pos = center[0] + radius * np.cos(angle), low + half[1], center[1] + radius * np.sin(angle)
        quat = quaternion(rotation(0, -angle, 0) @ rotation(0, 0, tilt))
        place = f'pos="{numbers(pos)}" quat="{numbers(quat)}"'
        result += f'<geom class="{kind}" size="{numbers(half)}" {place} mass="{mass}"/>'
    return result


def thread(kind: str, low, high, radius, phase, center=(0, 0), pitch=PITCH) -> str:
    """A helix of capsules around the y axis from y = `low` to `high`, ten per turn.

    The kind "beads" takes spheres, where capsules would end: else a pushed leg would turn in by itself.
    They have a body of their own, so that what is far from it is sorted out at once.
    """
    y = np.linspace(low, high, int(np.ceil(10 * (high - low) / pitch)) + 1)
    angle = 2 * np.pi * y / pitch + phase
    x, z = center[0] + radius * np.cos(angle), center[1] - radius * np.sin(angle)
    points = np.stack([x, y, z], 1)
    if kind == "beads":
        places = [f'pos="{numbers(point)}"' for point in points]
    else:
        places = [f'fromto="{numbers([*a, *b])}"' for a, b in itertools.pairwise(points)]
    shapes = "".join(f'<geom class="{kind}" {place}/>' for place in places)
    return f"<body>{shapes}</body>"


def shapes() -> dict[str, str]:
    """The stubs, rings and threads by their names in the tasks' XML."""
    holes, z = "", 0.000625
    for center in HOLES:
        holes += ring("hole", 8, 0.0144, (0.0016, 0.0125, 0.0062), -0.0094, center)
        holes += thread("inside", -0.0088, 0.0099, 0.0131, -1.541, center)
    threaded = bundle(0.0100, -0.05625, -0.03125, 0.0036, (0, -z))
    threaded += thread("beads", -0.0500, -0.0332, 0.0100, 0.020, (0, -z))
    neck = ring("hole", 12, 0.0143, (0.0015, 0.0156, 0.0042), -0.0458, mass=0.0008)
    neck += thread("inside", -0.04019, -0.0213, 0.0131, 2.57796, (0, -0.00025))
    bulb = bundle(0.0100, -0.0530, -0.0220, 0.0015)
    bulb += thread("outside", -0.0410, -0.02327, 0.0100, -3.00569, (-0.00025, 0), 0.0096)
    slope, half = np.arctan(0.14), (0.002, 0.0502, 0.0445 * np.tan(np.pi / 16))
    return dict(
        holes=holes, threaded_stub=threaded, neck=neck, bulb_stub=bulb,
        plain_stub=bundle(0.0122, -0.05625, -0.03125, 0.0036, (0, z)),
        hood=ring("hood", 16, 0.0349, half, -0.0516, tilt=-slope, mass=0.06 / 16),
    )  # fmt: skip


# --------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Part:
    """A part that moves; poses are at reset, in the tag's frame."""

    name: str
    position: tuple
    angles: tuple  # rotation around x, then y, then z
    # The original's density times the volume of the mesh's convex hull (kg): the reset's force moves it.
    # With the parts' own masses, a fifth to nine tenths of it, it would throw the hood off the table.
    hull_mass: float


@dataclass(frozen=True)
class Furniture:
    """One of FurnitureBench's tasks."""

    parts: tuple[Part, ...]
    # Two parts, possible positions of the second in the first's frame, rotation (3, 3) or None for any.
    pairs: tuple[tuple, ...]
    holes: tuple  # x and z of the holes, in the first part's frame; a thread's tip goes into them
    level: float  # y of their mouths
    out: int  # 1 where they open towards y, -1 where towards -y
    force: tuple[float, ...]  # multipliers of the reset's random force on each part
    torque: tuple[float, ...]  # multipliers of the reset's random torque on each part
    horizon: int  # time limit in environment steps of 1/10 s
    gripper: float  # largest opening of the fingers
    # Steps per block: with open fingers, closed ones, closed ones near a thread. A contact slips
    # for about two steps: with fewer of them the arm's jerks shake a part out of the fingers.
    steps: tuple[int, int, int] = (4, 4, 5)
    held: int | None = None  # a part that would roll: waits for the hand, at most for half the time

    @property
    def obs_dim(self) -> int:
        return 16 + 7 * (len(self.parts) + 1)


HOLES = tuple((x, z) for z in (-0.05625, 0.05625) for x in (-0.05625, 0.05625))
LYING = (0, -np.pi / 2, 0)
FURNITURE = {
    "one_leg": Furniture(
        (
            Part("top", (0, 0.24, -0.015625), (-np.pi / 2, 0, np.pi), 0.4115),
            Part("leg1", (-0.20, 0.07, -0.015), LYING, 0.0265),
            Part("leg2", (-0.12, 0.07, -0.015), LYING, 0.0265),
            Part("leg3", (0.12, 0.07, -0.015), LYING, 0.0265),
            Part("leg4", (0.20, 0.07, -0.015), LYING, 0.0265),
        ),
        pairs=((0, 4, tuple((x, 0.046875, z) for x, z in HOLES), np.eye(3)),),
        holes=HOLES, level=0.0156, out=1,
        force=(25, 1, 1, 1, 1), torque=(70, 1, 1, 1, 1), horizon=700, gripper=0.065,
    ),
    "lamp": Furniture(
        (
            Part("base", (0.05, 0.14, -0.02), (np.pi / 2, 0, 0), 0.1143),
            Part("bulb", (-0.05, 0.235, -0.016), (-np.arctan2(7.6, 52), 0, 0), 0.1109),
            Part("hood", (-0.08, 0.13, -0.048583), (np.pi / 2, 0, 0), 0.3316),
        ),
        pairs=((0, 1, ((0, -0.0678, 0),), rotation(0, 0, np.pi)), (0, 2, ((0, -0.088324, 0),), None)),
        holes=((0, 0),), level=-0.0458, out=-1,
        force=(8, 15, 30), torque=(16, 20, 60), horizon=1000, gripper=0.07, steps=(4, 8, 6), held=1,
    ),
}  # fmt: skip

# Ranges of a reset: largest horizontal force (N) and vertical torque (N m) on a part, for 1/60 s, before
# the part's multipliers; largest offset of the obstacle along x and y, and of each joint.
RANDOMNESS = {
    "low": dict(force=0.2, torque=0.007, obstacle=0.02, joints=np.radians(5)),
    "med": dict(force=0.5, torque=0.010, obstacle=0.04, joints=np.radians(10)),
}


# --------------------------------------------------------------------------------------- model
def build(furniture: str) -> mujoco.MjModel:
    """The task's model: furniture.xml, which includes the task's parts."""
    try:  # found without importing the package, which needs Isaac Gym
        wheel = importlib.metadata.distribution("furniture-bench")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("Meshes are missing: pip install --no-deps furniture-bench==0.1") from None
    root, opening = wheel.locate_file("furniture_bench/assets"), FURNITURE[furniture].gripper / 2
    franka = root / "franka_description_ros/franka_description/meshes/collision"
    read = lambda name: Path(__file__).with_name(f"{name}.xml").read_text()
    scene = read("furniture").format(franka=franka, opening=opening)
    parts = read(furniture).format(meshes=root / "furniture/mesh", **shapes())
    return mujoco.MjModel.from_xml_string(scene, {"task.xml": parts.encode()})


@functools.cache
def load_models(furniture: str) -> dict[tuple[bool, bool], mujoco.MjModel]:
    """The task's model by whether threads collide and whether the fingers close, with its time step.

    The models share their layout, so that one MjData goes through all of them. Far from a thread its
    collisions cost little, but in a state that is not finite every capsule would touch every sphere.
    """
    mujoco.set_mju_user_warning(lambda text: None)  # no MUJOCO_LOG.TXT: it is raised as PhysicsError
    threaded = build(furniture)
    smooth = copy.copy(threaded)
    smooth.geom_contype[smooth.geom_contype == THREAD] = 0
    models = {}
    for threads, closes in itertools.product((False, True), repeat=2):
        models[threads, closes] = model = copy.copy(threaded if threads else smooth)
        steps = FURNITURE[furniture].steps[closes * (1 + threads)]
        model.opt.timestep = 1 / (CONTROL_RATE * BLOCKS * steps)
    return models


# --------------------------------------------------------------------------------- environment
class FurnitureEnv:
    """One task, with `reset` and `step` as in Gymnasium.

    Observation (58,) or (44,) float32: position, rotation (6D), linear and angular velocity of the end
    effector and opening of the gripper, then per part and for the front obstacle position and quaternion
    (x, y, z, w >= 0) in the tag's frame. Action (10,) in [-1, 1]: the pose that the end effector shall
    reach, position (m) and rotation (6D), and the gripper, which a positive value closes.
    The reward is 1 when a pair is newly assembled. Episodes never terminate and are truncated at
    `horizon` steps; info["success"] is whether all pairs are assembled. Raises PhysicsError if the
    simulation diverges.
    """

    def __init__(self, furniture="one_leg", randomness="low", horizon: int | None = None):
        self.furniture, self.ranges = FURNITURE[furniture], RANDOMNESS[randomness]
        self.horizon = horizon or self.furniture.horizon
        self.models = load_models(furniture)
        self.model = model = self.models[True, True]
        self.data = data = mujoco.MjData(model)
        self.rng, self.renderer = np.random.default_rng(), None
        self.parts = [model.body(part.name).id for part in self.furniture.parts]
        self.seen = [*self.parts, model.body("front_obstacle").id]
        self.site = model.site("ee").id
        self.jacobian = np.zeros((6, model.nv))
        self.assembled = np.zeros(len(self.furniture.pairs), bool)
        # Views of the state. The arm's joints come first in qpos, qvel and ctrl, then the fingers.
        self.qpos, self.qvel, self.ctrl = data.qpos, data.qvel, data.ctrl
        self.joints = [data.joint(part.name) for part in self.furniture.parts]
        self.hand = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3)
        self.nut = data.xpos[self.parts[0]], data.xmat[self.parts[0]].reshape(3, 3)
        self.tip = data.site_xpos[model.site("tip").id]

    # ---- state
    def ee_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of the end effector."""
        return self.hand[0].copy(), self.hand[1].copy()

    def part_pose(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of a part in the base frame."""
        body = self.parts[index]
        return self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy()

    def obstacle_position(self, index: int) -> np.ndarray:
        """Position (3,) of the front, right or left obstacle."""
        return self.data.mocap_pos[index].copy()

    def gripper_width(self) -> float:
        return self.qpos[7] + self.qpos[8]

    def relative_pose(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of a part in the frame of another."""
        (p, P), (q, Q) = self.part_pose(first), self.part_pose(second)
        return P.T @ (q - p), P.T @ Q

    def place(self, index: int, position: np.ndarray, matrix: np.ndarray):
        """Puts a part, at rest, at a position (3,) and rotation (3, 3) in the base frame."""
        self.joints[index].qpos = np.concatenate([position, quaternion(matrix)])
        self.joints[index].qvel = 0

    def refresh(self):
        """Derives poses and Jacobians from the joints, which mj_step leaves one step behind."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_jacSite(self.model, self.data, self.jacobian[:3], self.jacobian[3:], self.site)

    def observe(self) -> np.ndarray:
        """(obs_dim,) float32."""
        data, obs = self.data, np.empty(self.furniture.obs_dim, np.float32)
        obs[:3], obs[3:9] = self.hand[0], rotation_6d(self.hand[1])
        obs[9:15] = self.jacobian @ self.qvel
        obs[15] = self.gripper_width()
        poses = obs[16:].reshape(-1, 7)
        poses[:, :3] = (data.xpos[self.seen] - TAG[1]) @ TAG[0]
        quaternions = data.xquat[self.seen] @ TAG_QUATERNION
        poses[:, 3:] = np.where(quaternions[:, 3:] < 0, -quaternions, quaternions)
        return obs

    # ---- physics
    def near_thread(self) -> bool:
        """Whether a threaded part is in, or within 2 cm of, a hole."""
        spec, (nut, turn) = self.furniture, self.nut
        x, y, z = ((self.tip - nut) @ turn).tolist()
        above = spec.out * (y - spec.level) < 0.02
        return above and any(math.hypot(x - a, z - b) < 0.025 for a, b in spec.holes)

    def simulate(self, blocks: int):
        """Steps `blocks` times 1/60 s; raises PhysicsError if MuJoCo stops or a state is not finite."""
        closes = bool(self.ctrl[7] < 0)
        try:
            for _ in range(blocks):
                if self.resting is not None:
                    self.place(self.furniture.held, *self.resting)
                near = self.near_thread()
                steps = self.furniture.steps[closes * (1 + near)]
                mujoco.mj_step(self.models[near, closes], self.data, steps)
            self.refresh()
        except mujoco.FatalError as error:  # at what it cannot compute, before we see the state
            raise PhysicsError(f"MuJoCo stopped in step {self.t} of the episode: {error}") from error
        if not (np.isfinite(self.qpos).all() and np.isfinite(self.qvel).all()):
            raise PhysicsError(f"The simulation diverged in step {self.t} of the episode.")

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode; without a seed the generator goes on."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        data, spec, rng = self.data, self.furniture, self.rng
        uniform = lambda name, size: rng.uniform(-self.ranges[name], self.ranges[name], size)
        mujoco.mj_resetData(self.model, data)
        self.qpos[:7] = self.ctrl[:7] = HOME + uniform("joints", 7)
        self.qpos[7:9], self.ctrl[7:] = spec.gripper / 2, FINGER_FORCE
        data.mocap_pos[:, :2] += uniform("obstacle", 2)
        for i, part in enumerate(spec.parts):
            self.place(i, TAG[0] @ part.position + TAG[1], TAG[0] @ rotation(*part.angles))
        count = len(spec.parts)
        scale = self.model.body_mass[self.parts] / [part.hull_mass for part in spec.parts]
        direction = rng.uniform(0, 2 * np.pi, count)
        force = rng.uniform(0, self.ranges["force"], count) * spec.force * scale
        torque = uniform("torque", count) * spec.torque * scale
        self.t, self.gripper, self.resting = 0, -1.0, None
        self.assembled[:] = False
        mujoco.mj_kinematics(self.model, data)
        pushes = force * np.cos(direction), force * np.sin(direction), *np.zeros((3, count)), torque
        data.xfrc_applied[self.parts] = np.stack(pushes, 1)
        self.simulate(1)
        data.xfrc_applied[:] = 0
        if spec.held is not None:  # the original holds the bulb after ten physics steps
            self.simulate(9)
            self.resting = self.part_pose(spec.held)
            self.simulate(1)
        return self.observe(), {}

    def joint_targets(self, position: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Joint positions (7,) that reach a pose to first order: least norm, damped where singular."""
        here, turn = self.hand
        error = np.concatenate([position - here, rotation_vector(matrix @ turn.T)])
        J = self.jacobian[:, :7]
        step = J.T @ np.linalg.solve(J @ J.T + 1e-6 * np.eye(6), error)
        return np.clip(self.qpos[:7] + step, *self.model.jnt_range[:7].T)

    def advance(self, action: np.ndarray) -> float:
        """Executes one action (10,); returns the reward."""
        action = np.clip(np.asarray(action, float), -1, 1)
        self.ctrl[:7] = self.joint_targets(action[:3], matrix_from_6d(action[3:9]))
        grasp = float(action[9])
        changes = np.sign(grasp) != np.sign(self.gripper) and abs(grasp) > GRASP_MARGIN
        opens = (grasp if changes else self.gripper) < 0
        self.gripper = grasp
        self.ctrl[7:] = FINGER_FORCE if opens else -FINGER_FORCE
        if self.resting is not None:
            close = np.abs(self.hand[0] - self.resting[0]).max() <= 0.03
            if close or self.t > self.horizon / 2:
                self.resting = None
        self.simulate(BLOCKS)
        self.t += 1
        return self.newly_assembled()

    def newly_assembled(self) -> float:
        """1 if a pair is assembled that was not before in this episode, else 0."""
        before = self.assembled.copy()
        for i, (first, second, positions, turn) in enumerate(self.furniture.pairs):
            position, matrix = self.relative_pose(first, second)
            placed = (np.abs(position - positions) <= POSITION_TOLERANCE).all(1).any()
            aligned = turn is None or ((matrix * turn).sum(1) >= COSINE_TOLERANCE).all()
            self.assembled[i] |= placed and aligned
        return float((self.assembled != before).any())

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, success = self.advance(action), bool(self.assembled.all())
        return self.observe(), reward, False, self.t >= self.horizon, {"success": success}

    def render(self) -> np.ndarray:
        """The front camera, (240, 320, 3) uint8; set MUJOCO_GL before MuJoCo is imported."""
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.model)
            self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False  # 5 times as fast on a CPU
        self.renderer.update_scene(self.data, "front")
        return self.renderer.render()


class FurnitureVectorEnv(Episodes):
    """`num_envs` environments in threads, outside Python's lock, sharing a model; see envs/interface.py.

    An episode ends when all pairs are assembled, at the time limit, or where its simulation diverges.
    Then its last observation is the last finite one.
    """

    fps = CONTROL_RATE

    def __init__(self, num_envs: int, furniture: str, randomness: str, horizon=None, threads=None):
        super().__init__(num_envs)
        self.envs = [FurnitureEnv(furniture, randomness, horizon) for _ in range(num_envs)]
        self.obs_dim, self.action_dim = self.envs[0].furniture.obs_dim, 10
        self.obs = np.zeros((num_envs, self.obs_dim), np.float32)
        self.pool = ThreadPoolExecutor(min(threads or os.cpu_count(), num_envs))

    def start(self, indices: np.ndarray):
        seeds = self.take_seeds(indices)
        list(self.pool.map(self.renew, seeds.keys(), seeds.values()))

    def renew(self, i: int, seed: int | None):
        """Resets one environment; where that diverges, again with its generator's next numbers."""
        for _ in range(10):
            try:
                self.obs[i] = self.envs[i].reset(seed=seed)[0]
                return
            except PhysicsError:
                seed = None
        raise PhysicsError("The simulation diverged in ten resets in a row.")

    def run_chunk(self, i: int, actions: np.ndarray) -> tuple[float, bool, bool, int, int]:
        """Steps one environment; returns reward, terminated, truncated, steps taken and score."""
        env, reward, length = self.envs[i], 0.0, 0
        try:
            for action in actions:
                length += 1
                reward += env.advance(action)
                if env.assembled.all() or env.t >= env.horizon:
                    break
            self.obs[i] = env.observe()
        except PhysicsError:
            env.t = env.horizon
        terminated = bool(env.assembled.all())
        truncated = env.t >= env.horizon and not terminated
        return reward, terminated, truncated, length, env.assembled.sum()

    def run_chunks(self, indices: np.ndarray, chunks: np.ndarray):
        return self.pool.map(self.run_chunk, indices, chunks)

    def render(self) -> np.ndarray:
        """The first environment's picture."""
        return self.envs[0].render()

    def close(self):
        self.pool.shutdown()


def record_video(policy, furniture: str, randomness: str, horizon: int | None, folder: Path):
    """Films a policy, see envs/rendering.py."""
    make_envs = lambda: FurnitureVectorEnv(1, furniture, randomness, horizon)
    rendering.record_video(policy, policy.normalize, make_envs, folder)
