"""What every stage shares: the command line, the run directory, the log; and the packs and pieces that text is cut into."""
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import Log, UserError, clear_run, clock_time, launch, open_run, parse_cli, peak_flops, random_state, set_random_state, setup
from data import corpus, tokenizer
from data.pack import next_tokens, pack, share, split
from model import GPT, config_for

settings.register_profile("here", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("here")


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Config:
    out: str  # directory of the run
    steps: int = 10  # how many; 0: as many as it takes
    lr: float = 0.02  # peak rate # and no more
    name_of_it: str = ""  # what it is called
    resume: bool = False  # go on
    shuffle: bool = True  # mix first


def test_every_type_in_every_spelling():
    c = parse_cli(Config, ["--out=a", "--steps", "1_000", "--lr=1e-3", "--name-of-it", "a b=c", "--resume", "--shuffle", "False"])
    assert c == Config("a", 1000, 0.001, "a b=c", True, False)
    assert parse_cli(Config, ["--out", "a", "--resume", "--steps=3"]) == Config("a", 3, resume=True)
    assert parse_cli(Config, ["--out="]).out == ""
    assert parse_cli(Config, ["--out=x=y", "--lr", "-2"]) == Config("x=y", lr=-2.0)
    for text, value in [("true", True), ("True", True), ("1", True), ("FALSE", False), ("0", False)]:
        assert parse_cli(Config, ["--out=a", f"--resume={text}"]).resume is value
    assert parse_cli(Config, ["--out=a", "--resume", "--lr=3"]).lr == 3


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--out=a", "--stepz=3"], "--stepz: no such flag"),
        (["--out=a", "--step=3"], "--step: no such flag"),  # no abbreviations
        (["--out=a", "--out=b"], "--out: given twice"),
        (["--out=a", "--name-of-it=x", "--name_of_it=y"], "--name_of_it: given twice"),
        (["--out=a", "--steps"], "--steps: needs a value"),
        (["--out=a", "--steps", "--resume"], "--steps: needs a value"),
        (["--out=a", "--steps=abc"], "--steps=abc: expected int"),
        (["--out=a", "--steps=1.5"], "--steps=1.5: expected int"),
        (["--out=a", "--steps="], "--steps=: expected int"),
        (["--out=a", "--steps", "-3"], "--steps=-3: a count was expected"),
        (["--out=a", "--lr=fast"], "--lr=fast: expected float"),
        (["--out=a", "--lr=nan"], "--lr=nan: not a number"),
        (["--out=a", "--resume=maybe"], "--resume=maybe: expected True or False"),
        (["--out=a", "--resume="], "--resume=: expected True or False"),
        (["--out=a", "shuffle"], "'shuffle': a flag was expected"),
        (["--out=a", "-x"], "'-x': a flag was expected"),
        (["--out=a", "--"], "--: no such flag"),
        (["--steps=3"], "--out: must be given"),
        ([], "--out: must be given"),
    ],
)
def test_bad_flags_are_named(argv, named):
    with pytest.raises(UserError, match=re.escape(named)):
        parse_cli(Config, argv)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_flag_with_comment_type_and_default(capsys, word):
    with pytest.raises(SystemExit) as e:
        parse_cli(Config, [word])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and "What every stage shares" in shown
    for line in (r"--out +str +directory of the run$", r"--steps +int +how many; 0: as many as it takes \(default: 10\)$",
                 r"--lr +float +peak rate # and no more \(default: 0.02\)$", r"--resume +bool +go on \(default: False\)$"):  # fmt: skip
        assert re.search(line, shown, flags=re.M), line


def test_every_scripts_flags_have_comments():
    import pretrain
    import sample

    for script in (pretrain, sample):
        comments = common.field_comments(script.Config)
        for field in script.Config.__dataclass_fields__.values():
            assert comments.get(field.name) and field.type in (int, float, str, bool)


def test_a_users_error_is_one_line_and_status_1(monkeypatch, capsys):
    def main(config):
        raise UserError(f"{config.out}: missing; bring it")

    monkeypatch.setattr("sys.argv", ["script.py", "--out=book.txt"])
    with pytest.raises(SystemExit) as e:
        launch(main, Config)
    assert e.value.code == "error: book.txt: missing; bring it"  # Python prints it to stderr and exits with 1
    monkeypatch.setattr("sys.argv", ["script.py", "--wrong"])
    with pytest.raises(SystemExit, match="--wrong"):
        launch(main, Config)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "abacus:1"])
def test_devices_that_are_not_there_are_named(device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=f"--device={device}"):
        setup(device, 0)


def test_random_state_comes_back():
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    state = random_state(cpu)
    first = torch.rand(5)
    set_random_state(state, cpu)
    assert torch.equal(first, torch.rand(5))


# ---------------------------------------------------------------------------------------------------------------------------------
# The run directory


@pytest.fixture(autouse=True)
def give_up_locks():
    """A process holds its locks until it ends; here it stands for several."""
    yield
    common.LOCKS.clear()


def run_with(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    (path / "step_000010").mkdir()
    (path / "step_000010/config.json").write_text("{}")
    (path / ".tmp_step_000020").mkdir()
    (path / "latest").symlink_to("step_000010")
    return path


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    assert open_run(str(tmp_path / "new/run"), False, False).is_dir()
    common.LOCKS.clear()
    assert open_run(str(tmp_path / "new/run"), False, False)  # nothing in it yet
    run = run_with(tmp_path / "old", log__jsonl="{}\n")
    for flags, named in [((False, False), "--resume goes on with it, --overwrite replaces it"), ((True, True), "choose one")]:
        with pytest.raises(UserError, match=named):
            open_run(str(run), *flags)
        common.LOCKS.clear()
    assert (run / "log.jsonl").exists() and (run / "step_000010").exists()
    with pytest.raises(UserError, match="--out"):
        open_run("", False, False)


def test_resume_keeps_all_but_half_written_checkpoints(tmp_path):
    run = run_with(tmp_path / "run", log__jsonl="{}\n", samples__txt="")
    before = {p.name for p in run.iterdir()}
    clear_run(open_run(str(run), True, False), False)
    assert {p.name for p in run.iterdir()} - {".lock"} == before - {".tmp_step_000020"}


def test_overwrite_deletes_only_what_a_run_writes(tmp_path):
    run = run_with(tmp_path / "run", log__jsonl="{}\n", samples__txt="s", notes__txt="mine", step_by_step__md="mine", best_practice="mine", nonfinite_step_000003__safetensors="")
    (run / "precious").mkdir()
    (run / "best").symlink_to(run / "precious")  # a link is deleted, never what it points to
    (run / "precious/data.txt").write_text("mine")
    before = {p.name for p in run.iterdir()}
    open_run(str(run), False, True)
    assert {p.name for p in run.iterdir()} - {".lock"} == before  # not before the input was looked at
    clear_run(run, True)
    assert {p.name for p in run.iterdir()} - {".lock"} == {"notes.txt", "step_by_step.md", "best_practice", "precious"}
    assert (run / "precious/data.txt").read_text() == "mine"


def test_a_second_process_is_kept_out(tmp_path, fork):
    run = tmp_path / "run"

    def hold():
        open_run(str(run), False, False)
        (run / "log.jsonl").write_text("{}\n")
        time.sleep(60)

    child = fork(hold)
    while not (run / "log.jsonl").exists():
        time.sleep(0.01)
    for flags in [(False, False), (True, False), (False, True)]:
        with pytest.raises(UserError, match="another process is writing this run"):
            open_run(str(run), *flags)
    assert (run / "log.jsonl").exists()
    os.kill(child.pid, 9)
    child.wait()
    open_run(str(run), True, False)  # a killed process holds nothing


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match=f"--out={out}"):
            open_run(str(out), False, False)


# ---------------------------------------------------------------------------------------------------------------------------------
# The log


def test_a_log_goes_back_to_where_the_run_goes_on(tmp_path):
    log = Log(tmp_path, 100, 0)
    log.write({"event": "start", "config": {"data": "b\u2028ücher.txt"}})  # U+2028 ends a line for str.splitlines, not in a file
    for step in range(1, 8):
        log.write({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            log.write({"step": step, "val_loss": 2 / step})
            log.sample(step, f"Once\r\nupon a \u2028time {step}\n=== not a step ===")
    lines, samples = (tmp_path / "log.jsonl").read_bytes(), (tmp_path / "samples.txt").read_bytes()
    for half in ('{"step": 3, "text": "ü'.encode()[:-1], b'{"step": 3}'):  # cut within a letter, and just before the line's end
        (tmp_path / "log.jsonl").write_bytes(lines + half)
        (tmp_path / "samples.txt").write_bytes(samples + b"=== step 8")
        Log(tmp_path, 100, 7)
        assert (tmp_path / "log.jsonl").read_bytes() == lines and (tmp_path / "samples.txt").read_bytes() == samples
    Log(tmp_path, 100, 4)
    kept = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().split("\n")[:-1]]
    assert [r.get("step") for r in kept] == [None, 1, 2, 2, 3, 4, 4] and kept[0]["config"]["data"] == "b\u2028ücher.txt"
    assert samples.startswith((tmp_path / "samples.txt").read_bytes()) and (tmp_path / "samples.txt").read_bytes().endswith(b"time 4\n=== not a step ===\n")
    Log(tmp_path, 100, 0)
    assert (tmp_path / "samples.txt").read_bytes() == b""


def test_a_full_disk_loses_no_line_and_breaks_none(small_disk, capsys):
    run = small_disk(64)
    log, room = Log(run, 10_000, 0), run / "filler"
    room.write_bytes(bytes(48 * 1024))  # what is left is a few pages: lines get cut in the middle
    steps = 0
    while (log.files or {"log.jsonl": (0, b"")})["log.jsonl"][1] == b"" or steps % 50:
        steps += 1
        log.write({"step": steps, "text": "ü" * (steps % 40)})
    assert "No space left" in capsys.readouterr().err
    log.sample(3, "a sample")
    room.unlink()
    log.sample(4, "another")
    log.write({"step": steps + 1})
    assert [json.loads(x)["step"] for x in (run / "log.jsonl").read_text().splitlines()] == list(range(1, steps + 2))
    assert (run / "samples.txt").read_text() == "=== step 3 ===\na sample\n=== step 4 ===\nanother\n"


def test_before_a_checkpoint_the_disk_gets_what_waited(small_disk):
    """Samples come seldom: what found no room is not left to wait for the next of them, and where it still finds none there is no checkpoint."""
    disk = small_disk(64)
    log = Log(disk, 9, 0)
    (disk / "filler").write_bytes(bytes(64 * 1024))
    log.sample(1, "rain")
    with pytest.raises(UserError, match="samples.txt: No space left on device; make room"):
        log.sync()
    (disk / "filler").unlink()
    log.sync()
    assert "rain" in (disk / "samples.txt").read_text()


def test_a_log_that_cannot_be_rewound_stays_as_it_is(small_disk):
    run = small_disk(64)
    text = "".join(json.dumps({"step": i, "text": "x" * 100}) + "\n" for i in range(200))
    (run / "log.jsonl").write_text(text)
    (run / "filler").write_bytes(bytes((os.statvfs(run).f_bavail - 1) * os.statvfs(run).f_bsize))
    with pytest.raises(UserError, match="No space left"):
        Log(run, 1000, 150)
    assert (run / "log.jsonl").read_text() == text


def test_a_line_a_step(tmp_path, capsys):
    log = Log(tmp_path, 7, 0, print_every=3)
    for step in range(1, 8):
        log.step(step, 5000, 100, torch.device("cpu"), loss=1.23456, lr=3e-4)
    records = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 8))
    assert records[0]["loss"] == 1.23456 and records[0]["tokens"] == 5000 and records[0]["tokens_per_s"] > 0 and "mfu" not in records[0]
    shown = capsys.readouterr().out.splitlines()
    assert [x.split(" |")[0] for x in shown] == ["step 3/7", "step 6/7", "step 7/7"] and "loss 1.2346 | lr 0.0003" in shown[0] and "eta 0m00s" in shown[2]
    assert (clock_time(59.9), clock_time(90), clock_time(3 * 3600 + 125)) == ("0m59s", "1m30s", "3h02m")


def test_every_gpus_peak(monkeypatch):
    """Dense bf16 TFLOP/s by the makers' data sheets, for names as drivers report them."""
    sheet = {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA H20": 148, "NVIDIA GH200 480GB": 989, "NVIDIA B200": 2250,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA A30": 165, "NVIDIA A40": 150, "NVIDIA L4": 121, "NVIDIA L40": 181,
        "NVIDIA L40S": 362, "NVIDIA RTX A6000": 155, "NVIDIA RTX 6000 Ada Generation": 364, "NVIDIA RTX A4000": 77, "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 3090 Ti": 71,
        "Tesla V100-SXM2-16GB": 125, "Tesla T4": 65, "AMD Instinct MI300X": 1307,
        "NVIDIA RTX A3000 Laptop GPU": 0, "NVIDIA RTX A1000": 0, "NVIDIA T400 4GB": 0, "NVIDIA GeForce GTX 1080": 0,
    }  # fmt: skip
    for name, tflops in sheet.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == tflops * 1e12, name
    assert peak_flops(torch.device("cpu")) == 0


# ---------------------------------------------------------------------------------------------------------------------------------
# Packs

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(LENGTHS)
def test_a_pack_is_its_documents_end_to_end(lengths):
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    for kind in (list, np.array, torch.tensor):
        p = pack([kind(d) for d in documents])
        assert (p.tokens.dtype, p.positions.dtype, p.cu.dtype) == (torch.int64, torch.int64, torch.int32)
        cu = p.cu.tolist()
        assert [p.tokens[a:b].tolist() for a, b in zip(cu, cu[1:])] == documents and p.max_len == max(lengths)
        assert p.positions.tolist() == [i for n in lengths for i in range(n)]
    assert next_tokens(p, -100).tolist() == [t for d in documents for t in [*d[1:], -100]]
    assert next_tokens(p, torch.arange(len(lengths))).tolist() == [t for i, d in enumerate(documents) for t in [*d[1:], i]]


@given(LENGTHS, st.integers(1, 120))
def test_split_loses_nothing_and_fills_its_packs(lengths, limit):
    parts = split(lengths, limit)
    assert [i for a, b in parts for i in range(a, b)] == list(range(len(lengths)))
    sizes = [sum(lengths[a:b]) for a, b in parts]
    assert all(size <= limit or b - a == 1 for size, (a, b) in zip(sizes, parts))
    assert all(size + lengths[b] > limit for size, (_, b) in zip(sizes, parts[:-1]))  # the next document did not fit
    assert split([], limit) == []


@given(LENGTHS, st.integers(1, 9))
def test_ranks_share_a_batch_evenly_and_whole(lengths, world):
    parts = [share(lengths, rank, world) for rank in range(world)]
    assert [i for a, b in parts for i in range(a, b)] == list(range(len(lengths)))
    for a, b in parts:
        assert abs(sum(lengths[a:b]) - sum(lengths) / world) <= max(lengths)


# ---------------------------------------------------------------------------------------------------------------------------------
# Pieces of a corpus

EOT = 0
STREAMS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12), min_size=1, max_size=3)  # lengths of each stream's documents


def streams_of(lengths):
    """eot document eot document ... eot, each other token different from all others."""
    streams, token = [], 1
    for documents in lengths:
        ids = [EOT]
        for n in documents:
            ids += [*range(token, token + n), EOT]
            token += n
        streams.append(np.array(ids, dtype=np.int32))
    return streams


@given(STREAMS, st.integers(1, 20), st.data())
def test_every_token_is_predicted_exactly_once(lengths, context, data):
    first = data.draw(st.integers(0, context))
    streams = streams_of(lengths)
    found = corpus.pieces(streams, EOT, context, first)
    seen = [np.zeros(len(s), dtype=int) for s in streams]
    for s, a, b in found:
        assert 0 < b - a <= context and EOT not in streams[s][a + 1 : b]  # within one document
        seen[s][a + 1 : b + 1] += 1
    for counts in seen:
        assert counts[0] == 0 and (counts[1:] == 1).all()
    windows = [-(-(n + 1) // context) for documents in lengths for n in documents]
    assert sum(windows) <= len(found) <= sum(windows) + len(windows)
    assert first or len(found) == sum(windows)
    p, targets = corpus.pack_pieces(streams, found)
    assert len(p.tokens) == len(targets) == sum(len(s) - 1 for s in streams)
    inside = (p.positions[1:] > 0).nonzero()[:, 0]
    assert torch.equal(targets[inside], p.tokens[inside + 1])  # within a piece the targets are the next tokens


@given(STREAMS, st.integers(1, 20), st.integers(1, 90), st.integers(0, 3))
def test_an_order_takes_every_piece_once_an_epoch_and_resumes_exactly(lengths, context, tokens, seed):
    streams = streams_of(lengths)
    order = corpus.text_order(streams, EOT, context, seed)
    batches, states = [], []
    n = sum(len(s) - 1 for s in streams)
    while order.epoch < 2:
        states.append((order.epoch, order.index))
        batches.append(order.batch(tokens))
        sizes = batches[-1][:, 2] - batches[-1][:, 1]
        assert sizes.sum() <= tokens or len(sizes) == 1
    predicted = np.concatenate([np.arange(a, b) + 10_000 * s for batch in batches for s, a, b in batch])
    for epoch in range(2):  # all of it, before any of it again
        assert len(set(predicted[epoch * n : (epoch + 1) * n].tolist())) == n
    for state, batch in zip(states, batches):
        assert np.array_equal(corpus.text_order(streams, EOT, context, seed, *state).batch(tokens), batch)


def test_orders_differ_by_epoch_and_seed():
    streams = streams_of([[40] * 30])
    first = lambda seed, epoch: corpus.text_order(streams, EOT, 16, seed, epoch).items  # noqa: E731
    assert np.array_equal(first(0, 0), first(0, 0))
    assert not np.array_equal(first(0, 0), first(1, 0)) and not np.array_equal(first(0, 0), first(0, 1))
    cuts = {tuple(sorted(b - a for _, a, b in first(0, epoch)[:9])) for epoch in range(5)}
    assert len(cuts) > 1  # other epochs see other windows


@given(st.lists(st.text(max_size=30), min_size=1, max_size=9).filter(any), st.floats(0, 1))
def test_holding_out_loses_no_text(documents, fraction):
    train, val = corpus.hold_out(documents, fraction)
    assert "".join(train + val) == "".join(documents) and len(val) >= 1
    if len(documents) > 1:
        assert train + val == documents and (fraction == 0 or abs(len(val) - len(documents) * fraction) <= 1)


def test_a_stream_scans_back_to_its_documents():
    tok = tokenizer.byte_level()
    documents = ["", "a<|endoftext|>b", "ü😀\n", " "]
    stream = corpus.encode(tok, documents)
    ends = np.flatnonzero(stream == tok.eot)
    assert [tok.decode(stream[a + 1 : b].tolist()) for a, b in zip(ends, ends[1:])] == documents  # a user's text never makes an eot


def test_bits_per_byte_of_a_uniform_model_by_hand():
    """Each token costs log2 V bits, an end of document too, but that holds no bytes; and no choice of micro-batches matters."""
    documents = ["häßlich", "abc", "", "😀!"]
    n_bytes = sum(len(d.encode()) for d in documents)
    for tok, n_tokens in [(tokenizer.byte_level(), n_bytes + 4), (tokenizer.characters("".join(documents)), 7 + 3 + 2 + 4)]:
        model = GPT(config_for(1, tok.n_vocab, width=32, context=5)).init_weights(0)
        streams = [corpus.encode(tok, documents[:2]), corpus.encode(tok, documents[2:])]
        cut = corpus.some_pieces(streams, tok.eot, 5, 10**9)
        for micro_tokens in (1, 7, 10**6):
            nats, bits = corpus.evaluate(model, streams, cut, tokenizer.token_bytes(tok), micro_tokens)
            assert nats == pytest.approx(math.log(tok.n_vocab), rel=1e-6)
            assert bits == pytest.approx(n_tokens * math.log2(tok.n_vocab) / n_bytes, rel=1e-6)


def test_evaluation_leaves_the_model_as_it_was(make_model):
    tok = tokenizer.byte_level()
    model = make_model(vocab_size=tok.n_vocab)
    model.dropout = 0.5
    streams = [corpus.encode(tok, ["some text to read"])]
    for training in (True, False):
        model.train(training)
        once, again = (corpus.evaluate(model, streams, corpus.pieces(streams, tok.eot, 8), tokenizer.token_bytes(tok), 100) for _ in range(2))
        assert once == again and model.training is training


def test_some_pieces_are_a_fixed_choice_of_about_so_many_tokens():
    streams = streams_of([[13] * 200, [5] * 100])
    every = corpus.pieces(streams, EOT, 8)
    for tokens in (1, 100, 1500):
        some = corpus.some_pieces(streams, EOT, 8, tokens)
        n = (some[:, 2] - some[:, 1]).sum()
        assert tokens <= n < tokens + 8 and np.array_equal(some, corpus.some_pieces(streams, EOT, 8, tokens))
        assert len({tuple(p) for p in some} - {tuple(p) for p in every}) == 0 and len({tuple(p) for p in some}) == len(some)
    assert len({s for s, *_ in corpus.some_pieces(streams, EOT, 8, 1500)}) == 2  # of all streams, not the first
    assert np.array_equal(corpus.some_pieces(streams, EOT, 8, 10**6), every)


def test_text_files_are_read_strictly(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    assert corpus.read_documents(file("a.txt", "\ufeffüber\r\nalles".encode())) == ["über\r\nalles"]
    assert corpus.read_documents(file("a.jsonl", b'{"text": "a"}\n\n{"text": "", "x": 1}\n')) == ["a", ""]
    for name, data, named in [
        ("b.jsonl", b'{"text": "a"}\n{"text": 3}\n', 'b.jsonl:2: no "text" string'),
        ("c.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'c.jsonl:2: no "text" string'),
        ("d.jsonl", b'{"text": "a"\n', "d.jsonl:1:"),
        ("e.jsonl", b"[]\n", "e.jsonl:1:"),
        ("f.txt", b"", "f.txt: there is no text in it"),
        ("g.jsonl", b'{"text": ""}\n', "g.jsonl: there is no text in it"),
        ("h.txt", b"good\nb\xffad", "h.txt:2: byte 6"),
    ]:
        with pytest.raises(UserError, match=re.escape(named)):
            corpus.read_documents(file(name, data))
    with pytest.raises(UserError, match="absent.txt: No such file"):
        corpus.read_documents(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_a_single_gpu_is_named_by_its_index(asked, monkeypatch):
    """torch.cuda.set_device refuses a device without an index, on a CPU build as on a GPU: "cuda" must have become "cuda:0" before."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(common, "prove", lambda device: {})
    assert common.setup(asked, 0) == torch.device("cuda", 0)
    assert chosen == [0]
