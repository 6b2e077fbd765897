"""Key names: one hash tag a shard, and nothing from outside may leave it."""

from __future__ import annotations

import pytest

from shared.protocol.keys import Keys


def test_all_keys_of_a_shard_share_one_hash_tag() -> None:
    keys = Keys("d", 2)
    names = [
        *(keys.work("prefill", "org/model"), keys.express_work("prefill", "org/model"), keys.probe_work("decode", "m")),
        keys.private_work("decode", "m", "w1"),
        *(keys.request("r"), keys.log("r"), keys.tokens("g"), keys.gateway("g"), keys.worker("w")),
        *(keys.workers, keys.dead),
    ]
    assert {name[: name.index("}") + 1] for name in names} == {"{slipstream:d:2}"}
    assert len(set(names)) == len(names)
    assert keys.work("prefill", "org/model") == "{slipstream:d:2}:work:prefill:org/model"


@pytest.mark.parametrize("name", ["", "a b", "a}b", "{x", "ü", "x" * 129, "a\n"])
def test_ids_that_could_leave_the_slot_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Keys("d").request(name)
    with pytest.raises(ValueError, match="deployment"):
        Keys(name)


@pytest.mark.parametrize("model", ["", "a b", "a}b", "x" * 257, "a\x00"])
def test_model_names_are_bounded(model: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        Keys("d").work("prefill", model)


def test_roles_and_shards_are_checked() -> None:
    with pytest.raises(ValueError, match="prefill, decode"):
        Keys("d").work("router", "m")
    with pytest.raises(ValueError, match="shard"):
        Keys("d", -1)
