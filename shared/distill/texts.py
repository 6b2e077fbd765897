"""Texts the target writes itself, each generated token with the target's distribution at its place.

A text depends on its number only: its prompt, its temperature and its seed follow from it, and no token depends on
what else is in the batch. So texts can be written in any company, and an interrupted run goes on with the next
number. Shards of neighbouring numbers are safetensors files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from shared.distill.corpus import Prompt
from shared.distill.target import Distributions, Target, best_of, joined
from shared.engine.sequence import Sequence as EngineSequence
from shared.protocol.sampling import SamplingParams

SHARD_TEXTS = 32
_TEMPERATURES = (0.0, 0.7, 1.0)
_SAMPLED = (0.7, 1.0)


@dataclass(frozen=True, slots=True)
class Text:
    """`tokens` [n] with the prompt first; `expected` row i is what the target expects as token `prompt_len + i`."""

    tokens: npt.NDArray[np.int32]
    prompt_len: int
    expected: Distributions
    is_held_out: bool

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len


@dataclass(slots=True)
class _Draft:
    """A text while it is written."""

    sequence: EngineSequence
    is_held_out: bool
    expected: list[Distributions] = field(default_factory=list)

    def finished(self) -> Text:
        tokens = np.array(self.sequence.tokens, dtype=np.int32)
        return Text(tokens, self.sequence.prompt_len, joined(self.expected), self.is_held_out)


def temperature_of(number: int, num_prompts: int) -> float:
    """Each prompt is answered once at each temperature, then only at those where the answer varies."""
    turn, place = divmod(number, num_prompts)
    if turn < len(_TEMPERATURES):
        return _TEMPERATURES[(turn + place) % len(_TEMPERATURES)]
    return _SAMPLED[(turn + place) % len(_SAMPLED)]


def seed_of(seed: int, number: int) -> int:
    """64 bits that no other text has."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "little")


class TextStore:
    """The shards of one folder, in order and without gaps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_shards(self) -> int:
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def append(self, texts: Sequence[Text]) -> None:
        """Write the next shard; it is there whole or not at all."""
        expected = joined([text.expected for text in texts])
        arrays = {
            "tokens": np.concatenate([text.tokens for text in texts]),
            "lengths": np.array([len(text.tokens) for text in texts], dtype=np.int32),
            "prompt_lens": np.array([text.prompt_len for text in texts], dtype=np.int32),
            "held_out": np.array([text.is_held_out for text in texts], dtype=np.uint8),
            "ids": expected.ids.astype(np.uint16) if expected.ids.max() < 1 << 16 else expected.ids,
            "logprobs": expected.logprobs,
            "log_rest": expected.log_rest,
        }
        path = self._path(self.num_shards)
        partial = path.with_suffix(".part")
        save_file(arrays, partial)
        os.replace(partial, path)

    def read(self, shard: int) -> Iterator[Text]:
        """The texts of one shard."""
        arrays = load_file(self._path(shard))
        expected = Distributions(arrays["ids"].astype(np.int32), arrays["logprobs"], arrays["log_rest"])
        token = row = 0
        columns = zip(arrays["lengths"], arrays["prompt_lens"], arrays["held_out"], strict=True)
        for length, prompt_len, held_out in columns:
            rows = slice(row, row + int(length - prompt_len))
            tokens = arrays["tokens"][token : token + int(length)]
            yield Text(tokens, int(prompt_len), expected[rows], bool(held_out))
            token, row = token + int(length), rows.stop

    def read_until(self, num_tokens: int) -> list[Text]:
        """Whole shards until `num_tokens` generated tokens are there."""
        texts: list[Text] = []
        generated = 0
        for shard in range(self.num_shards):
            if generated >= num_tokens:
                break
            found = list(self.read(shard))
            generated += sum(text.num_generated for text in found)
            texts += found
        return texts

    def _path(self, shard: int) -> Path:
        return self._folder / f"texts-{shard:05d}.safetensors"


class TextWriter:
    """Has the target answer prompts, `Target.num_sequences` at a time."""

    def __init__(
        self,
        target: Target,
        prompts: Sequence[tuple[Prompt, list[int]]],
        eos_ids: Sequence[int],
        seed: int,
        max_new: int,
    ) -> None:
        self._target = target
        self._engine = target.engine()
        self._prompts = prompts
        self._eos_ids = tuple(eos_ids)
        self._seed = seed
        self._max_new = max_new
        self._open: dict[str, tuple[int, _Draft]] = {}

    def write(self, store: TextStore, num_tokens: int, progress: Callable[[int], None]) -> None:
        """Add shards until the store has `num_tokens` generated tokens; `progress` gets the number written so far."""
        stored = sum(text.num_generated for text in store.read_until(num_tokens))
        first = store.num_shards * SHARD_TEXTS
        following, ready = first, dict[int, Text]()
        while stored < num_tokens:
            while len(self._open) < self._target.num_sequences:
                self._begin(following)
                following += 1
            ready |= self._step()
            shard = range(first, first + SHARD_TEXTS)
            if all(number in ready for number in shard):
                texts = [ready.pop(number) for number in shard]
                store.append(texts)
                stored += sum(text.num_generated for text in texts)
                first = shard.stop
            unstored = sum(text.num_generated for text in ready.values())
            unstored += sum(draft.sequence.num_output for _, draft in self._open.values())
            progress(min(stored + unstored, num_tokens))
        self._abandon()

    def _begin(self, number: int) -> None:
        prompt, ids = self._prompts[number % len(self._prompts)]
        temperature = temperature_of(number, len(self._prompts))
        params = SamplingParams(
            self._max_new, seed_of(self._seed, number), temperature=temperature, stop_ids=self._eos_ids
        )
        name = str(number)
        sequence = EngineSequence(name, params, list(ids), len(ids), (0,), hash_root=b"distill")
        self._open[name] = number, _Draft(sequence, prompt.is_held_out)
        self._engine.add(sequence)

    def _step(self) -> dict[int, Text]:
        """One step of the engine; the texts it finished, by number."""
        outputs = [output for output in self._engine.step() if output.samples]
        if not outputs:
            return {}
        expected = best_of(self._target.last_logits)
        finished = {}
        for row, output in enumerate(outputs):
            name = output.sequence.request_id
            number, draft = self._open[name]
            draft.expected.append(expected[row : row + 1])
            if output.samples[0].finish:
                finished[number] = draft.finished()
                del self._open[name]
        return finished

    def _abandon(self) -> None:
        for _, draft in self._open.values():
            self._engine.free(draft.sequence)
        self._open.clear()
