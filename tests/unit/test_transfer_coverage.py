"""The plan of parts, the check that each arrives once, and the copies in and out of the pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError, TransferError
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.transfer.base import Part
from shared.transfer.blocks import gather, scatter
from shared.transfer.coverage import Coverage, check_frame_bytes, plan

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)
layouts = st.builds(
    KVLayout,
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1, 4]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(["float32", "bfloat16"]),
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[KVLayout, int, int, int]:
    """Layout, tokens, blocks to skip, bytes a frame."""
    layout = draw(layouts)
    num_tokens = draw(st.integers(1, 60))
    skip = draw(st.integers(0, layout.num_blocks(num_tokens)))
    return layout, num_tokens, skip, draw(st.integers(1, 3 * layout.bytes_per_block))


@given(requests())
def test_a_plan_covers_all_once_in_order(request: tuple[KVLayout, int, int, int]) -> None:
    layout, num_tokens, skip, frame_bytes = request
    coverage = Coverage(layout, num_tokens, skip)
    parts = list(plan(layout, skip, layout.num_blocks(num_tokens), num_tokens, frame_bytes))
    for part in parts:
        coverage.add(part)
    coverage.finish()
    assert [(p.block_start, p.layer_start) for p in parts] == sorted((p.block_start, p.layer_start) for p in parts)
    held = min(num_tokens, skip * layout.block_size)
    assert sum(part.num_bytes(layout) for part in parts) == (num_tokens - held) * layout.bytes_per_token


@given(requests())
def test_parts_fit_into_a_frame_or_are_as_small_as_can_be(request: tuple[KVLayout, int, int, int]) -> None:
    layout, num_tokens, skip, frame_bytes = request
    for part in plan(layout, skip, layout.num_blocks(num_tokens), num_tokens, frame_bytes):
        assert part.num_bytes(layout) <= frame_bytes or part.num_layers == part.num_blocks == 1


@given(requests(), st.data())
def test_a_plan_in_steps_covers_the_same(request: tuple[KVLayout, int, int, int], data: st.DataObject) -> None:
    layout, num_tokens, skip, frame_bytes = request
    stop = layout.num_blocks(num_tokens)
    middle = data.draw(st.integers(min(skip, num_tokens // layout.block_size), num_tokens // layout.block_size))
    coverage = Coverage(layout, num_tokens, min(skip, middle))
    for start, end in ((min(skip, middle), middle), (middle, stop)):
        for part in plan(layout, start, end, num_tokens, frame_bytes):
            coverage.add(part)
    coverage.finish()
    assert coverage.num_missing == 0


@given(requests(), st.data())
def test_a_missing_or_doubled_part_is_seen(request: tuple[KVLayout, int, int, int], data: st.DataObject) -> None:
    layout, num_tokens, skip, frame_bytes = request
    parts = list(plan(layout, skip, layout.num_blocks(num_tokens), num_tokens, frame_bytes))
    if not parts:
        return
    victim = data.draw(st.sampled_from(parts))
    coverage = Coverage(layout, num_tokens, skip)
    for part in data.draw(st.permutations(parts)):
        if part != victim:
            coverage.add(part)
    assert coverage.num_missing == victim.num_layers * victim.num_blocks
    _refused(lambda: coverage.finish())
    coverage.add(victim)
    coverage.finish()
    _refused(lambda: coverage.add(victim))


@pytest.mark.parametrize(
    "part",
    [
        Part(0, 4, 1, 2, 4),
        Part(0, 3, 0, 1, 4),
        Part(0, 3, 0, 2, 4),
        Part(0, 3, 1, 3, 4),
        Part(0, 3, 2, 3, 4),
        Part(0, 3, 2, 3, 1),
        Part(0, 3, 1, 2, 2),
        Part(0, 3, 1, 3, 2),
        Part(0, 3, 3, 4, 4),
    ],
)
def test_a_part_out_of_place_is_refused(part: Part) -> None:
    """Ten tokens in blocks of four, the first block held: due are block 1 with 4 slots and block 2 with 2."""
    coverage = Coverage(LAYOUT, 10, 1)
    _refused(lambda: coverage.add(part))
    assert coverage.num_missing == 6


def test_overlapping_layers_are_refused() -> None:
    coverage = Coverage(LAYOUT, 8, 0)
    coverage.add(Part(1, 3, 0, 2, 4))
    _refused(lambda: coverage.add(Part(0, 2, 1, 2, 4)))


def _refused(act: object) -> None:
    assert callable(act)
    with pytest.raises(TransferError) as raised:
        act()
    assert raised.value.reason == "coverage"


def test_frame_sizes_the_protocol_cannot_carry_are_configuration_errors() -> None:
    check_frame_bytes(LAYOUT, 4 << 20)
    for layout, frame_bytes in ((LAYOUT, 17 << 20), (LAYOUT, 0), (replace(LAYOUT, head_dim=1 << 20), 1024)):
        with pytest.raises(ConfigurationError, match="lower the frame size"):
            check_frame_bytes(layout, frame_bytes)


@given(requests(), st.integers(0, 2**31))
def test_scatter_puts_back_what_gather_took(request: tuple[KVLayout, int, int, int], seed: int) -> None:
    layout, num_tokens, _, frame_bytes = request
    generator = torch.Generator().manual_seed(seed)
    num_blocks = layout.num_blocks(num_tokens)
    source, target = KVCache(layout, num_blocks + 1), KVCache(layout, num_blocks + 1)
    source.data.copy_(torch.randn(source.data.shape, generator=generator))
    theirs = (1 + torch.randperm(num_blocks, generator=generator)).tolist()
    ours = (1 + torch.randperm(num_blocks, generator=generator)).tolist()
    for part in plan(layout, 0, num_blocks, num_tokens, frame_bytes):
        picked = slice(part.block_start, part.block_stop)
        content = gather(source, part, theirs[picked])
        assert content.numel() == part.num_bytes(layout)
        scatter(target, part, ours[picked], content)
    for token in range(num_tokens):
        block, slot = divmod(token, layout.block_size)
        want, got = source.data[:, theirs[block], :, :, slot], target.data[:, ours[block], :, :, slot]
        assert torch.equal(want, got)
    assert not target.data[:, 0].any()
    used = num_tokens - (num_blocks - 1) * layout.block_size
    assert not target.data[:, ours[-1], :, :, used:].any()


def test_gather_is_a_copy_in_the_order_of_the_layout() -> None:
    cache = KVCache(LAYOUT, 5)
    cache.data.copy_(torch.arange(cache.data.numel()).view(cache.data.shape))
    part = Part(1, 3, 0, 2, 3)
    content = gather(cache, part, [4, 2])
    expected = [
        cache.data[layer, block, kv, head, slot, dim].item()
        for layer in (1, 2)
        for block in (4, 2)
        for kv in range(2)
        for head in range(2)
        for slot in range(3)
        for dim in range(4)
    ]
    cache.data.zero_()
    assert content.view(torch.float32).tolist() == expected
