"""Sharpen: GRPO, reinforcement learning without a critic: an answer is as good as it is better than the others to the same prompt.

    A_i = (r_i - mean(r)) / std(r)  over the G answers to one prompt,      L = -mean_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) + beta KL

DeepSeek's method (Shao et al. 2024, arXiv 2402.03300, eq. 3), made for rewards that a rule can check: R1 learnt to reason by it (2501.12948). Rewards are
FILE.py:FUNCTION (data/rewards.py has some), reward models, or a judge, added up with weights. A group whose answers are all worth the same teaches
nothing and is left out, also of the mean that the papers take over it; --refill samples others in its place. --recipe sets the flags as a paper has them,
and flags of your own win over it:

    deepseekmath   std, mean over each answer and then over answers, k3, one update a batch                     (2402.03300, section 4.2)
    r1             the same with a clip of 10, a small beta, minibatches, a reference renewed every 400 steps   (2501.12948, as in Nature 645, 2025)
    dr_grpo        no std and no division by length: neither favours short right nor long wrong answers         (Liu et al. 2025, 2503.20783)
    dapo           mean over all tokens, a higher upper clip, groups refilled, answers near the limit punished  (Yu et al. 2025, 2503.14476)

--kl names the estimator of d = log pi - log pi_ref that is added to the loss, by what its gradient is: k2 = d^2 / 2 has that of KL(pi || ref) on fresh samples;
k3 = e^-d - 1 + d that of KL(ref || pi), the paper's; unbiased = ratio k3 that of KL(pi || ref), also off-policy (DeepSeek-V3.2, 2512.02556). k1 = d has none.
Left out: process rewards, sequence-level ratios (GSPO), asynchronous sampling.

    python grpo.py --init=out/sft --data=problems.jsonl --reward=data/rewards.py:final_number --out=out/grpo
    torchrun --nproc_per_node=8 grpo.py --init=out/sft --data=problems.jsonl --reward=data/rewards.py:final_number --out=out/grpo
"""
import time
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint, memory
from common import UserError, check, describe, launch, rank, reduce_sum, world_size
from data import chat, corpus
from data.chat import constant_logprobs, learnt_logprobs, pack_chats
from data.pack import share, split
from optim import Optimizer, wsd
from rollout import answers, check_one_distribution, load_rewards, reward_answers, reward_hashes, reward_shapes, validate


@dataclass
class Config:
    init: str  # checkpoint the policy starts from: a run of sft.py, or of any stage after it
    data: str  # problems {"prompt" or "question", "answer", ...}, or whatever else the reward reads; prompts as text or messages (see data/chat.py)
    reward: str  # comma-separated, each with or without *WEIGHT: FILE.py:FUNCTION, a reward model's directory, or judge:DIR
    out: str  # directory of the run
    recipe: str = "ours"  # ours, deepseekmath, r1, dr_grpo or dapo: what the flags marked [recipe] are, where they are not given
    group: int = 0  # answers to each prompt [recipe]
    advantage: str = ""  # grpo (less the mean, over std), dr_grpo (less the mean) or rloo (less the mean of the others) [recipe]
    loss: str = ""  # token (mean over all tokens), sequence (over each answer's, then over answers) or constant (sum over answers and --max_new) [recipe]
    clip_low: float = -1.0  # how far below 1 a ratio may lead [recipe]
    clip_high: float = -1.0  # how far above 1 [recipe]
    kl: str = ""  # none, k2, k3 or unbiased [recipe]
    beta: float = -1.0  # price of a nat of that [recipe]
    refill: int = -1  # how often to sample new prompts in place of groups that were all worth the same [recipe]
    overlong: str = ""  # none; mask: answers without an end teach nothing; punish: up to -1 over the last --overlong_share of --max_new tokens [recipe]
    reference_every: int = -1  # steps after which the policy becomes its own reference; 0: never [recipe]
    minibatches: int = 0  # optimizer steps an epoch [recipe]
    overlong_share: float = 0.2  # of --max_new
    reference: str = ""  # checkpoint the policy is held to; "": --init
    constitution: str = ""  # for judge:DIR: a file of principles, one a line
    monitor: str = ""  # rewards that are only logged, written as --reward is
    val: str = ""  # prompts to validate on; "": hold some of --data out
    val_fraction: float = 0.05  # how many to hold out
    eval_prompts: int = 128  # of these, so many are answered at a validation
    steps: int = 100  # rounds of sampling and updating
    prompts: int = 16  # a step, over all ranks
    epochs: int = 1  # passes over the answers of a step
    micro_tokens: int = 16384  # tokens a rank holds at once: memory, not the result, depends on it
    checkpoint_activations: bool = False  # keep each block's input only, and compute the block again in the backward: less memory, more time, the same result
    max_new: int = 256  # longest answer, in tokens
    temperature: float = 1.0  # of sampling, and so of every log-probability
    target_kl: float = 0.1  # nats a token from the policy that sampled, from which on the rest of a step is left out; 0: never
    reward_timeout: float = 60.0  # seconds that a FUNCTION may take over one answer
    lr: float = 0.0  # peak rate of AdamW; 0: 3e-4 (128 / width)^2
    warmup: float = 0.05  # first share of the steps, over which the rate rises
    decay: float = 0.5  # last share of the steps, over which it falls to 0
    clip: float = 1.0  # largest gradient norm let through; 0: any
    skip_bad: bool = False  # leave bad lines of the data out, and count them
    seed: int = 0  # of the samples, the order of the prompts and what is held out
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    print_every: int = 1  # steps between lines on the terminal; log.jsonl has every step
    eval_every: int = 20  # steps between validations (there is one at the end); 0: none between
    save_every: int = 50  # steps between checkpoints (there is one at the end); 0: none between
    keep_last: int = 2  # checkpoints kept, besides the best
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


FREE = {"out", "resume", "overwrite", "device", "micro_tokens", "checkpoint_activations", "print_every", "eval_every", "save_every", "keep_last", "monitor", "reward_timeout"}
OURS = {"group": 8, "advantage": "grpo", "loss": "token", "clip_low": 0.2, "clip_high": 0.28, "kl": "none", "beta": 0.0, "refill": 0, "overlong": "none",
        "reference_every": 0, "minibatches": 1}  # fmt: skip
RECIPES = {
    "ours": OURS,
    "deepseekmath": OURS | {"group": 64, "loss": "sequence", "clip_high": 0.2, "kl": "k3", "beta": 0.04},
    "r1": OURS | {"group": 16, "loss": "sequence", "clip_low": 10.0, "clip_high": 10.0, "kl": "k3", "beta": 0.001, "reference_every": 400, "minibatches": 16},
    "dr_grpo": OURS | {"advantage": "dr_grpo", "loss": "constant", "clip_high": 0.2},
    "dapo": OURS | {"group": 16, "refill": 4, "overlong": "punish", "minibatches": 16},
}


def fill_in(config):
    """Give every flag that was left to it the recipe's value, and refuse values without meaning: UserError."""
    if config.recipe not in RECIPES:
        raise UserError(f"--recipe={config.recipe}: expected one of {', '.join(RECIPES)}")
    for name, value in RECIPES[config.recipe].items():
        if vars(config)[name] == getattr(Config, name):
            setattr(config, name, value)
    if config.kl == "k1":
        raise UserError("--kl=k1: as a loss it has the gradient 0 on average and so no effect; k2 is what you want")
    for name, known in {"advantage": ("grpo", "dr_grpo", "rloo"), "loss": ("token", "sequence", "constant"), "kl": ("none", "k2", "k3", "unbiased"), "overlong": ("none", "mask", "punish")}.items():
        if vars(config)[name] not in known:
            raise UserError(f"--{name}={vars(config)[name]}: expected one of {', '.join(known)}")
    if (config.beta > 0) != (config.kl != "none"):
        raise UserError(f"--beta={config.beta} and --kl={config.kl}: a price needs an estimator and an estimator a price (--kl=k2 --beta=0.02), or neither")
    if config.kl == "none" and (config.reference or config.reference_every):
        raise UserError("--reference and --reference_every: without --kl there is none; --kl=k2 --beta=0.001 holds the policy to it, hardly, and logs the KL")
    finite = {name: 0 <= vars(config)[name] < float("inf") for name in ("beta", "clip_low", "clip_high", "target_kl", "lr", "clip")}
    count = {name: vars(config)[name] > 0 for name in ("prompts", "steps", "epochs", "minibatches", "max_new", "eval_prompts", "keep_last", "print_every")}
    good = {**finite, **count, "group": config.group > 1, "refill": config.refill >= 0, "reference_every": config.reference_every >= 0, "temperature": 0 < config.temperature < float("inf"),
            "reward": bool(config.reward), "reward_timeout": 0 < config.reward_timeout < float("inf"), "overlong_share": 0 < config.overlong_share <= 1,
            "val_fraction": 0 < config.val_fraction < 1, "warmup": 0 <= config.warmup <= 1, "decay": 0 <= config.decay <= 1}  # fmt: skip
    check(config, good)
    if config.prompts < world_size():
        raise UserError(f"--prompts={config.prompts}: fewer than there are ranks ({world_size()})")


# ---------------------------------------------------------------------------------------------------------------------------------
# The algorithm. P groups of G answers, M tokens in all; what belongs to tokens is fp32 [M], answer after answer.


def group_advantages(rewards, kind):
    """[P, G] -> [P, G]: by how much each answer is better than its group. Exactly 0 where all of a group are worth the same.

    grpo: (r - mean) / std (2402.03300, section 4.1.2); dr_grpo: r - mean (2503.20783, eq. 4); rloo: r - mean of the other G - 1 (Ahmadian et al. 2024, 2402.14740).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    G = rewards.shape[1]
    advantages = {"grpo": lambda: centred / (rewards.std(1, keepdim=True) + 1e-4), "dr_grpo": lambda: centred, "rloo": lambda: centred * G / (G - 1)}[kind]()
    return torch.where(differs(rewards)[:, None], advantages, 0.0)  # rounding is no reason: (r - mean) / std of three equal 0.3 can be 0.7


def differs(rewards):
    """bool [P]: whether a group's rewards [P, G] are not all the same."""
    return rewards.amax(1) - rewards.amin(1) > 1e-6


def token_weights(lengths, kind, n_tokens, n_answers, max_new):
    """fp32 [M]: what each token's loss counts, so that their sum is the loss; n_tokens, n_answers: of the minibatch on all ranks.

    token: 1 / n_tokens (DAPO, eq. 8); sequence: 1 / (n_answers length) (GRPO); constant: 1 / (n_answers max_new) (Dr. GRPO).
    """
    each = {"token": lambda n: 1 / n_tokens, "sequence": lambda n: 1 / (n_answers * n), "constant": lambda n: 1 / (n_answers * max_new)}[kind]
    return torch.tensor([each(n) for n in lengths for _ in range(n)])


def policy_loss(logp, old_logp, advantages, clip_low, clip_high):
    """(loss [M], ratio [M]): the clipped objective, negated."""
    ratio = torch.exp(logp - old_logp)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(max(0.0, 1 - clip_low), 1 + clip_high)), ratio


def kl_loss(logp, ref_logp, ratio, kind):
    """[M]: the estimator that is added to the loss; the module's docstring says what the gradient of each is."""
    d = logp - ref_logp
    k3 = lambda: torch.exp(-d) - 1 + d  # noqa: E731
    return {"k2": lambda: 0.5 * d**2, "k3": k3, "unbiased": lambda: ratio * k3()}[kind]()


def overlong_penalty(length, max_new, share):
    """0 for an answer up to the last `share` of max_new tokens, from there on falling to -1 at max_new (DAPO, eq. 13)."""
    soft = share * max_new
    return -min(1.0, max(0.0, (length - (max_new - soft)) / soft))


def update_step(model, chats, parts, n_tokens, n_answers, config):
    """Add up the gradient of the loss over this rank's part of a minibatch, of `n_tokens` tokens and `n_answers` answers on all ranks.

    parts: for each chat (old_logp, advantages, ref_logp); old_logp is None where no update came between: then it is what this pass finds. Returns this rank's
    share of (loss, KL to the policy that sampled as its estimator k3, share of tokens clipped, mean ratio), fp32 [4], and the log-probabilities it found [M].
    """
    model.train()
    total, logps = torch.zeros(4, device=model.embed.device), []
    for first, last in split([len(c.ids) for c in chats], config.micro_tokens):
        logp = learnt_logprobs(model, chats[first:last], config.temperature)
        old_logp, advantages, ref_logp = (logp.detach() if x[0] is None else torch.cat(x) for x in zip(*parts[first:last]))
        losses, ratio = policy_loss(logp, old_logp, advantages, config.clip_low, config.clip_high)
        if config.kl != "none":
            losses = losses + config.beta * kl_loss(logp, ref_logp, ratio, config.kl)
        weights = token_weights([len(p[1]) for p in parts[first:last]], config.loss, n_tokens, n_answers, config.max_new).to(logp.device)
        loss = (weights * losses).sum()
        loss.backward()
        with torch.no_grad():
            d = logp - old_logp
            clipped = ((ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)).float()
            total += torch.stack([loss, *(x.sum() / n_tokens for x in (torch.exp(d) - 1 - d, clipped, ratio))])
        logps.append(logp.detach())
    return total, torch.cat(logps) if logps else total[:0]


def sample_groups(model, tok, rewards, order, train, step, config):
    """Groups of answers to `config.prompts` prompts, or to fewer where --refill does not go on until all have differences; those without are left out.

    Each rank samples its share. -> (groups, seen, sums, seconds). groups: this rank's, as (number among all prompts seen, prompt, samples, scores [G]);
    seen: prompts on all ranks; sums: over the answers of all ranks, also those left out, (number, finished, tokens, score, *rewards).
    """
    G, groups, seen, missing = config.group, [], 0, config.prompts
    sums, seconds = torch.zeros(4 + len(rewards), dtype=torch.float64), {"rollout": 0.0, "scoring": 0.0}
    for _ in range(config.refill + 1):
        rows = [train[i] for i in order.batch(missing)]
        begin, end = share([1] * missing, rank(), world_size())
        how = dict(max_new=config.max_new, temperature=config.temperature, n=G, seed=config.seed * 1_000_003 + step, first=(seen + begin) * G)
        clock = [time.perf_counter()]
        prompts, samples, texts = answers(model, tok, [messages for messages, _ in rows[begin:end]], **how)
        clock.append(time.perf_counter())
        scores, parts = reward_answers(rewards, rows[begin:end], samples, texts)
        if config.overlong == "punish":
            scores = scores + [overlong_penalty(len(s.tokens), config.max_new, config.overlong_share) for s in samples]
        clock.append(time.perf_counter())
        seconds = {phase: seconds[phase] + b - a for phase, a, b in zip(seconds, clock, clock[1:])}
        sums += torch.tensor([len(samples), sum(s.finished for s in samples), sum(len(s.tokens) for s in samples), scores.sum(), *(v.sum() for v in parts.values())])
        scores = torch.from_numpy(scores).float().view(len(prompts), G)
        groups += [(seen + begin + i, prompts[i], samples[i * G : (i + 1) * G], scores[i]) for i in differs(scores).nonzero()[:, 0].tolist()]
        seen += missing
        missing = config.prompts - int(reduce_sum(len(groups))[0])
        if not missing:
            break
    return groups, seen, reduce_sum(*sums), seconds


def positions(groups, seen):
    """Where this rank's groups stand among those of all ranks, in the order of their prompts, and how many there are: the same batch whatever the ranks."""
    there = torch.zeros(seen)
    there[[number for number, *_ in groups]] = 1
    numbers = np.flatnonzero(reduce_sum(*there))
    return np.searchsorted(numbers, [number for number, *_ in groups]), len(numbers)


def minibatches(n_answers, step, config):
    """The indices of the answers of each optimizer step, --epochs times all of them. On its own a batch keeps its order: then it is the pack it was before."""
    for epoch in range(config.epochs):
        shuffled = np.random.default_rng([config.seed, step, epoch]).permutation(n_answers)
        yield from np.array_split(shuffled, config.minibatches) if config.minibatches > 1 else [np.arange(n_answers)]


def main(config):
    fill_in(config)
    run = checkpoint.Run("grpo", config, FREE)
    device = run.device

    # Policy, reference, rewards, problems
    model, tok, _ = checkpoint.read(run.folder, device)
    if model.config.scalar_head:
        raise UserError(f"--init={config.init}: a reward model, which writes nothing; start from the model it was trained from")
    model.checkpoint_activations = config.checkpoint_activations
    reference = None
    if config.kl != "none":
        renewed = run.resumed / "reference" if run.resumed and (run.resumed / "reference").exists() else None
        reference = checkpoint.companion(renewed or (checkpoint.find(config.reference) if config.reference else run.origin()), model, tok, f"--reference={config.reference}")
        reference.requires_grad_(False)
    rewards = load_rewards(config.reward, device, config.micro_tokens, config.constitution, config.reward_timeout, config.monitor)
    held = ({"reference": reference.config} if reference else {}) | reward_shapes(f"{config.reward},{config.monitor}")
    train, val, data = chat.read_prompts(config, tok, model.config.context)
    data |= reward_hashes(config.reward, config.constitution)
    data |= {config.reference: checkpoint.fingerprint(checkpoint.find(config.reference))} if config.reference else {}
    val = val[: config.eval_prompts]

    # Optimizer and the order of the prompts, and on a resume all their state
    steps = config.steps
    asked = [len(chat.encode_prompt(tok, messages)) for messages, _ in train]
    memory.check(config, device, lambda c: memory.sampled(c, device, [model.config], asked, c.prompts * c.group, c.minibatches, held), smaller="prompts")
    lr = config.lr or 3e-4 * (128 / model.config.width) ** 2
    optimizer = Optimizer(model, lr, betas=(0.9, 0.95))
    order = corpus.Order(lambda random: (np.arange(len(train)), np.ones(len(train))), config.seed)
    if rank() == 0:
        flags = ", ".join(f"{name} {vars(config)[name]}" for name in OURS)
        print(f"{len(train):,} prompts; {steps} steps of {config.prompts} x {config.group} answers; {flags}; peak rate {lr:.3g}; on {describe(device)['hardware']}")
    if run.resumed:
        run.check_same(data)
    counters = run.begin(steps, {"": optimizer}, data, sum(p.numel() for p in model.parameters()))
    usual, warned = None, False  # usual: (share finished, answer tokens) of the first step
    if run.resumed:
        order.begin(counters["epoch"], counters["index"])
        usual, warned = counters["usual"], counters.get("warned", False)

    for step in range(run.start + 1, steps + 1):
        rate = wsd(step - 1, steps, int(config.warmup * steps), int(config.decay * steps))

        # 1. Roll out and score
        groups, seen, sums, seconds = sample_groups(model, tok, rewards, order, train, step, config)
        at, n_groups = positions(groups, seen)
        clock = time.perf_counter()

        # 2. Advantages
        advantages = group_advantages(torch.stack([g[3] for g in groups]), config.advantage) if groups else torch.zeros(0, config.group)
        own = [(i * config.group + k, prompt, s, float(a)) for i, (_, prompt, samples, _), row in zip(at, groups, advantages) for k, (s, a) in enumerate(zip(samples, row))]
        own = [(i, prompt, s, a) for i, prompt, s, a in own if s.finished or config.overlong != "mask"]
        chats, samples = [chat.answered(prompt, s.tokens) for _, prompt, s, _ in own], [s for _, _, s, _ in own]
        lengths = np.zeros(n_groups * config.group)  # of all ranks' answers; 0 where one teaches nothing
        lengths[[i for i, *_ in own]] = [len(s.tokens) for s in samples]
        lengths = np.array(reduce_sum(*lengths))
        cut = [len(s.tokens) for s in samples]
        ref_logp = constant_logprobs(reference, chats, config.temperature, config.micro_tokens) if reference else torch.zeros(sum(cut), device=device)  # [M]
        # Of a batch that is updated once, the update's own pass has the old log-probabilities. The first step of a process checks that this is true.
        once = config.epochs * config.minibatches == 1 and step > run.start + 1
        if not once:
            logp = constant_logprobs(model, chats, config.temperature, config.micro_tokens)
            own_reference = ref_logp if reference and step == 1 and not config.reference else None
            gap = check_one_distribution(model, chats, samples, logp, own_reference, config.temperature, config.micro_tokens, step == run.start + 1)
        old = [None] * len(cut) if once else logp.split(cut)
        of_token = dict(zip((i for i, *_ in own), zip(old, (torch.full((n,), a, device=device) for n, (*_, a) in zip(cut, own)), ref_logp.split(cut))))
        of_answer = dict(zip((i for i, *_ in own), chats))

        # 3. Update
        found, updates, norm, logps = torch.zeros(4), 0, torch.zeros(()), torch.zeros(0, device=device)
        for minibatch in minibatches(len(lengths), step, config):
            mine = [i for i in minibatch if i in of_answer]
            n_tokens, n_answers = lengths[minibatch].sum(), np.count_nonzero(lengths[minibatch])
            if not n_tokens:
                continue
            total, logps = update_step(model, [of_answer[i] for i in mine], [of_token[i] for i in mine], n_tokens, n_answers, config)
            total = torch.tensor(reduce_sum(*total))
            if config.target_kl and total[1] > config.target_kl:  # the step itself is left out: a loss of 0 would still have moved the weights by Adam's momentum
                optimizer.zero_grad()
                break
            norm = optimizer.step(rate, config.clip)
            if not norm.isfinite():
                p, targets = pack_chats(chats)
                checkpoint.refuse_nonfinite(run.path, step, float(total[0]), {"tokens": p.tokens, "cu": p.cu, "targets": targets})
            found, updates = found + total, updates + 1
        if once:
            logp = logps
            gap = check_one_distribution(model, chats, samples, logp, None, config.temperature, config.micro_tokens, repeat=False)
        seconds["update"] = time.perf_counter() - clock

        # What happened
        n, finished, tokens, score, *others = sums
        kl, entropy, M, trained = reduce_sum((logp - ref_logp).sum() if reference else 0.0, -logp.sum(), len(logp), sum(len(c.ids) for c in chats))
        loss, approx_kl, clipped, ratio = (found / max(1, updates)).tolist()
        shown = {"reward": score / n, **{name: v / n for (name, *_), v in zip(rewards, others) if len(rewards) > 1 or config.overlong == "punish"}, "same": 1 - n_groups / seen}
        shown |= ({"kl": kl / max(1, np.count_nonzero(lengths))} if reference else {}) | {"answer_tokens": tokens / n, "loss": loss}
        quiet = {"finished": finished / n, "prompts_seen": seen, "approx_kl": approx_kl, "clip_fraction": clipped, "ratio": ratio, "updates": updates, "entropy": entropy / max(1, M)}
        quiet |= {"sampler_gap": gap, "lr": lr * rate, "grad_norm": norm.item(), **{f"seconds_{phase}": round(s, 4) for phase, s in seconds.items()}}
        run.log.step(step, int(trained), model.flops_per_token(int(trained / max(1, len(lengths)))) * (config.epochs + 2 / 3), device, quiet, **shown)
        usual = usual or [finished / n, tokens / n]
        if not warned and rank() == 0 and (finished / n < usual[0] - 0.2 or tokens / n > 2 * usual[1]):
            warned = True
            print(f"warning: {finished / n:.0%} of the answers end, after {tokens / n:.0f} tokens; at first it was {usual[0]:.0%} after {usual[1]:.0f}. Look at samples.txt; --overlong=punish, a larger --max_new or a reward for brevity may help")
        if reference and config.reference_every and step % config.reference_every == 0:
            reference.load_state_dict(model.state_dict())

        # 4. Validate, save
        leaving, metrics = run.stop.agreed(), {}
        if run.due(step, config.eval_every) or run.due(step, config.save_every):
            metrics, said = validate(model, reference, tok, rewards, val, config, config.beta)
            run.validated(step, metrics, f"on {len(val)} held-out prompts: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "val_loss"))
            run.log.sample(step, f"{val[0][0][-1]['content']}\n--- answers:\n{said}")
        if run.due(step, config.save_every) or leaving:
            beside = {"reference": reference} if reference and config.reference_every and step >= config.reference_every else {}
            run.save(step, model, tok, optimizer.state(), {"epoch": order.epoch, "index": order.index, "usual": usual, "warned": warned}, metrics, beside)
        if leaving and step < steps:
            run.stop.leave(step)
        run.log.skip_time()


if __name__ == "__main__":
    launch(main, Config)
