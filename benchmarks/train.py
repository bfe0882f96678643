"""Loss-bearing tokens a second: the usual recipe, sorted by length, TRL padded and packed, and this project's
own path, in turn.

    python -m benchmarks.train [--model smollm2] [--rounds 3] [--seconds 40] [--arms usual,ratchet] [--json]

A Llama of 7M parameters from a config, or SmolLM2-135M-Instruct; LoRA r=16 on all linear layers, bfloat16
autocast where the arm takes it, documentation texts of the standard library with their natural lengths up to
512 tokens (the question is not learned, the text is). Each arm is a process of its own. They run one after
another, in as many rounds as asked for, so that a busy machine hits all alike: each figure is the median of
the rounds, and a ratio is that of the medians.
`utilisation` is the share of the computed positions that bear loss. `cold_start_seconds` runs from the
process's start to the end of the first optimizer step; `imports` is what importing torch, transformers and
peft costs by itself. TRL is installed once into `.ratchet/bench-trl`, without touching the environment.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import psutil

from ratchet.data.examples import Example, Message, make_example
from ratchet.pipeline.checkout import STAGE_ENVIRONMENT
from ratchet.sources.pydoc import import_roots

if TYPE_CHECKING:
    from ratchet.models.chat_template import ChatFormat

ARMS = ("usual", "sorted", "trl_padded", "trl_packed", "ratchet", "ratchet_qlora", "ratchet_compiled")
TRL, TRL_WANTED = Path(".ratchet/bench-trl"), "trl==1.16.0"
SKIPPED = 2  # steps at the start that are not timed


class Setup(NamedTuple):
    """One machine's task.

    Lengths in tokens; `method` is what every arm trains unless its name says another.
    """

    length: int = 512
    batch: int = 4
    accumulate: int = 2
    packed: int = 2048  # the window of TRL's packing
    method: Literal["lora", "qlora"] = "lora"
    cuda: bool = False


SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", choices=("small", "smollm2"), default="small")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_arm(arguments.one[0], Path(arguments.one[1]), arguments.seconds, Setup())
        return
    imports = import_seconds()
    if not arguments.json:
        print(
            f"importing torch, transformers and peft: {imports:.1f} s\n\n| arm | tokens a second | against"
            " the usual | utilisation | first step after s | peak MiB |\n|---|---|---|---|---|---|"
        )
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == "smollm2":
            prepare_smollm2(Path(folder), arguments.rows, Setup().length)
        else:
            prepare(Path(folder), arguments.rows, SMALL, Setup().length)
        for number in range(arguments.rounds):
            for arm, rounds in found.items():
                command = [
                    "-m",
                    "benchmarks.train",
                    "--one",
                    arm,
                    folder,
                    "--seconds",
                    str(arguments.seconds),
                ]
                rounds.append(measure(arm, command))
                sys.stderr.write(f"round {number + 1}: {arm} {rounds[-1]['tokens_per_second']:,.0f}\n")
    usual = median(one["tokens_per_second"] for one in next(iter(found.values())))
    for arm, rounds in found.items():
        figures = {name: median(one[name] for one in rounds) for name in rounds[0]}
        if arguments.json:
            print(json.dumps({"arm": arm, **figures, "import_seconds": imports}))
        else:
            speed = figures["tokens_per_second"]
            print(
                f"| {arm} | {speed:,.0f} | {speed / usual:.2f} | {figures['utilisation']:.0%} |"
                f" {figures['cold_start_seconds']:.1f} | {figures['peak_mib']:,.0f} |"
            )


def measure(arm: str, command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if arm.startswith("ratchet"):
        environment |= STAGE_ENVIRONMENT
    if arm.startswith("trl"):
        install_trl()
        environment["PYTHONPATH"] = f"{TRL.resolve()}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def import_seconds() -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import torch, transformers, peft; transformers.Trainer"],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def install_trl() -> None:
    if not TRL.exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(TRL),
                TRL_WANTED,
            ],
            check=True,
        )


# --- the task: a model and rows -----------------------------------------------------------------------------


def prepare(folder: Path, count: int, shape: dict[str, Any], length: int, dtype: str = "float32") -> None:
    """Make a base with random weights, and rows of up to `length` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ratchet.config.training import DemoBase
    from ratchet.demo.base_model import make_tokenizer
    from ratchet.files import write_json
    from ratchet.models.chat_template import ChatFormat
    from ratchet.models.loading import MANIFEST

    examples = make_examples(count)
    tokenizer = make_tokenizer(examples, DemoBase(vocab_size=4096, context=4096))
    chat = ChatFormat(tokenizer)
    write_rows(folder, chat, examples, count, length)
    torch.manual_seed(1)
    config = LlamaConfig(
        max_position_embeddings=4096,
        pad_token_id=chat.pad_id,
        eos_token_id=chat.stop_id,
        **{**shape, "vocab_size": max(shape["vocab_size"], len(tokenizer))},
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder / "base", safe_serialization=True)
    del model
    tokenizer.save_pretrained(folder / "base")
    write_json(
        folder / "base" / MANIFEST,
        {"model": "demo", "revision": None, "context": 4096, "pad_id": chat.pad_id},
    )


def prepare_smollm2(folder: Path, count: int, length: int) -> None:
    """Make the base from SmolLM2's GGUF file, and rows of up to `length` of its tokens."""
    from ratchet.config.params import Config
    from ratchet.demo.checkout import make_values
    from ratchet.demo.smollm2 import fetch_smollm2
    from ratchet.demo.story import REAL
    from ratchet.models.loading import load_chat
    from tasks.base import make_base

    make_base(folder / "base", Config.model_validate(make_values(str(fetch_smollm2(Path())), REAL.settings)))
    write_rows(folder, load_chat(folder / "base"), make_examples(count), count, length)


def make_examples(count: int) -> list[Example]:
    """Make twice as many rows as wanted, since some are too long."""
    return [
        make_example([Message("user", f"What does {name} do?"), Message("assistant", text)], {})
        for name, text in texts(count * 2)
    ]


def write_rows(folder: Path, chat: ChatFormat, examples: list[Example], count: int, length: int) -> None:
    rows = [(row.ids, row.learned) for row in map(chat.encode, examples) if len(row.ids) <= length][:count]
    (folder / "rows.json").write_bytes(msgspec.json.encode(rows))


def texts(most: int) -> Iterator[tuple[str, str]]:
    for root, name in import_roots("stdlib"):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.FunctionDef | ast.ClassDef)
                    and (text := ast.get_docstring(node))
                    and len(text) > 20
                ):
                    yield f"{name}.{node.name}", text
                    if not (most := most - 1):
                        return


# --- arms ---------------------------------------------------------------------------------------------------


class Clock:
    """Loss-bearing tokens and computed positions, from the end of step SKIPPED on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.first = seconds, 0, 0.0
        self.began = self.ended = 0.0
        self.learned = self.computed = 0
        self._pending = [0, 0]

    def saw(self, learned: int, computed: int) -> None:
        self._pending[0] += learned
        self._pending[1] += computed

    def step(self) -> bool:
        """After an optimizer step. Whether the time is over, and a batch was put together in it.

        Batches are put together a step or an epoch's end ahead, so a single step may see none.
        """
        now, self.steps = time.perf_counter(), self.steps + 1
        if self.steps == 1:
            self.first = time.time() - psutil.Process().create_time()
        if self.steps > SKIPPED:
            self.learned += self._pending[0]
            self.computed += self._pending[1]
            self.ended = now
        elif self.steps == SKIPPED:
            self.began = now
        self._pending = [0, 0]
        return self.steps > SKIPPED and self.learned > 0 and now - self.began > self.seconds

    def tell(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.learned / (self.ended - self.began),
            "utilisation": self.learned / self.computed,
            "cold_start_seconds": self.first,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "steps": self.steps,
            "positions_per_second": self.computed / (self.ended - self.began),
        }


def run_arm(arm: str, folder: Path, seconds: float, setup: Setup) -> None:
    clock = Clock(seconds)
    rows = [
        (list(ids), list(learned))
        for ids, learned in msgspec.json.decode((folder / "rows.json").read_bytes())
    ]
    {
        "usual": _usual,
        "sorted": _usual,
        "trl_padded": _trl,
        "trl_packed": _trl,
        "ratchet": _ratchet,
        "ratchet_qlora": _ratchet,
        "ratchet_compiled": _ratchet,
    }[arm](arm, folder, rows, clock, setup)
    figures = clock.tell()
    if setup.cuda:
        import torch

        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(figures))


def _lora(folder: Path, setup: Setup) -> Any:
    """As PEFT's documentation has it: LoRA, or QLoRA on NF4 with double quantisation."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": torch.bfloat16 if setup.cuda else torch.float32}
    if setup.method == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        settings["device_map"] = {"": "cuda" if setup.cuda else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", **settings)
    if setup.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def _stopper(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = clock.step()

    return Stop()


def _settings(folder: Path, setup: Setup) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": setup.batch,
        "gradient_accumulation_steps": setup.accumulate,
        "learning_rate": 1e-3,
        "num_train_epochs": 1000,
        "bf16": True,
        "use_cpu": not setup.cuda,
        "gradient_checkpointing": setup.cuda,  # a model of a GPU's size does not fit otherwise
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def _counting(collate: Callable[[Any], Any], clock: Clock) -> Callable[[Any], Any]:
    def counted(rows: Any) -> Any:
        batch = collate(rows)
        clock.saw(int((batch["labels"] != -100).sum()), batch["labels"].numel())
        return batch

    return counted


def _usual(arm: str, folder: Path, rows: list[Any], clock: Clock, setup: Setup) -> None:
    import torch
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data = [
        {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [token if on else -100 for token, on in zip(ids, learned, strict=True)],
        }
        for ids, learned in rows
    ]

    class Sorted(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            """Batches of like lengths in random order, as group_by_length makes them."""
            order = sorted(range(len(data)), key=lambda place: len(data[place]["input_ids"]))
            batches = [order[start : start + setup.batch] for start in range(0, len(order), setup.batch)]
            mixed = torch.randperm(len(batches), generator=torch.Generator().manual_seed(7)).tolist()
            return [place for number in mixed for place in batches[number]]

    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder / "base"), label_pad_token_id=-100)
    trainer = (Sorted if arm == "sorted" else Trainer)(
        model=_lora(folder, setup),
        args=TrainingArguments(**_settings(folder, setup)),
        train_dataset=data,
        data_collator=_counting(collate, clock),
        callbacks=[_stopper(clock)],
    )
    trainer.train()


def _trl(arm: str, folder: Path, rows: list[Any], clock: Clock, setup: Setup) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(on) for on in learned]} for ids, learned in rows]
    )
    packed = (
        {
            "packing": True,
            "packing_strategy": "bfd",
            "max_length": setup.packed,
            "per_device_train_batch_size": 1,
        }
        if arm == "trl_packed"
        else {"max_length": setup.length}
    )
    settings = {
        **_settings(folder, setup),
        "remove_unused_columns": True,
        "completion_only_loss": True,
        **packed,
    }
    trainer = SFTTrainer(
        model=_lora(folder, setup),
        args=SFTConfig(**settings),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        callbacks=[_stopper(clock)],
    )
    trainer.data_collator = _counting(trainer.data_collator, clock)
    trainer.train()


def _ratchet(arm: str, folder: Path, rows: list[Any], clock: Clock, setup: Setup) -> None:
    """Train with the stage's own functions: packing, the model in the precision that the machine and the
    method ask for, `fit`.
    """
    from ratchet.config.params import Config
    from ratchet.config.training import AdapterConfig
    from ratchet.models.adapters import add_adapter, prepare_quantised
    from ratchet.models.chat_template import Encoded
    from ratchet.models.loading import compute_dtype, load_base, load_chat
    from ratchet.training.packing import pack
    from ratchet.training.schedule import Schedule
    from ratchet.training.trainer import fit

    class Enough(Exception):
        pass

    def report(step: int, values: dict[str, float]) -> None:
        if "train_loss" in values and clock.step():
            raise Enough

    method, train = "qlora" if arm == "ratchet_qlora" else setup.method, Config().train
    windows = pack([Encoded(*row) for row in rows], setup.length)
    steps = max(1, len(windows) // setup.batch) * 100
    schedule = Schedule(
        steps=steps,
        batch_windows=setup.batch,
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
        checkpoint_activations=setup.cuda,
        compile=arm == "ratchet_compiled",
    )
    model = load_base(folder / "base", method=method)
    model = add_adapter(
        prepare_quantised(model) if method == "qlora" else model,
        AdapterConfig(method=method, rank=16, alpha=32),
        seed=train.seed,
    )
    from ratchet.training import collation
    from ratchet.training import schedule as schedules
    from ratchet.training.loss import AnswerLoss

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
            pad_id=load_chat(folder / "base").pad_id,
            report=report,
        )


def _count(collator: Any, clock: Clock) -> None:
    from ratchet.training.packing import IGNORED

    collate = collator.__call__

    def counted(self: Any, batch: Any) -> Any:
        columns = collate(self, batch)
        clock.saw(int((columns["labels"] != IGNORED).sum()), columns["labels"].numel())
        return columns

    collator.__call__ = counted


if __name__ == "__main__":
    main()
