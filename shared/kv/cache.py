"""The paged KV cache: one tensor that holds every block of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import structlog
import torch

from shared.errors import ConfigurationError
from shared.kv.layout import KVLayout
from shared.kv.pool_file import PoolFile, create_pool_file

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_log = structlog.get_logger()


class KVCache:
    """Owns the memory of all KV blocks; which block belongs to whom is the block manager's business.

    Block 0 is reserved: padding rows write there and no live sequence reads it.
    `data` is `[layer, block, k|v, kv_head, slot, row_width]`, contiguous, zeroed.
    With `shared` the tensor lies in a file that peers on this host can map (`shared_path`); where
    that is impossible (a GPU, no room in shared memory) the cache is private and transfers go by TCP.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: str = "cpu", shared: bool = False) -> None:
        if num_blocks < 2:
            raise ConfigurationError(
                f"the KV cache has room for {num_blocks} blocks and needs at least 2; raise the KV cache size"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.row_width)
        dtype = TORCH_DTYPES[layout.dtype]
        self._file = _shared_file(layout.bytes_per_block * num_blocks, device) if shared else None
        if self._file is None:
            self.data = _lazy_zeros(shape, dtype) if device == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        else:
            size = torch.Size(shape).numel()
            self.data = torch.from_file(str(self._file.path), shared=True, size=size, dtype=dtype).view(shape)

    @property
    def shared_path(self) -> str | None:
        """The file that holds `data` from offset 0, or None when the cache is private."""
        return str(self._file.path) if self._file else None

    def layer(self, index: int) -> torch.Tensor:
        """View of one layer: `[block, k|v, kv_head, slot, row_width]`."""
        return self.data[index]

    def zero(self, block_ids: Sequence[int]) -> None:
        """Clear blocks on allocation: attention multiplies unused slots by 0, and 0 x NaN is NaN."""
        if self.data.device.type == "cpu":  # one contiguous piece of each layer at a time: half of what indexing takes
            for block_id in block_ids:
                self.data[:, block_id].zero_()
        elif block_ids:
            self.data.index_fill_(1, torch.tensor(block_ids, device=self.data.device), 0)

    def copy_block(self, src: int, dst: int) -> None:
        """Copy one block in every layer (copy on write of a shared block)."""
        self.data[:, dst].copy_(self.data[:, src])

    def close(self) -> None:
        """Unlink the shared file, if any. Views of `data` stay usable; idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _shared_file(num_bytes: int, device: str) -> PoolFile | None:
    if torch.device(device).type != "cpu":
        return None
    try:
        return create_pool_file(num_bytes)
    except OSError as error:
        _log.warning("kv_shared_memory_unavailable", num_bytes=num_bytes, error=str(error))
        return None


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are written: torch.zeros would touch every page at once."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
