"""Settings of a script: a dataclass with one line a field, from flags, presets and stored runs."""

import dataclasses
import inspect
import json
import re
import sys
from typing import Annotated, get_type_hints

import tyro

LARGEST = sys.float_info.max
Count = Annotated[int, 1, LARGEST]  # the type of a setting, with its least and its largest value
Size = Annotated[int, 0, LARGEST]
Weight = Annotated[float, 0, LARGEST]
Share = Annotated[float, 0, 1]


def parse_args(cls, presets: dict[str, dict], doc: str, argv: list[str] | None = None):
    """Command line -> `cls`: flags win over the preset; --resume and --evaluate take the run's own.

    Raises SystemExit on a value out of bounds and on a directory that holds no run.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        raise SystemExit(print(describe(cls, doc)))
    first = tyro.cli(cls, args=argv)
    default = cls(preset=first.preset, **presets.get(first.preset, {}))
    if run := first.resume or first.evaluate:
        default = read_args(cls, run)
    args = tyro.cli(cls, args=argv, default=default)
    if first.resume:
        args = dataclasses.replace(default, resume=run, device=args.device, threads=args.threads)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        low, high = getattr(hint, "__metadata__", (None, None))
        if low is not None and not low <= getattr(args, name) <= high:
            flag, value = name.replace("_", "-"), getattr(args, name)
            raise SystemExit(f"--{flag} {value}: must lie between {low} and {high:g}")
    return args


def read_args(cls, run):
    """The settings in a run directory, but for its device, which another machine may lack."""
    try:
        stored = json.loads((run / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{run}: not a run directory ({error})") from error
    stored["device"] = "auto"
    flags = [f"--{key}={value}" for key, value in stored.items() if value is not None]
    return tyro.cli(cls, args=flags, config=(tyro.conf.FlagConversionOff,))


def describe(cls, doc: str) -> str:
    """What --help prints: each setting as its class writes it, below the comment of its section."""
    lines = {"doc": doc.strip()}
    for part in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(part).splitlines():
            if section := re.fullmatch(r"    # (.+)", line):
                lines[section[1]] = f"\n{section[1]}"
            if setting := re.fullmatch(r"    (\w+): .+? = (.+?)  # (.+)", line):
                flag = setting[1].replace("_", "-")
                lines[flag] = f"  --{flag:<20} {setting[2]:<14} {setting[3]}"
    return "\n".join(lines.values())
