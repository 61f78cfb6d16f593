"""What the benchmark scripts share: folders, CSV files and figures."""

import csv
import platform
from pathlib import Path

from common import checkpoints

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
IMAGES = ROOT / "docs" / "images"
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}  # fmt: skip
COLORS = {
    "blue": "#2166ac", "orange": "#d6604d", "green": "#1b7837", "grey": "#777777", "purple": "#762a83",
}  # fmt: skip


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def write_csv(path: Path, rows: list[dict]):
    """Writes rows under all their columns, floats with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"wrote {path}")


def replace_rows(path: Path, rows: list[dict], key: tuple[str, ...]):
    """Writes rows into a CSV in place of those that have the same values in the columns `key`."""
    new = {tuple(str(row[column]) for column in key) for row in rows}
    kept = [row for row in read_csv(path) if tuple(row[column] for column in key) not in new]
    write_csv(path, [*kept, *rows])


def pyplot():
    """matplotlib.pyplot without a display, in the style of the figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save_figure(figure, path: Path):
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    print(f"wrote {path}")


def markdown(rows: list[dict]) -> str:
    """A markdown table of rows of strings."""
    header = list(rows[0])
    body = [header, ["---"] * len(header), *([str(row[key]) for key in header] for row in rows)]
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
    made = checkpoints.provenance()
    source = {"cpu": names[0] if names else platform.processor(), "torch": made["versions"]["torch"]}
    return source | {"commit": made["commit"], "date": made["date"]}
