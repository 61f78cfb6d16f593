"""What the benchmark scripts share: folders, CSV files, figures, and reading a finished run."""

import copy
import csv
import json
import platform
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import tyro

import rldt_gym
from demos import dataset
from envs.vector import VectorEnv

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
IMAGES = ROOT / "docs" / "images"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
COLORS = {
    "blue": "#2166ac",
    "orange": "#d6604d",
    "green": "#1b7837",
    "grey": "#777777",
    "purple": "#762a83",
}


def parse(cls: type, doc: str | None):
    """tyro.cli, where the string after --extra may begin with dashes."""
    argv = sys.argv[1:]
    for i in reversed(range(len(argv) - 1)):
        if argv[i] == "--extra":
            argv[i : i + 2] = [f"--extra={argv[i + 1]}"]
    return tyro.cli(cls, args=argv, description=doc)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def write_csv(path: Path, rows: list[dict]):
    """Writes rows under the first one's columns, floats with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"wrote {shown(path)}")


def replace_rows(path: Path, rows: list[dict], key: tuple[str, ...]):
    """Writes rows into a CSV in place of those that have the same values in the columns `key`."""
    new = {tuple(str(row[column]) for column in key) for row in rows}
    kept = [row for row in read_csv(path) if tuple(row[column] for column in key) not in new]
    write_csv(path, [*kept, *rows])


def shown(path: Path) -> Path:
    """The path relative to the repository, where it lies inside."""
    return path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path


def pyplot():
    """matplotlib.pyplot without a display, in the style of the figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save_figure(figure, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {shown(path)}")


def markdown(rows: list[dict]) -> str:
    """A markdown table of rows of strings."""
    header = list(rows[0])
    body = [header, ["---"] * len(header)]
    body += [[str(row[key]) for key in header] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def group(rows: list[dict], key: str) -> dict[str, list[dict]]:
    """Rows by the value of a column, in order of first appearance."""
    grouped = {}
    for row in rows:
        grouped.setdefault(row[key], []).append(row)
    return grouped


def provenance() -> dict[str, str]:
    """The columns that say where a number comes from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    source = {"cpu": names[0] if names else platform.processor(), "torch": torch.__version__}
    return source | {"commit": rldt_gym.git_commit(), "date": time.strftime("%Y-%m-%d")}


@dataclass
class Run:
    """What a run directory holds: arguments, networks, and the checkpoint they come from."""

    name: str
    args: rldt_gym.Args
    policy: rldt_gym.FlowPolicy
    base: rldt_gym.FlowPolicy
    critic: rldt_gym.Critic
    reference: torch.nn.Module
    reward_scale: float
    states: torch.Tensor  # (n, obs_dim) the normalised observations of the replay


def load_run(run_dir: Path, critic_key: str = "critic") -> Run:
    """Reads a run of RLDT or QAM; `critic_key` may be "target". Raises SystemExit if there is none."""
    if not (run_dir / "checkpoint.pt").exists():
        raise SystemExit(f"{run_dir}: not a run directory (it has no checkpoint.pt)")
    stored = json.loads((run_dir / "args.json").read_text())
    known = {field.name for field in fields(rldt_gym.Args)}
    args = rldt_gym.Args(**{k: v for k, v in stored.items() if k in known} | {"device": "cpu"})
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    own, shipped = run_dir / "base.safetensors", dataset.DEMOS / args.env_id / "base.safetensors"
    path = own if own.exists() else Path(args.base) if args.base else shipped
    envs = VectorEnv(args.env_id, 1, args.chunk, args.backend)
    base, policy = rldt_gym.load_base(path, args, envs), rldt_gym.load_base(path, args, envs)
    policy.load_state_dict(saved["policy"])
    reference = copy.deepcopy(base.velocity)
    if "reference" in saved:  # of RLDT alone
        reference.load_state_dict(saved["reference"])
    sizes = args.critic_width, args.critic_depth, args.critic_layer_norm, args.critic_init
    critic = rldt_gym.Critic(envs.obs_dim, policy.action_size, *sizes)
    critic.load_state_dict(saved[critic_key])
    envs.close()
    states = saved["replay"]["obs"][: max(1, saved["added"])].flatten(0, 2)
    scale = saved["state"]["reward_scale"]
    return Run(run_dir.resolve().name, args, policy, base, critic, reference, scale, states)
