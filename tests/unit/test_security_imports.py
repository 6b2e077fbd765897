"""Nothing that can run code found in data is anywhere in the tree, nor is it called while requests are served."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.kernels.library import load_library
from tests.forbidden import find_forbidden
from tests.stack import stack
from tests.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SERVED = ("services", "shared", "deploy")
MAIN_MODULES = ("services.cli.main", "services.gateway.app", "services.prefill.main", "services.decode.main")


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_services_hold_nothing_forbidden() -> None:
    found = [
        (str(path.relative_to(ROOT)), finding) for path in files(*SERVED) for finding in find_forbidden(_text(path))
    ]
    assert len(files(*SERVED)) > 100
    assert not found


def test_benchmarks_and_tests_deserialise_nothing_either() -> None:
    """They may compare with transformers, and compare secrets that they made up."""
    own = {ROOT / "tests/forbidden.py", Path(__file__).resolve()}
    for path in files("benchmarks", "tests"):
        if path.resolve() not in own:
            found = find_forbidden(_text(path), allow_transformers=True)
            assert not [one for one in found if one.what.startswith(("imports", "calls", "sets"))], path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


FORBIDDEN = [
    *("import pickle", "import pickle as p", "from pickle import loads", "import marshal", "import shelve"),
    *("import dill", "import cloudpickle", "import joblib", "import _pickle", "import jsonpickle"),
    *("from multiprocessing.connection import Client", "import multiprocessing", "import msgpack_numpy"),
    *("from transformers import AutoModel", "import transformers.models"),
    *("eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)"),
    *(
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(p, weights_only=True)",
        "from torch import load\nload(p)",
    ),
    *("import torch\ntorch.jit.load(path)", "import torch.hub\ntorch.hub.load(a)"),
    *("import numpy as np\nnp.load(path)", "import numpy\nnumpy.load(path, allow_pickle=True)"),
    *("import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)", "reader.get(trust_remote_code=True)"),
    *(
        "import yaml\nyaml.load(t)",
        "import yaml\nyaml.unsafe_load(t)",
        "from yaml import full_load as f\nf(t)",
    ),
    *("import os\nos.system(text)", "from os import popen\npopen(text)", "import tempfile\ntempfile.mktemp()"),
    *("import subprocess\nsubprocess.run(text, shell=True)", "import subprocess as s\ns.Popen(text, shell=flag)"),
    *("import asyncio\nasyncio.create_subprocess_shell(text)", "import subprocess\nsubprocess.getoutput(text)"),
    *("import msgpack\nmsgpack.Unpacker(raw=False)", "import msgpack\nmsgpack.unpackb(data)"),
    "import msgpack\nmsgpack.unpackb(d, raw=False, strict_map_key=True, max_ext_len=0, object_hook=f)",
    "import msgpack\nmsgpack.unpackb(d, raw=False, strict_map_key=True, max_ext_len=0, ext_hook=f)",
    "import msgpack\nmsgpack.unpackb(d, raw=False, strict_map_key=False, max_ext_len=0)",
    *("import jinja2\njinja2.Template(text)", "from jinja2 import Environment\nEnvironment()"),
    "from jinja2.sandbox import SandboxedEnvironment\nSandboxedEnvironment()",
    *("given == secret", "self.password != password", "key in api_keys", "mac(a) == b", "h.hexdigest() == given"),
    *(
        "import importlib\nimportlib.import_module(config['m'])",
        "from importlib import import_module as i\ni(f())",
    ),
    "import ssl\nssl._create_unverified_context()",
    "def late():\n    if True:\n        import pickle",
]

ALLOWED = [
    *("import re\nre.compile('a')", "import json\njson.loads(text)", "import yaml\nyaml.safe_load(text)"),
    *("import subprocess\nsubprocess.run([program])", "import subprocess\nsubprocess.run([program], shell=False)"),
    *("import hmac\nhmac.compare_digest(secret, given)", "kind == 'secret'", "len(secret) == 3"),
    "import msgpack\nmsgpack.unpackb(d, raw=False, strict_map_key=True, max_ext_len=0)",
    *("from jinja2.sandbox import ImmutableSandboxedEnvironment\nImmutableSandboxedEnvironment()", "model.eval()"),
    *("from safetensors import safe_open\nsafe_open(path)", "import importlib\nimportlib.import_module('shared.kv')"),
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_the_checker_finds_each_construct(source: str) -> None:
    assert find_forbidden(source)


@pytest.mark.parametrize("source", ALLOWED)
def test_the_checker_lets_the_rest_be(source: str) -> None:
    assert not find_forbidden(source)


@pytest.mark.parametrize("module", MAIN_MODULES)
def test_no_service_loads_a_deserialiser_of_others(module: str) -> None:
    """What our files import is seen above; this sees what the packages we use bring along."""
    names = ["dill", "cloudpickle", "joblib", "jsonpickle", "msgpack_numpy", "transformers", "shelve"]
    program = f"import sys, json, {module}; print(json.dumps([name for name in {names} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


class Watch:
    """Hears of deserialisers and of programs being started, from the interpreter itself, while it is on."""

    EVENTS = frozenset(
        {
            *("pickle.find_class", "marshal.load", "marshal.loads", "os.system", "os.exec", "os.posix_spawn"),
            *("os.spawn", "subprocess.Popen", "ctypes.dlopen", "shutil.unpack_archive"),
        }
    )

    def __init__(self) -> None:
        self.is_on = False
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens_itself = (event, arguments) == ("ctypes.dlopen", (None,))  # the C library that is loaded already
        if self.is_on and event in self.EVENTS and not opens_itself and not _is_import():
            self.heard.append(f"{event} {arguments!r:.100}")

    @contextmanager
    def on(self) -> Iterator[list[str]]:
        self.heard, self.is_on = [], True
        try:
            yield self.heard
        finally:
            self.is_on = False


def _is_import() -> bool:
    """Whether Python's own import system is at work: it reads its byte code by marshal and loads libraries."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


WATCH = Watch()


class Anything:
    """A class a pickle may name."""


def test_the_watch_hears() -> None:
    from importlib import import_module

    pickle, marshal = import_module("pickle"), import_module("marshal")
    dumped, code = pickle.dumps(Anything()), marshal.dumps([1])
    with WATCH.on() as heard:
        pickle.loads(dumped)
        marshal.loads(code)
        subprocess.run(["true"], check=True)
    assert [line.split()[0] for line in heard] == ["pickle.find_class", "marshal.loads", "subprocess.Popen"]
    pickle.loads(dumped)
    assert len(heard) == 3, "off is off"


async def test_serving_calls_no_deserialiser(
    redis_url: str, deployment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a model, self-tests, hand-offs, streams, errors and a worker's end, with the interpreter listening."""
    import torch

    called: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: called.append(args))
    model = write_tiny_model(tmp_path / "tiny")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "seed": 1}
    load_library()  # the kernels' own library, by its own path, once in a process
    with WATCH.on() as heard:
        async with stack(redis_url, deployment, model) as made:
            assert (await made.post("/v1/chat/completions", body))[0] == 200
            status, text = await made.post("/v1/chat/completions", {**body, "stream": True, "logprobs": True, "n": 2})
            assert status == 200
            assert text.rstrip().endswith("data: [DONE]")
            assert (await made.post("/v1/chat/completions", {**body, "n": 0}))[0] == 400
            assert made.bench.decode[0].counters.remote > 0, "KV moved"
    assert heard == []
    assert called == []
