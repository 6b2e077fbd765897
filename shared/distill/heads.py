"""Heads as a trainable module, and how they learn: chains of guesses behind every token the target wrote.

A chain begins with the target's hidden row and goes on with the heads' own. The tokens in it are the target's: a chain
is over at its first wrong guess, so none is ever made behind one, and drafts of the heads' own would teach nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.distill.lessons import TEST_POSITIONS, Lesson
from shared.distill.losses import expected_in_head, place_table
from shared.distill.student import FeedForward, Frozen
from shared.distill.target import Target, joined
from shared.distill.texts import Text
from shared.model.config import ModelConfig

Int64 = npt.NDArray[np.int64]

NUM_PLACES = 3
CHAINS = 192
"""Chains a step learns from."""

_FADING = 0.8
"""Each place weighs so much of the one before it: it is reached less often."""


class HeadsLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = rows + self.mlp(self.post_attention_layernorm(rows))
        return result


class HeadsBody(nn.Module):
    """What Hugging Face calls `model`, without the embeddings."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.fuse = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(HeadsLayer(config) for _ in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class Heads(nn.Module):
    """One set of weights for all places; `model` holds all parameters."""

    def __init__(self, config: ModelConfig, num_layers: int, inner_size: int, frozen: Frozen) -> None:
        super().__init__()
        self.config = replace(config, intermediate_size=inner_size)
        self.num_layers = num_layers
        self.exit_layer = 0
        self.model = HeadsBody(self.config, num_layers)
        for name in ("embedding", "head", "head_ids"):
            self.register_buffer(name, getattr(frozen, name), persistent=False)
        self.embedding: Tensor
        self.head: Tensor
        self.head_ids: Tensor

    def forward(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """States [n, hidden_size] behind these tokens [n], from the states before them."""
        rows = self.model.fuse(torch.cat([states, F.embedding(token_ids, self.embedding)], -1)).float()
        for layer in self.model.layers:
            rows = layer(rows)
        result: Tensor = self.model.norm(rows)
        return result

    def logits(self, states: Tensor) -> Tensor:
        """float32 [n, head_size], in the order of `head_ids`."""
        return F.linear(states, self.head.to(states.dtype)).float()

    @torch.no_grad()
    def start(self, state_scale: float, seed: int) -> None:
        """First weights: both halves of the input count alike, and layers change nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.copy_(values)
        size = self.config.hidden_size
        self.model.fuse.weight[:, :size] /= state_scale
        self.model.fuse.weight[:, size:] /= float(self.embedding.std())
        self.model.norm.weight.fill_(state_scale)
        for name, parameter in self.named_parameters():
            if name.endswith("down_proj.weight"):
                nn.init.zeros_(parameter)


class HeadsCourse:
    """Implements `Course`. A batch is an array of places where chains begin, taken from all texts at random.

    Keeps the target's states at all these places in memory, two bytes a number.
    """

    def __init__(
        self, heads: Heads, target: Target, texts: Sequence[Text], seed: int, progress: Callable[[int], None]
    ) -> None:
        """Has the target read all texts again; `progress` gets the number read so far."""
        self._heads = heads
        self._seed = seed
        self._device = heads.head.device
        states = []
        for number, text in enumerate(texts, 1):
            states.append(target.states(text.tokens[:-1].tolist(), text.num_generated))
            progress(number)
        self._states = np.concatenate(states)
        self._tokens = np.concatenate([text.tokens[text.prompt_len :] for text in texts]).astype(np.int64)
        self._expected = joined([text.expected for text in texts])
        lengths = [text.num_generated for text in texts]
        self._ends = np.repeat(np.cumsum(lengths), lengths)
        is_held_out = np.repeat([text.is_held_out for text in texts], lengths)
        can_begin = np.arange(len(self._ends)) + 1 < self._ends
        self._starts = np.flatnonzero(can_begin & ~is_held_out)
        self._held_out = np.flatnonzero(can_begin & is_held_out)[:TEST_POSITIONS]
        heads.start(float(self._states[:4096].astype(np.float32).std()), seed)

    def epoch(self, number: int) -> list[Int64]:
        order = np.random.default_rng([self._seed, number]).permutation(self._starts)
        return np.array_split(order, max(1, len(order) // CHAINS))

    def held_out(self) -> list[Int64]:
        return np.array_split(self._held_out, max(1, len(self._held_out) // CHAINS))

    def lessons(self, batch: Int64) -> list[Lesson]:
        """Products in bfloat16, everything else in float32, as with layers."""
        found: list[Lesson] = []
        table = place_table(self._heads.head_ids.cpu().numpy(), self._heads.config.vocab_size)
        at, states = batch, self._tensor(self._states[batch]).float()
        for place in range(NUM_PLACES):
            stays = at + 1 < self._ends[at]
            states, at = states[self._tensor(stays)], at[stays]
            if not len(at):
                break
            with torch.autocast(self._device.type, torch.bfloat16):
                states = self._heads(states, self._tensor(self._tokens[at]))
                logits = self._heads.logits(states)
            at = at + 1
            expected = expected_in_head(self._expected[at], table, self._device)
            found.append(Lesson(logits, expected, _FADING**place))
        return found

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
