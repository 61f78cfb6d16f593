"""Makes robomimic demonstrations (Mandlekar et al. 2021) with scripted experts, and renders images.

    python -m demos.make_robomimic_demos --task square             # writes demos/square/low_dim.hdf5
    python -m demos.make_robomimic_demos --images-from demos/square/low_dim.hdf5      # and image.hdf5

The experts read positions from the simulator and act through the same actions as a policy: per arm the
gripper's displacement in units of 5 cm, its rotation in units of 0.5 rad, and -1 to open, 1 to close it.
"""

import functools
import itertools
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import h5py
import numpy as np
import tyro
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from common.settings import Count, Seed, Weight, check_bounds
from demos.hdf5 import DEMOS, in_order, numbers, reading, replacing
from demos.robomimic import read_metadata
from envs.rendering import choose_renderer
from envs.robomimic import TASKS, control_step, make_robosuite, metadata, render_fast

OPEN, CLOSED = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])
FOREVER = 10**9  # steps
STEPS_AFTER_SUCCESS = 5  # environment steps, so that the last state is surely a solved one
RESOLUTION = 2.0**-22  # 2.4e-7 m, rad, m/s or rad/s, to which records are rounded: halves the file
GZIP = dict(compression="gzip", compression_opts=9)
VALID = 0.1  # share of the episodes in mask/valid, not mask/train, as in robomimic's files
FRAMES_PER_CHUNK = 16  # of images: gzip reaches back one frame, so the background costs little


@dataclass
class Args:
    task: Literal["lift", "can", "square", "transport"] = "square"  # with --images-from it is the file's
    episodes: Count = 100  # successes to record; failures are dropped (robomimic's files hold 200)
    seed: Seed = 0  # seed of the first attempt; the others follow one by one
    noise: Weight = 0.05  # standard deviation of the actions' noise, relative to the action; 0: none
    images_from: Path | None = None  # render the images of this file's states instead of recording
    fast_render: bool = True  # without multisampling and shadows: 3 times as fast; train with the same
    out: Path | None = None  # output; default demos/<task>/low_dim.hdf5, with --images-from image.hdf5


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
    """One arm whose gripper points down and moves to poses (m; the yaw is 0 as the episode starts).

    Gain and speed are drawn per episode, so that demonstrations differ. Methods yield actions.
    """

    def __init__(self, env, index: int, rng: np.random.Generator, noise: float):
        self.sim, self.robot = env.sim, env.robots[index]
        self.rng, self.noise = rng, noise
        self.gain = rng.uniform(1.5, 2.0)  # per step
        self.speed = rng.uniform(0.7, 1.0)  # share of the largest action
        self.turn_speed = 0.5  # share of the largest action
        self.integral = np.zeros(3)  # of the position error: the controller alone stops 1 to 2 cm short
        forward = self.rotation[:, 0] * [1, 1, 0]
        forward /= np.linalg.norm(forward)
        self.level = np.stack([forward, np.cross(-UP, forward), -UP], 1)  # pointing down
        names = (f"{self.robot.gripper.naming_prefix}finger{i}_pad_collision" for i in (1, 2))
        first, second = (self.sim.data.geom_xpos[self.sim.model.geom_name2id(name)] for name in names)
        x, y, _ = second - first
        self.closing_yaw = np.arctan2(y, x)  # direction in which the fingers close at yaw 0

    @property
    def position(self) -> np.ndarray:  # (3,), m
        return np.array(self.sim.data.site_xpos[self.robot.eef_site_id])

    @property
    def rotation(self) -> np.ndarray:  # (3, 3)
        return np.array(self.sim.data.site_xmat[self.robot.eef_site_id]).reshape(3, 3)

    def facing(self, yaw: float) -> np.ndarray:
        """Pointing down, turned by yaw (rad): a rotation, (3, 3)."""
        return Rotation.from_euler("z", yaw).as_matrix() @ self.level

    def across(self, axis: np.ndarray) -> np.ndarray:
        """Pointing down, with fingers that close across a horizontal axis: a rotation, (3, 3)."""
        return self.facing(np.arctan2(-axis[0], axis[1]))

    def yaw(self) -> float:
        turned = self.rotation @ self.level.T
        return np.arctan2(turned[1, 0] - turned[0, 1], turned[0, 0] + turned[1, 1])

    def angle(self, rotation: np.ndarray) -> float:
        return np.linalg.norm(Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec())

    def gap(self) -> float:
        """Opening of the fingers (m)."""
        return sum(abs(self.sim.data.get_joint_qpos(joint)) for joint in self.robot.gripper.joints)

    def act(self, target: np.ndarray, rotation: np.ndarray, gripper: float, speed=None) -> np.ndarray:
        """The action (7,) that moves toward a pose, with noise."""
        error = target - self.position
        integral = np.clip(self.integral + 0.15 * error, -0.03, 0.03)
        self.integral = np.where(np.abs(error) < 0.03, integral, 0)
        move = (self.gain * error + self.integral) / 0.05
        move *= min(1, (speed or self.speed) / max(np.abs(move).max(), 1e-9))
        turn = Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec() / 0.5
        turn *= min(1, self.turn_speed / max(np.abs(turn).max(), 1e-9))
        motion = np.r_[move, turn]
        motion += self.noise * (np.abs(motion).max() + 0.05) * self.rng.standard_normal(6)
        return np.clip(np.r_[motion, gripper], -1, 1)

    def go(self, target, rotation, gripper: float, steps: int, near: float = 0.0, turned: float = np.inf,
           speed=None, until=None):  # fmt: skip
        """Moves for up to `steps` to a position, or one read in every step: until near, or `until`."""
        for _ in range(steps):
            goal = target() if callable(target) else target
            distance = np.linalg.norm(goal - self.position)
            if until() if until else distance < near and self.angle(rotation) < turned:
                return
            yield self.act(goal, rotation, gripper, speed)

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
def lift(env, rng, arm):
    """Picks the cube up."""
    cube = lambda: body(env, env.cube_body_id)
    rotation = arm.facing(wrap(yaw_of(body_axes(env, env.cube_body_id)), np.pi / 2))
    yield from arm.go(cube() + rng.uniform(0.06, 0.10) * UP, rotation, OPEN, 60, near=0.015, turned=0.1)
    yield from arm.go(cube, rotation, OPEN, 40, near=0.01, speed=0.5)
    yield from arm.close(rotation)
    yield from arm.go(arm.position + 0.12 * UP, rotation, CLOSED, 60)


def can(env, rng, arm):
    """Picks the can up, carries it over its compartment, lowers it and lets go."""
    can = lambda: body(env, env.obj_body_id[env.objects[env.object_id].name])
    rotation = arm.facing(rng.uniform(-0.2, 0.2))
    grasp = rng.uniform(0.0, 0.02) * UP
    over = np.r_[env.target_bin_placements[env.object_id][:2] + rng.uniform(-0.02, 0.02, 2), 1.10]
    down = np.r_[over[:2], rng.uniform(0.93, 0.98)]
    yield from arm.go(lambda: can() + 0.12 * UP, rotation, OPEN, 80, near=0.02)
    yield from arm.go(lambda: can() + grasp, rotation, OPEN, 60, near=0.01, speed=0.5)
    yield from arm.close(rotation)
    up = np.r_[arm.position[:2], 1.10]
    above = lambda: np.linalg.norm((over - arm.position)[:2]) < 0.03
    yield from arm.go(up, rotation, CLOSED, 60, until=lambda: arm.position[2] > 1.06)
    yield from arm.go(over, rotation, CLOSED, 80, until=above)
    yield from arm.go(down, rotation, CLOSED, 40, until=lambda: arm.position[2] < down[2] + 0.03)
    yield from arm.go(down, rotation, OPEN, 5)
    yield from arm.go(over, rotation, OPEN, 40)


def square_grasp(arm, nut_yaw: float) -> tuple[float, float] | None:
    """The gripper's yaw to take the nut and the nut's on the peg (rad); None if the wrist cannot."""
    options = []
    for half_turn in (0, np.pi):  # either way round, the fingers close across the handle
        grasp_yaw = wrap(nut_yaw - arm.closing_yaw + np.pi / 2 + half_turn)
        for last in (np.pi, np.pi / 2, -np.pi / 2):  # handle toward the robot or sideways
            turn = wrap(last - nut_yaw)
            if max(abs(grasp_yaw), abs(grasp_yaw + turn)) < 1.8:
                strain = abs(turn) + 0.5 * abs(grasp_yaw) + 0.5 * abs(grasp_yaw + turn)
                options.append((strain - 0.2 * (last == np.pi), grasp_yaw, last))
    return min(options)[1:] if options else None


def square(env, rng, arm):
    """Takes the nut by its handle, turns and centres it over the peg, lowers it and lets go."""
    index, site = env.obj_body_id["SquareNut"], env.object_site_ids[env.nut_to_id["square"]]
    nut = lambda: body(env, index)
    nut_yaw = lambda: yaw_of(body_axes(env, index))
    handle = lambda: env.sim.data.site_xpos[site] + 0.010 * body_axes(env, index)[:, 0]  # its outer part
    peg = body(env, env.peg1_body_id)
    grasp = square_grasp(arm, nut_yaw())
    if grasp is None:
        return
    grasp_yaw, last = grasp
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
    lifted = np.r_[arm.position[:2], carry + 0.03]
    yield from arm.go(lifted, rotation, CLOSED, 60, until=lambda: nut()[2] > carry - 0.02)
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


def hammer_axis(env) -> np.ndarray:
    """Unit vector along the hammer's handle, toward the second arm, (3,)."""
    axis = body_axes(env, env.transport.payload_body_id)[:, 2]
    return axis if axis[1] > 0 else -axis


def fetch(arm, spot: Callable[[], np.ndarray], rotation):
    """Goes over a spot (3,) and down to it, and closes the gripper."""
    go = functools.partial(arm.go, turned=0.15)
    yield from go(lambda: np.r_[spot()[:2], 1.05], rotation, OPEN, 120, near=0.03)
    yield from go(lambda: np.r_[spot()[:2], 0.90], rotation, OPEN, 60, near=0.015)
    yield from go(spot, rotation, OPEN, 50, near=0.008, speed=0.6)
    yield from arm.close(rotation)


def transport_first_arm(env, arm, rng, handover):
    """Takes the lid off, fetches the hammer and hands it over."""
    scene, level, go = env.transport, arm.facing(0), functools.partial(arm.go, turned=0.15)
    lid, hammer = lambda: np.array(scene.lid_handle_pos), lambda: np.array(scene.payload_pos)
    yield from go(lambda: lid() + 0.08 * UP, level, OPEN, 120, near=0.02)
    yield from go(lambda: lid() + 0.003 * UP, level, OPEN, 40, near=0.008, speed=0.6)
    yield from arm.close(level)
    grasp = arm.position
    yield from go(grasp + rng.uniform(0.06, 0.09) * UP, level, CLOSED, 120, near=0.03)
    aside = np.array([rng.uniform(-0.24, -0.18), rng.uniform(-0.47, -0.43), 0])
    yield from go(aside + (grasp[2] + 0.07) * UP, level, CLOSED, 120, near=0.04)
    yield from go(aside + 0.86 * UP, level, CLOSED, 50, near=0.02)
    yield from arm.go(arm.position, level, OPEN, 7)
    head = rng.uniform(-0.055, -0.045)  # near the head: it does not sag, and the tail stays free
    grip = lambda: hammer() + head * hammer_axis(env)
    yield from go(aside + [0.02, 0, 1.08], level, OPEN, 120, near=0.06)
    rotation = arm.across(hammer_axis(env))
    yield from fetch(arm, lambda: np.r_[grip()[:2], hammer()[2] + 0.008], rotation)
    yield from go(arm.position + 0.24 * UP, rotation, CLOSED, 120, near=0.04)
    yield from go(handover.place + [0, -0.08, 0.03], level, CLOSED, 120, near=0.03)
    yield from go(handover.place, level, CLOSED, 60, near=0.012, speed=0.5)
    handover.offered, here = True, arm.position
    yield from go(here, level, CLOSED, FOREVER, until=lambda: handover.taken)
    yield from go(here, level, OPEN, 6)
    handover.released = True
    yield from go(here + 0.10 * UP, level, OPEN, 30, near=0.03)
    yield from go(here + [0, -0.2, 0.10], level, OPEN, 40, near=0.03)
    yield from arm.go(arm.position, level, OPEN, FOREVER)


def transport_second_arm(env, arm, rng, handover):
    """Throws the trash away, takes the hammer and puts it into the target bin."""
    scene, level, go = env.transport, arm.facing(0), functools.partial(arm.go, turned=0.15)
    trash, hammer = lambda: np.array(scene.trash_pos), lambda: np.array(scene.payload_pos)
    rotation = arm.facing(wrap(yaw_of(body_axes(env, scene.trash_body_id)) - arm.closing_yaw, np.pi / 2))
    yield from fetch(arm, lambda: trash() + 0.006 * UP, rotation)
    yield from go(arm.position + 0.22 * UP, rotation, CLOSED, 120, near=0.04)
    trash_bin = np.array(scene.trash_bin_pos)[:2]
    yield from go(np.r_[trash_bin + rng.uniform(-0.02, 0.02, 2), 1.05], level, CLOSED, 120, near=0.04)
    yield from go(np.r_[trash_bin, rng.uniform(0.93, 0.97)], level, CLOSED, 40, near=0.03)
    yield from arm.go(arm.position, level, OPEN, 8)
    waiting = handover.place + [0, 0.25, 0.10]
    yield from go(np.r_[trash_bin, 1.08], level, OPEN, 120, near=0.05)
    yield from go(waiting, level, OPEN, 120, near=0.03)
    yield from go(waiting, level, OPEN, FOREVER, until=lambda: handover.offered)
    tail = rng.uniform(0.084, 0.090)
    grip = lambda: hammer() + tail * hammer_axis(env)
    rotation = arm.across(hammer_axis(env))
    yield from go(lambda: grip() + [0, 0.01, 0.08], rotation, OPEN, 60, near=0.015)
    yield from go(lambda: grip() + 0.002 * UP, rotation, OPEN, 60, near=0.008, speed=0.5)
    yield from arm.close(rotation)
    handover.taken, here = True, arm.position
    yield from go(here, rotation, CLOSED, FOREVER, until=lambda: handover.released)
    yield from go(here + 0.02 * UP, rotation, CLOSED, 4)
    yield from go(here + [0, 0.15, 0.06], rotation, CLOSED, 120, near=0.04)
    target_bin = np.array(scene.target_bin_pos)[:2]
    beside = lambda: (arm.position - hammer())[:2] * [1, 0.8]  # the hammer hangs beside the gripper
    yield from go(lambda: np.r_[target_bin + beside(), 1.12], level, CLOSED, 120, near=0.03)
    yield from go(lambda: np.r_[target_bin + beside(), 0.95], level, CLOSED, 40, near=0.03, speed=0.7)
    yield from go(lambda: arm.position, level, OPEN, 8)
    yield from go(arm.position + 0.1 * UP, level, OPEN, FOREVER)


def transport(env, rng, *arms):
    """The second arm clears the target bin, the first opens the other; then the hammer changes hands."""
    place = rng.uniform((-0.03, -0.065, 1.03), (0.03, -0.055, 1.07))  # of the handover (m)
    handover = SimpleNamespace(place=place, offered=False, taken=False, released=False)
    first = transport_first_arm(env, arms[0], rng, handover)
    second = transport_second_arm(env, arms[1], rng, handover)
    while True:
        yield np.r_[next(first), next(second)]


EXPERTS = {"lift": lift, "can": can, "square": square, "transport": transport}


# ----------------------------------------------------------------------------------- recording
def run_episode(env, task: str, seed: int, noise: float = 0.05) -> dict:
    """The expert's episode from a reset with `seed`.

    Returns actions (T, action_dim), rewards (T,), 0 or 1, obs and next_obs, {key: (T, dim)}, in float32,
    and float64 states (T, n), the simulator's before each action.
    """
    np.random.seed(seed)  # noqa: NPY002
    rng = np.random.default_rng(seed)
    obs, sim = [env.reset()], env.env
    actions, rewards, states = [], [], []
    arms = [Arm(sim, i, rng, noise) for i in range(TASKS[task].robots)]
    for action in itertools.islice(EXPERTS[task](sim, rng, *arms), TASKS[task].horizon):
        actions.append(action.astype(np.float32))
        states.append(sim.sim.get_state().flatten())
        rewards.append(control_step(sim, actions[-1], observe=True))
        obs.append(env.get_observation(sim._get_observations()))
        if sum(rewards) > STEPS_AFTER_SUCCESS:
            break
    columns = {key: np.array([o[key] for o in obs], np.float32) for key in TASKS[task].state_keys(False)}
    episode = dict(actions=np.array(actions), rewards=np.array(rewards, np.float32))
    episode["states"] = np.array(states)
    episode["obs"] = {key: value[:-1] for key, value in columns.items()}
    return episode | {"next_obs": {key: value[1:] for key, value in columns.items()}}


def write_arrays(group: h5py.Group, arrays: dict[str, np.ndarray]):
    """Writes an episode's arrays {name: (T, ...)}, compressed."""
    for name, value in arrays.items():
        group.create_dataset(name, data=value, chunks=value.shape, shuffle=True, **GZIP)
    group.attrs["num_samples"] = len(arrays["actions"])


def write_demo(group: h5py.Group, episode: dict):
    """Writes one episode as robomimic does; rounds all but the first state, to replay it from."""
    coarse = lambda value: (np.round(value / RESOLUTION) * RESOLUTION).astype(value.dtype)
    steps, states = len(episode["actions"]), episode["states"]
    arrays = {name: episode[name] for name in ("actions", "rewards")}
    arrays["states"] = np.r_[states[:1], coarse(states[1:])]
    arrays["dones"] = np.eye(1, steps, steps - 1, dtype=np.int64)[0]  # 1 in the last step
    for name in ("obs", "next_obs"):
        arrays |= {f"{name}/{key}": coarse(value) for key, value in episode[name].items()}
    write_arrays(group, arrays)


def record(data: h5py.Group, args, name: str, attempt: Callable[[int], dict | None], write: Callable):
    """Lets `write` add a demo for each `attempt(seed)` that succeeds; their lengths, and attempts."""
    lengths = []
    with tqdm(total=args.episodes, desc=name, unit="demo") as progress:
        for attempts in itertools.count(1):
            seed = (args.seed + attempts - 1) % 2**32  # NumPy's generators take no other
            episode = attempt(seed)
            if episode is not None:
                group = data.create_group(f"demo_{len(lengths)}")
                write(group, episode)
                group.attrs["seed"] = seed
                lengths.append(len(episode["actions"]))
                progress.update()
            share = f"{len(lengths)} of {attempts} attempts succeeded"
            progress.set_postfix_str(share)
            if len(lengths) == args.episodes:
                break
            if attempts > 20 and len(lengths) < 0.1 * (attempts - 1):
                raise SystemExit(f"Only {share}: gave up, wrote nothing. Try less --noise.")
    print(f"{name}: {share} ({args.episodes / attempts:.0%}), {np.mean(lengths):.0f} steps on average")
    return lengths, attempts


def make(args: Args) -> Path:
    """Lets the expert act until `args.episodes` have succeeded; returns the path of their file."""
    check_bounds(args)
    out = args.out or DEMOS / args.task / "low_dim.hdf5"
    env = make_robosuite(args.task, images=False)

    def attempt(seed: int) -> dict | None:
        episode = run_episode(env, args.task, seed, noise=args.noise)
        return episode if len(episode["rewards"]) and episode["rewards"][-1] == 1 else None

    with replacing(out) as file:
        data = file.create_group("data")
        lengths, _ = record(data, args, args.task, attempt, write_demo)
        data.attrs["env_args"] = json.dumps(metadata(args.task, images=False))
        data.attrs["total"] = sum(lengths)
        names = np.array([f"demo_{i}".encode() for i in range(args.episodes)])
        train = args.episodes - round(VALID * args.episodes)
        file["mask/train"] = names[:train]
        if train < args.episodes:
            file["mask/valid"] = names[train:]
    return out


# ----------------------------------------------------------------------------------- rendering
def render_images(source: Path, out: Path | None = None, fast_render: bool = True) -> Path:
    """Copies a file of states and adds obs/<camera>_image, (T, 96, 96, 3), of its own models, if any."""
    with reading(source) as file:
        meta = read_metadata(file, source)
        states = lambda name: numbers(source, file, f"data/{name}/states", None, None, dtype=float)
        demos = {name: states(name) for name in in_order(file["data"])}  # {name: (T, n)}
    task = meta.pop("task")
    out = out or DEMOS / task / "image.hdf5"
    if out.exists() and out.samefile(source):
        raise SystemExit(f"{out}: is the file that is read; choose another --out.")
    for key, value in metadata(task, images=True)["env_kwargs"].items():
        if "camera" in key or "render" in key:
            meta["env_kwargs"][key] = value
    env = make_robosuite(task, images=True, meta=meta, fast_render=fast_render)
    env.reset()
    progress = tqdm(total=sum(map(len, demos.values())), desc=f"{task} images", unit="step")
    with closing(env.env), h5py.File(source) as original, replacing(out) as file, progress:
        for part in original:
            original.copy(part, file)
        attributes = file["data"].attrs
        attributes["env_args"], attributes["fast_render"] = json.dumps(meta), fast_render
        for name, states in demos.items():
            demo = file[f"data/{name}"]
            if "model_file" in demo.attrs:
                env.reset_to({"model": demo.attrs["model_file"]})
                if fast_render:
                    render_fast(env.env.sim)
            images = {key: [] for key in TASKS[task].image_keys}
            for state in states:
                obs = env.reset_to({"states": state})
                for key, frames in images.items():
                    frames.append(obs[key])
                progress.update()
            for key, frames in images.items():
                demo.pop(f"obs/{key}", None)
                chunks = (min(FRAMES_PER_CHUNK, len(frames)), *frames[0].shape)
                demo.create_dataset(f"obs/{key}", data=np.array(frames), chunks=chunks, **GZIP)
    return out


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.images_from:
        choose_renderer()
        path = render_images(args.images_from, args.out, args.fast_render)
    else:
        path = make(args)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
