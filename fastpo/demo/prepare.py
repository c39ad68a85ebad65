"""Everything that can go wrong before a step is taken: objective, data, model, lengths, folder."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import smollm2
from .data import Pairs, Row, embedded_pairs, load_pairs
from .errors import DemoError, foreign
from .options import Options, Shape
from .tokenizer import SMALLEST_VOCAB, encode, require_chat_template, texts_of, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 1024
_NEEDED = ("trl", "peft", "datasets", "accelerate")


@dataclass(frozen=True)
class Stage:
    """A hidden folder beside the output; `result` becomes the output by one rename at the end."""

    folder: Path

    @classmethod
    def beside(cls, out: Path) -> Stage:
        parent = out.resolve().parent  # the same file system, or it would not be a rename
        try:
            parent.mkdir(parents=True, exist_ok=True)
            return cls(Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent)))
        except OSError as error:
            raise DemoError(f"--out {out}: {error.strerror}") from None

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.json"


@dataclass(frozen=True)
class Fitted:
    """The pairs that will be trained on, under a length limit."""

    pairs: Pairs
    max_length: int
    longest: int
    truncated: int
    dropped: int  # rows whose prompt alone fills max_length


def check_packages() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise DemoError(f"needs {', '.join(missing)}: pip install 'fastpo[trl]'")


def check_out(options: Options) -> None:
    """The folder is new, empty, or may be replaced, and nothing that is needed lies in it."""
    out, flag = options.out.resolve(), f"--out {options.out}"
    if out.exists() and not out.is_dir():
        raise DemoError(f"{flag}: expected a folder, got a file")
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise DemoError(f"{flag}: not empty; pass --overwrite to replace it")
    inside = {"the current folder": Path.cwd(), "the home folder": Path.home()}
    inside |= {"--data": options.data, "--model": options.model}  # type: ignore[dict-item]
    for name, path in inside.items():
        if path is not None and path.resolve().is_relative_to(out):
            raise DemoError(f"{flag}: {name} lies in it and would be lost; name another folder")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DemoError(f"{flag}: {parent} cannot be written to")


def read_pairs(options: Options) -> Pairs:
    return embedded_pairs() if options.data is None else load_pairs(options.data, options.seed)


def find_model(options: Options, say: Callable[[str], None]) -> Options:
    """With the folder of a model that is named; a folder here of that name is it."""
    if options.model != smollm2.NAME or smollm2.NAME.exists():
        return options
    return replace(options, model=smollm2.converted(say))


def model_config(options: Options) -> Any:
    """The configuration of --model; DemoError unless it is a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = options.model
    assert folder is not None
    if not (folder / "config.json").is_file():
        what = "no config.json" if folder.is_dir() else "no such folder"
        raise DemoError(f"--model {folder}: expected a folder made by save_pretrained, got {what}")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "pytorch_model*.bin*")):
        raise DemoError(f"--model {folder}: no weights (*.safetensors)")
    with foreign(f"--model {folder}: config.json: expected one that transformers loads, got"):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise DemoError(
            f"--model {folder}: expected a causal language model, got {config.model_type}"
        )
    return config


def make_tokenizer(options: Options, pairs: Pairs, config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of --model, or one trained on the training rows for the model's vocabulary."""
    from transformers import AutoTokenizer

    vocab = options.shape.vocab if config is None else config.get_text_config().vocab_size
    folder = options.model
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        if vocab < SMALLEST_VOCAB:
            raise DemoError(
                f"vocabulary: expected at least {SMALLEST_VOCAB} words to train a tokenizer, "
                f"got {vocab}"
            )
        return train_tokenizer(texts_of(pairs.train), vocab)
    with foreign(f"--model {folder}: tokenizer: expected one that transformers loads, got"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > vocab:
        raise DemoError(
            f"--model {folder}: {len(tokenizer)} words in the tokenizer, {vocab} in the head"
        )
    if tokenizer.eos_token is None:
        raise DemoError(f"--model {folder}: the tokenizer has no end-of-sequence token")
    if pairs.conversational:
        require_chat_template(tokenizer, f"--model {folder}")
    return tokenizer


def fit(options: Options, pairs: Pairs, tokenizer: Any, config: Any) -> Fitted:
    """Checks every row's length; DemoError names the first that is too long, unless --truncate."""
    max_length = _max_length(options, config)
    longest = truncated = 0
    dropped: list[Row] = []
    for row in pairs.rows:
        try:
            prompt, *sides = encode(tokenizer, row)
        except DemoError as error:
            raise DemoError(f"{pairs.places[id(row)]}: {error}") from None
        longest = max(longest, *sides)
        if max(sides) <= max_length:
            continue
        if not options.truncate:
            way = "raise it, or pass" if max(sides) <= _positions(config) else "pass"
            raise DemoError(
                f"{pairs.places[id(row)]}: prompt and answer are {max(sides)} tokens long, over "
                f"--max-length {max_length}; {way} --truncate"
            )
        truncated += 1
        if prompt >= max_length:
            dropped.append(row)
    kept = pairs.without(dropped) if dropped else pairs
    kept = kept.evaluated_on(options.most_held_out)
    return Fitted(kept, max_length, longest, truncated, len(dropped))


def _max_length(options: Options, config: Any) -> int:
    positions = _positions(config)
    if options.max_length is None:
        return int(min(MAX_LENGTH, positions))
    if options.max_length > positions:
        raise DemoError(
            f"--max-length: expected at most {positions}, the positions of {options.model}, "
            f"got {options.max_length}"
        )
    return options.max_length


def _positions(config: Any) -> float:
    """Of a model that has any number of them, or is still to be made, infinity."""
    text = None if config is None else config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or math.inf


def build_model(shape: Shape, seed: int, max_length: int, stage: Stage) -> None:
    """A Llama model with new weights, in `stage.start`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would report the one shard it writes
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(stage.tokenizer)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(MAX_LENGTH, max_length),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(stage.start)


def write_rows(pairs: Pairs, path: Path) -> None:
    rows = {"train": pairs.train, "held_out": pairs.held_out}
    path.write_text(json.dumps(rows), encoding="utf-8")
