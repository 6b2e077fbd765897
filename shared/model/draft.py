"""A draft's folder, as `slipstream distill` writes it: what stands between its target's embedding and output rows.

`config.json` is in Llama's form with a key of its own; `model.safetensors` has the layers, the final norm and
`head_ids`, the token of each logit. What is the target's is not in it. There are two kinds: layers as a decoder has
them, which may stand behind the target's own first ones (`exit_layer`: so many), and heads, which go on from the
target's last hidden rows: layers without attention, and `model.fuse`, which makes one row of a hidden row and the
embedding of the token after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from shared.errors import ConfigurationError, ModelFormatError
from shared.model.config import ModelConfig
from shared.model.draft_kind import DraftKind
from shared.model.hf_config import from_hf
from shared.model.safetensors import SafetensorsFolder
from shared.model.source import ModelSource, read_json
from shared.model.tensor_file import TensorReader
from shared.model.weight_names import WeightNames, weight_names

KEY = "slipstream_draft"
FORMAT_VERSION = 2
HEAD_IDS = "head_ids"
FUSE = "model.fuse"

_SHARED = (
    *("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
    *("vocab_size", "max_position", "rope_theta", "rope_scaling"),
)
"""What a draft has as its target: memory, cache layout and scratch of the kernels are of one shape for both."""

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DraftSource:
    """A draft's folder, checked against the target it was made for; `head_ids` ascend."""

    path: Path
    kind: DraftKind
    exit_layer: int
    config: ModelConfig
    names: WeightNames
    reader: TensorReader
    head_ids: Int32

    @property
    def num_layers(self) -> int:
        """The target's that it begins with, and its own."""
        return self.exit_layer + self.config.num_layers


def is_for(path: Path, target: ModelSource) -> bool:
    """Whether the draft in this folder says that it was made for this target."""
    about = read_json(path / "config.json").get(KEY)
    return isinstance(about, dict) and about.get("target_sha256") == target.revision


def resolve_draft(path: Path, target: ModelSource) -> DraftSource:
    """Raises ModelFormatError for a folder that is no draft, ConfigurationError for another target's."""
    content = read_json(path / "config.json")
    about = content.get(KEY)
    if not isinstance(about, dict) or about.get("version") != FORMAT_VERSION:
        raise ModelFormatError(f"{path}: config.json has no {KEY!r} of version {FORMAT_VERSION}: this is not a draft.")
    if about.get("target_sha256") != target.revision:
        raise ConfigurationError(
            f"the draft {path} was made for another model than {target.name}; make one with `slipstream distill`."
        )
    if about.get("kind") not in list(DraftKind):
        raise ModelFormatError(f"{path}: config.json names no kind of draft; known are {', '.join(DraftKind)}.")
    config = from_hf(content)
    _check(path, config, target.config)
    file, names = SafetensorsFolder(path), weight_names("hf", config.architecture)
    head_ids = _head_ids(file, path)
    if (
        not len(head_ids)
        or head_ids[0] < 0
        or head_ids[-1] >= target.config.vocab_size
        or (np.diff(head_ids) <= 0).any()
    ):
        raise ModelFormatError(f"{path}: {HEAD_IDS} must ascend within the target's vocabulary.")
    exit_layer = about.get("exit_layer", 0)
    if type(exit_layer) is not int or not 0 <= exit_layer < target.config.num_layers:
        raise ModelFormatError(f"{path}: exit_layer must be one of the target's {target.config.num_layers} layers.")
    reader = TensorReader(file, names.optional_prefix)
    return DraftSource(path, DraftKind(about["kind"]), exit_layer, config, names, reader, head_ids)


def _head_ids(file: SafetensorsFolder, path: Path) -> Int32:
    if len(file.shapes.get(HEAD_IDS, ())) != 1:
        raise ModelFormatError(f"{path}: the tensor {HEAD_IDS!r} is missing or not a list of ids.")
    with safe_open(path / "model.safetensors", framework="np") as stored:
        ids: Int32 = stored.get_tensor(HEAD_IDS)
    if ids.dtype != np.int32:
        raise ModelFormatError(f"{path}: {HEAD_IDS} must be 32-bit integers, not {ids.dtype}.")
    return np.ascontiguousarray(ids)


def _check(path: Path, draft: ModelConfig, target: ModelConfig) -> None:
    """What the two share in memory must have one shape."""
    for name in _SHARED:
        if getattr(draft, name) != getattr(target, name):
            raise ModelFormatError(
                f"{path}: {name} is {getattr(draft, name)}, the target's {getattr(target, name)}; make the draft again."
            )
