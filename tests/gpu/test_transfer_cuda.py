"""Hand-offs from and to a pool in GPU memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.kv.cache import KVCache
from shared.transfer.address import decode_address
from shared.transfer.base import ExportKey
from shared.transfer.exporter import Exporter
from shared.transfer.importer import Importer
from tests.transfer_rig import IDENTITY, LAYOUT, LIMITS, NUM_BLOCKS, SECRET, tokens_of

pytestmark = pytest.mark.gpu
KEY = ExportKey("request", 1, "nonce")


@pytest.mark.parametrize(("source_device", "target_device"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_moves_every_byte(source_device: str, target_device: str, dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    source = KVCache(layout, NUM_BLOCKS, device=source_device)
    target = KVCache(layout, NUM_BLOCKS, device=target_device)
    source.data.copy_(torch.randn(source.data.shape))
    exporter = Exporter(source, IDENTITY, SECRET, LIMITS)
    importer = Importer(target, IDENTITY, SECRET, LIMITS)
    await exporter.start()
    export = exporter.open(KEY, [9, 3, 5, 7], 14)
    export.progress(14)
    export.finish(b"record")
    pulled = await importer.pull(exporter.address, KEY, 14, [4, 1, 2, 8])
    assert torch.equal(tokens_of(source, [9, 3, 5, 7], 14).cpu(), tokens_of(target, [4, 1, 2, 8], 14).cpu())
    assert (pulled.record, pulled.transport) == (b"record", "tcp")
    await importer.close()
    await exporter.close()


async def test_a_gpu_pool_is_offered_by_tcp_only() -> None:
    cache = KVCache(LAYOUT, NUM_BLOCKS, device="cuda", shared=True)
    exporter = Exporter(cache, IDENTITY, SECRET, LIMITS)
    await exporter.start()
    assert set(decode_address(exporter.address).routes) == {"tcp"}
    await exporter.close()
