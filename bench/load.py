"""serve.py under load, against rollout() on the same requests without a server.

64 clients on raw sockets ask for --seconds, each at once again when it is answered; clients, server
and model share this machine. Whole answers, streamed ones, and the same requests without a server
take turns, --parts times. Then others misbehave meanwhile: 100 connections say nothing, one does
not read, and broken JSON, huge bodies and floods of headers come in. Last, the server's memory is
watched over --requests short requests.

Two shares of offline speed are printed: of tokens a second, and of tokens a second of the
processor, which other work on the machine disturbs less. Last line of output: JSON.

    python -m bench.load --model=out/quickstart/sft --data=out/quickstart/world/prompts.jsonl
"""

import contextlib
import json
import math
import os
import re
import selectors
import socket
import statistics
import threading
import time
from dataclasses import dataclass, field
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
    # of whole answers, and as many of streamed ones [> 0]
    seconds: float = 60.0
    # turns that these are cut into [>= 1]
    parts: int = 3
    # longest answer [>= 1]
    max_tokens: int = 64
    # over which the memory is watched; 0: not
    requests: int = 10_000
    # longest answer of these [>= 1]
    short: int = 4


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


@dataclass
class Load:
    """What came of some load."""

    tokens: int = 0
    seconds: float = 0.0
    cpu: float = 0.0  # seconds of the processor that the server took
    first: list = field(default_factory=list)  # seconds to each first token; of a whole answer, to all of it
    numbers: list = field(default_factory=list)  # of the requests

    def __add__(self, other):
        return Load(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


def body_of(prompts, number, max_tokens, stream):
    fields = {"messages": prompts[number % len(prompts)], "seed": number, "max_tokens": max_tokens}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields).encode()


def cpu_of(pid):
    """Seconds of the processor that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(clients, server, port, prompts, max_tokens, stream=False, seconds=math.inf, most=math.inf):
    """The Load of so many clients, who ask for so long or so often; all that is asked is answered.

    Raises UserError if an answer is an error.
    """
    select, result, begin, cpu = selectors.DefaultSelector(), Load(), time.perf_counter(), cpu_of(server.pid)
    asked = 0

    def ask(client):
        nonlocal asked
        client.ask(asked, body_of(prompts, asked, max_tokens, stream))
        asked += 1

    for _ in range(clients):
        ask(Client(port, select))
    while len(result.numbers) < asked:
        for key, _ in select.select(timeout=1):
            client = key.data
            if not client.read():
                continue
            if b" 200 OK" not in client.buffer[:20] or b'"error"' in client.buffer:
                raise UserError(f"an answer under load: {client.buffer[-300:]}")
            result.tokens += int(re.findall(rb'"completion_tokens":(\d+)', client.buffer)[-1])
            result.first.append(client.first or time.perf_counter() - client.begin)
            result.numbers.append(client.number)
            if time.perf_counter() < begin + seconds and asked < most:
                ask(client)
    for key in list(select.get_map().values()):
        key.data.socket.close()
    result.seconds, result.cpu = time.perf_counter() - begin, cpu_of(server.pid) - cpu
    return result


def offline(clients, model, tok, prompts, max_tokens, numbers):
    """The Load that these requests are to a Sampler alone."""
    stop = {tok.eot, chat.end_of_turn(tok)}
    begin, cpu, result = time.perf_counter(), time.process_time(), Load()
    sampler = Sampler(model, clients, model.config.context)
    for number in numbers:
        ids = chat.encode_prompt(tok, prompts[number % len(prompts)])
        sampler.add([ids], max_new_tokens=max_tokens, seed=number, stop=stop)
    while sampler.busy:
        result.tokens += sum(len(sample.tokens) for sample in sampler.step())
    result.seconds, result.cpu = time.perf_counter() - begin, time.process_time() - cpu
    return result


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


def compare(served, alone):
    """What there is to say of a Load and of the same requests without a server."""
    if served.tokens != alone.tokens:
        raise UserError(f"{served.tokens} tokens were served, but offline there are {alone.tokens}")
    rate, cpu_rate = served.tokens / served.seconds, served.tokens / served.cpu
    share, cpu_share = alone.seconds / served.seconds, alone.cpu / served.cpu
    print(
        f"  {len(served.numbers):,} answers of {served.tokens / len(served.numbers):.0f} tokens; {rate:,.0f} tokens/s, "
        f"{share:.2f} of offline; {cpu_rate:,.0f} tokens/s of the processor, {cpu_share:.2f} of offline"
    )
    return {"tokens_per_s": rate, "share": share, "tokens_per_cpu_s": cpu_rate, "cpu_share": cpu_share}


def main(config):
    check_ranges(config)
    device = setup("cpu", 0)
    prompts = [messages for messages, _ in rows.read(config.data, rows.prompt_only)[0]]
    model, tok, _ = checkpoint.load(config.model)
    server, address = start_server(model=Path(config.model).resolve(), slots=config.clients, device="cpu")
    port, found = int(address.rpartition(":")[2]), describe(device)
    some = config.clients, server, port, prompts
    try:
        load(*some, config.max_tokens, seconds=2.0)  # warms up
        load(*some, config.max_tokens, stream=True, seconds=2.0)
        served = {"whole": Load(), "streamed": Load()}
        alone = {"whole": Load(), "streamed": Load()}
        for _ in range(config.parts):
            for name in served:
                part = load(*some, config.max_tokens, name == "streamed", config.seconds / config.parts)
                served[name] += part
                alone[name] += offline(config.clients, model, tok, prompts, config.max_tokens, part.numbers)
        for name in served:
            print(f"{name}: first token (whole: the answer) after {milliseconds(served[name].first)} ms", flush=True)
            found[name] = compare(served[name], alone[name]) | milliseconds(served[name].first)
        ended, statuses = threading.Event(), {}
        others = threading.Thread(target=lambda: statuses.update(misbehave(port, ended)))
        others.start()
        part = load(*some, config.max_tokens, True, config.seconds / config.parts)
        ended.set()
        others.join()
        rate = part.tokens / part.seconds
        print(f"while others misbehave: {rate:,.0f} tokens/s, first token after {milliseconds(part.first)} ms")
        print(f"  to them: { ({name: sorted(codes) for name, codes in statuses.items()}) }", flush=True)
        found["disturbed"] = {"tokens_per_s": rate, **milliseconds(part.first)}
        if config.requests:
            memory = [memory_of(server.pid)]
            for _ in range(4):
                load(*some, config.short, most=config.requests // 4)
                memory.append(memory_of(server.pid))
                print(f"memory: {memory[-1]:.1f} MB after {config.requests // 4:,} requests more", flush=True)
            found["memory"] = {"MB": memory, "requests": config.requests}
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
