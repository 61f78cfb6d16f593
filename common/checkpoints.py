"""What a run keeps: files that are whole and its own, and room for rollouts."""

import functools
import hashlib
import io
import json
import math
import os
import shlex
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.settings import script_of

FORMAT = "2"  # of checkpoints: those of another one are refused
PLACE = "resume", "runs", "device", "threads", "precision"  # what may change on a resume


def write_atomically(path: Path, write):
    """Writes to a neighbour and renames it, so that a reader or a crash never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path} ({error}). The last good file is kept.") from error


def write_json(path: Path, content: dict):
    text = json.dumps(content, indent=2, default=str)
    write_atomically(path, lambda p: p.write_text(text))


def require_memory(size: float, device: str, what: str):
    """Raises SystemExit where `size` bytes are not free."""
    free = psutil.virtual_memory().available
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
    if size > free:
        raise SystemExit(f"{what} would take {size / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free.")


class Ring:
    """Room for rollouts: tensors `slots`, (capacity, ...) each, whose oldest index is written anew."""

    def __init__(self, capacity: int, shapes: dict[str, tuple], device: str, dtypes=None):
        self.capacity, self.added, self.slots = capacity, 0, {}
        dtype = {name: (dtypes or {}).get(name, torch.float32) for name in shapes}
        size = sum(math.prod(shape) * dtype[name].itemsize for name, shape in shapes.items())
        require_memory(capacity * size, device, "The replay")
        for name, shape in shapes.items():
            self.slots[name] = torch.zeros(capacity, *shape, dtype=dtype[name], device=device)

    def next(self) -> dict[str, torch.Tensor]:
        """The views of the slot to write now, the newest from here on."""
        self.added += 1
        return self.newest()

    def newest(self) -> dict[str, torch.Tensor]:
        return {name: value[self.slot] for name, value in self.slots.items()}

    slot = property(lambda self: (self.added - 1) % self.capacity)
    filled = property(lambda self: min(self.added, self.capacity))


def identity(args) -> dict[str, str]:
    """What a checkpoint belongs to: a script with its settings, and so many processes."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in PLACE}
    processes = os.environ.get("WORLD_SIZE", "1")
    return settings | dict(script=script_of(type(args)), processes=processes, format=FORMAT)


@functools.cache
def provenance() -> dict:
    """What a result was made with: commit, date and versions."""
    folder = shlex.quote(str(Path(__file__).parent))
    command = f"git -C {folder} describe --always --dirty --exclude='*'"
    status, commit = subprocess.getstatusoutput(command)
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    today = time.strftime("%Y-%m-%d")
    return dict(commit="unknown" if status else commit, date=today, versions=versions)


def write_checked(path: Path, content: dict):
    """Writes a dict with torch, behind its SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    write_atomically(path, lambda p: p.write_bytes(hashlib.sha256(data).digest() + data))


def read_checked(path: Path, belongs_to: dict, device: str) -> dict:
    """Reads what `write_checked` wrote. Raises ValueError on another file's bytes or settings."""
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("its bytes are damaged")
    content = torch.load(io.BytesIO(data[32:]), map_location=device, weights_only=True)
    theirs = content["belongs_to"]
    others = [key for key in theirs | belongs_to if theirs.get(key) != belongs_to.get(key)]
    if others:
        raise ValueError(f"it is of a run with another {', '.join(others)}")
    return content


def save_parts(path: Path, belongs_to: dict, parts: dict):
    """Writes parts (dicts, Rings, or what has a state_dict) and torch's random generators."""
    saved = dict(belongs_to=belongs_to, rng=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all())
    for name, part in parts.items():
        if not isinstance(part, Ring):
            saved[name] = part if isinstance(part, dict) else part.state_dict()
            continue
        saved[name] = part.added
        if part.added:  # only its newest slot has changed; it has a file of its own
            newest = {key: value.clone() for key, value in part.newest().items()}
            file = f"{path.name.partition('.')[0]}.{name}{part.slot}"
            write_checked(path.with_name(file), dict(belongs_to=belongs_to, newest=newest))
    write_checked(path, saved)


def load_parts(path: Path, belongs_to: dict, parts: dict, device: str):
    """Reads in place what `save_parts` wrote. Raises SystemExit on a file that is not its own."""
    file = path
    try:
        saved = read_checked(file, belongs_to, device)
        for name, part in parts.items():
            if isinstance(part, Ring):
                part.added = saved[name]
                for slot in range(part.filled):
                    file = path.with_name(f"{path.name.partition('.')[0]}.{name}{slot}")
                    for key, value in read_checked(file, belongs_to, device)["newest"].items():
                        part.slots[key][slot] = value
            elif isinstance(part, dict):
                part.update(saved[name])
            else:
                part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"].cpu())
        states = saved["cuda"][: torch.cuda.device_count()]
        torch.cuda.set_rng_state_all([state.cpu() for state in states])
    except Exception as error:  # torch.load raises many types
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"{file}: cannot be resumed ({reason})") from error


def content_hash(tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> str:
    """SHA-256 of named tensors and texts."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str]):
    """Writes safetensors with texts and their common SHA-256 as metadata."""
    metadata = texts | {"sha256": content_hash(tensors, texts)}
    write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and texts that `write_tensors` wrote. Raises ValueError on any other file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            texts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    if texts.pop("sha256", "") != content_hash(tensors, texts):
        raise ValueError("its bytes are damaged")
    return tensors, texts
