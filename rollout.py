"""Sampling: next tokens drawn from the model through a KV cache, one stream for people, batches for evaluation and RL.

The plain form: batches of equal-length steps, every slot runs until the last one of its batch has finished. Used by sample, evaluate, rlaif, ppo, grpo.
"""
import dataclasses

import torch

from common import UserError
from data.pack import pack
from model import KVCache


@dataclasses.dataclass
class Sample:
    prompt_index: int
    tokens: list  # the new token ids, with the stop token if it came
    logprobs: list  # of each token, under the very distribution it was drawn from
    finished: bool  # ended by a stop token, not by `max_new`


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token a row. logits [B, V], u [B] uniform in [0, 1) -> (tokens int64 [B], logp fp32 [B] under the tempered, cut-off distribution).

    temperature 0 takes the likeliest token (logp 0: it was certain). top_k keeps the k likeliest; top_p the fewest tokens that hold that much
    probability (Holtzman et al. 2020, arXiv 1904.09751). The draw inverts the cumulative distribution, so a row depends on its own u alone.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_k and top_k < logp.shape[-1]:
        logp = logp.masked_fill(logp < logp.topk(top_k).values[:, -1:], -torch.inf).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.sort(descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # probability of everything likelier
        logp = logp.masked_fill(torch.zeros_like(logp, dtype=torch.bool).scatter(1, order, (before >= top_p) & (before > 0)), -torch.inf).log_softmax(-1)
    cumulative = logp.exp().double().cumsum(-1)  # [B, V]
    tokens = torch.searchsorted(cumulative, u.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def rollout(model, prompts, *, max_new, n=1, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0, slots=128):
    """Sample `n` continuations of every prompt -> list of Sample, ordered by prompt and then by sample.

    prompts: lists of token ids, each of at least one; stop: ids that end a sample. The same seed gives the same samples whatever `slots`:
    sample j's t-th draw uses the (j, t)-th of one table of uniform numbers. UserError where a prompt and `max_new` exceed the model's context.
    """
    longest = max(map(len, prompts))
    if longest + max_new > model.config.context:
        raise UserError(f"a prompt of {longest} tokens and max_new={max_new} exceed the model's context of {model.config.context}")
    model.eval()
    device = model.embed.device
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
    jobs = [i for i in range(len(prompts)) for _ in range(n)]
    u = torch.rand(len(jobs), max_new, generator=torch.Generator().manual_seed(seed)).to(device)
    samples = []
    for first in range(0, len(jobs), slots):
        batch = jobs[first : first + slots]
        cache = KVCache(model, len(batch), longest + max_new)
        p = pack([prompts[i] for i in batch]).to(device)
        # `forward`, not the call: a model compiled for training would be compiled again for every new length.
        hidden = model.forward(p, cache, torch.arange(len(batch), device=device))[p.cu[1:].long() - 1]  # [B, C] at each prompt's last token
        tokens, logps, done = [], [], torch.zeros(len(batch), dtype=torch.bool, device=device)
        for t in range(max_new):
            token, logp = draw(hidden @ model.head.T.to(hidden.dtype), u[first : first + slots, t], temperature, top_k, top_p)
            tokens.append(token)
            logps.append(logp)
            done |= torch.isin(token, stops)
            if done.all() or t + 1 == max_new:
                break
            hidden = model.step(token, cache)
        for i, ids, logp in zip(batch, torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist()):
            end = next((t + 1 for t, token in enumerate(ids) if token in stop), len(ids))
            samples.append(Sample(i, ids[:end], logp[:end], ids[end - 1] in stop))
    return samples


@torch.no_grad()
def stream(model, prompt, *, max_new, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0):
    """Yield the ids of one continuation as they are drawn, a stop token last. Past the model's context it goes on from the last half of it."""
    model.eval()
    device, context = model.embed.device, model.config.context
    generator = torch.Generator().manual_seed(seed)
    text, cache = list(prompt)[-context:], None
    for _ in range(max_new):
        if cache is None or cache.lengths[0] == context:
            text = text if cache is None and len(text) < context else text[-(context // 2) :]
            cache = KVCache(model, 1, context)
            hidden = model.forward(pack([text]).to(device), cache, torch.zeros(1, dtype=torch.int64, device=device))[-1:]
        else:
            hidden = model.step(torch.tensor(text[-1:], device=device), cache)
        token, _ = draw(hidden @ model.head.T.to(hidden.dtype), torch.rand(1, generator=generator).to(device), temperature, top_k, top_p)
        text.append(int(token))
        yield text[-1]
        if text[-1] in stop:
            return
