"""The model thread of serve.py: it draws the completions of many clients at once.

It drives one rollout.Sampler per model, and is the only one to touch samplers and the device. Jobs
come through a queue; tokens go to the event loop, which waits for nothing here.
"""

import asyncio
import queue
import threading
import time
from dataclasses import dataclass, field

import tiktoken
import torch

from model import GPT
from rollout import Sampler, affordable_slots
from runtime.cli import print0
from runtime.memory import available_memory

PIECE_SECONDS = 0.05  # between two deliveries of a stream's tokens, at least


@dataclass(eq=False)
class Served:
    """A checkpoint that answers. The model thread makes its sampler, and alone touches it."""

    name: str  # the directory of the checkpoint
    model: GPT
    tok: tiktoken.Encoding
    is_chat_model: bool
    sampler: Sampler = None
    slots: int = 0  # of the sampler, once there is one
    writing: dict = field(default_factory=dict)  # {request: (Job, which of its completions)}

    def start(self, device, slots):
        """Make the sampler, of at most so many slots of the whole context: those that fit into half
        of the free memory."""
        model, length = self.model.to(device), self.model.config.context
        fitting = affordable_slots(model, length)  # all on a CPU, where a run's results must not depend on the memory
        if model.embed.device.type == "cpu" and (free := available_memory(model.embed.device, {})):
            fitting = max(1, free // 2 // model.config.slot_bytes(length, model.compute_dtype.itemsize))
        if fitting < slots:
            print0(f"{self.name}: {fitting} of --slots={slots} at once; no more of {length} tokens fit into the memory")
        self.slots = min(slots, fitting)
        self.sampler = Sampler(model, self.slots, length)


@dataclass(eq=False)
class Job:
    """A client's request while it is answered."""

    served: Served
    prompts: list  # token ids
    options: dict  # of Sampler.add
    in_pieces: bool  # whether tokens are sent as they come, or all at the end
    events: asyncio.Queue = field(default_factory=asyncio.Queue)  # (which completion, tokens, logprobs, ended)
    sent: dict = field(default_factory=dict)  # {request: how many of its tokens have been sent}
    pending: set = field(default_factory=set)  # which of its completions are drawn or wait


class ModelThread(threading.Thread):
    """Draws the completions of all jobs, and hands them to the event loop."""

    def __init__(self, device, slots, loop):
        super().__init__(daemon=True)
        self.device, self.slots, self.loop = device, slots, loop
        self.inbox = queue.SimpleQueue()  # (method, its arguments)
        self.busy, self.events, self.last_sent = [], [], 0.0

    def run(self):
        # On a CPU a core is left for the event loop: threads that wait for a busy one only spin
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        while True:
            while not self.busy or not self.inbox.empty():
                method, *arguments = self.inbox.get()
                method(*arguments)
            self.step_all()
            if time.monotonic() > self.last_sent + PIECE_SECONDS:
                self.send_progress()
            if self.events:
                self.loop.call_soon_threadsafe(hand_out, self.events)
                self.events = []

    def step_all(self):
        """A step of each model that is busy.

        A method of its own: a name left over in `run` would keep a model that is no longer served
        in memory."""
        for served in self.busy:
            self.step(served)
        self.busy = [served for served in self.busy if served.sampler and served.sampler.busy]

    def add(self, job):
        """Queue the completions of a job; an error goes to its client."""
        served = job.served
        try:
            if not served.sampler:
                served.start(self.device, self.slots)
            requests = served.sampler.add(job.prompts, **job.options)
        except Exception as e:  # out of memory, say: this job fails, the thread lives
            return self.loop.call_soon_threadsafe(hand_out, [(job, (0, [], [], e))])
        job.sent = dict.fromkeys(requests, 0)
        served.writing |= {request: (job, i) for i, request in enumerate(requests)}
        if served not in self.busy:
            self.busy.append(served)

    def cancel(self, job, completions):
        """Drop some of a job's completions; those that have ended are left alone."""
        for i, request in enumerate(job.sent):
            # After a failed step a new sampler counts from 0, and the number may be another job's
            if i in completions and job.served.writing.get(request) == (job, i):
                del job.served.writing[request]
                job.served.sampler.cancel(request)

    def step(self, served):
        try:
            samples = served.sampler.step()
        except Exception as e:  # what this model was writing is lost; its clients get the error
            print0(f"error: {served.name}: {e!r}")
            self.events += [(job, (i, [], [], e)) for job, i in served.writing.values()]
            served.writing, served.sampler = {}, None
            return
        for sample in samples:
            job, i = served.writing.pop(sample.request)
            sent = job.sent[sample.request]
            reason = "stop" if sample.finished else "length"
            self.events.append((job, (i, sample.tokens[sent:], sample.logprobs[sent:], reason)))

    def send_progress(self):
        """Send what has been drawn of completions that are read as they come."""
        self.last_sent = time.monotonic()
        for served in self.busy:
            known = {}  # {slot: how many of its tokens have been sent}
            for slot, request in served.sampler.live.items():
                job, _ = served.writing[request.id]
                if job.in_pieces and job.sent[request.id] < request.drawn:
                    known[slot] = job.sent[request.id]
            for slot, (tokens, logprobs) in written_since(served.sampler, known).items():
                request = served.sampler.live[slot]
                job, i = served.writing[request.id]
                self.events.append((job, (i, tokens, logprobs, None)))
                job.sent[request.id] = request.drawn


def written_since(sampler, known):
    """{slot: (tokens, logprobs)} that live requests have beyond the first known[slot].

    Copied together: on a GPU each copy waits for the steps that are under way.
    """
    if not known:
        return {}
    new = {slot: sampler.live[slot].drawn - start for slot, start in known.items()}
    slots, starts = torch.tensor([*known.items()], device=sampler.device).T[:, :, None]  # [known, 1] each
    columns = (starts + torch.arange(max(new.values()), device=sampler.device)).clamp(max=sampler.length)
    tokens, logprobs = sampler.tokens[slots, columns].tolist(), sampler.logprobs[slots, columns].tolist()
    return {slot: (t[:n], logp[:n]) for (slot, n), t, logp in zip(new.items(), tokens, logprobs)}


def hand_out(events):
    """Put each event into its job's queue; runs in the event loop."""
    for job, event in events:
        job.events.put_nowait(event)
