"""Sharpen: PPO, reinforcement learning from a learned reward, with a critic (RLHF; Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, 2203.02155).

    maximise  E_{y ~ pi(.|x)} [ r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) ]

by steps that cannot lead far from the policy that sampled (Schulman et al. 2017, 1707.06347, eq. 7):

    L = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)        ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)

A step has four phases. 1 roll out: the policy answers prompts. 2 score: the reward at the end-of-turn token, less a penalty where there is none.
3 advantages: each token's reward is -beta (log pi - log pi_ref), the last one's has the score on top; a critic V, begun as the reward model, says how much
was to be expected, and A is what came beyond it (GAE). 4 update: policy and critic learn from these answers, a few times over, in minibatches; where the
policy moves too far from the one that sampled (--target_kl), the rest is left out. Sampler and trainer are the same distribution, and that is checked.

Left out: entropy bonus, PPO-ptx, a trunk shared by policy and critic, reward whitening. The critic has an optimizer of its own, so its loss needs no weight.

    python ppo.py --init=out/sft --reward=out/rm --data=prompts.jsonl --out=out/ppo
    torchrun --nproc_per_node=8 ppo.py --init=out/sft --reward=out/rm --data=prompts.jsonl --out=out/ppo
"""
import dataclasses, time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoint, memory
from common import UserError, check, describe, launch, rank, reduce_sum, world_size
from data import chat, corpus
from data.chat import before_learnt, constant_logprobs, learnt_logprobs, pack_chats
from data.pack import share, split
from model import GPT
from optim import Optimizer, wsd
from rollout import answers, check_one_distribution, is_model, load_rewards, reward_answers, reward_hashes, reward_names, reward_shapes, validate


@dataclass
class Config:
    init: str  # checkpoint the policy starts from: a run of sft.py
    reward: str  # what to maximise, comma-separated, each with or without *WEIGHT: a reward model's directory, FILE.py:FUNCTION, or judge:DIR
    data: str  # prompts {"prompt", ...} as text or messages, or whole conversations, whose last answer is left out (see data/chat.py)
    out: str  # directory of the run
    critic: str = ""  # reward model the critic starts from; "": the first of --reward, or else --init under a head of zeros
    reference: str = ""  # checkpoint the policy is held to; "": --init
    constitution: str = ""  # for judge:DIR: a file of principles, one a line
    monitor: str = ""  # rewards that are only logged, written as --reward is
    val: str = ""  # prompts to validate on; "": hold some of --data out
    val_fraction: float = 0.05  # how many to hold out
    eval_prompts: int = 128  # of these, so many are answered at a validation
    steps: int = 0  # rounds of sampling and updating; 0: as many as use each prompt once
    batch: int = 96  # answers a step, over all ranks
    group: int = 1  # answers to each prompt among them
    minibatches: int = 2  # optimizer steps an epoch
    epochs: int = 2  # passes over the answers of a step
    micro_tokens: int = 16384  # tokens a rank holds at once: memory, not the result, depends on it
    checkpoint_activations: bool = False  # keep each block's input only, and compute the block again in the backward: less memory, more time, the same result
    max_new: int = 256  # longest answer, in tokens
    temperature: float = 1.0  # of sampling, and so of every log-probability
    beta: float = 0.05  # price of a nat of KL to the reference
    kl_target: float = 0.0  # nats an answer that beta is steered towards (Ziegler et al. 2019, arXiv 1909.08593, eq. 3); 0: beta stays
    kl_horizon: float = 2000.0  # answers over which it is steered
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    clip_ratio: float = 0.2  # how far a ratio may lead
    clip_value: float = 0.2  # how far from its old value the critic is led
    target_kl: float = 0.1  # nats a token from the policy that sampled, from which on the rest of a step is left out; 0: never
    unfinished_penalty: float = 1.0  # taken from the score of an answer without an end; 0 where the reward sees to it itself
    min_accuracy: float = 0.55  # a reward model that ordered fewer of its held-out pairs right is refused
    reward_timeout: float = 60.0  # seconds that a FUNCTION may take over one answer
    lr: float = 0.0  # peak rate of the policy's AdamW; 0: 6e-4 (128 / width)^2
    critic_lr: float = 0.0  # of the critic's; 0: twice the policy's
    warmup: float = 0.05  # first share of the steps, over which the rates rise; after that they fall to 0
    clip: float = 1.0  # largest gradient norm let through; 0: any
    skip_bad: bool = False  # leave bad lines of the data out, and count them
    seed: int = 0  # of the samples, the order of the prompts and what is held out
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    print_every: int = 1  # steps between lines on the terminal; log.jsonl has every step
    eval_every: int = 10  # steps between validations (there is one at the end); 0: none between
    save_every: int = 50  # steps between checkpoints (there is one at the end); 0: none between
    keep_last: int = 2  # checkpoints kept, besides the best
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


FREE = {"out", "resume", "overwrite", "device", "micro_tokens", "checkpoint_activations", "print_every", "eval_every", "save_every", "keep_last", "monitor", "reward_timeout"}


def check_flags(config):
    """UserError for a value that has the right type and no meaning."""
    finite = {name: 0 <= vars(config)[name] < float("inf") for name in ("beta", "kl_target", "target_kl", "unfinished_penalty", "lr", "critic_lr", "clip")}
    above = {name: 0 < vars(config)[name] < float("inf") for name in ("kl_horizon", "temperature", "clip_ratio", "clip_value", "reward_timeout")}
    count = {name: vars(config)[name] > 0 for name in ("eval_prompts", "group", "minibatches", "epochs", "max_new", "keep_last", "print_every")}
    good = {**finite, **above, **count, "val_fraction": 0 < config.val_fraction < 1, "gamma": 0 <= config.gamma <= 1, "lam": 0 <= config.lam <= 1, "warmup": 0 <= config.warmup <= 1,
            "batch": config.batch >= max(config.group, config.minibatches), "reward": bool(config.reward)}  # fmt: skip
    check(config, good)
    if config.kl_target and (not config.beta or config.batch >= 5 * config.kl_horizon):
        raise UserError(f"--kl_target={config.kl_target}: steers --beta={config.beta}, which must not be 0, over --kl_horizon={config.kl_horizon}, which must be more than a fifth of --batch={config.batch}")
    if config.batch % config.group:
        raise UserError(f"--batch={config.batch}: must be a multiple of --group={config.group}")


# ---------------------------------------------------------------------------------------------------------------------------------
# The algorithm. Of D answers of M tokens in all: what belongs to tokens is fp32 [M], answer after answer; lengths: their tokens, D of them.


def token_rewards(scores, logp, ref_logp, lengths, beta):
    """[M]: -beta (log pi - log pi_ref) at every token, and an answer's score [D] at its last. No gradient."""
    rewards = -beta * (logp - ref_logp)
    last = torch.tensor(np.cumsum(lengths) - 1, device=logp.device)
    return rewards.index_add(0, last, scores.to(rewards))


def gae(rewards, values, lengths, gamma, lam):
    """(advantages, returns): A_t = delta_t + gamma lam A_{t+1}, delta_t = R_t + gamma V_{t+1} - V_t, and A + V (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    values [M]: of the state before each token. After an answer's last token there is nothing: V = 0.
    """
    r, v = (pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))  # [D, T], 0 beyond an answer's end
    advantages, following, next_value = torch.zeros_like(r), 0.0, 0.0
    for t in reversed(range(r.shape[1])):
        following = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * following  # beyond the end all of it is 0
        advantages[:, t], next_value = following, v[:, t]
    advantages = torch.cat([a[:n] for a, n in zip(advantages, lengths)])
    return advantages, advantages + values


def whiten(x):
    """x less its mean, over its standard deviation: of all tokens of the step, on all ranks."""
    wide = x.cpu().double()  # Apple's GPUs have no fp64
    n, total, squares = reduce_sum(len(x), wide.sum(), wide.square().sum())
    variance = max(0.0, squares / n - (total / n) ** 2)
    return (x - total / n) / (variance**0.5 + 1e-8)


def policy_loss(logp, old_logp, advantages, clip_ratio):
    """(loss [M], ratio [M]): PPO's clipped objective, negated (eq. 7)."""
    ratio = torch.exp(logp - old_logp)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)), ratio


def value_loss(value, old_value, returns, clip_value):
    """[M]: half the squared error, of the value or of the value led no further than `clip_value` from the old one, whichever is larger."""
    led = old_value + (value - old_value).clamp(-clip_value, clip_value)
    return 0.5 * torch.maximum((value - returns) ** 2, (led - returns) ** 2)


def steered(beta, kl, n_answers, target, horizon):
    """The next beta: higher where KL is above the target, lower where below, at most by a fifth of n / horizon (Ziegler et al. 2019, eq. 3)."""
    return beta * (1 + min(0.2, max(-0.2, kl / target - 1)) * n_answers / horizon)


def values_before(critic, chats, center):
    """[M]: the critic's value of the state before each learnt token, read where the policy decides on it, less the reward model's `center`."""
    hidden, _ = before_learnt(critic, chats)
    return (hidden.to(critic.score.dtype) @ critic.score[0]).float() - center


@torch.no_grad()
def constant_values(critic, chats, center, micro_tokens):
    """`values_before` without a gradient, at most `micro_tokens` tokens at once."""
    critic.eval()
    return torch.cat([values_before(critic, chats[first:last], center) for first, last in split([len(c.ids) for c in chats], micro_tokens)])


def update_step(model, critic, chats, parts, n_tokens, config, center):
    """Add up the gradients of both losses over this rank's part of a minibatch of `n_tokens` answer tokens on all ranks.

    parts: for each chat (old_logp, old_value, advantages, returns). Returns this rank's share of (policy loss, value loss, KL to the policy that sampled
    as its estimator k3, share of tokens clipped, mean ratio), fp32 [5], and the largest ratio.
    """
    model.train(), critic.train()
    total, largest = torch.zeros(5, device=model.embed.device), 0.0
    for first, last in split([len(c.ids) for c in chats], config.micro_tokens):
        old_logp, old_value, advantages, returns = (torch.cat(x) for x in zip(*parts[first:last]))
        logp = learnt_logprobs(model, chats[first:last], config.temperature)
        losses, ratio = policy_loss(logp, old_logp, advantages, config.clip_ratio)
        (losses.sum() / n_tokens).backward()
        value_losses = value_loss(values_before(critic, chats[first:last], center), old_value, returns, config.clip_value)
        (value_losses.sum() / n_tokens).backward()
        with torch.no_grad():
            d = logp - old_logp
            k3 = torch.exp(d) - 1 - d  # of KL(old || new), for the old one sampled (Schulman 2020, http://joschu.net/blog/kl-approx.html)
            clipped = ((ratio - 1).abs() > config.clip_ratio).float()
            total += torch.stack([x.sum() for x in (losses, value_losses, k3, clipped, ratio)]) / n_tokens
            largest = max(largest, float(ratio.max()))
    return total, largest


# ---------------------------------------------------------------------------------------------------------------------------------
# What it starts from


def check_reward_models(config):
    """UserError where a reward model of --reward ordered too few of its held-out pairs right: what it rewards would be noise."""
    for name in [name for name, _ in reward_names(config.reward) if is_model(name)]:
        folder = checkpoint.find(name)
        info = checkpoint.read_info(folder)
        metrics = info.get("metrics", {})
        accuracy = metrics.get("figures", {}).get("accuracy", {}).get("value", metrics.get("accuracy"))
        if accuracy is None and rank() == 0:
            print(f"{name}: no accuracy on held-out pairs is on record; evaluate.py --model={name} --pairs=... tells it")
        if accuracy is not None and accuracy < config.min_accuracy:
            raise UserError(f"--reward={name}: it ordered {accuracy:.1%} of its held-out pairs right, less than --min_accuracy={config.min_accuracy}; train it on more or better pairs")


def first_critic(config, model, tok):
    """(critic, its center): the reward model of --critic or of --reward (as much of it as its weight says), or the policy's trunk under a head of zeros."""
    name, weight = next(((name, weight) for name, weight in [(config.critic, 1.0), *reward_names(config.reward)] if name and is_model(name)), ("", 1.0))
    if name:
        folder = checkpoint.find(name)
        critic = checkpoint.companion(folder, model, tok, f"--critic={name}", scalar=True)
        critic.score.data *= weight
        info = checkpoint.read_info(folder)
        return critic, info.get("center", 0.0) * weight
    critic = GPT(dataclasses.replace(model.config, scalar_head=True))
    critic.load_state_dict({name: p for name, p in model.state_dict().items() if name != "untied_head"} | {"score": torch.zeros(1, model.config.width)})
    return critic.to(model.embed.device), 0.0


def main(config):
    check_flags(config)
    run = checkpoint.Run("ppo", config, FREE)
    device = run.device

    # Policy, reference, rewards, critic, prompts
    model, tok, info = checkpoint.read(run.folder, device)
    if model.config.scalar_head:
        raise UserError(f"--init={config.init}: a reward model, which writes nothing; start from the model it was trained from")
    reference = checkpoint.companion(checkpoint.find(config.reference) if config.reference else run.origin(), model, tok, f"--reference={config.reference}")
    reference.requires_grad_(False)
    check_reward_models(config)
    rewards = load_rewards(config.reward, device, config.micro_tokens, config.constitution, config.reward_timeout, config.monitor)
    if run.resumed:
        critic, center = checkpoint.read(run.resumed / "critic", device)[0], info["critic_center"]
    else:
        critic, center = first_critic(config, model, tok)
    model.checkpoint_activations = critic.checkpoint_activations = config.checkpoint_activations
    train, val, data = chat.read_prompts(config, tok, model.config.context)
    data |= reward_hashes(config.reward, config.constitution)
    data |= {name: checkpoint.fingerprint(checkpoint.find(name)) for name in (config.reference, config.critic) if name}
    val = val[: config.eval_prompts]

    # Optimizers and the order of the prompts, and on a resume all their state
    n_prompts = config.batch // config.group
    if n_prompts < world_size():
        raise UserError(f"--batch={config.batch}: {n_prompts} prompts a step are not enough for {world_size()} ranks")
    steps = config.steps or -(-len(train) // n_prompts)
    lr = config.lr or 6e-4 * (128 / model.config.width) ** 2
    critic_lr = config.critic_lr or 2 * lr
    asked, held = [len(chat.encode_prompt(tok, messages)) for messages, _ in train], {"reference": reference.config} | reward_shapes(f"{config.reward},{config.monitor}")
    memory.check(config, device, lambda c: memory.sampled(c, device, [model.config, critic.config], asked, c.batch, c.minibatches, held), smaller="batch" if config.group == 1 else "")
    optimizer, critic_optimizer = (Optimizer(m, rate, betas=(0.9, 0.95)) for m, rate in ((model, lr), (critic, critic_lr)))
    order = corpus.Order(lambda random: (np.arange(len(train)), np.ones(len(train))), config.seed)
    if rank() == 0:
        print(f"{len(train):,} prompts; {steps} steps of {config.batch} answers; peak rates {lr:.3g} and, of the critic, {critic_lr:.3g}; on {describe(device)['hardware']}")
    if run.resumed:
        run.check_same(data)
    counters = run.begin(steps, {"": optimizer, "critic/": critic_optimizer}, data, sum(p.numel() for p in model.parameters()))
    beta, usual, warned = config.beta, None, False  # usual: (share finished, answer tokens) of the first step
    if run.resumed:
        order.begin(counters["epoch"], counters["index"])
        beta, usual, warned = counters["beta"], counters["usual"], counters.get("warned", False)

    for step in range(run.start + 1, steps + 1):
        rate = wsd(step - 1, steps, int(config.warmup * steps), steps)
        clock = [time.perf_counter()]

        # 1. Roll out, and 2. score: each rank its share of the prompts
        rows = [train[i] for i in order.batch(n_prompts)]
        begin, end = share([1] * n_prompts, rank(), world_size())
        how = dict(max_new=config.max_new, temperature=config.temperature, n=config.group, seed=config.seed * 1_000_003 + step, first=begin * config.group)
        prompts, samples, texts = answers(model, tok, [messages for messages, _ in rows[begin:end]], **how)
        clock.append(time.perf_counter())
        scores, parts = reward_answers(rewards, rows[begin:end], samples, texts)
        scores = torch.from_numpy(scores - config.unfinished_penalty * np.array([not s.finished for s in samples])).float().to(device)  # [D]
        chats = [chat.answered(prompts[s.prompt_index], s.tokens) for s in samples]
        lengths = [len(s.tokens) for s in samples]

        # 3. Advantages
        logp = constant_logprobs(model, chats, config.temperature, config.micro_tokens)  # [M]
        ref_logp = constant_logprobs(reference, chats, config.temperature, config.micro_tokens)
        gap = check_one_distribution(model, chats, samples, logp, ref_logp if step == 1 and not config.reference else None, config.temperature, config.micro_tokens, step == run.start + 1)
        old_values = constant_values(critic, chats, center, config.micro_tokens)
        advantages, returns = gae(token_rewards(scores, logp, ref_logp, lengths, beta), old_values, lengths, config.gamma, config.lam)
        advantages = whiten(advantages)
        clock.append(time.perf_counter())

        # 4. Update
        of_token = list(zip(*(x.split(lengths) for x in (logp, old_values, advantages, returns))))
        all_lengths = torch.zeros(config.batch)
        all_lengths[begin * config.group : end * config.group] = torch.tensor(lengths, dtype=torch.float32)
        all_lengths = np.array(reduce_sum(*all_lengths))
        found, largest, updates = torch.zeros(5), 0.0, 0
        for epoch in range(config.epochs):
            shuffled = np.random.default_rng([config.seed, step, epoch]).permutation(config.batch)
            for minibatch in np.array_split(shuffled, config.minibatches):
                mine = [i - begin * config.group for i in minibatch if begin * config.group <= i < end * config.group]
                total, top = update_step(model, critic, [chats[i] for i in mine], [of_token[i] for i in mine], all_lengths[minibatch].sum(), config, center)
                total, largest = torch.tensor(reduce_sum(*total)), max(largest, top)
                too_far = config.target_kl and total[2] > config.target_kl
                if too_far:  # the step itself is left out: a loss of 0 would still have moved the weights by Adam's momentum
                    optimizer.zero_grad(), critic_optimizer.zero_grad()
                    break
                norm, critic_norm = optimizer.step(rate, config.clip), critic_optimizer.step(rate, config.clip)
                if not (norm.isfinite() and critic_norm.isfinite()):
                    p, targets = pack_chats(chats)
                    checkpoint.refuse_nonfinite(run.path, step, float(total[:2].sum()), {"tokens": p.tokens, "cu": p.cu, "targets": targets, "advantages": advantages, "returns": returns})
                found, updates = found + total, updates + 1
            if too_far:
                break
        clock.append(time.perf_counter())

        # What happened, by its true names
        kl, finished, missed = (logp - ref_logp).sum(), sum(s.finished for s in samples), returns - old_values
        moments = [x for y in (missed, returns) for x in (y.sum(), y.square().sum())]
        sums = reduce_sum(len(samples), len(logp), scores.sum(), kl, finished, -logp.sum(), *moments, *(v.sum() for v in parts.values()))
        D, M, reward, kl, finished, entropy, *sums = sums
        missed, returned = (square / M - (total / M) ** 2 for total, square in (sums[:2], sums[2:4]))  # their variances
        others = sums[4:]
        policy, value, approx_kl, clipped, ratio = (found / max(1, updates)).tolist()
        tokens, *tops = reduce_sum(sum(len(c.ids) for c in chats), *(largest * (r == rank()) for r in range(world_size())))
        log = {"reward": reward / D, **{name: v / D for name, v in zip(parts, others) if len(parts) > 1}, "kl": kl / D, "loss": policy, "value_loss": value, "approx_kl": approx_kl}
        quiet = {"finished": finished / D, "answer_tokens": M / D, "clip_fraction": clipped, "ratio": ratio, "largest_ratio": max(tops), "updates": updates, "entropy": entropy / M}
        quiet |= {"explained_variance": 1 - missed / max(returned, 1e-12), "sampler_gap": gap, "beta": beta, "lr": lr * rate}
        quiet |= {f"seconds_{phase}": round(b - a, 4) for phase, a, b in zip(("rollout", "scoring", "update"), clock, clock[1:])}
        run.log.step(step, int(tokens), model.flops_per_token(int(tokens / D)) * (2 * config.epochs + 5 / 3), device, quiet, **log)
        usual = usual or [finished / D, M / D]
        if not warned and rank() == 0 and (finished / D < usual[0] - 0.2 or M / D > 2 * usual[1]):
            warned = True
            print(f"warning: {finished / D:.0%} of the answers end, after {M / D:.0f} tokens; at first it was {usual[0]:.0%} after {usual[1]:.0f}. Longer answers may be what the reward likes: look at samples.txt")
        if config.kl_target:
            beta = steered(beta, kl / D, D, config.kl_target, config.kl_horizon)

        # Validate, save
        leaving, metrics = run.stop.agreed(), {}
        if run.due(step, config.eval_every) or run.due(step, config.save_every):
            metrics, text = validate(model, reference, tok, rewards, val, config, beta, config.unfinished_penalty)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "val_loss")
            run.validated(step, metrics, f"on {len(val)} held-out prompts: {shown}")
            run.log.sample(step, f"{val[0][0][-1]['content']}\n--- answers:\n{text}")
        if run.due(step, config.save_every) or leaving:
            counters = {"epoch": order.epoch, "index": order.index, "beta": beta, "usual": usual, "warned": warned}
            state = optimizer.state() | {f"critic/{name}": t for name, t in critic_optimizer.state().items()}
            run.save(step, model, tok, state, counters, metrics, {"critic": critic}, critic_center=center)
        if leaving and step < steps:
            run.stop.leave(step)
        run.log.skip_time()


if __name__ == "__main__":
    launch(main, Config)
