"""The decoder on the CPU kernels: the same surface as `shared.model.decoder.Decoder`, one native call a step."""

from __future__ import annotations

import copy
import ctypes
import time
from ctypes import Structure
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.kernels.library import ABI, DRAW_ARRAYS, CCores, CModel, CStep, Isa, Library
from shared.model.batch import ForwardBatch, Int32, RaggedStep
from shared.model.config import ModelConfig
from shared.model.native_weights import NativeWeights

F32 = npt.NDArray[np.float32]

KV_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
"""`sl_kv` of the C interface."""


_Anything = ctypes.c_char * 0


def address(array: npt.NDArray[Any]) -> int:
    """Where a writable array's values lie, one after the other; a sixth of the time that `array.ctypes.data` takes."""
    return ctypes.addressof(_Anything.from_buffer(array))  # type: ignore[arg-type]  # numpy types no buffer


def point(call: Structure, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Let the fields of a C struct point to arrays, which must outlive the call."""
    for name, array in arrays.items():
        setattr(call, name, address(array))


class Draws(Protocol):
    """How each logit row is sampled in the native call; arrays of one length (see `shared.engine.draws`)."""

    @property
    def ways(self) -> Int32: ...
    @property
    def seeds(self) -> npt.NDArray[np.uint64]: ...
    @property
    def ordinals(self) -> npt.NDArray[np.uint32]: ...
    @property
    def choices(self) -> npt.NDArray[np.uint32]: ...
    @property
    def temperatures(self) -> npt.NDArray[np.float64]: ...
    @property
    def top_ks(self) -> Int32: ...
    @property
    def top_ps(self) -> npt.NDArray[np.float64]: ...
    @property
    def min_ps(self) -> npt.NDArray[np.float64]: ...
    @property
    def adjust_starts(self) -> npt.NDArray[np.int64]: ...
    @property
    def adjust_ids(self) -> Int32: ...
    @property
    def adjust_kinds(self) -> Int32: ...
    @property
    def adjust_values(self) -> F32: ...


class NativeDecoder:
    """Computes one step at a time against a paged KV cache that the caller owns. Not thread-safe.

    The cache's K halves hold [head_dim, slot] in each block, as `KVLayout.k_transposed` says.
    """

    row_pad = 1  # every row has the same bits whatever is computed beside it

    def __init__(self, config: ModelConfig, weights: NativeWeights, library: Library, threads: int, isa: Isa) -> None:
        self.config = config
        self.isa = isa
        self._weights = weights
        self._library = library
        self._threads = threads
        self.run_s = 0.0
        """Processor time the calling thread has spent in native steps."""
        self._start(weights.model)

    def _start(self, model: CModel) -> None:
        self._model = model
        self._logits: F32 = np.empty((0, model.vocab_size), dtype=np.float32)
        self._engine = self._library.create(model, self._threads, self.isa)

    def __del__(self) -> None:
        if getattr(self, "_engine", 0):
            self._library.destroy(self._engine)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def kernel_set(self) -> str:
        """The same on every instruction set, because the bits are."""
        return f"cpu-{ABI}"

    @property
    def weights(self) -> NativeWeights:
        """For a draft, which reads its target's embedding."""
        return self._weights

    @property
    def num_threads(self) -> int:
        """Threads a step has where it does not share the cores."""
        return self._threads

    @property
    def num_layers(self) -> int:
        return int(self._model.num_layers)

    def truncated(self, num_layers: int) -> NativeDecoder:
        """The same decoder with its first layers only, sharing all weights."""
        shorter = copy.copy(self)
        model = CModel.from_buffer_copy(self._model)
        model.num_layers = min(num_layers, self.num_layers)
        shorter._start(model)
        return shorter

    def run(
        self,
        step: RaggedStep,
        kv: Tensor,
        draws: Draws | None = None,
        *,
        threads: int = 0,
        cores: CCores | None = None,
    ) -> tuple[F32, Int32, F32]:
        """Logits [len(logit_rows), vocab_size], the sampled ids (-1 where none was asked for), and the hidden rows.

        A draft has a logit for each token that it can say. Hidden rows [len(logit_rows), hidden_size] are those behind
        the final norm, which the logits are made of.

        `threads` is how many of the decoder's threads compute this step, 0 for all; with `cores` it is their share,
        counted anew as a long step goes on. No number of threads changes a bit. The logits are overwritten by the
        next run: fresh memory for each step would be cleared page by page.
        """
        self._check(step)
        num_rows = len(step.logit_rows)
        logits = self._logits_of(num_rows)
        sampled = np.full(num_rows, -1, dtype=np.int32)
        hidden = np.empty((num_rows, self.config.hidden_size), dtype=np.float32)
        call = CStep(len(step.token_ids), len(step.starts) - 1, step.block_tables.shape[1], num_rows, threads)
        arrays: dict[str, npt.NDArray[Any]] = {"logits": logits, "sampled": sampled, "hidden": hidden}
        for name in ("token_ids", "positions", "slots", "starts", "block_tables", "logit_rows"):
            arrays[name] = getattr(step, name)
        if draws is not None:
            arrays["sample"] = draws.ways
            arrays |= {name: getattr(draws, name) for name in DRAW_ARRAYS}
        point(call, arrays)
        call.kv, call.num_blocks = kv.data_ptr(), kv.shape[1]
        call.cores = ctypes.addressof(cores) if cores else None
        began = time.thread_time()
        self._library.run(self._engine, call)
        self.run_s += time.thread_time() - began
        return logits, sampled, hidden

    def _check(self, step: RaggedStep) -> None:
        """Compiled code reads where it is told to: what comes from outside is bounded here."""
        for name, values, end in (
            ("token id", step.token_ids, self.config.vocab_size),
            ("position", step.positions, self.config.max_position),
        ):
            if len(values) and int(values.view(np.uint32).max()) >= end:  # a negative number is a large one there
                raise IndexError(f"a {name} is outside 0 to {end - 1}")

    def _logits_of(self, num_rows: int) -> F32:
        if num_rows > len(self._logits):
            self._logits = np.empty((num_rows, self._model.vocab_size), dtype=np.float32)
        return self._logits[:num_rows]

    def forward(self, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size]; as `Decoder.forward`."""
        self.run(ragged(batch), kv)
        shape = (len(batch.token_ids), self.config.hidden_size)
        address = self._library.hidden(self._engine)
        rows = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)
        return torch.from_numpy(rows.copy())

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [num_rows, vocab_size] for any number of hidden rows [num_rows, hidden_size]."""
        head = self._model.lm_head
        values = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
        out = np.empty((len(values), head.num_out), dtype=np.float32)
        if len(values):
            self._library.matmul(self._engine, head, values.ctypes.data, len(values), out.ctypes.data)
        return torch.from_numpy(out[:, : self._model.vocab_size])


def ragged(batch: ForwardBatch) -> RaggedStep:
    """A batch of groups as one run of sequences, in row order."""
    sequences = [
        (int(rows[0]), group.query_len, table)
        for group in batch.groups
        for rows, table in zip(group.rows.view(group.num_seqs, -1), group.block_tables.numpy(), strict=True)
    ]
    sequences.sort(key=lambda sequence: sequence[0])
    width = max((len(table) for _, _, table in sequences), default=1)
    tables = np.zeros((len(sequences), width), dtype=np.int32)
    for index, (_, _, table) in enumerate(sequences):
        tables[index, : len(table)] = table
    starts = np.cumsum([0, *(length for _, length, _ in sequences)])
    return RaggedStep(
        batch.token_ids.numpy().astype(np.int32),
        batch.positions.numpy().astype(np.int32),
        batch.slot_mapping.numpy().astype(np.int64),
        starts.astype(np.int32),
        tables,
        np.zeros(0, dtype=np.int32),  # the kernels know the contexts from the positions
        np.zeros(0, dtype=np.int32),
    )
