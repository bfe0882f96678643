"""Read the files of a base model, and refuse those that cannot be trained, merged and exported.

No weights are loaded: the headers of the files contain their names and shapes. Not covered: whether the model
works, which only running it shows (ratchet/bases/probe.py).
"""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.errors import BaseModelError, RatchetError
from ratchet.files import read_json, sha256_file
from ratchet.models.loading import WHOLE, auto_class, check_complete, load_tokenizer, quiet
from ratchet.models.processors import reads_media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"  # where many such models have their template
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Endings of the tensors that bitsandbytes, GPTQ, AWQ and FP8 write beside or instead of a layer's weights.
ROUNDED = re.compile(r"\.(qweight|qzeros|SCB|absmax|quant_map|quant_state\..*|weight_scale(_inv)?)$")
UNKNOWN = "unknown"  # the licence, if none is named


class Source(NamedTuple):
    """A base whose files are on this machine.

    `told` is its place for messages. It is never stored: the same files are the same base anywhere.
    """

    path: Path  # a folder, or a GGUF file
    told: str
    remedy: str  # how to get missing files
    tracked: bool = False  # whether DVC tracks the files, which may then be links into its cache


class BaseFiles(NamedTuple):
    """The weight files, the config of the text model, and the licence, as found in a base's folder."""

    weights: list[Path]
    settings: Any
    licence: str
    media: bool = False  # whether it is a model of pictures or sound and text, with its processor


def read_base_files(source: Source) -> BaseFiles:
    """Check the folder of a base and return its files. Raises BaseModelError that says what is wrong."""
    folder, told = source.path, source.told
    _check_links(source)
    if (folder / ADAPTER).exists():
        raise BaseModelError(
            f"{told} holds an adapter ({ADAPTER}), wanted a whole model",
            remedy="name the model that the adapter belongs to, or merge the two first",
        )
    if not (folder / CONFIG).exists():
        raise BaseModelError(
            f"{told} holds no {CONFIG} (found {_listed(folder)})",
            remedy="name a folder as transformers' save_pretrained writes it, or a .gguf file",
        )
    settings = _read_settings(source)
    media = _reads_media(source)
    weights = _find_whole(source)
    _check_heads(source, weights)
    _check_names(source, media=media)
    return BaseFiles(weights, settings, find_licence(folder), media)


def find_weights(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the weight files that transformers would load, and the names of those that are missing.

    Raises BaseModelError: the index cannot be read, or names a file outside the folder.
    """
    if (folder / WHOLE).exists():
        return [folder / WHOLE], []
    index = folder / INDEX
    if not index.exists():
        return [], []
    try:
        listed = sorted(set(read_json(index)["weight_map"].values()))
        odd = [name for name in listed if Path(name).name != name]
    except (RatchetError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{INDEX} cannot be read: {error}", remedy="copy or download the model again"
        ) from None
    if odd:
        raise BaseModelError(
            f"{INDEX} names {odd[0]!r}, which is no file of its own folder",
            remedy="put all weight files beside the index",
        )
    return (
        [folder / name for name in listed if (folder / name).exists()],
        [name for name in listed if not (folder / name).exists()],
    )


def read_tokenizer(source: Source, template: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer with one chat template: `template`, or its own, or its own named `default`.

    Raises BaseModelError: there is no tokenizer, or it has several templates and none is named `default`.
    """
    try:
        tokenizer = load_tokenizer(source.path)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise BaseModelError(
            f"{source.told} has no tokenizer that transformers {version('transformers')} can read: "
            f"{first_line(error)}",
            remedy="put the model's tokenizer.json and tokenizer_config.json beside its weights",
        ) from None
    if reads_media(source.path) and (source.path / PROCESSOR_TEMPLATE).exists():
        tokenizer.chat_template = _read(source.path / PROCESSOR_TEMPLATE, source.told)["chat_template"]
    named: Any = tokenizer.chat_template
    if template is not None:
        tokenizer.chat_template = template
    elif isinstance(named, dict):
        if "default" not in named:
            raise BaseModelError(
                f"{source.told} has several chat templates ({', '.join(sorted(named))}), "
                "none of them `default`",
                remedy="copy the right one into a file and name it in `base.chat_template`",
            )
        tokenizer.chat_template = named["default"]
    return tokenizer


def copy_files(files: BaseFiles, folder: Path) -> dict[str, str]:
    """Copy weights and configs to `folder`, and return the sha256 of each written weight file by name."""
    of = files.weights[0].parent
    for name in (CONFIG, "generation_config.json", *([] if len(files.weights) == 1 else [INDEX])):
        if (of / name).exists():
            shutil.copyfile(of / name, folder / name)
    for path in files.weights:
        shutil.copyfile(path, folder / path.name)
    return {path.name: sha256_file(folder / path.name) for path in files.weights}


def find_licence(folder: Path) -> str:
    """Return the licence of the README's front matter, else the licence file's first line, else "unknown"."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = dict(re.findall(r"^(license|license_name):[ \t]*(\S.*?)[ \t]*$", head[1] if head else "", re.M))
    found = named.get("license", "")
    if found.strip("'\"") == "other":
        found = named.get("license_name", found)
    if found:
        return str(found.strip("'\""))
    for path in sorted(folder.iterdir()):
        if re.match(r"(licen[cs]e|copying)\b", path.name, re.IGNORECASE) and path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip()[:120] for line in lines if line.strip()), UNKNOWN)
    return UNKNOWN


def _check_links(source: Source) -> None:
    """Refuse links out of the folder: their targets would be copied and published with the base.

    Links within the hub's cache (from snapshots to blobs) and into DVC's cache are allowed, since both caches
    store files this way. Raises BaseModelError.
    """
    folder = source.path.resolve()
    for path in sorted(folder.iterdir()):
        target = path.resolve()
        if not path.is_symlink() or target.is_relative_to(folder):
            continue
        blobs = folder.parents[1] / "blobs"
        if target.parent == blobs and folder.parent.name == "snapshots":
            continue
        if source.tracked and re.search(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$", target.as_posix()):
            continue
        raise BaseModelError(
            f"{source.told} holds {path.name}, a link to a place outside the folder",
            remedy=f"copy the files themselves: cp -rL {folder.name} {folder.name}-copy",
        )


def _find_whole(source: Source) -> list[Path]:
    weights, missing = find_weights(source.path)
    if missing:
        raise BaseModelError(
            f"{source.told} is here in part: {len(missing)} of its weight files are missing, "
            f"the first {missing[0]}",
            remedy=source.remedy,
        )
    if weights:
        return weights
    names = sorted(path.name for path in source.path.iterdir())
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise BaseModelError(
            f"{source.told} holds no safetensors (found {pickled})",
            remedy="take a model, or a revision, with safetensors: pickles are never loaded",
        )
    raise BaseModelError(
        f"{source.told} holds no weights: neither {WHOLE} nor {INDEX} (found {_listed(source.path)})",
        remedy=source.remedy,
    )


def _read_settings(source: Source) -> Any:
    """Read the text model's config.

    Raises BaseModelError: the model has code of its own, is quantised, or is unknown to transformers.
    """
    from transformers import AutoConfig

    folder, told = source.path, source.told
    for path in (folder / CONFIG, folder / "tokenizer_config.json"):
        if path.exists() and "auto_map" in _read(path, told):
            raise BaseModelError(
                f"{told} wants to run its own code (auto_map in {path.name})",
                remedy="take a model whose architecture transformers knows; remote code is never run",
            )
    raw = _read(folder / CONFIG, told)
    if method := _quantised_by(raw) or _quantised_by(raw.get("text_config")):
        raise _rounded(told, f"by {method}, its {CONFIG} says")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return config.get_text_config()
    except (ValueError, OSError, KeyError) as error:
        raise BaseModelError(
            f"{told} has a {CONFIG} that transformers {version('transformers')} cannot read: "
            f"{first_line(error)}",
            remedy="take another model",
        ) from None


def _quantised_by(raw: Any) -> str:
    found = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not found:
        return ""
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if found.get(name)]
    return " ".join([str(found.get("quant_method", "an unnamed method")), *bits])


def _rounded(told: str, how: str) -> BaseModelError:
    return BaseModelError(
        f"{told} is quantised already ({how}), wanted weights in float16, bfloat16 or float32: "
        "an adapter trained on it could not be merged or exported",
        remedy="take the model that it was made from; `adapter.method: qlora` quantises it while training",
    )


def _check_heads(source: Source, weights: list[Path]) -> None:
    """Refuse weight files that are truncated, not safetensors, or quantised. Raises BaseModelError."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="numpy") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            with path.open("rb") as handle:
                pointer = handle.read(64).startswith(b"version https://git-lfs")
            raise BaseModelError(
                f"{source.told}: {path.name} ({path.stat().st_size:,} bytes) is "
                + ("a pointer of git LFS, no weights" if pointer else f"no whole safetensors file: {error}"),
                remedy="git lfs pull" if pointer else source.remedy,
            ) from None
        if odd := next(filter(ROUNDED.search, names), None):
            raise _rounded(source.told, f"{path.name} holds {odd}")


def _reads_media(source: Source) -> bool:
    """Tell whether the model reads pictures or sound: by its architecture, and its processor is there."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    if not reads_media(source.path):
        return False
    with quiet():
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    return config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def _check_names(source: Source, *, media: bool) -> None:
    """Refuse a checkpoint that lacks weights or has some in another shape.

    transformers would initialise these at random. Raises BaseModelError.
    """
    try:
        with quiet():
            loaded: Any = auto_class(media=media).from_pretrained(
                source.path,
                device_map="meta",  # only shapes, no memory
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # our error below names them; the library's does not
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"transformers {version('transformers')} cannot load {source.told} as a "
            f"{'model of pictures or sound and text' if media else 'causal language model'}: "
            f"{first_line(error)}",
            remedy="take another model",
        ) from None
    found = loaded[1]
    check_complete({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}, source.told)


def _read(path: Path, told: str) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (RatchetError, OSError) as error:
        found = str(error)
    if not isinstance(found, dict):
        raise BaseModelError(
            f"{told}: {path.name} is no JSON object: {str(found)[:200]}",
            remedy="copy or download the model again",
        )
    return found


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:8]) + (" …" if len(names) > 8 else "")) or "nothing"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or repr(error)).splitlines()[0]
