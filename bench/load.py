"""serve.py under load, against rollout() on the same requests without a server.

64 clients on raw sockets ask for --seconds, each at once again when it is answered; clients, server
and model share this machine. First whole answers, then streamed ones. Meanwhile others misbehave:
100 connections say nothing, one does not read, and broken JSON, huge bodies and floods of headers
come in. Measured: tokens a second, and the same over those of `rollout` on the requests that were
answered; the time to the first token; errors; and the server's memory over --requests requests.
Last line of output: JSON.

    python -m bench.load --model=out/quickstart/sft --data=out/quickstart/world/prompts.jsonl
"""

import contextlib
import json
import re
import selectors
import socket
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from bench.browser import start_server
from data import chat, rows
from rollout import Sampler
from runtime import checkpoint
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # a chat model
    model: str
    # prompts, as of ppo.py
    data: str
    # clients that ask at once [>= 1]
    clients: int = 64
    # of each of the two measurements [> 0]
    seconds: float = 60.0
    # over which the memory is watched; 0: not
    requests: int = 10_000
    # longest answer [>= 1]
    max_tokens: int = 64


class Client:
    """A connection that asks, and notes when and what it was answered."""

    def __init__(self, port, select):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        select.register(self.socket, selectors.EVENT_READ, self)

    def ask(self, number, body):
        self.number, self.buffer, self.first, self.begin = number, b"", None, time.perf_counter()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall(head.encode() + body)

    def read(self):
        """Take in what has come; True if the answer is complete."""
        piece = self.socket.recv(2**18)
        if not piece:
            raise UserError("the server closed a connection")
        self.buffer += piece
        if self.first is None and b"data: " in self.buffer:
            self.first = time.perf_counter() - self.begin
        head, _, body = self.buffer.partition(b"\r\n\r\n")
        if length := re.search(rb"content-length: (\d+)", head):
            return len(body) == int(length[1])
        return self.buffer.endswith(b"0\r\n\r\n")


def body_of(config, prompts, number, stream):
    fields = {"messages": prompts[number % len(prompts)], "seed": number, "max_tokens": config.max_tokens}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields).encode()


def load(config, port, prompts, stream, seconds, most=sys.maxsize):
    """(tokens, seconds, seconds to each first token, numbers of the requests) of so much load."""
    select, asked, tokens, first, answered = selectors.DefaultSelector(), 0, 0, [], []
    begin = time.perf_counter()
    for _ in range(config.clients):
        client = Client(port, select)
        client.ask(asked, body_of(config, prompts, asked, stream))
        asked += 1
    while time.perf_counter() < begin + seconds and len(answered) < most:
        for key, _ in select.select(timeout=1):
            client = key.data
            if not client.read():
                continue
            if b" 200 OK" not in client.buffer[:20] or b'"error"' in client.buffer:
                raise UserError(f"an answer under load: {client.buffer[-300:]}")
            tokens += int(re.findall(rb'"completion_tokens":(\d+)', client.buffer)[-1])
            first.append(client.first or time.perf_counter() - client.begin)
            answered.append(client.number)
            client.ask(asked, body_of(config, prompts, asked, stream))
            asked += 1
    spent = time.perf_counter() - begin
    for key in list(select.get_map().values()):
        key.data.socket.close()
    return tokens, spent, first, answered


def offline(config, model, tok, prompts, numbers):
    """Tokens a second of a Sampler alone on these requests."""
    stop = {tok.eot, chat.end_of_turn(tok)}
    begin, tokens = time.perf_counter(), 0
    sampler = Sampler(model, config.clients, model.config.context)
    for number in numbers:
        ids = chat.encode_prompt(tok, prompts[number % len(prompts)])
        sampler.add([ids], max_new_tokens=config.max_tokens, seed=number, stop=stop)
    while sampler.busy:
        tokens += sum(len(sample.tokens) for sample in sampler.step())
    return tokens / (time.perf_counter() - begin)


def misbehave(port, ended):
    """Idle, slow, broken and huge, until `ended` is set. Says what came back: {what: statuses}."""
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    deaf = socket.create_connection(("127.0.0.1", port))
    body = json.dumps({"messages": [rows.message("user", "hi")], "stream": True, "n": 4}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    deaf.sendall(head % len(body) + body)
    attacks = {
        "broken JSON": head % 9 + b'{"messag"',
        "huge body": head % 2**22 + b" " * 2**22,
        "flood of headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Y: z\r\n" * 100_000,
    }
    answers = {name: set() for name in attacks}
    while not ended.wait(0.5):
        for name, attack in attacks.items():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as s:
                with contextlib.suppress(OSError):
                    s.sendall(attack)
                answers[name].add(s.recv(12)[9:].decode())
    for s in (*idle, deaf):
        s.close()
    return answers


def memory_of(pid):
    """MB that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def milliseconds(first):
    cuts = statistics.quantiles(first, n=100)
    return {"p50": round(1000 * cuts[49], 1), "p99": round(1000 * cuts[98], 1)}


def main(config):
    check_ranges(config)
    device = setup("cpu", 0)
    prompts = [messages for messages, _ in rows.read(config.data, rows.prompt_only)[0]]
    model, tok, _ = checkpoint.load(config.model)
    server, address = start_server(model=Path(config.model).resolve(), slots=config.clients, device="cpu")
    port, found = int(address.rpartition(":")[2]), describe(device)
    try:
        load(config, port, prompts, False, 2.0)  # warms up
        for stream in (False, True):
            name, ended, statuses = "streamed" if stream else "whole", threading.Event(), {}
            others = threading.Thread(target=lambda s=statuses, e=ended: s.update(misbehave(port, e)))
            others.start()
            tokens, spent, first, numbers = load(config, port, prompts, stream, config.seconds)
            ended.set()
            others.join()
            alone = offline(config, model, tok, prompts, numbers)
            rate = tokens / spent
            print(f"{name}: {len(numbers):,} answers, {rate:,.0f} tokens/s, {rate / alone:.2f} of {alone:,.0f} offline")
            print(f"  first token (whole: the answer) after {milliseconds(first)} ms; to others {statuses}", flush=True)
            found[name] = {"tokens_per_s": rate, "offline": alone, "share": rate / alone, **milliseconds(first)}
        if config.requests:
            before = memory_of(server.pid)
            load(config, port, prompts, False, 3600, config.requests)
            found["memory"] = {"before": before, "after": memory_of(server.pid), "requests": config.requests}
            print(f"memory over {config.requests:,} requests: {before:.0f} -> {found['memory']['after']:.0f} MB")
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
