"""serve.py over real HTTP: OpenAI's API by its own client, what is refused, who may ask, clients
that leave or dawdle, votes that a kill does not lose, new checkpoints, the page in a browser."""

import asyncio
import json
import re
import resource
import shutil
import signal
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import random_model
from hypothesis import HealthCheck, given, settings, strategies as st
from runs import refused, save, start, wait_until

import engine
import serve
from bench import browser
from bench.child import Child, run_script
from data import chat, feedback, tokenizer
from data.openai import INERT, READ_CHAT, READ_TEXT
from data.pack import make_completion
from data.rows import message
from model import completion_logprobs
from rollout import rollout, stream
from runtime import checkpoint, http

TOK = tokenizer.byte_level()
ENDS = {TOK.eot, chat.end_of_turn(TOK)}
HI = [message("user", "hi")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints: "wild" has random weights, "base" too and is no chat model; "endless" says x."""
    folder = tmp_path_factory.mktemp("models")
    save(random_model, folder / "wild", "sft", context=300)
    save(random_model, folder / "base", "pretrain", seed=1)
    browser.endless(folder / "endless")
    return folder


class Served:
    """A server in a forked child."""

    def __init__(self, path, patience=None, **flags):
        def run(argv):
            http.PATIENCE = serve.PATIENCE = patience or http.PATIENCE
            serve.FOLLOW_SECONDS, serve.MOST_MODELS = 0.1, 8
            run_script(serve, argv)

        argv = [f"--{name}={value}" for name, value in ({"device": "cpu", "port": 0} | flags).items()]
        self.child = Child(path, run, argv)
        wait_until(lambda: "chat at http" in self.child.output(), self.child)
        self.url = re.search(r"http://[^ /]+:(\d+)", self.child.output())[0]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def ask(self, messages=HI, path="/v1/chat/completions", **fields):
        return self.http.post(path, json={"messages": messages} | fields)

    def client(self, kind=openai.OpenAI, key="any", http_client=httpx.Client):
        http_client = http_client(trust_env=False)
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=http_client)

    def raw(self, data, seconds=10):
        """What the server answers to these bytes until it closes or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as s:
            s.sendall(data)
            answer = b""
            try:
                while piece := s.recv(65536):
                    answer += piece
            except (TimeoutError, ConnectionResetError):
                pass
            return answer

    def stop(self):
        self.child.send(9)
        self.child.wait()


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    served = Served(
        folder / "output.txt", model=models / "wild", compare=models / "endless", feedback=folder / "feedback"
    )
    yield served
    served.stop()


@pytest.fixture
def serving(tmp_path):
    """A function: flags -> a Served of its own."""
    started = []

    def begin(**flags):
        started.append(Served(tmp_path / f"server{len(started)}.txt", **flags))
        return started[-1]

    yield begin
    for served in started:
        served.stop()


def expected(run, messages, max_new_tokens, **options):
    """The ids that a checkpoint answers."""
    model, tok, _ = checkpoint.load(run)
    return list(stream(model, chat.encode_prompt(tok, messages), max_new_tokens=max_new_tokens, stop=ENDS, **options))


def text_of(ids):
    return b"".join(TOK.decode_single_token_bytes(i) for i in ids if i < 256).decode("utf-8", "replace")


def answer_of(server, path):
    """What a serve.Server answers, without a network."""

    async def ask():
        transport = httpx.ASGITransport(serve.make_app(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    return asyncio.run(ask())


# --------------------------------------------------------------------------------------------------
# OpenAI's API


def test_answers_are_those_of_the_sampler_whole_and_streamed(server, models):
    client = server.client()
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}, {"seed": -1}):
        sampling = {"temperature": 1.0} | options | {"seed": options.get("seed", 0) % 2**64}
        ids = expected(models / "wild", HI, 30, **sampling)
        request = {"model": "latest", "messages": HI, "max_tokens": 30} | options
        whole = client.chat.completions.create(**request)
        assert whole.choices[0].message.content == text_of(ids)
        assert whole.choices[0].finish_reason == ("stop" if ids[-1] in ENDS else "length")
        assert whole.usage.completion_tokens == len(ids)
        assert whole.usage.prompt_tokens == len(chat.encode_prompt(TOK, HI))
        pieces = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text_of(ids)
        assert pieces[-1].usage == whole.usage and pieces[0].choices[0].delta.role == "assistant"
        assert {p.model for p in pieces} == {whole.model} == {str(models / "wild" / "step_000001")}


def test_the_same_seed_gives_the_same_text_alone_and_under_load(server, models):
    async def crowd():
        client = server.client(openai.AsyncOpenAI, http_client=httpx.AsyncClient)

        async def one(seed):
            request = {"model": "latest", "messages": HI, "max_tokens": 20 + seed % 7, "seed": seed}
            if seed % 2:
                return (await client.chat.completions.create(**request)).choices[0].message.content
            pieces = await client.chat.completions.create(**request, stream=True)
            return "".join([p.choices[0].delta.content or "" async for p in pieces])

        return await asyncio.gather(*map(one, range(24)))

    answers = asyncio.run(crowd())
    assert len(set(answers)) > 20
    for seed in (0, 1, 17, 22):
        assert answers[seed] == text_of(expected(models / "wild", HI, 20 + seed % 7, seed=seed))


def test_several_answers_to_one_question(server, models):
    model = checkpoint.load(models / "wild")[0]
    samples = rollout(model, [chat.encode_prompt(TOK, HI)], n=3, max_new_tokens=12, seed=4, stop=ENDS)
    answer = server.ask(n=3, max_completion_tokens=12, seed=4).json()
    assert [c["message"]["content"] for c in answer["choices"]] == [text_of(s.tokens) for s in samples]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]


def test_log_probabilities_are_those_of_the_model(server, models):
    answer = server.ask(max_tokens=8, seed=2, logprobs=True, stream=False).json()["choices"][0]
    ids = expected(models / "wild", HI, 8, seed=2)
    model = checkpoint.load(models / "wild")[0]
    logp = completion_logprobs(model, [make_completion(chat.encode_prompt(TOK, HI), ids)])
    found = answer["logprobs"]["content"]
    assert [bytes(t["bytes"]) for t in found] == [TOK.decode_single_token_bytes(i) for i in ids if i < 256]
    assert torch.allclose(torch.tensor([t["logprob"] for t in found]), logp[[i < 256 for i in ids]], atol=1e-4)
    pieces = server.client().chat.completions.create(
        model="latest", messages=HI, max_tokens=8, seed=2, logprobs=True, stream=True
    )
    streamed = [t.logprob for p in pieces if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert streamed == [t["logprob"] for t in found]


def test_texts_are_continued(server, models):
    model = checkpoint.load(models / "wild")[0]
    prompts = [[TOK.eot, *b"Ada"], [TOK.eot, *b"Bob and"]]
    samples = rollout(model, prompts, max_new_tokens=16, seed=3, stop={TOK.eot})
    answer = server.client().completions.create(model="latest", prompt=["Ada", "Bob and"], seed=3, logprobs=0)
    assert [c.text for c in answer.choices] == [TOK.decode([i for i in s.tokens if i != TOK.eot]) for s in samples]
    assert answer.choices[0].logprobs.text_offset[0] == 0 and answer.object == "text_completion"


def test_a_stop_string_ends_an_answer_and_is_never_shown(server, models):
    text = text_of(expected(models / "wild", HI, 40, seed=9))
    stop = next(text[i : i + 3] for i in range(5, 40) if text.find(text[i : i + 3]) == i)
    whole = server.ask(seed=9, max_tokens=40, stop=[stop, "never"]).json()["choices"][0]
    assert whole["message"]["content"] == text[: text.find(stop)] and whole["finish_reason"] == "stop"
    # streamed, no piece may show the beginning of a stop string that then comes
    request = {"model": str(models / "endless"), "messages": HI, "max_tokens": 400, "stream": True}
    pieces = list(server.client().chat.completions.create(**request, stop="x" * 200))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == ""
    assert pieces[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_p": 0.1}, "min_p"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": 1.0}, "n"),
        ({"seed": True}, "seed"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": False}, "stop"),
        ({"stop": 0}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": "gpt-4"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [message("assistant", "hi")]}, "messages"),
        ({"messages": [*HI, message("assistant", "yes")]}, "messages"),
        ({"messages": [*HI, *HI]}, "messages"),
        ({"messages": [HI[0] | {"tool_calls": [1]}]}, "messages"),
        ({"messages": [message("user", [{"type": "image_url"}])]}, "messages"),
        ({"messages": [message("user", [{"type": "text", "text": "hi"}, {"type": "text", "text": None}])]}, "messages"),
        ({"messages": [message("user", [{"type": "text", "text": "hi"}, {"type": "text", "text": 5}])]}, "messages"),
        ({"messages": [message("user", [{"type": "text", "text": "hi"}, {"type": "text"}])]}, "messages"),
        ({"messages": [message("user", "y" * 290)]}, "messages"),
        ({"messages": [message("user", "y" * 90_000)]}, "messages"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused_by_name(server, fields, param):
    answer = server.ask(**({"max_tokens": 1} | fields))
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400) and error["param"] == param
    assert error["type"] == "invalid_request_error" and param.split("[")[0] in error["message"]


@pytest.mark.parametrize("asked", [1, 5, -1, True, 0.0, "0", [0]])
def test_a_text_has_the_log_probabilities_of_its_own_tokens_alone(server, asked):
    answer = server.http.post("/v1/completions", json={"prompt": "Ada", "logprobs": asked, "max_tokens": 1})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "logprobs"
    assert error["message"].startswith("logprobs: 0 was expected, for the tokens that are drawn; of others")


def test_fields_at_their_defaults_are_taken(server):
    nothing = dict.fromkeys(READ_CHAT | set(INERT) | {"user"}) | {"messages": HI, "max_tokens": 3}
    assert server.http.post("/v1/chat/completions", json=nothing).status_code == 200
    defaults = {name: values[0] for name, values in INERT.items()} | {"user": None, "logprobs": False}
    parts = [message("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])]
    assert server.ask(max_tokens=3, seed=1, **defaults).status_code == 200
    same = [server.ask(messages, max_tokens=3, seed=1).json()["choices"] for messages in (HI, parts)]
    assert same[0] == same[1]


def test_both_limits_hold(server):
    for limits in ({"max_tokens": 3, "max_completion_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 3}):
        assert server.ask(model="latest", seed=1, **limits).json()["usage"]["completion_tokens"] == 3
    text = {"prompt": "Ada", "max_completion_tokens": 3}  # which is no field there
    assert "max_completion_tokens" in server.http.post("/v1/completions", json=text).json()["error"]["message"]


def test_what_can_never_be_answered_is_not_to_be_tried_again(server):
    for n, prompts in ((128, ["a", "b", "c"]), (3, ["a"] * 128)):
        answer = server.http.post("/v1/completions", json={"prompt": prompts, "n": n, "max_tokens": 1})
        assert answer.status_code == 400 and "384 completions" in answer.json()["error"]["message"]


def test_a_body_may_have_a_byte_order_mark(server):
    body = b"\xef\xbb\xbf" + json.dumps({"messages": HI, "max_tokens": 1}).encode()
    assert server.http.post("/v1/chat/completions", content=body).status_code == 200


def test_a_model_is_found_by_every_name_that_it_answers_to(server, models):
    client, wild = server.client(), str(models / "wild" / "step_000001")
    for name in (wild, str(models / "wild"), "latest"):
        assert client.models.retrieve(name).id == wild
    assert client.models.retrieve(str(models / "endless")) == client.models.list().data[1]
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
        client.models.retrieve("gpt-4")


def test_a_wrong_method_is_told_the_right_ones(server):
    for path, allowed in (("/v1/chat/completions", {"POST"}), ("/v1/feedback", {"GET", "HEAD", "POST"})):
        answer = server.http.delete(path)
        assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == allowed


def test_a_bug_is_a_line_on_the_terminal_and_an_error_in_openais_shape(capsys):
    answer = answer_of(serve.Server(serve.Config("m"), [None], None, None), "/v1/models")  # a model that is none
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "/v1/models" in answer.json()["error"]["message"] and "nosniff" in str(answer.headers)
    said = capsys.readouterr().out
    assert said.startswith("error: GET '/v1/models': AttributeError(") and said.count("\n") == 1


def test_a_base_model_continues_texts_and_does_not_chat(serving, models):
    served = serving(model=models / "base")
    assert "not a chat model" in served.ask().json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="not a chat model"):
        served.client().chat.completions.create(model="latest", messages=HI)
    assert served.client().completions.create(model="latest", prompt="Ada").usage.completion_tokens > 0
    assert served.client().models.list().data[0].id == str(models / "base" / "step_000001")
    assert served.http.get("/v1/feedback").status_code == 404  # nobody asked for votes


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
likely = st.sampled_from([HI, "hi", ["hi"], 0, 1, 0.5, 1e-300, True, False, None, {"include_usage": True}, "x"])
fields = sorted(READ_CHAT | READ_TEXT | set(INERT))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/feedback"]),
    body=st.dictionaries(st.sampled_from([*fields, "vote", "answers", "models", "seeds", "by"]), likely | anything),
)
def test_no_body_makes_a_server_error(server, path, body):
    body = {"messages": HI, "prompt": HI if "feedback" in path else "hi", "max_tokens": 2} | body
    if "chat" in path:
        del body["prompt"]
    elif "feedback" not in path:
        del body["messages"]
    answer = server.http.post(path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404, 409), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"n": NaN}', b'{"n": 1e999}', b"[" * 100_000, b"\xff", b'"\\ud800"']
)
def test_a_body_that_is_no_json_is_refused(server, body):
    for path in ("/v1/chat/completions", "/v1/feedback"):
        answer = server.http.post(path, content=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("depth", range(800, 1000, 15))
def test_a_body_nested_as_deep_as_can_be_parsed_is_refused(server, depth):
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    for path, body in {
        "/v1/chat/completions": b'{"messages": [{"role": "system", "content": %s}]}' % nested,
        "/v1/feedback": b'{"label": true, "answer": "x", "prompt": [{"role": "user", "content": "q", "tools": %s}]}'
        % nested,
    }.items():
        answer = server.http.post(path, content=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


# --------------------------------------------------------------------------------------------------
# Clients that leave, wait or dawdle


def head(length):
    lines = "POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {length}"
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_client_that_leaves_frees_its_slot_and_too_many_are_told_to_come_again(serving, models):
    served = serving(model=models / "endless", slots=1, queue=2)
    sockets = []
    for streamed in (True, False, True):  # one is answered, two wait
        body = json.dumps({"messages": HI, "max_tokens": 3900, "stream": streamed}).encode()
        sockets.append(socket.create_connection(("127.0.0.1", served.port), 10))
        sockets[-1].sendall(head(len(body)) + body)
    assert b"200 OK" in sockets[0].recv(1000) and b"200 OK" in sockets[2].recv(1000)
    time.sleep(0.2)
    answer = served.ask(max_tokens=1)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    for s in sockets:
        s.close()
    begin = time.monotonic()
    while (answer := served.ask(max_tokens=1)).status_code == 429 and time.monotonic() < begin + 10:
        time.sleep(0.01)
    assert answer.json()["choices"][0]["message"]["content"] == "x"
    assert time.monotonic() - begin < 2  # 3 times 3,900 tokens take far longer


def test_requests_that_come_together_are_counted_together(models):
    async def ask_at_once(n):
        config = serve.Config(model=str(models / "wild"), slots=1, queue=2)
        thread = engine.ModelThread("cpu", 1, asyncio.get_running_loop())  # not started: all that is taken waits
        app = serve.make_app(serve.Server(config, [serve.load(config.model)], None, thread))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"messages": HI, "max_tokens": 1}
            asked = [asyncio.ensure_future(client.post("/v1/chat/completions", json=body)) for _ in range(n)]
            answered, waiting = await asyncio.wait(asked, timeout=3)
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return [one.result().status_code for one in answered]

    assert asyncio.run(ask_at_once(20)) == 17 * [429]


def test_each_model_has_a_queue_of_its_own_behind_the_slots_that_fit(models):
    async def ask():
        config = serve.Config(model=str(models / "wild"), compare=str(models / "base"), slots=4, queue=2)
        served = [serve.load(config.model), serve.load(config.compare)]
        served[0].slots = 1  # as after `start`, when no more fit into the memory
        thread = engine.ModelThread("cpu", 4, asyncio.get_running_loop())  # not started: all that is taken waits
        app = serve.make_app(serve.Server(config, served, None, thread))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:

            async def status(model, n):
                """Of n completions; None if they wait."""
                body, taken = {"model": model, "prompt": "hi", "n": n, "max_tokens": 1}, thread.inbox.qsize()
                asked = asyncio.ensure_future(client.post("/v1/completions", json=body))
                waiting.append(asked)
                while not asked.done() and thread.inbox.qsize() == taken:
                    await asyncio.sleep(0.001)
                return asked.result().status_code if asked.done() else None

            waiting = []
            found = [await status(model, n) for model in (config.model, config.compare) for n in (4, 7, 3, 1, 3)]
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return found

    assert asyncio.run(ask()) == [400, 400, None, 429, 429] + [None, 400, 429, None, 429]


def test_as_many_may_connect_as_may_wait(server):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip("a process may not open as many files here")
    clients = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(1010)]
    clients[-1].sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")  # when all are connected
    assert b"200 OK" in clients[-1].recv(4096)
    for s in clients:
        s.close()


def test_ctrl_c_while_somebody_streams_is_no_traceback(serving, models):
    served = serving(model=models / "endless")
    running = iter(server_events(served, max_tokens=3900))
    next(running)
    served.child.send(signal.SIGINT)
    time.sleep(0.2)
    served.child.send(signal.SIGINT)  # once more: it waits no longer for the stream
    _, output = served.child.wait(20)
    assert output.count("\n") == 1, output


def test_idle_and_slow_clients_are_dropped_and_others_are_served(serving, models):
    served = serving(model=models / "endless", patience=0.5)
    idle = [socket.create_connection(("127.0.0.1", served.port), 10) for _ in range(100)]
    slow = socket.create_connection(("127.0.0.1", served.port), 10)
    slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
    begun = socket.create_connection(("127.0.0.1", served.port), 10)
    begun.sendall(head(100) + b'{"messages')
    assert served.ask(max_tokens=5).status_code == 200
    for s in (*idle, slow):
        assert s.recv(10) == b""
        s.close()
    assert b"408" in begun.recv(20)
    begun.close()
    # a second request on the same connection whose head never ends
    again = socket.create_connection(("127.0.0.1", served.port), 10)
    again.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in again.recv(4096)
    again.sendall(b"GET /v1/mod")
    while piece := again.recv(4096):
        assert b"HTTP" not in piece
    again.close()
    # a body that goes on after its request has been answered
    answered = socket.create_connection(("127.0.0.1", served.port), 10)
    answered.sendall(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
    assert b"405" in answered.recv(4096)
    answered.sendall(b"x")
    while answered.recv(4096):
        pass
    answered.close()


def test_one_who_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(http, "PATIENCE", 0.05)

    async def serve_and_read_nothing():
        given_up = asyncio.Event()

        async def events():
            try:
                while True:
                    yield b"x" * 2**16
                    await asyncio.sleep(0)
            finally:
                given_up.set()

        async def app(scope, receive, send):
            await http.EventStream(events())(scope, receive, send)

        settings = uvicorn.Config(app, http=http.Impatient, lifespan="off", log_level="error")
        with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
            server = uvicorn.Server(settings)
            running = asyncio.create_task(server.serve(sockets=[listening]))
            client.connect(listening.getsockname())
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            try:
                await asyncio.wait_for(given_up.wait(), timeout=20)
            finally:
                server.should_exit = server.force_exit = True
                await running

    asyncio.run(serve_and_read_nothing())


def test_large_and_broken_requests_are_refused_and_others_are_served(server):
    assert b"413" in server.raw(head(2**21) + b" " * 2**21, 3)[:20]
    assert b"400" in server.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000, 3)[:20]
    assert b"400" in server.raw(b"\x16\x03\x01 nonsense\r\n\r\n", 3)[:20]
    for path in (b"/v1/chat/completions", b"/v1/feedback"):  # they leave in the middle of a body, or it is none
        start = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\n"
        assert b"Invalid" in server.raw(start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 3)
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            s.sendall(start + b"Content-Length: 100\r\n\r\n{")
    assert server.ask(max_tokens=1).status_code == 200
    assert server.child.output().count("\n") == 1  # what strangers do does not fill the terminal


# --------------------------------------------------------------------------------------------------
# Who may ask


def test_pages_of_other_sites_and_other_names_are_refused(serving, models):
    served = serving(model=models / "wild", origin="https://example.org")

    def status(**headers):
        return served.http.get("/v1/models", headers={name.replace("_", "-"): v for name, v in headers.items()})

    assert status(host="evil.example:80").status_code == 403
    assert status(host="[::1").status_code == 403
    assert status(origin="https://evil.example").status_code == status(origin="null").status_code == 403
    assert status(origin=served.url).status_code == status(host="localhost").status_code == 200
    assert "access-control-allow-origin" not in status(origin=served.url).headers
    assert status(origin="https://example.org").headers["access-control-allow-origin"] == "https://example.org"
    asked = served.http.options("/v1/chat/completions", headers={"origin": "https://example.org"})
    assert asked.status_code == 204 and "authorization" in asked.headers["access-control-allow-headers"]
    assert served.http.options("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403


def test_a_host_in_capitals_is_ours():
    assert http.Guard(None, serve.Config(model="m", host="MyBox")).is_ours("mybox:8000")


def test_the_key(serving, models, fork):
    served = serving(model=models / "wild", api_key="ключ-à", host="0.0.0.0")
    served.http.base_url = f"http://127.0.0.1:{served.port}"
    for key in ("", "Bearer", "Bearer wrong", "ключ-à".encode(), b"Bearer \xff", "Basic ключ-à".encode()):
        answer = served.http.get("/v1/models", headers={"authorization": key})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    for right in ("Bearer ключ-à", "bearer ключ-à", "BEARER  ключ-à"):
        assert served.http.get("/v1/models", headers={"authorization": right.encode()}).status_code == 200
    assert served.http.get("/").status_code == served.http.get("/app.js").status_code == 200
    assert "--api_key" in refused(start(fork, serve, model=models / "wild", host="0.0.0.0"))


def test_only_the_page_is_served_and_its_policy_holds(server):
    for path in ("/", "/feedback", "/app.js", "/style.css"):
        answer = server.http.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "unsafe" not in policy and "default-src 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    page = server.http.get("/").text
    assert not re.search(r"\bon\w+=|style=|<script>|https?://", page)  # nothing that the policy would forbid
    for path in (
        "/../serve.py",
        "/web/app.js",
        "/%2e%2e/serve.py",
        "/app.js/../../serve.py",
        "/v1/feedback/..%2fserve.py.jsonl",
    ):
        answer = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b"404" in answer[:20] and b"import" not in answer


# --------------------------------------------------------------------------------------------------
# Votes


def vote(i=0, **fields):
    entry = {"vote": "left", "prompt": [message("user", f"question {i}")], "answers": ["yes", "no"]}
    return entry | {"models": ["a", "b"], "seeds": [1, 2], "by": "Ada"} | fields


def test_a_vote_is_stored_once_and_shown(server):
    def send(**fields):
        return server.http.post("/v1/feedback", json=vote(**fields))

    assert send().json() == {"stored": "pairs", "new": True}
    assert send().json() == {"stored": "pairs", "new": False}  # a client that did not hear the first answer
    assert send(vote="right").status_code == send(vote="tie").status_code == 409
    assert send(by="Bob", vote="tie").json() == {"stored": "ties", "new": True}
    found = server.http.get("/v1/feedback").json()
    assert found["counts"]["pairs"] >= 1 and found["counts"]["tie"] >= 1
    assert found["win_rates"]["a"]["value"] > 0.5 > found["win_rates"]["b"]["value"]
    assert found["newest"][0]["by"] == "Bob" and len(found["commands"]) == 2
    row = json.loads(server.http.get("/v1/feedback/pairs.jsonl").text.splitlines()[0])
    assert row["chosen"] == "yes" and row["models"] == ["a", "b"] and row["by"] == "Ada"
    assert server.http.get("/v1/feedback/secrets.jsonl").status_code == 404


def test_a_file_that_is_gone_is_not_found(tmp_path):
    server = serve.Server(serve.Config("m"), [], feedback.Journal(tmp_path), None)
    assert answer_of(server, "/v1/feedback/ties.jsonl").status_code == 200
    (tmp_path / "ties.jsonl").unlink()
    answer = answer_of(server, "/v1/feedback/ties.jsonl")
    assert answer.status_code == 404 and "ties.jsonl: No such file" in answer.json()["error"]["message"]


def test_votes_on_very_many_models_show_the_rates_of_those_with_most(server):
    for i in range(10):
        server.http.post("/v1/feedback", json=vote(f"often {i}", models=["often", f"rare {i}"]))
    rates = server.http.get("/v1/feedback").json()["win_rates"]
    assert len(rates) <= 8 and rates["often"]["value"] > 0.5


def test_a_kill_loses_no_acknowledged_vote_and_leaves_no_half_line(serving, models, tmp_path):
    flags = {"model": models / "wild", "feedback": tmp_path / "feedback"}
    served, acknowledged = serving(**flags), []

    def voter(k):
        with httpx.Client(base_url=served.url, trust_env=False) as client:
            for i in range(10_000):
                try:
                    answer = client.post("/v1/feedback", json=vote(f"{k}.{i}", answers=["long " * 300, "no"]))
                except httpx.HTTPError:
                    return
                assert answer.json()["new"]
                acknowledged.append(f"question {k}.{i}")

    voters = [threading.Thread(target=voter, args=[k]) for k in range(4)]
    for thread in voters:
        thread.start()
    while len(acknowledged) < 40:
        time.sleep(0.005)
    served.stop()
    for thread in voters:
        thread.join()
    with open(tmp_path / "feedback/pairs.jsonl", "ab") as f:
        f.write(b'{"prompt": [{"role": "us')  # what a kill in the middle of a write leaves
    again = serving(**flags)
    kept = [json.loads(line)["prompt"][0]["content"] for line in open(tmp_path / "feedback/pairs.jsonl")]
    assert set(acknowledged) <= set(kept) and len(set(kept)) == len(kept)
    assert again.http.post("/v1/feedback", json=vote("0.0", answers=["long " * 300, "no"])).json()["new"] is False


def test_a_full_disk_is_told_and_nothing_half_is_left(serving, models, small_disk):
    disk = small_disk(64)
    served = serving(model=models / "wild", feedback=disk)
    statuses = [
        served.http.post("/v1/feedback", json=vote(i, answers=["a" * 9000, "b"])).status_code for i in range(12)
    ]
    assert statuses[0] == 200 and statuses[-1] == 507
    lines = (disk / "pairs.jsonl").read_bytes()
    assert lines.endswith(b"\n") and lines.count(b"\n") == statuses.count(200)
    assert served.ask(max_tokens=1).status_code == 200
    assert served.http.post("/v1/feedback", json=vote("small")).status_code == 200  # there is room for this one


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_the_end_of_a_failed_job_leaves_the_requests_of_the_next_sampler_alone(make_model):
    served, thread = (
        engine.Served("m", make_model(), None, True),
        engine.ModelThread("cpu", 4, asyncio.new_event_loop()),
    )
    failed, later = (engine.Job(served, [[1, 2]], {"max_new_tokens": 5}, False) for _ in range(2))
    thread.add(failed)
    served.writing, served.sampler = {}, None  # as `step` leaves them when the model fails
    thread.add(later)
    thread.cancel(failed, {0})
    assert list(served.writing.values()) == [(later, 0)] and served.sampler.busy
    thread.cancel(later, {0})
    assert not served.writing and not served.sampler.busy


def test_a_server_takes_as_many_slots_as_fit_into_half_of_a_cpus_free_memory(make_model, monkeypatch, capsys):
    model = make_model()
    slot = model.config.slot_bytes(model.config.context, 4)
    for free, slots in ((None, 8), (100 * slot, 8), (7 * slot, 3), (0.5 * slot, 1)):
        monkeypatch.setattr(engine, "available_memory", lambda device, phase, free=free: free and int(free))
        served = engine.Served("m", model, None, True)
        served.start("cpu", 8)
        assert served.sampler.slots == served.slots == slots
        assert (f"{slots} of --slots=8" in capsys.readouterr().out) == (slots < 8)


def test_a_damaged_round_does_not_keep_the_server_from_starting(serving, models, tmp_path):
    model, tok, _ = checkpoint.load(models / "wild")
    step = checkpoint.save(tmp_path / "rounds/1/dpo", model, tok, {"stage": "dpo", "step": 4, "total_steps": 4})
    weights = step / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    served = serving(model=models / "endless", follow=tmp_path / "rounds")
    assert served.ask(max_tokens=1).json()["model"] == str(models / "endless" / "step_000001")
    assert f"warning: {step} is not served" in served.child.output()


def test_the_newest_finished_run_is_followed_and_running_answers_end_on_the_old_one(serving, models, tmp_path):
    rounds = tmp_path / "rounds"
    served = serving(model=models / "endless", follow=rounds)
    old = str(models / "endless" / "step_000001")
    model, tok, _ = checkpoint.load(models / "wild")
    running = iter(server_events(served, max_tokens=3500))
    assert next(running)["model"] == old
    info = {"stage": "dpo", "step": 2, "total_steps": 4}
    checkpoint.save(rounds / "1/dpo", model, tok, info)  # in mid-training
    checkpoint.save(rounds / "1/rm", model, tok, {"stage": "reward", "step": 4, "total_steps": 4})
    time.sleep(0.5)
    assert served.ask(max_tokens=1).json()["model"] == old
    new = str(checkpoint.save(rounds / "1/dpo", model, tok, info | {"step": 4}))
    wait_until(lambda: served.ask(max_tokens=1).json()["model"] == new, served.child)
    assert {next(running)["model"] for _ in range(3)} == {old}
    assert served.ask(max_tokens=1, model=str(models / "endless")).json()["model"] == new  # the flag's name follows


def server_events(served, **fields):
    with served.http.stream("POST", "/v1/chat/completions", json={"messages": HI, "stream": True} | fields) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_a_damaged_model_fails_its_requests_and_the_server_goes_on(serving, models, tmp_path):
    model, tok, _ = checkpoint.load(models / "wild")
    with torch.no_grad():
        model.norm.fill_(1e30)  # finite, but logits overflow
        model.untied_head.mul_(1e15)
    broken = checkpoint.save(tmp_path / "broken", model, tok, {"stage": "sft", "step": 1})
    served = serving(model=broken, compare=models / "wild")
    for streamed in (False, True):
        answer = served.ask(max_tokens=5, stream=streamed)
        assert "not finite" in answer.text and answer.status_code == (200 if streamed else 500)
    assert served.ask(max_tokens=5, model=str(models / "wild")).status_code == 200


def test_what_cannot_be_served_is_refused(models, fork, tmp_path):
    save(random_model, tmp_path / "critic", "reward", scalar_head=True)
    assert "reward model" in refused(start(fork, serve, model=tmp_path / "critic"))
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        assert f"--port={port}" in refused(start(fork, serve, model=models / "wild", port=port))
    for origin in ("example.org", "https://example.org/", "https://Example.org", "null", "*"):
        assert "not as browsers send it" in refused(start(fork, serve, model=models / "wild", origin=origin, port=0))
    assert "--host=no.such.name" in refused(start(fork, serve, model=models / "wild", host="no.such.name", api_key="x"))


def test_an_ipv6_address_is_told_as_a_browser_takes_it(serving, models):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    served = serving(model=models / "wild", host="::1")
    assert served.url.startswith("http://[::1]:") and served.http.get("/v1/models").status_code == 200


# --------------------------------------------------------------------------------------------------
# The page


def test_the_page_in_a_browser(tmp_path):
    pytest.importorskip("playwright")
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("no chromium is here")
    browser.check(tmp_path, tmp_path / "pictures", pictures=False)
