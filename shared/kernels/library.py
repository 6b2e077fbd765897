"""The compiled CPU kernels as Python sees them: structs of the C interface, and where the library is found and loaded.

The structs mirror `cpu/slipstream_cpu.h` field by field. ctypes lets go of the GIL while a call runs, but for
brief ones: who lets go of it waits until the event loop's thread does, which may take longer than such a call.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ABI = 6
"""`SL_ABI` of the header this file mirrors."""


DRAW_ARRAYS = (
    *("seeds", "ordinals", "choices", "temperatures", "top_ks", "top_ps", "min_ps"),
    *("adjust_starts", "adjust_ids", "adjust_kinds", "adjust_values"),
)
"""What `sl_step` holds for the rows it draws, beside their ways."""


class Isa(IntEnum):
    """Instruction sets the library has code for; all give the same bits."""

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2


class CMatrix(Structure):
    _fields_ = [("kind", c_int32), ("num_out", c_int32), ("num_in", c_int32), ("data", c_void_p), ("bias", c_void_p)]


class CNorm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class CLayer(Structure):
    _fields_ = [
        ("attn_norm", CNorm),
        ("mlp_norm", CNorm),
        ("qkv", CMatrix * 3),
        ("num_qkv", c_int32),
        ("attn_out", CMatrix),
        ("into", CMatrix),
        ("out", CMatrix),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    ]


class CModel(Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("vocab_size", "hidden_size", "inner_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
                *("max_position", "norm", "activation", "gated", "sliding_window", "block_size", "kv_dtype"),
            )
        ),
        ("norm_eps", c_float),
        ("attention_scale", c_float),
        ("layers", POINTER(CLayer)),
        ("embedding", CMatrix),
        ("lm_head", CMatrix),
        ("positions", c_void_p),
        ("rotations", c_void_p),
        ("final_norm", CNorm),
        ("head_ids", c_void_p),
        ("fuse", CMatrix),
    ]


class CCores(Structure):
    """A place on the board of those who share a machine's cores (`shared.cores`)."""

    _fields_ = [("words", c_void_p), *((name, c_int32) for name in ("num_slots", "slot", "num_cores"))]


class CStep(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_seqs", "table_width", "num_logit_rows", "num_threads")),
        *(
            (name, c_void_p)
            for name in ("token_ids", "positions", "slots", "starts", "block_tables", "logit_rows", "kv")
        ),
        ("num_blocks", c_int64),
        *((name, c_void_p) for name in ("logits", "sample", *DRAW_ARRAYS, "cores", "sampled", "states", "hidden")),
    ]


class CChains(Structure):
    _fields_ = [
        ("first", POINTER(CStep)),
        ("max_places", c_int32),
        ("least_reach", c_float),
        *((name, c_void_p) for name in ("num_places", "states", "reach", "tokens", "sureness")),
    ]


class Library:
    """The loaded functions. `best_isa` is what this processor can run."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._brief = ctypes.PyDLL(str(path))
        self._functions.sl_create.restype = c_void_p
        self._functions.sl_create.argtypes = [c_void_p, c_int32, c_int32]
        self._functions.sl_destroy.argtypes = [c_void_p]
        self._functions.sl_run.argtypes = [c_void_p, c_void_p]
        self._brief.sl_guess.argtypes = [c_void_p, c_void_p]
        self._brief.sl_hidden.restype = c_void_p
        self._brief.sl_hidden.argtypes = [c_void_p]
        self._functions.sl_matmul.argtypes = [c_void_p, c_void_p, c_void_p, c_int32, c_void_p]
        self._brief.sl_share.argtypes = [c_void_p, c_uint64, c_void_p]
        self._functions.sl_draw.argtypes = [c_void_p, c_void_p, c_int32]
        if self._functions.sl_abi() != ABI:
            raise OSError(f"{path} was built from another version of the sources; install Slipstream again")
        self.best_isa = Isa(self._functions.sl_best_isa())

    def create(self, model: CModel, num_threads: int, isa: Isa) -> int:
        """An engine for a model whose memory stays alive until `destroy`. Raises ValueError for an isa not there."""
        handle = self._functions.sl_create(ctypes.addressof(model), num_threads, int(isa))
        if not handle:
            raise ValueError(f"{isa.name} kernels cannot run on this processor with {num_threads} threads")
        return int(handle)

    def destroy(self, engine: int) -> None:
        self._functions.sl_destroy(engine)

    def run(self, engine: int, step: CStep) -> None:
        """Compute one step. Raises MemoryError."""
        if self._functions.sl_run(engine, ctypes.addressof(step)):
            raise MemoryError("no memory for the step's activations")

    def guess(self, engine: int, chains: CChains) -> None:
        """Make chains of guesses. Raises MemoryError."""
        if self._brief.sl_guess(engine, ctypes.addressof(chains)):
            raise MemoryError("no memory for the guesses' activations")

    def hidden(self, engine: int) -> int:
        """Address of the last step's hidden rows, float32 [num_tokens, hidden_size]. Raises MemoryError."""
        address = self._brief.sl_hidden(engine)
        if not address:
            raise MemoryError("no memory for the step's hidden rows")
        return int(address)

    def matmul(self, engine: int, matrix: CMatrix, rows: int, num_rows: int, out: int) -> None:
        """Product of float32 rows with a matrix, both as addresses. Raises MemoryError."""
        if self._functions.sl_matmul(engine, ctypes.addressof(matrix), rows, num_rows, out):
            raise MemoryError("no memory for the product's activations")

    def share(self, cores: CCores, now_ns: int) -> range:
        """Numbers of the cores that a step may use at `now_ns`."""
        first = c_int32()
        count = self._brief.sl_share(ctypes.addressof(cores), now_ns, ctypes.addressof(first))
        return range(first.value, first.value + count)

    def draw(self, engine: int, step: CStep, vocab_size: int) -> None:
        """Draw from the logits that `step` holds, on this thread."""
        self._functions.sl_draw(engine, ctypes.addressof(step), vocab_size)


@cache
def load_library() -> Library | None:
    """The library built at installation, or None where there was no compiler or it does not load."""
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_cpu{suffix}"
        if path.exists():
            try:
                return Library(path)
            except OSError:
                return None
    return None
