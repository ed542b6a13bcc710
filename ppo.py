"""Sharpen: PPO, reinforcement learning from a learned reward, with a critic (RLHF; Stiennon et al.
2020, arXiv 2009.01325; Ouyang et al. 2022, 2203.02155).

    maximise  E_{y ~ pi(.|x)} [ r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) ]

by steps that stay near the policy that sampled (Schulman et al. 2017, 1707.06347, eq. 7):

    L = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)
    ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)

1 roll out: the policy completes prompts. 2 score: what the reward says of each completion, minus a
penalty if the completion never ended. 3 advantages: each token's reward is -beta (log pi - log
pi_ref), and the last token's also includes the score; a critic V predicts the rewards still to
come, and the advantage is how far the outcome exceeds that (GAE), whitened over the batch. The KL
has no gradient of its own: it acts through the advantages. V starts as the first reward model of
--reward, whose output on a finished completion is its score. 4 update: both learn from these
completions, a few times over, until the policy has moved too far from the one that sampled
(--stop_kl); then both stop. 5 log, validate, adapt beta, save.

The sampler's log-probabilities must equal the trainer's; every step checks that.

A reward model's checkpoint records its mean score, which is subtracted from its scores. `center` is
that of the model the critic starts from, and is subtracted from values: both have the same zero.

Left out: entropy bonus, PPO-ptx, a trunk shared by policy and critic, scaling of rewards.

    python ppo.py --init=out/sft --reward=out/rm --data=prompts.jsonl --out=out/ppo
    torchrun --nproc_per_node=8 ppo.py ...    # the same on eight GPUs
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import scoring
from data import chat
from data.pack import token_slices
from model import completion_logprobs, state_values, values_no_grad
from optim import Optimizer, wsd
from rollout import check_sampler_matches_trainer, complete_rows, get_per_token, read_logprobs, set_per_token
from runtime import checkpoint, memory
from runtime.batches import index_order, minibatches
from runtime.cli import refuse_unread
from runtime.errors import UserError
from runtime.process import launch, reduce_max, reduce_sum
from runtime.run import RolloutConfig, Run, mean_updates, rollout_metrics


@dataclass(kw_only=True)
class Config(RolloutConfig):
    # -- What you may set --
    prompts_per_step: int = 96
    # rounds of sampling and updating; 0: enough for one pass over the prompts
    steps: int = 0
    # KL coefficient: the price of moving away from the reference [>= 0]
    beta: float = 0.05
    # KL to the reference per completion that beta is adapted to hold; 0: beta stays [>= 0]
    adaptive_kl: float = 0.0
    # peak learning rate of the critic; 0: twice the policy's [>= 0]
    critic_lr: float = 0.0
    # reward model the critic starts from; "": the first of --reward that is one, else --init with a
    # scalar head of zeros
    critic: str = ""
    # -- What you will rarely set --
    # passes over the completions of a step [>= 1; <= 10000]
    epochs: int = 2
    # optimizer steps per epoch [>= 1]
    minibatches: int = 2
    # completions over which beta is adapted [> 0]
    adaptive_kl_horizon: float = 2000.0
    # discount [>= 0; <= 1]
    gamma: float = 1.0
    # GAE's lambda [>= 0; <= 1]
    lam: float = 0.95
    # beyond this distance from 1 a ratio gains nothing by moving on as the advantage says [> 0]
    clip_ratio: float = 0.2
    # beyond this distance from its old one a value gains nothing by moving on [> 0]
    clip_value: float = 0.2
    # subtracted from the score of an unfinished completion [>= 0]
    unfinished_penalty: float = 1.0
    # a reward model with a lower accuracy on held-out pairs is refused [>= 0; <= 1]
    min_accuracy: float = 0.55
    eval_every: int = 10


def check_flags(config):
    """Raises UserError for flags that do not go together."""
    n = config.completions_per_step
    if not config.reward:
        raise UserError("--reward: name what to maximise")
    if n < config.minibatches:
        raise UserError(f"--minibatches={config.minibatches}: more than the {n} completions of a step")
    if not config.adaptive_kl:
        refuse_unread(config, {"adaptive_kl_horizon": "only --adaptive_kl reads it"})
    if config.adaptive_kl and (not config.beta or n >= 5 * config.adaptive_kl_horizon):
        raise UserError(
            f"--adaptive_kl={config.adaptive_kl}: it adapts --beta={config.beta}, which must not be 0, over "
            f"--adaptive_kl_horizon={config.adaptive_kl_horizon}, which must be more than a fifth of a step's {n} "
            "completions"
        )


# --------------------------------------------------------------------------------------------------
# The algorithm. Tensors are fp32 [M], one number per token of this rank's D completions, which lie
# one after another. lengths [D]: the tokens of each completion.


def token_rewards(scores, logp, ref_logp, lengths, beta):
    """[M]: -beta (log pi - log pi_ref) per token, plus the score [D] at each completion's last.

    No gradient flows through it: the KL is part of the reward, and so of the advantages.
    """
    rewards = -beta * (logp - ref_logp)
    last = torch.tensor(np.cumsum(lengths) - 1, device=logp.device)
    return rewards.index_add(0, last, torch.as_tensor(scores).to(rewards))


def gae(rewards, values, lengths, gamma, lam):
    """(advantages, returns), [M] each (Schulman et al. 2016, arXiv 1506.02438, eq. 16):

        A_t = delta_t + gamma lam A_{t+1};   delta_t = r_t + gamma V_{t+1} - V_t;   returns = A + V

    values [M]: of the state before each token. V is 0 after a completion's last token."""
    r = pad_sequence(rewards.split(lengths), batch_first=True)  # [D, T], 0 beyond a completion's end
    v = pad_sequence(values.split(lengths), batch_first=True)
    advantages, next_advantage, next_value = torch.zeros_like(r), 0.0, 0.0
    for t in reversed(range(r.shape[1])):  # beyond the end all of it is 0
        delta = r[:, t] + gamma * next_value - v[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t], next_value = next_advantage, v[:, t]
    advantages = torch.cat([a[:n] for a, n in zip(advantages, lengths, strict=True)])
    return advantages, advantages + values


def mean_and_variance(x):
    """(mean, variance) of x over the tokens of all ranks; a variance under 1e-12 mean^2 counts as
    that, since fp32 rounds as much."""
    wide = x.cpu().double()  # Apple's GPUs have no fp64
    n, total, squares = reduce_sum(len(x), wide.sum(), wide.square().sum())
    mean = total / n
    return mean, max(1e-12 * mean**2, squares / n - mean**2)


def whiten(x):
    """x minus its mean, divided by its standard deviation."""
    mean, variance = mean_and_variance(x)
    return (x - mean) / (variance**0.5 or 1)


def explained_variance(values, returns):
    """The share of the returns' variance that the critic predicted. 1: perfect; 0: no better than
    a constant."""
    error, variance = mean_and_variance(returns - values)[1], mean_and_variance(returns)[1]
    return 1 - error / (variance or error or 1)


def policy_loss(logp, old_logp, advantages, clip_ratio):
    """(loss [M], ratio [M]): PPO's clipped objective, negated (eq. 7)."""
    ratio = torch.exp(logp - old_logp)
    clipped_ratio = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio), ratio


def value_loss(value, old_value, returns, clip_value):
    """[M]: half the squared error of the value, or of the value moved at most `clip_value` from the
    old one, whichever is larger."""
    clipped_value = old_value + (value - old_value).clamp(-clip_value, clip_value)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped_value - returns) ** 2)


class Beta:
    """The KL coefficient: --beta, adapted so that the KL stays near --adaptive_kl, if that is
    given."""

    def __init__(self, config):
        self.value, self.target, self.horizon = config.beta, config.adaptive_kl, config.adaptive_kl_horizon

    def update(self, kl, n):
        """Adapt beta after n completions with this mean KL; 1 / horizon is the K_beta of Ziegler et
        al. 2019, arXiv 1909.08593, section 2.2, per completion."""
        if self.target:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.value *= 1 + error * n / self.horizon

    def state(self):
        return {"value": self.value}

    def load_state(self, state):
        self.value = state["value"]


def warn_of_rewards(run, completions, kl_penalties, values):
    """See Run.warn_of_rewards; the rewards are the scores without our own penalty, kl_penalties and
    values [M]."""
    penalty, lengths = run.config.unfinished_penalty, [c.n_tokens for c in completions]
    rewards = [c.score + penalty * (not c.sample.finished) for c in completions]
    kl_of_each = [part.sum().item() for part in kl_penalties.cpu().split(lengths)]  # one wait for the GPU
    run.warn_of_rewards(rewards, kl_of_each, values.tolist())


def load_critic(run, policy, tok):
    """(critic, its center): those of the checkpoint to resume, or new ones."""
    if run.resumed:
        return checkpoint.read(run.resumed / "critic", run.device)[0], run.info["critic_center"]
    return scoring.first_critic(run.config, policy, tok)


UPDATE_STATS = ("loss", "value_loss", "approx_kl", "clip_fraction", "ratio")  # logged as means over the updates


def add_gradients(policy, critic, completions, n_tokens, config, center):
    """Add up the gradients of both losses over this rank's part of a minibatch, which has
    `n_tokens` tokens on all ranks. Returns {name: mean over these tokens} and "max_ratio"."""
    policy.train()
    critic.train()
    sums = torch.zeros(len(UPDATE_STATS), device=policy.embed.device)
    max_ratio = torch.zeros((), device=policy.embed.device)
    for part in token_slices([len(c.chat.ids) for c in completions], config.micro_batch_tokens):
        micro_batch = completions[part]
        chats = [c.chat for c in micro_batch]

        logp = completion_logprobs(policy, chats, config.temperature)
        old_logp = get_per_token(policy, micro_batch, "old_logp")
        advantages = get_per_token(policy, micro_batch, "advantages")
        losses, ratio = policy_loss(logp, old_logp, advantages, config.clip_ratio)
        (losses.sum() / n_tokens).backward()

        value = state_values(critic, chats) - center
        old_value = get_per_token(policy, micro_batch, "values")
        returns = get_per_token(policy, micro_batch, "returns")
        value_losses = value_loss(value, old_value, returns, config.clip_value)
        (value_losses.sum() / n_tokens).backward()

        with torch.no_grad():
            # k3 estimates KL(old || new) from the old one's samples: joschu.net/blog/kl-approx.html
            approx_kl = ratio - 1 - (logp - old_logp)
            clipped = ((ratio - 1).abs() > config.clip_ratio).float()
            sums += torch.stack([x.sum() for x in (losses, value_losses, approx_kl, clipped, ratio)]) / n_tokens
            max_ratio = torch.maximum(max_ratio, ratio.max())
    means = dict(zip(UPDATE_STATS, reduce_sum(*sums.tolist()), strict=True))
    return means | {"max_ratio": reduce_max(max_ratio.item())}


def ppo_update(run, step, policy, critic, optimizers, completions, lr_scale, center):
    """Let policy and critic learn from a step's completions: --epochs passes in minibatches, until
    the policy has moved too far (--stop_kl). Returns what the step logs of these updates."""
    config, chats = run.config, [c.chat for c in completions]
    advantages = get_per_token(policy, completions, "advantages")
    updates, max_ratio, grad_norms = [], 0.0, torch.zeros(2)
    for minibatch, n_tokens, _ in minibatches(completions, config.completions_per_step, step, config):
        stats = add_gradients(policy, critic, minibatch, n_tokens, config, center)
        max_ratio = max(max_ratio, stats["max_ratio"])
        if config.stop_kl and stats["approx_kl"] > config.stop_kl:
            for optimizer in optimizers:
                optimizer.zero_grad()  # neither this minibatch nor the rest takes a step
            break
        # sums the gradients over the ranks, clips, steps, clears them
        grad_norms = [optimizer.step(lr_scale, config.max_grad_norm) for optimizer in optimizers]
        run.require_finite(step, stats["loss"] + stats["value_loss"], grad_norms, chats, advantages=advantages)
        updates.append(stats)
    grad_norm, critic_grad_norm = (norm.item() for norm in grad_norms)
    norms = {"grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm}
    return mean_updates(updates, UPDATE_STATS) | {"max_ratio": max_ratio, **norms}


def main(config):
    check_flags(config)
    run = Run("ppo", config)

    # Policy, reference, rewards, critic, prompts
    policy, tok = run.load()
    reference = run.load_reference(policy, tok)
    scoring.refuse_weak_reward_models(config.reward, config.min_accuracy)
    scorers, reward_hashes = scoring.rewards_of(config, run.device)
    critic, center = load_critic(run, policy, tok)
    train, val, hashes = chat.read_prompts(config, tok, policy.config.context)

    # bookkeeping: optimizers, memory, what is saved and resumed
    steps = config.steps or -(-len(train) // config.prompts_per_step)
    lr = config.lr or 6e-4 * (128 / policy.config.width) ** 2
    optimizer, critic_optimizer = Optimizer(policy, lr), Optimizer(critic, config.critic_lr or 2 * lr)
    order, beta = index_order(len(train), config.seed), Beta(config)
    check_memory(run, policy, optimizer, critic, critic_optimizer, reference, tok, train)
    run.say_passes(len(train), steps, lr)
    hashes |= reward_hashes | checkpoint.fingerprints(config.reference, config.critic)
    saved = {"optimizer": optimizer, "critic_optimizer": critic_optimizer, "order": order, "beta": beta}
    run.begin(steps, policy, data=hashes, saved=saved)

    for step in run.steps():
        # 1. Roll out: each rank completes its share of the prompts
        completions = complete_rows(policy, tok, [train[i] for i in order.batch(config.prompts_per_step)], step, config)
        chats, lengths = [c.chat for c in completions], [c.n_tokens for c in completions]
        run.time_phase("rollout")

        # 2. Score: what the reward says of each completion, less a penalty for one without an end
        scoring.score_batch(scorers, completions, config.unfinished_penalty)

        # 3. Advantages: how much better each token [M] turned out than the critic expected
        logp, ref_logp = read_logprobs(run, step, policy, reference, completions)  # logp is set as old_logp
        gap = check_sampler_matches_trainer(policy, completions, logp, config)
        values = values_no_grad(critic, chats, config.micro_batch_tokens) - center
        warn_of_rewards(run, completions, beta.value * (logp - ref_logp), values)
        rewards = token_rewards([c.score for c in completions], logp, ref_logp, lengths, beta.value)
        advantages, returns = gae(rewards, values, lengths, config.gamma, config.lam)
        advantages = whiten(advantages)
        set_per_token(completions, values=values, advantages=advantages, returns=returns)
        run.time_phase("scoring")

        # 4. Update: a few passes over these completions, in minibatches
        lr_scale = wsd(step - 1, steps, warmup=int(config.warmup * steps), decay=steps)
        optimizers = optimizer, critic_optimizer
        update_metrics = ppo_update(run, step, policy, critic, optimizers, completions, lr_scale, center)
        run.time_phase("update")

        # 5. Log, validate, adapt beta, save
        metrics = rollout_metrics(completions, len(completions), logp, ref_logp) | update_metrics
        metrics |= {"explained_variance": explained_variance(values, returns), "sampler_gap": gap}
        metrics |= {"beta": beta.value, "lr": lr * lr_scale}
        # FLOPs, in passes forward and backward: --epochs of both models, and a third each for
        # sampling, old_logp, ref_logp, reward and values
        run.log_rollout(step, policy, chats, 2 * config.epochs + 5 / 3, metrics)
        if run.eval_due(step):
            costs = {"kl_coef": beta.value, "penalty": config.unfinished_penalty}
            run.validated(step, *scoring.validate_policy(policy, reference, tok, scorers, val, config, **costs))
        beta.update(metrics["kl"], config.completions_per_step)
        run.end_step(step, policy, tok, {"critic": critic}, critic_center=center)


def check_memory(run, policy, optimizer, critic, critic_optimizer, reference, tok, rows):
    """The memory plan; see runtime/memory.py."""
    config = run.config

    def loss_of_policy(model, chats):
        logp = completion_logprobs(model, chats, config.temperature)
        return policy_loss(logp, logp.detach(), 1.0, config.clip_ratio)[0].sum()

    def loss_of_critic(model, chats):
        value = state_values(model, chats)
        return value_loss(value, value.detach(), value.detach(), config.clip_value).sum()

    trained = [(policy, optimizer, loss_of_policy), (critic, critic_optimizer, loss_of_critic)]
    frozen = {"reference": reference.config} | scoring.reward_configs(config.reward, config.monitor)
    n = config.completions_per_step
    memory.check_rollout(run, trained, tok, rows, n / config.minibatches, n, frozen)


if __name__ == "__main__":
    launch(main, Config)
