"""What integer activations and a bfloat16 cache cost in quality: perplexity, and where greedy texts part.

    python -m benchmarks.perplexity --tokens 16384 --out docs/data/perplexity.json

The same weights four times: dequantised to float32 in plain torch, and on the native kernels with a float32, a
bfloat16 and an int8 cache. The text is this project's own documentation, so a commit names it exactly; it is read in
windows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.raw import write_raw
from shared.config import EngineSettings
from shared.engine.sequence import Sequence as EngineSequence
from shared.kernels.library import load_library
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.batch import AttentionGroup, ForwardBatch, padded_rows
from shared.model.language_model import LanguageModel
from shared.model.registry import load, load_native
from shared.model.source import ModelSource, resolve
from shared.protocol.sampling import SamplingParams
from shared.tokenizer.loader import load_tokenizer
from shared.worker.build import build_engine

ROOT = Path(__file__).resolve().parents[1]
BLOCK_SIZE = 16
CHUNK = 256
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small",
    "To sort a list in Python, you",
    "Water boils at a temperature of",
    "The three primary colours are",
    "def fibonacci(n):\n",
    "A recipe for pancakes: first,",
    "The largest planet in the solar system",
    "In 1969, two astronauts",
    "The difference between TCP and UDP is",
    "Dear Sir or Madam,\n",
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which",
    "My favourite book is",
    "The opposite of hot is",
    "import numpy as np\n",
    "The Pythagorean theorem says that",
    "On Monday morning the train",
    "A good night's sleep helps",
    "The speed of light is about",
)
NEW_TOKENS = 64


def corpus() -> str:
    """The documentation of this checkout, in a fixed order."""
    pages = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "LICENSE"]
    return "\n".join(page.read_text() for page in pages)


class Scorer:
    """Negative log-likelihood of windows under one decoder, computed in chunks against a cache of its own."""

    def __init__(self, decoder: LanguageModel, layout: KVLayout, window: int) -> None:
        self._decoder = decoder
        self._blocks = torch.arange(1, 1 + -(-window // BLOCK_SIZE))
        self._cache = KVCache(layout, len(self._blocks) + 1).data

    def window(self, ids: Sequence[int]) -> float:
        """Sum over all tokens but the first, in nats."""
        total = 0.0
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            logits = self._decoder.logits(self._hidden(start, chunk)).double()
            targets = torch.tensor(ids[start + 1 : start + len(chunk) + 1])
            rows = torch.log_softmax(logits[: len(targets)], dim=-1)
            total -= float(rows.gather(1, targets[:, None]).sum())
        return total

    def _hidden(self, start: int, chunk: Sequence[int]) -> torch.Tensor:
        positions = torch.arange(start, start + len(chunk))
        slots = self._blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        padding = torch.zeros(padded_rows(len(chunk), self._decoder.row_pad) - len(chunk), dtype=torch.int64)
        batch = ForwardBatch(
            token_ids=torch.cat([torch.tensor(chunk), padding]),
            positions=torch.cat([positions, padding]),
            slot_mapping=torch.cat([slots, padding]),
            groups=(
                AttentionGroup(
                    rows=torch.arange(len(chunk)),
                    num_seqs=1,
                    query_len=len(chunk),
                    block_tables=self._blocks[None, : -(-(start + len(chunk)) // BLOCK_SIZE)],
                    context_lens=torch.tensor([start + len(chunk)]),
                ),
            ),
        )
        return self._decoder.forward(batch, self._cache)[: len(chunk)]


def perplexities(source: ModelSource, ids: Sequence[int], window: int) -> dict[str, float]:
    """Of each way to compute; windows are independent of each other."""
    windows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    found = {}
    for name, decoder, layout in _decoders(source):
        scorer = Scorer(decoder, layout, window)
        loss = sum(scorer.window(part) for part in windows) / (len(windows) * (window - 1))
        found[name] = math.exp(loss)
        print(f"{name:>24} {found[name]:.5f}", flush=True)
    return found


def _decoders(source: ModelSource) -> list[tuple[str, LanguageModel, KVLayout]]:
    library, config = load_library(), source.config
    if library is None:
        raise SystemExit("The native kernels were not built; install Slipstream where there is a C++ compiler.")
    plain = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE)
    decoders: list[tuple[str, LanguageModel, KVLayout]] = [("torch float32", load(source, "cpu", "float32"), plain)]
    for dtype in ("float32", "bfloat16", "int8"):
        layout = replace(plain, dtype=dtype, k_transposed=True)
        native = load_native(source, library, layout, torch.get_num_threads())
        decoders.append((f"native, {dtype} cache", native, layout))
    return decoders


def greedy_texts(source: ModelSource, kernels: str) -> list[list[int]]:
    """The tokens of each prompt's greedy continuation."""
    tokenizer = load_tokenizer(source)
    settings = EngineSettings(kernels=kernels, kv_cache_tokens=4096)
    engine = build_engine(source, settings, prefill_share=1.0, shared_cache=False).engine
    texts = []
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        params = SamplingParams(NEW_TOKENS, 0, temperature=0.0)
        sequence = EngineSequence(f"r{index}", params, list(ids), len(ids), (0,), b"perplexity")
        engine.add(sequence)
        while engine.has_work:
            engine.step()
        texts.append(sequence.tokens[len(ids) :])
    return texts


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs, None when all are equal."""
    different = np.flatnonzero(np.array(left) != np.array(right))
    return int(different[0]) if len(different) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = resolve(options.model)
    ids = load_tokenizer(source).encode(corpus())[: options.tokens]
    found = perplexities(source, ids, options.window)
    reference = found["torch float32"]
    change = {name: value / reference - 1 for name, value in found.items()}
    partings = [
        first_difference(*pair)
        for pair in zip(*(greedy_texts(source, way) for way in ("torch", "native")), strict=True)
    ]
    equal = sum(parting is None for parting in partings)
    print("relative change:", {name: f"{value:+.4%}" for name, value in change.items()})
    print(f"greedy: {equal} of {len(PROMPTS)} texts of {NEW_TOKENS} tokens equal; first differences {partings}")
    result: dict[str, Any] = {"perplexity": found, "relative_change": change, "greedy_first_difference": partings}
    write_raw(options.out, [result], model=source.name, tokens=len(ids), window=options.window)


if __name__ == "__main__":
    main()
