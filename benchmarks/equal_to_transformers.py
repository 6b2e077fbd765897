"""Greedy answers of SmolLM2 against transformers running the same GGUF, dequantised to float32.

    python -m benchmarks.equal_to_transformers --out docs/data/equal-to-transformers.json

Ours is the engine with chunked prefill and all prompts in one batch; theirs is one prompt at a time with
`generate(do_sample=False)`. Where answers differ, the gap between the two best logits of the reference at the first
different token is reported: a tie within rounding says something else than a wrong token.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from shared.config import EngineSettings
from shared.engine.sequence import Sequence
from shared.model.source import ModelSource, resolve
from shared.protocol.sampling import SamplingParams
from shared.tokenizer.loader import load_tokenizer
from shared.worker.build import build_engine

QUESTIONS = (
    "Why is the sky blue?",
    "Write a haiku about autumn.",
    "What is the capital of France?",
    "Explain recursion to a child.",
    "List three uses of a hammer.",
    "Translate 'good morning' into Spanish.",
    "What is 17 times 3?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What causes the tides?",
    "Write a Python function that reverses a string.",
    "Summarise the story of Cinderella in two sentences.",
    "What is photosynthesis?",
    "Name the planets of the solar system.",
    "How do I boil an egg?",
    "What is the difference between a frog and a toad?",
    "Write an apology to a customer for a late delivery.",
    "What does HTTP stand for?",
    "Tell me a joke about computers.",
    "Describe the colour red without naming it.",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt. `first_difference` is the index of the first unequal token, -1 when there is none."""

    question: str
    prompt_tokens: int
    output_tokens: int
    first_difference: int
    reference_gap: float | None


def prompts_of(source: ModelSource, questions: tuple[str, ...]) -> list[list[int]]:
    codec = load_tokenizer(source)
    rendered = [codec.template.render([{"role": "user", "content": question}]) for question in questions]
    return [codec.encode_chat(conversation) for conversation in rendered]


def our_answers(source: ModelSource, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Greedy tokens from the engine, all prompts together."""
    settings = EngineSettings(kernels="torch", kv_cache_tokens=8192, max_num_seqs=32)
    built = build_engine(source, settings, prefill_share=1.0, shared_cache=False)
    params = SamplingParams(max_tokens=length, seed=0, temperature=0.0)
    sequences = [Sequence(str(i), params, list(ids), len(ids), (0,), b"") for i, ids in enumerate(prompts)]
    for sequence in sequences:
        built.engine.add(sequence)
    while built.engine.has_work:
        built.engine.step()
    return [sequence.tokens[sequence.prompt_len :] for sequence in sequences]


def load_reference(source: ModelSource) -> Any:
    """transformers' model with the GGUF's weights dequantised to float32."""
    path = Path(source.path)
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)


@torch.inference_mode()
def reference_answer(model: Any, prompt: list[int], length: int) -> list[int]:
    """Greedy tokens, without stopping at end-of-sequence."""
    past, ids, output = None, torch.tensor([prompt]), []
    for _ in range(length):
        result = model(ids, past_key_values=past, use_cache=True)
        past = result.past_key_values
        output.append(int(result.logits[0, -1].argmax()))
        ids = torch.tensor([output[-1:]])
    return output


@torch.inference_mode()
def gap_at(model: Any, tokens: list[int]) -> float:
    """Difference of the two best logits after `tokens`."""
    best = model(torch.tensor([tokens])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def compare(length: int, questions: tuple[str, ...] = QUESTIONS, model: str = "smollm2") -> list[Comparison]:
    source = resolve(model)
    prompts = prompts_of(source, questions)
    answers = our_answers(source, prompts, length)
    reference = load_reference(source)
    rows = []
    for question, prompt, ours in zip(questions, prompts, answers, strict=True):
        theirs = reference_answer(reference, prompt, length)
        differing = [i for i in range(length) if ours[i] != theirs[i]]
        first = differing[0] if differing else -1
        gap = gap_at(reference, prompt + theirs[:first]) if differing else None
        rows.append(Comparison(question, len(prompt), length, first, gap))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    rows = compare(arguments.length)
    equal = sum(row.first_difference < 0 for row in rows)
    report = {
        "command": " ".join(["python -m benchmarks.equal_to_transformers", *sys.argv[1:]]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - started, 1),
        "equal": equal,
        "of": len(rows),
        "rows": [asdict(row) for row in rows],
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{equal} of {len(rows)} greedy answers of {arguments.length} tokens equal transformers'")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
