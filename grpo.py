"""Sharpen: GRPO, reinforcement learning without a critic: a completion is as good as it is better
than the others of the same prompt.

    A_i = (r_i - mean(r)) / std(r)        over the G completions of one prompt
    L   = -mean_t min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A)
    ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)

DeepSeek's method (Shao et al. 2024, arXiv 2402.03300, eq. 3), made for rewards that a rule can
check (data/rules.py): R1 learned to reason by it (2501.12948). A group whose completions are all
worth the same teaches nothing and is left out, also of the mean that the papers take over it;
--refill samples others in its place. L is the default recipe's. --recipe sets the flags marked
(recipe) as a paper has them, unless they are given:

    deepseekmath  + beta k3; mean over each completion, then over completions; one update per step
                  (2402.03300, section 4.2)
    r1            the same with a clip of 10, a small beta, minibatches, and a reference that is
                  renewed every 400 steps (2501.12948, as in Nature 645, 2025)
    dr_grpo       no std and no division by length: neither favours short right nor long wrong
                  completions (Liu et al. 2025, 2503.20783)
    dapo          as above, with minibatches, refilled groups, and a penalty near the limit of
                  length (Yu et al. 2025, 2503.14476)

--kl names the estimator that is added to the loss, times --beta, by what its gradient is. With
d = log pi - log pi_ref, k2 = d^2 / 2 has that of KL(pi || ref) on fresh samples; k3 = e^-d - 1 + d,
the paper's, that of KL(ref || pi); unbiased = ratio k3 that of KL(pi || ref), off-policy too
(DeepSeek-V3.2, 2512.02556). k1 = d has none. Left out: process rewards, sequence-level ratios
(GSPO), asynchronous sampling.

    python grpo.py --init=out/sft --data=sums.jsonl --reward=data/rules.py:final_number --out=out/rl
"""

from dataclasses import dataclass

import numpy as np
import torch

import scoring
from data import chat
from data.pack import Chat, make_completion, rank_span, token_slices
from model import completion_logprobs, logprobs_no_grad
from optim import Optimizer, wsd
from rollout import Sample, check_sampler_matches_trainer, sample_completions
from runtime import checkpoint, memory
from runtime.batches import index_order
from runtime.cli import print0
from runtime.errors import UserError
from runtime.process import launch, rank, reduce_sum, world_size
from runtime.run import RolloutConfig, Run

DEFAULT_RECIPE = {"group_size": 8, "advantage": "grpo", "loss_aggregation": "token", "clip_low": 0.2, "clip_high": 0.28}
DEFAULT_RECIPE |= {"kl": "none", "beta": 0.0, "refill": 0, "overlong": "none", "reference_every": 0, "minibatches": 1}
RECIPES = {  # what differs from the default
    "default": {},
    "deepseekmath": {"group_size": 64, "loss_aggregation": "sequence", "clip_high": 0.2, "kl": "k3", "beta": 0.04},
    "r1": {
        **{"group_size": 16, "loss_aggregation": "sequence", "clip_low": 10.0, "clip_high": 10.0, "kl": "k3"},
        **{"beta": 0.001, "reference_every": 400, "minibatches": 16},
    },
    "dr_grpo": {"advantage": "dr_grpo", "loss_aggregation": "constant", "clip_high": 0.2},
    "dapo": {"group_size": 16, "refill": 4, "overlong": "punish", "minibatches": 16},
}


@dataclass(kw_only=True)
class Config(RolloutConfig):
    # -- What you will set --
    # default, deepseekmath, r1, dr_grpo or dapo: the values of flags marked (recipe) if left out
    recipe: str = "default"
    # -- What you may set --
    # rounds of sampling and updating [>= 1]
    steps: int = 100
    # (recipe) completions of each prompt [>= 2]
    group_size: int = 0
    # (recipe) reward minus the group's mean, over its std (grpo), minus the mean (dr_grpo), or
    # minus the mean of the others (rloo) [one of grpo, dr_grpo, rloo]
    advantage: str = ""
    # (recipe) mean over all tokens, over each completion's first (sequence), or the sum over
    # completions x --max_new_tokens (constant) [one of token, sequence, constant]
    loss_aggregation: str = ""
    # (recipe) how far below 1 a ratio still has a gradient [>= 0]
    clip_low: float = -1.0
    # (recipe) how far above 1 [>= 0]
    clip_high: float = -1.0
    # (recipe) estimator of the KL to the reference [one of none, k2, k3, unbiased]
    kl: str = ""
    # (recipe) KL coefficient: the price of moving away from the reference [>= 0]
    beta: float = -1.0
    # (recipe) how often to sample other prompts in place of groups that are all worth the same
    refill: int = -1
    # (recipe) mask: completions without an end teach nothing; punish: up to -1 over the last
    # --overlong_share of --max_new_tokens [one of none, mask, punish]
    overlong: str = ""
    # (recipe) steps after which the policy becomes its own reference; 0: never
    reference_every: int = -1
    # (recipe) optimizer steps per epoch [>= 1]
    minibatches: int = 0
    # -- What you will rarely set --
    # passes over the completions of a step [>= 1]
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
    flags = ", ".join(f"{name} {vars(config)[name]}" for name in DEFAULT_RECIPE)
    print0(f"recipe {config.recipe}: {flags}")


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


# --------------------------------------------------------------------------------------------------
# The algorithm. P groups of G completions of M trained tokens in all; what belongs to tokens is
# fp32 [M], completion after completion.


def group_advantages(rewards, kind):
    """[P, G] -> [P, G]: by how much each completion is better than its group; 0 if all are worth
    the same.

    grpo: (r - mean) / std (2402.03300, section 4.1.2); dr_grpo: r - mean (2503.20783, eq. 4); rloo:
    r - mean of the other G - 1 (Ahmadian et al. 2024, 2402.14740).
    """
    G = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    elif kind == "rloo":
        advantages = advantages * G / (G - 1)
    # Rounding is no reason to learn: (r - mean) / std of three equal 0.3 can be 0.7
    return torch.where(differs(rewards)[:, None], advantages, 0.0)


def differs(rewards):
    """bool [P]: whether a group's rewards [P, G] are not all the same."""
    return rewards.amax(1) - rewards.amin(1) > 1e-6


def token_weights(lengths, kind, n_tokens, n_completions, max_new_tokens):
    """fp32 [M]: the weight of each token's loss, so that their sum is the loss.

    token: 1 / n_tokens (DAPO, eq. 8); sequence: 1 / (n_completions length) (GRPO); constant: 1 /
    (n_completions max_new_tokens) (Dr. GRPO). Both n are of the minibatch, on all ranks.
    """
    if kind == "token":
        weights = [1 / n_tokens for _ in lengths]
    elif kind == "sequence":
        weights = [1 / (n_completions * length) for length in lengths]
    else:
        weights = [1 / (n_completions * max_new_tokens) for _ in lengths]
    return torch.from_numpy(np.repeat(weights, lengths)).float()


def policy_loss(logp, old_logp, advantages, clip_low, clip_high):
    """(loss [M], ratio [M]): the clipped objective, negated."""
    ratio = torch.exp(logp - old_logp)
    clipped_ratio = ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio), ratio


def kl_loss(logp, ref_logp, ratio, kind):
    """[M]: an estimator of the KL to the reference; the module's docstring has their gradients."""
    logratio = logp - ref_logp
    if kind == "k2":
        return 0.5 * logratio**2
    k3 = torch.exp(-logratio) - 1 + logratio
    return ratio * k3 if kind == "unbiased" else k3


def overlong_penalty(length, max_new_tokens, share):
    """0 up to the last `share` of max_new_tokens; from there it falls to -1 (DAPO, eq. 13)."""
    soft = share * max_new_tokens
    return -min(1.0, max(0.0, (length - (max_new_tokens - soft)) / soft))


# --------------------------------------------------------------------------------------------------
# One step


@dataclass
class Completion:
    index: int  # among the completions of all ranks in this step; those of a group are neighbours
    chat: Chat
    sample: Sample
    score: float
    parts: dict  # {reward: what it says}
    advantage: float = 0.0
    old_logp: torch.Tensor = None  # fp32, of its trained tokens; None: the update's own pass finds it
    ref_logp: torch.Tensor = None

    @property
    def n_tokens(self):  # those that are trained
        return int(self.chat.loss_mask.sum())


def roll_out(model, tok, rewards, order, train, step, config, time_phase):
    """([Completion], n_prompts): this rank's completions, and how many prompts all ranks saw.

    That is --prompts_per_step, and with --refill more, until so many groups have differences.
    """
    G, completions, n_prompts, missing = config.group_size, [], 0, config.prompts_per_step
    for _ in range(config.refill + 1):
        rows = [train[i] for i in order.batch(missing)]
        begin, end = rank_span([1] * missing, rank(), world_size())
        rows, first = rows[begin:end], (n_prompts + begin) * G
        sampling = {"n": G, "seed": config.seed * 1_000_003 + step, "first": first}
        sampling |= {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        prompts, samples, texts = sample_completions(model, tok, [messages for messages, _ in rows], **sampling)
        time_phase("rollout")
        scores, parts = scoring.score_completions(rewards, rows, samples, texts)
        for i, s in enumerate(samples):
            if config.overlong == "punish":
                scores[i] += overlong_penalty(len(s.tokens), config.max_new_tokens, config.overlong_share)
            document = make_completion(prompts[s.prompt_index], s.tokens, s.loss_mask)
            said = {name: values[i] for name, values in parts.items()}
            completions.append(Completion(first + i, document, s, scores[i], said))
        time_phase("scoring")
        n_prompts += missing
        missing -= int(reduce_sum(differs(torch.from_numpy(scores).float().view(-1, G)).sum())[0])
        if not missing:
            break
    return completions, n_prompts


def find_advantages(completions, n_prompts, config):
    """(trained, batch, lengths): this rank's completions that teach, with their advantages; the
    indices of the completions of all ranks; and the trained tokens of each index.

    Groups without a difference are left out. With --overlong=mask a completion without an end has 0
    tokens, so that it teaches nothing.
    """
    scores = torch.tensor([c.score for c in completions], dtype=torch.float32).view(-1, config.group_size)
    advantages = group_advantages(scores, config.advantage).flatten().tolist()
    differ = differs(scores).repeat_interleave(config.group_size).tolist()
    in_batch, lengths = np.zeros((2, n_prompts * config.group_size))
    trained = []
    for c, advantage, teaches in zip(completions, advantages, differ, strict=True):
        in_batch[c.index], c.advantage = teaches, advantage
        if teaches and (c.sample.finished or config.overlong != "mask"):
            lengths[c.index] = c.n_tokens
            trained.append(c)
    in_batch, lengths = np.split(np.array(reduce_sum(*in_batch, *lengths)), 2)
    return trained, np.flatnonzero(in_batch), lengths


def set_logprobs(completions, name, logp):
    """Give each completion its part of logp, fp32 [M], as its old_logp or ref_logp."""
    for c, own in zip(completions, logp.split([c.n_tokens for c in completions]), strict=True):
        setattr(c, name, own)


def minibatches(trained, batch, lengths, step, config):
    """Yield (this rank's completions, number of trained tokens and of completions that teach on all
    ranks) of each optimizer step: --epochs times the whole batch, shuffled.

    An undivided batch keeps its order, and so is the very pack that was read before.
    """
    by_index = {c.index: c for c in trained}
    for epoch in range(config.epochs):
        shuffled = np.random.default_rng([config.seed, step, epoch]).permutation(batch)
        for indices in np.array_split(shuffled, config.minibatches) if config.minibatches > 1 else [batch]:
            n_completions = np.count_nonzero(lengths[indices])
            if n_completions:
                yield [by_index[i] for i in indices if i in by_index], lengths[indices].sum(), n_completions


UPDATE_STATS = ("loss", "approx_kl", "clip_fraction", "ratio")


def update_step(model, completions, n_tokens, n_completions, config):
    """Add up the gradient of the loss over this rank's part of a minibatch, which has `n_tokens`
    tokens in `n_completions` completions on all ranks. Returns {name: mean over all ranks}.

    A completion without old_logp gets what this pass finds.
    """
    model.train()
    sums = torch.zeros(4, device=model.embed.device)
    for part in token_slices([len(c.chat.ids) for c in completions], config.micro_batch_tokens):
        micro_batch = completions[part]
        logp = completion_logprobs(model, [c.chat for c in micro_batch], config.temperature)
        if micro_batch[0].old_logp is None:
            set_logprobs(micro_batch, "old_logp", logp.detach())
        old_logp = torch.cat([c.old_logp for c in micro_batch])
        lengths = [c.n_tokens for c in micro_batch]
        advantages = torch.from_numpy(np.repeat([c.advantage for c in micro_batch], lengths)).to(logp)
        losses, ratio = policy_loss(logp, old_logp, advantages, config.clip_low, config.clip_high)
        if config.kl != "none":
            ref_logp = torch.cat([c.ref_logp for c in micro_batch])
            losses = losses + config.beta * kl_loss(logp, ref_logp, ratio, config.kl)
        weights = token_weights(lengths, config.loss_aggregation, n_tokens, n_completions, config.max_new_tokens)
        loss = (weights.to(logp.device) * losses).sum()
        loss.backward()
        with torch.no_grad():
            approx_kl = ratio - 1 - (logp - old_logp)  # k3 of KL(old || new)
            clipped = ((ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)).float()
            sums += torch.stack([loss, *(x.sum() / n_tokens for x in (approx_kl, clipped, ratio))])
    return dict(zip(UPDATE_STATS, reduce_sum(*sums), strict=True))


def load_reference(run, model, tok):
    """The policy that the KL is measured from, as the run last renewed it; None without --kl."""
    if run.config.kl == "none":
        return None
    if run.resumed and (run.resumed / "reference").exists():
        return checkpoint.load_matching(run.resumed / "reference", model, tok, "--resume")
    return run.load_reference(model, tok)


def main(config):
    apply_recipe(config)
    check_flags(config)
    run = Run("grpo", config)

    # Policy, reference, rewards, prompts
    model, tok = run.load()
    reference = load_reference(run, model, tok)
    options = config.constitution, config.reward_timeout, config.monitor
    rewards = scoring.load_rewards(config.reward, run.device, config.micro_batch_tokens, *options)
    train, val, hashes = chat.read_prompts(config, tok, model.config.context)

    # bookkeeping: optimizer, memory, what is saved and resumed
    steps, lr = config.steps, config.lr or 3e-4 * (128 / model.config.width) ** 2
    optimizer = Optimizer(model, lr, betas=(0.9, 0.95))
    order = index_order(len(train), config.seed)
    check_memory(run, model, optimizer, reference, tok, train)
    print0(f"{len(train):,} prompts; {steps} steps of {config.prompts_per_step}; peak lr {lr:.3g}")
    hashes |= scoring.reward_hashes(config.reward, config.constitution) | checkpoint.fingerprints(config.reference)
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})

    for step in run.steps():
        # 1. Roll out and score: groups of completions
        completions, n_prompts = roll_out(model, tok, rewards, order, train, step, config, run.time_phase)

        # 2. Advantages: how much better each completion is than its group
        trained, batch, lengths = find_advantages(completions, n_prompts, config)
        chats, samples = [c.chat for c in trained], [c.sample for c in trained]
        limits = config.temperature, config.micro_batch_tokens
        ref_logp = logprobs_no_grad(reference, chats, *limits) if reference else None  # [M]
        if reference:
            set_logprobs(trained, "ref_logp", ref_logp)
        # A single update finds the old log-probabilities in its own pass. The first step of a
        # process checks that this is true.
        updated_once = config.epochs * config.minibatches == 1 and step > run.start + 1
        if not updated_once:
            logp = logprobs_no_grad(model, chats, *limits)  # [M]
            set_logprobs(trained, "old_logp", logp)
            same_logp = ref_logp if step == 1 and not config.reference else None  # the KL must be 0 at first
            repeat = step == run.start + 1
            gap = check_sampler_matches_trainer(model, chats, samples, logp, same_logp, *limits, repeat)

        # 3. Update: a few passes over these completions, in minibatches
        lr_scale = wsd(step - 1, steps, int(config.warmup * steps), int(config.decay * steps))
        updates, grad_norm = [], torch.zeros(())
        for minibatch in minibatches(trained, batch, lengths, step, config):
            stats = update_step(model, *minibatch, config)
            if config.stop_kl and stats["approx_kl"] > config.stop_kl:
                optimizer.zero_grad()  # a loss of 0 would not do: Adam's momentum would still move the weights
                break
            grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
            run.require_finite(step, stats["loss"], [grad_norm], chats)
            updates.append(stats)
        if updated_once:
            logp = torch.cat([torch.zeros(0, device=run.device), *(c.old_logp for c in trained)])
            gap = check_sampler_matches_trainer(model, chats, samples, logp, None, *limits, False)
        run.time_phase("update")

        # 4. Log, validate, save
        printed, log_only = step_metrics(completions, n_prompts, batch, lengths, logp, ref_logp, updates, config)
        log_only |= {"sampler_gap": gap, "lr": lr * lr_scale, "grad_norm": grad_norm.item()}
        run.log_rollout(step, model, chats, config.epochs + 2 / 3, log_only, **printed)
        if config.reference_every and step % config.reference_every == 0:
            reference.load_state_dict(model.state_dict())
        if run.eval_due(step):
            judged = rewards, val[: config.eval_prompts], config, config.beta
            metrics, text = scoring.validate_policy(model, reference, tok, *judged)
            run.validated(step, metrics)
            run.sample(step, f"{val[0][0][-1]['content']}\n--- completion:\n{text}")
        renewed = config.reference_every and step >= config.reference_every
        run.end_step(step, model, tok, {"reference": reference} if renewed else {})


def step_metrics(completions, n_prompts, batch, lengths, logp, ref_logp, updates, config):
    """(printed, log_only): what a step logs, over all ranks. updates: what update_step returned."""
    samples, rewards = [c.sample for c in completions], completions[0].parts
    sums = {"reward": sum(c.score for c in completions)}
    if len(rewards) > 1 or config.overlong == "punish":
        sums |= {name: sum(c.parts[name] for c in completions) for name in rewards}
    finished, tokens = sum(s.finished for s in samples), sum(len(s.tokens) for s in samples)
    kl = 0.0 if ref_logp is None else (logp - ref_logp).sum()
    n, finished, tokens, M, entropy, kl, *totals = reduce_sum(
        len(samples), finished, tokens, len(logp), -logp.sum(), kl, *sums.values()
    )
    printed = {name: total / n for name, total in zip(sums, totals, strict=True)}
    printed["zero_variance"] = 1 - len(batch) / n
    if ref_logp is not None:
        printed["kl"] = kl / max(1, np.count_nonzero(lengths))
    log_only = {"finished": finished / n, "completion_tokens": tokens / n, "entropy": entropy / max(1, M)}
    log_only |= {"prompts_seen": n_prompts, "updates": len(updates)}
    for name in UPDATE_STATS:
        log_only[name] = sum(stats[name] for stats in updates) / max(1, len(updates))
    return printed | {"loss": log_only.pop("loss")}, log_only


def check_memory(run, model, optimizer, reference, tok, rows):
    """The memory plan; see runtime/memory.py."""
    config = run.config

    def loss(model, chats):
        logp = completion_logprobs(model, chats, config.temperature)
        return policy_loss(logp, logp.detach(), 1.0, config.clip_low, config.clip_high)[0].sum()

    frozen = {"reference": reference.config} if reference else {}
    frozen |= scoring.reward_configs(f"{config.reward},{config.monitor}")
    n = config.prompts_per_step * config.group_size
    memory.check_rollout(run, [(model, optimizer, loss)], tok, rows, n / config.minibatches, n, frozen)


if __name__ == "__main__":
    launch(main, Config)
