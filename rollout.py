"""Sampling: completions drawn from the model through a cache of keys and values.

    p(token) = softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the
    fewest that hold `top_p`. Sample.logprobs are logarithms of this very distribution.

`Sampler` is continuous batching: B slots, each writing one completion. Prompts of any length are
read as one pack; the samples of one prompt share that reading, its keys and values are copied. A
slot that finishes is given to a waiting request. If none waits, the live slots close up, so that a
step works for few dead ones. On CUDA a step is one captured graph, drawing included, and the CPU
looks for what has finished every 16 steps only.

`rollout`, `stream` and `sample_completions` are loops over it; scoring.py rates what they give.
"""

import contextlib
import math
from collections import deque
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
import torch

from data import chat
from data.pack import Chat, make_completion, pack, rank_span, token_slices
from kernels._lib import use
from kernels.attention import WIDTHS
from kernels.draw import draw, record_draw, wide_dtype
from kernels.linear import ONEDNN, linear
from model import GPT, KVCache, completion_logprobs, logprobs_no_grad
from runtime.checkpoint import ADVICE
from runtime.errors import UserError
from runtime.process import rank, reduce_sum, world_size

PROMPT_TOKENS = 16384  # prompts that are read as one pack
GRAPH_STEPS = 16  # replays of a captured graph between two looks at what has finished
PATIENCE = 16  # calls of step() for which a prompt may wait for others to be read with
NARROWEST = 64  # slots of the smallest graph: a step of fewer takes a GPU as long


@dataclass
class Sample:
    prompt_index: int  # among the prompts that were added together
    tokens: list  # the new token ids, with the stop token if it came
    logprobs: list  # of each token, under the very distribution it was drawn from
    finished: bool  # ended by a stop token, not by the limit or the model's context
    loss_mask: list = None  # bool per token: drawn by the sampler, and so to be trained; by default all
    request: int = -1  # its id from Sampler.add

    def __post_init__(self):
        if self.loss_mask is None:
            self.loss_mask = [True] * len(self.tokens)


def logits_of(model, hidden):
    """fp32 [B, V]: on CUDA a product of bf16 with fp32 output, as in the head that trains."""
    if hidden.is_cuda:
        return torch.mm(hidden, model.head.T.to(hidden.dtype), out_dtype=torch.float32)
    return linear(hidden, model.head)


# -------------------------------------------------------------------------------------------------
# The sampler


def sampling_weights(model):
    """The model with its matrices as a step reads them fastest: on CUDA in the dtype it computes
    in; where oneDNN multiplies, transposed in memory, because it would transpose them for each
    product of few rows.

    A step is as fast as the weights are read. The model's own matrices stay as they are.
    """
    device, dtype = model.embed.device, model.compute_dtype
    if device.type != "cuda" and not (device.type == "cpu" and ONEDNN):
        return model
    with torch.device("meta"):
        copy = GPT(model.config)
    weights = {name: p.to(dtype) if p.dim() > 1 else p for name, p in model.state_dict().items()}
    if device.type == "cpu":
        # Rows of the embedding are looked up one by one
        weights |= {name: p.T.contiguous().T for name, p in weights.items() if p.dim() > 1 and name != "embed"}
    copy.load_state_dict(weights, assign=True)
    copy.cos, copy.sin, copy.exact = model.cos, model.sin, model.exact
    return copy.eval()


def token_budgets(model, prompts, max_new_tokens):
    """How many tokens each prompt leaves for its completion, at most `max_new_tokens`.

    Raises UserError if a prompt leaves none.
    """
    longest, context = max(map(len, prompts), default=0), model.config.context
    if longest >= context:
        raise UserError(
            f"a prompt of {longest} tokens fills the model's context of {context}; leave it out of the data"
        )
    return [min(max_new_tokens, context - len(p)) for p in prompts]


def affordable_slots(model, length):
    """How many slots of `length` tokens fit into half of a GPU's free memory, at least one.

    The allocator's unused cache is free too. On a CPU there is no limit.
    """
    device = model.embed.device
    if device.type != "cuda":
        return 2**31
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    slot = model.config.slot_bytes(length, model.compute_dtype.itemsize)
    return max(1, (torch.cuda.mem_get_info(device)[0] + cached) // 2 // slot)


@contextlib.contextmanager
def unsorted_writes():
    """Within it PyTorch may use algorithms that it does not call deterministic.

    Here they are: no two writes go to one place. The others sort indices first, and copy the whole
    cache to write some rows of it.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@dataclass
class Request:
    """One completion to be drawn."""

    id: int
    prompt_index: int
    prompt: tuple
    limit: int  # most new tokens
    settings: tuple  # temperature, top_k, top_p
    stop: list  # ids that end it
    random_stream: tuple  # (seed, index) of its random numbers
    drawn: int = 0  # tokens so far, when last looked at


class Sampler:
    """Draws completions of many requests at once, in `slots` slots of `length` tokens each.

    A request's tokens depend on its own prompt, parameters and random numbers alone, not on the
    slots, nor on other requests.

        sampler = Sampler(model, slots=8, length=512)
        sampler.add(prompts, max_new_tokens=100, temperature=0.7, seed=1)
        while sampler.busy:
            for sample in sampler.step():
                print(sample.request, sample.tokens)
    """

    def __init__(self, model, slots, length):
        device = model.embed.device
        model.eval()
        self.model, self.slots, self.length, self.device = sampling_weights(model), slots, length, device
        self.cache = KVCache(self.model, slots, length)
        self.added = 0  # requests so far, and the id of the next
        self.waiting = deque()  # Requests
        self.live = {}  # {slot: Request}
        self.put_off = 0  # calls of step() since a waiting request could have had a slot
        self.shared_settings = (1.0, 0, 1.0)  # temperature, top_k and top_p; None where requests differ

        # One row per slot. What dead slots draw goes to a last column that nobody reads.
        with torch.device(device):
            self.hidden = torch.zeros(slots, model.config.width, dtype=model.compute_dtype)  # after the prompt
            self.u = torch.zeros(slots, length + 1)  # a random number for each token
            self.tokens = torch.zeros(slots, length + 1, dtype=torch.int64)
            self.last = torch.zeros(slots, dtype=torch.int64)  # the token drawn last
            self.logprobs = torch.zeros(slots, length + 1)
            self.settings = torch.zeros(slots, 3, dtype=wide_dtype(device))
            self.is_stop = torch.zeros(slots, len(self.model.head), dtype=torch.bool)
            self.drawn = torch.zeros(slots, dtype=torch.int64)  # tokens so far
            self.left = torch.zeros(slots, dtype=torch.int64)  # tokens that may follow; none: dead
            self.rows = torch.arange(slots)

        # A reference, which runs if its kernel is off or heads have another width, reads the
        # longest length on the CPU, which no graph can capture.
        kernels = use("decode_attention", self.cache.k) and use("append_rope", self.cache.k)
        self.captured = device.type == "cuda" and kernels and model.config.head_dim in WIDTHS
        self.graphs = {}  # {slots that it steps: graph}

    @property
    def busy(self):
        """Whether a request is live or waits."""
        return bool(self.live or self.waiting)

    def add(self, prompts, *, max_new_tokens, n=1, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0, first=0):
        """Queue `n` requests per prompt (token ids) -> their ids, by prompt and then by sample.

        A request ends with one of the tokens `stop`, after `max_new_tokens`, or when its slot is
        full. Request j of this call draws its t-th token with the t-th random number of the stream
        (seed, first + j). Raises UserError if a prompt is empty or leaves no room in a slot.
        """
        for prompt in prompts:
            if not 0 < len(prompt) < self.length:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens: a context of {self.length} takes 1 to {self.length - 1}"
                )
        vocab, stop = self.is_stop.shape[1], list(stop)
        # A top_k of V and a top_p of infinity cut nothing
        settings = temperature, min(top_k or vocab, vocab), top_p if top_p < 1 else math.inf
        shared = settings
        if self.busy:
            shared = tuple(x if x == y else None for x, y in zip(settings, self.shared_settings, strict=True))
        if shared != self.shared_settings:
            self.shared_settings, self.graphs = shared, {}  # a graph holds the settings it was captured with
        requests = []
        for j in range(n * len(prompts)):
            prompt = tuple(prompts[j // n])
            limit = min(max_new_tokens, self.length - len(prompt))
            requests.append(Request(self.added + j, j // n, prompt, limit, settings, stop, (seed, first + j)))
        self.added += len(requests)
        self.waiting += requests
        return [request.id for request in requests]

    def cancel(self, id):
        """Drop a request, waiting or live. One that has finished is left alone."""
        self.waiting = deque(request for request in self.waiting if request.id != id)
        for slot in [slot for slot, request in self.live.items() if request.id == id]:
            del self.live[slot]
            self.left[slot] = 0

    def written(self, id):
        """The tokens that a live request has so far; none while it waits."""
        for slot, request in self.live.items():
            if request.id == id:
                return self.tokens[slot, : request.drawn].tolist()
        return []

    @torch.inference_mode()  # small ops take longer under no_grad
    def step(self):
        """Read waiting prompts, or else advance all live slots -> the Samples that are complete.

        Reading gives a request its first token; advancing gives one more, and several on CUDA.
        """
        with unsorted_writes():
            if self.should_admit():
                self.admit()
            elif self.live:
                self.advance()
        return self.collect()

    def should_admit(self):
        """Whether it is time to read prompts, which all live requests wait for.

        Reading one short prompt is hardly faster than reading ten. So several are read together, in
        proportion to the requests that wait for it; but none waits for more than PATIENCE calls
        of `step` once it could have a slot.
        """
        ready = min(len(self.waiting), self.slots - len(self.live))
        self.put_off = self.put_off + 1 if ready else 0
        if ready and (8 * ready >= len(self.live) or self.put_off > PATIENCE):
            self.put_off = 0
            return True
        return False

    def admit(self):
        """Give the free slots to waiting requests, and draw their first tokens."""
        free = [slot for slot in range(self.slots) if slot not in self.live]
        new = free[: len(self.waiting)]
        for slot in new:
            self.live[slot] = self.waiting.popleft()
        prompts = {slot: request.prompt for slot, request in self.live.items()}
        # The first slot of each prompt, perhaps one that has long been live: it has been read there
        holder = {prompt: slot for slot, prompt in reversed(prompts.items())}
        unread = [slot for slot in new if holder[prompts[slot]] == slot]
        for part in token_slices([len(prompts[slot]) for slot in unread], PROMPT_TOKENS):
            slots = torch.tensor(unread[part], device=self.device)
            p = pack([prompts[slot] for slot in unread[part]]).to(self.device)
            # `forward`, because a model that is compiled for training would be compiled again
            hidden = self.model.forward(p, self.cache, slots)  # [N, C]
            self.hidden[slots] = hidden[p.cu_seqlens[1:].long() - 1]
        copies = {slot: holder[prompts[slot]] for slot in new if slot not in unread}
        self.copy(copies, {slot: len(prompts[slot]) for slot in copies})
        for slot in new:
            self.set_row(slot, self.live[slot])
        slots = torch.tensor(new, device=self.device)
        self.draw_next(self.hidden[slots], slots)

    def copy(self, copies, lengths):
        """Copy rows, and keys and values of lengths[slot] tokens; copies: {slot: where from}."""
        if not copies:
            return
        to = torch.tensor(list(copies.keys()), device=self.device)
        source = torch.tensor(list(copies.values()), device=self.device)
        tokens = list(lengths.values())
        self.cache.copy(source, to, torch.tensor(tokens, device=self.device), max(tokens))
        for x in (self.hidden, self.settings, self.is_stop, self.u, self.tokens, self.logprobs):
            x[to] = x[source]
        for x in (self.last, self.drawn, self.left):
            x[to] = x[source]

    def set_row(self, slot, request):
        """Write parameters and random numbers of a new request into the row of its slot."""
        random = np.random.default_rng(request.random_stream).random(request.limit, dtype=np.float32)
        self.u[slot, : request.limit] = torch.from_numpy(random)
        self.settings[slot] = torch.tensor(request.settings, dtype=torch.float64)
        self.is_stop[slot] = False
        self.is_stop[slot, request.stop] = True
        self.drawn[slot], self.left[slot] = 0, request.limit

    def draw_next(self, hidden, slots):
        """Draw a token for each of `slots`, int64 [b], from the hidden states [b, C] before it."""
        settings = [self.settings[slots, i, None] if x is None else x for i, x in enumerate(self.shared_settings)]
        u = self.u[slots, self.drawn[slots]]
        token, logp = draw(logits_of(self.model, hidden), u, *settings)
        rows = self.is_stop, self.tokens, self.logprobs, self.last, self.drawn, self.left, self.cache.lengths
        record_draw(token, logp, slots, *rows)  # sets a dead slot's length to 0, so that it costs little

    def advance(self):
        """Give each live slot its next token, and on CUDA the next GRAPH_STEPS."""
        if not self.captured:
            self.close_up(len(self.live))
            self.step_slots(len(self.live))
            return
        width = self.slots
        while width > NARROWEST and len(self.live) <= width // 2:
            width //= 2
        self.close_up(width)
        if width not in self.graphs:
            self.step_slots(width)  # by hand, which compiles what is then captured
            self.graphs[width] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[width]):
                self.step_slots(width)
        for _ in range(GRAPH_STEPS):
            self.graphs[width].replay()

    def close_up(self, width):
        """Move the live slots from `width` on into free ones before it."""
        if max(self.live) < width:
            return
        holes = [slot for slot in range(width) if slot not in self.live]
        copies = {holes.pop(0): slot for slot in sorted(self.live) if slot >= width}
        for hole, slot in copies.items():
            self.live[hole] = self.live.pop(slot)
        self.copy(copies, {hole: len(self.live[hole].prompt) + self.live[hole].drawn - 1 for hole in copies})
        self.left[width:] = 0

    def step_slots(self, width):
        """One token for each of the first `width` slots. Nothing here waits for the GPU."""
        hidden = self.model.step(self.last[:width], self.cache.first(width))
        self.draw_next(hidden, self.rows[:width])

    def collect(self):
        """Free the slots that have finished -> their Samples.

        Raises UserError if log-probabilities are not finite.
        """
        drawn, left = self.drawn.tolist(), self.left.tolist()
        samples = []
        for slot, request in list(self.live.items()):
            request.drawn = drawn[slot]
            if left[slot] > 0:
                continue
            tokens, logprobs = (x[slot, : request.drawn].tolist() for x in (self.tokens, self.logprobs))
            if not all(map(math.isfinite, logprobs)):
                raise UserError(
                    f"the log-probabilities of a sample are not finite: the model's weights are damaged. {ADVICE}"
                )
            finished = tokens[-1] in request.stop
            samples.append(Sample(request.prompt_index, tokens, logprobs, finished, request=request.id))
            del self.live[slot]
        return samples


# -------------------------------------------------------------------------------------------------
# Loops over a Sampler


def rollout(model, prompts, *, max_new_tokens, n=1, slots=128, **options):
    """Sample `n` completions of every prompt -> [Sample], ordered by prompt and then by sample.

    prompts: lists of token ids, each of at least one; options: of Sampler.add. A sample has at most
    `max_new_tokens` tokens, or as many as its prompt leaves in the model's context. The same seed
    gives the same samples for any number of slots; `first`, the number of the first one, lets ranks
    share the prompts. Raises UserError if a prompt is empty or fills the context.
    """
    if not prompts:
        return []
    length = min(model.config.context, max(map(len, prompts)) + max_new_tokens)
    sampler = Sampler(model, min(slots, n * len(prompts), affordable_slots(model, length)), length)
    sampler.add(prompts, max_new_tokens=max_new_tokens, n=n, **options)
    samples = []
    while sampler.busy:
        samples += sampler.step()
    return sorted(samples, key=lambda s: s.request)


def stream(model, prompt, *, max_new_tokens, **options):
    """Yield the ids of one completion as they are drawn, a stop token last.

    They are those of `rollout` with the same options (of Sampler.add). Past the model's context it
    continues from the last half of it, with new random numbers.
    """
    context = model.config.context
    # After a full context one more token is drawn, and not read
    sampler = Sampler(model, 1, min(context + 1, len(prompt) + max_new_tokens))
    text, part = list(prompt)[-context:], 0
    while max_new_tokens > 0:
        if len(text) >= context:
            text = text[-max(1, context // 2) :]
        (id,) = sampler.add([text], max_new_tokens=max_new_tokens, first=part, **options)
        tokens = []
        while sampler.busy:
            samples, seen = sampler.step(), len(tokens)
            tokens = samples[0].tokens if samples else sampler.written(id)
            yield from tokens[seen:]
        if samples[0].finished:
            return
        text, part, max_new_tokens = text + tokens, part + 1, max_new_tokens - len(tokens)


def sample_completions(model, tok, conversations, **options):
    """Sample answers to conversations (lists of messages) -> (prompts, samples, texts).

    prompts: token ids, one per conversation; texts: what the samples say; options: of `rollout`.
    """
    prompts = [chat.encode_prompt(tok, messages) for messages in conversations]
    samples = rollout(model, prompts, stop=chat.stop_ids(tok), **options)
    return prompts, samples, [chat.decode_completion(tok, s.tokens) for s in samples]


@dataclass
class Completion:
    """A completion that PPO or GRPO learns from."""

    index: int  # among the completions of all ranks in this step; those to one prompt are neighbours
    row: tuple  # (messages, the line of the data as a dict)
    chat: Chat  # the prompt and the completion
    sample: Sample
    text: str
    score: float = 0.0
    penalty: float = 0.0  # for its length, at most 0, which the score includes
    parts: dict = None  # {reward: what it says}
    per_token: dict = field(default_factory=dict)  # {name: fp32 [n_tokens]}

    @property
    def n_tokens(self):  # those that are trained
        return int(self.chat.loss_mask.sum())


def complete_rows(model, tok, rows, step, config, first=0):
    """[Completion]: --group_size for each row of this rank's share of a step's rows.

    rows: [(messages, row)] of all ranks; first: how many prompts the step has had before. config: a
    RolloutConfig. They are the same for any number of ranks.
    """
    begin, end = rank_span([1] * len(rows), rank(), world_size())
    rows, first = rows[begin:end], (first + begin) * config.group_size
    prompts, samples, texts = sample_completions(
        model,
        tok,
        [messages for messages, _ in rows],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        n=config.group_size,
        seed=config.seed * 1_000_003 + step,
        first=first,
    )
    completions = []
    for i, (s, text) in enumerate(zip(samples, texts, strict=True)):
        document = make_completion(prompts[s.prompt_index], s.tokens, s.loss_mask)
        completions.append(Completion(first + i, rows[s.prompt_index], document, s, text))
    return completions


def set_per_token(completions, **tensors):
    """Give each completion its part of tensors fp32 [M], one number for each trained token of
    all."""
    lengths = [c.n_tokens for c in completions]
    for name, values in tensors.items():
        for c, own in zip(completions, values.split(lengths), strict=True):
            c.per_token[name] = own


def get_per_token(model, completions, name):
    """fp32 [M]: what `set_per_token` gave, joined; on the device of the model."""
    found = [c.per_token[name] for c in completions]
    return (torch.cat(found) if found else torch.zeros(0)).to(model.embed.device)


# -------------------------------------------------------------------------------------------------
# Sampler and trainer have one distribution


def read_logprobs(run, step, model, reference, completions, always=True):
    """(logp, ref_logp), fp32 [M]: the log-probabilities under the policy, which sampled the
    completions, and under the reference (None without one). Sets them as "old_logp" and "ref_logp".

    Also checks, in the first step of a process, that the trainer repeats itself, and in the first
    step of the run that policy and reference are the same. always=False: logp is None in all other
    steps.
    """
    config, first = run.config, step == run.start + 1
    chats = [c.chat for c in completions]
    logp = ref_logp = None
    if reference:
        ref_logp = logprobs_no_grad(reference, chats, config.temperature, config.micro_batch_tokens)
        set_per_token(completions, ref_logp=ref_logp)
    if always or first:
        logp = logprobs_no_grad(model, chats, config.temperature, config.micro_batch_tokens)
        set_per_token(completions, old_logp=logp)
    if first:
        same_logp = ref_logp if step == 1 and not config.reference else None
        check_sampler_matches_trainer(model, completions, logp, config, same_logp, repeat=True)
    return logp, ref_logp


# The largest mean |log p by the sampler - by the trainer| that is rounding, by dtype. SmolLM2-135M
# has 0.039 in bf16 and 4e-6 in fp32, small models with random weights 0.003 and 1e-6.
GAPS = {torch.float32: 1e-4, torch.bfloat16: 8e-2}


def gap_in_fp32(model, completions, config):
    """(sum of |log p by the sampler - by the trainer|, tokens) of a few completions to the same
    prompts, drawn in fp32.

    One layer's weights 1 % off change a log-probability by 0.02, in bf16 half of what rounding
    does.
    """
    model.exact = True
    some = [c for c in completions if c.n_tokens][:8]
    prompts = [c.chat.ids[: c.chat.loss_mask.argmax()].tolist() for c in some]
    options = {"max_new_tokens": min(32, config.max_new_tokens), "temperature": config.temperature}
    samples = rollout(model, prompts, **options)
    chats = [make_completion(prompts[s.prompt_index], s.tokens) for s in samples]
    logp = logprobs_no_grad(model, chats, config.temperature, config.micro_batch_tokens)
    model.exact = False
    sampled = torch.tensor([p for s in samples for p in s.logprobs])
    return (sampled - logp.cpu()).abs().sum(), len(logp)


def check_sampler_matches_trainer(model, completions, logp, config, ref_logp=None, repeat=False):
    """Check that what is sampled from is what is differentiated.

    logp [M]: the trainer's, of the trained tokens; ref_logp [M]: the reference's if the
    policy still equals it, else None. Returns the mean |log p by the sampler - by the trainer| over
    the trained tokens of all ranks. Raises UserError if it is more than rounding explains, if
    policy and reference differ (KL != 0), or, with `repeat`, if the same pack has other
    log-probabilities in training (ratio != 1 before the first update).
    """
    exact_gap, exact_tokens = 0.0, 0
    if repeat and model.compute_dtype != torch.float32:
        exact_gap, exact_tokens = gap_in_fp32(model, completions, config)
    model.train()
    repeated = logp[:0]
    if repeat and completions:
        chats = [c.chat for c in completions]
        part = token_slices([len(c.ids) for c in chats], config.micro_batch_tokens)[0]
        repeated = completion_logprobs(model, chats[part], config.temperature).detach()
    sampled = [x for c in completions for x in compress(c.sample.logprobs, c.sample.loss_mask)]
    gap = (torch.tensor(sampled, device=logp.device) - logp).abs().sum()
    ratio_not_one = not torch.equal(repeated, logp[: len(repeated)])
    kl_not_zero = ref_logp is not None and not torch.equal(logp, ref_logp)
    gap, tokens, exact_gap, exact_tokens, ratio_not_one, kl_not_zero = reduce_sum(
        gap, len(logp), exact_gap, exact_tokens, ratio_not_one, kl_not_zero
    )
    if ratio_not_one:
        raise UserError(
            "the same tokens had another probability in training than before the first update (ratio != 1): "
            "is there dropout, or an op that does not repeat itself?"
        )
    if kl_not_zero:
        raise UserError(
            "policy and reference are the same checkpoint, yet their log-probabilities differ "
            "(KL != 0 before the first update)"
        )
    gap /= max(1, tokens)
    refuse_gap(gap, GAPS[model.compute_dtype], config.temperature)
    refuse_gap(exact_gap / max(1, exact_tokens), GAPS[torch.float32], config.temperature, " in fp32")
    return gap


def refuse_gap(gap, limit, temperature, dtype=""):
    """Raises UserError if sampler and trainer differ by more than rounding, `limit`, explains."""
    bound = limit / min(temperature, 1)  # logits are divided by it, and their rounding with them
    if gap > bound:
        raise UserError(
            f"sampler and trainer disagree: mean |log p difference| {gap:.2e}{dtype}, at most {bound:.0e} is "
            "rounding; the model would be trained on what it did not sample"
        )
