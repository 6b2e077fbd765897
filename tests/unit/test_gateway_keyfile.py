"""The file of API keys: what a line may say, and what happens when the file changes under the gateway."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.gateway.auth import ANONYMOUS, KeyRing
from services.gateway.keyfile import MAX_BYTES, ApiKey, KeyFile, parse_line
from shared.errors import ConfigurationError, InvalidApiKey


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def write(path: Path, text: str) -> None:
    """A new file in place of the old one, as an editor or a secret manager makes it."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("sk-a", ApiKey(digest("sk-a"))),
        ("  sk-a  # the first", ApiKey(digest("sk-a"))),
        ("sk-a weight=2 max_in_flight=3 name=team.a-1", ApiKey(digest("sk-a"), "team.a-1", 2.0, 3)),
        ("sk-a weight=0.5", ApiKey(digest("sk-a"), weight=0.5)),
        (f"sha256:{digest('sk-a').hex()} name=x", ApiKey(digest("sk-a"), "x")),
        (f"sha256:{digest('sk-a').hex().upper()}", ApiKey(digest("sk-a"))),
        ("", None),
        ("   ", None),
        ("# sk-a", None),
        ("#", None),
    ],
)
def test_what_a_line_says(line: str, key: ApiKey | None) -> None:
    assert parse_line(line) == key


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sk-a sk-b", "name="),
        ("sk-a colour=red", "name="),
        ("sk-a weight=1 weight=2", "once"),
        ("sk-a weight=0", "above 0"),
        ("sk-a weight=-1", "above 0"),
        ("sk-a weight=nan", "above 0"),
        ("sk-a weight=1001", "above 0"),
        ("sk-a max_in_flight=0", "from 1"),
        ("sk-a max_in_flight=1.5", "from 1"),
        ("sk-a name=", "name must"),
        ("sk-a name=a/b", "name must"),
        ("sha256:abc", "64 hexadecimal"),
        ("sha256:" + "g" * 64, "64 hexadecimal"),
    ],
)
def test_what_a_line_may_not_say(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# keys\nsk-fine\n{line}\n")
    with pytest.raises(ConfigurationError, match=says) as caught:
        KeyFile(str(path)).read()
    assert "line 3" in str(caught.value)
    assert "SLIPSTREAM_API_KEYS_FILE" in str(caught.value)
    assert "sk-a" not in str(caught.value), "a key is never shown"


@given(st.text(max_size=60))
def test_any_line_is_a_key_or_a_sentence(line: str) -> None:
    key: Any = None
    problem = "a sentence that is long enough"
    try:
        key = parse_line(line)
    except ValueError as exc:
        problem = str(exc)
    assert key is None or len(key.digest) == 32
    assert len(problem) > 20


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no key"),
        (b"# nothing yet\n", "holds no key"),
        (b"\xff\xfe", "UTF-8"),
        (b"sk-a\nsk-b\nsk-a\n", "line 3.*twice"),
        (b"sk-a\n" + f"sha256:{hashlib.sha256(b'sk-a').hexdigest()}".encode(), "line 2.*twice"),
        (b"#" * (MAX_BYTES + 1), "larger"),
        (b"".join(b"k%d\n" % number for number in range(10_001)), "more than 10000"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=says):
        KeyRing([], KeyFile(str(path)))


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyRing(["sk-env"], KeyFile(str(tmp_path / "none")))


def opens(ring: KeyRing, key: str) -> bool:
    try:
        return ring.check(f"Bearer {key}") != ANONYMOUS
    except InvalidApiKey:
        return False


def test_keys_of_both_places_open_and_the_file_says_what_they_may(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-file weight=3\nsk-both max_in_flight=7\n")
    ring = KeyRing(["sk-env", "sk-both"], KeyFile(str(path)))
    assert (len(ring), ring.is_open) == (3, False)
    for key, weight, most in (("sk-env", 1, None), ("sk-file", 3, None), ("sk-both", 1, 7)):
        known = ring.key(ring.check(f"Bearer {key}"))
        assert known is not None
        assert (known.weight, known.max_in_flight) == (weight, most)
    assert not opens(ring, "sk-other")
    assert ring.key("no such id") is None


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-old\n")
    ring = KeyRing([], KeyFile(str(path)))
    ring.reload()
    assert opens(ring, "sk-old")
    write(path, "sk-new\n")
    ring.reload()
    assert (opens(ring, "sk-old"), opens(ring, "sk-new")) == (False, True)


@pytest.mark.parametrize("broken", ["sk-new nonsense\n", "", None])
def test_a_broken_new_file_keeps_the_old_keys_and_says_so_once(tmp_path: Path, broken: str | None) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-old\n")
    ring = KeyRing([], KeyFile(str(path)))
    if broken is None:
        path.unlink()
    else:
        write(path, broken)
    with capture_logs() as logs:
        for _ in range(3):
            ring.reload()
    assert [line["event"] for line in logs] == ["api_keys_kept"]
    assert "sk-" not in str(logs)
    assert opens(ring, "sk-old")
    assert not ring.is_open, "a gateway with a keys file never opens to all"
    write(path, "sk-new\n")
    ring.reload()
    assert (opens(ring, "sk-old"), opens(ring, "sk-new")) == (False, True)


def test_the_log_has_ids_and_names_and_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-file name=team\n")
    with capture_logs() as logs:
        ring = KeyRing(["sk-env"], KeyFile(str(path)))
    (line,) = [line for line in logs if line["event"] == "api_keys_read"]
    assert sorted(line["keys"].values()) == ["", "team"]
    assert ring.check("Bearer sk-file") in line["keys"]
    assert "sk-" not in str(logs)


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    genuine = hmac.compare_digest

    def watch(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return genuine(known, given)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    ring = KeyRing(["a", "b", "c"])
    for key in "abcx":
        compared.clear()
        assert opens(ring, key) == (key != "x")
        assert compared == [digest("a"), digest("b"), digest("c")]
