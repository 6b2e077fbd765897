"""Finds constructs that could run code found in data, or that leak secrets by their timing.

The usual way into inference servers was an object deserialiser on a link or in a model file (CVE-2024-50050,
CVE-2025-32444, CVE-2025-30165, CVE-2026-26220), then a template without sandbox (CVE-2026-5760) and a comparison
of keys that takes longer the more of the key is right (CVE-2025-59425).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

MODULES = frozenset(
    {
        *("pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
        *("jsonpickle", "msgpack_numpy", "multiprocessing", "runpy", "imp", "codeop", "xmlrpc", "telnetlib"),
    }
)
"""Importing one of these is refused, wherever it stands."""

BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})

CALLS = {
    "torch.load": "reads pickles; use safetensors",
    "torch.jit.load": "reads programs",
    "torch.hub.load": "downloads programs",
    "torch.package.PackageImporter": "reads programs",
    "numpy.load": "can read pickles; use numpy.frombuffer",
    "yaml.load": "can build any object; use yaml.safe_load",
    "yaml.load_all": "can build any object; use yaml.safe_load_all",
    "yaml.full_load": "can build many objects; use yaml.safe_load",
    "yaml.unsafe_load": "can build any object; use yaml.safe_load",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "asyncio.create_subprocess_shell": "runs a shell",
    "tempfile.mktemp": "names a file that somebody else may make first",
    "msgpack.Unpacker": "keeps state after a failure (GHSA-6v7p-g79w-8964); use unpackb",
    "jinja2.Environment": "is no sandbox",
    "jinja2.Template": "is no sandbox",
    "jinja2.environment.Template": "is no sandbox",
    "jinja2.sandbox.SandboxedEnvironment": "lets templates change what they are given; use the immutable one",
    "ssl._create_unverified_context": "checks no certificate",
}

_HOOKS = frozenset({"object_hook", "object_pairs_hook", "ext_hook", "list_hook"})
_REQUIRED_OF_UNPACKB = frozenset({"raw", "strict_map_key", "max_ext_len"})
_SECRET = re.compile(r"(^|_)(secret|password|passwd|api_key|apikey|hmac|mac|proof|signature|hexdigest)s?$")


@dataclass(frozen=True, slots=True)
class Finding:
    line: int
    what: str


def find_forbidden(source: str, *, allow_transformers: bool = False) -> list[Finding]:
    """Everything of the lists above that `source` does, in the order of its lines."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    found = [
        finding
        for node in ast.walk(tree)
        for finding in (*_import(node, allow_transformers), *_call(node, names), *_comparison(node))
    ]
    return sorted(found, key=lambda finding: finding.line)


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` → `numpy`, `load` → `torch.load`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _import(node: ast.AST, allow_transformers: bool) -> Iterator[Finding]:
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        modules = [node.module]
    for module in modules:
        top = module.partition(".")[0]
        if top in MODULES or (top == "transformers" and not allow_transformers):
            yield Finding(node.lineno, f"imports {module}")  # type: ignore[attr-defined]


def _call(node: ast.AST, names: dict[str, str]) -> Iterator[Finding]:
    if not isinstance(node, ast.Call):
        return
    dotted = _dotted(node.func, names)
    if dotted in BUILTINS:
        yield Finding(node.lineno, f"calls {dotted}")
    if dotted in CALLS:
        yield Finding(node.lineno, f"calls {dotted}, which {CALLS[dotted]}")
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    for name in ("shell", "allow_pickle", "trust_remote_code"):
        if name in keywords and not _is_false(keywords[name]):
            yield Finding(node.lineno, f"sets {name}")
    if dotted in ("msgpack.unpackb", "msgpack.unpack"):
        yield from _unpackb(node, keywords)
    if dotted == "importlib.import_module" and not (node.args and _is_safe_module_name(node.args[0])):
        yield Finding(node.lineno, "imports a module whose name is not from a literal table")


def _unpackb(node: ast.Call, keywords: dict[str, ast.expr]) -> Iterator[Finding]:
    if hooks := _HOOKS & keywords.keys():
        yield Finding(node.lineno, f"unpacks msgpack with {', '.join(sorted(hooks))}")
    if missing := _REQUIRED_OF_UNPACKB - keywords.keys():
        yield Finding(node.lineno, f"unpacks msgpack without {', '.join(sorted(missing))}")
    if _is_false(keywords.get("strict_map_key")):
        yield Finding(node.lineno, "unpacks msgpack with any kind of map key")


def _comparison(node: ast.AST) -> Iterator[Finding]:
    if not isinstance(node, ast.Compare) or not any(isinstance(op, ast.Eq | ast.NotEq | ast.In) for op in node.ops):
        return
    sides = [node.left, *node.comparators]
    if any(isinstance(side, ast.Constant) for side in sides):
        return  # a kind or a length, not a secret
    for side in sides:
        name = side.func if isinstance(side, ast.Call) else side
        identifier = name.attr if isinstance(name, ast.Attribute) else name.id if isinstance(name, ast.Name) else ""
        if _SECRET.search(identifier):
            yield Finding(node.lineno, f"compares {identifier} in a time that tells; use hmac.compare_digest")


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value, names)):
        return f"{base}.{node.attr}"
    return ""


def _is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_safe_module_name(node: ast.expr) -> bool:
    """A literal, or a plain name: `registry` modules split one out of a literal table first."""
    return isinstance(node, ast.Constant | ast.Name)
