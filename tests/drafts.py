"""Drafts of small random models: of all their layers, so that they know what comes, or of the first one only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.distill.export import export_draft
from shared.distill.heads import Heads
from shared.distill.student import Student, read_frozen, read_layers
from shared.engine.engine import Engine
from shared.engine.runner import NativeRunner, Runner, TorchRunner
from shared.engine.scheduler import SchedulerLimits
from shared.engine.speculation import Speculation
from shared.kernels.library import load_library
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.draft import resolve_draft
from shared.model.draft_kind import DraftKind
from shared.model.language_model import LanguageModel
from shared.model.native import NativeDecoder
from shared.model.registry import load
from shared.model.source import ModelSource, resolve
from shared.speculative.context import ProposerContext
from tests.engine_fakes import make_sequence, output_of, run_to_end
from tests.model_checkpoints import VOCAB_SIZE, random_model, tokens
from tests.native_models import native

HEAD_SIZE = 96
BLOCK_SIZE = 16
NUM_BLOCKS = 256

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "0.7": {"temperature": 0.7},
    "1.0": {"temperature": 1.0},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bias": {"temperature": 1.0, "logit_bias": ((3, 4.0), (77, -3.0), (130, 2.0)), "stop_ids": (5, 6), "min_tokens": 9},
}


def target_of(folder: Path) -> ModelSource:
    random_model("LlamaForCausalLM", heads=4, kv_heads=2, hidden_size=64).save_pretrained(folder)
    return resolve(str(folder))


def write_draft(
    folder: Path, target: ModelSource, num_layers: int, head_size: int = HEAD_SIZE, *, exit_layer: int = 0
) -> Path:
    """A draft of the target's first layers, from `exit_layer` on its own; its head has so many ids, taken at random."""
    head_ids = np.sort(np.random.default_rng(5).permutation(VOCAB_SIZE)[:head_size]).astype(np.int64)
    student = Student(target.config, num_layers - exit_layer, read_frozen(target, head_ids), exit_layer)
    student.load_state_dict(read_layers(target, range(num_layers)), strict=False)
    with torch.no_grad():
        export_draft(folder, DraftKind.LAYERS, student, target, {"made": "for a test"})
    return folder


def write_heads(folder: Path, target: ModelSource, num_layers: int = 1, head_size: int = HEAD_SIZE) -> Heads:
    """Random heads; the module they were written from."""
    head_ids = np.sort(np.random.default_rng(5).permutation(VOCAB_SIZE)[:head_size]).astype(np.int64)
    heads = Heads(target.config, num_layers, target.config.intermediate_size, read_frozen(target, head_ids))
    heads.start(1.0, seed=3)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
        export_draft(folder, DraftKind.HEADS, heads, target, {"made": "for a test"})
    return heads


def best() -> str:
    """What computes most models here."""
    return "native" if load_library() is not None else "cpu"


def context_of(target: ModelSource, draft: Path | None, on: str = "native") -> ProposerContext:
    """With the target on the native kernels, or on torch and a device."""
    config, kernels = target.config, on == "native"
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, k_transposed=kernels)
    model: LanguageModel = native(target) if kernels else load(target, on, "float32")
    return ProposerContext(target, model, layout, NUM_BLOCKS, resolve_draft(draft, target) if draft else None)


def engine_of(
    target: ModelSource, speculation: Speculation | None, num_blocks: int = NUM_BLOCKS, on: str = "native"
) -> Engine:
    """As `context_of`, with a cache of so many blocks."""
    context = context_of(target, None, on)
    if isinstance(context.model, NativeDecoder):
        runner: Runner = NativeRunner(context.model, KVCache(context.layout, num_blocks))
    else:
        runner = TorchRunner(context.model, KVCache(context.layout, num_blocks, on), on)
    return Engine(runner, SchedulerLimits(), speculation=speculation)


def prompts(count: int) -> list[list[int]]:
    """Of several lengths, and never the same two."""
    return [tokens(5 + 7 * index % 40, seed=index) for index in range(count)]


def generate(engine: Engine, count: int, **params: Any) -> list[list[int]]:
    """What so many prompts are answered, greedy unless `params` say otherwise."""
    fields = {"max_tokens": 20, "temperature": 0.0} | params
    sequences = [
        make_sequence(prompt, name=str(index), seed=index, **fields) for index, prompt in enumerate(prompts(count))
    ]
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    return [output_of(sequence) for sequence in sequences]
