"""Serve a model to people and to programs, and keep what people say of its answers.

    python serve.py --model=out/dpo --compare=out/sft --feedback=out/feedback

One process, on starlette and uvicorn. One thread runs the model: it drives a rollout.Sampler, so
that requests are batched as they come, each with its own settings and random numbers. The same seed
gives the same text alone and under load. A client that leaves frees its slot.

    /                   a page: chat; compare two answers blind and vote; correct an answer
    /feedback           what people preferred, and the commands that train on it
    /v1/models, /v1/chat/completions, /v1/completions
                        OpenAI's API; what it does not do is refused by name (data/openai.py)
    /v1/feedback        a vote (data/feedback.py), which is on the disk when it is acknowledged

--follow=out/rounds serves the newest finished run below it as soon as it is there; sharpen.py makes
such runs from the votes. Only this machine can connect, unless --host and --api_key say otherwise.
"""

import asyncio
import contextlib
import gc
import ipaddress
import secrets
import shlex
import socket
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import sample
from data.feedback import KINDS, Journal, read_entry
from data.openai import (
    Completion,
    Refusal,
    encode_prompts,
    event,
    model_entry,
    piece_of_answer,
    read_body,
    read_request,
    usage_of,
    whole_answer,
)
from data.read import reason
from engine import Job, ModelThread, Served
from figures import bradley_terry
from runtime import checkpoint
from runtime.checkpoint import newest_finished
from runtime.cli import check_ranges, print0
from runtime.errors import UserError
from runtime.http import HANDLERS, PATIENCE, EventStream, Guard, Impatient, body_of, finish_or_leave
from runtime.process import launch, setup

WEB = Path(__file__).parent / "web"
FOLLOW_SECONDS = 1.0  # between two looks for a new run
RETRY_SECONDS = 30.0  # until a run that could not be loaded is tried again
MOST_MODELS = 50  # whose win rates are shown


@dataclass
class Config:
    # -- What you will set --
    # a run, a checkpoint, or a downloaded directory
    model: str
    # another one, which gives the second answer when people compare; "": the same, drawn again
    compare: str = ""
    # directory for what people say of the answers; "": nobody is asked
    feedback: str = ""
    # serve the newest finished run below this directory instead of --model, once there is one
    follow: str = ""
    # -- What you may set --
    # address to listen at; one that others can reach needs --api_key
    host: str = "127.0.0.1"
    # 0: any free one [<= 65535]
    port: int = 8000
    # what clients must send as a bearer token; "": nothing
    api_key: str = ""
    # other web sites whose pages may use this server, comma-separated: https://example.org
    origin: str = ""
    # completions that a model draws at once, if half of the free memory holds as many [>= 1]
    slots: int = 64
    # completions that may wait for a slot; beyond that a client is told to try again later [>= 1]
    queue: int = 256
    # auto, cpu, cuda, cuda:1, mps
    device: str = "auto"


# --------------------------------------------------------------------------------------------------
# Requests


class Server:
    """What is served, and the answers to requests. All of it runs in the event loop."""

    def __init__(self, config, models, journal, thread):
        self.config, self.models, self.journal, self.thread = config, models, journal, thread
        self.jobs = weakref.WeakSet()  # those whose completions are drawn or wait

    def choose(self, name):
        """The Served that a client names: by its checkpoint, by the flag's value, or "latest"."""
        flags = [self.config.model, self.config.compare]
        for served, flag in zip(self.models, flags):
            if name in (served.name, flag):
                return served
        if name != "latest":
            message = f'model {name!r} is not served here; /v1/models lists what is, and "latest" is the first of them'
            raise Refusal(404, message, "model", "model_not_found")
        return self.models[0]

    async def list_models(self, request):
        listed = [model_entry(served) for served in self.models]
        return JSONResponse({"object": "list", "data": listed, "feedback": bool(self.journal)})

    async def show_model(self, request):
        return JSONResponse(model_entry(self.choose(request.path_params["name"])))

    async def complete(self, request):
        """/v1/chat/completions and /v1/completions."""
        body = read_body(await body_of(request))
        asked = read_request(body, "chat" in request.scope["path"], seed=secrets.randbits(63))
        served = self.choose(asked.model)
        context = served.model.config.context
        prompts, ends, hidden = encode_prompts(asked, served.tok, context, served.is_chat_model)
        n, room = asked.n * len(prompts), (served.slots or self.config.slots) + self.config.queue
        if n > room:
            raise Refusal(400, f"n: {n} completions in all, but this server takes {room} at once", "n")
        if sum(len(job.pending) for job in self.jobs if job.served is served) + n > room:
            raise Refusal(429, "too many requests wait already; come again in a second", code="rate_limit_exceeded")
        options = asked.sampling | {"n": asked.n, "max_new_tokens": asked.max_tokens, "stop": ends}
        job = Job(served, prompts, options, asked.stream or bool(asked.stop), pending=set(range(n)))
        self.jobs.add(job)  # at once: the next request may be read before this one is begun
        completions = [Completion(served.tok, hidden, asked.stop) for _ in range(n)]
        if asked.stream:
            return EventStream(self.stream(asked, job, completions))
        await finish_or_leave(request.receive, self.collect(job, completions))
        return JSONResponse(whole_answer(asked, served.name, completions, usage_of(prompts, completions)))

    async def progress(self, job, completions):
        """Have the model thread do the job; yield (which completion, new text, its pieces).

        However it ends, nothing of the job is drawn after that.
        """
        self.thread.inbox.put((self.thread.add, job))
        try:
            while job.pending:
                i, tokens, logprobs, ended = await job.events.get()
                if isinstance(ended, Exception):
                    raise Refusal(500, f"the model failed: {ended}")
                if i in job.pending:
                    new = completions[i].take(tokens, logprobs, ended)
                    if completions[i].reason:
                        job.pending.remove(i)
                        if not ended:  # by a stop string
                            self.thread.inbox.put((self.thread.cancel, job, {i}))
                    yield i, *new
        finally:
            if job.pending:
                self.thread.inbox.put((self.thread.cancel, job, set(job.pending)))
                job.pending.clear()

    async def collect(self, job, completions):
        async for _ in self.progress(job, completions):
            pass

    async def stream(self, asked, job, completions):
        """The answer as server-sent events."""
        name, begun = job.served.name, set()
        try:
            async with contextlib.aclosing(self.progress(job, completions)) as progress:
                async for i, text, pieces in progress:
                    reason = completions[i].reason
                    if text or reason or (asked.logprobs and pieces):
                        yield event(piece_of_answer(asked, name, i, text, pieces, reason, first=i not in begun))
                        begun.add(i)
            if asked.include_usage:
                usage = {"choices": [], "usage": usage_of(job.prompts, completions)}
                yield event(piece_of_answer(asked, name, 0, "", [], None) | usage)
        except Refusal as e:  # the status has been sent already
            yield event(e.body)
        yield b"data: [DONE]\n\n"

    async def feedback(self, request):
        if not self.journal:
            raise Refusal(404, "nothing is kept here; start serve.py with --feedback=DIRECTORY")
        return await (self.take_feedback if request.method == "POST" else self.show_feedback)(request)

    async def take_feedback(self, request):
        entry = read_body(await body_of(request))
        try:
            kind, row = read_entry(entry)
        except (ValueError, RecursionError) as e:
            raise Refusal(400, reason(e)) from None
        try:
            new = await asyncio.wrap_future(self.journal.append(kind, row))
        except ValueError as e:
            raise Refusal(409, str(e)) from None
        except OSError as e:
            raise Refusal(507, f"not stored: {e.strerror}; send it again later") from None
        return JSONResponse({"stored": kind, "new": new})

    async def show_feedback(self, request):
        """Counts, win rates, the newest rows, and the commands that train on them."""
        journal, config = self.journal, self.config
        newest = [row for kind in KINDS for row in list(journal.newest[kind])]
        newest.sort(key=lambda row: row.get("time") or 0, reverse=True)
        votes, matches = Counter(), dict(journal.matches)  # votes of each model
        for (model, other, _), n in matches.items():
            votes.update({model: n, other: n})
        most = {model for model, _ in votes.most_common(MOST_MODELS)}  # all would fill the memory
        matches = {match: n for match, n in matches.items() if most.issuperset(match[:2])}
        rates = await asyncio.to_thread(bradley_terry, matches, seed=0)
        flags = [f"--init={config.model}", f"--feedback={config.feedback}", f"--rounds={config.follow or 'out/rounds'}"]
        sharpen = shlex.join(["python", "sharpen.py", *flags])
        commands = [sharpen, f"{sharpen} --method=ppo"]
        shown = {"counts": dict(journal.counts), "win_rates": rates, "newest": newest[:20], "commands": commands}
        return JSONResponse(shown)

    async def download(self, request):
        kind = request.path_params["kind"]
        if not self.journal or kind not in KINDS:
            raise Refusal(404, "there is no such file")
        try:
            content = await asyncio.to_thread(self.journal.stored, kind)
        except OSError as e:
            raise Refusal(404, f"{kind}.jsonl: {e.strerror}; start serve.py again, which makes a new one") from None
        return Response(content, media_type="application/x-ndjson")


# --------------------------------------------------------------------------------------------------
# Redeploying


def follow(server, folder):
    """Serve the newest finished run from now on; what is being answered ends on the old one."""
    failed, retry_at, said = None, 0.0, ""
    while True:
        newest = None
        try:
            newest = newest_finished(folder)
            is_new = newest not in (None, Path(server.models[0].name))
            if is_new and (newest != failed or time.monotonic() >= retry_at):
                server.models = [load(newest), *server.models[1:]]
                print0(f"{newest} answers from now on")
        except Exception as e:  # damaged, or being copied or moved right now: the old one stays
            failed, retry_at = newest, time.monotonic() + RETRY_SECONDS
            warning = f"warning: {newest or folder} is not served: {e}"
            if warning != said:
                print0(warning)
            said = warning
        time.sleep(FOLLOW_SECONDS)


def load_first(config):
    """The newest finished run, or --model if there is none or it is damaged."""
    newest = newest_finished(config.follow) if config.follow else None
    try:
        return load(newest or config.model)
    except UserError as e:
        if not newest:
            raise
        print0(f"warning: {newest} is not served: {e}")
        return load(config.model)


def load(name):
    """The Served of a checkpoint, on the CPU until the model thread takes it."""
    folder = checkpoint.find(name)
    speaker = sample.load(folder, "cpu")
    return Served(str(folder), speaker.model, speaker.tok, speaker.is_chat_model)


# --------------------------------------------------------------------------------------------------
# The app


def static(name, kind):
    """A route's answer: a file of web/, as it was when the server started."""
    content = (WEB / name).read_bytes()

    async def show(request):
        return Response(content, media_type=kind)

    return show


def make_app(server):
    index = static("index.html", "text/html")
    routes = [
        Route("/", index),
        Route("/feedback", index),
        Route("/app.js", static("app.js", "text/javascript")),
        Route("/style.css", static("style.css", "text/css")),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.show_model),
        Route("/v1/chat/completions", server.complete, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/feedback", server.feedback, methods=["GET", "POST"]),
        Route("/v1/feedback/{kind}.jsonl", server.download),
    ]
    return Guard(Starlette(routes=routes, exception_handlers=HANDLERS), server.config)


async def run(config, models, journal, device, listening):
    thread = ModelThread(device, config.slots, asyncio.get_running_loop())
    thread.start()
    server = Server(config, models, journal, thread)
    if config.follow:
        threading.Thread(target=follow, args=(server, config.follow), daemon=True).start()
    settings = {"http": Impatient, "ws": "none", "lifespan": "off", "proxy_headers": False, "server_header": False}
    settings |= {"log_level": "critical", "access_log": False}  # errors are told by HANDLERS; Ctrl-C is none
    connections = 1000 + len(models) * (config.slots + config.queue)  # all that may wait, and others
    limits = {"timeout_keep_alive": PATIENCE, "limit_concurrency": connections, "timeout_graceful_shutdown": 2}
    host = f"[{config.host}]" if ":" in config.host else config.host
    where = f"http://{host}:{listening.getsockname()[1]}"
    print0(f"{', '.join(served.name for served in models)}: chat at {where}, OpenAI's API at {where}/v1")
    await uvicorn.Server(uvicorn.Config(make_app(server), **settings, **limits)).serve(sockets=[listening])


def main(config):
    check_ranges(config)
    loopback = config.host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(config.host).is_loopback
    if not (loopback or config.api_key):
        raise UserError(f"--host={config.host}: others could reach this server; give them a key with --api_key")
    device = setup(config.device, 0)
    models = [load_first(config), *([load(config.compare)] if config.compare else [])]
    journal = Journal(config.feedback) if config.feedback else None
    gc.collect()
    gc.freeze()  # each full collection would look at all that torch has loaded, and stop all streams for 0.15 s
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as e:
        where = f"--host={config.host} --port={config.port}"
        raise UserError(f"{where}: {e.strerror}; choose another port, or 0 for any free one") from None
    asyncio.run(run(config, models, journal, device, listening))


if __name__ == "__main__":
    launch(main, Config)
