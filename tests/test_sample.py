"""sample.py as a chat: what its models are asked, its commands, Ctrl-C, pipes and terminals, and one continuation as ever."""
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_model
from runs import SMALL, refused, save, start
from test_pretrain import run_script, succeeds

import checkpoint
import sample
from common import UserError
from data import chat, tokenizer
from optim import Optimizer
from rollout import stream
from sft import train_step

TOK = tokenizer.byte_level()
END = chat.end_of_turn(TOK)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints: "base" without turns; "wild", random weights that have turns; "polite" has learnt by heart what to say; "other" too, by another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save(random_model, folder / "base", "pretrain")
    save(random_model, folder / "wild", "sft", context=300)
    save(random_model, folder / "small", "sft", seed=5)  # a context of 96
    save(random_model, folder / "critic", "reward", scalar_head=True)
    taught(folder / "polite", TOK, {"hi": "süß €!", "bye": "so long"})
    taught(folder / "other", tokenizer.train(["hello there, hi"] * 9, 270), {"hi": "hello there"})
    endless = random_model(**(SMALL | {"context": 4000, "layers": 1}))
    with torch.no_grad():
        for p in endless.parameters():
            p.zero_()
        endless.embed.fill_(1.0), endless.norm.fill_(1.0)
        endless.untied_head[ord("x")] = 5.0
    checkpoint.save(folder / "endless", endless, TOK, {"stage": "sft", "step": 1})
    return folder


def taught(run, tok, answers):
    """Save a model that has learnt {message: answer} by heart, alone and one after the other."""
    model = random_model(**(SMALL | {"vocab_size": tok.n_vocab, "context": 200}))
    optimizer = Optimizer(model, 0.02)
    exchanges = [said("user", asked) + said("assistant", answer) for asked, answer in answers.items()]
    chats = [chat.encode(tok, messages) for messages in [*exchanges, sum(exchanges, [])]]
    for _ in range(80):
        train_step(model, chats, 10**6)
        optimizer.step(1.0)
    checkpoint.save(run, model, tok, {"stage": "sft", "step": 1})


def said(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function: (model, *lines, FLAG=...) -> (answers, notices): what the chat writes to stdout and to stderr when these lines come through a pipe."""

    def run(model, *lines, **flags):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(line + "\n" for line in lines).encode())))
        capsys.readouterr()
        sample.main(sample.Config(**({"model": str(model), "device": "cpu", "max_new": 20} | flags)))
        return capsys.readouterr()

    return run


def expected(run, messages, seed, max_new=20):
    """What a checkpoint answers to these messages."""
    model, tok, _ = checkpoint.load(run)
    return chat.decode_answer(tok, stream(model, chat.encode_prompt(tok, messages), max_new=max_new, stop={tok.eot, chat.end_of_turn(tok)}, seed=seed))


def saved(path):
    """The conversations of a file, read as sft.py reads them."""
    return chat.read(str(path), chat.conversation)[0]


# ---------------------------------------------------------------------------------------------------------------------------------
# One continuation, one answer


def test_one_continuation_and_one_answer_as_ever(models, talk):
    text = talk(models / "base", prompt="Ada", seed=3).out
    model, tok, _ = checkpoint.load(models / "base")
    assert text == "Ada" + tok.decode([i for i in stream(model, [tok.eot, *b"Ada"], max_new=20, stop={tok.eot}, seed=3) if i != tok.eot]) + "\n"
    assert talk(models / "base", "never read").out == talk(models / "base").out != ""  # a base model begins a document, and ends
    assert talk(models / "polite", prompt="hi", temperature=0.0) == ("süß €!\n", "")


def test_a_system_message_is_part_of_what_one_answer_answers(models, talk):
    out = talk(models / "wild", prompt="hi", system="be brief", seed=4).out
    assert out.strip().startswith(expected(models / "wild", said("system", "be brief") + said("user", "hi"), 4)[:3])
    assert out != talk(models / "wild", prompt="hi", seed=4).out


def test_what_cannot_talk_is_refused(models, fork):
    assert "reward model, which writes nothing" in refused(start(fork, sample, model=models / "critic", device="cpu"))
    assert "has learnt no turns" in refused(start(fork, sample, model=models / "base", system="be brief", device="cpu"))


# ---------------------------------------------------------------------------------------------------------------------------------
# What the model is asked


def test_every_answer_follows_from_the_history_and_a_seed_of_its_own(models, talk, tmp_path):
    lines = ["one", "two", "/retry", "", "/undo", "three", "/system be kind", "four", "/system", "five", f"/save {tmp_path / 'chat.jsonl'}"]
    talk(models / "wild", *lines, seed=7, system="be brief", max_new=12)
    (messages,) = saved(tmp_path / "chat.jsonl")
    asked = [("be brief", "one", 7), ("be brief", "three", 10), ("be kind", "four", 11), ("", "five", 12)]
    history = []
    for system, question, seed in asked:
        history += said("user", question)
        history += said("assistant", expected(models / "wild", (said("system", system) if system else []) + history, seed, 12))
    assert messages == history
    assert len({m["content"] for m in messages}) == 8
    talk(models / "wild", *lines[:-1], f"/save {tmp_path / 'again.jsonl'}", seed=7, system="be brief", max_new=12)
    assert saved(tmp_path / "again.jsonl") == [messages]


def test_retry_draws_another_answer_to_the_same_question(models, talk, tmp_path):
    talk(models / "wild", "hi", f"/save {tmp_path / 'a'}.jsonl", "/retry", f"/save {tmp_path / 'a'}.jsonl", max_new=12)
    first, second = saved(tmp_path / "a.jsonl")
    assert first[0] == second[0] and first[1] != second[1]
    assert second[1]["content"] == expected(models / "wild", said("user", "hi"), 1, 12)


def test_characters_of_several_tokens_come_out_whole(models, talk):
    assert talk(models / "polite", "hi", "/undo", "bye", temperature=0.0) == ("süß €!\nso long\n", "taken back: hi\n")


def test_what_the_context_cannot_hold_is_left_out_and_said_once(models, talk, tmp_path):
    file = tmp_path / "chat.jsonl"
    answers, notices = talk(models / "small", "a" * 10, "b" * 10, "c" * 10, "d" * 10, f"/save {file}", max_new=8)
    assert notices.count("oldest exchanges are left out") == 1 and "96 tokens" in notices
    (messages,) = saved(file)
    assert len(messages) == 8  # nothing is lost from the conversation itself
    frame = lambda first: len(chat.encode_prompt(TOK, messages[first:7])) + 8  # noqa: E731
    first = next(i for i in (0, 2, 4, 6) if frame(i) <= 96)
    assert first > 0 and messages[7]["content"] == expected(models / "small", messages[first:7], 3, 8)


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on(models, talk, tmp_path):
    answers, notices = talk(models / "small", "x" * 100, "hi", f"/save {tmp_path / 'a.jsonl'}", max_new=8)
    (line,) = [x for x in notices.splitlines() if x.startswith("error: ")]
    assert "the model's context holds 96" in line
    assert [m["content"] for m in saved(tmp_path / "a.jsonl")[0]] == ["hi", expected(models / "small", said("user", "hi"), 0, 8)]


def test_an_answer_cut_short_is_said_to_be(models, talk):
    answers, notices = talk(models / "endless", "hi", max_new=5)
    assert answers == "xxxxx\n" and "(cut after 5 tokens: --max_new" in notices
    room = 4000 - len(chat.encode_prompt(TOK, said("user", "x" * 3900)))
    answers, notices = talk(models / "endless", "x" * 3900, max_new=500)
    assert answers == "x" * room + "\n" and f"(cut after {room} tokens: the context is full)" in notices


# ---------------------------------------------------------------------------------------------------------------------------------
# Commands


def test_compare_shows_both_answers_each_under_its_name(models, talk, tmp_path):
    polite, other, file = models / "polite", models / "other", tmp_path / "a.jsonl"
    answers, notices = talk(polite, f"/compare {other}", "hi", f"/save {file}", "/undo", "/compare", "hi", temperature=0.0)
    assert answers == f"[{polite}] süß €!\n[{other}] hello there\nsüß €!\n"
    assert f"{other} answers too" in notices and f"{polite} alone" in notices
    assert saved(file) == [said("user", "hi") + said("assistant", "süß €!")]


def test_the_model_compared_goes_on_from_its_own_answers(models, talk):
    wild, small = models / "wild", models / "small"
    answers = talk(small, "a", f"/compare {wild}", "b", "c", max_new=4).out
    ours = [expected(small, said("user", "a"), 0, 4)]
    theirs = list(ours)
    for i, question in enumerate("bc", start=1):
        for texts, run in ((ours, small), (theirs, wild)):
            messages = [m for q, t in zip("abc", texts) for m in said("user", q) + said("assistant", t)]
            texts.append(expected(run, messages + said("user", question), i, 4))
    for text in [ours[1], theirs[1], ours[2], theirs[2]]:
        assert text in answers
    # Another one to compare with does not take over what the first one said.
    again = talk(small, "a", f"/compare {wild}", "b", f"/compare {wild}", "c", max_new=4).out
    messages = [m for q, t in zip("ab", ours) for m in said("user", q) + said("assistant", t)]
    assert expected(wild, messages + said("user", "c"), 2, 4) in again.split(f"[{wild}] ")[-1]


def test_what_goes_wrong_is_one_line_and_the_chat_goes_on(models, talk, tmp_path):
    damaged = save(random_model, tmp_path / "damaged", "sft")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    for line, named in [
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
        assert answers == "süß €!\nso long\n" and re.fullmatch(f"{named}.*\n", notices), notices
    for line in ("/undo", "/retry", "/save a.jsonl"):
        assert talk(models / "polite", line, "hi", temperature=0.0) == ("süß €!\n", f"{line.split()[0]}: there is no exchange yet\n")
    assert talk(models / "polite", "hi", "/quit", "never read", temperature=0.0) == ("süß €!\n", "")


def test_a_space_before_it_makes_a_message_of_a_command(models, talk, tmp_path):
    talk(models / "wild", " /undo", f"/save {tmp_path / 'a.jsonl'}")
    assert saved(tmp_path / "a.jsonl")[0][0] == said("user", "/undo")[0]


def test_a_character_that_the_vocabulary_lacks_costs_one_message(talk, tmp_path):
    tok = tokenizer.characters("abc \nuserassistant")
    run = save(random_model, tmp_path / "run", "sft", tok=tok, context=200)
    answers, notices = talk(run, "abΩ", "abc", f"/save {tmp_path / 'a.jsonl'}", max_new=6)
    assert "error: 'Ω' (U+03A9)" in notices
    assert saved(tmp_path / "a.jsonl")[0][0]["content"] == "abc"


def test_save_appends_and_never_spoils_what_was_there(models, talk, tmp_path):
    file = tmp_path / "chat.jsonl"
    row = {"messages": said("user", "q") + said("assistant", "a")}
    file.write_text(json.dumps(row))  # its last line has no end
    notices = talk(models / "polite", "hi", f"/save {file}", f"/save {file}", temperature=0.0, system="be brief").err
    assert notices.count(f"appended to {file}") == 2
    rows = saved(file)
    assert rows[0] == row["messages"] and len(rows) == 3 and rows[1] == rows[2] == said("system", "be brief") + said("user", "hi") + rows[1][2:]
    assert talk(models / "polite", "hi", f"/save {tmp_path / 'b.jsonl'}", temperature=0.0).err == f"saved in {tmp_path / 'b.jsonl'}\n"


def test_an_answer_of_nothing_is_not_saved(models, talk, tmp_path):
    model, tok, _ = checkpoint.load(models / "endless")
    with torch.no_grad():
        model.untied_head[END] = 50.0
    run = checkpoint.save(tmp_path / "mute", model, tok, {"stage": "sft", "step": 1})
    answers, notices = talk(run, "hi", f"/save {tmp_path / 'a.jsonl'}")
    assert answers == "\n" and "error: not saved" in notices and "is empty" in notices and not (tmp_path / "a.jsonl").exists()


def test_help_lists_every_command(models, talk):
    answers, notices = talk(models / "polite", "/help")
    assert answers == "" and all(f"/{word} " in notices for word in ("undo", "retry", "system", "compare", "save", "help", "quit"))


# ---------------------------------------------------------------------------------------------------------------------------------
# Pipes, terminals and Ctrl-C


def until(found, seconds=20):
    end = time.time() + seconds
    while not found():
        assert time.time() < end, "waited too long"
        time.sleep(0.01)


def piped(read, write, argv):
    """In a child: the script with its input from a pipe, and Ctrl-C as in a terminal."""
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script(sample, argv)


@pytest.fixture
def open_chat(fork, models):
    """A function: argv -> (Child, a function that sends it a line)."""
    pipes = []

    def run(*argv):
        read, write = os.pipe()
        child = fork(piped, read, write, ["--device=cpu", *argv])
        os.close(read)
        pipes.append(write)
        return child, lambda line: os.write(write, (line + "\n").encode())

    yield run
    for write in pipes:
        os.close(write)


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(models, open_chat, tmp_path):
    file = tmp_path / "chat.jsonl"
    child, send = open_chat(f"--model={models / 'endless'}", "--max_new=3900", "--temperature=0")
    send("hi")
    until(lambda: "xxx" in child.output())
    os.kill(child.pid, signal.SIGINT)
    until(lambda: "(stopped; the answer stays" in child.output())
    send(f"/save {file}"), send("/quit")
    succeeds(child)
    ((question, answer),) = saved(file)
    n = len(answer["content"])
    assert answer["content"] == "x" * n and 3 <= n < 3900
    assert abs(child.output().splitlines()[0].count("x") - n) <= 1


def test_ctrl_c_where_a_message_is_due_leaves_with_a_word(models, open_chat):
    child, send = open_chat(f"--model={models / 'polite'}", "--temperature=0")
    send("hi")
    until(lambda: "süß €!\n" in child.output())
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == (0, "süß €!\n\nleft\n")


def in_terminal(argv):
    """A terminal in which sample.py runs -> (process, the terminal's file)."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run_script(sample, argv)
            code = 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return pid, terminal


def read_until(terminal, *texts, seconds=20):
    """What a terminal shows until these have come one after the other, whatever codes readline writes between them."""
    shown, end = "", time.time() + seconds
    while not re.search(".*".join(map(re.escape, texts)), shown, flags=re.S):
        assert time.time() < end, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1000).decode(errors="replace")


def test_in_a_terminal_there_are_signs_and_ctrl_c_and_ctrl_d(models):
    pid, terminal = in_terminal([f"--model={models / 'endless'}", "--max_new=3900", "--temperature=0", "--device=cpu"])
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
    """In a fresh process: answers alone on stdout, status 0. Bytes that are no UTF-8 and another system's line ends do no harm."""
    script = f"{sys.executable} {ROOT}/sample.py --device=cpu"
    line = rf"printf 'hi\n/undo\n\377\r\n/undo\nbye' | {script} --model={models / 'polite'} --temperature=0"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "taken back: hi\ntaken back: �\n", done.stderr
    assert done.stdout.startswith("süß €!\n") and done.stdout.endswith("so long\n"), done.stdout


def test_a_reader_that_leaves_ends_the_chat(models, fork):
    def run():
        read, write = os.pipe()
        os.write(write, b"hi\nhi\nhi\n"), os.close(write), os.dup2(read, 0)
        sys.stdin = open(0, closefd=False)
        read, write = os.pipe()
        os.close(read), os.dup2(write, 1)
        run_script(sample, [f"--model={models / 'polite'}", "--device=cpu"])

    assert fork(run).wait() == (141, "")


def test_conversations_of_one_speaker_and_of_another():
    exchanges = [("a", ["1"]), ("b", ["2", "two"]), ("c", [])]
    texts = lambda messages: [m["content"] for m in messages]  # noqa: E731
    assert texts(sample.conversation("", exchanges)) == ["a", "1", "b", "2", "c"]
    assert texts(sample.conversation("s", exchanges, 1)) == ["s", "a", "1", "b", "two", "c"]


def test_fit_keeps_the_newest_exchanges_and_the_system_message():
    exchanges = [(str(i), ["y" * 10]) for i in range(9)] + [("last", [])]
    for context in range(80, 400, 17):
        ids, left_out = sample.fit(TOK, context, 30, "sys", exchanges)
        assert ids == chat.encode_prompt(TOK, sample.conversation("sys", exchanges[left_out:])) and len(ids) + 30 <= context
        if left_out:
            assert len(chat.encode_prompt(TOK, sample.conversation("sys", exchanges[left_out - 1 :]))) + 30 > context
    with pytest.raises(UserError, match="the model's context holds 30"):
        sample.fit(TOK, 30, 30, "sys", exchanges)
