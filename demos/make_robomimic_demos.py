"""Makes robomimic demonstrations with scripted experts, and renders their images.

    python -m demos.make_robomimic_demos --task square --episodes 100              # writes demos/square/low_dim.hdf5
    python -m demos.make_robomimic_demos --images-from demos/square/low_dim.hdf5   # writes demos/square/image.hdf5

The experts read positions from the simulator and act through the same actions as a policy: per arm the gripper's displacement
in units of 5 cm, its rotation in units of 0.5 rad, and -1 to open or 1 to close it. Files follow robomimic (Mandlekar et al. 2021).
"""

import itertools
import json
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import tyro
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from demos.robomimic import DatasetError
from envs.robomimic import MODEL_SEED, TASKS, choose_renderer, control_step, make_robosuite, metadata, render_fast

DEMOS = Path(__file__).parent
OPEN, CLOSED = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])
STEPS_AFTER_SUCCESS = 5  # environment steps, so that the last state is surely a solved one
RESOLUTION = 2.0**-22  # 2.4e-7 m, rad, m/s or rad/s, to which observations and states are rounded: halves the file
FRAMES_PER_CHUNK = 16  # of images in the file: gzip then reaches back one frame, and the static background costs next to nothing


@dataclass
class Args:
    task: Literal["lift", "can", "square", "transport"] = "square"
    """Task to demonstrate; with --images-from it is that of the file."""
    episodes: int = 100
    """Successful episodes to record; failures are dropped (robomimic's files hold 200)."""
    seed: int = 0
    """Seed of the first attempt; the others follow one by one."""
    noise: float = 0.05
    """Standard deviation of the noise on the arms' actions, relative to the action, so that cloning sees off-nominal states; 0: none."""
    valid_fraction: float = 0.1
    """Share of the episodes in mask/valid instead of mask/train (robomimic: 0.1)."""
    images_from: Path | None = None
    """Render the images of this file's states instead of recording."""
    fast_render: bool = True
    """Render without multisampling, shadows and reflections: 3 to 4 times as fast without a GPU. Use the same when training."""
    out: Path | None = None
    """Output; default demos/<task>/low_dim.hdf5, or demos/<task>/image.hdf5 with --images-from."""


# ------------------------------------------------------------------------------------- control
def wrap(angle: float, period: float = 2 * np.pi) -> float:
    """The angle (rad) plus the multiple of `period` that brings it closest to 0."""
    return (angle + period / 2) % period - period / 2


def yaw_of(rotation: np.ndarray) -> float:
    """Rotation matrix (3, 3) -> heading of its x axis (rad)."""
    return np.arctan2(rotation[1, 0], rotation[0, 0])


def body(env, index: int) -> np.ndarray:
    """Position of a body (m), (3,)."""
    return np.array(env.sim.data.body_xpos[index])


def body_axes(env, index: int) -> np.ndarray:
    """Rotation of a body, (3, 3), axes in columns."""
    return np.array(env.sim.data.body_xmat[index]).reshape(3, 3)


class Arm:
    """One arm that moves its gripper to poses (positions in m) and points it down, at a yaw that is 0 as the episode starts.

    Gain and speed are drawn per episode, so that demonstrations differ. Methods that yield are steps of an expert.
    """

    def __init__(self, env, index: int, rng: np.random.Generator, noise: float):
        self.sim, self.robot = env.sim, env.robots[index]
        self.rng, self.noise = rng, noise
        self.gain, self.speed = rng.uniform(1.5, 2.0), rng.uniform(0.7, 1.0)  # per step; share of the largest action
        self.turn_speed = 0.5  # share of the largest action
        self.integral = np.zeros(3)  # of the position error: the controller alone stops 1 to 2 cm short
        forward = self.rotation[:, 0] * [1, 1, 0]
        forward /= np.linalg.norm(forward)
        self.level = np.stack([forward, np.cross(-UP, forward), -UP], 1)  # the first rotation, made to point down exactly
        prefix = self.robot.gripper.naming_prefix
        pads = [self.sim.data.geom_xpos[self.sim.model.geom_name2id(f"{prefix}finger{i}_pad_collision")] for i in (1, 2)]
        self.closing_yaw = np.arctan2(*(pads[1] - pads[0])[1::-1])  # direction in which the fingers close at yaw 0

    @property
    def position(self) -> np.ndarray:
        """(3,), m."""
        return np.array(self.sim.data.site_xpos[self.robot.eef_site_id])

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3)."""
        return np.array(self.sim.data.site_xmat[self.robot.eef_site_id]).reshape(3, 3)

    def facing(self, yaw: float) -> np.ndarray:
        """Pointing down, turned by yaw (rad): a rotation, (3, 3)."""
        return Rotation.from_euler("z", yaw).as_matrix() @ self.level

    def yaw(self) -> float:
        turned = self.rotation @ self.level.T
        return np.arctan2(turned[1, 0] - turned[0, 1], turned[0, 0] + turned[1, 1])

    def distance(self, target: np.ndarray) -> float:
        return np.linalg.norm(target - self.position)

    def angle(self, rotation: np.ndarray) -> float:
        return np.linalg.norm(Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec())

    def gap(self) -> float:
        """Opening of the fingers (m)."""
        return sum(abs(self.sim.data.get_joint_qpos(joint)) for joint in self.robot.gripper.joints)

    def act(self, target: np.ndarray, rotation: np.ndarray, gripper: float, speed: float | None = None) -> np.ndarray:
        """The action (7,) that moves toward a pose, with noise."""
        error = target - self.position
        self.integral = np.where(np.abs(error) < 0.03, np.clip(self.integral + 0.15 * error, -0.03, 0.03), 0)
        move = (self.gain * error + self.integral) / 0.05
        move *= min(1, (speed or self.speed) / max(np.abs(move).max(), 1e-9))
        turn = Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec() / 0.5
        turn *= min(1, self.turn_speed / max(np.abs(turn).max(), 1e-9))
        motion = np.r_[move, turn]
        motion += self.noise * (np.abs(motion).max() + 0.05) * self.rng.standard_normal(6)
        return np.clip(np.r_[motion, gripper], -1, 1)

    def go(self, target, rotation, gripper: float, steps: int, near: float = 0.0, turned: float = np.inf, speed=None, until=None):
        """Moves to `target`, an array or a function that is read in every step, for at most `steps`.

        Stops within `near` (m) of it and `turned` (rad) of the rotation, or, where `until` is given, as soon as that is true.
        """
        for _ in range(steps):
            goal = target() if callable(target) else target
            if until() if until else self.distance(goal) < near and self.angle(rotation) < turned:
                return
            yield self.act(goal, rotation, gripper, speed)

    def hold(self, rotation, gripper: float, steps: int):
        """Stays where it is."""
        yield from self.go(self.position, rotation, gripper, steps)

    def close(self, rotation):
        """Closes the gripper until the fingers have stopped, which takes 10 to 15 steps."""
        here, gap, still = self.position, self.gap(), 0
        for step in range(25):
            yield self.act(here, rotation, CLOSED)
            before, gap = gap, self.gap()
            still = still + 1 if step >= 6 and abs(gap - before) < 5e-4 else 0
            if still == 3:
                return


# ------------------------------------------------------------------------------------- experts
def lift(env, arms, rng):
    """Picks the cube up."""
    (arm,) = arms
    cube = lambda: body(env, env.cube_body_id)
    rotation = arm.facing(wrap(yaw_of(body_axes(env, env.cube_body_id)), np.pi / 2))
    yield from arm.go(cube() + rng.uniform(0.06, 0.10) * UP, rotation, OPEN, 60, near=0.015, turned=0.1)
    yield from arm.go(cube, rotation, OPEN, 40, near=0.01, speed=0.5)
    yield from arm.close(rotation)
    yield from arm.go(arm.position + 0.12 * UP, rotation, CLOSED, 60)


def can(env, arms, rng):
    """Picks the can up, carries it over its compartment, lowers it and lets go."""
    (arm,) = arms
    can = lambda: body(env, env.obj_body_id[env.objects[env.object_id].name])
    rotation = arm.facing(rng.uniform(-0.2, 0.2))
    grasp = rng.uniform(0.0, 0.02) * UP
    over = np.r_[env.target_bin_placements[env.object_id][:2] + rng.uniform(-0.02, 0.02, 2), 1.10]
    down = np.r_[over[:2], rng.uniform(0.93, 0.98)]
    yield from arm.go(lambda: can() + 0.12 * UP, rotation, OPEN, 80, near=0.02)
    yield from arm.go(lambda: can() + grasp, rotation, OPEN, 60, near=0.01, speed=0.5)
    yield from arm.close(rotation)
    yield from arm.go(np.r_[arm.position[:2], 1.10], rotation, CLOSED, 60, until=lambda: arm.position[2] > 1.06)
    yield from arm.go(over, rotation, CLOSED, 80, until=lambda: np.linalg.norm((over - arm.position)[:2]) < 0.03)
    yield from arm.go(down, rotation, CLOSED, 40, until=lambda: arm.position[2] < down[2] + 0.03)
    yield from arm.go(down, rotation, OPEN, 5)
    yield from arm.go(over, rotation, OPEN, 40)


def square(env, arms, rng):
    """Takes the nut by its handle, lifts it, turns and centres it over the peg, lowers it and lets go."""
    (arm,) = arms
    index, site = env.obj_body_id["SquareNut"], env.object_site_ids[env.nut_to_id["square"]]
    nut = lambda: body(env, index)
    nut_yaw = lambda: yaw_of(body_axes(env, index))
    handle = lambda: env.sim.data.site_xpos[site] + 0.010 * body_axes(env, index)[:, 0]  # its outer part, clear of the ring
    peg = body(env, env.peg1_body_id)

    first, options = nut_yaw(), []
    for half_turn in (0, np.pi):  # either way round, the fingers close across the handle
        grasp_yaw = wrap(first - arm.closing_yaw + np.pi / 2 + half_turn)
        for last in (np.pi, np.pi / 2, -np.pi / 2):  # handle toward the robot or sideways; away from it is out of reach
            turn = wrap(last - first)
            if max(abs(grasp_yaw), abs(grasp_yaw + turn)) < 1.8:  # what the wrist can do
                cost = abs(turn) + 0.5 * abs(grasp_yaw) + 0.5 * abs(grasp_yaw + turn) - 0.2 * (last == np.pi)
                options.append((cost, grasp_yaw, last))
    if not options:
        return
    _, grasp_yaw, last = min(options)

    rotation = arm.facing(grasp_yaw)
    height = 0.83 + rng.uniform(0.05, 0.09)
    above = lambda: np.r_[handle()[:2], height]
    offset = np.r_[rng.uniform(-0.003, 0.003, 2), rng.uniform(0.004, 0.008)]

    def over_handle():
        error = above() - arm.position
        return np.linalg.norm(error[:2]) < 0.006 and abs(error[2]) < 0.03 and arm.angle(rotation) < 0.08

    yield from arm.go(above, rotation, OPEN, 80, until=over_handle)
    yield from arm.go(lambda: handle() + offset, rotation, OPEN, 50, near=0.006, speed=0.6)
    yield from arm.close(rotation)
    carry = rng.uniform(0.985, 1.01)  # height of the nut, m
    yield from arm.go(np.r_[arm.position[:2], carry + 0.03], rotation, CLOSED, 60, until=lambda: nut()[2] > carry - 0.02)

    arm.turn_speed = 0.35
    for _ in range(120):  # over the peg, by where the nut is, not the gripper
        error, turn = np.r_[(peg - nut())[:2], carry - nut()[2]], wrap(last - nut_yaw())
        if np.linalg.norm(error[:2]) < 0.004 and abs(turn) < 0.06:
            break
        yield arm.act(arm.position + error, arm.facing(arm.yaw() + turn), CLOSED)
    release = rng.uniform(0.915, 0.935)
    for _ in range(60):  # down, above the top of the peg only while centred
        error, height = peg - nut(), nut()[2]
        if height < release:
            break
        centred = np.linalg.norm(error[:2]) < 0.005 or height < 0.95
        error[2] = -0.012 if centred else 0.965 - height
        yield arm.act(arm.position + error, arm.facing(arm.yaw() + wrap(last - nut_yaw())), CLOSED)
    here, rotation = arm.position, arm.rotation
    yield from arm.go(here, rotation, OPEN, 5)
    yield from arm.go(here + 0.06 * UP, rotation, OPEN, 40)


@dataclass
class Handover:
    """What the two arms of Transport tell each other."""

    place: np.ndarray
    """Where the hammer changes hands (m), (3,)."""
    offered: bool = False
    taken: bool = False
    released: bool = False


def hammer_axis(env) -> np.ndarray:
    """Unit vector along the hammer's handle, toward the second arm, (3,)."""
    axis = body_axes(env, env.transport.payload_body_id)[:, 2]
    return axis if axis[1] > 0 else -axis


def across(axis: np.ndarray) -> float:
    """Yaw (rad) at which the fingers close across a horizontal axis."""
    return np.arctan2(-axis[0], axis[1])


def transport_first_arm(env, arm, rng, handover):
    """Takes the lid off, fetches the hammer and hands it over."""
    scene, level = env.transport, arm.facing(0)
    lid, hammer = lambda: np.array(scene.lid_handle_pos), lambda: np.array(scene.payload_pos)
    yield from arm.go(lambda: lid() + 0.08 * UP, level, OPEN, 120, near=0.02, turned=0.15)
    yield from arm.go(lambda: lid() + 0.003 * UP, level, OPEN, 40, near=0.008, turned=0.15, speed=0.6)
    yield from arm.close(level)
    grasp = arm.position
    yield from arm.go(grasp + rng.uniform(0.06, 0.09) * UP, level, CLOSED, 120, near=0.03, turned=0.15)
    aside = np.array([rng.uniform(-0.24, -0.18), rng.uniform(-0.47, -0.43), 0])
    yield from arm.go(aside + (grasp[2] + 0.07) * UP, level, CLOSED, 120, near=0.04, turned=0.15)
    yield from arm.go(aside + 0.86 * UP, level, CLOSED, 50, near=0.02, turned=0.15)
    yield from arm.hold(level, OPEN, 7)

    head = rng.uniform(-0.055, -0.045)  # near the hammer's head, so that it does not sag and its tail is free for the other arm
    grip = lambda: hammer() + head * hammer_axis(env)
    yield from arm.go(aside + [0.02, 0, 1.08], level, OPEN, 120, near=0.06, turned=0.15)
    rotation = arm.facing(across(hammer_axis(env)))
    yield from arm.go(lambda: np.r_[grip()[:2], 1.05], rotation, OPEN, 120, near=0.03, turned=0.15)
    yield from arm.go(lambda: np.r_[grip()[:2], 0.90], rotation, OPEN, 60, near=0.015, turned=0.15)
    yield from arm.go(lambda: np.r_[grip()[:2], hammer()[2] + 0.008], rotation, OPEN, 50, near=0.008, turned=0.15, speed=0.6)
    yield from arm.close(rotation)
    yield from arm.go(arm.position + 0.24 * UP, rotation, CLOSED, 120, near=0.04, turned=0.15)
    yield from arm.go(handover.place + [0, -0.08, 0.03], level, CLOSED, 120, near=0.03, turned=0.15)
    yield from arm.go(handover.place, level, CLOSED, 60, near=0.012, turned=0.15, speed=0.5)

    handover.offered, here = True, arm.position
    while not handover.taken:
        yield arm.act(here, level, CLOSED)
    yield from arm.go(here, level, OPEN, 6)
    handover.released = True
    yield from arm.go(here + 0.10 * UP, level, OPEN, 30, near=0.03, turned=0.15)
    yield from arm.go(here + [0, -0.2, 0.10], level, OPEN, 40, near=0.03, turned=0.15)
    here = arm.position
    while True:
        yield arm.act(here, level, OPEN)


def transport_second_arm(env, arm, rng, handover):
    """Throws the trash away, takes the hammer and puts it into the target bin."""
    scene, level = env.transport, arm.facing(0)
    trash, hammer = lambda: np.array(scene.trash_pos), lambda: np.array(scene.payload_pos)
    rotation = arm.facing(wrap(yaw_of(body_axes(env, scene.trash_body_id)) - arm.closing_yaw, np.pi / 2))
    yield from arm.go(lambda: np.r_[trash()[:2], 1.05], rotation, OPEN, 120, near=0.03, turned=0.15)
    yield from arm.go(lambda: np.r_[trash()[:2], 0.90], rotation, OPEN, 60, near=0.015, turned=0.15)
    yield from arm.go(lambda: trash() + 0.006 * UP, rotation, OPEN, 50, near=0.008, turned=0.15, speed=0.6)
    yield from arm.close(rotation)
    yield from arm.go(arm.position + 0.22 * UP, rotation, CLOSED, 120, near=0.04, turned=0.15)
    trash_bin = np.array(scene.trash_bin_pos)[:2]
    yield from arm.go(np.r_[trash_bin + rng.uniform(-0.02, 0.02, 2), 1.05], level, CLOSED, 120, near=0.04, turned=0.15)
    yield from arm.go(np.r_[trash_bin, rng.uniform(0.93, 0.97)], level, CLOSED, 40, near=0.03, turned=0.15)
    yield from arm.hold(level, OPEN, 8)

    waiting = handover.place + [0, 0.25, 0.10]
    yield from arm.go(np.r_[trash_bin, 1.08], level, OPEN, 120, near=0.05, turned=0.15)
    yield from arm.go(waiting, level, OPEN, 120, near=0.03, turned=0.15)
    while not handover.offered:
        yield arm.act(waiting, level, OPEN)
    tail = rng.uniform(0.084, 0.090)
    grip = lambda: hammer() + tail * hammer_axis(env)
    rotation = arm.facing(across(hammer_axis(env)))
    yield from arm.go(lambda: grip() + [0, 0.01, 0.08], rotation, OPEN, 60, near=0.015, turned=0.15)
    yield from arm.go(lambda: grip() + 0.002 * UP, rotation, OPEN, 60, near=0.008, turned=0.15, speed=0.5)
    yield from arm.close(rotation)
    handover.taken, here = True, arm.position
    while not handover.released:
        yield arm.act(here, rotation, CLOSED)
    yield from arm.go(here + 0.02 * UP, rotation, CLOSED, 4)
    yield from arm.go(here + [0, 0.15, 0.06], rotation, CLOSED, 120, near=0.04, turned=0.15)

    target_bin = np.array(scene.target_bin_pos)[:2]
    above = lambda height: np.r_[target_bin + (arm.position - hammer())[:2] * [1, 0.8], height]  # the hammer hangs beside the gripper
    yield from arm.go(lambda: above(1.12), level, CLOSED, 120, near=0.03, turned=0.15)
    yield from arm.go(lambda: above(0.95), level, CLOSED, 40, near=0.03, turned=0.15, speed=0.7)
    yield from arm.go(lambda: arm.position, level, OPEN, 8, until=lambda: False)
    here = arm.position
    while True:
        yield arm.act(here + 0.1 * UP, level, OPEN)


def transport(env, arms, rng):
    """The second arm clears the target bin while the first opens the other bin; then the hammer goes from hand to hand."""
    handover = Handover(np.array([rng.uniform(-0.03, 0.03), rng.uniform(-0.065, -0.055), rng.uniform(1.03, 1.07)]))
    first, second = transport_first_arm(env, arms[0], rng, handover), transport_second_arm(env, arms[1], rng, handover)
    while True:
        yield np.r_[next(first), next(second)]


EXPERTS = {"lift": lift, "can": can, "square": square, "transport": transport}


# ----------------------------------------------------------------------------------- recording
def build(task: str, images: bool = False, **kwargs):
    """The task's environment, with the sizes of objects that it also has in training."""
    np.random.seed(MODEL_SEED)  # noqa: NPY002, robosuite draws from the global generator
    return make_robosuite(task, images, **kwargs)


def run_episode(env, task: str, seed: int, horizon: int = 0, noise: float = 0.05) -> dict:
    """The expert's episode from a reset with `seed`, of at most `horizon` steps (0: the task's) and a few beyond success.

    Returns actions (T, action_dim) float32, rewards (T,) float32, 0 or 1, states (T, n) float64, the simulator's before each
    action, and obs and next_obs, {key: (T, dim)} float32. The episode succeeded if its last reward is 1.
    """
    np.random.seed(seed)  # noqa: NPY002
    rng = np.random.default_rng(seed)
    obs, sim = [env.reset()], env.env
    actions, rewards, states = [], [], []
    arms = [Arm(sim, i, rng, noise) for i in range(TASKS[task].robots)]
    for action in itertools.islice(EXPERTS[task](sim, arms, rng), horizon or TASKS[task].horizon):
        actions.append(action.astype(np.float32))
        states.append(sim.sim.get_state().flatten())
        rewards.append(control_step(sim, actions[-1], observe=True))
        obs.append(env.get_observation(sim._get_observations()))
        if sum(rewards) > STEPS_AFTER_SUCCESS:
            break
    columns = {key: np.array([o[key] for o in obs], np.float32) for key in TASKS[task].state_keys(False)}
    return {
        "actions": np.array(actions), "rewards": np.array(rewards, np.float32), "states": np.array(states),
        "obs": {key: value[:-1] for key, value in columns.items()}, "next_obs": {key: value[1:] for key, value in columns.items()},
    }  # fmt: skip


@contextmanager
def replacing(path: Path):
    """An HDF5 file to write, in memory (a full disk would crash HDF5), which reaches the disk and takes its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as disk:
            with h5py.File(partial, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
                yield file
                file.flush()
                image = file.id.get_file_image()
            disk.write(image)
        partial.replace(path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)


def write_demo(group: h5py.Group, episode: dict):
    """Writes one episode as robomimic does; all but the first state, from which to replay it, is rounded to RESOLUTION."""
    coarse = lambda value: (np.round(value / RESOLUTION) * RESOLUTION).astype(value.dtype)
    steps, states = len(episode["actions"]), episode["states"]
    columns = {"actions": episode["actions"], "rewards": episode["rewards"], "states": np.r_[states[:1], coarse(states[1:])]}
    columns["dones"] = np.eye(1, steps, steps - 1, dtype=np.int64)[0]  # 1 in the last step
    for name in ("obs", "next_obs"):
        columns |= {f"{name}/{key}": coarse(value) for key, value in episode[name].items()}
    for name, value in columns.items():
        group.create_dataset(name, data=value, chunks=value.shape, compression="gzip", compression_opts=9, shuffle=True)
    group.attrs["num_samples"] = steps


def make(args: Args) -> Path:
    """Lets the expert act until `args.episodes` have succeeded and writes them; returns the file's path."""
    if args.episodes < 1 or not 0 <= args.valid_fraction < 1 or args.noise < 0:
        raise SystemExit("--episodes must be at least 1, --valid-fraction in [0, 1) and --noise at least 0.")
    out = args.out or DEMOS / args.task / "low_dim.hdf5"
    env = build(args.task)
    lengths = []
    with replacing(out) as file, tqdm(total=args.episodes, desc=args.task, unit="demo") as progress:
        data = file.create_group("data")
        for attempt in itertools.count():
            seed = args.seed + attempt
            episode = run_episode(env, args.task, seed, noise=args.noise)
            if len(episode["rewards"]) and episode["rewards"][-1] == 1:
                group = data.create_group(f"demo_{len(lengths)}")
                write_demo(group, episode)
                group.attrs["seed"] = seed
                lengths.append(len(episode["actions"]))
                progress.update()
            progress.set_postfix_str(f"{len(lengths)}/{attempt + 1} succeeded")
            if len(lengths) == args.episodes:
                break
            if attempt >= 20 and len(lengths) < 0.1 * attempt:
                raise SystemExit(f"Only {len(lengths)} of {attempt + 1} attempts succeeded: gave up, wrote nothing. Try less --noise.")
        data.attrs["env_args"] = json.dumps(metadata(args.task, images=False))
        data.attrs["total"] = sum(lengths)
        valid = min(round(args.valid_fraction * args.episodes), args.episodes - 1)
        names = np.array([f"demo_{i}".encode() for i in range(args.episodes)])
        file["mask/train"] = names[: len(names) - valid]
        if valid:
            file["mask/valid"] = names[len(names) - valid :]
    rate = len(lengths) / (attempt + 1)
    print(f"{args.task}: {len(lengths)} of {attempt + 1} attempts succeeded ({rate:.0%}), {np.mean(lengths):.0f} steps on average")
    return out


# ----------------------------------------------------------------------------------- rendering
def render_images(source: Path, out: Path | None = None, fast_render: bool = True) -> Path:
    """Copies a file of states and adds obs/<camera>_image, (T, 96, 96, 3) uint8, rendered from them; returns the copy's path.

    A file with its own models (robomimic's published ones) is rendered with those. Run `choose_renderer` first.
    Raises DatasetError where `source` cannot be read.
    """
    try:
        original = h5py.File(source, "r")
        meta = json.loads(original["data"].attrs["env_args"])
        demos = {name: demo["states"][()] for name, demo in original["data"].items()}  # {name: (T, n)}
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DatasetError(f"{source}: cannot be read as a robomimic file with states ({error})") from error
    task = next((name for name, spec in TASKS.items() if spec.env_name == meta.get("env_name")), None)
    if task is None:
        raise DatasetError(f"{source}: holds {meta.get('env_name')}; known are {', '.join(spec.env_name for spec in TASKS.values())}")
    out = out or DEMOS / task / "image.hdf5"
    if out.exists() and out.samefile(source):
        raise SystemExit(f"{out}: is the file that is read; choose another --out.")
    meta["env_kwargs"] |= {
        key: value for key, value in metadata(task, images=True)["env_kwargs"].items() if "camera" in key or "render" in key
    }
    env = build(task, images=True, meta=meta, fast_render=fast_render)
    env.reset()
    steps = sum(map(len, demos.values()))
    with closing(env.env), original, replacing(out) as file, tqdm(total=steps, desc=f"{task} images", unit="step") as progress:
        data = file.create_group("data")
        for name, states in demos.items():
            original.copy(f"data/{name}", data)
            if "model_file" in data[name].attrs:
                env.reset_to({"model": data[name].attrs["model_file"]})
                if fast_render:
                    render_fast(env.env.sim)
            images = {key: [] for key in TASKS[task].image_keys}
            for state in states:
                obs = env.reset_to({"states": state})
                for key, frames in images.items():
                    frames.append(obs[key])
                progress.update()
            for key, frames in images.items():
                data[name].pop(f"obs/{key}", None)
                chunks = (min(FRAMES_PER_CHUNK, len(frames)), *frames[0].shape)
                data[name].create_dataset(f"obs/{key}", data=np.array(frames), chunks=chunks, compression="gzip", compression_opts=9)
        for key, value in original["data"].attrs.items():
            data.attrs[key] = value
        data.attrs["env_args"], data.attrs["fast_render"] = json.dumps(meta), fast_render
        if "mask" in original:
            original.copy("mask", file)
    return out


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.images_from:
        choose_renderer()
    try:
        path = render_images(args.images_from, args.out, args.fast_render) if args.images_from else make(args)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: nothing was written.") from None
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
