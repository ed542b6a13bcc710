"""What a stranger's files can do to whoever loads them: be refused in one line, at once, without taking memory for what they only claim; and never run."""
import ast
import contextlib
import json
import os
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from runs import refused, save, start, write_rows
from test_sft import TINY, some_rows
from test_pretrain import succeeds

import report
import sft
from checkpoint import damage, find, load, load_state, sha256
from common import UserError
from data import chat, corpus, prepare, tokenizer
from data.read import LARGEST_JSON
from optim import Optimizer

ROOT, BYTES = Path(__file__).parents[1], tokenizer.byte_level()


# ---------------------------------------------------------------------------------------------------------------------------------
# The product runs no code of others

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jinja2", "runpy", "code", "imp"}
LOADERS = {(module, "load") for module in ("torch", "np", "numpy")} | {("os", "system"), ("os", "popen"), ("torch.hub", "load"), ("torch.jit", "load")}
FLAGS = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}  # torch.load has no place here at all, with weights_only or without


def offences(source):
    """What in some Python source could run code that it reads: [(function it stands in, what)]."""
    found = []

    def walk(node, where):
        where = node.name if isinstance(node, ast.FunctionDef) else where
        if isinstance(node, ast.Import):
            found.extend((where, a.name) for a in node.names if a.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append((where, node.module))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("eval", "exec", "compile", "__import__"):
            found.append((where, node.id))
        if isinstance(node, ast.Attribute) and ((ast.unparse(node.value), node.attr) in LOADERS or node.attr in ("exec_module", "import_module", "load_module")):
            found.append((where, ast.unparse(node)))
        if isinstance(node, ast.keyword) and node.arg in FLAGS:
            found.append((where, node.arg))
        for child in ast.iter_child_nodes(node):
            walk(child, where)

    walk(ast.parse(source), "")
    return found


def test_nothing_that_is_read_is_run_but_the_users_own_reward_functions():
    sources = [path for pattern in ("*.py", "data/*.py", "kernels/*.py") for path in sorted(ROOT.glob(pattern))]
    found = {path.name: offences(path.read_text()) for path in sources}
    ours = {"_lib.py": [("prove", "__import__")]}  # six modules of this folder, by names written there
    assert len(sources) > 25 and {name: what for name, what in found.items() if what} == ours | {"rollout.py": [("load_function", "spec.loader.exec_module")]}


@pytest.mark.parametrize("source", ["import pickle", "from yaml import load", "def f():\n import marshal", "torch.load(p)", "np.load(p, mmap_mode='r')", "eval(x)", "f = exec",
                                    "g(trust_remote_code=True)", "run(c, shell=True)", "os.system(c)", "import jinja2.sandbox", "importlib.import_module(n)"])  # fmt: skip
def test_what_could_run_code_is_found(source):
    assert offences(source) and not offences(f"x = {source!r}\nmodel.eval()\nsafetensors.torch.load_file(p)\nre.compile(p)")


# ---------------------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def sparingly(megabytes=200):
    """What is done within may take a second of the processor and so many megabytes; what does not end is ended."""

    def too_long(number, frame):
        raise AssertionError("this does not end")

    if not Path("/proc/self/statm").exists():
        pytest.skip("what memory is taken is known on Linux only")
    used, (_, most) = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"), resource.getrlimit(resource.RLIMIT_AS)
    before, begin = signal.signal(signal.SIGALRM, too_long), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 20)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begin < 1


def refuses(read, path, *names):
    """Reading is refused in one line that names the file, or the directory it lies in, and all of `names`."""
    with sparingly(), pytest.raises(UserError) as e:
        read()
    said = str(e.value)
    assert str(path) in said and said.isprintable() and len(said) < 3000 and all(name in said for name in names), said


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = save(random_model, tmp_path_factory.mktemp("ours"), "sft")
    (folder / "train_state.json").write_text('{"epoch": 0, "index": 7, "best": Infinity, "beta": 0.1, "usual": [0.5, 20.0], "none": null}')
    shutil.copy(folder / "model.safetensors", folder / "train_state.safetensors")
    return folder


@pytest.fixture
def theirs(ours, tmp_path):
    """A stranger's directory, which has no manifest."""
    folder = shutil.copytree(ours, tmp_path / "theirs")
    for name in ("manifest.json", "feinschliff.json"):
        (folder / name).unlink()
    return folder


def raw(path, **changes):
    """Set fields of a JSON file to what is given as JSON, valid or not."""
    marked = json.loads(path.read_text()) | {key: f"@{key}@" for key in changes}
    text = json.dumps(marked)
    for key, value in changes.items():
        text = text.replace(f'"@{key}@"', value)
    path.write_text(text)


def become(kind, path):
    """Put something else than a plain, small file in its place."""
    good = path.read_bytes() if path.exists() else b"{}"
    path.unlink(missing_ok=True)
    if kind == "/dev/zero":
        path.symlink_to(kind)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(good + b" " * LARGEST_JSON)


DEEP = "[" * 100_000
NESTED = "[" * 500 + "]" * 500  # Python reads it, and could not show it everywhere
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
ABSURD = ("1000000000000", "1000000000", "9" * 400, "9" * 5000, "1e400", "NaN", "-Infinity", "-1", "0", "2.5", "true", '"64"', "[64]", "{}", NESTED, DEEP)


def test_what_is_well_meant_is_read_sparingly(ours, theirs):
    """Or the refusals below would prove nothing."""
    with sparingly():
        load(ours)
        model, _, info = load(theirs)
        load_state(ours)
    assert info == {} and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), load(ours)[0].state_dict().values()))


@pytest.mark.parametrize("key", SIZES)
def test_absurd_sizes_are_refused_before_memory_is_taken(theirs, key):
    good = (theirs / "config.json").read_text()
    for value in ABSURD:
        (theirs / "config.json").write_text(good)
        raw(theirs / "config.json", **{key: value})
        refuses(lambda: load(theirs), theirs)


@pytest.mark.parametrize("changes", [
    {"hidden_size": "1048576", "num_attention_heads": "1048576", "intermediate_size": "1048576", "head_dim": "1048576", "num_hidden_layers": "1048576"},
    {"rms_norm_eps": NESTED}, {"rms_norm_eps": '"' + "x" * 10**6 + '"'}, {"rms_norm_eps": "9" * 400}, {"rope_parameters": "[1]"}, {"rope_parameters": '"llama3"'}, {"rope_parameters": '{"rope_type": ["llama3"]}'},
    {"rope_parameters": '{"rope_type": "default", "rope_theta": ' + "9" * 400 + "}"}, {"architectures": "[7]", "head_dim": "7"}, {"vocab_size": "1000000000000", "hidden_size": "1000000000000"}, {"layer_types": "7", "vocab_size": "0"},
    {"model_type": NESTED}, {"model_type": '"' + "x" * 10**6 + '"'}, {"hidden_act": NESTED}, {"tie_word_embeddings": '"false"'}, {"attention_bias": NESTED},
    {"rope_parameters": '{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}'},
])  # fmt: skip
def test_other_absurd_fields_are_refused(theirs, changes):
    raw(theirs / "config.json", **changes)
    refuses(lambda: load(theirs), theirs if "hidden_size" in changes else theirs / "config.json")


def test_layers_are_not_made_before_their_tensors_are_seen(theirs):
    """Two million would fit into the bytes of this file, and take minutes to make."""
    raw(theirs / "config.json", hidden_size="1", num_attention_heads="1", num_key_value_heads="1", head_dim="2", intermediate_size="1", num_hidden_layers="2000000")
    header, data = parts_of(theirs / "model.safetensors")
    put(theirs / "model.safetensors", header | {"x": {"dtype": "U8", "shape": [20_000_000], "data_offsets": [len(data), len(data) + 20_000_000]}}, data + bytes(20_000_000))
    refuses(lambda: load(theirs), theirs, "2000000 layers")


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "directory", "huge"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_a_device_a_pipe_and_a_huge_file_are_not_read(theirs, kind, name):
    become(kind, theirs / name)
    refuses(lambda: load(theirs), theirs)


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "directory", "huge"])
@pytest.mark.parametrize("name", ["manifest.json", "feinschliff.json", "train_state.json", "train_state.safetensors"])
def test_nor_in_a_checkpoint_of_ours(ours, tmp_path, kind, name):
    folder = shutil.copytree(ours, tmp_path / "copy")
    become(kind, folder / name)
    refuses(lambda: load_state(folder) if name.startswith("train") else load(folder), folder)


# ---------------------------------------------------------------------------------------------------------------------------------
# Weights


def parts_of(path):
    """(header, data) of a safetensors file."""
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def put(path, header, data, length=None):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


EMBED = "model.embed_tokens.weight"  # float32 [260, 16]
TENSORS = {
    "strings": {"dtype": "STRING"}, "integers": {"dtype": "I32"}, "long integers": {"dtype": "I64", "shape": [130, 16]}, "bools": {"dtype": "BOOL", "shape": [260, 64]},
    "eight bits": {"dtype": "F8_E4M3", "shape": [1040, 16]}, "eight bits, right shape": {"dtype": "F8_E4M3", "data_offsets": [0, 4160]}, "offsets that overlap": {"data_offsets": [0, 20000]}, "offsets beyond the end": {"data_offsets": [0, 2**62]},
    "offsets turned round": {"data_offsets": [16640, 0]}, "negative offsets": {"data_offsets": [-16640, 0]}, "a shape whose product overflows": {"shape": [2**32, 2**32]},
    "another shape": {"shape": [16, 260]}, "no shape": {"shape": None}, "a negative shape": {"shape": [-260, -16]}, "a nested shape": {"shape": [[260, 16]]}, "not a number": {"shape": [float("nan"), 16]},
}  # fmt: skip


@pytest.mark.parametrize("change", TENSORS)
def test_weights_that_are_not_what_they_are_said_to_be_are_refused(theirs, change):
    path = theirs / "model.safetensors"
    header, data = parts_of(path)
    assert header[EMBED]["shape"] == [260, 16] and header[EMBED]["dtype"] == "F32"
    begin = header[EMBED]["data_offsets"][0]
    header[EMBED] |= TENSORS[change]
    if "data_offsets" in TENSORS[change]:
        header[EMBED]["data_offsets"] = [begin + i for i in TENSORS[change]["data_offsets"]]
    put(path, header, data)
    refuses(lambda: load(theirs), path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 2**26, 10**6, 0])
def test_header_lengths_are_not_believed(theirs, length):
    path = theirs / "model.safetensors"
    put(path, *parts_of(path), length=length)
    refuses(lambda: load(theirs), path)


def test_a_header_has_a_sensible_size(theirs):
    header, data = parts_of(theirs / "model.safetensors")
    put(theirs / "model.safetensors", header | {"__metadata__": {"a": "x" * 2**23}}, data)
    refuses(lambda: load(theirs), theirs / "model.safetensors", "header")


@pytest.mark.parametrize("header", ["[" * 10**6, '{"a":' * 10**5, "{}", "[]", "null", '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', '{"": 1}'])
def test_headers_are_not_believed(theirs, header):
    put(theirs / "model.safetensors", header, b"")
    refuses(lambda: load(theirs), theirs)


NAMES = ["../outside", "../../etc/passwd", "..", ".", "", "/etc/passwd", "/dev/zero", "a\0b", "./model.safetensors", "model.safetensors/", "x//y", "nothing.safetensors", "x" * 300, 7, None, ["model.safetensors"]]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_index_leads_to_nothing_outside(theirs, name):
    shutil.copy(theirs / "model.safetensors", theirs.parent / "outside")  # were it followed, all would be well
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: name}}))
    refuses(lambda: load(theirs), theirs)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "model.safetensors"}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(theirs, index):
    (theirs / "model.safetensors.index.json").write_text(index)
    refuses(lambda: load(theirs), theirs)


# ---------------------------------------------------------------------------------------------------------------------------------
# What our own checkpoints say of themselves


def sign(folder):
    """A manifest that agrees with what is there now, as whoever made a checkpoint can write one."""
    names = [p.name for p in folder.iterdir() if p.name != "manifest.json" and p.is_file()]
    (folder / "manifest.json").write_text(json.dumps({name: sha256(folder / name) for name in names}))


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(n, str)], ids=repr)
def test_a_manifest_leads_to_nothing_outside(ours, tmp_path, name):
    folder = shutil.copytree(ours, tmp_path / "copy")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside")
    digest = sha256("/etc/passwd") if "passwd" in name else sha256(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(json.loads((folder / "manifest.json").read_text()) | {name: digest}))
    refuses(lambda: load(folder), folder)


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "directory"])
def test_a_manifest_that_names_no_plain_file_is_refused(ours, tmp_path, kind):
    folder = shutil.copytree(ours, tmp_path / "copy")
    become(kind, folder / "more")
    raw(folder / "manifest.json", more='"00"')
    refuses(lambda: load(folder), folder, "more")


@pytest.mark.parametrize("changes", [{"stage": "7"}, {"stage": "null"}, {"step": '"1"'}, {"config": "[]"}, {"data": "7"}, {"lineage": "{}"}, {"lineage": "[1]"}, {"lineage": '[{"path": 1, "weights": ""}]'},
                                     {"lineage": '[{"path": "x"}]'}, {"lineage": NESTED}, {"center": "NaN"}, {"center": '"0"'}, {"critic_center": "[]"}, {"step": "1e400"}])  # fmt: skip
def test_what_a_checkpoint_says_of_itself_has_its_kind(ours, tmp_path, changes):
    folder = shutil.copytree(ours, tmp_path / "copy")
    raw(folder / "feinschliff.json", **changes)
    sign(folder)
    refuses(lambda: load(folder), folder / "feinschliff.json")


@pytest.mark.parametrize("changes", [{"epoch": "-1"}, {"epoch": "1.5"}, {"index": "null"}, {"index": '"7"'}, {"index": "9" * 30}, {"index": NESTED}, {"replay_index": "-1"}, {"beta": '"x"'}, {"best": "NaN"},
                                     {"usual": "[[1], 2]"}, {"usual": '{"a": 1}'}])  # fmt: skip
def test_the_counters_of_a_run_are_numbers(ours, tmp_path, changes):
    folder = shutil.copytree(ours, tmp_path / "copy")
    raw(folder / "train_state.json", **changes)
    refuses(lambda: load_state(folder), folder / "train_state.json")


@pytest.mark.parametrize("where", ["/dev/zero", "/etc/passwd", "/dev", "/proc/self", "../" * 50, "a\0b", ""])
def test_a_lineage_leads_to_no_checkpoint_that_is_none(where):
    refuses(lambda: find(where), "no checkpoint here")


def test_a_directory_that_only_looks_like_a_step_is_none(tmp_path):
    (tmp_path / "step_²").mkdir()
    refuses(lambda: find(tmp_path), tmp_path, "no checkpoint here")


def test_a_place_in_the_data_beyond_its_end_is_the_next_epochs_beginning():
    stream = np.array([256, 104, 105, 256])
    order = corpus.text_order([stream], 256, 8, 0, index=10**12)
    assert len(order.batch(8)) and order.epoch >= 1


def test_a_report_shows_what_a_stranger_wrote_and_does_not_obey_it():
    info = {"lineage": [{"path": "<script>", "weights": "<script>"}], "data": {"<script>": "<script>"}, "step": 1, "code": "<script>", "stage": "sft", "config": {}}
    assert "<script" not in report.lineage({"<script>": {"info": info}})


def test_a_path_that_cannot_be_asked_for_is_named(tmp_path, fork):
    assert refused(start(fork, sft, init="x" * 300, data="x.jsonl", out=tmp_path / "run", device="cpu")) == f"error: {'x' * 300}/config.json: File name too long"
    assert refused(start(fork, sft, init=tmp_path, data="x", out="a\n\x1b[2Jb" + "x" * 300, device="cpu")).startswith("error: --out=a\\n\\x1b[2Jbxxx")


def test_moments_of_another_shape_are_refused():
    """Fused AdamW reads and writes beyond their ends: it ended the process."""
    model = random_model()
    optimizer = Optimizer(model, 0.1)
    model.embed.grad = torch.ones_like(model.embed)
    optimizer.step(1.0)
    good = optimizer.state()
    Optimizer(model, 0.1).load_state(good)
    for name, value in (("exp_avg/embed", torch.zeros(1)), ("exp_avg_sq/embed", torch.zeros(32, 61)), ("exp_avg/embed", torch.zeros(61, 32, dtype=torch.bfloat16)), ("step/embed", torch.zeros(9))):
        with pytest.raises(ValueError, match="embed have not its shape or type"):
            Optimizer(model, 0.1).load_state(good | {name: value})


def test_a_run_does_not_go_on_from_a_state_that_is_another_models(tmp_path, fork):
    save(random_model, tmp_path / "base", "pretrain")
    data = write_rows(tmp_path / "chat.jsonl", some_rows(40, 1))
    flags = TINY | {"init": tmp_path / "base", "data": data, "out": tmp_path / "run", "steps": 1}
    succeeds(start(fork, sft, **flags))
    folder = find(tmp_path / "run")
    header, values = parts_of(folder / "train_state.safetensors")
    good = (folder / "train_state.safetensors").read_bytes()
    for name, change in (("exp_avg/embed", {"shape": [16, 260]}), ("random/cpu", {"dtype": "I8"})):
        (folder / "train_state.safetensors").write_bytes(good)
        put(folder / "train_state.safetensors", header | {name: header[name] | change}, values)
        sign(folder)
        line = refused(start(fork, sft, **flags, resume=True))
        assert str(folder) in line and "train_state is damaged" in line


# ---------------------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("pattern", [
    r"(?:[\s\S]|[\s\S])*(?!\s)x|[\s\S]", r"(?:\p{L}+)+(?=\d)|[\s\S]", r"(?:a|a)*(?=b)|[\s\S]", "a?" * 40 + "a" * 101 + r"|[\s\S]", r"(\p{L}*)*\1x|[\s\S]", r"(?:\p{L}{1000}){1000}|[\s\S]",
    r"(?:(?:a{1,1000}){1,1000}){1,1000}|[\s\S]", "(" * 900 + "a" + ")" * 900 + r"|[\s\S]", "[" * 900 + "a" + "]" * 900 + r"|[\s\S]", r"[\s\S]|" * 10**6 + "x", r"(?R)?|[\s\S]", r"(?P<n>(?P>n)?|[\s\S])", r"(?:x){e<=3}|(?<n>[\s\S])(?&n)*",
])  # fmt: skip
def test_a_pattern_cannot_hang(theirs, pattern):
    """It is refused, or tiktoken cuts with it in bounded time: at worst it gives up on a text, and says so."""
    raw(theirs / "tokenizer.json", pre_tokenizer=json.dumps({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}))  # fmt: skip
    with sparingly(600):
        try:
            tok = tokenizer.load(theirs)
        except UserError as e:
            assert str(theirs / "tokenizer.json") in str(e) and "\n" not in str(e) and len(str(e)) < 3000
            return
    with sparingly(600), contextlib.suppress(UserError):
        tok.encode_ordinary("a" * 60 + "!")


def test_a_text_on_which_tiktoken_gives_up_is_a_users_error(capfd):
    tok = tokenizer.reserve("slow", r"(?:q|q)*(?=b)|[\s\S]", {bytes([b]): b for b in range(256)}, {})
    with pytest.raises(UserError, match="takes too many steps"):
        tok.encode_ordinary("q" * 60 + "!")
    assert tok.encode_ordinary("ok") == [111, 107]


LETTERS = {a + b: 300 + 16 * i + j for i, a in enumerate("abcdefghijklmnop") for j, b in enumerate("abcdefghijklmnop")}
VOCABULARIES = {
    "ids of 10^12": lambda m: m | {"vocab": m["vocab"] | {"aa": 10**12}}, "an id twice": lambda m: m | {"vocab": m["vocab"] | {"aa": 97}}, "no tokens": lambda m: m | {"vocab": {}, "merges": [["a", "b"]]},
    "merges in a circle": lambda m: m | {"vocab": m["vocab"] | {"ab": 300}, "merges": [["ab", "ab"], ["a", "b"]]}, "a merge with itself": lambda m: m | {"merges": [["", "a"]]}, "nested merges": lambda m: m | {"merges": [[["a", "b"]]]},
    "long tokens that take minutes": lambda m: m | {"vocab": m["vocab"] | LETTERS | {("abcdefghijklmnop"[i % 16] + "ponmlkjihgfedcba"[i // 16 % 16]) * 255 + "ab"[i // 256 % 2]: 1000 + i for i in range(400)}},
    "a token of a megabyte": lambda m: m | {"vocab": m["vocab"] | {"a" * 2**20: 300}}, "ids that are true": lambda m: m | {"vocab": m["vocab"] | {"aa": True}}, "nested ids": lambda m: m | {"vocab": m["vocab"] | {"aa": [[300]]}},
    "not BPE": lambda m: m | {"type": "Unigram"}, "half a surrogate pair": lambda m: m | {"vocab": m["vocab"] | {"\ud800": 300}},
}  # fmt: skip


@pytest.mark.parametrize("change", VOCABULARIES)
def test_absurd_vocabularies_are_refused(theirs, change):
    path = theirs / "tokenizer.json"
    raw(path, model=json.dumps(VOCABULARIES[change](json.loads(path.read_text())["model"])))
    refuses(lambda: load(theirs), path)


@pytest.mark.parametrize("added", [[{"id": 97, "content": "<|endoftext|>"}], [{"id": 300, "content": "a"}], [{"id": 10**12, "content": "x"}], [{"id": 300, "content": ""}], [{"id": 300, "content": 7}],
                                   [{"id": 300, "content": ["x"]}], [{"content": "x"}], [7], {"a": 1}, [{"id": 300, "content": "\ud800"}], [{"id": 256, "content": "<|endoftext|>"}, {"id": 256, "content": "x"}]], ids=str)  # fmt: skip
def test_added_tokens_that_collide_are_refused(theirs, added):
    raw(theirs / "tokenizer.json", added_tokens=json.dumps(added))
    refuses(lambda: load(theirs), theirs / "tokenizer.json")


@pytest.mark.parametrize("template", ["{{ cycler.__init__.__globals__.os.system('touch PWNED') }}", "{% for i in range(10**12) %}x{% endfor %}", "{{", 7, NESTED])
def test_a_chat_template_is_never_run(theirs, template, monkeypatch):
    monkeypatch.chdir(theirs)
    raw(theirs / "tokenizer_config.json", chat_template=template if template is NESTED else json.dumps(template))
    with sparingly():
        _, tok, _ = load(theirs)
        chat.encode(tok, [{"role": "user", "content": "{{ 7 * 7 }}"}, {"role": "assistant", "content": "{% raw %}"}])
    assert not (theirs / "PWNED").exists()
    assert chat.decode_answer(tok, chat.encode_prompt(tok, [{"role": "user", "content": "{{ 7 * 7 }}"}])).startswith("user\n{{ 7 * 7 }}")


# ---------------------------------------------------------------------------------------------------------------------------------
# Prepared data


@pytest.fixture
def prepared(tmp_path):
    """A function: ({field of the manifest: JSON}, {field of the one shard's entry: value}, tokens) -> a directory as data/prepare.py leaves it, but for these."""

    def make(fields={}, entry={}, tokens=(256, 104, 105, 256)):
        folder = tmp_path / "data"
        folder.mkdir()
        for path in (folder / "train_00000.bin", tmp_path / "outside"):
            np.array(tokens, dtype=np.uint16).tofile(path)
        shard = {"file": "train_00000.bin", "tokens": len(tokens), "documents": 1, "bytes": 2, "sha256": sha256(tmp_path / "outside")} | entry
        manifest = {"format": 1, "tokenizer": tokenizer.fingerprint(BYTES), "n_vocab": 260, "dtype": "uint16", "eot": 256, "splits": {"train": [shard], "val": []}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        raw(folder / "manifest.json", **fields)
        return folder

    return make


def test_prepared_data_that_are_well_meant_are_read(prepared):
    assert prepare.check(prepared(), BYTES)["splits"]["val"] == []


@pytest.mark.parametrize("entry", [*({"file": name} for name in NAMES), {"tokens": 10**12}, {"tokens": -4}, {"tokens": "4"}, {"tokens": None}, {"tokens": 10**4000}, {"tokens": [4]}, {"sha256": None}, {"sha256": "00"}], ids=lambda e: repr(e)[:40])
def test_a_shard_is_what_its_entry_says_and_lies_in_the_folder(prepared, entry):
    folder = prepared(entry=entry)
    refuses(lambda: prepare.check(folder, BYTES), folder)


@pytest.mark.parametrize("fields", [{"dtype": '"int16"'}, {"dtype": '">u2"'}, {"dtype": '"V2"'}, {"dtype": '"O"'}, {"dtype": '"object"'}, {"dtype": '"uint8"'}, {"dtype": '"V1000000000"'}, {"dtype": "[]"}, {"dtype": "null"}, {"format": NESTED}, {"format": "2"}, {"splits": "[]"},
                                    {"splits": '{"train": [], "val": []}'}, {"splits": '{"train": [7], "val": []}'}, {"splits": '{"train": {}, "val": {}}'}, {"splits": DEEP}, {"tokenizer": "[]"}], ids=lambda f: repr(f)[:40])  # fmt: skip
def test_a_manifest_of_data_is_not_believed(prepared, fields):
    folder = prepared(fields)
    refuses(lambda: prepare.check(folder, BYTES), folder)


@pytest.mark.parametrize("tokens", [(), (256,), (256, 9999, 256), (104, 105, 256), (256, 104, 105)])
def test_shards_hold_ids_of_the_tokenizer_between_ends_of_documents(prepared, tokens):
    """An id beyond the vocabulary would end the run at the embedding, on a GPU without a word of why."""
    folder = prepared(tokens=tokens)
    refuses(lambda: prepare.check(folder, BYTES), folder)


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "directory", "huge"])
@pytest.mark.parametrize("name", ["manifest.json", "train_00000.bin"])
def test_a_device_or_a_pipe_is_no_prepared_data(prepared, kind, name):
    folder = prepared()
    become(kind, folder / name)
    refuses(lambda: prepare.check(folder, BYTES), folder)
