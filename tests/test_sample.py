"""sample.py as a chat: what its models are asked, its commands, Ctrl-C, pipes and terminals; and
one continuation."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, random_model
from runs import SMALL, null_device, refused, save, start, succeeds, wait_until

import sample
from bench.child import run_script
from data import chat, rows, tokenizer
from data.rows import message
from model import completion_logprobs
from optim import Optimizer
from rollout import stream
from runtime import checkpoint
from runtime.errors import UserError

TOK = tokenizer.byte_level()
END = chat.end_of_turn(TOK)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints: "base" is no chat model; "wild" and "small" have random weights; "polite" knows
    by heart what to say; "other" too, under another tokenizer; "endless" says x for ever."""
    folder = tmp_path_factory.mktemp("models")
    save(random_model, folder / "base", "pretrain")
    save(random_model, folder / "wild", "sft", context=300)
    save(random_model, folder / "small", "sft", seed=5)  # a context of 96
    save(random_model, folder / "critic", "reward", scalar_head=True)
    teach(folder / "polite", TOK, {"hi": "süß €!", "bye": "so long"})
    teach(folder / "other", tokenizer.train(["hello there, hi"] * 9, 270), {"hi": "hello there"})
    endless = random_model(**(SMALL | {"context": 4000, "layers": 1}))
    with torch.no_grad():
        for p in endless.parameters():
            p.zero_()
        endless.embed.fill_(1.0)
        endless.norm.fill_(1.0)
        endless.untied_head[ord("x")] = 5.0
    checkpoint.save(folder / "endless", endless, TOK, {"stage": "sft", "step": 1})
    return folder


def teach(run, tok, answers):
    """Save a model that knows {message: answer} by heart, alone and one after the other."""
    model = random_model(**(SMALL | {"vocab_size": tok.n_vocab, "context": 200}))
    optimizer = Optimizer(model, 0.02)
    exchanges = [[message("user", text), message("assistant", answer)] for text, answer in answers.items()]
    chats = [chat.encode(tok, messages) for messages in [*exchanges, sum(exchanges, [])]]
    for _ in range(80):
        completion_logprobs(model, chats).mean().neg().backward()
        optimizer.step(1.0)
    checkpoint.save(run, model, tok, {"stage": "sft", "step": 1})


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function: (model, *lines, FLAG=...) -> (answers, notices): what a chat writes to stdout and
    to stderr if these lines come through a pipe."""

    def run(model, *lines, **flags):
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capsys.readouterr()
        sample.main(sample.Config(**({"model": str(model), "device": "cpu", "max_new_tokens": 20} | flags)))
        return capsys.readouterr()

    return run


def expected(run, messages, seed, max_new_tokens=20):
    """What a checkpoint answers to these messages."""
    model, tok, _ = checkpoint.load(run)
    prompt, stop = chat.encode_prompt(tok, messages), {tok.eot, chat.end_of_turn(tok)}
    return chat.decode_completion(tok, stream(model, prompt, max_new_tokens=max_new_tokens, stop=stop, seed=seed))


def saved(path):
    """The conversations of a file, without the marks of answers that were cut."""
    lines = path.read_text().splitlines()
    return [[message(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in lines]


def contents(messages):
    return [m["content"] for m in messages]


# --------------------------------------------------------------------------------------------------
# One continuation, one answer


def test_one_continuation_and_one_answer(models, talk):
    text = talk(models / "base", prompt="Ada", seed=3).out
    model, tok, _ = checkpoint.load(models / "base")
    ids = stream(model, [tok.eot, *b"Ada"], max_new_tokens=20, stop={tok.eot}, seed=3)
    assert text == "Ada" + tok.decode([i for i in ids if i != tok.eot]) + "\n"
    # without a prompt a base model begins a document, and ends
    assert talk(models / "base", "never read").out == talk(models / "base").out != ""
    assert talk(models / "polite", prompt="hi", temperature=0.0) == ("süß €!\n", "")


def test_a_system_message_is_part_of_what_one_answer_answers(models, talk):
    out = talk(models / "wild", prompt="hi", system="be brief", seed=4).out
    messages = [message("system", "be brief"), message("user", "hi")]
    assert out.strip().startswith(expected(models / "wild", messages, 4)[:3])
    assert out != talk(models / "wild", prompt="hi", seed=4).out


def test_what_cannot_talk_is_refused(models, fork):
    for flags, why in [
        ({"model": models / "critic"}, "reward model, which writes nothing"),
        ({"model": models / "base", "system": "be brief"}, "is not a chat model"),
        ({"model": models / "base", "top_p": 0}, "--top_p=0"),
        ({"model": models / "base", "temperature": -1}, "--temperature=-1"),
        ({"model": models / "base", "max_new_tokens": 0}, "--max_new_tokens=0"),
        ({"model": models / "wild", "prompt": "x" * 999}, "shorten it or the system message"),
    ]:
        assert why in refused(start(fork, sample, device="cpu", **flags))


# --------------------------------------------------------------------------------------------------
# What the model is asked


def test_every_answer_follows_from_the_history_and_a_seed_of_its_own(models, talk, tmp_path):
    lines = ["one", "two", "/retry", "", "/undo", "three", "/system be kind", "four", "/system", "five"]
    flags = {"seed": 7, "system": "be brief", "max_new_tokens": 12}
    talk(models / "wild", *lines, f"/save {tmp_path / 'chat.jsonl'}", **flags)
    (messages,) = saved(tmp_path / "chat.jsonl")
    history = []
    for system, text, seed in [
        ("be brief", "one", 7),
        ("be brief", "three", 10),
        ("be kind", "four", 11),
        ("", "five", 12),
    ]:
        history.append(message("user", text))
        head = [message("system", system)] if system else []
        history.append(message("assistant", expected(models / "wild", head + history, seed, 12)))
    assert messages == history
    assert len(set(contents(messages))) == 8
    talk(models / "wild", *lines, f"/save {tmp_path / 'again.jsonl'}", **flags)
    assert saved(tmp_path / "again.jsonl") == [messages]


def test_retry_draws_another_answer_to_the_same_message(models, talk, tmp_path):
    file = tmp_path / "a.jsonl"
    talk(models / "wild", "hi", f"/save {file}", "/retry", f"/save {file}", max_new_tokens=12)
    first, second = saved(file)
    assert first[0] == second[0] and first[1] != second[1]
    assert second[1]["content"] == expected(models / "wild", [message("user", "hi")], 1, 12)


def test_characters_of_several_tokens_come_out_whole(models, talk):
    output = talk(models / "polite", "hi", "/undo", "bye", temperature=0.0)
    assert output == ("süß €!\nso long\n", "taken back: hi\n")


def test_what_the_context_cannot_hold_is_left_out_and_said_once(models, talk, tmp_path):
    file = tmp_path / "chat.jsonl"
    lines = ["a" * 10, "b" * 10, "c" * 10, "d" * 10]
    _, notices = talk(models / "small", *lines, f"/save {file}", max_new_tokens=8)
    assert notices.count("oldest exchanges are left out") == 1 and "96 tokens" in notices
    (messages,) = saved(file)
    assert len(messages) == 8  # nothing is lost from the conversation itself
    first = 0
    while len(chat.encode_prompt(TOK, messages[first:7])) + 8 > 96:
        first += 2
    assert first > 0 and messages[7]["content"] == expected(models / "small", messages[first:7], 3, 8)


def test_a_message_longer_than_the_context_is_refused_and_the_chat_continues(models, talk, tmp_path):
    file = tmp_path / "a.jsonl"
    _, notices = talk(models / "small", "x" * 100, "hi", f"/save {file}", max_new_tokens=8)
    (line,) = [x for x in notices.splitlines() if x.startswith("error: ")]
    assert "the model's context holds 96" in line
    assert contents(saved(file)[0]) == ["hi", expected(models / "small", [message("user", "hi")], 0, 8)]


def test_an_answer_cut_short_is_said_to_be(models, talk):
    answers, notices = talk(models / "endless", "hi", max_new_tokens=5)
    assert answers == "xxxxx\n" and "(cut after 5 tokens: --max_new_tokens" in notices
    room = 4000 - len(chat.encode_prompt(TOK, [message("user", "x" * 3900)]))
    answers, notices = talk(models / "endless", "x" * 3900, max_new_tokens=500)
    assert answers == "x" * room + "\n" and f"(cut after {room} tokens: the context is full)" in notices


# --------------------------------------------------------------------------------------------------
# Commands


def test_compare_shows_both_answers_each_under_its_name(models, talk, tmp_path):
    polite, other, file = models / "polite", models / "other", tmp_path / "a.jsonl"
    lines = [f"/compare {other}", "hi", f"/save {file}", "/undo", "/compare", "hi"]
    answers, notices = talk(polite, *lines, temperature=0.0)
    assert answers == f"[{polite}] süß €!\n[{other}] hello there\nsüß €!\n"
    assert f"{other} answers too" in notices and f"only {polite} answers" in notices
    assert [contents(messages) for messages in saved(file)] == [["hi", "süß €!"]]


def exchange(questions, answers):
    """The messages of these exchanges."""
    messages = []
    for question, answer in zip(questions, answers, strict=False):
        messages += [message("user", question), message("assistant", answer)]
    return messages


def test_the_model_compared_continues_from_its_own_answers(models, talk):
    wild, small = models / "wild", models / "small"
    out = talk(small, "a", f"/compare {wild}", "b", "c", max_new_tokens=4).out
    answers = {small: [expected(small, [message("user", "a")], 0, 4)]}
    answers[wild] = list(answers[small])
    for i, question in enumerate("bc", start=1):
        for run, texts in answers.items():
            texts.append(expected(run, [*exchange("abc", texts), message("user", question)], i, 4))
    for texts in answers.values():
        assert texts[1] in out and texts[2] in out
    # Another one to compare with does not take over what the first one said.
    again = talk(small, "a", f"/compare {wild}", "b", f"/compare {wild}", "c", max_new_tokens=4).out
    messages = [*exchange("ab", answers[small]), message("user", "c")]
    assert expected(wild, messages, 2, 4) in again.split(f"[{wild}] ")[-1]


def test_what_goes_wrong_is_one_line_and_the_chat_continues(models, talk, tmp_path):
    damaged = save(random_model, tmp_path / "damaged", "sft")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    for line, notice in [
        (f"/compare {tmp_path / 'absent'}", "error: .*no checkpoint here"),
        (f"/compare {models / 'critic'}", "error: .*a reward model, which writes nothing"),
        (f"/compare {damaged}", "error: .*SHA-256"),
        ("/retire now", "/retire now: no such command; /help lists them"),
        ("/save", "/save: no such command"),
        (f"/save {tmp_path}", "error: not saved: .*Is a directory"),
        (f"/save {tmp_path}/absent/a.jsonl", "error: not saved: .*No such file"),
        ("/save a\0b", "error: not saved: .*null"),
    ]:
        answers, notices = talk(models / "polite", "hi", line, "bye", temperature=0.0)
        assert answers == "süß €!\nso long\n" and re.fullmatch(f"{notice}.*\n", notices), notices
    for line in ("/undo", "/retry", "/save a.jsonl"):
        notice = f"{line.split()[0]}: there is no exchange yet\n"
        assert talk(models / "polite", line, "hi", temperature=0.0) == ("süß €!\n", notice)
    assert talk(models / "polite", "hi", "/quit", "never read", temperature=0.0) == ("süß €!\n", "")


def test_a_space_before_it_makes_a_message_of_a_command(models, talk, tmp_path):
    talk(models / "wild", " /undo", f"/save {tmp_path / 'a.jsonl'}")
    assert saved(tmp_path / "a.jsonl")[0][0] == message("user", "/undo")


def test_a_character_that_the_vocabulary_lacks_costs_one_message(talk, tmp_path):
    tok = tokenizer.characters("abc \nuserassistant")
    run = save(random_model, tmp_path / "run", "sft", tok=tok, context=200)
    _, notices = talk(run, "abΩ", "abc", f"/save {tmp_path / 'a.jsonl'}", max_new_tokens=6)
    assert "error: 'Ω' (U+03A9)" in notices
    assert saved(tmp_path / "a.jsonl")[0][0]["content"] == "abc"


def test_save_appends_and_never_spoils_what_was_there(models, talk, tmp_path):
    file, other = tmp_path / "chat.jsonl", tmp_path / "b.jsonl"
    before = exchange(["q"], ["a"])
    file.write_text(json.dumps({"messages": before}))  # its last line has no end
    lines = ["hi", f"/save {file}", f"/save {file}"]
    notices = talk(models / "polite", *lines, temperature=0.0, system="be brief").err
    assert notices.count(f"appended to {file}") == 2
    first, second, third = saved(file)
    assert first == before and second == third and contents(second)[:2] == ["be brief", "hi"]
    assert talk(models / "polite", "hi", f"/save {other}", temperature=0.0).err == f"saved in {other}\n"


def test_save_writes_through_links_and_into_pipes(models, talk, tmp_path):
    (tmp_path / "link").symlink_to("real.jsonl")
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    lines = ["hi", f"/save {tmp_path}/link", f"/save {tmp_path}/pipe", f"/save {null_device(tmp_path)}"]
    notices = talk(models / "polite", *lines, temperature=0.0).err
    reader.join(10)
    assert notices.count("saved in") == 3 and (tmp_path / "link").is_symlink()
    assert found == [(tmp_path / "real.jsonl").read_bytes()] and saved(tmp_path / "real.jsonl")


def test_an_empty_answer_is_not_saved(models, talk, tmp_path):
    model, tok, _ = checkpoint.load(models / "endless")
    with torch.no_grad():
        model.untied_head[END] = 50.0
    run = checkpoint.save(tmp_path / "mute", model, tok, {"stage": "sft", "step": 1})
    answers, notices = talk(run, "hi", f"/save {tmp_path / 'a.jsonl'}")
    assert answers == "\n" and "error: not saved" in notices and "is empty" in notices
    assert not (tmp_path / "a.jsonl").exists()


def test_a_cut_answer_is_saved_but_not_to_be_trained(models, talk, tmp_path):
    file = tmp_path / "a.jsonl"
    notices = talk(models / "polite", "hi", "bye", f"/save {file}", temperature=0.0, max_new_tokens=8).err
    assert "(cut after 8 tokens" in notices and "not to be trained on: 1" in notices  # "süß €!" has 10 bytes
    ((_, cut, _, ended),) = rows.read(str(file), rows.conversation)[0]
    assert cut["train"] is False and ended == message("assistant", "so long")
    talk(models / "endless", "hi", f"/save {file}")
    with pytest.raises(UserError, match="a.jsonl:2"):  # nothing in it to be trained
        rows.read(str(file), rows.conversation)


def test_a_full_disk_leaves_no_half_row(models, talk, small_disk):
    file = small_disk(8) / "a.jsonl"
    file.write_text(json.dumps({"messages": exchange(["q"], ["a"])}) + "\n")
    before = file.read_bytes()
    notices = talk(models / "endless", "hi", "/system " + "y" * 9000, f"/save {file}").err
    assert "error: not saved" in notices and file.read_bytes() == before


def test_help_lists_every_command(models, talk):
    answers, notices = talk(models / "polite", "/help")
    words = ("undo", "retry", "system", "compare", "save", "help", "quit")
    assert answers == "" and all(f"/{word} " in notices for word in words)


# --------------------------------------------------------------------------------------------------
# Pipes, terminals and Ctrl-C


def piped(read, write, argv):
    """In a child: the script with its input from a pipe, and Ctrl-C as in a terminal."""
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script(sample, argv)


@pytest.fixture
def open_chat(fork):
    """A function: argv -> (Child, a function that sends it a line)."""
    pipes = []

    def run(*argv):
        read, write = os.pipe()
        child = fork(piped, read, write, ["--device=cpu", "--temperature=0", *argv])
        os.close(read)
        pipes.append(write)
        return child, lambda line: os.write(write, (line + "\n").encode())

    yield run
    for write in pipes:
        os.close(write)


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(models, open_chat, tmp_path):
    file = tmp_path / "chat.jsonl"
    child, send = open_chat(f"--model={models / 'endless'}", "--max_new_tokens=3900")
    send("hi")
    wait_until(lambda: "xxx" in child.output(), child)
    os.kill(child.pid, signal.SIGINT)
    wait_until(lambda: "(stopped; the answer stays" in child.output(), child)
    send(f"/save {file}")
    send("/quit")
    succeeds(child)
    ((_, answer),) = saved(file)
    n = len(answer["content"])
    assert answer["content"] == "x" * n and 3 <= n < 3900
    assert abs(child.output().splitlines()[0].count("x") - n) <= 1


def test_ctrl_c_at_the_prompt_leaves_with_a_word(models, open_chat):
    child, send = open_chat(f"--model={models / 'polite'}")
    send("hi")
    wait_until(lambda: "süß €!\n" in child.output(), child)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == (0, "süß €!\n\nleft\n")


def in_terminal(argv):
    """A terminal in which sample.py runs -> (process, the terminal's file)."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run_script(sample, argv)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid, terminal


def read_until(terminal, *texts, seconds=20):
    """Read what a terminal shows until these texts have come one after the other, whatever codes
    readline writes between them."""
    shown, end = "", time.time() + seconds
    while not re.search(".*".join(map(re.escape, texts)), shown, flags=re.S):
        assert time.time() < end, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1000).decode(errors="replace")


def test_in_a_terminal_there_is_a_prompt_and_ctrl_c_and_ctrl_d(models):
    argv = [f"--model={models / 'endless'}", "--max_new_tokens=3900", "--temperature=0", "--device=cpu"]
    pid, terminal = in_terminal(argv)
    read_until(terminal, "/help lists the commands", "> ")
    os.write(terminal, b"hi\n")
    read_until(terminal, "xxx")
    os.write(terminal, b"\x03")
    read_until(terminal, "(stopped;", "> ")
    os.write(terminal, b"/undo\n")
    read_until(terminal, "taken back: hi", "> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_piped_as_a_user_types_it(models):
    """In a fresh process: answers alone on stdout, status 0. Bytes that are not UTF-8 and another
    system's line ends do no harm."""
    script = f"{sys.executable} {ROOT}/sample.py --device=cpu --model={models / 'polite'} --temperature=0"
    line = rf"printf 'hi\n/undo\n\377\r\n/undo\nbye' | {script}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "taken back: hi\ntaken back: �\n", done.stderr
    assert done.stdout.startswith("süß €!\n") and done.stdout.endswith("so long\n"), done.stdout


def test_a_reader_that_leaves_ends_the_chat(models, fork):
    def run():
        read, write = os.pipe()
        os.write(write, b"hi\nhi\nhi\n")
        os.close(write)
        os.dup2(read, 0)
        sys.stdin = open(0, closefd=False)
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = open(1, "w", closefd=False)
        run_script(sample, [f"--model={models / 'polite'}", "--device=cpu"])

    assert fork(run).wait() == (141, "")


# --------------------------------------------------------------------------------------------------
# The conversation


def test_conversations_of_one_speaker_and_of_another():
    one, two, other = (message("assistant", text) for text in ("1", "2", "two"))
    exchanges = [("a", [one]), ("b", [two, other]), ("c", [])]
    assert contents(sample.conversation("", exchanges)) == ["a", "1", "b", "2", "c"]
    assert contents(sample.conversation("s", exchanges, 1)) == ["s", "a", "1", "b", "two", "c"]


def test_the_newest_exchanges_that_fit_and_the_system_message_are_kept():
    exchanges = [(str(i), [message("assistant", "y" * 10)]) for i in range(9)] + [("last", [])]

    def prompt(left_out):
        return chat.encode_prompt(TOK, sample.conversation("sys", exchanges[left_out:]))

    for context in range(80, 400, 17):
        speaker = sample.Speaker("", random_model(**SMALL | {"context": context}), TOK, True)
        ids, left_out = sample.newest_exchanges(speaker, 30, "sys", exchanges)
        assert ids == prompt(left_out) and len(ids) + 30 <= context
        assert not left_out or len(prompt(left_out - 1)) + 30 > context
    speaker.model.config.context = 30
    with pytest.raises(UserError, match="the model's context holds 30"):
        sample.newest_exchanges(speaker, 30, "sys", exchanges)
