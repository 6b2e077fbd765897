"""The documentation against the code: what exists is documented, and nothing else is.

Tables and lists of the Markdown files are parsed, so a row that is missing, left over or out of date fails here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from aiohttp import hdrs
from prometheus_client import Metric
from pydantic import SecretStr

from services.cli import flags
from services.cli.main import app
from services.gateway.errors import to_api_error
from services.gateway.gateway import Gateway
from services.gateway.metrics import GatewayMetrics
from services.gateway.routes import Routes
from services.gateway.schemas import IGNORED, UNSUPPORTED, ChatBody, CompletionBody, GenerationBody
from shared import faultpoints
from shared.bus.requests import SCRIPTS
from shared.bus.stream import StreamCounters
from shared.config import Settings, setting_paths, variable_name
from shared.errors import CapacityError, RequestError
from shared.protocol.messages import Usage, WorkerBeat

ROOT = Path(__file__).resolve().parents[2]
SKIPPED_FOLDERS = {".git", ".venv", "node_modules", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache"}
NONE = "—"

# --- reading Markdown -------------------------------------------------------------------------------------------------


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    start = re.search(rf"^{re.escape(heading)}$", text, re.MULTILINE)
    assert start is not None, f"there is no heading {heading!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{level}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str, header: str) -> list[dict[str, str]]:
    """The rows of the one table whose first column is called `header`."""
    found = []
    names: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            names = []
        elif not names:
            names = cells
        elif names[0] == header and set(line) - set("|- "):
            found.append(dict(zip(names, cells, strict=True)))
    assert found, f"there is no table of {header!r}"
    return found


def quoted(text: str) -> list[str]:
    """Everything in backticks, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def code(text: str) -> str:
    """All code blocks and everything in backticks."""
    return "\n".join([*re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *quoted(text)])


def markdown_files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.md")) if not SKIPPED_FOLDERS & set(path.relative_to(ROOT).parts)]


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_a_missing_row_and_a_stray_row_would_be_seen() -> None:
    first = "# A\n\n| name | x |\n| --- | --- |\n| `a` | 1 |\n| `b` | 2 |\n\ntext\n"
    text = f"{first}\n# B\n\n| other | x |\n| --- | --- |\n| c | 3 |\n"
    assert [row["name"] for row in rows(text, "name")] == ["`a`", "`b`"]
    assert "other" not in section(text, "# A")
    with pytest.raises(AssertionError, match="no table"):
        rows(section(text, "# B"), "name")
    with pytest.raises(AssertionError, match="no heading"):
        section(text, "# C")


# --- settings and commands --------------------------------------------------------------------------------------------


def default_of(path: tuple[str, ...]) -> Any:
    model: Any = Settings
    for name in path[:-1]:
        model = model.model_fields[name].annotation
    return model.model_fields[path[-1]].default


def shown(value: Any) -> str:
    """A default as the settings table writes it."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None:
        return "unset"
    if value in ("", ()):
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def flags_of(command: Any) -> set[str]:
    options = [p for p in command.params if p.param_type_name == "option"]
    return {name for p in options for name in (*p.opts, *p.secondary_opts)} - {"--help"}


COMMANDS: dict[str, Any] = dict(cast(Any, typer.main.get_command(app)).commands)


def test_every_setting_is_documented_with_its_variable_flag_and_default() -> None:
    known = {flag.path: flag.name for flag in {*flags.ALL, *flags.WORKER}}
    expected = [
        {
            "setting": f"`{'.'.join(path)}`",
            "variable": f"`{variable_name(path)}`",
            "flag": f"`{known[path]}`" if path in known else NONE,
            "default": shown(default_of(path)),
        }
        for path in setting_paths()
    ]
    documented = rows(section(read("docs/operations.md"), "## Settings"), "setting")
    assert all(len(row["meaning"]) > 10 for row in documented)
    assert [{name: row[name] for name in expected[0]} for row in documented] == expected


def test_every_command_has_a_section() -> None:
    names = re.findall(r"^### slipstream (\S+)$", section(read("docs/operations.md"), "## Commands"), re.MULTILINE)
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_flag_of_a_command_is_documented_there_and_no_other(name: str) -> None:
    text = section(read("docs/operations.md"), f"### slipstream {name}")
    own = re.findall(r"^\| `(--[a-z-]+)` \|", text, re.MULTILINE)
    lists = re.findall(r"^Flags that are settings: (.*?)\.$", text, re.MULTILINE | re.DOTALL)
    listed = [flag for part in lists for flag in quoted(part)]
    assert len(own + listed) == len(set(own + listed)), "a flag is documented twice"
    assert set(own + listed) == flags_of(COMMANDS[name])


def test_the_readme_lists_every_command_and_target() -> None:
    listed = [quoted(row["command"])[0] for row in rows(read("README.md"), "command")]
    assert sorted(listed) == sorted([*(f"slipstream {name}" for name in COMMANDS), *(f"make {t}" for t in targets())])


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", read("Makefile"), re.MULTILINE)) - {"help"}


def test_every_make_and_slipstream_command_in_the_docs_exists() -> None:
    makes, commands = set(), set()
    for path in markdown_files():
        text = code(path.read_text(encoding="utf-8"))
        makes |= set(re.findall(r"(?:^|\s)make ([a-z]+)\b", text, re.MULTILINE))
        commands |= set(re.findall(r"(?:^|[\s/])slipstream ([a-z]+)\b", text, re.MULTILINE))
    assert {"serve", "test"} <= makes <= targets()
    assert "serve" in commands
    assert commands <= COMMANDS.keys()


def test_every_flag_and_variable_named_in_the_docs_exists() -> None:
    known_flags = {flag for command in COMMANDS.values() for flag in flags_of(command)}
    foreign = {"--help", "--build", "--scale", "--out", "--network", "--init", "--rounds"}
    foreign |= {"--minutes", "--kinds", "--kills", "--seeds", "--merciless", "--aborts", "--seconds"}  # fault harness
    foreign |= {"--queued", "--connections", "--pid", "--split", "--streams", "--temperatures"}  # benchmarks
    foreign |= {"--turns", "--more", "--again", "--starts"}
    of_the_model = {"SLIPSTREAM_TEST_MODEL_RUNS", "SLIPSTREAM_TEST_MODEL_SEED"}
    known_variables = {variable_name(path) for path in setting_paths()} | {"SLIPSTREAM_API_KEY"} | of_the_model
    known_variables.add(faultpoints.VARIABLE)
    for path in markdown_files():
        text = code(path.read_text(encoding="utf-8"))
        named = set(re.findall(r"(?:^|[\s`'])(--[a-z][a-z-]+)", text, re.MULTILINE))
        assert named <= known_flags | foreign, path.name
        assert set(re.findall(r"\bSLIPSTREAM_[A-Z0-9_]*[A-Z0-9]", text)) <= known_variables, path.name


# --- metrics ----------------------------------------------------------------------------------------------------------


def beat() -> WorkerBeat:
    return WorkerBeat("w", "decode", "ready", "m", "", "")


def families() -> list[Metric]:
    """Every metric family a gateway exports, each with at least one sample."""
    metrics = GatewayMetrics("m")
    metrics.watch_workers(lambda: [replace(beat(), drafted=(2, 1), accepted=(1, 0))])
    metrics.watch_streams(StreamCounters())
    metrics.outcomes.labels("r", "o").inc()
    metrics.rejections.labels("r").inc()
    metrics.resumes.labels("resumed").inc()
    metrics.responses.labels("r", "200").inc()
    metrics.observe_usage(Usage(kv_bytes=1, transport="tcp"))
    return list(metrics.registry.collect())


def exported() -> dict[str, tuple[str, set[str]]]:
    found = {}
    for family in families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    documented = rows(section(read("docs/operations.md"), "## Metrics"), "metric")
    assert {quoted(row["metric"])[0]: (row["type"], set(quoted(row["labels"]))) for row in documented} == exported()


def test_every_metric_named_anywhere_exists() -> None:
    for path in markdown_files():
        named = set(re.findall(r"`(slipstream_[a-z0-9_]+)`", path.read_text(encoding="utf-8")))
        assert named <= exported().keys(), path.name


# --- routes, fields, errors -------------------------------------------------------------------------------------------


def routes() -> set[tuple[str, str]]:
    table = Routes(cast(Gateway, None)).table()
    return {(route.method, re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)) for route in table}


def test_every_route_is_documented() -> None:
    documented = rows(section(read("docs/api.md"), "## Routes"), "method")
    assert {(quoted(row["method"])[0], quoted(row["path"])[0]) for row in documented} == routes()
    assert (hdrs.METH_GET, "/health") in routes()


def test_every_route_in_the_readme_exists_and_all_paths_are_there() -> None:
    documented = rows(section(read("README.md"), "## API"), "method")
    named = {(quoted(row["method"])[0], quoted(row["path"])[0]) for row in documented}
    assert named <= routes()
    assert {path for _, path in named} == {path for _, path in routes()} - {"/v1/models/{id}"}


def field_names(heading: str) -> set[str]:
    return {name for row in rows(section(read("docs/api.md"), heading), "field") for name in quoted(row["field"])}


def test_every_request_field_is_documented() -> None:
    common = set(GenerationBody.model_fields)
    assert field_names("### Fields of both completions") == common
    assert field_names("### Fields of chat completions") == set(ChatBody.model_fields) - common
    assert field_names("### Fields of text completions") == set(CompletionBody.model_fields) - common


def test_refused_and_ignored_fields_are_listed() -> None:
    refused, _, ignored = section(read("docs/api.md"), "### Not supported").partition("Known, and without effect")
    assert set(quoted(refused)) - {"unsupported_parameter"} == set(UNSUPPORTED)
    assert set(quoted(ignored)) == set(IGNORED) - set(GenerationBody.model_fields)


def test_usage_fields_are_documented() -> None:
    assert field_names("## Extensions in the answer") == set(Usage.__slots__)


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def failures() -> Iterator[RequestError | CapacityError]:
    """One of each error that a client can be told by class."""
    for kind in (*subclasses(RequestError), *subclasses(CapacityError)):
        if kind.__module__.startswith(("services.", "shared.")):
            yield kind("x", frozenset()) if kind.__name__ == "MethodNotAllowed" else kind("x")


def documented_errors() -> set[tuple[int, str]]:
    table = rows(section(read("docs/api.md"), "## Errors"), "status")
    return {(int(row["status"]), name) for row in table for name in quoted(row["code"])}


def test_every_error_class_is_documented_with_its_status() -> None:
    expected = {(error.status, error.code) for error in map(to_api_error, failures())}
    assert len(expected) > 10
    assert expected <= documented_errors()


def test_every_documented_error_code_is_written_somewhere_in_the_code() -> None:
    folders = ("services/gateway", "shared/bus", "services/prefill", "shared")
    source = "".join(path.read_text(encoding="utf-8") for path in sources(folders))
    for _, name in documented_errors():
        assert re.search(rf"""["']{name}["']""", source), name


def sources(folders: Iterable[str]) -> list[Path]:
    return [path for folder in folders for kind in ("*.py", "*.lua") for path in (ROOT / folder).rglob(kind)]


# --- the bus, the files, the links ------------------------------------------------------------------------------------


def test_every_script_is_in_the_protocol() -> None:
    documented = {quoted(row["script"])[0] for row in rows(section(read("docs/protocol.md"), "## Scripts"), "script")}
    files = {path.stem for path in (ROOT / "shared/bus/scripts").glob("*.lua")} - {"common", "steady"}
    assert documented == files
    assert set(SCRIPTS) <= files


def tree() -> list[str]:
    """Paths of the README's file tree."""
    block = re.search(r"^```\n(.*?)^```", section(read("README.md"), "## Files"), re.MULTILINE | re.DOTALL)
    assert block is not None
    paths: list[str] = []
    parents: list[str] = []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, meaning = line.strip().partition(" ")
        assert meaning.strip(), f"{name} has no line of its own"
        parents[depth:] = [name]
        paths.append("".join(parents))
    return paths


def test_the_file_tree_names_what_is_there() -> None:
    paths = tree()
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    for top in ("services", "shared", "tests"):
        folders = {f"{top}/{child.name}/" for child in (ROOT / top).iterdir() if (child / "__init__.py").exists()}
        assert folders <= set(paths)


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """(target, anchor) of each relative link."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            yield (path.parent / name if name else path), anchor


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    for target, anchor in links(path):
        assert target.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(target), f"{path.name} links to {target.name}#{anchor}"


def test_there_are_links_to_check() -> None:
    assert sum(1 for path in markdown_files() for _ in links(path)) > 30


def test_decisions_are_numbered_without_gaps_and_all_listed() -> None:
    files = sorted(path.name for path in (ROOT / "docs/adr").glob("*.md"))
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    for name in files:
        assert f"(adr/{name})" in read("docs/architecture.md"), name
        assert read(f"docs/adr/{name}").startswith(f"# {int(name[:4])}. ")
