"""OpenAI's wire format: requests for completions read strictly, answers written. Pure text.

The fields that sampling has are read; of all others only the values that change nothing are taken,
so that nothing a client asks for is ignored in silence. Every error is a Refusal, which has the
shape of OpenAI's errors.
"""

import codecs
import json
import time
import uuid
from dataclasses import dataclass, field

from data import chat, read, rows
from runtime.errors import UserError

# Fields that nothing here depends on -> the values that change nothing, besides null
INERT = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "metadata": [{}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
}
READ = {"model", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "top_k", "logprobs"}
READ |= {"max_tokens", "user"}  # a client's name for its user changes no answer
READ_CHAT, READ_TEXT = READ | {"messages", "max_completion_tokens"}, READ | {"prompt"}

LONGEST = 2**31  # tokens, more than any context

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Refusal(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --------------------------------------------------------------------------------------------------
# Requests


@dataclass
class Request:
    """What a client asks for."""

    is_chat: bool
    model: str
    prompts: list  # a list of messages each, or a text each
    n: int
    max_tokens: int  # at most, as far as the context leaves room
    sampling: dict  # temperature, top_p, top_k, seed
    stop: list  # strings
    logprobs: bool
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def read_body(text):
    """The JSON object in a request's body."""
    try:
        return read.parse_row(text.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"the body is not a JSON object: {read.reason(e)}") from None


def read_request(body, is_chat, seed):
    """The Request in the body of /v1/chat/completions, or else of /v1/completions.

    seed: used if the client gives none.
    """
    for name, value in body.items():
        known = name in (READ_CHAT if is_chat else READ_TEXT)
        if not known and value is not None and value not in INERT.get(name, []):
            raise Refusal(400, f"{name}: this server does nothing with it; leave it out", name, "unsupported_parameter")
    n = number(body, "n", 1, 1, 128, int)
    limit = number(body, "max_tokens", LONGEST if is_chat else 16, 1, LONGEST, int)
    limit = min(limit, number(body, "max_completion_tokens", LONGEST, 1, LONGEST, int))
    seed = number(body, "seed", seed, -(2**63), 2**63 - 1, int) % 2**64
    temperature = number(body, "temperature", 1.0, 0, 2)
    sampling = {
        "temperature": temperature if temperature >= 1e-3 else 0,  # or logits overflow; below it all are greedy
        "top_p": number(body, "top_p", 1.0, 0, 1),
        "top_k": number(body, "top_k", 0, 0, 2**31, int),
        "seed": seed,
    }
    stream, options = truth(body, "stream"), body.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict) and set(options) <= {"include_usage"}):
        message = 'stream_options: {"include_usage": true} was expected, with "stream": true'
        raise Refusal(400, message, "stream_options")
    return Request(
        is_chat=is_chat,
        model=read_model(body),
        prompts=[read_messages(body)] if is_chat else read_prompts(body),
        n=n,
        max_tokens=limit,
        sampling=sampling,
        stop=read_stop(body),
        logprobs=truth(body, "logprobs") if is_chat else read_logprobs(body),
        stream=stream,
        include_usage=truth(options or {}, "include_usage"),
    )


def number(body, name, default, low, high, kind=(int, float)):
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        found = json.dumps(value)[:80]
        raise Refusal(400, f"{name}: {what} from {low} to {high} was expected, not {found}", name)
    return value


def truth(body, name):
    value = body.get(name)
    if not (value is None or isinstance(value, bool)):
        raise Refusal(400, f"{name}: true or false was expected", name)
    return bool(value)


def read_logprobs(body):
    """Whether /v1/completions is asked for the log-probabilities of its tokens, by a number."""
    value = body.get("logprobs")
    if value is None:
        return False
    if type(value) is not int or value != 0:
        message = "logprobs: 0 was expected, for the tokens that are drawn; of others this server says nothing"
        raise Refusal(400, message, "logprobs")
    return True


def read_model(body):
    name = "latest" if body.get("model") is None else body["model"]
    if not isinstance(name, str):
        raise Refusal(400, "model: the name of a model was expected; /v1/models lists them", "model")
    return name


def read_stop(body):
    stop = [] if body.get("stop") in (None, "") else body["stop"]
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and len(stop) <= 4 and all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop)):
        raise Refusal(400, "stop: a string or up to 4 were expected, of 1 to 256 characters", "stop")
    return stop


def read_prompts(body):
    """The texts to continue."""
    prompts = body.get("prompt")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not (isinstance(prompts, list) and 0 < len(prompts) <= 128 and all(isinstance(p, str) for p in prompts)):
        raise Refusal(400, "prompt: a text or a list of 1 to 128 texts was expected (no token ids)", "prompt")
    return prompts


def read_messages(body):
    """The messages to answer."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise Refusal(400, "messages: a list was expected", "messages")
    plain = []
    for i, m in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(m, dict):
            raise Refusal(400, f'{where}: {{"role", "content"}} was expected', "messages")
        extra = [name for name, value in m.items() if name not in ("role", "content") and value not in (None, [])]
        if extra:
            raise Refusal(400, f"{where}.{extra[0]}: this server does nothing with it; leave it out", "messages")
        plain.append({"role": m.get("role"), "content": m.get("content")})
    try:
        return rows.ends_with(rows.check_messages(plain), "user", "messages")
    except (ValueError, RecursionError) as e:
        raise Refusal(400, read.reason(e), "messages") from None


def encode_prompts(request, tok, context, is_chat_model):
    """(prompts as token ids, ids that end a completion, ids that are no text).

    Raises Refusal unless each prompt leaves room for an answer in the context.
    """
    field = "messages" if request.is_chat else "prompt"
    if request.is_chat and not is_chat_model:
        raise Refusal(400, f"{request.model} is not a chat model; /v1/completions continues a text", "model")
    # More characters than this cannot fit, and need not be encoded to know it
    if len(json.dumps(request.prompts)) > 8 * context * tok.longest_token * len(request.prompts):
        raise Refusal(400, f"{field}: longer than the context of {context} tokens", field, "context_length_exceeded")
    try:
        if request.is_chat:
            ends = {tok.eot} | chat.stop_ids(tok)
            prompts = [chat.encode_prompt(tok, messages) for messages in request.prompts]
        else:
            ends = chat.text_stop_ids(tok)
            prompts = [[tok.bos, *tok.encode_ordinary(text)] for text in request.prompts]
    except UserError as e:  # a character that this tokenizer does not have
        raise Refusal(400, f"{field}: {e}", field) from None
    if (most := max(map(len, prompts))) >= context:
        message = f"{field}: {most} tokens, but the model's context is {context} and an answer must fit in as well"
        raise Refusal(400, message, field, "context_length_exceeded")
    return prompts, ends, tok.special_ids if request.is_chat else ends


# --------------------------------------------------------------------------------------------------
# Answers


class Completion:
    """One completion as it arrives: tokens become text, and a stop string ends it."""

    def __init__(self, tok, hidden, stop):
        self.tok, self.hidden, self.stop = tok, hidden, stop  # hidden: ids that are no text
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        self.text, self.shown, self.tokens, self.reason = "", 0, 0, None
        self.pieces = []  # (bytes, logprob, place in the text) of each token
        self.reach = max(map(len, stop), default=1) - 1  # a stop string may have begun so far back

    def take(self, tokens, logprobs, reason):
        """(the text that may be shown now, the pieces of these tokens).

        reason: "stop" or "length" if they are the last ones. Sets self.reason when the completion
        has ended, be it by a stop string.
        """
        known = len(self.pieces)
        for token, logprob in zip(tokens, logprobs):
            self.tokens += 1
            if token not in self.hidden:
                piece, length = self.tok.decode_single_token_bytes(token), len(self.text)
                self.pieces.append((piece, logprob, length))
                self.text += self.decoder.decode(piece)
                if self.stop and self.cut(max(0, length - self.reach)):
                    reason = "stop"
                    break
        else:
            self.text += self.decoder.decode(b"", final=bool(reason))
        self.reason = reason
        new = self.text[self.shown : None if reason else len(self.text) - self.held_back()]
        self.shown += len(new)
        return new, self.pieces[known:]

    def cut(self, start):
        """Whether a stop string occurs from `start` on; the text then ends before the first one."""
        places = [place for place in (self.text.find(stop, start) for stop in self.stop) if place >= 0]
        self.text = self.text[: min(places, default=None)]
        return bool(places)

    def held_back(self):
        """How many characters at the end may be the beginning of a stop string."""
        begun = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(begun, default=0)


def logprobs_of(request, pieces):
    """What a client that wants log-probabilities is told of some tokens.

    They are of the distribution that was drawn from: at temperature 0 all are 0.
    """
    if not request.logprobs:
        return None
    texts = [piece.decode("utf-8", "replace") for piece, _, _ in pieces]
    if request.is_chat:
        tokens = [
            {"token": text, "logprob": logprob, "bytes": list(piece), "top_logprobs": []}
            for text, (piece, logprob, _) in zip(texts, pieces)
        ]
        return {"content": tokens, "refusal": None}
    logprobs, places = [p[1] for p in pieces], [p[2] for p in pieces]
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": places}


def model_entry(served):
    """What /v1/models says of a model."""
    entry = {"id": served.name, "object": "model", "created": 0, "owned_by": "feinschliff"}
    return entry | {"context": served.model.config.context, "chat": served.is_chat_model}


def head(request, served_name, piece):
    """The fields that an answer, or a piece of one, begins with."""
    kind = ("chat.completion.chunk" if piece else "chat.completion") if request.is_chat else "text_completion"
    prefix = "chatcmpl-" if request.is_chat else "cmpl-"
    return {"id": prefix + request.id, "object": kind, "created": request.created, "model": served_name}


def whole_answer(request, served_name, completions, usage):
    choices = []
    for i, c in enumerate(completions):
        choice = {"index": i, "finish_reason": c.reason, "logprobs": logprobs_of(request, c.pieces)}
        if request.is_chat:
            choice["message"] = {"role": "assistant", "content": c.text, "refusal": None}
        else:
            choice["text"] = c.text
        choices.append(choice)
    return head(request, served_name, False) | {"choices": choices, "usage": usage}


def piece_of_answer(request, served_name, i, text, pieces, reason, first=False):
    choice = {"index": i, "finish_reason": reason, "logprobs": logprobs_of(request, pieces)}
    if request.is_chat:
        choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    else:
        choice["text"] = text
    usage = {"usage": None} if request.include_usage else {}
    return head(request, served_name, True) | {"choices": [choice]} | usage


def usage_of(prompts, completions):
    asked, answered = sum(map(len, prompts)), sum(c.tokens for c in completions)
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def event(answer):
    """A server-sent event."""
    return f"data: {to_json(answer)}\n\n".encode()
