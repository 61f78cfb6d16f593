"""The robomimic tasks on robosuite, as DPPO (Ren et al. 2024) sets them up, in parallel worker processes.

Observations: "state", proprioception and (without cameras) the object's state; with cameras also "rgb",
uint8 images of 96 x 96, channels first. Reward: 1 in every step in which the task is solved, else 0.
Image rendering needs MuJoCo's EGL or OSMesa: `choose_renderer` finds which one works.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np

IMAGE_SIZE = 96  # pixels
MODEL_SEED = 0  # of the sizes of objects, which robosuite draws once per model
SYSTEM_PACKAGES = "libegl1 libgl1 libgles2 libosmesa6"  # Debian and Ubuntu


@dataclass(frozen=True)
class Task:
    """A robosuite task in DPPO's settings."""

    env_name: str
    """robosuite's name."""
    cameras: tuple[str, ...]
    """Cameras of the image observation."""
    horizon: int
    """Time limit in environment steps of 1/20 s."""
    chunk: int
    """Actions per decision."""
    object_size: int
    """Size of the observation "object", which states hold and images replace."""
    robots: int = 1

    @property
    def proprioception(self) -> tuple[str, ...]:
        return tuple(f"robot{i}_{key}" for i in range(self.robots) for key in ("eef_pos", "eef_quat", "gripper_qpos"))

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
    kwargs = {
        "has_renderer": False, "has_offscreen_renderer": images, "ignore_done": True, "use_object_obs": True, "use_camera_obs": images,
        "control_freq": 20, "robots": ["Panda"] * spec.robots, "camera_depths": False, "camera_heights": IMAGE_SIZE, "camera_widths": IMAGE_SIZE,
        "reward_shaping": False,
        "controller_configs": {
            "type": "OSC_POSE", "input_max": 1, "input_min": -1, "kp": 150, "damping": 1, "impedance_mode": "fixed", "kp_limits": [0, 300],
            "output_max": [0.05] * 3 + [0.5] * 3, "output_min": [-0.05] * 3 + [-0.5] * 3, "damping_limits": [0, 10], "position_limits": None,
            "orientation_limits": None, "uncouple_pos_ori": True, "control_delta": True, "interpolation": None, "ramp_ratio": 0.2,
        },
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
    """Imports robomimic 0.3.0, whose unconditional imports cannot all be satisfied on a machine of today.

    It imports mujoco_py (superseded by mujoco) for one exception class, egl_probe (does not build without
    a GPU's headers) for the number of the GPU, and torchvision (no CPU wheel for this torch) for its own vision
    networks; none of the three is used here. Modules that are installed are left alone.
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
    if os.environ.get("MUJOCO_GL", "egl") == "egl" and not importable("mujoco.egl"):  # loaded even where nothing is rendered
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
        raise SystemExit(f"robomimic or robosuite is missing ({error}): pip install -r requirements.txt && "
                         "pip install --no-deps -r requirements-no-deps.txt") from error  # fmt: skip
    if not robosuite.__version__.startswith("1.4"):
        raise SystemExit(f"robosuite {robosuite.__version__} is installed; its controllers differ from those of robomimic's data. Install 1.4.1.")
    return robomimic


# ---------------------------------------------------------------------------------- rendering
def choose_renderer(log=print) -> str:
    """Sets MUJOCO_GL to a backend that can render off-screen here, and says which and why; exits if none can."""
    chosen = os.environ.get("MUJOCO_GL")
    tried = {}
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        code = "import mujoco; c = mujoco.GLContext(64, 64); c.make_current(); c.free()"
        result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, text=True)
        if result.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            os.environ.setdefault("PYOPENGL_PLATFORM", backend)
            others = "".join(f"; {other} does not: {why}" for other, why in tried.items())
            log(f"Rendering with {backend} ({'MUJOCO_GL asks for it' if chosen else f'the first that works here{others}'}).")
            return backend
        tried[backend] = (result.stderr.strip().splitlines() or ["it crashed"])[-1]
    raise SystemExit("MuJoCo cannot render off-screen: " + "; ".join(f"{k}: {v}" for k, v in tried.items())
                     + f". Install `apt-get install {SYSTEM_PACKAGES}`, or use --obs state.")  # fmt: skip


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


def make_robosuite(task: str, images: bool, meta: dict | None = None, fast_render: bool = True, render: bool = False):
    """A robosuite environment of robomimic's metadata, as robomimic's `EnvRobosuite`; `env.env` is robosuite's.

    `images` makes camera observations; `render` alone only makes `env.env.sim.render` work.
    """
    import_robomimic()
    import robomimic.utils.env_utils as env_utils
    import robomimic.utils.obs_utils as obs_utils

    spec = TASKS[task]
    modalities = {"low_dim": [*spec.proprioception, "object"], "rgb": list(spec.image_keys)}
    devnull = open(os.devnull, "w")
    stdout, sys.stdout = sys.stdout, devnull  # robomimic prints its settings
    try:
        obs_utils.initialize_obs_modality_mapping_from_dict(modalities)
        env = env_utils.create_env_from_metadata(meta or metadata(task, images), render=False, render_offscreen=images or render, use_image_obs=images)
    finally:
        sys.stdout = stdout
        devnull.close()
    global _rendering
    _rendering = _rendering or images or render
    env.postprocess_visual_obs = False  # images as uint8
    env.env.hard_reset = False  # keep the compiled model, as DPPO does
    if images and fast_render:
        render_fast(env.env.sim)
    return env


def control_step(env, action: np.ndarray, observe: bool) -> float:
    """robosuite's `env.step` without what nobody reads; returns the reward.

    In each of 25 physics steps robosuite computes the forward pass three times (mj_forward, again in the controller, and in
    mj_step), visits all observables, which take their value in the last one, and runs its controller in Python. Here mj_step1
    and mj_step2 stand around the controller, which is robosuite's own in the first step, where it sets the goal, and compiled
    in the others; observables are read once, or with `observe` false not at all. The states agree to rounding.
    """
    import mujoco

    from envs.osc import ArmControl

    model, data, sim = env.sim.model._model, env.sim.data._data, env.sim
    env.timestep += 1
    sim.forward = lambda: None  # shadows the method: mj_step1 has just done what the controller asks for
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

    The simulator is built at the first reset, so that a worker process owns its rendering context. The reward of a
    chunk is the sum of its steps. `terminated` is set on success with `stop_on_success`, else never; `truncated` at the
    time limit. info["success"] says whether a step of this chunk solved the task, info["steps"] how many were taken.
    A chunk that holds NaN leaves the environment as it is.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, task: str, images: bool, fast_render: bool = True, stop_on_success: bool = True, meta: dict | None = None,
                 horizon: int | None = None, chunk: int | None = None, record: bool = False):  # fmt: skip
        if task not in TASKS:
            raise SystemExit(f"Unknown task {task!r}: choose {', '.join(TASKS)}.")
        self.task, self.images, self.fast_render, self.stop_on_success, self.meta = task, images, fast_render, stop_on_success, meta
        self.spec_ = TASKS[task]
        self.horizon, chunk = horizon or self.spec_.horizon, chunk or self.spec_.chunk
        self.record, self.frames = record, []
        spaces = {"state": gym.spaces.Box(-np.inf, np.inf, (self.spec_.state_dim(images),), np.float32)}
        if images:
            spaces["rgb"] = gym.spaces.Box(0, 255, (3 * len(self.spec_.cameras), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1, 1, (chunk, 7 * self.spec_.robots), np.float32)
        self.env = None

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if self.env is None:
            np.random.seed(MODEL_SEED)  # noqa: NPY002, Lift and Transport draw sizes of objects when they are built
            self.env = make_robosuite(self.task, self.images, self.meta, self.fast_render, render=self.record)
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002, robosuite draws from the global generator
        self.obs, self.t = self.read(self.env.reset()), 0
        return self.obs, {}

    def read(self, obs: dict) -> dict[str, np.ndarray]:
        """robomimic's observation -> ours."""
        result = {"state": np.concatenate([obs[key] for key in self.spec_.state_keys(self.images)]).astype(np.float32)}
        if self.images:
            result["rgb"] = np.concatenate([obs[key].transpose(2, 0, 1) for key in self.spec_.image_keys])
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
        return self.obs, total, terminated, not terminated and self.t >= self.horizon, {"success": success, "steps": i + 1}

    def render(self, size: int = 256) -> np.ndarray:
        """The task's first camera, (size, size, 3) uint8; needs images=True or record=True."""
        return np.ascontiguousarray(self.env.env.sim.render(height=size, width=size, camera_name=self.spec_.cameras[0])[::-1])

    def take_frames(self) -> list[np.ndarray]:
        """The frames of the steps since the last call, with record=True."""
        frames, self.frames = self.frames, []
        return frames

    def close(self):
        if self.env is not None:
            self.env.env.close()
            self.env = None


class WorkerError(RuntimeError):
    """A worker process ended or its simulator failed."""


class RobomimicVectorEnv:
    """`num_envs` copies of a RobomimicEnv, each in a process of its own, over Gymnasium's AsyncVectorEnv.

    Nothing is reset by itself: `reset` takes the mask of what to reset. A worker that dies or raises becomes a WorkerError.
    """

    def __init__(self, num_envs: int, timeout: float = 300.0, **kwargs):
        if kwargs["images"]:
            choose_renderer()
        main = os.getpid()

        def make() -> RobomimicEnv:
            if os.getpid() != main:  # Ctrl-C goes to every process of a terminal; the main one decides
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return RobomimicEnv(**kwargs)

        opened = _rendering or getattr(sys.modules.get("mujoco.egl"), "EGL_DISPLAY", None) is not None  # by robosuite's context, or MuJoCo's own
        renders = opened and (kwargs["images"] or kwargs.get("record"))  # a forked copy of an open renderer would hang
        context = "fork" if sys.platform == "linux" and not renders else "spawn"
        self.envs = gym.vector.AsyncVectorEnv([make] * num_envs, context=context, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
        self.num_envs, self.timeout, self.settings = num_envs, timeout, kwargs
        example = make()
        self.horizon, (self.chunk, self.action_dim) = example.horizon, example.action_space.shape
        self.observation_space = example.observation_space

    def call(self, start, wait, *args):
        try:
            start(*args)
            return wait(timeout=self.timeout)
        except multiprocessing.TimeoutError as error:
            self.kill()
            raise WorkerError(f"a simulator has not answered for {self.timeout:.0f} s") from error
        except Exception as error:  # raised by a simulator, whose traceback Gymnasium has printed, or by a broken pipe
            for process in self.envs.processes:
                process.join(0.2)
            codes = [process.exitcode for process in self.envs.processes]
            self.kill()
            if (isinstance(error, EOFError | OSError) and not str(error).strip()) or any(codes):
                raise WorkerError(f"a worker process ended, exit codes {codes}; -9 is a kill, often for lack of memory: use fewer --num-envs") from error
            raise WorkerError(f"a simulator failed: {type(error).__name__}: {error}") from error

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Starts episodes where `mask` (N,) with `seeds` (N,); returns all observations, copied."""
        options = {"reset_mask": np.asarray(mask, bool)}
        return self.call(self.envs.reset_async, self.envs.reset_wait, [int(seed) for seed in seeds], options)[0]

    def step(self, chunks: np.ndarray, active: np.ndarray):
        """Chunks (N, chunk, action_dim) where `active` (N,); returns obs, reward, terminated, truncated, success, steps."""
        if not np.isfinite(chunks[active]).all():
            raise FloatingPointError("the policy returned a non-finite action")
        chunks = np.where(active[:, None, None], np.clip(chunks, -1, 1), np.nan).astype(np.float32)
        obs, reward, terminated, truncated, info = self.call(self.envs.step_async, self.envs.step_wait, chunks)
        if not (np.isfinite(obs["state"]).all() and np.isfinite(reward).all()):
            raise FloatingPointError("the simulator returned a non-finite observation or reward")
        return obs, reward, terminated, truncated, info["success"].astype(bool), info["steps"].astype(int)

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
    import torch

    try:
        choose_renderer()
        env = RobomimicEnv(**envs.settings, record=True)
        obs, over = env.reset(seed=0)[0], False
        with torch.no_grad():
            while not over:
                cond = policy.encode(policy.observe({name: value[None] for name, value in obs.items()}))
                x0 = torch.zeros(1, policy.action_size, device=cond.device)
                chunk = policy.to_env(policy.sample(cond, x0))[0].clip(-1, 1)
                obs, _, terminated, truncated, _ = env.step(chunk)
                over = terminated or truncated
        env.close()
        folder.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(folder / "episode.mp4", env.frames, fps=20)
    except (SystemExit, Exception) as error:  # GL drivers fail in many ways; none may cost the trained policy
        print(f"No video: {error}")
