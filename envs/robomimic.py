"""The robomimic tasks on robosuite, as DPPO (Ren et al. 2024) has them, in parallel processes.

Observations: "state", proprioception and (without cameras) the object's state; with cameras also "rgb",
uint8 images of 96 x 96, channels first, and "object", the object's state, which no policy may see.
Reward: 1 in every step in which the task is solved, else 0.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

from envs import rendering
from envs.interface import Episodes, check_finite
from envs.rendering import choose_renderer

IMAGE_SIZE = 96  # pixels
MODEL_SEED = 0  # of the sizes of objects, which robosuite draws once per model
TIMEOUT = 300  # s within which a simulator must answer
BAD_STATE = 4  # the first of MuJoCo's warnings of numbers that are not finite
# Imports of robomimic 0.3.0 that may be missing. mujoco_py is superseded by mujoco, egl_probe needs a
# GPU's headers, torchvision has no CPU wheel for this torch.
UNUSED = (
    "mujoco_py", "egl_probe", "tensorboardX", "torchvision", "torchvision.models",
    "torchvision.transforms", "torchvision.transforms.functional",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A robosuite task in DPPO's settings."""

    env_name: str  # robosuite's name
    cameras: tuple[str, ...]  # of the image observation
    horizon: int  # time limit in environment steps of 1/20 s
    chunk: int  # actions per decision
    object_size: int  # of the observation "object", which states hold and images replace
    robots: int = 1

    @property
    def proprioception(self) -> tuple[str, ...]:
        keys = "eef_pos", "eef_quat", "gripper_qpos"
        return tuple(f"robot{i}_{key}" for i in range(self.robots) for key in keys)

    def state_keys(self, images: bool) -> tuple[str, ...]:
        """Observation keys that make up "state", in order."""
        return self.proprioception if images else (*self.proprioception, "object")

    def state_dim(self, images: bool) -> int:
        return 9 * self.robots + (0 if images else self.object_size)

    @property
    def image_keys(self) -> tuple[str, ...]:
        return tuple(f"{camera}_image" for camera in self.cameras)


TASKS = {
    "lift": Task("Lift", ("agentview",), 300, 4, 10),
    "can": Task("PickPlaceCan", ("agentview",), 300, 4, 14),
    "square": Task("NutAssemblySquare", ("agentview",), 400, 4, 14),
    "transport": Task("TwoArmTransport", ("shouldercamera0", "shouldercamera1"), 800, 8, 41, robots=2),
}


def metadata(task: str, images: bool) -> dict:
    """robomimic's environment metadata of a task: what `env_args` holds in its datasets."""
    spec = TASKS[task]
    controller = {
        "type": "OSC_POSE", "input_max": 1, "input_min": -1, "kp": 150, "damping": 1,
        "impedance_mode": "fixed", "kp_limits": [0, 300], "damping_limits": [0, 10],
        "output_max": [0.05] * 3 + [0.5] * 3, "output_min": [-0.05] * 3 + [-0.5] * 3,
        "position_limits": None, "orientation_limits": None, "uncouple_pos_ori": True,
        "control_delta": True, "interpolation": None, "ramp_ratio": 0.2,
    }  # fmt: skip
    kwargs = {
        "has_renderer": False, "has_offscreen_renderer": images, "use_camera_obs": images,
        "camera_depths": False, "camera_heights": IMAGE_SIZE, "camera_widths": IMAGE_SIZE,
        "use_object_obs": True, "reward_shaping": False, "ignore_done": True, "control_freq": 20,
        "robots": ["Panda"] * spec.robots, "controller_configs": controller,
    }  # fmt: skip
    if images:
        kwargs |= {"camera_names": list(spec.cameras), "render_gpu_device_id": 0}
    if spec.robots == 2:
        kwargs["env_configuration"] = "single-arm-opposed"
    return {"env_name": spec.env_name, "env_version": "1.4.1", "type": 1, "env_kwargs": kwargs}


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # mujoco_py and OpenGL raise their own
        return False
    return True


def import_robomimic():
    """Imports robomimic 0.3.0. What it imports and we do not use is replaced where it is missing."""
    missing = [name for name in UNUSED if not importable(name)]
    if os.environ.get("MUJOCO_GL", "egl") == "egl" and not importable("mujoco.egl"):
        missing.append("robosuite.renderers.context.egl_context")
    sys.modules.update({name: MagicMock() for name in missing})
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it warns that it has no macro file
    try:
        import robomimic
        import robosuite
    except ImportError as error:
        install = "pip install -r requirements.txt && pip install --no-deps -r requirements-no-deps.txt"
        raise SystemExit(f"robomimic or robosuite is missing ({error}): {install}") from error
    if not robosuite.__version__.startswith("1.4"):
        found = f"robosuite {robosuite.__version__} is installed"
        raise SystemExit(f"{found}; its controllers are not those of robomimic's data. Install 1.4.1.")
    return robomimic


def render_fast(sim):
    """Multisampling, shadows and reflections off: 3 to 4 times the frames per second in software."""
    import mujoco

    context = sim._render_context_offscreen
    sim.model.vis.quality.offsamples = sim.model.vis.quality.shadowsize = 0
    context.con.free()
    context._set_mujoco_context_and_buffers()
    context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0


# -------------------------------------------------------------------------------- environment
def make_robosuite(task: str, images: bool, meta: dict | None = None, fast_render=True, render=False):
    """robomimic's `EnvRobosuite` of its metadata; `env.env` is robosuite's environment.

    `images` makes camera observations; `render` alone only makes `env.env.sim.render` work.
    """
    import_robomimic()
    import mujoco
    import robomimic.utils.env_utils as env_utils
    import robomimic.utils.obs_utils as obs_utils

    np.random.seed(MODEL_SEED)  # noqa: NPY002, sizes of objects are drawn when they are built
    mujoco.set_mju_user_warning(lambda text: None)  # no MUJOCO_LOG.TXT: `RobomimicEnv.step` looks
    spec = TASKS[task]
    modalities = {"low_dim": [*spec.proprioception, "object"], "rgb": list(spec.image_keys)}
    options = dict(render=False, render_offscreen=images or render, use_image_obs=images)
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # it prints its settings
        obs_utils.initialize_obs_modality_mapping_from_dict(modalities)
        env = env_utils.create_env_from_metadata(meta or metadata(task, images), **options)
    env.postprocess_visual_obs = False  # images as uint8
    env.env.hard_reset = False  # keep the compiled model, as DPPO does
    if images and fast_render:
        render_fast(env.env.sim)
    return env


def control_step(env, action: np.ndarray, observe: bool) -> float:
    """robosuite's `env.step` without what nobody reads; returns the reward. States agree to rounding.

    In each of 25 physics steps robosuite computes the forward pass three times, visits all observables
    and runs its controller in Python. Here mj_step1 and mj_step2 stand around the controller. It is
    robosuite's in the first step, where it sets the goal, and compiled in the others. Observables are
    read once, or with `observe` false not at all.
    """
    import mujoco

    from envs.osc import ArmControl

    model, data, sim = env.sim.model._model, env.sim.data._data, env.sim
    env.timestep += 1
    sim.forward = lambda: None  # shadows the method: mj_step1 has just done it
    mujoco.mj_step1(model, data)
    env._pre_action(action, True)
    mujoco.mj_step2(model, data)
    del sim.forward
    arms = [ArmControl(robot, action[7 * i : 7 * i + 7]) for i, robot in enumerate(env.robots)]
    for _ in range(int(env.control_timestep / env.model_timestep) - 1):
        mujoco.mj_step1(model, data)
        for arm in arms:
            arm()
        mujoco.mj_step2(model, data)
    if observe:
        env._update_observables(force=True)
    env.cur_time += env.control_timestep
    return env._post_action(action)[0]


@dataclass
class RobomimicEnv:
    """One robomimic task that steps chunks of actions in [-1, 1], (chunk, action_dim).

    The simulator is built at the first reset, so that a worker process owns its rendering context.
    """

    task: str
    images: bool
    fast_render: bool = True
    horizon: int | None = None  # time limit in environment steps; default: the task's
    renders: bool = False  # `render` works also without images

    def __post_init__(self):
        self.spec, self.env = TASKS[self.task], None
        self.horizon = self.horizon or self.spec.horizon

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Starts an episode; returns the observation."""
        if self.env is None:
            options = dict(fast_render=self.fast_render, render=self.renders)
            self.env = make_robosuite(self.task, self.images, **options)
        np.random.seed(seed)  # noqa: NPY002, robosuite draws from the global generator
        self.obs, self.t = self.read(self.env.reset()), 0
        return self.obs

    def read(self, obs: dict) -> dict[str, np.ndarray]:
        """robomimic's observation -> ours."""
        state = np.concatenate([obs[key] for key in self.spec.state_keys(self.images)])
        result = {"state": state.astype(np.float32)}
        if self.images:
            views = [obs[key].transpose(2, 0, 1) for key in self.spec.image_keys]
            result |= {"rgb": np.concatenate(views), "object": obs["object"].astype(np.float32)}
        return result

    def step(self, actions: np.ndarray) -> tuple[dict, bool, bool, int]:
        """Returns observation, whether success or the time limit ended the episode, and steps taken."""
        success = False
        for i, action in enumerate(actions):
            self.t += 1
            last = i == len(actions) - 1 or self.t == self.horizon
            reward = control_step(self.env.env, action, observe=last)
            success = reward > 0
            if last or success:
                break
        diverged = self.env.env.sim.data._data.warning.number[BAD_STATE:].any()
        if diverged:  # MuJoCo has reset itself: a failure, as a time limit is
            success = False
        elif last:  # a terminal observation is never looked at, so it needs no image
            self.obs = self.read(self.env.get_observation(self.env.env._get_observations()))
        truncated = not success and bool(diverged or self.t >= self.horizon)
        return self.obs, success, truncated, i + 1

    def render(self, size: int) -> np.ndarray:
        """The task's first camera, (size, size, 3) uint8."""
        frame = self.env.env.sim.render(height=size, width=size, camera_name=self.spec.cameras[0])
        return np.ascontiguousarray(frame[::-1])


class WorkerError(SystemExit):
    """A worker process ended or its simulator failed, which ends the run."""


def work(pipe, others, settings: dict):
    """A worker process: calls the methods of its RobomimicEnv that the pipe names, until it closes."""
    others.close()  # the main process's end of the pipe, so that it closes with that process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C; the main process decides
    env = RobomimicEnv(**settings)
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, argument = pipe.recv()
            try:
                pipe.send(getattr(env, method)(argument))
            except (SystemExit, Exception) as error:
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                pipe.send(WorkerError(f"A simulator failed: {cause}"))


class RobomimicVectorEnv(Episodes):
    """`num_envs` copies of a RobomimicEnv, each in a process of its own; see envs/interface.py.

    `obs` is {"state": (N, ...)}, with cameras also "rgb" and "object". A worker that ends, raises or
    does not answer in time becomes a WorkerError.
    """

    fps = 20

    def __init__(self, num_envs: int, **settings):
        super().__init__(num_envs)
        spec, images = TASKS[settings["task"]], settings["images"]
        self.settings, self.action_dim = settings, 7 * spec.robots
        self.obs = {"state": np.zeros((num_envs, spec.state_dim(images)), np.float32)}
        if images:
            shape = num_envs, 3 * len(spec.cameras), IMAGE_SIZE, IMAGE_SIZE
            self.obs["rgb"] = np.zeros(shape, np.uint8)
            self.obs["object"] = np.zeros((num_envs, spec.object_size), np.float32)
        if images or settings.get("renders"):
            choose_renderer()
        display = getattr(sys.modules.get("mujoco.egl"), "EGL_DISPLAY", None)
        renderer = display is not None or "robosuite" in sys.modules  # an open one would hang in a fork
        hangs = renderer and (images or settings.get("renders"))
        fork = sys.platform == "linux" and not hangs
        context = multiprocessing.get_context("fork" if fork else "spawn")
        self.pipes, self.processes = [], []
        for _ in range(num_envs):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, ours, settings), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, method: str, arguments: dict) -> dict:
        """What a method returns in the environments of `arguments`, {index: argument}, all at once."""
        try:
            for i, argument in arguments.items():
                self.pipes[i].send((method, argument))
            results = {}
            for i in arguments:
                if not self.pipes[i].poll(TIMEOUT):
                    raise TimeoutError
                results[i] = self.pipes[i].recv()
        except (EOFError, OSError) as error:  # TimeoutError is one of them
            for process in self.processes:
                process.join(0.2)
            codes = [process.exitcode for process in self.processes]
            self.close()
            hint = "-9 is a kill, often for lack of memory: use fewer --num-envs"
            ended = f"A worker process ended, or did not answer for {TIMEOUT} s"
            raise WorkerError(f"{ended}; exit codes {codes}, {hint}.") from error
        for result in results.values():
            if isinstance(result, WorkerError):
                self.close()
                raise result
        return results

    def write(self, i: int, obs: dict):
        state = np.append(obs["state"], obs.get("object", []))
        check_finite(state, f"The simulator of environment {i} returned a non-finite observation")
        for name, value in obs.items():
            self.obs[name][i] = value

    def start(self, indices: np.ndarray):
        for i, obs in self.call("reset", self.take_seeds(indices)).items():
            self.write(i, obs)

    def run_chunks(self, indices: np.ndarray, chunks: np.ndarray):
        chunks = np.clip(chunks, -1, 1).astype(np.float32)
        results = self.call("step", dict(zip(indices, chunks, strict=True)))
        for i, (obs, success, truncated, length) in results.items():
            self.write(i, obs)
            yield float(success), success, truncated, length, float(success)

    def render(self) -> np.ndarray:
        """The first environment's picture."""
        return self.call("render", {0: 256})[0]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def record_video(policy, envs: RobomimicVectorEnv, folder: Path):
    """Films a policy in an environment with the settings of `envs`, see envs/rendering.py."""
    encode = lambda obs: policy.encode(policy.observe(obs))
    make_envs = lambda: RobomimicVectorEnv(1, **envs.settings, renders=True)
    rendering.record_video(policy, encode, make_envs, folder)
