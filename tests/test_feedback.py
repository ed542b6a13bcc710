"""data/feedback.py: what is a vote, what the files hold after anything, what is frozen, and what
people bring from Open WebUI."""

import dataclasses
import json
import os
import signal
import time

import pytest
from conftest import ROOT, random_model
from runs import kill, refused, save, start, succeeds, wait_until, write_rows

import sharpen
from data import feedback, rows
from data.feedback import Journal, read_entry
from data.rows import message
from figures import bradley_terry
from runtime.checkpoint import newest_finished
from runtime.errors import UserError
from runtime.files import LOCKS, lock_file, write_json

PROMPT = [message("system", "be brief"), message("user", "hi")]
TWO = {"prompt": PROMPT, "answers": ["yes ", "no"], "models": ["a", "b"], "seeds": [1, 2]}
ONE = {"prompt": PROMPT, "answer": "yes", "model": "a", "seed": 1}
ASKED = {"prompt": [message("user", "Name a colour.")], "models": ["a", "b"], "seeds": [1, 2], "model": "a"}


@pytest.fixture
def journal(tmp_path):
    """A function: () -> the Journal of one directory, opened as the next server does."""
    before = len(LOCKS)

    def next_server():
        end_servers()
        return Journal(tmp_path / "feedback")

    def end_servers():
        while len(LOCKS) > before:
            LOCKS.pop().close()

    yield next_server
    end_servers()


def store(journal, entry):
    return journal.append(*read_entry(entry)).result(timeout=10)


def lines(tmp_path, kind):
    return [json.loads(line) for line in (tmp_path / "feedback" / f"{kind}.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# One row


def test_a_field_that_would_not_be_kept_is_refused_by_name():
    with pytest.raises(ValueError, match='"comment" is not kept; leave it out'):
        read_entry(ONE | {"label": True, "comment": "because"})
    assert read_entry(ONE | {"label": True, "comment": None})[0] == "ratings"
    assert read_entry(ONE | {"label": True, "by": None})[1]["by"] == ""


def test_what_was_preferred_comes_first_and_the_trainers_read_it():
    kind, row = read_entry(TWO | {"vote": "right", "by": "Ada"})
    assert kind == "pairs" and row.pop("time") > 1.7e9
    expected = {"prompt": PROMPT, "chosen": "no", "rejected": "yes", "models": ["b", "a"], "seeds": [2, 1], "by": "Ada"}
    assert row == expected
    assert rows.preference(row)[:4] == (PROMPT, "no", "yes", 1.0)
    kind, row = read_entry(ONE | {"label": False})
    assert kind == "ratings" and rows.judged(row) == [(PROMPT, "yes", False)]
    kind, row = read_entry(ONE | {"correction": "no!"})
    assert kind == "corrections" and rows.conversation(row) == [*PROMPT, message("assistant", "no!")]
    assert row["instead_of"] == "yes"
    talk = [*PROMPT, message("assistant", "cut in the"), message("user", "go on")]
    kind, row = read_entry(ONE | {"correction": "no!", "prompt": talk})
    trained = [m.get("train", True) for m in rows.conversation(row) if m["role"] == "assistant"]
    assert trained == [False, True]  # nobody has said that the earlier answer is right, or whole
    code, short = "    return 1", "\tpass"  # indentation is what was said, too
    kind, row = read_entry(TWO | {"vote": "left", "answers": [code, short]})
    assert rows.preference(row)[:3] == (PROMPT, code, short)
    assert read_entry(ONE | {"label": True, "answer": code})[1]["completion"] == code
    kind, row = read_entry(ONE | {"correction": code, "answer": short})
    assert rows.conversation(row)[-1]["content"] == code and row["instead_of"] == short
    for vote in ("tie", "both_bad"):
        kind, row = read_entry(TWO | {"vote": vote})
        assert kind == "ties" and row["vote"] == vote and row["answers"] == ["yes", "no"] and row["by"] == ""


@pytest.mark.parametrize(
    "entry, wrong",
    [
        (TWO, "one of"),
        (TWO | {"vote": "left", "label": True}, "one of"),
        (TWO | {"vote": "best"}, '"vote" is not one of'),
        (TWO | {"vote": []}, '"vote" is not one of'),
        (TWO | {"vote": "left", "answers": ["yes"]}, "a list of two"),
        (TWO | {"vote": "left", "answers": ["yes", " "]}, "is empty"),
        (TWO | {"vote": "left", "answers": ["yes", "yes "]}, "the same text"),
        (TWO | {"vote": "left", "models": ["a", 1]}, "model"),
        (TWO | {"vote": "left", "seeds": [1, "2"]}, "seed"),
        (TWO | {"vote": "left", "by": "x" * 65}, '"by"'),
        (TWO | {"vote": "left", "by": 1}, '"by"'),
        (TWO | {"vote": "left", "by": 0}, '"by"'),
        (TWO | {"vote": "left", "by": []}, '"by"'),
        (TWO | {"vote": "left", "by": {}}, '"by"'),
        (TWO | {"vote": "left", "by": False}, '"by"'),
        (TWO | {"vote": "left", "prompt": [*PROMPT, message("assistant", "x")]}, "the last one must be of 'user'"),
        (TWO | {"vote": "left", "prompt": "hi"}, "list of messages"),
        (ONE | {"label": 1}, "true or false"),
        (ONE | {"correction": ""}, "is empty"),
        (ONE | {"label": True, "answer": None}, "missing"),
        (ONE | {"correction": "five<|im_end|>"}, "in a chat template already"),
        # what their trainers do not read would be a line at which every round that comes ends
        (ASKED | {"vote": "left", "answers": ["Name a colour. Red", "Name a colour. Blue"]}, "only what follows it"),
        (ASKED | {"vote": "left", "answers": ["\n\nHuman: a\n\nAssistant: b", "no"]}, "answer different prompts"),
        (ASKED | {"label": False, "answer": "Name a colour. Red"}, "only what follows it"),
    ],
)
def test_what_is_no_vote_is_refused(entry, wrong):
    with pytest.raises(ValueError, match=wrong):
        read_entry(entry)


# --------------------------------------------------------------------------------------------------
# The files


def test_one_vote_a_pair_and_voter_also_after_a_restart(journal, tmp_path):
    first = journal()
    assert store(first, TWO | {"vote": "left", "by": "Ada"}) is True
    again = TWO | {"answers": ["no", "yes"], "models": ["b", "a"], "vote": "right", "by": "Ada"}  # sides shuffled
    assert store(first, again) is False
    for other in ({"vote": "right"}, {"vote": "tie"}):
        with pytest.raises(ValueError, match="already"):
            store(first, TWO | {"by": "Ada"} | other)
    assert store(first, TWO | {"vote": "tie", "by": "Bob"}) is True
    assert store(first, ONE | {"label": True}) is True
    second = journal()
    assert store(second, again) is False and store(second, ONE | {"label": True}) is False
    with pytest.raises(ValueError, match="already"):
        store(second, TWO | {"vote": "left", "by": "Bob"})
    assert second.counts == {"pairs": 1, "tie": 1, "ratings": 1}
    assert second.matches == {("a", "b", "win"): 1, ("a", "b", "tie"): 1}
    assert len(lines(tmp_path, "pairs")) == len(lines(tmp_path, "ties")) == len(lines(tmp_path, "ratings")) == 1


def test_long_answers_do_not_stay_in_the_memory(journal):
    one = journal()
    store(one, TWO | {"vote": "left", "answers": ["yes " * 10_000, "no"]})
    assert [len(said) for said in one.said.values()] == [32]


def test_what_is_told_of_a_file_is_on_the_disk(journal, tmp_path):
    one, file = journal(), tmp_path / "feedback/pairs.jsonl"
    store(one, TWO | {"vote": "left"})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"prompt": [')  # a line that is being written
    assert one.stored("pairs") == whole


def test_votes_that_come_together_are_told_apart(journal, tmp_path):
    many = journal()
    entries = [read_entry(TWO | {"vote": v, "by": str(i % 3)}) for i in range(30) for v in ("left", "tie")]
    done = [many.append(*entry) for entry in entries]
    outcomes = [d.exception() or d.result() for d in done]
    assert outcomes.count(True) == 3 and sum(isinstance(o, ValueError) for o in outcomes) == 30
    assert len(lines(tmp_path, "pairs")) + len(lines(tmp_path, "ties")) == 3


@pytest.mark.parametrize("torn", [b'{"prompt": [', b"\xff" * 100, b"x" * 200_000, b"\0" * 100])
def test_a_torn_last_line_is_moved_away(journal, tmp_path, torn):
    store(journal(), TWO | {"vote": "left"})
    file = tmp_path / "feedback/pairs.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    again = journal()
    assert file.read_bytes() == whole and (tmp_path / "feedback/pairs.torn").read_bytes() == torn + b"\n"
    assert store(again, TWO | {"vote": "left", "by": "Bob"}) is True
    file.write_bytes(torn)  # the very first line
    assert journal().counts == {} and file.read_bytes() == b""


@pytest.mark.parametrize(
    "edit",
    [
        lambda written: written.replace(b"\n", b"\r\n"),
        lambda written: written.replace(b"\n", b"\r"),
        lambda written: written[:-1],
        lambda written: b"\xef\xbb\xbf" + written,
        lambda written: written.replace(b"\n", b"\n\n") + b"  \n",
    ],
    ids=["CRLF", "CR", "no last end", "byte order mark", "blank lines"],
)
def test_what_an_editor_does_to_a_file_loses_no_vote(journal, tmp_path, edit):
    first, file = journal(), tmp_path / "feedback/pairs.jsonl"
    for voter in ("Ada", "Bob"):
        store(first, TWO | {"vote": "left", "by": voter})
    file.write_bytes(edit(file.read_bytes()))
    assert len(feedback.freeze(file, "pairs")) == 2
    again = journal()
    assert again.counts == {"pairs": 2} and store(again, TWO | {"vote": "left", "by": "Ada"}) is False
    assert store(again, TWO | {"vote": "left", "by": "Eve"}) is True
    assert [row["by"] for row in feedback.freeze(file, "pairs")] == ["Ada", "Bob", "Eve"]


def test_a_file_that_others_have_changed_is_left_alone(journal, tmp_path):
    one, file = journal(), tmp_path / "feedback/pairs.jsonl"
    store(one, TWO | {"vote": "left"})
    whole = file.read_bytes()
    for changed in (whole + whole, whole[:-1], b"", whole.replace(b"yes", b"yes, yes")):
        file.write_bytes(changed)
        with pytest.raises(OSError, match="somebody else has changed"):
            store(one, TWO | {"vote": "left", "by": "Bob"})
        assert file.read_bytes() == changed
    file.write_bytes(whole)
    assert store(one, TWO | {"vote": "left", "by": "Bob"}) is True


def test_a_vote_is_acknowledged_only_when_the_disk_has_it(journal, tmp_path, monkeypatch):
    one = journal()
    store(one, TWO | {"vote": "left"})
    whole = (tmp_path / "feedback/pairs.jsonl").read_bytes()

    def fail(file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            store(one, TWO | {"vote": "left", "by": "Bob"})
    assert (tmp_path / "feedback/pairs.jsonl").read_bytes() == whole and one.counts == {"pairs": 1}
    assert store(one, TWO | {"vote": "left", "by": "Bob"}) is True


def test_what_no_server_wrote_and_a_second_server_are_refused(journal, tmp_path):
    (tmp_path / "feedback").mkdir()
    file, row = tmp_path / "feedback/pairs.jsonl", read_entry(TWO | {"vote": "left"})[1]
    strange = [{"text": "a story"}, row | {"models": ["a"]}, row | {"models": [1, 2]}, row | {"time": "2026"}]
    for other in strange:  # the pages that show them count on what is there
        write_rows(file, [row, other])
        with pytest.raises(UserError, match="pairs.jsonl:2: not a row that serve.py wrote"):
            journal()
    for line in ("{}}", '{"prompt": [{"ro', "null", "[1]", "# mine", "\0"):  # torn in the middle of the file
        file.write_text(f"{json.dumps(row)}\n{line}\n{json.dumps(row)}\n")
        with pytest.raises(UserError, match="pairs.jsonl:2: .*; correct or remove the line"):
            journal()
    file.unlink()
    journal()
    with pytest.raises(UserError, match="--feedback=.*: another process is writing"):
        Journal(tmp_path / "feedback")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=f"--feedback={folder}: "):
            Journal(folder)
    (tmp_path / "feedback/ties.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="ties.jsonl: Is a directory"):
        Journal(tmp_path / "feedback")


# --------------------------------------------------------------------------------------------------
# Frozen files


def test_freezing_takes_what_is_whole_and_new(tmp_path, capsys):
    votes = [read_entry(TWO | {"vote": "left", "by": str(i)})[1] for i in range(3)]
    file = tmp_path / "pairs.jsonl"
    write_rows(file, votes[:2])
    with open(file, "a") as f:
        f.write('{"prompt"')  # a server is writing it
    feedback.main(feedback.Config(feedback=str(tmp_path), out=str(tmp_path / "rounds/1/pairs.jsonl")))
    write_rows(file, votes)
    one, two = tmp_path / "rounds/1/pairs.jsonl", tmp_path / "rounds/2/pairs.jsonl"
    feedback.main(feedback.Config(feedback=str(tmp_path), out=str(two), after=str(one)))
    frozen = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, two)]
    assert frozen == [votes[:2], votes[2:]]
    assert rows.read(str(two), rows.preference)[0][0].chosen == "yes"
    with pytest.raises(UserError, match="exists; --overwrite"):
        feedback.main(feedback.Config(feedback=str(tmp_path), out=str(two)))
    with pytest.raises(UserError, match="no pairs to freeze"):
        feedback.main(feedback.Config(feedback=str(tmp_path), out=str(tmp_path / "3.jsonl"), after=str(file)))
    for out in (file, tmp_path / "ties.jsonl", one):  # what a server or another round has
        with pytest.raises(UserError, match="is what is read or written besides"):
            feedback.main(feedback.Config(feedback=str(tmp_path), out=str(out), after=str(one), overwrite=True))


def test_what_cannot_be_frozen_is_refused(tmp_path, fork):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "hi", "chosen": "a", "rejected": "a"}\n')
    flags = {"feedback": tmp_path, "out": tmp_path / "out.jsonl"}
    assert "pairs.jsonl:1: " in refused(start(fork, feedback, **flags))
    assert "ratings.jsonl: No such file" in refused(start(fork, feedback, kind="ratings", **flags))
    assert "--kind=ties" in refused(start(fork, feedback, kind="ties", **flags))
    assert "one of --feedback and --open_webui" in refused(start(fork, feedback, open_webui="x.json", **flags))
    assert not (tmp_path / "out.jsonl").exists()


# --------------------------------------------------------------------------------------------------
# Rounds


def test_a_round_trains_on_the_new_votes_from_the_newest_model(tmp_path, fork, monkeypatch):
    monkeypatch.chdir(ROOT)
    save(random_model, tmp_path / "sft", "sft")
    votes = [read_entry(TWO | {"prompt": [message("user", str(i))], "vote": "left"})[1] for i in range(9)]
    (tmp_path / "feedback").mkdir()
    write_rows(tmp_path / "feedback/pairs.jsonl", votes[:5])
    rounds = tmp_path / "rounds"
    flags = {"init": tmp_path / "sft", "feedback": tmp_path / "feedback", "rounds": rounds}
    succeeds(start(fork, sharpen, dpo="--steps=2 --device=cpu --val_fraction=0.5", **flags))
    first = newest_finished(rounds)
    assert first == rounds / "1/dpo/step_000002"
    status, output = start(fork, sharpen, **flags).wait()
    assert status == 1 and "no pairs to freeze" in output and "data.feedback ended with status 1" in output
    # the next round begins from the first one's model, with the votes that came since
    config = sharpen.Config(**{name: str(value) for name, value in flags.items()})
    assert f"--after={rounds}/1/pairs.jsonl" in sharpen.freezing(config, rounds / "2", [rounds / "1/pairs.jsonl"])
    (train,) = sharpen.training(config, rounds / "2", first, votes=4)
    assert f"--init={first}" in train and train[-1] == "--val_fraction=0.2"  # a twentieth of few is one row, or none
    assert "--val_fraction=0.2" not in sharpen.training(config, rounds / "2", first, votes=200)[0]
    # a round that has saved nothing takes the votes that have come since: the first were too few
    (rounds / "2").mkdir()
    write_rows(rounds / "2/pairs.jsonl", votes[5:6])
    write_rows(tmp_path / "feedback/pairs.jsonl", votes)
    output = succeeds(start(fork, sharpen, **flags, dpo="--steps=1 --device=cpu --val_fraction=0.5"))
    assert len(feedback.freeze(rounds / "2/pairs.jsonl", "pairs")) == 4
    assert newest_finished(rounds) == rounds / "2/dpo/step_000001"
    # one that has is resumed, not frozen again
    info = rounds / "2/dpo/step_000001/feinschliff.json"
    write_json(info, json.loads(info.read_text()) | {"total_steps": 2})
    (tmp_path / "feedback/pairs.jsonl").unlink()
    child = start(fork, sharpen, **flags)
    wait_until(lambda: "$ " in child.output(), child)
    status, output = kill(child, signal.SIGTERM)
    assert "$ python dpo.py" in output and "--resume" in output and "data.feedback" not in output
    reward, ppo = sharpen.training(sharpen.Config(init="x", method="ppo"), rounds / "3", first, votes=9)
    assert reward[0] == "reward.py" and reward[-1] == "--val_fraction=0.2"
    line = refused(start(fork, sharpen, **flags, method="ppo", dpo="--steps=1"))
    assert "--dpo=--steps=1: --method=ppo does not run it" in line
    with pytest.raises(UserError, match="No closing quotation"):
        sharpen.training(sharpen.Config(init="x", dpo="--data='x"), rounds / "3", first, votes=9)
    assert ppo[0] == "ppo.py" and f"--reward={rounds}/3/rm" in ppo and "--val_fraction=0.2" not in ppo


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_a_step_save_and_no_other_round_begins_beside_one(tmp_path, fork, monkeypatch, number):
    monkeypatch.chdir(ROOT)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    training = (
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n    time.sleep(0.6)\n    pathlib.Path(sys.argv[2]).touch()\n    sys.exit(9)\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n    signal.signal(number, stop)\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )

    def round_of(folder):
        os.setpgid(0, 0)  # as a shell does; Ctrl-C goes to all of them
        lock_file(tmp_path / "rounds/.lock", tmp_path / "rounds", "rounds")
        with pytest.raises(UserError, match="ended with status 9; the same call continues"):
            sharpen.execute(["-c", training, str(ready), str(saved)])

    child = fork(round_of, tmp_path)
    wait_until(ready.exists, child)
    flags = {"init": "out/sft", "rounds": tmp_path / "rounds"}
    assert "--rounds=" in refused(start(fork, sharpen, **flags)) and not saved.exists()
    if number == signal.SIGINT:
        os.killpg(child.pid, number)
    else:
        os.kill(child.pid, number)
    succeeds(child)
    assert saved.exists()


def test_the_newest_finished_run_is_found(tmp_path):
    assert newest_finished(tmp_path / "nothing") is None

    def run(name, stage="dpo", **info):
        return save(random_model, tmp_path / name, stage, **info)

    done = run("0/base", "pretrain") / "feinschliff.json"
    write_json(done, json.loads(done.read_text()) | {"total_steps": 1})
    run("1/dpo")  # of before runs told their total
    (run("foreign") / "feinschliff.json").unlink()  # also a run that is just being deleted
    assert newest_finished(tmp_path) is None
    info = json.loads((tmp_path / "1/dpo/step_000001/feinschliff.json").read_text())
    write_json(tmp_path / "1/dpo/step_000001/feinschliff.json", info | {"total_steps": 2})
    assert newest_finished(tmp_path) is None
    write_json(tmp_path / "1/dpo/step_000001/feinschliff.json", info | {"total_steps": 1})
    assert newest_finished(tmp_path) == tmp_path / "1/dpo/step_000001"
    (tmp_path / "1/dpo/step_000001/feinschliff.json").write_text("{")
    assert newest_finished(tmp_path) is None


# --------------------------------------------------------------------------------------------------
# Open WebUI


def webui_item(rating=1, siblings=("llama",), **data):
    """A rating of c, an answer to b; d and e are other answers to it."""
    messages = {
        "q": {"id": "q", "parentId": None, "childrenIds": ["a"], "role": "user", "content": "hi"},
        "a": {"id": "a", "parentId": "q", "childrenIds": ["b"], "role": "assistant", "content": "hello"},
        "b": {"id": "b", "parentId": "a", "childrenIds": ["c", "d", "e"], "role": "user", "content": "2 + 2?"},
        "c": {"id": "c", "parentId": "b", "childrenIds": [], "role": "assistant", "content": "4", "model": "qwen"},
        "d": {"id": "d", "parentId": "b", "childrenIds": [], "role": "assistant", "content": "5", "model": "llama"},
        "e": {"id": "e", "parentId": "b", "childrenIds": [], "role": "assistant", "content": "6", "model": "gemma"},
    }
    data = {"rating": rating, "model_id": "qwen", "sibling_model_ids": list(siblings)} | data
    snapshot = {"chat": {"chat": {"history": {"messages": messages, "currentId": "c"}}}}
    item = {"id": "1", "type": "rating", "data": data, "meta": {"message_id": "c"}, "snapshot": snapshot}
    return item | {"created_at": 1.7e9}


def import_webui(tmp_path, items):
    (tmp_path / "export.json").write_text(json.dumps(items))
    feedback.main(feedback.Config(open_webui=str(tmp_path / "export.json"), out=str(tmp_path / f"out{time.time_ns()}")))
    out = max(tmp_path.glob("out*"))
    return [
        [json.loads(line) for line in (out / f"{kind}.jsonl").read_text().splitlines()] for kind in ("pairs", "ratings")
    ]


def test_ratings_of_open_webui_become_pairs_and_ratings(tmp_path, capsys):
    prompt = [message("user", "hi"), message("assistant", "hello"), message("user", "2 + 2?")]
    pairs, ratings = import_webui(
        tmp_path, [webui_item(comment="right"), webui_item("-1", siblings=("llama", "gemma")) | {"user_id": "Bob"}]
    )
    assert [(p["chosen"], p["rejected"], p["models"]) for p in pairs] == [
        ("4", "5", ["qwen", "llama"]),
        ("5", "4", ["llama", "qwen"]),
        ("6", "4", ["gemma", "qwen"]),
    ]
    assert pairs[0]["prompt"] == prompt and pairs[0]["comment"] == "right" and rows.preference(pairs[0]).chosen == "4"
    assert [rows.judged(r) for r in ratings] == [[(prompt, "4", True)], [(prompt, "4", False)]]
    pairs, ratings = import_webui(tmp_path, [webui_item(siblings=())])
    assert pairs == [] and len(ratings) == 1
    item = webui_item()
    said = item["snapshot"]["chat"]["chat"]["history"]["messages"]
    item["snapshot"]["chat"]["chat"]["params"] = {"system": "Be brief."}
    for name, model in (("c", "qwen"), ("d", "llama")):  # an arena hides the models, also from its answers
        said[name] |= {"model": "arena-model", "selectedModelId": model, "done": True}
    pairs, ratings = import_webui(tmp_path, [item])
    assert pairs[0]["models"] == ["qwen", "llama"] and pairs[0]["prompt"] == [message("system", "Be brief."), *prompt]
    said["d"]["done"] = False  # it was still being written
    comment = webui_item(None, comment="so so")
    assert import_webui(tmp_path, [item, comment]) == [[], ratings]
    assert "1 comments without a rating are left out" in capsys.readouterr().out
    item = webui_item()
    said = item["snapshot"]["chat"]["chat"]["history"]["messages"]
    said["c"]["content"], said["d"]["content"] = "    return 4\n", " 5"
    pairs, ratings = import_webui(tmp_path, [item])
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("    return 4", " 5")
    assert ratings[0]["completion"] == "    return 4"


def test_open_webuis_answers_are_compared_once_and_not_if_they_are_rated_alike(tmp_path):
    def items(of_c, of_d):
        d = webui_item(of_d, siblings=("qwen",), model_id="llama") | {"meta": {"message_id": "d"}}
        return [webui_item(of_c), d]

    def imported(items):
        pairs, ratings = import_webui(tmp_path, items)
        return [(p["chosen"], p["rejected"], p["by"]) for p in pairs], len(ratings)

    assert imported(items(1, 1)) == imported(items(-1, -1)) == ([], 2)
    assert imported(items(1, -1)) == imported(2 * items(1, -1)) == ([("4", "5", "")], 2)
    assert imported(items(-1, 1)) == ([("5", "4", "")], 2)
    people = [item | {"user_id": name} for name in ("Ada", "Bob") for item in items(1, -1)]
    assert imported(people) == ([("4", "5", "Ada"), ("4", "5", "Bob")], 4)


@pytest.mark.parametrize("name", ["a", "c", "d"])
def test_a_thought_that_open_webui_folds_into_a_message_is_refused(tmp_path, name):
    item = webui_item()
    said = item["snapshot"]["chat"]["chat"]["history"]["messages"]
    said[name]["content"] = '<details type="reasoning" done="true" duration="3">\n> two and two\n</details>\n4'
    with pytest.raises(UserError, match='export.json: item 0: "content" has <details type="reasoning">'):
        import_webui(tmp_path, [item])


def test_an_import_leaves_what_is_there(journal, tmp_path):
    (tmp_path / "export.json").write_text(json.dumps([webui_item()]))
    config = feedback.Config(open_webui=str(tmp_path / "export.json"), out=str(tmp_path / "new"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/ratings.jsonl").write_text("")
    with pytest.raises(UserError, match="ratings.jsonl: exists"):
        feedback.main(config)
    assert not (tmp_path / "new/pairs.jsonl").exists()
    journal()
    with pytest.raises(UserError, match="another process is writing"):
        feedback.main(dataclasses.replace(config, out=str(tmp_path / "feedback"), overwrite=True))


def broken(*path):
    """An item without something."""
    item = inner = webui_item()
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return item


def changed(name, **fields):
    """An item one of whose messages has other fields."""
    item = webui_item()
    item["snapshot"]["chat"]["chat"]["history"]["messages"][name] |= fields
    return item


MESSAGES = ("snapshot", "chat", "chat", "history", "messages")


@pytest.mark.parametrize(
    "items, wrong",
    [
        ([broken("data")], "item 0 has no 'data'"),
        ([webui_item(), broken("meta", "message_id")], "item 1 has no 'message_id'"),
        ([broken(*MESSAGES, "c")], "item 0 has no 'c'"),
        ([broken(*MESSAGES, "c", "content")], 'item 0: "content" is missing'),
        ([webui_item(5)], "1 or -1"),
        ([changed("c", done=False)], "the answer was cut"),
        ([changed("b", files=[{"type": "image", "url": "x"}])], "files"),
        ([changed("b", role="tool")], "'tool'"),
        ([webui_item() | {"type": "arena"}], "'arena'"),
        # what no trainer reads
        ([webui_item(), changed("c", content="4<|im_end|>")], "item 1: .* in a chat template already"),
        ([webui_item(), changed("d", content="5<|im_end|>")], "item 1: .* in a chat template already"),
        ([webui_item(), webui_item(comment="tie")], 'item 1: "comment" says something that is not read'),
        ([webui_item() | {"snapshot": None}], "item 0: "),
        ({"a": 1}, "an array"),
        ("[", "an array"),
    ],
)
def test_a_damaged_export_is_refused(tmp_path, items, wrong):
    with pytest.raises(UserError, match=wrong):
        import_webui(tmp_path, items)
    assert not list(tmp_path.glob("out*"))


def test_a_history_that_runs_in_a_circle_is_refused(tmp_path):
    item = webui_item()
    item["snapshot"]["chat"]["chat"]["history"]["messages"]["q"]["parentId"] = "a"
    with pytest.raises(UserError, match="item 0: "):
        import_webui(tmp_path, [item])


# --------------------------------------------------------------------------------------------------
# Win rates


def test_bradley_terry_finds_the_strengths_that_made_the_votes():
    strength = {"a": 4.0, "b": 1.0, "c": 0.25}  # geometric mean 1
    matches = {
        (i, j, "win"): round(4000 * strength[i] / (strength[i] + strength[j]))
        for i in strength
        for j in strength
        if i != j
    }
    found = bradley_terry(matches, seed=0)
    for model, s in strength.items():
        assert found[model]["value"] == pytest.approx(s / (s + 1), abs=0.003)
        assert found[model]["low"] < s / (s + 1) < found[model]["high"]
        assert found[model]["high"] - found[model]["low"] < 0.05
    ties = bradley_terry({("a", "b", "tie"): 8, ("a", "b", "both_bad"): 2, ("a", "a", "win"): 5}, seed=0)
    assert ties["a"]["value"] == ties["b"]["value"] == pytest.approx(0.5)
    assert bradley_terry({("a", "a", "win"): 5}, seed=0) == {}
    lone = bradley_terry({("a", "b", "win"): 3}, seed=0)
    assert 0.5 < lone["a"]["value"] < 1  # a model that has never lost is not infinitely strong
