"""The finished draft as a Hugging Face folder.

The weights are the layers and the final norm; embeddings and output rows are the target's, so the folder has none.
`head_ids` maps the draft's outputs to the target's ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from shared.distill.checkpoint import trained_parameters
from shared.distill.heads import Heads
from shared.distill.student import Student
from shared.model.config import ModelConfig, RopeScaling
from shared.model.draft import FORMAT_VERSION, HEAD_IDS, KEY
from shared.model.draft_kind import DraftKind
from shared.model.source import ModelSource

_WEIGHTS = "model.safetensors"


def export_draft(
    folder: Path, kind: DraftKind, student: Student | Heads, source: ModelSource, recipe: Mapping[str, object]
) -> None:
    """Write `config.json`, `model.safetensors` and `recipe.json`; the weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _behind_exit(name, student.exit_layer): parameter.detach().cpu().half()
        for name, parameter in trained_parameters(student)
    }
    tensors[HEAD_IDS] = student.head_ids.cpu().int()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)  # who trains and who serves may be two users
    config = hf_config(student.config, student.num_layers)
    config[KEY] = {
        "version": FORMAT_VERSION,
        "kind": str(kind),
        "exit_layer": student.exit_layer,
        "target_sha256": source.revision,
        "vocab_size": source.config.vocab_size,
    }
    for name, content in (("config.json", config), ("recipe.json", dict(recipe))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _behind_exit(name: str, exit_layer: int) -> str:
    """A layer's name in the folder, which counts the draft's own only."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(int(parts[2]) - exit_layer)
    return ".".join(parts)


def hf_config(config: ModelConfig, num_layers: int) -> dict[str, object]:
    """The fields of a Llama `config.json`."""
    fields: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": config.activation,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": list(config.eos_ids),
        "torch_dtype": str(torch.float16).removeprefix("torch."),
    }
    if config.bos_id is not None:
        fields["bos_token_id"] = config.bos_id
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _scaling(config.rope_scaling)
    return fields


def _scaling(scaling: RopeScaling) -> dict[str, object]:
    fields: dict[str, object] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return fields
