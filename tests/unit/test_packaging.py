"""Lock files, container files and the import rule, as a newcomer's machine would find them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.make_env import render
from shared.config import setting_paths, variable_name

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose.gpu.yaml")
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", re.MULTILINE)


def pins(name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for package, version in PIN.findall((ROOT / name).read_text()):
        found.setdefault(package, set()).add(version)
    return found


def compose(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-test.lock"])
def test_locks_pin_everything_by_hash_and_name_no_host(lock: str) -> None:
    text = (ROOT / lock).read_text()
    requirements = [part for part in re.split(r"\n(?=\S)", text) if not part.startswith("#")]
    assert len(requirements) > 30
    for requirement in requirements:
        assert "==" in requirement, requirement
        assert "--hash=sha256:" in requirement, requirement
    assert "://" not in text
    assert "index-url" not in text


def test_locks_hold_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}

    core, test = names(project["dependencies"]), names(project["optional-dependencies"]["test"])
    assert core - {"torch"} <= pins("requirements.lock").keys()
    assert test <= pins("requirements-test.lock").keys()


def test_the_test_lock_contains_the_serving_lock() -> None:
    test = pins("requirements-test.lock")
    for package, versions in pins("requirements.lock").items():
        assert test[package] == versions


def test_a_cpu_machine_is_not_made_to_download_cuda() -> None:
    assert not [p for p in pins("requirements-test.lock") if p.startswith(("nvidia", "cuda", "triton", "torch"))]
    assert pins("requirements-torch.txt") == {"torch": {"2.13.0"}}


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_every_variable_of_the_compose_files_is_a_setting(name: str) -> None:
    known = {variable_name(path) for path in setting_paths()}
    used = set(re.findall(r"\bSLIPSTREAM_[A-Z0-9_]+", (ROOT / name).read_text())) - {"SLIPSTREAM_IMAGE"}
    assert used
    assert used <= known


def test_the_example_env_names_only_variables_that_something_reads() -> None:
    assigned = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    read = set(re.findall(r"\$\{([A-Z0-9_]+)", (ROOT / "docker-compose.yml").read_text()))
    settings = {variable_name(path) for path in setting_paths()}
    assert assigned
    assert assigned <= read | settings


def test_only_the_gateway_is_published_and_only_on_this_machine() -> None:
    services = compose("docker-compose.yml")["services"]
    assert {name for name, service in services.items() if "ports" in service} == {"gateway"}
    assert services["gateway"]["ports"] == ["${GATEWAY_BIND:-127.0.0.1}:${GATEWAY_PORT:-8000}:8000"]


def test_workers_can_be_scaled() -> None:
    services = compose("docker-compose.yml")["services"]
    for role in ("prefill", "decode"):
        assert not {"container_name", "ports", "hostname", "volumes"} & services[role].keys()


@pytest.mark.parametrize("service", ["redis", "gateway", "prefill", "decode", "operator"])
def test_every_container_is_hardened(service: str) -> None:
    spec = compose("docker-compose.yml")["services"][service]
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert spec["cap_drop"] == ["ALL"]
    assert "cap_add" not in spec
    assert spec["read_only"] is True
    assert spec["pids_limit"] > 0
    assert spec["mem_limit"]
    assert "privileged" not in spec


@pytest.mark.parametrize("service", ["redis", "gateway", "prefill", "decode"])
def test_every_service_is_checked(service: str) -> None:
    spec = compose("docker-compose.yml")["services"][service]
    assert spec["healthcheck"]["test"]
    assert spec["stop_grace_period"]


def test_workers_stop_only_after_their_drain() -> None:
    services = compose("docker-compose.yml")["services"]
    for role in ("prefill", "decode"):
        grace = int(services[role]["stop_grace_period"].removesuffix("s"))
        assert grace > int(services[role]["environment"]["SLIPSTREAM_DRAIN_TIMEOUT_S"])


def test_redis_keeps_what_it_is_told_and_lets_nobody_in_without_a_name() -> None:
    """Its users are tried out in tests/integration/test_redis_users.py."""
    *_, script = compose("docker-compose.yml")["services"]["redis"]["command"]
    server = re.sub(r"\\\n", "", script[script.index("exec redis-server") :]).split()
    options = dict(zip(server[2::2], server[3::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"
    assert options["--aclfile"]
    assert options["--maxmemory"]
    assert "user default off" in script


def test_redis_is_not_older_than_the_fixes_it_needs() -> None:
    image, _, tag = compose("docker-compose.yml")["services"]["redis"]["image"].partition(":")
    assert image == "redis"
    assert tuple(map(int, tag.split("."))) >= (7, 4, 11)


def test_each_role_has_a_redis_user_of_its_own() -> None:
    services = compose("docker-compose.yml")["services"]
    users = {
        name: re.match(r"redis://(\w+):\$\{(\w+):-", service["environment"]["SLIPSTREAM_REDIS__URL"])
        for name, service in services.items()
        if name != "redis"
    }
    assert {name: match and match[1] for name, match in users.items()} == {
        "gateway": "gateway",
        "prefill": "worker",
        "decode": "worker",
        "operator": "operator",
    }
    assert len({match[2] for match in users.values() if match}) == 3


def test_the_image_builds_with_a_classic_engine_and_runs_without_root() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert "--mount" not in text
    assert "<<" not in text
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1].split(":")[0] not in ("0", "root")


def test_env_gets_a_secret_of_its_own_for_each_placeholder() -> None:
    example = "# A=generate\nPASSWORD=generate\nSECRET=generate\nPORT=1\n#KEY=generate\n\n"
    lines = render(example).splitlines()
    assert [lines[index] for index in (0, 3, 4)] == ["# A=generate", "PORT=1", "#KEY=generate"]
    password, secret = (lines[index].partition("=")[2] for index in (1, 2))
    assert re.fullmatch(r"[0-9a-f]{48}", password)
    assert password != secret
    assert render(example) != render(example)


def test_the_example_env_has_something_to_generate() -> None:
    filled = render((ROOT / ".env.example").read_text())
    assert not re.search(r"^[A-Z_]+=generate$", filled, re.MULTILINE)
    assert len(re.findall(r"^[A-Z_]+=[0-9a-f]{48}$", filled, re.MULTILINE)) == 4


@pytest.mark.parametrize(
    "module", ["services.bench.load", "services.gateway", "shared.config", "shared.protocol.messages"]
)
def test_no_torch_is_loaded_at_run_time(module: str) -> None:
    """The layer check reads import statements; this one also sees package `__init__` files and lazy imports."""
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr or f"{module} imports torch"


def test_the_image_gets_all_that_it_copies_and_nothing_compiled_here() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copies = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copies for source in line.split()[:-1]}
    assert "setup.py" in sources
    assert sources == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    assert "**/*.so" in ignored
