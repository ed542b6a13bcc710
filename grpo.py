"""Sharpen: GRPO, reinforcement learning without a critic: a completion's advantage is how much its
reward exceeds that of the others to the same prompt.

    A_i = (r_i - mean(r)) / std(r)        over the G completions of one prompt
    L   = -mean_t min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A)
    ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)

DeepSeek's method (Shao et al. 2024, arXiv 2402.03300, eq. 3), made for rewards that a rule can
check (data/rules.py): R1 learned to reason by it (2501.12948). A group of equal rewards teaches
nothing and is left out (papers count it in the mean); --refill replaces it.
--recipe sets the flags marked (recipe) as a paper has them, unless they are given:

    deepseekmath  + beta k3; the mean over each completion first; one update (2402.03300, 4.2)
    r1            the same with a clip of 10, a small beta, minibatches, and a new reference every
                  400 steps (2501.12948, as in Nature 645, 2025)
    dr_grpo       no std, no division by length, which favours long wrong completions (2503.20783)
    dapo          minibatches, refilled groups, a penalty near the limit (Yu et al., 2503.14476)
    cispo         the ratio is a clipped weight: no token loses its gradient (MiniMax, 2506.13585)
    gspo          one ratio per completion, not per token (Zheng et al. 2025, 2507.18071)
    v3.2          no std, an unbiased KL, bad completions far off the policy masked (2512.02556)

--kl names the estimator that is added to the loss, times --beta; they differ in their gradients.
With d = log pi - log pi_ref, k2 = d^2 / 2 has that of KL(pi || ref) on fresh samples; k3 = e^-d - 1
+ d, the paper's, that of KL(ref || pi); unbiased = ratio k3 (v3.2's) that of KL(pi || ref),
off-policy too. k1 = d has none. Left out: process rewards, asynchronous sampling.

    python grpo.py --init=out/sft --data=sums.jsonl --reward=data/rules.py:final_number --out=out/rl
"""

from dataclasses import dataclass

import numpy as np
import torch

import scoring
from data import chat, rows
from data.pack import token_slices
from model import completion_logprobs
from optim import Optimizer, wsd
from rollout import check_sampler_matches_trainer, complete_rows, get_per_token, read_logprobs, set_per_token
from runtime import checkpoint, memory
from runtime.batches import index_order, minibatches
from runtime.cli import print0, refuse_unread
from runtime.errors import UserError
from runtime.process import launch, reduce_sum
from runtime.run import RolloutConfig, Run, mean_updates, rollout_metrics

DEFAULT_RECIPE = {"group_size": 8, "advantage": "grpo", "loss_aggregation": "token"}
DEFAULT_RECIPE |= {"policy_loss": "clip", "clip_low": 0.2, "clip_high": 0.28, "off_policy_mask": 0.0}
DEFAULT_RECIPE |= {"kl": "none", "beta": 0.0, "refill": 0, "overlong": "none", "reference_every": 0, "minibatches": 1}
RECIPES = {  # what differs from the default
    "default": {},
    "deepseekmath": {"group_size": 64, "loss_aggregation": "sequence", "clip_high": 0.2, "kl": "k3", "beta": 0.04},
    "r1": {"group_size": 16, "loss_aggregation": "sequence", "clip_low": 10.0, "clip_high": 10.0}
    | {"kl": "k3", "beta": 0.001, "reference_every": 400, "minibatches": 16},
    "dr_grpo": {"advantage": "dr_grpo", "loss_aggregation": "constant", "clip_high": 0.2},
    "dapo": {"group_size": 16, "refill": 4, "overlong": "punish", "minibatches": 16},
    "cispo": {"group_size": 16, "policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "minibatches": 16},
    "gspo": {"group_size": 16, "policy_loss": "gspo", "loss_aggregation": "sequence"}
    | {"clip_low": 3e-4, "clip_high": 4e-4, "minibatches": 4},
    "v3.2": {"group_size": 16, "advantage": "dr_grpo", "off_policy_mask": 0.5}
    | {"kl": "unbiased", "beta": 0.001, "minibatches": 16},
}
OVERLONG = "grpo.py:overlong_penalty"  # its name among the rewards


@dataclass(kw_only=True)
class Config(RolloutConfig):
    # -- What you will set --
    # default or one of the above: the values of the flags marked (recipe) that are left out; shown
    # are those of the default recipe
    recipe: str = "default"
    # -- What you may set --
    # rounds of sampling and updating [>= 1]
    steps: int = 100
    # (recipe: 8) completions of each prompt [>= 2; <= 1000000]
    group_size: int = 0
    # (recipe: grpo) reward minus the group's mean, over its std (grpo), minus the mean (dr_grpo),
    # or minus the mean of the others (rloo) [one of grpo, dr_grpo, rloo]
    advantage: str = ""
    # (recipe: token) mean over all tokens, over each completion's first (sequence), or the sum over
    # completions x --max_new_tokens (constant) [one of token, sequence, constant]
    loss_aggregation: str = ""
    # (recipe: clip) what is clipped: each token's term (clip), its weight only (cispo), or one
    # ratio per completion (gspo) [one of clip, cispo, gspo]
    policy_loss: str = ""
    # (recipe: 0.2) how far below 1 a ratio still has a gradient [>= 0]
    clip_low: float = -1.0
    # (recipe: 0.28) how far above 1 [>= 0]
    clip_high: float = -1.0
    # (recipe: 0) a completion worse than its group is masked once its tokens are less likely than
    # when they were sampled, by this on average, in nats; 0: none is [>= 0]
    off_policy_mask: float = -1.0
    # (recipe: none) estimator of the KL to the reference [one of none, k2, k3, unbiased]
    kl: str = ""
    # (recipe: 0) KL coefficient: the price of moving away from the reference [>= 0]
    beta: float = -1.0
    # (recipe: 0) how often to sample further prompts in place of groups of equal rewards [>= 0]
    refill: int = -1
    # (recipe: none) mask: completions without an end are left out; punish: up to -1 over the last
    # --overlong_share of --max_new_tokens [one of none, mask, punish]
    overlong: str = ""
    # (recipe: 0) steps after which the policy becomes its own reference; 0: never [>= 0]
    reference_every: int = -1
    # (recipe: 1) optimizer steps per epoch [>= 1; <= 1000000]
    minibatches: int = 0
    # -- What you will rarely set --
    # passes over the completions of a step [>= 1; <= 10000]
    epochs: int = 1
    # the last share of --max_new_tokens that --overlong=punish punishes [> 0; <= 1]
    overlong_share: float = 0.2
    # share of the steps, at the end, over which the learning rate falls to 0 [>= 0; <= 1]
    decay: float = 0.5
    eval_every: int = 20


def apply_recipe(config):
    """Give each flag marked (recipe) that was left out the recipe's value, and print them."""
    if config.recipe not in RECIPES:
        raise UserError(f"--recipe={config.recipe}: expected one of {', '.join(RECIPES)}")
    for name, value in (DEFAULT_RECIPE | RECIPES[config.recipe]).items():
        if vars(config)[name] == vars(Config)[name]:
            setattr(config, name, value)
    print0(f"recipe {config.recipe}:", ", ".join(f"{name} {vars(config)[name]}" for name in DEFAULT_RECIPE))


def check_flags(config):
    """Raises UserError for flags that do not go together."""
    if not config.reward:
        raise UserError("--reward: name what to maximise")
    if config.kl == "k1":
        raise UserError("--kl=k1: as a loss its gradient is 0 on average, so it has no effect; take k2")
    if (config.beta > 0) != (config.kl != "none"):
        raise UserError(f"--beta={config.beta} and --kl={config.kl}: give both (--kl=k2 --beta=0.02) or neither")
    if config.kl == "none" and (config.reference or config.reference_every):
        raise UserError("--reference and --reference_every need --kl; --kl=k2 --beta=0.001 does little but log it")
    if config.overlong != "punish":
        refuse_unread(config, {"overlong_share": "only --overlong=punish reads it"})


# --------------------------------------------------------------------------------------------------
# The algorithm: P groups of G completions. Per-token tensors are fp32 [M], one completion after
# another; lengths: the tokens of each.


def group_advantages(rewards, kind):
    """[P, G] -> [P, G]: how much better each completion is than its group; 0 if all are equal.

    grpo: (r - mean) / std (2402.03300, section 4.1.2); dr_grpo: r - mean (2503.20783, eq. 4); rloo:
    r - mean of the other G - 1 (Ahmadian et al. 2024, 2402.14740)."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages /= advantages.abs().amax(1, keepdim=True).clamp(min=1e-300)  # tiny ones' squares would be 0
        advantages /= advantages.std(1, keepdim=True).clamp(min=1e-300)
    elif kind == "rloo":
        advantages *= rewards.shape[1] / (rewards.shape[1] - 1)
    # Equal rewards must give 0, but (r - mean) / std of three times 0.3 can be 0.7, by rounding
    return torch.where(differs(rewards)[:, None], advantages, 0.0)


def differs(rewards):
    """bool [P]: whether a group's rewards, fp64 [P, G], differ by more than rounding."""
    return rewards.amax(1) - rewards.amin(1) > 1e-12 * rewards.abs().amax(1)


def token_weights(lengths, kind, n_tokens, n_completions, max_new_tokens):
    """fp32 [M]: the weight of each token's loss; the loss is the weighted sum. token: 1 / n_tokens
    (DAPO, eq. 8); sequence: 1 / (n_completions length) (GRPO); constant: 1 / (n_completions
    max_new_tokens) (Dr. GRPO). Both n are of the minibatch, on all ranks."""
    if kind == "token":
        weights = [1 / n_tokens for _ in lengths]
    elif kind == "sequence":
        weights = [1 / (n_completions * length) for length in lengths]
    else:
        weights = [1 / (n_completions * max_new_tokens) for _ in lengths]
    return torch.from_numpy(np.repeat(weights, lengths)).float()


def clip_loss(logp, old_logp, advantages, lengths, clip_low, clip_high):
    """(loss [M], ratio [M]): the clipped objective, negated."""
    ratio = torch.exp(logp - old_logp)
    clipped_ratio = ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio), ratio


def cispo_loss(logp, old_logp, advantages, lengths, clip_low, clip_high):
    """(loss [M], ratio [M]): -A log pi, weighted with the clipped ratio, which has no gradient:
    2506.13585, eq. 4 and 5."""
    ratio = torch.exp(logp - old_logp).detach()
    return -advantages * ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high) * logp, ratio


def gspo_loss(logp, old_logp, advantages, lengths, clip_low, clip_high):
    """(loss [M], ratio [M]): `clip_loss` of each completion's geometric mean ratio, the same for
    all of its tokens: 2507.18071, eq. 5 and 7."""
    logratio = completion_means(logp - old_logp, lengths)
    return clip_loss(logratio, torch.zeros_like(logratio), advantages, lengths, clip_low, clip_high)


def completion_means(x, lengths):
    """[M] -> [M]: the mean over each completion, for each of its tokens."""
    return torch.cat([part.mean().expand(len(part)) for part in x.split(lengths)])


POLICY_LOSSES = {"clip": clip_loss, "cispo": cispo_loss, "gspo": gspo_loss}


def off_policy_weights(logp, old_logp, advantages, lengths, limit):
    """fp32 [M]: 0 for completions with A < 0 and mean(old_logp - logp) > limit, else 1 (2512.02556,
    whose limit is unpublished; the recipe's 0.5 is TRL's)."""
    drift = completion_means((old_logp - logp).detach(), lengths)
    return ((advantages >= 0) | (drift <= limit)).float()


def kl_loss(logp, ref_logp, ratio, kind):
    """[M]: an estimator of the KL to the reference; the module's docstring has their gradients."""
    logratio = logp - ref_logp
    if kind == "k2":
        return 0.5 * logratio**2
    k3 = torch.exp(-logratio) - 1 + logratio
    return ratio * k3 if kind == "unbiased" else k3


def overlong_penalty(samples, config):
    """fp64 [n]: 0 up to the last --overlong_share of the limit, then down to -1 (DAPO, eq. 13)."""
    soft = config.overlong_share * config.max_new_tokens
    return np.array([max(-1.0, min(0.0, (config.max_new_tokens - len(s.tokens)) / soft - 1)) for s in samples])


# --------------------------------------------------------------------------------------------------
# One step


def roll_out(model, tok, scorers, order, train, step, config, time_phase):
    """([Completion], n_prompts): this rank's completions, and the number of prompts on all ranks:
    --prompts_per_step, and with --refill more, until so many groups have unequal rewards."""
    completions, n_prompts, missing = [], 0, config.prompts_per_step
    for _ in range(config.refill + 1):
        more = complete_rows(model, tok, [train[i] for i in order.batch(missing)], step, config, n_prompts)
        time_phase("rollout")
        scoring.score_batch(scorers, more)
        for c in more:
            c.penalty = c.parts.get(OVERLONG, 0.0)
        time_phase("scoring")
        completions += more
        n_prompts += missing
        missing -= int(reduce_sum(differs(group_scores(more, config)).sum())[0])
        if not missing:
            break
    return completions, n_prompts


def group_scores(completions, config):
    """fp64 [P, G], of whole groups. Within a group the same text has the same score: a reward model
    that reads it in another pack rounds differently, which is no difference to learn from."""
    scores, score_of = [], {}
    for c in completions:
        text = c.index // config.group_size, c.text, c.sample.finished
        scores.append(score_of.setdefault(text, c.score))
    return torch.tensor(scores, dtype=torch.float64).view(-1, config.group_size)


def find_advantages(completions, config):
    """(trained, groups): the completions to train on, which get their advantages; and statistics
    of the groups, repeated for each completion, {"zero_variance", "all_right", ...: [D]}.

    Left out are groups of zero variance and, with --overlong=mask, completions without an end. A
    completion is right if its score without the length penalty is above 0: pass_at_1 is the share
    of right ones, pass_at_k whether there is one; all_right and all_wrong are of equal rewards."""
    scores = group_scores(completions, config)
    advantages = group_advantages(scores, config.advantage).flatten().float()
    right = torch.tensor([c.score > c.penalty for c in completions]).view_as(scores)
    finished = torch.tensor([c.sample.finished for c in completions]).view_as(scores)
    equal = ~differs(scores)
    groups = {"zero_variance": equal, "all_right": equal & right[:, 0], "all_wrong": equal & ~right[:, 0]}
    groups |= {"all_cut": ~finished.any(1), "pass_at_1": right.double().mean(1), "pass_at_k": right.any(1)}
    groups = {name: values.repeat_interleave(config.group_size).tolist() for name, values in groups.items()}
    trained = []
    for c, advantage, zero_variance in zip(completions, advantages, groups["zero_variance"], strict=True):
        if not zero_variance and (c.sample.finished or config.overlong != "mask"):
            c.per_token["advantages"] = advantage.repeat(c.n_tokens)
            trained.append(c)
    return trained, groups


UPDATE_STATS = ("loss", "approx_kl", "clip_fraction", "ratio")  # logged as means over the updates


def add_gradients(model, completions, n_tokens, n_completions, config):
    """Add up the gradient of the loss over this rank's part of a minibatch, which has `n_tokens`
    tokens in `n_completions` completions on all ranks. Returns its loss, and means over its tokens.

    Completions without "old_logp" get the log-probabilities of this pass, with a ratio of 1."""
    model.train()
    sums = torch.zeros(len(UPDATE_STATS), device=model.embed.device)
    for part in token_slices([len(c.chat.ids) for c in completions], config.micro_batch_tokens):
        micro_batch = completions[part]
        logp = completion_logprobs(model, [c.chat for c in micro_batch], config.temperature)
        if "old_logp" not in micro_batch[0].per_token:
            set_per_token(micro_batch, old_logp=logp.detach())
        old_logp = get_per_token(model, micro_batch, "old_logp")
        advantages = get_per_token(model, micro_batch, "advantages")
        policy_loss, lengths = POLICY_LOSSES[config.policy_loss], [c.n_tokens for c in micro_batch]
        losses, ratio = policy_loss(logp, old_logp, advantages, lengths, config.clip_low, config.clip_high)
        if config.off_policy_mask:
            losses = losses * off_policy_weights(logp, old_logp, advantages, lengths, config.off_policy_mask)
        if config.kl != "none":
            ref_logp = get_per_token(model, micro_batch, "ref_logp")
            losses = losses + config.beta * kl_loss(logp, ref_logp, torch.exp(logp - old_logp), config.kl)
        weights = token_weights(lengths, config.loss_aggregation, n_tokens, n_completions, config.max_new_tokens)
        loss = (weights.to(logp.device) * losses).sum()
        loss.backward()
        with torch.no_grad():
            logratio = logp - old_logp
            approx_kl = logratio.exp() - 1 - logratio  # k3 of KL(old || new)
            clipped = ((ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)).float()
            sums += torch.stack([loss, *(x.sum() / n_tokens for x in (approx_kl, clipped, ratio))])
    return dict(zip(UPDATE_STATS, reduce_sum(*sums), strict=True))


def main(config):
    apply_recipe(config)
    check_flags(config)
    run = Run("grpo", config)

    # Policy, reference, rewards, prompts
    model, tok = run.load()
    reference = run.load_reference(model, tok) if config.kl != "none" else None
    scorers, reward_hashes = scoring.rewards_of(config, run.device)
    if config.overlong == "punish":  # as a reward, so that it is validated as well
        scorers.append((OVERLONG, 1.0, lambda conversations, rows, samples, texts: overlong_penalty(samples, config)))
    train, val, hashes = chat.read_prompts(config, tok, model.config.context)
    rows.warn_of_no_number(train, config.reward)

    # bookkeeping: optimizer, memory, what is saved and resumed
    steps, lr = config.steps, config.lr or 3e-4 * (128 / model.config.width) ** 2
    optimizer, order = Optimizer(model, lr), index_order(len(train), config.seed)
    check_memory(run, model, optimizer, reference, tok, train)
    run.say_passes(len(train), steps, lr)
    hashes |= reward_hashes | checkpoint.fingerprints(config.reference)
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})

    for step in run.steps():
        # 1. Roll out and score: groups of completions
        completions, n_prompts = roll_out(model, tok, scorers, order, train, step, config, run.time_phase)

        # 2. Advantages: how much better each completion is than its group
        trained, groups = find_advantages(completions, config)
        run.warn_of_advantages(get_per_token(model, trained, "advantages"))

        # 3. Log-probabilities [M] before the update; a single update computes them itself
        single_update = config.epochs * config.minibatches == 1
        _, ref_logp = read_logprobs(run, step, model, reference, trained, always=not single_update)

        # 4. Update: a few passes over these completions, in minibatches
        lr_scale = wsd(step - 1, steps, warmup=int(config.warmup * steps), decay=int(config.decay * steps))
        updates, grad_norm = [], torch.zeros(())
        for minibatch in minibatches(trained, n_prompts * config.group_size, step, config):
            stats = add_gradients(model, *minibatch, config)
            if config.stop_kl and stats["approx_kl"] > config.stop_kl:
                optimizer.zero_grad()  # a loss of 0 is not enough: Adam's momentum would still move the weights
                break
            grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
            run.require_finite(step, stats["loss"], [grad_norm], [c.chat for c in trained])
            updates.append(stats)
        logp = get_per_token(model, trained, "old_logp")  # from before the update
        gap = check_sampler_matches_trainer(model, trained, logp, config)
        run.time_phase("update")

        # 5. Log, validate, save
        metrics = rollout_metrics(completions, len(trained), logp, ref_logp, **groups)
        metrics |= mean_updates(updates, UPDATE_STATS)
        metrics |= {"prompts_seen": n_prompts, "sampler_gap": gap, "lr": lr * lr_scale, "grad_norm": grad_norm.item()}
        # FLOPs: a third to sample; of what is trained --epochs, and thirds for old and ref_logp
        learning = config.epochs + (bool(reference) + (not single_update)) / 3
        passes = [1 / 3 + learning * ("advantages" in c.per_token) for c in completions]
        run.log_rollout(step, model, [c.chat for c in completions], passes, metrics)
        renewed = config.reference_every and step >= config.reference_every
        if renewed and step % config.reference_every == 0:
            reference.load_state_dict(model.state_dict())
        if run.eval_due(step):
            run.validated(step, *scoring.validate_policy(model, reference, tok, scorers, val, config, config.beta))
        run.end_step(step, model, tok, {"reference": reference} if renewed else {})


def check_memory(run, model, optimizer, reference, tok, rows):
    """The memory plan; see runtime/memory.py."""
    config, n = run.config, run.config.completions_per_step

    def loss(model, chats):
        logp = completion_logprobs(model, chats, config.temperature)
        return clip_loss(logp, logp.detach(), 1.0, [], config.clip_low, config.clip_high)[0].sum()

    frozen = {"reference": reference.config} if reference else {}
    frozen |= scoring.reward_configs(config.reward, config.monitor)
    memory.check_rollout(run, [(model, optimizer, loss)], tok, rows, n / config.minibatches, n, frozen)


if __name__ == "__main__":
    launch(main, Config)
