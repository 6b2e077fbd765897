"""API keys and the tenants made of them."""

from __future__ import annotations

import pytest

from services.gateway.auth import ANONYMOUS, KeyRing, tenant_of
from shared.errors import InvalidApiKey


def test_without_keys_everybody_is_let_in() -> None:
    ring = KeyRing([])
    assert ring.is_open
    assert ring.check(None) == ANONYMOUS
    assert ring.check("Bearer whatever") == ANONYMOUS


def test_each_key_opens_and_has_its_own_id() -> None:
    ring = KeyRing(["sk-one", "sk-two"])
    ids = {ring.check(f"Bearer {key}") for key in ("sk-one", "sk-two")}
    assert len(ids) == 2
    assert not any("sk-" in one for one in ids)
    assert ring.check("bearer  sk-one") in ids


@pytest.mark.parametrize(
    "header",
    [None, "", "sk-one", "Bearer", "Bearer ", "Basic sk-one", "Bearer sk-on", "Bearer sk-one1", "Bearer schlüssel"],
)
def test_anything_else_is_refused_without_echoing_it(header: str | None) -> None:
    with pytest.raises(InvalidApiKey) as caught:
        KeyRing(["sk-one"]).check(header)
    assert "sk-on" not in str(caught.value)


def test_bytes_that_are_no_text_are_just_a_wrong_key() -> None:
    with pytest.raises(InvalidApiKey):
        KeyRing(["sk-one"]).check("Bearer \udcff\udcfe")


def test_tenants_differ_by_key_and_by_salt() -> None:
    assert tenant_of(ANONYMOUS, None) == ""
    names = {tenant_of("a", None), tenant_of("b", None), tenant_of("a", "s"), tenant_of("", "s"), tenant_of("as", None)}
    assert len(names) == 5
    assert tenant_of("a", "s") == tenant_of("a", "s")
