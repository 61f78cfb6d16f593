"""What the three scripts share: rollouts, evaluations, short runs, settings, pretraining alone."""

import dataclasses
import itertools
import json
import signal
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import fakes
import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, metrics, parse
from fakes import ENDS_IN, MOST, arguments, each_script, each_sparse, fake_envs, roll_out, same, scripted
from safetensors.torch import load_file
from short_runs import TASKS, checkpoint, content, flags, kept_rollout, main, only_run, use_fakes

import pretrain_fm
import rldt_furniture
import rldt_gym
import rldt_robomimic
from common.flow import FlowPolicy
from common.runs import Run
from common.settings import parse_args
from demos import dataset
from demos.dataset import Demonstrations
from envs.vector import VectorEnv

# ------------------------------------------------------------------------------------ rollouts
# Three environments. Episode 100 scores all in its first two chunks, 101 does not end, 102 meets its
# time limit. Then come 103 (time limit), 104 (it succeeds in its third chunk, or meets its time limit),
# 105 and 106, which the rollout's end cuts. The last row is where it ends.
LENGTHS = [5, 20, 3, 3, 3, 9, 9]
EPISODES = [
    [(100, 0), (100, 1), (103, 0), (103, 1), (103, 2), (105, 0), (105, 1), (105, 2), (105, 3)],
    [(101, t) for t in range(9)],
    [(102, 0), (102, 1), (102, 2), (104, 0), (104, 1), (104, 2), (106, 0), (106, 1), (106, 2)],
]
SOLVED, PAIRS = [(1,), (), (), (), (2,), (), ()], [(0, 1), (2,), (), (1,), (0,), (1,), ()]
# Episodes that go on after all is scored: 100 does so in its first two chunks of four, 102 at once.
LONGER = [[(100, t) for t in range(4)] + [(102, t) for t in range(3)], [(101, t) for t in range(7)]]
AT_THE_LIMIT = [[(seed, t) for seed in (100, 101, 102) for t in range(2)] + [(103, 0)]]


@pytest.mark.parametrize("script, episodes, lengths, scored, stop", [
    (rldt_robomimic, EPISODES, LENGTHS, SOLVED, True),
    (rldt_furniture, EPISODES, LENGTHS, PAIRS, True),
    (rldt_furniture, LONGER, [4, 20, 9], [(0, 1), (5,), (0, 0)], False),
    (rldt_robomimic, AT_THE_LIMIT, [2] * 4, [(1,)] * 4, True),
    (rldt_furniture, AT_THE_LIMIT, [2] * 4, [(0, 1)] * 4, True),
])  # fmt: skip
def test_rollout_of_scripted_episodes(script, episodes, lengths, scored, stop):
    envs, most = scripted(script, len(episodes), lengths, scored, stop=stop), MOST[script]
    policy, rollout, result = roll_out(script, envs, len(episodes[0]) - 1)
    seen = rollout["state" if script is rldt_robomimic else "obs"]
    successes = []
    for t, column in np.ndindex(len(episodes[0]), len(episodes)):
        seed, chunk = episodes[column][t]
        points = [scored[seed - 100].count(c) for c in range(chunk + 1)]
        before, after = min(most, sum(points[:-1])), min(most, sum(points))
        state = envs.observation(seed, chunk)
        state = policy.normalize(state["state"] if script is rldt_robomimic else state)
        if script is rldt_furniture:
            state = torch.cat([state, torch.tensor([before / most])])
        assert torch.equal(seen[t, column], state.float()), (t, column)
        if t == len(episodes[0]) - 1:
            continue
        ended = episodes[column][t + 1][0] != seed
        last = max(c for other, c in episodes[column][:-1] if other == seed)
        expected = dict(reward=after - before, terminated=ended or after == most)
        expected[ENDS_IN[script]] = min(most, sum(c <= last for c in scored[seed - 100]))
        if script is rldt_furniture:
            expected["valid"] = before < most
        for name, value in expected.items():
            assert rollout[name][t, column] == value, (name, t, column)
        successes += [after] if ended else []
    for row, chunks in zip(rollout["action"], envs.executed, strict=True):
        np.testing.assert_array_equal(policy.to_env(row), chunks)
    assert envs.begun == [sorted({seed for column in episodes for seed, _ in column})]
    steps = sum(envs.steps.values())
    assert result == ((steps, successes) if script is rldt_robomimic else steps)


@each_script
@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_share_of_the_environments_acts_from_zero(script, fraction, count, steps):
    envs = scripted(script, 4, [20] * 4, [()] * 4)
    policy, rollout, _ = roll_out(script, envs, 6, zero_fraction=fraction, exploration_steps=steps)
    state = rollout["state" if script is rldt_robomimic else "obs"][:6, :, :4]
    zeros = policy.sample(state, torch.zeros(6, 4, 4))
    equal = (rollout["action"] - zeros).abs().amax((0, 2)) < 1e-5
    count = 0 if steps == 4 else count  # steps before the last add noise
    assert equal.tolist() == [True] * count + [False] * (4 - count)


# ---------------------------------------------------------------------------------- evaluation
class Identity:
    """A policy whose actions are its x_0."""

    action_size = 4
    normalize = observe = staticmethod(lambda obs: obs)
    encode = staticmethod(lambda obs: obs["state"])
    sample = staticmethod(lambda cond, x0: x0)
    to_env = staticmethod(lambda action: action.view(len(action), 2, 2).numpy())


@pytest.mark.parametrize("script, stop", [
    (rldt_robomimic, True), (rldt_furniture, True), (rldt_furniture, False),
])  # fmt: skip
@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_evaluation_runs_every_state_from_zero_and_from_noise(monkeypatch, script, num_envs, stop):
    starts, most = {}, MOST[script]
    succeeds = lambda seed, zero: seed % 3 == (0 if zero else 2)  # the last of all does

    def scores(seed, t, chunk):
        zero = not chunk.any()
        starts.setdefault((seed, zero), []).append(t)
        return int(t == 0 and most == 2) + int(t == 1 and succeeds(seed, zero))

    monkeypatch.setattr(script, "success_rate", lambda success, name: {name: success.tolist()})
    envs = fake_envs(script, num_envs, lambda seed: 2 + seed % 3, scores, stop=stop)
    result = script.evaluate(Identity(), envs, arguments(script), episodes=7, seed=50)
    for name, zero in ("", True), ("_sampled", False):
        expected = [succeeds(50 + i, zero) for i in range(7)]
        assert result[f"eval_success{name}"] == expected
        if most == 2:
            stages = 1 + np.array(expected)
            assert result[f"eval_stages{name}"] == pytest.approx(stages.mean())
            assert result[f"eval_stages{name}_std"] == pytest.approx(stages.std())
    assert Counter(envs.begun[0]) == {50 + i: 2 for i in range(7)}
    for (seed, zero), times in starts.items():  # from start to end, and from x_0 of one kind
        assert times == list(range(2 if stop and succeeds(seed, zero) else 2 + seed % 3))


@each_sparse
def test_evaluation_draws_its_own_noise_anew_for_every_chunk(script):
    before, executed = torch.get_rng_state(), []
    for seed in 4, 4, 5:
        envs = fake_envs(script, 2, lambda seed: 3, lambda *_: 0)
        script.evaluate(Identity(), envs, arguments(script), episodes=1, seed=seed)
        executed.append(np.stack(envs.executed))
    np.testing.assert_array_equal(executed[0], executed[1])
    assert not np.array_equal(executed[0], executed[2])
    assert len(np.unique(executed[0])) == 3 * 4 + 1  # the other half of the actions is zero
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------- base policies
BASES = {  # sizes, where the shipped one lies, its task, and another one
    rldt_gym: (11, 3, "Hopper-v4/base", dict(env_id="Hopper-v4"), dict(env_id="Other-v4")),
    rldt_robomimic: (23, 7, "square/base_state", dict(task="square"), dict(task="can")),
    rldt_furniture: (44, 10, "lamp/base_med", dict(randomness="med"), dict(randomness="low")),
}


@each_script
@pytest.mark.parametrize("changes, expected", [
    ({}, "shipped"), (dict(dataset="a"), "made"), (dict(base=1), "given"), (None, "made"),
    (dict(base=1, dataset="a"), "given"),
])  # fmt: skip
def test_base_policy_is_given_shipped_or_made(monkeypatch, tmp_path, script, changes, expected):
    *sizes, shipped, task, other = BASES[script]
    policies = {name: fakes.small_policy(script, *sizes) for name in ("given", "shipped", "made")}
    monkeypatch.setattr(script.dataset, "DEMOS", tmp_path)
    monkeypatch.setattr(script.dataset, "get", lambda *_: None)

    def pretrain(args, data, checkpoint, *, chunk, **settings):
        checkpoint.touch()
        assert chunk == (8 if script is rldt_furniture else 4)
        return policies["made"]

    monkeypatch.setattr(script, "pretrain", pretrain)
    policies["shipped"].save(tmp_path / f"{shipped}.safetensors")
    policies["given"].save(tmp_path / "given.safetensors")
    args = arguments(script, runs=tmp_path / "runs", **task | (other if changes is None else changes))
    args.base = args.base and tmp_path / "given.safetensors"
    run, envs = Run(args, "test"), SimpleNamespace(obs_dim=sizes[0], action_dim=sizes[1])
    base = script.get_base(args, run, *[envs] * (script is not rldt_robomimic))
    kept = type(base).load(run.path / "base.safetensors")
    assert same(base, policies[expected].state_dict()) and same(kept, base.state_dict())
    assert {path.name for path in run.path.iterdir()} == {"args.json", "base.safetensors"}
    if script is not rldt_robomimic:  # which knows the sizes of its tasks
        envs.obs_dim += 1
        with pytest.raises(SystemExit, match=r"\.safetensors: .* other sizes than the task's"):
            script.get_base(args, run, envs)


@pytest.mark.parametrize("script, changes, info", [
    (rldt_robomimic, {}, dict(task="lift", obs="state", fast_render=True)),
    (rldt_furniture, dict(spread=0.0), dict(furniture="lamp", randomness="low")),
    (rldt_furniture, dict(spread=1.0), dict(furniture="lamp", randomness="low")),
])  # fmt: skip
def test_pretraining_is_that_of_rldt_gym_with_other_limits(monkeypatch, tmp_path, script, changes, info):
    data, checkpoint = fakes.demonstrations(44, 10), tmp_path / "pretraining.pt"
    arrays = data["state"], data["action"], data["episode_ends"]
    other = Demonstrations(*arrays, script.dataset.limits(data, *changes.values()))
    checkpoints = fakes.recorded(monkeypatch, script, "fit", lambda *args: args[5])
    policy = fakes.pretrain(script, data, checkpoint, epochs=60, **changes)
    assert same(policy, fakes.pretrain(rldt_gym, other, epochs=60).state_dict())
    assert checkpoints == [checkpoint]
    assert policy.info == info


# ------------------------------------------------------------------------------- whole short runs
@pytest.fixture(scope="module", params=["hopper", "state", "lamp"])
def short_run(request, bases, tmp_path_factory):
    """A complete run of a task, its fake environments, seeds of its episodes, and actor step sizes."""
    task, rates, runs = request.param, [], tmp_path_factory.mktemp("short")
    script, handler = TASKS[task][0], signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        fakes, begun = use_fakes(patch, script), []
        update, reset = script.update_actor, VectorEnv.reset
        rate = lambda args: args[3].param_groups[0]["lr"]
        recorded = lambda *args: rates.append(rate(args)) or update(*args)
        patch.setattr(script, "update_actor", recorded)
        noted = lambda envs, seed: begun.append(range(seed, seed + envs.num_envs)) or reset(envs, seed)
        patch.setattr(VectorEnv, "reset", noted)
        result = main(script, flags(task, bases[task], runs, anneal=0.5))
    signal.signal(signal.SIGINT, handler)
    begun = fakes[0].begun if fakes else [begun[i] for i in (0, 1, 3, 2)]  # the last is an evaluation
    known = dict(task=task, script=script, path=only_run(runs), result=result)
    return SimpleNamespace(**known, rates=rates, fakes=fakes[:1], begun=begun[:5])


def test_training_follows_its_schedules(short_run):
    rates = [1e-3 * share for share in (1 / 3 * 0.75, 2 / 3 * 0.75, 1 - 0.5 * 3 / 4, 1 - 0.5 * 3 / 4)]
    assert short_run.rates == pytest.approx(rates)  # a rise, a fall by half
    rows = metrics(short_run.path)
    score = "eval_return" if short_run.task == "hopper" else "eval_success_sampled"
    for i, row in enumerate(rows):
        assert int(row["iteration"]) == i
        assert (row[score] != "") == (i in (0, 4))
        assert (row["losses/critic"] != "") == (i in (1, 2, 3))
        assert (row["losses/transport"] != "") == (i in (2, 3))  # the actor waits for an iteration
    distances = [float(row["diagnostics/base_distance"]) for row in rows[1:4]]
    assert distances[0] == 0 and distances == sorted({*distances})
    steps = [int(row["env_steps"]) for row in rows]
    assert 0 == steps[0] < steps[1] < steps[2] < steps[3] == steps[4] == short_run.result["env_steps"]
    for name, row in ("base", rows[0]), ("final", rows[-1]):
        for column in row:
            if column.startswith("eval_"):
                assert short_run.result[column.replace("eval", name)] == float(row[column])


def test_training_runs_each_episode_once_and_none_of_an_evaluation(short_run):
    base, *training, final = short_run.begun
    assert sorted(base) == sorted(final)
    seeds = Counter(itertools.chain(*training))
    assert set(seeds.values()) == {1} and not seeds.keys() & {*base}
    for envs in short_run.fakes:
        assert short_run.result["env_steps"] == sum(envs.steps[seed] for seed in seeds)


@pytest.mark.parametrize("short_run", ["state", "lamp"], indirect=True)
def test_training_scores_are_those_of_the_rollouts(short_run):
    rows, most = metrics(short_run.path), MOST[short_run.script]
    for iteration, slot in (2, 1), (3, 0):  # the third rollout has overwritten the first
        rollout = kept_rollout(short_run.path, slot)
        ends_in = rollout[ENDS_IN[short_run.script]]
        if short_run.task == "lamp":
            ends_in = ends_in[0]  # of first episodes
            assert float(rows[iteration]["train_stages"]) == pytest.approx(ends_in.mean().item())
        else:
            ends_in = ends_in[rollout["terminated"] > 0]  # of those that ended
        success = (ends_in == most).float().mean().item()
        assert float(rows[iteration]["train_success"]) == pytest.approx(success)
    assert any(0 < float(row["train_success"]) < 1 for row in rows[1:4])  # the runs test something


def test_evaluating_a_run_gives_its_final_numbers(short_run, monkeypatch, capsys):
    use_fakes(monkeypatch, short_run.script)
    scores = main(short_run.script, ["--evaluate", short_run.path, "--device", DEVICE])
    assert len(scores) == sum(key.startswith("final_") for key in short_run.result)
    for key, value in scores.items():
        assert short_run.result[key.replace("eval", "final")] == value
    assert str(scores) in capsys.readouterr().out
    assert len([*short_run.path.parent.iterdir()]) == 1


MOMENTS = {  # what crashes at which call, after which iterations were saved
    "copying the base": (FlowPolicy, "save", 1, []), "the third rollout": (None, "collect", 3, [3]),
    "an actor step": (None, "update_actor", 1, [2]),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_crashed_run_goes_on_as_one_that_did_not(short_run, bases, tmp_path, monkeypatch, moment):
    script, base, calls = short_run.script, tmp_path / "base.safetensors", []
    use_fakes(monkeypatch, script)
    owner, name, at, saved = MOMENTS[moment]
    owner = owner or script
    function = getattr(owner, name)

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("crash")
        return function(*args, **kwargs)

    base.write_bytes(bases[short_run.task].read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(RuntimeError, match="crash"):
            main(script, flags(short_run.task, base, tmp_path / "runs", anneal=0.5))
    run = only_run(tmp_path / "runs")
    kept = [content(path)["progress"]["iteration"] for path in run.glob("checkpoint0.*.pt")]
    assert kept == saved
    if saved:
        base.unlink()  # the run has a copy of its own by then
    result = main(script, ["--resume", run])
    assert_same(run, short_run.path)
    for key in result.keys() - {"date", "wall_s", "args", "commit"}:
        assert result[key] == short_run.result[key], key
    ours, theirs = checkpoint(run), checkpoint(short_run.path)
    for saved in ours, theirs:
        for name in "actor_optimizer", "critic_optimizer":
            saved[name] = saved[name]["state"]
    for part in "critic", "target", "reference", "actor_optimizer", "critic_optimizer", "state", "rng":
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


NAMES = dict(hopper="Hopper-v4", state="lift-state", lamp="lamp-low", one_leg="one_leg-low")
DELTA = dict(kernel="delta", precision="float32", n_particles=1)
PLAIN = dict(td_lambda=0.0, critic_layer_norm=False, exploration_steps=0, buffer_iterations=1)


@pytest.mark.parametrize("task, changes", [
    ("hopper", PLAIN), ("hopper", DELTA | dict(transport_loss="literal")), ("state", PLAIN),
    ("state", DELTA), ("lamp", PLAIN | dict(q_gradient="particles")), ("lamp", DELTA), ("one_leg", {}),
])  # fmt: skip
def test_run_with_other_choices_moves_its_policy(monkeypatch, bases, tmp_path, task, changes):
    script, size, action, _ = TASKS[task]
    fakes = use_fakes(monkeypatch, script)
    argv = flags(task, bases[task], tmp_path, **dict(iterations=3, warmup_iterations=0) | changes)
    assert main(script, argv)["task"] == NAMES[task]
    rows, saved = metrics(only_run(tmp_path)), checkpoint(only_run(tmp_path))
    assert float(rows[2]["diagnostics/base_distance"]) > 0
    *networks, sees, _ = saved["critic"]["weights.0"].shape
    assert networks == [2 if script is rldt_gym else 4]
    assert sees == size + (script is rldt_furniture) + 4 * action
    assert all(envs.closed for envs in fakes)


@pytest.mark.parametrize("task, every, follows", [
    ("hopper", 0, False), ("hopper", 2, True), ("hopper", 3, False),
    ("state", 2, True), ("state", 3, False), ("lamp", 0, False), ("lamp", 2, True),
])  # fmt: skip
def test_reference_follows_every_nth_iteration(monkeypatch, bases, tmp_path, task, every, follows):
    script = TASKS[task][0]
    use_fakes(monkeypatch, script)
    of_actor = fakes.recorded(monkeypatch, script, "update_actor", lambda *args: args[:3])
    of_targets = fakes.recorded(monkeypatch, script, "critic_target", lambda *args: args[:2])
    main(script, flags(task, bases[task], tmp_path, iterations=3, reference_every=every))  # trains twice
    saved = checkpoint(only_run(tmp_path))
    for names, nets in (("policy reference critic", of_actor[-1]), ("policy target", of_targets[-1])):
        assert all(fakes.same(net, saved[name]) for name, net in zip(names.split(), nets, strict=True))
    expected = saved["policy"] if follows else load_file(only_run(tmp_path) / "base.safetensors")
    for key, value in saved["reference"].items():
        assert torch.equal(value.cpu(), expected[key].cpu()), key


@pytest.mark.parametrize("task, score", [("hopper", "return"), ("state", "success"), ("lamp", "stages")])
def test_best_policy_is_measured_again(monkeypatch, bases, tmp_path, task, score):
    script, drawn = TASKS[task][0], []
    use_fakes(monkeypatch, script)
    scores = iter([0.25, 0.75, 0.125, 0.5])  # base, middle, final, the middle's policy again

    def evaluate(policy, args, episodes, seed, envs=None):
        assert not getattr(envs, "closed", False)  # the environments of manipulation
        drawn.append({*range(seed, seed + 2 * episodes)})
        return {f"eval_{score}": next(scores)}

    monkeypatch.setattr(script, "evaluate", evaluate)
    changes = dict(eval_every=2, eval_episodes=3, final_eval_episodes=4, warmup_iterations=0)
    monkeypatch.setattr(script, "record_video", lambda *_: 1 / 0)  # a film costs no result
    with pytest.raises(ZeroDivisionError):
        main(script, flags(task, bases[task], tmp_path, capture_video=True, **changes))
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert [result[f"{name}_{score}"] for name in ("base", "final", "best")] == [0.25, 0.125, 0.5]
    assert [len(episodes) for episodes in drawn] == [8, 6, 8, 8]
    assert drawn[1] < drawn[0] == drawn[2] and not drawn[3] & drawn[0]


@each_sparse
@pytest.mark.parametrize("best_of", [1, 4])
def test_updates_take_chunks_of_episodes_to_learn_from(monkeypatch, bases, tmp_path, script, best_of):
    task = "lamp" if script is rldt_furniture else "state"
    made = use_fakes(monkeypatch, script, stop=script is rldt_robomimic)
    state_of = lambda obs: obs["state"] if script is rldt_robomimic else obs
    target = lambda *args: state_of(args[2]["obs"]).sum(-1) + args[2]["action"].sum(-1)
    monkeypatch.setattr(script, "critic_target", target)
    explorers = fakes.recorded(monkeypatch, script, "collect", lambda *args: args[1])
    of_critic = fakes.recorded(monkeypatch, script, "update_critic", lambda *args: args[3:-1])
    of_actor = fakes.recorded(monkeypatch, script, "update_actor", lambda *args: args[4:-1])
    changes = dict(segments=40, demos=False, warmup_iterations=2, best_of=best_of)
    main(script, flags(task, bases[task], tmp_path, **changes))
    assert [critic is not None for critic in explorers] == [False, best_of > 1, best_of > 1]
    for obs, action, y in of_critic:
        torch.testing.assert_close(state_of(obs).sum(-1) + action.sum(-1), y)
    training = {seed for seeds in made[0].begun[1:4] for seed in seeds}
    valid = {seed % 100_000: made[0].valid[seed] for seed in training}
    assert len(valid) == len(training)  # no two seeds with the same last digits
    seen = torch.cat([state_of(obs) for obs, *_ in of_critic + of_actor])
    left = [valid[round(s[0].item() * 100_000)] - 1 - round(s[1].item() * 10) for s in seen]
    assert min(left) == 0  # the chunk that scores the last point, but none after it
    assert any(chunks < 3 for chunks in valid.values())  # an episode is at least so long
    if script is rldt_furniture:
        assert {*seen[:, -1].tolist()} == {0, 0.5}  # the stage, which the critic sees
    # the actor, trained last, clones chunks of the last two rollouts after which their episode scores
    rollouts = [kept_rollout(only_run(tmp_path), slot) for slot in (0, 1)]
    names = "state" if script is rldt_robomimic else "obs", "action", ENDS_IN[script]
    rows = [torch.cat([rollout[name][:13].flatten(0, 1) for rollout in rollouts]) for name in names]
    for _, (obs, action) in of_actor:
        state = state_of(obs)
        chunk, row = (state[:, None] == rows[0]).all(-1).nonzero().T
        assert len(chunk) == len(state) > 0 and torch.equal(rows[1][row], action)
        scored = 2 * state[:, -1] if script is rldt_furniture else 0
        assert (rows[2][row] > scored).all()


# ------------------------------------------------------------------------------------ settings
def settled(monkeypatch, script, *argv):
    """The settings with which main begins its run."""
    taken = []
    monkeypatch.setattr(script, "Run", lambda args, name: taken.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(script, argv)
    return taken[0]


GYM, ROBOMIMIC = ("iterations",), ("horizon", "iterations", "rollout_chunks", "exploration_steps")
FURNITURE = "horizon", "transport_scale", "iterations"


@pytest.mark.parametrize("script, names, flags, expected", [
    (rldt_gym, GYM, "", (24,)), (rldt_gym, GYM, "--env-id=Walker2d-v4", (78,)),
    (rldt_gym, GYM, "--wall-budget-s=9", (0,)), (rldt_gym, GYM, "--iterations=3", (3,)),
    (rldt_robomimic, ROBOMIMIC, "--task=lift", (300, 40, 200, 2)),
    (rldt_robomimic, ROBOMIMIC, "--task=square", (400, 120, 400, 2)),
    (rldt_robomimic, ROBOMIMIC, "--task=transport", (800, 120, 400, 0)),
    (rldt_robomimic, ROBOMIMIC, "--task=transport --preset=paper", (800, 200, 200, 2)),
    (rldt_robomimic, ROBOMIMIC, "--task=can --wall-budget-s=9", (300, 0, 400, 2)),
    (rldt_robomimic, ROBOMIMIC, "--task=lift --horizon=8 --iterations=3 --rollout-chunks=50 "
     "--exploration-steps=1", (8, 3, 50, 1)),
    (rldt_furniture, FURNITURE, "--randomness=med --preset=paper", (700, 1, 500)),
    (rldt_furniture, FURNITURE, "--furniture=one_leg", (700, 30, 60)),
    (rldt_furniture, FURNITURE, "--furniture=lamp --wall-budget-s=9", (1000, 2, 0)),
    (rldt_furniture, FURNITURE, "--horizon=48 --transport-scale=3", (48, 3, 60)),
    (rldt_furniture, FURNITURE, "--furniture=lamp --preset=paper --num-envs=1", (1000, 1, 250)),
])  # fmt: skip
def test_the_task_decides_what_is_not_given(monkeypatch, script, names, flags, expected):
    args = settled(monkeypatch, script, *flags.split())
    assert tuple(getattr(args, name) for name in names) == expected


@each_sparse
def test_gradient_of_the_particles_needs_two_of_them_and_their_kernel(script):
    for flag in "--n-particles=1", "--kernel=delta":
        with pytest.raises(SystemExit, match="--q-gradient particles: needs"):
            main(script, ["--q-gradient=particles", flag, f"--base={__file__}"])


@pytest.mark.parametrize("script, most, flag", [
    (rldt_gym, 46, "-h"), (rldt_robomimic, 53, "--help"), (rldt_furniture, 52, "--help"),
])  # fmt: skip
def test_settings_are_few_and_help_shows_all_of_them_on_two_screens(script, most, flag, capsys):
    fields = dataclasses.fields(script.Args)
    assert len(fields) <= most
    with pytest.raises(SystemExit) as stop:
        parse(script, ["--seed=2", flag])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100 and lines[0] == script.__doc__.splitlines()[0]
    words = [line.split() for line in lines]
    assert ["--seed", "1", "[0,", "4294967295]", "of", "networks,"] in [line[:6] for line in words]
    assert ["--wall-budget-s", "0.0", "[0,", "1e6]", "seconds"] in [line[:5] for line in words]
    shown = [line[0] for line in words if line and line[0].startswith("--")]
    assert shown == [f"--{field.name.replace('_', '-')}" for field in fields]
    sections = {above for above, line in itertools.pairwise(lines) if line.startswith("  --")}
    assert {"the run", "base policy", "critic", "exploration and actor"} <= sections


# ------------------------------------------------------------------------------- pretrain_fm.py
CLONE = "--seed=0 --epochs=1 --batch=32 --width=16 --chunk=2 --euler-steps=4 --final-eval-episodes=3"


def clone(family, *flags):
    pretrain_fm.main(parse_args(pretrain_fm.FAMILIES[family], {}, "", flags))


def test_policy_that_is_written_knows_its_scores_and_is_the_base_of_a_run(tmp_path, tiny_flags):
    data, out = tmp_path / "a.hdf5", tmp_path / "mine.safetensors"
    dataset.make(dataset.Args(env_id="Hopper-v4", steps=400, num_envs=8, out=data))
    clone("gym", f"--dataset={data}", f"--out={out}", f"--device={DEVICE}", *CLONE.split())
    policy, left = FlowPolicy.load(out), {path.name for path in tmp_path.iterdir()}
    assert (policy.chunk, policy.config["width"], policy.info["env_id"]) == (2, 16, "Hopper-v4")
    assert left == {data.name, out.name}
    flags = *tiny_flags, f"--base={out}", "--seed=0", "--iterations=1", f"--runs={tmp_path / 'runs'}"
    assert rldt_gym.main(parse(rldt_gym, flags))["base_return"] == policy.info["eval_return"]


@each_sparse
def test_policy_is_kept_without_simulators_and_with_them_knows_its_scores(monkeypatch, tmp_path, script):
    out, family = tmp_path / "mine.safetensors", script.__name__.removeprefix("rldt_")
    task = "--task=lift --obs=state" if family == "robomimic" else "--furniture=one_leg"
    flags = f"--episodes=2 --num-envs=2 --depth=3 --device={DEVICE} {task} {CLONE}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no simulator"):
        patch.setattr(script, "make_envs", Mock(side_effect=SystemExit("no simulator")))
        clone(family, f"--out={out}", *flags.split())
    policy = getattr(script, "Policy", FlowPolicy)
    assert policy.load(out).config["width"] == 16 and "eval_success" not in policy.load(out).info
    use_fakes(monkeypatch, script)
    clone(family, f"--out={out}", *flags.split())
    assert 0 <= policy.load(out).info["eval_success"] <= 1
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("family, flag", [
    ("gym", "--head-steps"), ("robomimic", "--spread"), ("furniture", "--head-steps"),
    ("gym", "--wall-budget-s"), ("furniture", "--capture-video"),
])  # fmt: skip
def test_flag_of_another_family_is_refused(monkeypatch, family, flag):
    for module in pretrain_fm.dataset, pretrain_fm.robomimic, pretrain_fm.furniture:
        monkeypatch.setattr(module, "get", lambda *_: None)
    with pytest.raises(SystemExit, match=f"{flag} is not a setting of this pretraining"):
        clone(family, flag, *["1"] * (flag != "--capture-video"), "--device=cpu")


@pytest.mark.parametrize("flag, message", [
    ("--depth=4", "--depth must be odd"), ("--depth=1", "--depth must be odd"),
    ("--time-dim=7", "--time-dim must be even"), ("--time-dim=2", "--time-dim must be even"),
])  # fmt: skip
def test_sizes_that_no_network_has_are_refused_before_anything_is_made(tmp_path, flag, message):
    with pytest.raises(SystemExit, match=message):
        clone("gym", flag, "--device=cpu", f"--out={tmp_path / 'x' / 'a.safetensors'}")
    assert not list(tmp_path.iterdir())
