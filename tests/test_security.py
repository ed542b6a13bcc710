"""What an untrusted file can do to whoever loads it: be refused in one line, at once, without
taking memory for what it only claims; and never run."""

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
from runs import refused, save, start, succeeds, write_rows
from test_sft import TINY, some_rows

import report
import sft
from data import chat, shards, tokenizer
from data.read import LARGEST_JSON
from optim import Optimizer
from runtime.checkpoint import find, load, load_state
from runtime.errors import UserError
from runtime.files import sha256

ROOT, BYTES = Path(__file__).parents[1], tokenizer.byte_level()


# --------------------------------------------------------------------------------------------------
# The product runs no code of others

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jinja2"}
MODULES |= {"runpy", "code", "imp"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen")}
LOADERS |= {("torch.hub", "load"), ("torch.jit", "load")}
IMPORTERS = {"exec_module", "import_module", "load_module"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
# torch.load has no place here at all, with weights_only or without
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}


def offences(source):
    """What in some Python source could run code that it reads: [(function it stands in, what)]."""
    found = []

    def walk(node, where):
        if isinstance(node, ast.FunctionDef):
            where = node.name
        if isinstance(node, ast.Import):
            found.extend((where, a.name) for a in node.names if a.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append((where, node.module))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILT_IN:
            found.append((where, node.id))
        if isinstance(node, ast.Attribute):
            if (ast.unparse(node.value), node.attr) in LOADERS or node.attr in IMPORTERS:
                found.append((where, ast.unparse(node)))
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            found.append((where, node.arg))
        for child in ast.iter_child_nodes(node):
            walk(child, where)

    walk(ast.parse(source), "")
    return found


def test_nothing_that_is_read_is_run_but_the_users_own_reward_functions():
    allowed = {
        "scoring.py": [("load_function", "spec.loader.exec_module")],
        "kernels/proof.py": [("prove", "__import__")],  # six modules of that folder, by names written there
        "report.py": [("", "jinja2")],  # a template of its own, which escapes what it shows
        "sample.py": [("converse", "importlib.import_module")],  # the standard library's readline
        # chat templates, in jinja2's sandbox and a process with limits (test_template.py)
        "data/template.py": [("compiled", "jinja2.ext"), ("compiled", "jinja2.sandbox"), ("raise_exception", "jinja2")],
    }
    sources = [path for where in ("", "data", "kernels", "runtime") for path in sorted((ROOT / where).glob("*.py"))]
    found = {str(path.relative_to(ROOT)): offences(path.read_text()) for path in sources}
    assert len(sources) > 40 and {name: what for name, what in found.items() if what} == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "def f():\n import marshal",
        "torch.load(p)",
        "np.load(p, mmap_mode='r')",
        "eval(x)",
        "f = exec",
        "g(trust_remote_code=True)",
        "run(c, shell=True)",
        "os.system(c)",
        "import jinja2.sandbox",
        "importlib.import_module(n)",
    ],
)
def test_what_could_run_code_is_found(source):
    assert offences(source)
    assert not offences(f"x = {source!r}\nmodel.eval()\nsafetensors.torch.load_file(p)\nre.compile(p)")


# --------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def sparingly(megabytes=200):
    """What is done within may take a second of the processor and so many megabytes; what does not
    end is ended."""

    def too_long(number, frame):
        raise AssertionError("this does not end")

    if not Path("/proc/self/statm").exists():
        pytest.skip("how much memory is taken is known on Linux only")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    before, begin = signal.signal(signal.SIGALRM, too_long), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 20)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begin < 2  # on an idle core half a second; crowded ones differ by a factor of two


def refuses(path, read, *args, names=()):
    """read(*args) is refused in one line that names the file, or the directory it lies in, and all
    of `names`."""
    with sparingly(), pytest.raises(UserError) as e:
        read(*args)
    message = str(e.value)
    assert str(path) in message and message.isprintable() and len(message) < 3000, message
    assert all(name in message for name in names), message


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint as we write it."""
    folder = save(random_model, tmp_path_factory.mktemp("ours"), "sft")
    counters = '{"best": Infinity, "warnings": [], "order": {"epoch": 0, "index": 7}, "beta": {"value": 0.1}}'
    (folder / "train_state.json").write_text(counters)
    shutil.copy(folder / "model.safetensors", folder / "train_state.safetensors")
    return folder


@pytest.fixture
def untrusted(ours, tmp_path):
    """A directory of someone else, which has no manifest."""
    folder = shutil.copytree(ours, tmp_path / "untrusted")
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
    """Put something other than a regular, small file in its place."""
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


KINDS = ["/dev/zero", "pipe", "directory", "huge"]
DEEP = "[" * 100_000
NESTED = "[" * 500 + "]" * 500  # Python reads it, and could not show it everywhere
LONG = '"' + "x" * 10**6 + '"'
SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
SIZES += ["intermediate_size", "max_position_embeddings"]
ABSURD = ["1000000000000", "1000000000", "9" * 400, "9" * 5000, "1e400", "NaN", "-Infinity", "-1", "0", "2.5", "true"]
ABSURD += ['"64"', "[64]", "{}", NESTED, DEEP]


def test_what_is_well_meant_is_read_sparingly(ours, untrusted):
    """Or the refusals below would prove nothing."""
    with sparingly():
        load(ours)
        model, _, info = load(untrusted)
        load_state(ours)
    assert info == {}
    assert all(torch.equal(t, load(ours)[0].state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("key", SIZES)
def test_absurd_sizes_are_refused_before_memory_is_taken(untrusted, key):
    good = (untrusted / "config.json").read_text()
    for value in ABSURD:
        (untrusted / "config.json").write_text(good)
        raw(untrusted / "config.json", **{key: value})
        refuses(untrusted, load, untrusted)


BEYOND = dict.fromkeys([*SIZES[1:4], "head_dim", "intermediate_size"], "1048576")


@pytest.mark.parametrize(
    "changes",
    [
        BEYOND,
        {"rms_norm_eps": NESTED},
        {"rms_norm_eps": LONG},
        {"rms_norm_eps": "9" * 400},
        {"rope_parameters": "[1]"},
        {"rope_parameters": '"llama3"'},
        {"rope_parameters": '{"rope_type": ["llama3"]}'},
        {"rope_parameters": '{"rope_type": "default", "rope_theta": ' + "9" * 400 + "}"},
        {
            "rope_parameters": '{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, '
            '"high_freq_factor": 4.0, "original_max_position_embeddings": 64}'
        },
        {"architectures": "[7]", "head_dim": "7"},
        {"vocab_size": "1000000000000", "hidden_size": "1000000000000"},
        {"layer_types": "7", "vocab_size": "0"},
        {"layer_types": NESTED},
        {"layer_types": NESTED, "use_sliding_window": "true"},
        {"layer_types": LONG, "use_sliding_window": "true", "num_hidden_layers": "1000000"},
        {
            "layer_types": '["sliding_attention", "sliding_attention"]',
            "use_sliding_window": "true",
            "sliding_window": NESTED,
        },
        {"model_type": NESTED},
        {"model_type": LONG},
        {"hidden_act": NESTED},
        {"tie_word_embeddings": '"false"'},
        {"attention_bias": NESTED},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_other_absurd_fields_are_refused(untrusted, changes):
    raw(untrusted / "config.json", **changes)
    refuses(untrusted if "hidden_size" in changes else untrusted / "config.json", load, untrusted)


def test_layers_are_not_made_before_their_tensors_are_seen(untrusted):
    """Two million would fit into the bytes of this file, and take minutes to make."""
    one = dict.fromkeys([*SIZES[1:5], "intermediate_size"], "1")
    raw(untrusted / "config.json", **(one | {"head_dim": "2", "num_hidden_layers": "2000000"}))
    header, data = parts_of(untrusted / "model.safetensors")
    size = 20_000_000
    header["x"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
    put(untrusted / "model.safetensors", header, data + bytes(size))
    refuses(untrusted, load, untrusted, names=["2000000 layers"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"],
)
def test_a_device_a_pipe_and_a_huge_file_are_not_read(untrusted, kind, name):
    if "index" in name:  # which is read only where there is no model.safetensors
        (untrusted / "model.safetensors").unlink()
    become(kind, untrusted / name)
    refuses(untrusted, load, untrusted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "feinschliff.json", "train_state.json", "train_state.safetensors"])
def test_nor_in_a_checkpoint_of_ours(ours, tmp_path, kind, name):
    folder = shutil.copytree(ours, tmp_path / "copy")
    become(kind, folder / name)
    refuses(folder, load_state if name.startswith("train") else load, folder)


# --------------------------------------------------------------------------------------------------
# Weights


def parts_of(path):
    """(header, data) of a safetensors file."""
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def put(path, header, data, length=None):
    """Write a safetensors file, whose header may claim another length than it has."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


EMBED = "model.embed_tokens.weight"  # float32 [260, 16]
TENSORS = {
    "strings": {"dtype": "STRING"},
    "integers": {"dtype": "I32"},
    "long integers": {"dtype": "I64", "shape": [130, 16]},
    "bools": {"dtype": "BOOL", "shape": [260, 64]},
    "eight bits": {"dtype": "F8_E4M3", "shape": [1040, 16]},
    "eight bits, right shape": {"dtype": "F8_E4M3", "data_offsets": [0, 4160]},
    "offsets that overlap": {"data_offsets": [0, 20000]},
    "offsets beyond the end": {"data_offsets": [0, 2**62]},
    "offsets turned round": {"data_offsets": [16640, 0]},
    "negative offsets": {"data_offsets": [-16640, 0]},
    "a shape whose product overflows": {"shape": [2**32, 2**32]},
    "another shape": {"shape": [16, 260]},
    "no shape": {"shape": None},
    "a negative shape": {"shape": [-260, -16]},
    "a nested shape": {"shape": [[260, 16]]},
    "not a number": {"shape": [float("nan"), 16]},
}


@pytest.mark.parametrize("change", TENSORS)
def test_weights_that_are_not_what_they_are_said_to_be_are_refused(untrusted, change):
    path = untrusted / "model.safetensors"
    header, data = parts_of(path)
    assert header[EMBED]["shape"] == [260, 16] and header[EMBED]["dtype"] == "F32"
    begin = header[EMBED]["data_offsets"][0]
    header[EMBED] |= TENSORS[change]
    if "data_offsets" in TENSORS[change]:
        header[EMBED]["data_offsets"] = [begin + i for i in TENSORS[change]["data_offsets"]]
    put(path, header, data)
    refuses(path, load, untrusted)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 2**26, 10**6, 0])
def test_header_lengths_are_not_believed(untrusted, length):
    path = untrusted / "model.safetensors"
    put(path, *parts_of(path), length=length)
    refuses(path, load, untrusted)


def test_a_header_has_a_sensible_size(untrusted):
    path = untrusted / "model.safetensors"
    header, data = parts_of(path)
    put(path, header | {"__metadata__": {"a": "x" * 2**23}}, data)
    refuses(path, load, untrusted, names=["header"])


@pytest.mark.parametrize(
    "header",
    [
        "[" * 10**6,
        '{"a":' * 10**5,
        "{}",
        "[]",
        "null",
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"": 1}',
    ],
    ids=lambda header: header[:9],
)
def test_headers_are_not_believed(untrusted, header):
    put(untrusted / "model.safetensors", header, b"")
    refuses(untrusted, load, untrusted)


NAMES = ["../outside", "../../etc/passwd", "..", ".", "", "/etc/passwd", "/dev/zero", "a\0b", "./model.safetensors"]
NAMES += ["model.safetensors/", "x//y", "nothing.safetensors", "x" * 300, 7, None, ["model.safetensors"]]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_index_leads_to_nothing_outside(untrusted, name):
    # Were it followed, all would be well. It is read only where there is no model.safetensors.
    shutil.move(untrusted / "model.safetensors", untrusted.parent / "outside")
    (untrusted / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: name}}))
    refuses(untrusted, load, untrusted)


@pytest.mark.parametrize("weight_map", [None, "[]", "null", '"model.safetensors"', "{}"])
def test_an_index_that_is_none_is_refused(untrusted, weight_map):
    text = "{}" if weight_map is None else f'{{"weight_map": {weight_map}}}'
    (untrusted / "model.safetensors").unlink()
    (untrusted / "model.safetensors.index.json").write_text(text)
    refuses(untrusted, load, untrusted)


# --------------------------------------------------------------------------------------------------
# What our own checkpoints say of themselves


def sign(folder):
    """Write a manifest that agrees with what is there now, as whoever made a checkpoint can."""
    names = [p.name for p in folder.iterdir() if p.name != "manifest.json" and p.is_file()]
    (folder / "manifest.json").write_text(json.dumps({name: sha256(folder / name) for name in names}))


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(n, str)], ids=repr)
def test_a_manifest_leads_to_nothing_outside(ours, tmp_path, name):
    folder = shutil.copytree(ours, tmp_path / "copy")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside")
    digest = sha256("/etc/passwd") if "passwd" in name else sha256(folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: digest}))
    refuses(folder, load, folder)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_manifest_that_names_no_regular_file_is_refused(ours, tmp_path, kind):
    folder = shutil.copytree(ours, tmp_path / "copy")
    become(kind, folder / "more")
    raw(folder / "manifest.json", more='"00"')
    refuses(folder, load, folder, names=["more"])


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "7"},
        {"stage": "null"},
        {"step": '"1"'},
        {"config": "[]"},
        {"data": "7"},
        {"lineage": "{}"},
        {"lineage": "[1]"},
        {"lineage": '[{"path": 1, "weights": ""}]'},
        {"lineage": '[{"path": "x"}]'},
        {"lineage": NESTED},
        {"center": "NaN"},
        {"center": '"0"'},
        {"critic_center": "[]"},
        {"step": "1e400"},
    ],
)
def test_what_a_checkpoint_says_of_itself_has_its_kind(ours, tmp_path, changes):
    folder = shutil.copytree(ours, tmp_path / "copy")
    raw(folder / "feinschliff.json", **changes)
    sign(folder)
    refuses(folder / "feinschliff.json", load, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"best": "NaN"},
        {"order": '{"epoch": 0, "index": NaN}'},
        {"warnings": "[NaN]"},
        {"order": "[" * 990 + "NaN" + "]" * 990},
        {"order": DEEP},
    ],
)
def test_counters_that_are_no_json_or_not_a_number_are_refused(ours, tmp_path, changes):
    """What has the wrong kind is refused by what reads it: tests/test_run.py."""
    folder = shutil.copytree(ours, tmp_path / "copy")
    raw(folder / "train_state.json", **changes)
    refuses(folder / "train_state.json", load_state, folder)


@pytest.mark.parametrize("where", ["/dev/zero", "/etc/passwd", "/dev", "/proc/self", "../" * 50, "a\0b", ""])
def test_a_lineage_leads_to_no_checkpoint_that_is_none(where):
    refuses("no checkpoint here", find, where)


def test_a_directory_that_only_looks_like_a_step_is_none(tmp_path):
    (tmp_path / "step_²").mkdir()
    refuses(tmp_path, find, tmp_path, names=["no checkpoint here"])


def test_a_report_shows_what_a_file_says_and_does_not_obey_it():
    parent = {"path": "<script>", "weights": "<script>"}
    info = {"lineage": [parent], "data": {"<script>": "<script>"}, "step": 1, "code": "<script>"}
    info |= {"stage": "sft", "config": {}}
    nothing = {"directories": [Path("<script>")], "record": {}, "evaluations": {}, "feedback": {}, "charts": {}}
    page = report.TEMPLATE.render(runs={"<script>": {"info": info, "log": []}}, **nothing)
    assert "<script" not in page and page.count("&lt;script&gt;") > 4


def test_a_path_that_the_system_refuses_is_named(tmp_path, fork):
    line = refused(start(fork, sft, init="x" * 300, data="x.jsonl", out=tmp_path / "run", device="cpu"))
    assert line == f"error: {'x' * 300}/config.json: File name too long"
    line = refused(start(fork, sft, init=tmp_path, data="x", out="a\n\x1b[2Jb" + "x" * 300, device="cpu"))
    assert line.startswith("error: --out=a\\n\\x1b[2Jbxxx")


@pytest.mark.parametrize(
    "name, value",
    [
        ("exp_avg/embed", torch.zeros(1)),
        ("exp_avg_sq/embed", torch.zeros(32, 61)),
        ("exp_avg/embed", torch.zeros(61, 32, dtype=torch.bfloat16)),
        ("step/embed", torch.zeros(9)),
    ],
)
def test_moments_of_another_shape_are_refused(name, value):
    """Fused AdamW reads and writes beyond their ends: it ended the process."""
    model = random_model()
    optimizer = Optimizer(model, 0.1)
    model.embed.grad = torch.ones_like(model.embed)
    optimizer.step(1.0)
    good = optimizer.state()
    Optimizer(model, 0.1).load_state(good)
    with pytest.raises(ValueError, match="the moments of embed do not have its shape or type"):
        Optimizer(model, 0.1).load_state(good | {name: value})


def test_a_run_does_not_continue_from_a_state_that_is_another_models(tmp_path, fork):
    save(random_model, tmp_path / "base", "pretrain")
    data = write_rows(tmp_path / "chat.jsonl", some_rows(40, 1))
    flags = TINY | {"init": tmp_path / "base", "data": data, "out": tmp_path / "run", "steps": 1}
    succeeds(start(fork, sft, **flags))
    folder = find(tmp_path / "run")
    header, values = parts_of(folder / "train_state.safetensors")
    for name, change in (("optimizer/exp_avg/embed", {"shape": [16, 260]}), ("random/cpu", {"dtype": "I8"})):
        put(folder / "train_state.safetensors", header | {name: header[name] | change}, values)
        sign(folder)
        line = refused(start(fork, sft, **flags, resume=True))
        assert str(folder) in line and "train_state is damaged" in line


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:[\s\S]|[\s\S])*(?!\s)x|[\s\S]",
        r"(?:\p{L}+)+(?=\d)|[\s\S]",
        r"(?:a|a)*(?=b)|[\s\S]",
        "a?" * 40 + "a" * 101 + r"|[\s\S]",
        r"(\p{L}*)*\1x|[\s\S]",
        r"(?:\p{L}{1000}){1000}|[\s\S]",
        r"(?:(?:a{1,1000}){1,1000}){1,1000}|[\s\S]",
        "(" * 900 + "a" + ")" * 900 + r"|[\s\S]",
        "[" * 900 + "a" + "]" * 900 + r"|[\s\S]",
        r"[\s\S]|" * 10**6 + "x",
        r"(?R)?|[\s\S]",
        r"(?P<n>(?P>n)?|[\s\S])",
        r"(?:x){e<=3}|(?<n>[\s\S])(?&n)*",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_a_pattern_cannot_hang(untrusted, pattern):
    """It is refused, or tiktoken cuts with it in bounded time: at worst it gives up on a text, and
    says so."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    raw(untrusted / "tokenizer.json", pre_tokenizer=json.dumps({"type": "Sequence", "pretokenizers": steps}))
    with sparingly(600):
        try:
            tok = tokenizer.load(untrusted)
        except UserError as e:
            message = str(e)
            assert str(untrusted / "tokenizer.json") in message and "\n" not in message and len(message) < 3000
            return
    with sparingly(600), contextlib.suppress(UserError):
        tok.encode_ordinary("a" * 60 + "!")


def test_a_text_on_which_tiktoken_gives_up_is_a_users_error():
    tok = tokenizer.with_specials("slow", r"(?:q|q)*(?=b)|[\s\S]", {bytes([b]): b for b in range(256)}, {})
    with pytest.raises(UserError, match="takes too many steps"):
        tok.encode_ordinary("q" * 60 + "!")
    assert tok.encode_ordinary("ok") == [111, 107]


def many_long_tokens():
    """Tokens of 256 letters, of which it would take minutes to find out how they are merged."""
    letters, reverse = "abcdefghijklmnop", "ponmlkjihgfedcba"
    vocab = {a + b: 300 + 16 * i + j for i, a in enumerate(letters) for j, b in enumerate(letters)}
    for i in range(400):
        vocab[(letters[i % 16] + reverse[i // 16 % 16]) * 255 + "ab"[i // 256 % 2]] = 1000 + i
    return vocab


VOCABULARIES = {  # name: what is added to the vocabulary, and other fields of the model
    "ids of 10^12": ({"aa": 10**12}, {}),
    "an id twice": ({"aa": 97}, {}),
    "merges in a circle": ({"ab": 300}, {"merges": [["ab", "ab"], ["a", "b"]]}),
    "a merge with itself": ({}, {"merges": [["", "a"]]}),
    "nested merges": ({}, {"merges": [[["a", "b"]]]}),
    "long tokens that take minutes": (many_long_tokens(), {}),
    "a token of a megabyte": ({"a" * 2**20: 300}, {}),
    "ids that are true": ({"aa": True}, {}),
    "nested ids": ({"aa": [[300]]}, {}),
    "half a surrogate pair": ({"\ud800": 300}, {}),
    "not BPE": ({}, {"type": "Unigram"}),
    "no tokens": ({}, {"vocab": {}, "merges": [["a", "b"]]}),
}


@pytest.mark.parametrize("change", VOCABULARIES)
def test_absurd_vocabularies_are_refused(untrusted, change):
    path, (more, fields) = untrusted / "tokenizer.json", VOCABULARIES[change]
    model = json.loads(path.read_text())["model"]
    model["vocab"] |= more
    raw(path, model=json.dumps(model | fields))
    refuses(path, load, untrusted)


@pytest.mark.parametrize(
    "added",
    [
        [{"id": 97, "content": "<|endoftext|>"}],
        [{"id": 300, "content": "a"}],
        [{"id": 10**12, "content": "x"}],
        [{"id": 300, "content": ""}],
        [{"id": 300, "content": 7}],
        [{"id": 300, "content": ["x"]}],
        [{"content": "x"}],
        [7],
        {"a": 1},
        [{"id": 300, "content": "\ud800"}],
        [{"id": 256, "content": "<|endoftext|>"}, {"id": 256, "content": "x"}],
    ],
    ids=str,
)
def test_added_tokens_that_collide_are_refused(untrusted, added):
    raw(untrusted / "tokenizer.json", added_tokens=json.dumps(added))
    refuses(untrusted / "tokenizer.json", load, untrusted)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ 'a' * 300000000 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{",
        7,
        NESTED,
    ],
    ids=lambda template: str(template)[:9],
)
def test_a_hostile_chat_template_is_refused(untrusted, template, monkeypatch):
    monkeypatch.chdir(untrusted)
    raw(untrusted / "tokenizer_config.json", chat_template=template if template is NESTED else json.dumps(template))

    def read():
        _, tok, _ = load(untrusted)
        chat.encode_prompt(tok, [{"role": "user", "content": "hi"}])

    refuses(untrusted / "tokenizer_config.json", read)
    assert not (untrusted / "PWNED").exists()


def test_what_people_write_is_no_template(untrusted):
    tok, source = load(untrusted)[1], "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    raw(untrusted / "tokenizer_config.json", chat_template=json.dumps(source))
    for known in (tok, load(untrusted)[1]):
        found = chat.encode(known, [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}])
        assert "{{ 7 * 7 }}{% raw %}" in known.decode(found.ids.tolist())


# --------------------------------------------------------------------------------------------------
# Prepared data


@pytest.fixture
def prepared(tmp_path):
    """A function: ({field of the manifest: JSON}, {field of the one shard's entry: value}, tokens)
    -> a directory as data/prepare.py leaves it, but for these."""

    def make(fields=None, entry=None, tokens=(256, 104, 105, 256)):
        folder = tmp_path / "data"
        folder.mkdir()
        for path in (folder / "train_00000.bin", tmp_path / "outside"):
            np.array(tokens, dtype=np.uint16).tofile(path)
        shard = {"file": "train_00000.bin", "tokens": len(tokens), "documents": 1, "bytes": 2}
        shard |= {"sha256": sha256(tmp_path / "outside")} | (entry or {})
        manifest = {"format": 1, "tokenizer": tokenizer.fingerprint(BYTES), "n_vocab": 260, "dtype": "uint16"}
        manifest |= {"eot": 256, "splits": {"train": [shard], "val": []}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        raw(folder / "manifest.json", **(fields or {}))
        return folder

    return make


def test_prepared_data_that_are_well_meant_are_read(prepared):
    assert shards.read_prepared(prepared(), BYTES)[1] == []


WRONG_ENTRIES = [{"file": name} for name in NAMES]
WRONG_ENTRIES += [{"tokens": n} for n in (10**12, -4, "4", None, 10**4000, [4])]
WRONG_ENTRIES += [{"sha256": None}, {"sha256": "00"}]


@pytest.mark.parametrize("entry", WRONG_ENTRIES, ids=lambda entry: repr(entry)[:40])
def test_a_shard_is_what_its_entry_says_and_lies_in_the_folder(prepared, entry):
    folder = prepared(entry=entry)
    refuses(folder, shards.read_prepared, folder, BYTES)


WRONG_DTYPES = ['"int16"', '">u2"', '"V2"', '"O"', '"object"', '"uint8"', '"V1000000000"', "[]", "null"]
WRONG_SPLITS = ["[]", '{"train": [], "val": []}', '{"train": [7], "val": []}', '{"train": {}, "val": {}}', DEEP]
WRONG_FIELDS = [{"dtype": value} for value in WRONG_DTYPES] + [{"splits": value} for value in WRONG_SPLITS]
WRONG_FIELDS += [{"format": NESTED}, {"format": "2"}, {"tokenizer": "[]"}]


@pytest.mark.parametrize("fields", WRONG_FIELDS, ids=lambda fields: repr(fields)[:40])
def test_a_manifest_of_data_is_not_believed(prepared, fields):
    folder = prepared(fields)
    refuses(folder, shards.read_prepared, folder, BYTES)


@pytest.mark.parametrize("tokens", [(), (256,), (256, 9999, 256), (104, 105, 256), (256, 104, 105)])
def test_shards_hold_ids_of_the_tokenizer_between_ends_of_documents(prepared, tokens):
    """An id beyond the vocabulary would end the run at the embedding, on a GPU without a word of
    why."""
    folder = prepared(tokens=tokens)
    refuses(folder, shards.read_prepared, folder, BYTES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "train_00000.bin"])
def test_a_device_or_a_pipe_is_no_prepared_data(prepared, kind, name):
    folder = prepared()
    become(kind, folder / name)
    refuses(folder, shards.read_prepared, folder, BYTES)
