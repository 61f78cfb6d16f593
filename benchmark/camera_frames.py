"""What the cameras of rldt_robomimic.py see at the start of an episode and after forty random chunks.

    python -m benchmark.camera_frames                   # writes docs/images/cameras.png
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark.tools import IMAGES, pyplot, save_figure
from envs.robomimic import TASKS, RobomimicVectorEnv, choose_renderer


@dataclass
class Args:
    tasks: tuple[str, ...] = ("lift", "square")
    """Tasks, a row each."""
    seed: int = 1
    """Seed of the episode."""
    images: Path = IMAGES
    """Directory for the figure."""


def main(args: Args):
    choose_renderer()
    plt = pyplot()
    figure, axes = plt.subplots(len(args.tasks), 2, figsize=(5, 2.6 * len(args.tasks)), squeeze=False)
    for task, row in zip(args.tasks, axes, strict=True):
        envs = RobomimicVectorEnv(1, task=task, images=True)
        frames = [envs.reset([args.seed], np.ones(1, bool))["rgb"][0, :3]]
        for chunk in np.random.default_rng(args.seed).uniform(-0.4, 0.4, (40, 1, envs.chunk, envs.action_dim)):
            obs = envs.step(chunk, np.ones(1, bool))[0]
        frames.append(obs["rgb"][0, :3])
        envs.close()
        for axis, frame, when in zip(row, frames, ("start", "after 40 random chunks"), strict=True):
            axis.imshow(frame.transpose(1, 2, 0))
            axis.set(xticks=[], yticks=[], title=f"{task}, {TASKS[task].cameras[0]}, {when}")
            axis.title.set_fontsize(8)
    save_figure(figure, args.images / "cameras.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
