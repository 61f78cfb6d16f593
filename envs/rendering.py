"""Off-screen rendering with MuJoCo: which of its backends works here, and a film of an episode."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

SYSTEM_PACKAGES = "libegl1 libgl1 libgles2 libosmesa6"  # Debian and Ubuntu


def choose_renderer(log=print):
    """Sets MUJOCO_GL to a backend that renders off-screen here and says which; exits if none can."""
    if sys.platform != "linux":  # elsewhere MuJoCo's own choice works
        return
    asked, failed = os.environ.get("MUJOCO_GL"), []
    code = "import mujoco; c = mujoco.GLContext(64, 64); c.make_current(); c.free()"
    command = [sys.executable, "-c", code]
    for backend in [asked] if asked else ["egl", "osmesa"]:
        environment = os.environ | {"MUJOCO_GL": backend}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            os.environ.setdefault("PYOPENGL_PLATFORM", backend)
            log("; ".join([f"Rendering with {backend}", *failed]))
            return
        *_, last = ["it crashed", *result.stderr.strip().splitlines()]
        failed.append(f"{backend} does not work: {last}")
    install = f"Install `apt-get install {SYSTEM_PACKAGES}` (robomimic: or use --obs state)."
    raise SystemExit(f"MuJoCo cannot render off-screen: {'; '.join(failed)}. {install}")


def record_video(policy, encode: Callable, make_envs: Callable, folder: Path):
    """Writes an episode of a policy from x_0 = 0 to `folder`/episode.mp4, or says why it cannot.

    `encode` gives what the policy's `sample` sees of observations. `make_envs` makes one environment,
    with `render`, a frame (height, width, 3) uint8, and `fps`, frames per second.
    """
    try:
        import imageio.v2 as imageio

        if "mujoco" in sys.modules:
            choose_renderer(log=lambda text: None)
            importlib.reload(sys.modules["mujoco"].gl_context)  # it chose when it was imported
        frames, over = [], False
        with closing(make_envs()) as envs:
            envs.reset(1_000_000)
            while not over:
                cond = encode(envs.obs)
                chunk = policy.to_env(policy.sample(cond, cond.new_zeros(1, policy.action_size)))
                for action in chunk.swapaxes(0, 1):
                    frame = envs.render()
                    if np.ndim(frame) != 3:
                        raise ValueError("the environment renders no picture")
                    height, width = (size // 2 * 2 for size in frame.shape[:2])  # H.264: no odd sizes
                    frames.append(frame[:height, :width])
                    step = envs.step(action[:, None])
                    over = step.terminated[0] or step.truncated[0]
                    if over:
                        break
        folder.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(folder / "episode.mp4", frames, fps=envs.fps, macro_block_size=2)
    except (SystemExit, Exception) as error:  # drivers fail in many ways; none may cost the policy
        print(f"No video: {' '.join(str(error).split())}")
