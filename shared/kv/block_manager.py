"""Who holds which KV block: free list, reference counts and the prefix cache.

A block is referenced by every sequence that reads it and by every hand-off still copying it; it is reusable
when all have let go. A released block whose content is known by hash stays findable until its room is needed.

Only the engine thread calls this class. Block 0 is never handed out: padding rows write there.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence


class NoFreeBlocks(Exception):
    """Fewer blocks are free or evictable than asked for; nothing was allocated."""


def chain_root(*parts: str) -> bytes:
    """Start of a hash chain: blocks are shared only between sequences of one root.

    The parts are everything the bits in a block depend on beside the tokens (tenant salt, model revision,
    adapter, KV dtype, numerics fingerprint).
    """
    encoded = [part.encode() for part in parts]  # lengths go in, so that no two lists of parts read the same
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "little") + part for part in encoded)).digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of one full block: its own tokens and, through `parent`, all tokens before it."""
    return hashlib.sha256(parent + b"".join(token.to_bytes(4, "little") for token in tokens)).digest()


class BlockManager:
    """The only writer of block ownership."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError("a KV cache needs at least 2 blocks, one of them for padding")
        self._num_blocks = num_blocks
        self._free: deque[int] = deque(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._fresh: list[int] = []

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self._num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached content included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of cached blocks that starts the chain. Changes nothing."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, count: int, shared: Sequence[int] = ()) -> bool:
        """Whether `count` new blocks are there once the cached blocks `shared` are taken too."""
        return count <= self.num_free - sum(block in self._evictable for block in set(shared))

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]  # a KeyError here is a block nobody may read
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks with one reference each, evicting the least recently used content.

        Raises NoFreeBlocks. The caller zeroes them before use: stale NaNs would spread through 0 × NaN.
        """
        if count > self.num_free:
            raise NoFreeBlocks(f"{count} blocks asked for, {self.num_free} free")
        blocks = [self._take_one() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self._fresh += blocks
        return blocks

    def take_fresh(self) -> list[int]:
        """Blocks handed out since the last call; whoever calls has to zero them."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference each. The last block of a chain is evicted first, so prefixes live longest."""
        for block in reversed(list(blocks)):
            if self._references[block] <= 0:
                raise AssertionError(f"block {block} released more often than retained")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Make a full, computed block findable; the first block of a hash stays the findable one."""
        if block not in self._hash_of and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def clear_cache(self) -> None:
        """Forget all cached content that nobody references."""
        while self._evictable:
            self._free.append(self._evict_one())

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Compare every count with the block lists of all holders. Raises AssertionError with the first difference."""
        counted = Counter(block for blocks in holders for block in blocks)
        for block in range(1, self._num_blocks):
            if counted[block] != self._references[block]:
                raise AssertionError(f"block {block}: {self._references[block]} references, {counted[block]} holders")
        idle = sorted([*self._free, *self._evictable])
        expected = [block for block in range(1, self._num_blocks) if counted[block] == 0]
        if idle != expected:
            raise AssertionError("free and cached blocks do not add up to the unreferenced ones")
        if {self._block_of[h]: h for h in self._block_of} != self._hash_of:
            raise AssertionError("the two directions of the prefix index differ")

    def _take_one(self) -> int:
        return self._free.popleft() if self._free else self._evict_one()

    def _evict_one(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block
