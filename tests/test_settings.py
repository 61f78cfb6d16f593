"""Every setting of every script at its bounds and beyond them."""

import math
import re
from types import SimpleNamespace
from typing import get_type_hints

import pytest
from conftest import parse
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain_fm
import rldt_furniture
import rldt_gym
import rldt_robomimic
from baselines import best_of_n, dppo, dsrl, fpo, qam, reinflow, sac
from baselines.families import settings_of
from common import checkpoints
from common.settings import bounds_of, check_bounds, parse_args

BASELINES = best_of_n, dppo, dsrl, fpo, qam, reinflow, sac
CLASSES = [script.Args for script in (rldt_gym, rldt_robomimic, rldt_furniture)]
CLASSES += [settings_of(module.Args, base) for module in BASELINES for base in module.SHARED.values()]
CLASSES += pretrain_fm.FAMILIES.values()


def bounded(cls) -> dict[str, tuple]:
    """Flag -> bounds, of the settings that have some."""
    hints = get_type_hints(cls, include_extras=True).items()
    return {name.replace("_", "-"): bounds_of(hint) for name, hint in hints if bounds_of(hint)}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
@settings(max_examples=15)
@given(data=st.data())
def test_a_value_beyond_its_bounds_is_refused_in_one_line(cls, data):
    flag, (low, high) = data.draw(st.sampled_from(sorted(bounded(cls).items())))
    values = [low - 1, high + 1]
    if isinstance(getattr(cls(), flag.replace("-", "_")), float):
        values = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan, math.inf]
    value, args = data.draw(st.sampled_from(values)), cls()
    setattr(args, flag.replace("-", "_"), value)
    with pytest.raises(SystemExit) as stop:
        if cls is rldt_gym.Args:  # through the command line, whose code all share
            parse_args(cls, {}, "", [f"--{flag}={value}"])
        check_bounds(args)
    told = re.fullmatch(rf"--{flag} (\S+): must lie between (\S+) and (\S+)", str(stop.value))
    assert [float(word) for word in told.groups()] == pytest.approx([value, low, high], nan_ok=True)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_number_is_bounded_and_both_bounds_are_accepted(cls):
    numbers = [name for name, value in vars(cls()).items() if type(value) in (int, float)]
    assert {name.replace("_", "-") for name in numbers} <= bounded(cls).keys()
    for end in 0, 1:
        flags = [f"--{flag}={bounds[end]}" for flag, bounds in bounded(cls).items()]
        args = parse_args(cls, {}, "", flags)
        found = {flag: getattr(args, flag.replace("-", "_")) for flag in bounded(cls)}
        assert found == {flag: bounds[end] for flag, bounds in bounded(cls).items()}


LEAST = {
    "least": ["--gamma=0", "--td-lambda=0", "--target-momentum=0", "--zero-fraction=0", "--alpha=0",
              "--actor-lr=0", "--critic-lr=0", "--anneal=0", "--reference-every=0", "--segments=1",
              "--critic-batch=1", "--actor-batch=1", "--n-particles=1", "--rounds=1"],
    "counts": ["--critic-steps=1", "--actor-steps=0", "--buffer-iterations=1", "--warmup-iterations=0"],
    "rollouts": ["--num-envs=1", "--rollout-chunks=1", "--exploration-steps=0", "--eval-every=1"],
    "most": ["--gamma=1", "--td-lambda=1", "--target-momentum=1", "--zero-fraction=1", "--alpha=1e6",
             "--consistency-weight=0", "--constraint-weight=0", "--seed=4294967295"],
}


@pytest.mark.parametrize("name", LEAST)
def test_a_run_at_the_bounds_ends_with_a_result(tiny_flags, tmp_path, name):
    result = rldt_gym.main(parse(rldt_gym, [*tiny_flags, f"--runs={tmp_path}", *LEAST[name]]))
    assert math.isfinite(result["final_return"])


def test_a_base_policy_that_is_missing_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(SystemExit, match=r"--base .*/none: no such file"):
        rldt_gym.main(parse(rldt_gym, [f"--base={tmp_path}/none", f"--runs={tmp_path}/runs"]))
    assert not (tmp_path / "runs").exists()


SIZES = "num-envs", "final-eval-episodes", "rollout-chunks", "actor-batch", "segments"


@pytest.mark.parametrize("flag", SIZES)
def test_sizes_beyond_the_memory_are_refused_with_an_estimate(tmp_path, monkeypatch, flag):
    free = SimpleNamespace(available=8 * 2**30)
    monkeypatch.setattr(checkpoints.psutil, "virtual_memory", lambda: free)
    argv = [f"--{flag}=1000000", f"--runs={tmp_path / 'runs'}", "--device=cpu"]
    with pytest.raises(SystemExit, match=r"would take .* GiB; 8 GiB are free"):
        rldt_gym.main(parse(rldt_gym, argv))
