"""rldt_robomimic.py: what only it has: encoders, images, base policies, and runs on robosuite."""

import copy
import functools
import itertools
import sys
import types

import fakes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import metrics
from fakes import arguments, roll_out, same, scripted, small_critic, small_policy
from short_runs import checkpoint, flags, kept_rollout, main, only_run, use_fakes

import rldt_robomimic
from common.runs import Run
from demos import make_robomimic_demos
from rldt_robomimic import Encoder, Policy, augment, critic_target, take, update_actor, update_critic


def seeing_policy(own=True):
    policy = small_policy(rldt_robomimic, cameras=1)
    policy.encoder.requires_grad_(own)
    return policy


def seeing_critic(policy, own=True):
    encoder = Encoder(policy.cameras, policy.obs_dim) if own else None
    return small_critic(rldt_robomimic, policy, encoder=encoder)


def observations(*shape, cameras=1):
    images = torch.randint(256, (*shape, 3 * cameras, 96, 96), dtype=torch.uint8)
    return {"state": torch.randn(*shape, 4), "rgb": images, "object": torch.randn(*shape, 10)}


def copied(module):
    return copy.deepcopy(module.state_dict())


def changed(module, before):
    """Names of the parameters that differ from `before`."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


@pytest.fixture
def unshifted(monkeypatch):
    """Images are not shifted; the list holds how many would have been."""
    seen = []
    monkeypatch.setattr(rldt_robomimic, "augment", lambda obs: seen.append(len(obs["rgb"])) or obs)
    return seen


# ------------------------------------------------------------------------------------ networks
def test_features_are_a_weighted_sum_of_projected_maps_of_patches_with_a_position_each():
    vit = rldt_robomimic.ViT(state_dim=2, dim=8, heads=2)
    torch.nn.init.normal_(vit.project[1].weight)
    torch.nn.init.normal_(vit.project[1].bias)
    exact = copy.deepcopy(vit).double()  # images are scaled in single precision, so not by itself
    (first, _, second), (linear, norm, _) = exact.patches, exact.project
    vit.transformer = torch.nn.Identity()
    rgb, state = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8), torch.randn(2, 2)
    x = F.conv2d(rgb.double() / 255 - 0.5, first.weight, first.bias, stride=4).clamp_min(0)
    x = F.conv2d(x, second.weight, second.bias, stride=2)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for b, channel in itertools.product(range(2), range(8)):
        patches = torch.stack([x[b, channel, i // 11, i % 11] for i in range(121)])
        each = torch.cat([patches + exact.position[:, channel], state[b].double()])
        normed = F.layer_norm(linear.weight @ each + linear.bias, (8,), norm.weight, norm.bias)
        expected[b] += exact.weight[channel] * normed.clamp_min(0)
    torch.testing.assert_close(vit(rgb, state), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cameras", [1, 2])
def test_encoder_sees_every_camera_and_proprioception(cameras):
    encoder, obs = Encoder(cameras, state_dim=4), observations(2, cameras=cameras)
    features = encoder(obs)
    assert features.shape == (2, 128 * cameras + 4)
    assert torch.equal(features[:, -4:], obs["state"])
    for camera in range(cameras):
        darker = obs["rgb"].clone()
        darker[:, 3 * camera : 3 * camera + 3] //= 2
        difference = (encoder(obs | {"rgb": darker}) - features).abs().view(2, -1)
        touched = [difference[:, 128 * i : 128 * (i + 1)].max() > 0 for i in range(cameras)]
        assert touched == [i == camera for i in range(cameras)]
    moved = encoder(obs | {"state": obs["state"] + 1})
    assert ((moved - features)[:, : 128 * cameras].abs().amax(1) > 1e-3).all()
    (features + moved).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------- augmentation
def test_augmentation_moves_each_image_by_its_own_shift_and_repeats_its_border():
    rgb, found = torch.arange(200 * 2 * 7 * 9).view(200, 2, 7, 9), set()  # a value is of one pixel
    obs = dict(state=torch.randn(200, 4), rgb=rgb)
    shifted = augment(obs)
    assert shifted["state"] is obs["state"] and obs["rgb"] is rgb
    assert augment({"state": obs["state"]}) == {"state": obs["state"]}
    y, x = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    for before, after in zip(rgb.float(), shifted["rgb"], strict=True):
        shifts = []
        for dy, dx in itertools.product(range(-5, 6), repeat=2):
            if torch.equal(before[:, (y + dy).clamp(0, 6), (x + dx).clamp(0, 8)], after):
                shifts.append((dy, dx))
        assert len(shifts) == 1
        found.update(shifts)
    assert len(found) > 60  # of 81, in 200 images
    assert {dy for dy, _ in found} == {dx for _, dx in found} == {*range(-4, 5)}


# -------------------------------------------------------------------------------------- critic
def next_batch(next_obs):
    """A batch of critic_target, in which one chunk succeeds."""
    shape = next_obs["state"].shape[:2]
    batch = {"reward": torch.zeros(shape), "terminated": torch.zeros(shape)}
    batch["reward"][1, 0] = batch["terminated"][1, 0] = 1
    return batch | {"next_obs": next_obs}


def test_critic_target_encodes_what_each_of_the_networks_sees(unshifted):
    args, policy = arguments(rldt_robomimic, td_lambda=0.4, gamma=0.9), seeing_policy()
    target, batch = seeing_critic(policy), next_batch(observations(2, 2))
    target.biases[-1].data.fill_(0.5)  # values inside [0, 1]
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, args)
    torch.manual_seed(1)
    following = {name: rows.flatten(0, 1) for name, rows in batch["next_obs"].items()}
    action = policy.sample(policy.encoder(following), torch.randn(4, policy.action_size))
    value = target(target.encoder(following), action).min(0).values.view(2, 2)
    expected = rldt_robomimic.td_lambda(batch["reward"], batch["terminated"], value, 0.9, 0.4)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not y.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_a_critic_of_objects_sees_the_simulators_state_scaled_in_place_of_images(frozen):
    policy, obs = seeing_policy(), observations(3)
    policy.frozen = frozen
    policy.set_limits(object_min=-2 * np.ones(10), object_max=np.linspace(1, 4, 10))
    critic = rldt_robomimic.Critic(14, policy.action_size, True)
    seen = policy.observe({name: value.numpy() for name, value in obs.items()})
    assert ("rgb" in seen) == (not frozen)
    scaled = (obs["object"] + 2) / torch.linspace(3, 6, 10) * 2 - 1
    expected = torch.cat([policy.normalize(obs["state"].numpy()), scaled.clamp(-5, 5)], -1)
    torch.testing.assert_close(critic.encode(seen), expected)


@pytest.mark.parametrize("task", ["lift", "square", "transport"])
def test_shipped_policies_of_images_scale_objects_as_those_of_states_do(task):
    load = lambda obs: Policy.load(rldt_robomimic.dataset.DEMOS / task / f"base_{obs}.safetensors")
    images, states = load("image"), load("state")
    for end in "min", "max":
        seen = getattr(states, f"obs_{end}")[-rldt_robomimic.TASKS[task].object_size :]
        assert torch.equal(getattr(images, f"object_{end}"), seen)


# ----------------------------------------------------------------------- the encoder in updates
def update(function, policy, critic):
    """One update on images or their features: 6 of critic_target, 5 or 4 of the other two."""
    args, own = arguments(rldt_robomimic, n_particles=3), critic.encoder is not None
    target, reference = (copy.deepcopy(net).requires_grad_(False) for net in (critic, policy))
    obs = observations(dict(critic_target=6, update_critic=5, update_actor=4)[function])
    obs = obs if own else {"state": policy.encoder(obs)}
    if function == "critic_target":
        batch = next_batch({name: value.unflatten(0, (3, 2)) for name, value in obs.items()})
        critic_target(policy, target, batch, args)
    elif function == "update_critic":
        optimizer, batch = torch.optim.SGD(critic.parameters(), 0.1), (torch.randn(5, 4), torch.rand(5))
        update_critic(critic, target, optimizer, obs, *batch, args)
    else:
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        good = take(obs, slice(3)), torch.randn(3, 4)
        update_actor(policy, reference, critic, optimizer, obs, good, args)


def test_images_are_shifted_once_per_update(unshifted):
    policy = seeing_policy()
    for function in "critic_target", "update_critic", "update_actor":
        update(function, policy, seeing_critic(policy))
    assert unshifted == [6, 5, 4, 3]  # the last ones are cloned


@pytest.mark.parametrize("own", [False, True])
def test_critic_and_actor_train_an_encoder_each_or_none(own):
    policy = seeing_policy(own)
    critic = seeing_critic(policy, own)
    names, of_critic = ({name for name, _ in net.named_parameters()} for net in (policy, critic))
    before, of_policy = copied(critic), copied(policy)
    update("update_critic", policy, critic)
    assert (changed(critic, before), changed(policy, of_policy)) == (of_critic, set())
    assert all(parameter.grad is None for parameter in policy.parameters())
    before = copied(critic)
    update("update_actor", policy, critic)
    assert changed(critic, before) == set()
    assert changed(policy, of_policy) == {name for name in names if "velocity" in name or own}


def test_actor_reference_and_critic_encode_images_themselves(unshifted, monkeypatch):
    policy, reference, obs = seeing_policy(), seeing_policy(), observations(4)
    critic, losses, seen = seeing_critic(policy), rldt_robomimic.actor_losses, []
    recorded = lambda *args: seen.extend(args[3:6]) or losses(*args)
    monkeypatch.setattr(rldt_robomimic, "actor_losses", recorded)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    update_actor(policy, reference, critic, optimizer, obs, (None, ()), arguments(rldt_robomimic))
    expected = [network.encoder(obs) for network in (policy, reference, critic)]
    torch.testing.assert_close([cond.detach() for cond in seen], [cond.detach() for cond in expected])


# ------------------------------------------------------------------------------ replay and rollouts
@pytest.mark.parametrize("frozen", [False, True])
def test_replay_holds_images_or_with_a_frozen_encoder_features(frozen):
    envs = scripted(rldt_robomimic, 2, [2, 9, 9], [()] * 3, images=True)
    policy, slot, _ = roll_out(rldt_robomimic, envs, 4, frozen)
    assert ("rgb" in slot) == (not frozen)
    assert frozen or slot["rgb"].dtype == torch.uint8
    for column, rows in enumerate([[(100, 0), (100, 1), (102, 0)], [(101, t) for t in range(5)]]):
        for row, episode in enumerate(rows):
            raw = envs.observation(*episode)
            obs = {"state": policy.normalize(raw["state"])[None], "rgb": torch.tensor(raw["rgb"])[None]}
            assert torch.equal(slot["object"][row, column], policy.normalize(raw["object"], "object"))
            assert torch.equal(slot["state"][row, column], obs["state"][0])
            if frozen:
                expected = policy.encoder(obs)[0].detach()
                given = slot["features"][row, column]
                torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(slot["rgb"][row, column], obs["rgb"][0])


# -------------------------------------------------------------------------------- base policies
pretrain = functools.partial(fakes.pretrain, rldt_robomimic)


def get_base(path, runs, **changes):
    args = arguments(rldt_robomimic, **dict(task="lift", runs=runs, base=path) | changes)
    return rldt_robomimic.get_base(args, Run(args, "base"))


@pytest.mark.parametrize("kind, task, obs", [
    ("state", "square", "state"), ("state", "transport", "state"), ("state", "lift", "image"),
    ("image", "lift", "state"), ("image", "transport", "image"),
])  # fmt: skip
def test_base_policy_that_does_not_fit_stops_in_one_line(bases, tmp_path, kind, task, obs):
    words = rf"{kind}\.safetensors: not a policy for {task} with --obs {obs}"
    with pytest.raises(SystemExit, match=words):
        get_base(bases[kind], tmp_path, task=task, obs=obs)


@pytest.mark.parametrize("task", ["lift", "square", "transport"])
@pytest.mark.parametrize("obs", ["state", "image"])
def test_shipped_base_policy_fits_its_task_and_is_kept_by_the_run(tmp_path, task, obs):
    for encoder in "frozen", "own":
        policy = get_base(None, tmp_path / encoder, task=task, obs=obs, encoder=encoder)
        assert (policy.chunk, policy.info["task"]) == (rldt_robomimic.TASKS[task].chunk, task)
        learns = [p.requires_grad for name, p in policy.named_parameters() if "encoder" in name]
        assert {*learns} == ({encoder == "own"} if obs == "image" else set())
        assert policy.frozen == (encoder == "frozen")
        kept = Policy.load(only_run(tmp_path / encoder) / "base.safetensors")
        assert same(kept, policy.state_dict())


@pytest.mark.parametrize("obs", ["state", "image"])
def test_missing_demonstrations_are_made_by_commands_of_the_maker(monkeypatch, tmp_path, obs):
    made, module = [], rldt_robomimic.dataset

    def run(command, cwd):
        assert command[:3] == [sys.executable, "-m", "demos.make_robomimic_demos"]
        args = tyro.cli(make_robomimic_demos.Args, args=list(map(str, command[3:])))
        assert args.images_from is None or args.images_from.exists()
        made.append((args.task, args.out.name, args.images_from is None, args.fast_render))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("demonstrations")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(module, "DEMOS", tmp_path)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "load", lambda *given: given)
    path = tmp_path / "lift" / ("image.hdf5" if obs == "image" else "low_dim.hdf5")
    for _ in range(2):  # the second time they are there
        given = module.get("lift", obs, None, False)
        assert given == (path, "lift", obs == "image", 0, None, False)
    both = ("lift", "low_dim.hdf5", True), ("lift", "image.hdf5", False)
    assert tuple(one[:3] for one in made) == both[: 1 + (obs == "image")]
    assert obs == "state" or made[-1][3] is False


def demonstrations(*lengths):
    """Those of Lift with images."""
    data, rng = fakes.demonstrations(9, 7, lengths), np.random.default_rng(0)
    rgb = rng.integers(256, size=(sum(lengths), 3, 96, 96), dtype=np.uint8)
    return data | {"rgb": rgb, "object": rng.normal(size=(sum(lengths), 10))}


def test_pretraining_on_images_trains_the_encoder_on_shifted_images(unshifted):
    torch.manual_seed(0)
    first = copied(small_policy(rldt_robomimic, 9, 7, chunk=4, cameras=1))
    policy = pretrain(demonstrations(8, 30))
    assert {name for name, _ in policy.named_parameters()} <= changed(policy, first)
    assert {*unshifted} == {8}  # of each batch


def test_head_steps_pretrain_the_velocity_network_alone(monkeypatch):
    monkeypatch.setattr(rldt_robomimic, "COPIES", 3)
    loss, seen, data = rldt_robomimic.flow_matching_loss, [], demonstrations(30, 30)
    monkeypatch.setattr(rldt_robomimic, "flow_matching_loss", lambda *x: seen.append(x[1:]) or loss(*x))
    first, more = (pretrain(data, head_steps=steps).state_dict() for steps in (0, 300))
    action, cond = (torch.cat(rows) for rows in zip(*seen[-300:], strict=True))
    torch.testing.assert_close(cond[:, 128], action[:, 0])  # the step number
    assert 2 * 54 < len(cond.unique(dim=0)) <= 3 * 54  # chunks, of which some are shifted alike
    for name, value in more.items():
        assert torch.equal(value, first[name]) != name.startswith("velocity."), name


# ---------------------------------------------------------------------- whole runs with images
@pytest.mark.parametrize("encoder", ["frozen", "own"])
def test_run_with_images_trains_what_it_should(monkeypatch, bases, tmp_path, encoder):
    fakes = use_fakes(monkeypatch, rldt_robomimic)
    changes = dict(encoder=encoder, iterations=3, warmup_iterations=0, segments=3, rounds=1)
    result = main(rldt_robomimic, flags("image", bases["image"], tmp_path, **changes))
    run = only_run(tmp_path)
    saved, slot, own = checkpoint(run), kept_rollout(run, 0), encoder == "own"
    assert result["task"] == "lift-image"
    assert (float(metrics(run)[2].get("diagnostics/base_distance", 0)) > 0) == (not own)
    base = Policy.load(run / "base.safetensors").state_dict()
    differ = [key for key, value in saved["policy"].items() if not torch.equal(value, base[key])]
    moved = {key.split(".")[0] for key in differ}
    assert moved == ({"velocity", "encoder"} if own else {"velocity"})
    steps = [group["lr"] for group in saved["critic_optimizer"]["param_groups"]]
    assert steps == [5e-4, 4e-5][: 1 + own]
    assert ("encoder.vits.0.position" in saved["critic"]) == own
    sees = 9 + (128 if own else 10)
    assert saved["critic"]["weights.0"].shape[1] == sees + 28
    assert ("rgb" in slot) == own
    assert slot["state"].shape == (14, 2, 9)
    assert own or slot["features"].shape == (14, 2, 9 + 128)
    assert all(envs.closed for envs in fakes)
    scores = main(rldt_robomimic, ["--evaluate", run])
    assert scores == {name: result[name.replace("eval", "final")] for name in scores}


# ---------------------------------------------------------------------- whole runs on robosuite
def test_run_on_robosuite_is_evaluated_again_to_the_same_numbers(bases, tmp_path):
    argv = flags("state", bases["state"], tmp_path, iterations=3, final_eval_episodes=2)
    result = main(rldt_robomimic, argv)
    run = only_run(tmp_path)
    assert (result["task"], result["env_steps"]) == ("lift-state", 2 * 2 * 13 * 4)
    slot = kept_rollout(run, 1)  # of the second iteration
    assert slot["state"].shape == (14, 2, 19)
    assert slot["terminated"].tolist() == [[0, 0]] * 9 + [[1, 1]] + [[0, 0]] * 3  # chunks of 40 steps
    assert (slot["state"][1:] != slot["state"][:-1]).any(-1).all()
    scores = main(rldt_robomimic, ["--evaluate", run])
    assert scores == {name: result[name.replace("eval", "final")] for name in scores}


def test_run_on_robosuite_with_images(bases, tmp_path):
    changes = dict(
        encoder="own", iterations=2, horizon=8, rollout_chunks=3, final_eval_episodes=1, rounds=1,
        warmup_iterations=0, segments=2, critic_batch=2, actor_batch=2,
    )  # fmt: skip
    result = main(rldt_robomimic, flags("image", bases["image"], tmp_path, **changes))
    slot = kept_rollout(only_run(tmp_path), 0)
    assert slot["terminated"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert (result["task"], result["env_steps"]) == ("lift-image", 2 * 3 * 4)
    assert slot["rgb"].shape == (4, 2, 3, 96, 96)
    assert slot["rgb"].float().std((2, 3, 4)).min() > 10  # a picture in every row
