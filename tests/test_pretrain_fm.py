"""pretrain_fm.py: the file that it writes, and the flags that it refuses."""

import pytest
from conftest import DEVICE, parse

import pretrain_fm
import rldt_gym
from common.flow import FlowPolicy
from common.settings import parse_args
from demos import dataset

TINY = "--seed=0 --epochs=1 --batch=32 --width=16 --chunk=2 --euler-steps=4 --final-eval-episodes=3"


def run(family, *flags):
    pretrain_fm.main(parse_args(pretrain_fm.FAMILIES[family], {}, "", flags))


def test_policy_that_is_written_knows_its_scores_and_is_the_base_of_a_run(tmp_path, tiny_flags):
    data, out = tmp_path / "a.hdf5", tmp_path / "mine.safetensors"
    dataset.make(dataset.Args(env_id="Hopper-v4", steps=400, num_envs=8, out=data))
    run("gym", f"--dataset={data}", f"--out={out}", f"--device={DEVICE}", *TINY.split())
    policy, left = FlowPolicy.load(out), {path.name for path in tmp_path.iterdir()}
    assert (policy.chunk, policy.config["width"], policy.info["env_id"]) == (2, 16, "Hopper-v4")
    assert left == {data.name, out.name}
    flags = *tiny_flags, f"--base={out}", "--seed=0", "--iterations=1", f"--runs={tmp_path / 'runs'}"
    assert rldt_gym.main(parse(rldt_gym, flags))["base_return"] == policy.info["eval_return"]


@pytest.mark.parametrize("family, flag", [
    ("gym", "--head-steps"), ("robomimic", "--spread"), ("furniture", "--head-steps"),
])  # fmt: skip
def test_flag_of_another_family_is_refused(monkeypatch, family, flag):
    for module in pretrain_fm.dataset, pretrain_fm.robomimic, pretrain_fm.furniture:
        monkeypatch.setattr(module, "get", lambda *_: None)
    with pytest.raises(SystemExit, match=f"{flag} is not a setting of this family"):
        run(family, f"{flag}=1", "--device=cpu")


@pytest.mark.parametrize("flag, message", [
    ("--depth=4", "--depth must be odd"), ("--depth=1", "--depth must be odd"),
    ("--time-dim=7", "--time-dim must be even"), ("--time-dim=2", "--time-dim must be even"),
])  # fmt: skip
def test_sizes_that_no_network_has_are_refused_before_anything_is_made(tmp_path, flag, message):
    with pytest.raises(SystemExit, match=message):
        run("gym", flag, "--device=cpu", f"--out={tmp_path / 'x' / 'a.safetensors'}")
    assert not list(tmp_path.iterdir())
