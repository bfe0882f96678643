"""Pictures: the speed of their validation, tokens a second of training on rows that show them, and memory.

    python -m benchmarks.media [--parts validation,training,memory] [--rounds 3] [--seconds 20] [--json]

`validation`: what `ingest` does with a picture (check, normalise, hash, keep), against Pillow's own decoding
of the same bytes, on one core, in turn; CPU seconds, so that other work on the machine falls out.
`training`: a LLaVA of 7M parameters from a config (CLIP's tower, a Llama), LoRA r=16 on the language model's
linear layers, documentation texts of the standard library as answers, one row in five without a picture.
`usual` is transformers' Trainer with the same collator, rows in random order; `sorted` gives it batches of
like lengths. Each arm is a process of its own, in as many rounds as asked for: each figure is the median of
the rounds. No inputs of pictures are held over from an earlier batch, as where there are more than are held;
`pictures` is the share of the time in which pictures become inputs.
`memory`: the peak resident set of `ingest` and `prepare`, by the number of pictures, each a process of its
own; what one more picture costs must be far less than its bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from benchmarks.train import SKIPPED, Clock, Setup, _count, _settings, _stopper, measure, texts
from ratchet.config.data import MediaConfig

PARTS, ARMS = ("validation", "training", "memory"), ("usual", "sorted", "ratchet")
SIZES = ((640, 480), (4000, 3000))  # 0.3 and 12 megapixels
KINDS = ("JPEG", "PNG")
SIDE, PATCH = 112, 14  # pixels of what the tower reads: 64 tokens a picture
LENGTH, BATCH, ACCUMULATE = 320, 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each arm of the training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=600, help="of the training")
    parser.add_argument("--pictures", default="1000,10000", help="numbers of them, for the memory")
    parser.add_argument("--passes", type=int, default=20, help="over each picture of the validation")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, folder = arguments.one[0], Path(arguments.one[1])
        if what == "memory":
            print(json.dumps(take_in(folder)))
        else:
            run_arm(what, folder, arguments.seconds)
        return
    parts = {
        "validation": lambda: validate(arguments.passes),
        "training": lambda: train(arguments),
        "memory": lambda: weigh([int(count) for count in arguments.pictures.split(",")]),
    }
    for part in arguments.parts.split(","):
        found = parts[part]()
        if arguments.json:
            print(json.dumps({"part": part, "lines": found}), flush=True)
        else:
            tell(found)


def tell(lines: list[dict[str, Any]]) -> None:
    """Print lines of equal keys as a table."""
    names = list(lines[0])
    print(f"\n| {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * len(names)}")
    for line in lines:
        shown = (f"{value:,.3g}" if isinstance(value, float) else str(value) for value in line.values())
        print(f"| {' | '.join(shown)} |", flush=True)


def photograph(seed: int, size: tuple[int, int], kind: str) -> bytes:
    """Make a picture as a camera would: smooth surfaces with the noise of a sensor, and EXIF in a JPEG."""
    chance = np.random.default_rng(seed)
    width, height = size
    surfaces = chance.integers(0, 256, (height // 64 + 2, width // 64 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(surfaces).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + chance.normal(0, 4, (height, width, 1)).astype(np.int16)
    image, stored = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), io.BytesIO()
    if kind == "JPEG":
        exif = Image.Exif()
        exif[0x0110] = "a camera"
        image.save(stored, kind, quality=88, exif=exif)
    else:
        image.save(stored, kind)
    return stored.getvalue()


# --- validation ---------------------------------------------------------------------------------------------


def validate(passes: int) -> list[dict[str, Any]]:
    from ratchet.sources.media import MediaIntake

    lines, limits = [], MediaConfig()
    for size in SIZES:
        for kind in KINDS:
            times = max(2, passes if size == SIZES[0] else passes // 5)
            taken = MediaIntake(limits)
            found: dict[str, list[float]] = {"pillow": [], "ratchet": []}
            arms: dict[str, Callable[[bytes], Any]] = {
                "pillow": lambda data: Image.open(io.BytesIO(data)).load(),
                "ratchet": partial(taken.take, sound=False),
            }
            for seed in range(times):
                data = photograph(seed, size, kind)
                for arm in sorted(found, reverse=bool(seed % 2)):  # the second finds warm caches
                    began = time.process_time()
                    arms[arm](data)
                    found[arm].append(time.process_time() - began)
            seconds = {arm: median(values) for arm, values in found.items()}
            lines.append(
                {
                    "picture": f"{kind}, {size[0] * size[1] / 1e6:.1f} megapixels",
                    "rows_a_second": 1 / seconds["ratchet"],
                    "pillow_a_second": 1 / seconds["pillow"],
                    "against_pillow": seconds["pillow"] / seconds["ratchet"],
                }
            )
    return lines


# --- training -----------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.rows)
        for number in range(arguments.rounds):
            for arm, rounds in found.items():
                seconds = ["--seconds", str(arguments.seconds)]
                rounds.append(measure(arm, ["-m", "benchmarks.media", "--one", arm, folder, *seconds]))
                sys.stderr.write(f"round {number + 1}: {arm} {rounds[-1]['tokens_per_second']:,.0f}\n")
    lines: list[dict[str, Any]] = []
    for arm, rounds in found.items():
        figures = {name: median(one[name] for one in rounds) for name in rounds[0]}
        usual = lines[0] if lines else figures
        ratios = {
            told: figures[name] / usual[name]
            for told, name in (
                ("against_the_usual", "tokens_per_second"),
                ("by_cpu_seconds", "tokens_a_cpu_second"),
            )
        }
        lines.append({"arm": arm, **ratios, **figures})
    return lines


def prepare(folder: Path, count: int) -> None:
    """Make the base, `count` rows as the template writes them, and the tar of their pictures."""
    from ratchet.config.params import Config
    from ratchet.data.examples import MEDIA_MARK, Message, make_example
    from ratchet.media.pictures import read_picture
    from ratchet.media.store import MediaStore, write_shard
    from ratchet.models.loading import load_chat
    from tasks.base import make_base

    told = list(texts(count * 2))
    config = {
        "base": {"model": str(make_llava(folder / "model", [text for _, text in told]))},
        "adapter": {"rank": 16, "alpha": 32},
    }
    make_base(folder / "base", Config.model_validate(config))
    chance, pictures, examples = np.random.default_rng(7), dict[str, bytes](), []
    for number, (name, text) in enumerate(told):
        media: tuple[str, ...] = ()
        if number % 5:
            size = (int(chance.integers(200, 640)), int(chance.integers(200, 480)))
            picture = read_picture(photograph(number, size, KINDS[number % 2]), MediaConfig())
            pictures[picture.name], media = picture.data, (picture.name,)
        asked = Message("user", f"{MEDIA_MARK if media else ''}What does {name} do?", media=media)
        examples.append(make_example([asked, Message("assistant", text)], {}))
    (folder / "media").mkdir()
    write_shard(folder / "media" / "rows.tar", pictures)
    chat = load_chat(folder / "base", MediaStore.read(folder / "media"))
    rows = [row for row in map(chat.encode, examples) if len(row.ids) <= LENGTH][:count]
    (folder / "rows.json").write_bytes(msgspec.json.encode([tuple(row) for row in rows]))


def make_llava(folder: Path, told: list[str]) -> Path:
    """Write a LLaVA with random weights and a tokenizer that is trained on the texts."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from benchmarks.train import SMALL

    tokenizer = make_tokenizer(told)
    text: dict[str, Any] = {**SMALL, "vocab_size": len(tokenizer), "tie_word_embeddings": False}
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=192,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=PATCH,
                projection_dim=192,
            ),
            text_config=LlamaConfig(
                max_position_embeddings=4096,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **text,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=(SIDE // PATCH) ** 2,
        )
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    return folder


def make_tokenizer(told: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<image>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|pad|>", "<|end|>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(told, trainer)
    extra: Any = roles
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=extra,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template="{%- for message in messages -%}<|{{ message.role }}|>"
        "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content -%}{%- if part.type == 'image' -%}<image>"
        "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}",
    )


class CpuClock(Clock):
    """A clock that also counts CPU seconds, which tell more where other work shares the cores."""

    cpu = 0.0

    def step(self) -> bool:
        over = super().step()
        if self.steps == SKIPPED:
            self._cpu_began = time.process_time()
        elif self.steps > SKIPPED:
            self.cpu = time.process_time() - self._cpu_began
        return over

    def tell(self) -> dict[str, Any]:
        figures = super().tell()
        return {"tokens_a_cpu_second": self.learned / self.cpu, **figures}


def run_arm(arm: str, folder: Path, seconds: float) -> None:
    from ratchet.media.store import MediaStore
    from ratchet.models import processors
    from ratchet.models.chat_template import Encoded
    from ratchet.models.loading import load_chat

    processors.HELD = 0
    chat, clock, spent = (
        load_chat(folder / "base", MediaStore.read(folder / "media")),
        CpuClock(seconds),
        [0.0],
    )

    def inputs(names: Any, ids: Any) -> Any:
        began = time.perf_counter()
        found = chat.inputs(names, ids)
        spent[0] += time.perf_counter() - began
        return found

    rows = [
        Encoded(list(ids), list(learned), tuple(media))
        for ids, learned, media in msgspec.json.decode((folder / "rows.json").read_bytes())
    ]
    began = time.perf_counter()
    (_ratchet if arm == "ratchet" else _usual)(arm, folder, rows, clock, inputs, chat.pad_id)
    figures = clock.tell()
    print(json.dumps(figures | {"pictures": spent[0] / (time.perf_counter() - began)}))


def _usual(arm: str, folder: Path, rows: list[Any], clock: Clock, inputs: Any, pad_id: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

    from ratchet.models.loading import compute_dtype
    from ratchet.training.collation import RowCollator
    from ratchet.training.packing import pack

    data = [window for row in rows for window in pack([row], LENGTH)]
    _count(RowCollator, clock)
    collate, setup = RowCollator(pad_id, inputs), Setup(batch=BATCH, accumulate=ACCUMULATE)

    class Sorted(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            order = sorted(range(len(data)), key=lambda place: len(data[place].input_ids))
            batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
            mixed = torch.randperm(len(batches), generator=torch.Generator().manual_seed(7)).tolist()
            return [place for number in mixed for place in batches[number]]

    model: Any = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
    settings = _settings(folder, setup) | {"bf16": compute_dtype("auto")[0] == "bfloat16"}
    trainer = (Sorted if arm == "sorted" else Trainer)(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=data,
        data_collator=lambda chosen: collate([chosen]),
        callbacks=[_stopper(clock)],
    )
    trainer.train()


def _ratchet(arm: str, folder: Path, rows: list[Any], clock: Clock, inputs: Any, pad_id: int) -> None:
    """Train with the stage's own functions, as in benchmarks/train.py."""
    from ratchet.config.training import AdapterConfig
    from ratchet.models.adapters import add_adapter
    from ratchet.models.loading import compute_dtype, load_base
    from ratchet.training import collation
    from ratchet.training import schedule as schedules
    from ratchet.training.loss import AnswerLoss
    from ratchet.training.packing import pack
    from ratchet.training.trainer import fit

    class Enough(Exception):
        pass

    def report(step: int, values: dict[str, float]) -> None:
        if "train_loss" in values and clock.step():
            raise Enough

    windows = pack(rows, LENGTH)
    steps = max(1, len(windows) // BATCH) * 100
    schedule = schedules.Schedule(
        steps=steps,
        batch_windows=BATCH,  # with rows of like lengths, about as many rows a step as the others
        accumulate=1,
        learning_rate=1e-3,
        kind="cosine",
        warmup_share=0.05,
        weight_decay=0.01,
        max_grad_norm=1.0,
        evaluations=1,
        patience=1,
        seed=1,
        compute=compute_dtype("auto")[0],
    )
    model = add_adapter(load_base(folder / "base"), AdapterConfig(rank=16, alpha=32), seed=1)
    schedules.LOGS = steps  # a line a step, so that the clock hears of each
    for collator in (collation.WindowCollator, collation.RowCollator):
        _count(collator, clock)
    with contextlib.suppress(Enough):
        fit(
            model,
            windows,
            [],
            schedule,
            loss=AnswerLoss(),
            pad_id=pad_id,
            report=report,
            inputs=inputs,
        )


# --- memory -------------------------------------------------------------------------------------------------


def weigh(counts: list[int]) -> list[dict[str, Any]]:
    least, lines = None, []
    for count in (100, *counts):
        with tempfile.TemporaryDirectory() as folder:
            bytes_each = write_rows(Path(folder), count)
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.media", "--one", "memory", folder],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"ingest and prepare failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["accepted"] == count, found
        if least is None:
            least = found["peak_mib"]
            continue
        grown = (found["peak_mib"] - least) * 2**20 / (count - 100)
        lines.append(
            {
                "pictures": count,
                "bytes_a_picture": round(bytes_each),
                "peak_mib": round(found["peak_mib"]),
                "grown_bytes_a_picture": round(grown),
                "seconds": found["seconds"],
            }
        )
    return lines


def write_rows(folder: Path, count: int) -> float:
    """Write `count` different small pictures and a CSV that names them; return the bytes of one."""
    (folder / "images").mkdir()
    lines, size = ["image,question,answer"], 0
    for number in range(count):
        data = photograph(number, (96, 64), "PNG")
        size += len(data)
        (folder / "images" / f"{number}.png").write_bytes(data)
        lines.append(f"images/{number}.png,What stands under number {number}?,thing {number % 97}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return size / count


def take_in(folder: Path) -> dict[str, Any]:
    """Ingest the rows and prepare them; return the rows that are accepted, the seconds and the peak."""
    from ratchet.config.params import Config
    from tasks.ingest import add_batch, pull
    from tasks.prepare import prepare as prepare_rows

    config = Config.model_validate({"prepare": {"min_rows": 1}})
    began = time.perf_counter()
    pulled = pull(config, root=folder, path=str(folder / "rows.csv"))
    add_batch(folder / "raw", pulled, licence="CC0-1.0", who="benchmark")
    del pulled
    profile = prepare_rows(folder / "raw", folder / "golden.jsonl", folder / "out", config.prepare)
    return {
        "accepted": profile.total.accepted["rows"],
        "seconds": time.perf_counter() - began,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
