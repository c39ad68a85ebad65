"""A tokenizer trained on the data, and the lengths of the rows under it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .data import KEYS, Row, is_conversational
from .errors import DemoError, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
SPECIAL = (PAD, START, END)
SMALLEST_VOCAB = 256 + len(SPECIAL)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def texts_of(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        for key in KEYS:
            if isinstance(row[key], str):
                yield row[key]
            else:
                for message in row[key]:
                    yield f"{message['role']}\n{message['content']}"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of exactly `vocab_size` words; what the texts cannot fill is reserved."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())
    vocab = state["model"]["vocab"]
    for i in range(len(vocab), vocab_size):
        # No merge leads to them, so no text becomes one; but every id of the head decodes.
        vocab[f"<|reserved_{i}|>"] = i
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token=PAD, eos_token=END
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[int, int, int]:
    """Tokens of the prompt, of prompt + chosen and of prompt + rejected, as TRL will count them."""
    if not is_conversational(row):
        end = tokenizer.eos_token or ""
        prompt = row["prompt"]
        texts = [prompt, prompt + row["chosen"], prompt + row["rejected"]]
        texts[1:] = [text if text.endswith(end) else text + end for text in texts[1:]]
        with foreign("the tokenizer refuses it:"):
            lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    else:
        lengths = [
            _chat_length(tokenizer, row["prompt"], add_generation_prompt=True),
            _chat_length(tokenizer, row["prompt"] + row["chosen"]),
            _chat_length(tokenizer, row["prompt"] + row["rejected"]),
        ]
    return lengths[0], lengths[1], lengths[2]


def _chat_length(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> int:
    with foreign("the chat template refuses it:"):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return len(ids["input_ids"])


def require_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if tokenizer.chat_template is None:
        raise DemoError(
            f"{where}: the tokenizer has no chat template, and the data are lists of messages; "
            "give plain strings, or a model with a chat template"
        )
