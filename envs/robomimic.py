"""The robomimic tasks on robosuite, as DPPO (Ren et al. 2024) has them, in parallel processes.

Observations: "state", proprioception and (without cameras) the object's state; with cameras also "rgb",
uint8 images of 96 x 96, channels first. Reward: 1 in every step in which the task is solved, else 0.
Images need MuJoCo's EGL or OSMesa: `choose_renderer` finds which one works.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np

from envs.interface import Step

IMAGE_SIZE = 96  # pixels
MODEL_SEED = 0  # of the sizes of objects, which robosuite draws once per model
SYSTEM_PACKAGES = "libegl1 libgl1 libgles2 libosmesa6"  # Debian and Ubuntu


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
        __import__(name)
    except Exception:  # mujoco_py and OpenGL raise their own
        return False
    return True


def import_robomimic():
    """Imports robomimic 0.3.0, some of whose imports fail on a machine of today, and are not used here.

    mujoco_py is superseded by mujoco, egl_probe needs a GPU's headers, torchvision has no CPU wheel for
    this torch. Modules that are installed are left alone.
    """
    stubs = {
        "mujoco_py": {"builder": types.SimpleNamespace(MujocoException=RuntimeError)},
        "egl_probe": {"get_available_devices": list},
        "torchvision": {},
        "torchvision.models": {},
        "torchvision.transforms": {"Lambda": object, "Compose": object},
        "torchvision.transforms.functional": {},
        "tensorboardX": {"SummaryWriter": object},
    }
    missing = [name for name in stubs if not importable(name)]
    if os.environ.get("MUJOCO_GL", "egl") == "egl" and not importable("mujoco.egl"):
        missing.append("robosuite.renderers.context.egl_context")
    for name in missing:
        module = types.ModuleType(name)
        module.__dict__.update(stubs.get(name, {"EGLGLContext": None}))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)
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


# ---------------------------------------------------------------------------------- rendering
def choose_renderer(log=print) -> str:
    """Sets MUJOCO_GL to a backend that renders off-screen here and says which; exits if none can."""
    chosen, tried = os.environ.get("MUJOCO_GL"), {}
    code = "import mujoco; c = mujoco.GLContext(64, 64); c.make_current(); c.free()"
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        environment = os.environ | {"MUJOCO_GL": backend}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            os.environ.setdefault("PYOPENGL_PLATFORM", backend)
            others = "".join(f"; {other} does not: {why}" for other, why in tried.items())
            why = "MUJOCO_GL asks for it" if chosen else f"the first that works here{others}"
            log(f"Rendering with {backend} ({why}).")
            return backend
        tried[backend] = (result.stderr.strip().splitlines() or ["it crashed"])[-1]
    reasons = "; ".join(f"{backend}: {why}" for backend, why in tried.items())
    install = f"Install `apt-get install {SYSTEM_PACKAGES}`, or use --obs state."
    raise SystemExit(f"MuJoCo cannot render off-screen: {reasons}. {install}")


def render_fast(sim):
    """Multisampling, shadows and reflections off: 3 to 4 times the frames per second in software."""
    import mujoco

    context = sim._render_context_offscreen
    sim.model.vis.quality.offsamples = sim.model.vis.quality.shadowsize = 0
    context.con.free()
    context._set_mujoco_context_and_buffers()
    context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0


# -------------------------------------------------------------------------------- environment
_rendering = False  # whether this process has made a rendering context


def make_robosuite(task: str, images: bool, meta: dict | None = None, fast_render=True, render=False):
    """robomimic's `EnvRobosuite` of its metadata; `env.env` is robosuite's environment.

    `images` makes camera observations; `render` alone only makes `env.env.sim.render` work.
    """
    global _rendering
    import_robomimic()
    import robomimic.utils.env_utils as env_utils
    import robomimic.utils.obs_utils as obs_utils

    spec, renders = TASKS[task], images or render
    modalities = {"low_dim": [*spec.proprioception, "object"], "rgb": list(spec.image_keys)}
    options = dict(render=False, render_offscreen=renders, use_image_obs=images)
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # it prints its settings
        obs_utils.initialize_obs_modality_mapping_from_dict(modalities)
        env = env_utils.create_env_from_metadata(meta or metadata(task, images), **options)
    _rendering = _rendering or renders
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


class RobomimicEnv(gym.Env):
    """One robomimic task that steps chunks of actions in [-1, 1], (chunk, action_dim).

    The simulator is built at the first reset, so that a worker process owns its rendering context. A
    chunk's reward is the sum of its steps. Success terminates with `stop_on_success`; the time limit
    truncates. info["success"] is whether the chunk solved the task, info["steps"] how many it took.
    A chunk that holds NaN leaves the environment as it is. With `record`, every step adds to `frames`.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self, task: str, images: bool, fast_render=True, stop_on_success=True, meta: dict | None = None,
        horizon: int | None = None, chunk: int | None = None, record=False,
    ):  # fmt: skip
        if task not in TASKS:
            raise SystemExit(f"Unknown task {task!r}: choose {', '.join(TASKS)}.")
        self.task, self.images, self.fast_render, self.meta = task, images, fast_render, meta
        self.task_spec, self.stop_on_success, self.record = TASKS[task], stop_on_success, record
        self.horizon, chunk = horizon or self.task_spec.horizon, chunk or self.task_spec.chunk
        size, cameras = self.task_spec.state_dim(images), len(self.task_spec.cameras)
        spaces = {"state": gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)}
        if images:
            spaces["rgb"] = gym.spaces.Box(0, 255, (3 * cameras, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1, 1, (chunk, 7 * self.task_spec.robots), np.float32)
        self.obs = {name: np.zeros(space.shape, space.dtype) for name, space in spaces.items()}
        self.env, self.frames = None, []

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if self.env is None:
            np.random.seed(MODEL_SEED)  # noqa: NPY002, sizes of objects are drawn when they are built
            kwargs = dict(fast_render=self.fast_render, render=self.record)
            self.env = make_robosuite(self.task, self.images, self.meta, **kwargs)
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002, robosuite draws from the global generator
        self.obs, self.t = self.read(self.env.reset()), 0
        return self.obs, {}

    def read(self, obs: dict) -> dict[str, np.ndarray]:
        """robomimic's observation -> ours."""
        state = np.concatenate([obs[key] for key in self.task_spec.state_keys(self.images)])
        result = {"state": state.astype(np.float32)}
        if self.images:
            views = [obs[key].transpose(2, 0, 1) for key in self.task_spec.image_keys]
            result["rgb"] = np.concatenate(views)
        return result

    def step(self, action: np.ndarray):
        if np.isnan(action).any():
            return self.obs, 0.0, False, False, {"success": False, "steps": 0}
        total, success = 0.0, False
        for i, a in enumerate(action):
            self.t += 1
            last = i == len(action) - 1 or self.t == self.horizon
            reward = control_step(self.env.env, a, observe=last)
            total, success = total + reward, success or reward > 0
            if self.record:
                self.frames.append(self.render())
            if last or (success and self.stop_on_success):
                break
        terminated = success and self.stop_on_success
        if last:  # a terminal observation is never looked at, so it needs no image
            self.obs = self.read(self.env.get_observation(self.env.env._get_observations()))
        truncated = not terminated and self.t >= self.horizon
        return self.obs, total, terminated, truncated, {"success": success, "steps": i + 1}

    def render(self, size: int = 256) -> np.ndarray:
        """The task's first camera, (size, size, 3) uint8; needs images=True or record=True."""
        camera = self.task_spec.cameras[0]
        frame = self.env.env.sim.render(height=size, width=size, camera_name=camera)
        return np.ascontiguousarray(frame[::-1])

    def close(self):
        if self.env is not None:
            self.env.env.close()
            self.env = None


class WorkerError(RuntimeError):
    """A worker process ended or its simulator failed."""


class RobomimicVectorEnv:
    """`num_envs` copies of a RobomimicEnv, each in a process of its own; see envs/interface.py.

    `obs` is {"state": (N, ...), "rgb": (N, ...)}. `episode` (N,) is the number of the seed that each
    environment runs, counted from the reset; -1 where no seed was left. A worker that dies or raises
    becomes a WorkerError.
    """

    def __init__(self, num_envs: int, timeout: float = 300.0, **kwargs):
        if kwargs["images"]:
            choose_renderer()
        main = os.getpid()

        def make() -> RobomimicEnv:
            if os.getpid() != main:  # Ctrl-C goes to every process of a terminal; the main one decides
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return RobomimicEnv(**kwargs)

        display = getattr(sys.modules.get("mujoco.egl"), "EGL_DISPLAY", None)  # MuJoCo's own context
        renders = kwargs["images"] and (_rendering or display is not None)  # it must not fork
        context = "fork" if sys.platform == "linux" and not renders else "spawn"
        disabled, makers = gym.vector.AutoresetMode.DISABLED, [make] * num_envs
        self.envs = gym.vector.AsyncVectorEnv(makers, context=context, autoreset_mode=disabled)
        self.num_envs, self.timeout, self.settings = num_envs, timeout, kwargs
        example = make()
        self.horizon, (self.chunk, self.action_dim) = example.horizon, example.action_space.shape
        self.observation_space = example.observation_space
        self.score, self.episode = np.zeros((2, num_envs), int)

    def call(self, start, wait, *args):
        try:
            start(*args)
            return wait(timeout=self.timeout)
        except multiprocessing.TimeoutError as error:
            self.kill()
            raise WorkerError(f"a simulator has not answered for {self.timeout:.0f} s") from error
        except Exception as error:  # raised by a simulator, or by a broken pipe
            for process in self.envs.processes:
                process.join(0.2)
            codes = [process.exitcode for process in self.envs.processes]
            self.kill()
            broken = isinstance(error, EOFError | OSError) and not str(error).strip()
            if broken or any(codes):
                hint = "-9 is a kill, often for lack of memory: use fewer --num-envs"
                raise WorkerError(f"a worker process ended, exit codes {codes}; {hint}") from error
            raise WorkerError(f"a simulator failed: {type(error).__name__}: {error}") from error

    def reset(self, seeds: int | Iterator[int]):
        self.seeds = itertools.count(seeds) if isinstance(seeds, int) else seeds
        self.started = 0
        self.start(np.ones(self.num_envs, bool))

    def start(self, mask: np.ndarray):
        """Starts an episode in each environment of `mask` (N,), in order, while there are seeds."""
        seeds = dict(zip(np.flatnonzero(mask), self.seeds, strict=False))
        chosen = np.isin(np.arange(self.num_envs), list(seeds))
        self.score[mask], self.episode[mask] = 0, -1
        self.episode[chosen] = self.started + np.arange(len(seeds))
        self.started += len(seeds)
        if seeds:
            each = [int(seeds.get(i, 0)) for i in range(self.num_envs)]
            options = {"reset_mask": chosen}
            self.obs = self.call(self.envs.reset_async, self.envs.reset_wait, each, options)[0]

    def step(self, chunks: np.ndarray, active: np.ndarray | None = None) -> Step:
        """See envs/interface.py; actions are clipped to [-1, 1]."""
        running = self.episode >= 0
        active = running if active is None else active & running
        if not np.isfinite(chunks[active]).all():
            raise FloatingPointError("the policy returned a non-finite action")
        chunks = np.where(active[:, None, None], np.clip(chunks, -1, 1), np.nan).astype(np.float32)
        result = self.call(self.envs.step_async, self.envs.step_wait, chunks)
        self.obs, reward, terminated, truncated, info = result
        if not (np.isfinite(self.obs["state"]).all() and np.isfinite(reward).all()):
            raise FloatingPointError("the simulator returned a non-finite observation or reward")
        self.score = np.maximum(self.score, info["success"].astype(int))
        next_obs, score = self.obs, self.score.copy()
        if (terminated | truncated).any():
            self.start(terminated | truncated)
        return Step(next_obs, reward, terminated, truncated, info["steps"].astype(int), score)

    def kill(self):
        """Ends the workers without a word; Gymnasium's `close` waits for answers that may never come."""
        for process in self.envs.processes:
            process.kill()
            process.join()
        self.envs.closed = True

    def close(self):
        if not self.envs.closed:
            self.envs.close()


def record_video(policy, envs: RobomimicVectorEnv, folder: Path):
    """One episode of a policy from x_0 = 0 as mp4."""
    import imageio.v2 as imageio

    try:
        choose_renderer()
        env = RobomimicEnv(**envs.settings, record=True)
        obs, over = env.reset(seed=1_000_000)[0], False
        while not over:
            cond = policy.encode(policy.observe({name: value[None] for name, value in obs.items()}))
            chunk = policy.to_env(policy.sample(cond, cond.new_zeros(1, policy.action_size)))[0]
            obs, _, terminated, truncated, _ = env.step(chunk.clip(-1, 1))
            over = terminated or truncated
        env.close()
        folder.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(folder / "episode.mp4", env.frames, fps=20)
    except (SystemExit, Exception) as error:  # GL drivers fail in many ways; none may cost the policy
        print(f"No video: {error}")
