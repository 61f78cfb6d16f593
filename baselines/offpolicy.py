"""What QAM, DSRL and best of N share: RLDT's rollouts, replay and critic, with another actor."""

import copy
from collections.abc import Iterator

import torch

import rldt_furniture
import rldt_gym
import rldt_robomimic
from baselines.families import Family, family_of, mix
from common.flow import FlowPolicy
from common.runs import Run, evaluate_stored
from common.settings import set_up

SHARED = {script.__name__: script.CriticArgs for script in (rldt_gym, rldt_robomimic, rldt_furniture)}


class Method:
    """What a method adds: `policy` and `critic`, its steps and, for checkpoints, its `parts`."""

    policy_class = FlowPolicy

    def __init__(self, base: FlowPolicy, family: Family, args):
        self.args, self.base, self.parts = args, base, {}
        self.policy = self.make_policy(mix(self.policy_class, family), family)
        self.critic = self.make_critic(family)

    def make_policy(self, policy_class: type[FlowPolicy], family: Family) -> FlowPolicy:
        """The policy to improve, with the weights of the base."""
        return copy.deepcopy(self.base).requires_grad_()

    def make_critic(self, family: Family):
        return family.make_critic(self.policy)

    def begin(self, warm: bool):
        """Before an iteration; `warm`: the critic alone learns."""

    def actor(self) -> FlowPolicy:
        """What acts in the next rollout."""
        return self.policy

    def collected(self, rollout: dict):
        """After that rollout, which is in the replay."""

    def value_of(self, target):
        """The policy and the target networks that give V(s'), as `critic_target` asks for them."""
        return self.policy, target

    def update(self, seen: torch.Tensor, action, target, warm: bool, spent: float) -> Iterator[dict]:
        """A round's steps on chunks, seen (B, .) and action (B, D); yields metrics."""
        yield from ()


def main(args, method_class: type[Method]) -> dict | None:
    set_up(args)
    family = family_of(args)
    if args.evaluate:
        return evaluate_stored(args, mix(method_class.policy_class, family), family.measure)

    run = Run(args, f"{family.task}__{args.exp_name}__{args.seed}")
    base = family.base(run).requires_grad_(False)
    method = method_class(base, family, args)
    policy, critic = method.policy, method.critic
    target = copy.deepcopy(critic).requires_grad_(False)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    replay = family.make_replay(policy)
    state = dict(env_steps=0, trained=0, reward_scale=1.0, rewarded=0)
    parts = dict(critic=critic, target=target, replay=replay, critic_optimizer=critic_optimizer)
    run.checkpoints(state, policy, **family.parts, **method.parts, **parts)

    for iteration, spent in run.iterations():
        row, warm = {}, state["trained"] < args.warmup_iterations
        method.begin(warm)
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate(family.score, family.measure)
            family.reset(run, iteration)
        else:
            # 1. roll out with exploration
            with run.timer(row, "rollout_s"):
                rollout = replay.next()
                state["env_steps"] += family.rollout(method.actor(), rollout, run, iteration, row)
                method.collected(rollout)
            family.scale_rewards(state, replay, row)

            for _ in range(args.rounds):
                # 2. the critic: TD(lambda) targets of some segments, then steps on minibatches of them
                with run.timer(row, "critic_s"):
                    value = method.value_of(target)
                    seen, action, y = family.draw(replay, *value, state, warm)
                    for _ in range(family.critic_steps(warm)):
                        i = torch.randint(len(y), (args.critic_batch,), device=args.device)
                        rows = seen[i], action[i], y[i]
                        run.add(family.update_critic(critic, target, critic_optimizer, *rows))
                # 3. the method's own steps in some of the same states
                with run.timer(row, "actor_s"):
                    for metrics in method.update(seen, action, target, warm, spent):
                        run.add(metrics)
            state["trained"] += 1
            if any(p.requires_grad for p in policy.velocity.parameters()):
                cond = seen[:512, : policy.obs_dim]
                run.add({"diagnostics/base_distance": policy.distance(base, cond)})
        run.log(row, state["env_steps"])
        run.save()
    return family.finish(run, policy, state)
