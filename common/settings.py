"""Settings of a script: a dataclass with one line a field, from flags, presets and stored runs."""

import ctypes
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import sys
import timeit
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import tyro

# The types of settings, with the least and the largest value.
Count = Annotated[int, 1, 10**6]
Size = Annotated[int, 0, 10**6]
Several = Annotated[int, 2, 100]
Seed = Annotated[int, 0, 2**32 - 1]
Threads = Annotated[int, 1, 1024]
Weight = Annotated[float, 0, 1e6]
Share = Annotated[float, 0, 1]
Precision = Literal["auto", "bfloat16", "float32"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def parse_args(cls, presets: dict[str, dict], doc: str, argv: list[str] | None = None):
    """Command line -> `cls`: flags win over the presets; --resume and --evaluate take the run's own.

    A preset has the name of a choice, as of --preset or of a task; that of a later setting wins.
    Raises SystemExit on a value out of bounds, where there is no run or no base policy, and where
    --resume has another flag than --device and --threads.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        raise SystemExit(print(describe(cls, doc)))
    first = tyro.cli(cls, args=argv)
    chosen, hints = {}, get_type_hints(cls)
    for name, value in vars(first).items():
        if get_origin(hints[name]) is Literal and value in presets:
            chosen |= presets[value] | {name: value}
    default = cls(**chosen)
    if run := first.resume or first.evaluate:
        default = read_args(cls, run)
    args = tyro.cli(cls, args=argv, default=default)
    if first.resume:
        kept = dataclasses.replace(default, resume=run, device=args.device, threads=args.threads)
        for name, value in vars(kept).items():
            if getattr(args, name) != value:
                raise SystemExit(f"--{name.replace('_', '-')}: a run goes on with {value}")
    elif (base := vars(args).get("base")) and not run and not base.is_file():
        raise SystemExit(f"--base {base}: no such file")
    check_bounds(args)
    return args


def check_bounds(args):
    """Raises SystemExit where a setting lies outside the bounds of its type."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, bounds, flag = getattr(args, name), bounds_of(hint), name.replace("_", "-")
        if value is not None and bounds and not bounds[0] <= value <= bounds[1]:
            raise SystemExit("--{} {}: must lie between {} and {:.10g}".format(flag, value, *bounds))


def bounds_of(hint) -> tuple | None:
    """The least and the largest value of a type, or of one of its alternatives."""
    for part in (hint, *get_args(hint)):
        if hasattr(part, "__metadata__"):
            return part.__metadata__
    return None


def script_of(cls) -> str:
    """The name of the script that defines the settings `cls`."""
    return Path(inspect.getfile(cls)).stem


def read_args(cls, run: Path):
    """The settings in a run directory."""
    try:
        stored = json.loads((run / "args.json").read_text())
        script = stored.pop("script")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SystemExit(f"{run}: not a run directory ({error!r})") from error
    if script != script_of(cls):
        raise SystemExit(f"{run}: a run of {script}, not of {script_of(cls)}")
    flags = [f"--{key}={value}" for key, value in stored.items() if value is not None]
    try:
        return tyro.cli(cls, args=flags, config=(tyro.conf.FlagConversionOff,), console_outputs=False)
    except SystemExit as error:
        raise SystemExit(f"{run}/args.json: not the settings of {script}") from error


def faster_precision(device: str) -> Precision:
    """bfloat16 or float32, by the time of a product: CPUs without AMX may be slower in bfloat16."""
    seconds, size = {}, 512 if device == "cpu" else 4096  # a GPU needs longer to be timed
    for precision in ("float32", "bfloat16"):
        x = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
        seconds[precision] = min(timeit.repeat(lambda x=x: (x @ x)[0, 0].item(), number=1, repeat=9))
    return min(seconds, key=seconds.get)


def keep_freed_memory():
    """Has glibc keep what tensors free: else the kernel clears their pages anew at each step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)


def set_up(args):
    """Chooses device, threads and precision, seeds torch, and joins the other processes of torchrun."""
    world, device = int(os.environ.get("WORLD_SIZE", 1)), args.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise SystemExit(f"--device {device}: must be auto, cpu, cuda or cuda with a number, as cuda:0")
    if args.track and not importlib.util.find_spec("wandb"):
        raise SystemExit("--track needs Weights & Biases: pip install wandb")
    if device == "auto" or (device.startswith("cuda") and world > 1):  # under torchrun a GPU each
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        number = torch.device(device).index or 0
        if number >= torch.cuda.device_count():
            raise SystemExit(f"--device {device}: this torch sees no such device; use --device cpu.")
        torch.cuda.set_device(number)
    if world > 1 and not dist.is_initialized():
        patience = timedelta(days=7)  # the first process may clone or evaluate for hours
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience)
    args.device = device
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    if args.precision == "auto":
        chosen = [faster_precision(device)]
        if world > 1:
            dist.broadcast_object_list(chosen)  # the first process's, which args.json keeps
        (args.precision,) = chosen


def launch(main: Callable, cls, presets, doc: str, parse=parse_args, go_on="--resume DIRECTORY"):
    """A script's command line. What may fail for reasons outside the code ends in one line."""
    try:
        main(parse(cls, presets, doc))
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. What was saved is kept: go on with {go_on}") from None
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise SystemExit(f"Out of memory: {str(error).partition('memory: ')[2]}") from error


def describe(cls, doc: str) -> str:
    """What --help prints: each setting as its class writes it, below the comment of its section."""
    lines = {"doc": doc.strip()}
    hints = get_type_hints(cls, include_extras=True)
    for part in reversed([part for part in cls.__mro__ if vars(part).get("__annotations__")]):
        for line in inspect.getsource(part).splitlines():
            if section := re.fullmatch(r"    # (.+)", line):
                lines[section[1]] = f"\n{section[1]}"
            if setting := re.fullmatch(r"    (\w+): (?!ClassVar).+? = (.+?)  # (.+)", line):
                flag = setting[1].replace("_", "-")
                hint, allowed = hints[setting[1]], ""
                if bounds := bounds_of(hint):
                    allowed = f"[{bounds[0]:g}, {bounds[1]:.10g}] ".replace(" 1000000]", " 1e6]")
                if get_origin(hint) is Literal:
                    allowed = f"{{{', '.join(get_args(hint))}}} "
                lines[flag] = f"  --{flag:<20} {setting[2]:<12} {allowed}{setting[3]}"
    return "\n".join(lines.values())
