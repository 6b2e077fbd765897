"""A model whose answers depend on every cached token, so that any wrong block, slot or order changes them.

It keeps the token ids themselves in the cache and reads the whole context back through the block tables; the
logits are a fixed random row per context. `expected_tokens` computes the same without cache or batch.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from shared.engine.engine import Engine, Output
from shared.engine.runner import TorchRunner
from shared.engine.sampler import SampleInput, sample
from shared.engine.scheduler import SchedulerLimits
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.batch import ForwardBatch
from shared.protocol.sampling import SamplingParams

VOCAB = 50
HIDDEN_SIZE = 64
BLOCK_SIZE = 4


@cache
def logits_for(context: tuple[int, ...]) -> np.ndarray:
    """The fake model's float32 logits after `context`."""
    return np.random.default_rng([token + 1 for token in context]).standard_normal(VOCAB).astype(np.float32) * 2


class ContextModel:
    """Implements `shared.model.language_model.ForwardPass`; hidden states begin with an index into contexts seen."""

    row_pad = 4

    def __init__(self) -> None:
        self._contexts: list[tuple[int, ...]] = [()]
        self.rows_run = 0

    def forward(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        assert len(batch.token_ids) % self.row_pad == 0
        self.rows_run += len(batch.token_ids)
        blocks, slots = batch.slot_mapping // BLOCK_SIZE, batch.slot_mapping % BLOCK_SIZE
        kv[0, blocks, 0, 0, slots, 0] = batch.token_ids.to(kv.dtype) + 1
        hidden = torch.zeros(len(batch.token_ids), HIDDEN_SIZE, dtype=torch.float32)
        for group in batch.groups:
            rows = group.rows.view(group.num_seqs, group.query_len)
            for member in range(group.num_seqs):
                table = group.block_tables[member]
                cached = kv[0, table, 0, 0, :, 0].reshape(-1)
                for row in rows[member].tolist():
                    position = int(batch.positions[row])
                    assert position < int(group.context_lens[member])
                    self._contexts.append(tuple(int(v) - 1 for v in cached[: position + 1].tolist()))
                    hidden[row, 0] = len(self._contexts) - 1
        return hidden

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.from_numpy(logits_for(self._contexts[int(row)])) for row in rows[:, 0]])


def make_engine(
    num_blocks: int = 64, *, prefix_caching: bool = True, speculation: Speculation | None = None, **limits: object
) -> tuple[Engine, ContextModel]:
    model = ContextModel()
    kv = KVCache(KVLayout(1, 1, 1, BLOCK_SIZE), num_blocks)
    runner = TorchRunner(model, kv, "cpu")
    made = SchedulerLimits(**limits)  # type: ignore[arg-type]
    return Engine(runner, made, prefix_caching=prefix_caching, speculation=speculation), model


def make_sequence(prompt: list[int], *, choice: int = 0, name: str = "r", **params: object) -> Sequence:
    fields: dict[str, object] = {"max_tokens": 8, "seed": 7, "temperature": 0.0} | params
    return Sequence(name, SamplingParams(**fields), list(prompt), len(prompt), (choice,), b"root")  # type: ignore[arg-type]


def expected_tokens(prompt: list[int], params: SamplingParams, choice: int = 0) -> list[int]:
    """The slow, obvious decoding loop: no cache, no batch, no scheduler."""
    output: list[int] = []
    while params.finish_reason(output) is None:
        logits = logits_for((*prompt, *output))
        output.append(sample(logits, SampleInput(params, choice, prompt, output)))
    return output


def run_to_end(engine: Engine, max_steps: int = 2000) -> list[Output]:
    """Step until nothing is left, checking block ownership after every step."""
    outputs: list[Output] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
        engine.check_integrity()
    raise AssertionError("the engine made no end of its work")


def output_of(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.prompt_len :]
