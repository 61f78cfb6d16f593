"""baselines/: settings and whole runs of each method but SAC, and what each learns."""

import json
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, parse
from fakes import words
from safetensors.torch import load_file
from short_runs import checkpoint

import rldt_gym
from baselines import best_of_n, dppo, dsrl, families, fpo, ppo, qam, reinflow, sac
from baselines.families import settings_of
from common.flow import FlowPolicy
from demos import dataset

METHODS = {
    "reinflow": reinflow, "dppo": dppo, "fpo": fpo, "qam": qam, "best_of_n": best_of_n, "dsrl": dsrl,
}  # fmt: skip
LOSS = dict(qam="losses/adjoint", best_of_n="losses/critic", dsrl="losses/actor")  # or losses/policy


def arguments(module, **fields):
    return parse(module, words(fields))


# ----------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("name", METHODS)
def test_paper_preset_changes_known_settings_and_flags_win(name):
    module = METHODS[name]
    assert parse(module, []) == settings_of(module.Args, module.SHARED["rldt_gym"])()
    paper = arguments(module, preset="paper")
    assert {key: getattr(paper, key) for key in module.PRESETS["paper"]} == module.PRESETS["paper"]
    args = arguments(module, preset="paper", rollout_chunks=7)
    assert (args.rollout_chunks, args.precision) == (7, "float32")


@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("name", ["qam", "best_of_n", "dsrl"])
def test_critic_and_rollouts_have_the_settings_of_rldt(name, preset):
    ours, theirs = (vars(arguments(module, preset=preset)) for module in (METHODS[name], rldt_gym))
    differ = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    # with a warm-up, the first evaluation of the best of N is that of the base
    allowed = {
        "qam": {"actor_batch"},  # one trajectory a state
        "best_of_n": {"warmup_iterations"},
        "dsrl": {"warmup_iterations", "actor_steps", "actor_batch", "actor_lr"},  # a small network
    }
    assert differ <= allowed[name] | {"exp_name"}
    shared = "critic_", "td_", "buffer_", "segment", "target_"
    critic = {key for key in theirs if key.startswith(shared)}
    assert len(critic) == 8 and critic <= ours.keys()


def settled(monkeypatch, module, **fields):
    """The settings with which a method's main begins the loop of PPO."""
    args = arguments(module, **fields)
    monkeypatch.setattr(ppo, "main", lambda *_: None)
    module.main(args)
    return args


@pytest.mark.parametrize("task, expected", reinflow.OFFICIAL.items())
def test_reinflow_takes_the_official_settings_of_the_task(monkeypatch, task, expected):
    own = dict(actor_lr=1e-4, actor_lr_end=0.7, value_lr=2e-3, warmup_iterations=3, clone_weight=0.2)
    for changes in {}, *({name: value} for name, value in own.items()):  # a flag wins
        args = settled(monkeypatch, reinflow, preset="paper", env_id=task, **changes)
        assert {name: getattr(args, name) for name in own} == expected | changes
    args = settled(monkeypatch, reinflow, env_id=task)
    assert {name: getattr(args, name) for name in own} == expected | dict(warmup_iterations=2)


def test_papers_preset_of_the_ppo_family_is_for_gym_alone(monkeypatch):
    monkeypatch.setattr(ppo, "set_up", lambda args: 1 / 0)
    with pytest.raises(SystemExit, match="of Gym's tasks"):
        dppo.main(parse(dppo, ["--task", "one-leg-low", "--preset", "paper"]))
    with pytest.raises(ZeroDivisionError):
        dppo.main(parse(dppo, ["--task", "Hopper-v4", "--preset", "paper"]))


# ----------------------------------------------------------------------------------- tiny runs
COMMON = dict(
    env_id="Hopper-v4", device="cpu", precision="float32", seed=3, num_envs=4, rollout_chunks=12,
    iterations=5, eval_every=3, eval_episodes=2, final_eval_episodes=3,
)  # fmt: skip
ON_POLICY = COMMON | dict(batch=16, epochs=2, lr_warmup=1, actor_lr=1e-3, warmup_iterations=0)
CRITIC = COMMON | dict(
    buffer_iterations=2, rounds=2, critic_steps=2, critic_batch=16, segments=8, warmup_iterations=1,
)  # fmt: skip
TINY = {
    "reinflow": ON_POLICY, "dppo": ON_POLICY, "fpo": ON_POLICY | dict(samples=3),
    "qam": CRITIC | dict(actor_steps=1, actor_batch=8, actor_lr=1e-3),
    "best_of_n": CRITIC | dict(candidates=3),
    "dsrl": CRITIC | dict(noise_steps=2, actor_steps=1, actor_batch=8, actor_lr=1e-3),
    "diffusion": ON_POLICY | dict(form="diffusion"),
    "sac": COMMON | dict(
        buffer_iterations=2, warmup_iterations=1, critic_iterations=0, gradient_steps=3, batch=8,
    ),
}  # fmt: skip
RUNS = METHODS | {"diffusion": dppo, "sac": sac}


@pytest.fixture(scope="session")
def bases(tiny_base, tmp_path_factory):
    """A base policy for each tiny run; the diffusion's is of the flow's sizes."""
    folder = tmp_path_factory.mktemp("bases")
    diffusion, gaussian = folder / "diffusion.safetensors", folder / "gaussian.safetensors"
    FlowPolicy.load(tiny_base).save(diffusion, form="diffusion")
    sac.GaussianPolicy(11, 3).save(gaussian)
    return dict.fromkeys(METHODS, tiny_base) | {"diffusion": diffusion, "sac": gaussian}


@pytest.fixture(scope="session")
def make_args(bases):
    return lambda name, runs, **changes: arguments(
        RUNS[name], **TINY[name] | dict(base=bases[name], runs=runs) | changes
    )


@pytest.fixture(scope="session")
def finished(make_args, tmp_path_factory):
    """Directory and result of a complete tiny run, made when first asked for; not to be written to."""
    made = {}

    def get(name):
        if name not in made:
            runs = tmp_path_factory.mktemp(name)
            handler = signal.getsignal(signal.SIGINT)
            result = RUNS[name].main(make_args(name, runs))
            signal.signal(signal.SIGINT, handler)
            made[name] = next(runs.iterdir()), result
        return made[name]

    return get


@pytest.mark.parametrize("name", METHODS)
def test_run_writes_what_a_run_of_rldt_writes(finished, finished_run, name):
    run, result = finished(name)
    names = {path.name for path in run.iterdir()}
    assert names >= {"args.json", "base.safetensors", "policy.safetensors", "metrics.csv", "result.json"}
    assert set(result) == set(finished_run[1])
    rows = metrics(run)
    assert [row["eval_return"] != "" for row in rows] == [True, False, False, True, False, True]
    loss = [row[LOSS.get(name, "losses/policy")] for row in rows]
    assert "" not in (loss[2], loss[4]) and loss[0] == loss[3] == loss[5] == ""


@pytest.mark.parametrize("name", METHODS)
def test_base_policy_is_evaluated_as_rldt_evaluates_it(finished, finished_run, name):
    clips = 0.05 if name == "reinflow" else 1e-6  # each step, which matters less from zero
    for key, tolerance in {"base_return": 1e-6, "base_return_sampled": clips}.items():
        assert finished(name)[1][key] == pytest.approx(finished_run[1][key], rel=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_evaluating_a_run_gives_the_scores_of_its_last_evaluation(finished, name):
    run, result = finished(name)
    torch.manual_seed(99)
    scores = RUNS[name].main(parse(RUNS[name], ["--evaluate", run]))
    assert scores == {key: result[key.replace("eval", "final")] for key in scores}
    assert len(scores) == 4


@pytest.mark.parametrize("name", ["reinflow", "dppo", "best_of_n", "dsrl"])
def test_policy_of_a_method_says_so_and_is_no_plain_flow(finished, name):
    path = finished(name)[0] / "policy.safetensors"
    with pytest.raises(SystemExit, match="not a policy"):
        FlowPolicy.load(path)
    own = dict(reinflow=reinflow.NoisyPolicy, dppo=dppo.DenoisingPolicy, best_of_n=best_of_n.BestOfN)
    policy = own.get(name, dsrl.SteeredPolicy).load(path)
    assert policy.info["script"] == name
    assert not policy.sample(torch.zeros(1, 11)).requires_grad  # a video needs no gradient


@pytest.mark.parametrize("name, changes, message", [
    ("reinflow", dict(sigma_min=0.3), "--sigma-min"), ("dppo", dict(tuned_steps=9), "--tuned-steps 9"),
    ("dppo", dict(form="diffusion"), "no diffusion for Hopper-v4"),
    *[(name, dict(base="diffusion"), "its form is diffusion, not flow") for name in ("qam", "dppo")],
])  # fmt: skip
def test_settings_that_cannot_be_stop_in_one_line(make_args, bases, tmp_path, name, changes, message):
    kind = changes.get("base", name)
    args = make_args(name, tmp_path, **changes | dict(base=bases[kind]))
    with pytest.raises(SystemExit, match=message):
        METHODS[name].main(args)


@pytest.mark.parametrize("name, kept", [
    ("best_of_n", "velocity"), ("dsrl", "velocity"), ("reinflow", "frozen"), ("dppo", "frozen"),
])  # fmt: skip
def test_base_stays_as_it_was(finished, tiny_base, name, kept):
    saved = load_file(finished(name)[0] / "policy.safetensors")
    for key, value in load_file(tiny_base).items():
        assert torch.equal(saved[key.replace("velocity", kept)], value)


def test_a_pass_takes_each_chunk_as_often_as_told(monkeypatch, make_args, tmp_path):
    seen = []
    update = lambda policy, optimizer, batch, args: seen.append(batch["old_log_prob"]) or {}
    monkeypatch.setattr(reinflow, "update_actor", update)
    reinflow.main(make_args("reinflow", tmp_path, iterations=2, repeats=3, batch=36))
    assert [len(rows) for rows in seen] == [36] * 8  # two passes over 48 chunks, each three times
    one, two = (torch.cat(rows).sort().values for rows in (seen[:4], seen[4:]))
    assert torch.equal(one, two)
    assert torch.equal(one[::3], one[2::3]) and len(one[::3].unique()) == 48


def test_two_processes_train_one_policy_on_their_own_rollouts(tiny_base, tmp_path):
    fields = TINY["reinflow"] | dict(base=tiny_base, runs=tmp_path, iterations=2)
    torchrun = "torch.distributed.run --standalone --nproc-per-node=2 -m baselines.reinflow".split()
    command = [sys.executable, "-m", *torchrun, *words(fields)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    (run,) = tmp_path.iterdir()
    saved = [checkpoint(run, rank) for rank in (0, 1)]
    for part in "policy", "value":
        for key, value in saved[0][part].items():
            assert torch.equal(value, saved[1][part][key]), (part, key)
    assert saved[0]["reward_scale"]["var"] == saved[1]["reward_scale"]["var"] != 1
    assert saved[0]["envs"]["seed"] != saved[1]["envs"]["seed"]
    assert json.loads((run / "result.json").read_text())["env_steps"] > 2 * 4 * 12  # of both


# -------------------------------------------------------------------------- every method learns
class Track(gym.Env):
    """The action should be half the observation, which is drawn anew in each of the 8 steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.obs = 0, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        reward = -float(np.square(action - self.obs / 2).sum())
        self.steps, self.obs = self.steps + 1, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, reward, False, self.steps == 8, {}


gym.register("Track-v0", lambda: Track(), max_episode_steps=8)
SMALL = dict(
    env_id="Track-v0", device="cpu", precision="float32", seed=1, num_envs=20, eval_every=100,
    eval_episodes=10, final_eval_episodes=20, zero_fraction=0.0, rollout_chunks=16,
)  # fmt: skip
PPO = dict(
    iterations=12, batch=320, lr_warmup=1, clip=0.1, actor_lr=2e-3, actor_lr_end=1.0,
    warmup_iterations=0,
)  # fmt: skip
VALUES = dict(
    iterations=6, buffer_iterations=6, rounds=4, critic_steps=16, critic_batch=64, critic_lr=3e-3,
    gamma=0.0, td_lambda=0.0, segments=8, warmup_iterations=1,
)  # fmt: skip
LEARNING = {
    "reinflow": (reinflow, PPO | dict(value_lr=3e-3, clone_weight=0)),
    "dppo": (dppo, PPO | dict(batch=640)),
    "diffusion": (dppo, PPO | dict(batch=640, form="diffusion")),
    "fpo": (fpo, PPO | dict(form="fpo", clip=0.05)), "fpo++": (fpo, PPO),
    "qam": (qam, VALUES | dict(actor_batch=64, actor_lr=3e-3, actor_lr_end=1.0, inv_temp=30.0)),
    "best_of_n": (best_of_n, VALUES | dict(candidates=16)),
    "dsrl": (dsrl, VALUES | dict(noise_steps=16, actor_steps=16, actor_batch=64, actor_lr=3e-3)),
}  # fmt: skip


@pytest.fixture(scope="session")
def weak_demonstrations():
    """Actions N(0, 0.5^2) that do not look at the observation."""
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (2000, 2)), rng.normal(0, 0.5, (2000, 2)).clip(-1, 1)
    obs[:2] = action[:2] = [[-1, -1], [1, 1]]  # the scaling is that of the spaces
    return dataset.Demonstrations(obs.astype(np.float32), action.astype(np.float32), np.array([2000]))


@pytest.fixture(scope="session")
def weak_base(weak_demonstrations, tmp_path_factory):
    """Clones of them, a flow and a diffusion, made when first asked for."""
    made = {}

    def get(form):
        if form not in made:
            torch.manual_seed(0)
            settings = dict(epochs=60, batch=128, lr=1e-3, chunk=1, euler_steps=8)
            settings |= dict(width=32, depth=3, time_dim=8)
            args, data = arguments(dppo, **SMALL), weak_demonstrations
            policy = rldt_gym.pretrain(args, data, None, **settings)
            if form == "diffusion":
                family = families.family_of(args)
                family.demonstrations = lambda: families.Demonstrations(
                    data.observations, data.actions, data.episode_ends, data.limits()
                )
                policy = dppo.pretrain(family, None, **settings)
            made[form] = tmp_path_factory.mktemp(form) / "base.safetensors"
            policy.save(made[form], **policy.info)
        return made[form]

    return get


@pytest.mark.parametrize("method", LEARNING)
def test_method_improves_a_weak_base(weak_base, tmp_path, method):
    module, changes = LEARNING[method]
    base = weak_base("diffusion" if method == "diffusion" else "flow")
    result = module.main(arguments(module, **SMALL | changes | dict(base=base, runs=tmp_path)))
    # a reward of -(0.4^2 + 0.5^2 / 3) per dimension and step without looking, so about -4 in all
    assert -5 < result["base_return_sampled"] < -2.3
    assert result["final_return_sampled"] > -1.5
