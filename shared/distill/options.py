"""What one distillation does; the part that decides its texts, and the part that decides its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError
from shared.model.draft_kind import DraftKind

MAX_LAYERS = 4


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """One run. Equal options and an equal target give equal weights.

    `work` keeps texts and checkpoints of an unfinished run, `out` gets the draft. `num_tokens` is how many tokens the
    target writes; the student reads them `epochs` times and then learns for `on_policy_steps` on its own drafts. A
    step takes `batch_rows` rows of `row_tokens` tokens. Of the `head_size` ids it learns, the draft keeps `kept_ids`.
    """

    out: Path
    work: Path
    prompts: Path | None = None
    kind: DraftKind = DraftKind.HEADS
    num_tokens: int = 300_000
    num_layers: int = 2
    exit_layer: int = 0
    head_size: int = 8192
    kept_ids: int | None = None
    epochs: float = 4.0
    on_policy_steps: int = 0
    learning_rate: float = 3e-3
    seed: int = 0
    batch_rows: int = 1
    row_tokens: int = 512
    max_new_tokens: int = 256
    max_prompt_tokens: int = 256
    checkpoint_s: float = 120.0

    def __post_init__(self) -> None:
        at_least_one = {"--tokens": self.num_tokens, "--head-size": self.head_size}
        for flag, number in at_least_one.items():
            if number < 1:
                raise ConfigurationError(f"{flag} is {number}: give at least 1")
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise ConfigurationError(f"--layers is {self.num_layers}: give 1 to {MAX_LAYERS}")
        if self.epochs <= 0 or self.learning_rate <= 0:
            raise ConfigurationError("--epochs and --learning-rate must be above 0")
        if self.on_policy_steps < 0 or self.seed < 0:
            raise ConfigurationError("--on-policy and --seed must be 0 or more")
        if self.exit_layer < 0:
            raise ConfigurationError(
                f"--exit-layer is {self.exit_layer}: give 0, or after which of the target's layers"
            )
        if self.on_policy_steps and self.kind is DraftKind.HEADS:
            raise ConfigurationError("--on-policy is for drafts with layers: heads never go on from a wrong guess")
        if self.exit_layer and self.kind is DraftKind.HEADS:
            raise ConfigurationError("--exit-layer is for drafts with layers: heads go on from the target's last one")
        if self.kept_ids is not None and not 1 <= self.kept_ids <= self.head_size:
            raise ConfigurationError(f"--keep-ids is {self.kept_ids}: give 1 to the {self.head_size} of --head-size")
        if self.row_tokens < self.max_new_tokens + self.max_prompt_tokens:
            raise ConfigurationError("a row must hold the longest text")

    def of_texts(self) -> dict[str, object]:
        """What the texts depend on, beside the target and the prompts."""
        return {
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
        }

    def of_weights(self) -> dict[str, object]:
        """What the weights depend on, beside the texts."""
        return {
            "kind": str(self.kind),
            "num_tokens": self.num_tokens,
            "num_layers": self.num_layers,
            "exit_layer": self.exit_layer,
            "head_size": self.head_size,
            "epochs": self.epochs,
            "on_policy_steps": self.on_policy_steps,
            "learning_rate": self.learning_rate,
            "batch_rows": self.batch_rows,
            "row_tokens": self.row_tokens,
        }
