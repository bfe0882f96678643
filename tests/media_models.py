"""Make tiny models that see or hear, of several architectures, from configs with random weights.

Each `make_*` writes a whole base to a folder as transformers does: weights, tokenizer, processor, template.
`FAMILIES` has those of pictures by name, `SOUND_FAMILIES` those of sound. `picture` and `sound` make what
they take.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ratchet.data.examples import MEDIA_MARK, Example, Message, encode_line, make_example
from ratchet.files import write_bytes
from ratchet.media.sounds import RATE, write_flac

PAD, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
TEXTS = (
    "What is in the picture? It is a red square, and beside it a blue one.",
    "Name the colour of the first picture and of the second picture.",
    "def read(path): return open(path).read()  # 0123456789",
)
SIDE = 32  # pixels of a square picture as the towers of CLIP and SigLIP read it
HEARD = 2  # seconds that the tower of Qwen2-Audio hears
WIDTH, LAYERS, HEADS, CONTEXT = 32, 2, 2, 2048


def template(written: str, kind: str = "image") -> str:
    """Return a chat template whose `content` is a list of parts; it writes `written` for a part of a kind."""
    return (
        "{%- for message in messages -%}<|{{ message.role }}|>"
        "{%- if message.content is string -%}{{ message.content }}"
        "{%- else -%}{%- for part in message.content -%}"
        f"{{%- if part.type == '{kind}' -%}}{{{{ '{written}' }}}}"
        "{%- else -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    )


def make_tokenizer(
    *tokens: str, chat_template: str, size: int = 400, **named: str
) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer; `tokens` are a family's control tokens, `named` those with a name."""
    control = [PAD, SYSTEM, USER, ASSISTANT, END, *tokens]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    extra: Any = named or [SYSTEM, USER, ASSISTANT, *tokens]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=extra,
        model_max_length=CONTEXT,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
    if named:
        made.add_special_tokens({"additional_special_tokens": [SYSTEM, USER, ASSISTANT, *tokens]})
    return made


def picture(seed: int, width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    """Return a picture of coloured blocks as a file of PNG or JPEG; equal arguments give equal bytes."""
    chance = random.Random(seed)
    image = Image.new("RGB", (width, height))
    for _ in range(4):
        left, top = chance.randrange(width), chance.randrange(height)
        box = (left, top, left + 1 + width // 2, top + 1 + height // 2)
        image.paste(tuple(chance.randrange(256) for _ in range(3)), box)
    stored = io.BytesIO()
    image.save(stored, kind)
    return stored.getvalue()


def picture_part(data: bytes) -> dict[str, Any]:
    """Return the part of an OpenAI message that shows a picture."""
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
    }


def sound(seed: int, seconds: float = 0.5) -> bytes:
    """Return a recording of two tones, as it is stored; equal arguments give equal bytes."""
    chance = random.Random(seed)
    times = np.arange(int(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * chance.uniform(100, 4000) * times + seed) for _ in range(2)]
    return write_flac((0.4 * tones[0] + 0.2 * tones[1]).astype(np.float32))


def _llama(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _tower(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": 16,
        **more,
    }


def _save(model: Any, processor: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    return folder


def make_llava(folder: Path, tokenizer: Any = None) -> Path:
    """LLaVA with CLIP's tower: four tokens a picture."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tokenizer or make_tokenizer("<image>", chat_template=template("<image>"))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_tower(projection_dim=WIDTH)),
            text_config=LlamaConfig(**_llama(tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return _save(model, processor, folder)


def make_idefics3(folder: Path, tokenizer: Any = None) -> Path:
    """Idefics3, SmolVLM's architecture: a large picture is split into tiles, each of four tokens."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        Idefics3VisionConfig,
        LlamaConfig,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = tokenizer or make_tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        "<end_of_utterance>",
        *tiles,
        chat_template=template("<image>"),
        size=440,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=Idefics3VisionConfig(**_tower(patch_size=8)),
            text_config=LlamaConfig(**_llama(tokenizer)),
            image_token_id=processor.image_token_id,
            scale_factor=2,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _save(model, processor, folder)


def make_gemma3(folder: Path, tokenizer: Any = None) -> Path:
    """Gemma 3 with SigLIP's tower: four tokens a picture, which see each other; token types."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = tokenizer or make_tokenizer(
        chat_template=template("<start_of_image>"),
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        **_llama(
            tokenizer, head_dim=16, sliding_window=512, layer_types=["sliding_attention", "full_attention"]
        )
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**_tower(patch_size=8, vision_use_head=False)),
            mm_tokens_per_image=4,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
            image_token_index=tokenizer.image_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros by default
    return _save(model, processor, folder)


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_tokenizer() -> Any:
    return make_tokenizer(
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        chat_template=template(QWEN),
    )


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def make_qwen2_5_vl(folder: Path, tokenizer: Any = None) -> Path:
    """Qwen2.5-VL: as many tokens as a picture has blocks of 16 pixels; positions of three dimensions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tokenizer or _qwen_tokenizer()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=_llama(tokenizer, rope_parameters=rope),
            vision_config={
                "depth": LAYERS,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_heads": HEADS,
                "out_hidden_size": WIDTH,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            **_qwen_ids(tokenizer),
        )
    )
    return _save_qwen(model, tokenizer, folder, "Qwen2_5_VLProcessor")


def make_qwen3_vl(folder: Path, tokenizer: Any = None) -> Path:
    """Qwen3-VL: as Qwen2.5-VL, and features of early layers of the tower go into early layers of the text."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = tokenizer or _qwen_tokenizer()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=_llama(tokenizer, rope_parameters=rope, head_dim=16),
            vision_config={
                "depth": LAYERS,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_heads": HEADS,
                "out_hidden_size": WIDTH,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **_qwen_ids(tokenizer),
        )
    )
    return _save_qwen(model, tokenizer, folder, "Qwen3VLProcessor")


def _save_qwen(model: Any, tokenizer: Any, folder: Path, processor: str) -> Path:
    """Save the processor's files as the hub's checkpoints have them; without torchvision it has no class."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    settings = {
        "min_pixels": 16 * 16,
        "max_pixels": 64 * 64,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def make_llava_next(folder: Path, tokenizer: Any = None) -> Path:
    """LLaVA-NeXT: the picture as a whole and in tiles, with a token at the end of each line."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = tokenizer or make_tokenizer("<image>", chat_template=template("<image>"))
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**_tower(projection_dim=WIDTH)),
            text_config=LlamaConfig(**_llama(tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=grids,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=grids,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return _save(model, processor, folder)


def make_internvl(folder: Path, tokenizer: Any = None) -> Path:
    """InternVL: a picture in one to four tiles of four tokens, between two tokens of its own."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        LlamaConfig,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = tokenizer or make_tokenizer(
        chat_template=template("<IMG_CONTEXT>"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**_tower(image_size=[SIDE, SIDE], patch_size=[8, 8])),
            text_config=LlamaConfig(**_llama(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
            downsample_ratio=0.5,
        )
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    named = {"processor_class": "InternVLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images.to_dict() | named))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4} | named))
    return folder


def make_mllama(folder: Path) -> Path:
    """Mllama (Llama 3.2 Vision), which reads pictures by cross-attention; not one of FAMILIES."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokenizer = make_tokenizer("<|image|>", chat_template=template("<|image|>"))
    tokenizer.bos_token = USER
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = _llama(tokenizer, bos_token_id=2, cross_attention_layers=[1], rope_parameters=rope)
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_global_layers": 1,
        "attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": 16,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 2 * WIDTH,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
        )
    )
    images = MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_image_tiles=4)
    processor = MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    return _save(model, processor, folder)


def make_qwen2_audio(folder: Path, tokenizer: Any = None) -> Path:
    """Qwen2-Audio with Whisper's features: up to 50 tokens for a recording of two seconds."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = tokenizer or make_tokenizer(
        "<|AUDIO|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
        chat_template=template("<|audio_bos|><|AUDIO|><|audio_eos|>", "audio"),
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 80,
                "d_model": WIDTH,
                "encoder_layers": LAYERS,
                "encoder_attention_heads": HEADS,
                "encoder_ffn_dim": 64,
                "max_source_positions": 50 * HEARD,
            },
            text_config={"model_type": "qwen2", **_llama(tokenizer)},
            audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        )
    )
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=80, chunk_length=HEARD, return_attention_mask=True),
        tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return _save(model, processor, folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "internvl": make_internvl,
    "idefics3": make_idefics3,
    "gemma3": make_gemma3,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
}
SOUND_FAMILIES: dict[str, Callable[[Path], Path]] = {"qwen2_audio": make_qwen2_audio}
ALL_FAMILIES = FAMILIES | SOUND_FAMILIES
# Parameters of fixtures: all families, of which unit tests take three that differ most.
QUICK = ("llava", "qwen2_5_vl", "qwen2_audio")
BY_FAMILY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.e2e) for name in ALL_FAMILIES]


def hears(folder: Path) -> bool:
    """Tell whether a model of ALL_FAMILIES, or a base made of one, takes recordings in place of pictures."""
    path = folder / "processor_config.json"
    return path.exists() and "feature_extractor" in path.read_text()


def medium(folder: Path, seed: int) -> bytes:
    """Return a picture or a recording, as the model in `folder` takes it."""
    return sound(seed) if hears(folder) else picture(seed, 40 + seed, 30, "PNG" if seed % 2 else "JPEG")


def write_shard(folder: Path, pictures: Mapping[str, bytes], name: str = "batch") -> None:
    """Write pictures to a deterministic tar shard, as `data/prepared/media` holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for member, stored in sorted(pictures.items()):
            head = tarfile.TarInfo(member)
            head.size = len(stored)
            shard.addfile(head, io.BytesIO(stored))


def name_of(stored: bytes) -> str:
    """Return the name of a picture or recording in a shard."""
    kind = "png" if stored.startswith(b"\x89PNG") else "flac" if stored.startswith(b"fLaC") else "jpg"
    return f"{hashlib.sha256(stored).hexdigest()}.{kind}"


def make_rows(
    count: int, seed: int = 0, batch: str = "b1.jsonl", *, sounds: bool = False
) -> tuple[list[Example], dict[str, bytes]]:
    """Return rows of which most show one to three pictures (or recordings), and these by name."""
    chance, rows, shown = random.Random(seed), list[Example](), dict[str, bytes]()
    words = ["red", "blue", "green", "square", "circle", "left", "of", "the", "a", "and", "two", "is"]
    for number in range(count):
        pictures = [
            sound(chance.randrange(10**6), chance.uniform(0.1, HEARD))
            if sounds
            else picture(chance.randrange(10**6), chance.randint(20, 90), chance.randint(20, 90), kind)
            for kind in chance.choices(("PNG", "JPEG"), k=chance.choice((0, 1, 1, 2, 3)))
        ]
        named = [name_of(stored) for stored in pictures]
        shown |= dict(zip(named, pictures, strict=True))
        said = [" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(4)]
        parts = [said[0], *(part for _ in named for part in (MEDIA_MARK, chance.choice(("", "\n", said[1]))))]
        chance.shuffle(parts)
        messages = [Message("user", "".join(parts) + f" {number}?", media=tuple(named))]
        if chance.random() < 0.3:  # another turn before, with its own picture at times
            messages = [Message("user", said[2]), Message("assistant", said[3]), *messages]
        answer = Message("assistant", " ".join(chance.choices(words, k=chance.randint(1, 5))))
        rows.append(make_example([*messages, answer], {"batch": batch, "source": "made"}))
    return rows, shown


def write_prepared(folder: Path, rows: Sequence[Example], pictures: Mapping[str, bytes]) -> Path:
    """Write data/prepared: every tenth row for validation, every twelfth for tests, others for training."""
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": [], "golden": []}
    for number, row in enumerate(rows):
        splits["validation" if number % 10 == 0 else "test" if number % 12 == 1 else "train"].append(row)
    folder.mkdir(parents=True)
    for split, chosen in splits.items():
        write_bytes(folder / f"{split}.jsonl", map(encode_line, chosen))
    if pictures:
        write_shard(folder / "media", pictures)
    return folder
