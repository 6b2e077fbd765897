"""Block ownership: directed cases and a random walk against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.kv.block_manager import BlockManager, NoFreeBlocks, chain_hash, chain_root


def test_block_zero_is_never_handed_out() -> None:
    manager = BlockManager(8)
    assert sorted(manager.allocate(7)) == list(range(1, 8))
    with pytest.raises(NoFreeBlocks):
        manager.allocate(1)


def test_a_failed_allocation_changes_nothing() -> None:
    manager = BlockManager(4)
    held = manager.allocate(2)
    with pytest.raises(NoFreeBlocks):
        manager.allocate(2)
    assert manager.num_free == 1
    manager.check_integrity([held])


def test_released_published_blocks_stay_findable_until_room_is_needed() -> None:
    manager = BlockManager(4)
    blocks = manager.allocate(3)
    hashes = [bytes([i]) * 32 for i in range(3)]
    for block, block_hash in zip(blocks, hashes, strict=True):
        manager.publish(block, block_hash)
    manager.release(blocks)
    assert manager.num_free == 3
    assert manager.lookup(hashes) == blocks
    manager.allocate(1)
    assert manager.lookup(hashes) == blocks[:2], "the end of a chain goes first"


def test_a_shared_block_is_free_only_when_all_let_go() -> None:
    manager = BlockManager(3)
    block = manager.allocate(1)
    manager.retain(block)
    manager.release(block)
    assert manager.num_free == 1
    manager.release(block)
    assert manager.num_free == 2


def test_retaining_cached_blocks_takes_them_out_of_the_free_count() -> None:
    manager = BlockManager(3)
    block = manager.allocate(1)
    manager.publish(block[0], b"x" * 32)
    manager.release(block)
    assert manager.can_allocate(2)
    assert not manager.can_allocate(2, shared=block)
    manager.retain(block)
    assert manager.num_free == 1


def test_releasing_twice_is_caught() -> None:
    manager = BlockManager(3)
    block = manager.allocate(1)
    manager.release(block)
    with pytest.raises(AssertionError, match="released more often"):
        manager.release(block)


def test_the_integrity_check_sees_a_leak_and_a_double_holder() -> None:
    manager = BlockManager(5)
    held = manager.allocate(2)
    with pytest.raises(AssertionError, match="0 holders"):
        manager.check_integrity([])
    with pytest.raises(AssertionError, match="2 holders"):
        manager.check_integrity([held, held])


def test_fresh_blocks_are_reported_once() -> None:
    manager = BlockManager(5)
    blocks = manager.allocate(2)
    assert manager.take_fresh() == blocks
    assert manager.take_fresh() == []


def test_chains_differ_by_root_parent_and_tokens() -> None:
    roots = [chain_root("tenant", "model"), chain_root("tenant2", "model"), chain_root("tenantmodel", "")]
    assert len(set(roots)) == 3
    assert chain_hash(roots[0], [1, 2]) != chain_hash(roots[1], [1, 2])
    assert chain_hash(roots[0], [1, 2]) != chain_hash(roots[0], [2, 1])
    assert chain_hash(chain_hash(roots[0], [1]), [2]) != chain_hash(roots[0], [2])


class Ownership(RuleBasedStateMachine):
    """Random holders allocate, share, publish and release; counts must always add up."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12)
        self.holders: list[list[int]] = []
        self.next_hash = 0

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        if self.manager.can_allocate(count):
            self.holders.append(self.manager.allocate(count))
        else:
            with pytest.raises(NoFreeBlocks):
                self.manager.allocate(count)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.holders))
        self.manager.retain(blocks)
        self.holders.append(list(blocks))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        for block in data.draw(st.sampled_from(self.holders)):
            self.manager.publish(block, self.next_hash.to_bytes(32, "big"))
            self.next_hash += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.manager.release(self.holders.pop(index))

    @rule(number=st.integers(0, 40))
    def reuse_cached(self, number: int) -> None:
        blocks = self.manager.lookup([number.to_bytes(32, "big")])
        self.manager.retain(blocks)
        self.holders.append(blocks)

    @rule()
    def clear(self) -> None:
        self.manager.clear_cache()

    @invariant()
    def adds_up(self) -> None:
        self.manager.check_integrity(self.holders)
        in_use = len({block for blocks in self.holders for block in blocks})
        assert self.manager.num_free == self.manager.num_usable - in_use


Ownership.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestOwnership = Ownership.TestCase
