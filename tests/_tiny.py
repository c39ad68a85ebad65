"""Tiny models, tokenizer and data, built here: nothing is downloaded.

Needs transformers, and `datasets` only where a trainer is fed: a machine with a GPU may lack it.
"""

from __future__ import annotations

import copy
import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from _probes import Widest, count_calls, one_thread  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from datasets import Dataset

needs_tensor_parallelism = pytest.mark.skipif(
    not (
        find_spec("transformers.distributed")
        and find_spec("transformers.distributed.tensor_parallel")
    ),
    reason="needs the tensor parallelism of transformers 5.23",
)

QUESTIONS = ("what is red", "where is the cat", "who sings", "name a fruit", "is it late", "why")
GOOD = ("a warm colour", "on the mat by the door", "the bird", "an apple", "yes it is", "because")
BAD = ("no", "cat cat cat", "the door sings on the mat", "a colour", "blue", "an apple a day")

# The assistant's words are marked, for losses on them alone.
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Enough heads and layers to be the real architecture, small enough for a test.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # The default std of 0.02 makes every loss log V and hides mistakes.
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}

# name: (transformers prefix, config on top of the sizes)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "cohere": ("Cohere", {"logit_scale": 0.4, "tie_word_embeddings": True}),
    "granite": ("Granite", {"logits_scaling": 2.5}),
    "phi": ("Phi", {}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "output_router_logits": True,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {}),
    "gemma3": ("Gemma3Text", {"final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "falcon_h1": (
        "FalconH1",
        {
            "lm_head_multiplier": 0.6,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
}


@functools.cache
def tokenizer(words: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the data below: about 300 words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=["<pad>", "<eos>", *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*QUESTIONS, *GOOD, *BAD], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # before transformers 5 one more
    )
    fast.chat_template = _TEMPLATE
    return fast


def _settings() -> dict[str, Any]:
    words = tokenizer()
    return {
        **_SIZES,
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.eos_token_id,
    }


def model(name: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The architecture with random weights; biases, too, are not zero."""
    prefix, config = MODELS[name]
    settings = {**_settings(), **config, **changes}
    torch.manual_seed(seed)
    built = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{prefix}Config")(**settings)
    )
    head = built.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, std=0.5)
    return built.eval()


@functools.cache
def processor() -> Any:
    """The tokenizer with a word for images, and CLIP's preparation of them."""
    words = copy.deepcopy(tokenizer())
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    parts = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    template = _TEMPLATE.replace("{{ m['content'] }}", parts)
    words.chat_template = template.replace("{{ eos_token }}", str(words.eos_token))
    size = {"height": 8, "width": 8}
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size),
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )


def vision_language_model(text: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    """One of the models above behind a CLIP tower, for images of 8 x 8 points."""
    tower = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    image = len(tokenizer())  # the processor's one word more
    prefix, config = MODELS[text]
    settings = {**_settings(), **config, "vocab_size": image + 1}
    words = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(seed)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=tower, text_config=words, image_token_index=image)
    ).eval()


def batch(*, rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded token ids with labels that ignore a prompt and the padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(tokenizer()), (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    position = torch.arange(length).expand(rows, length)
    mask = position < lengths
    return {
        "input_ids": ids.masked_fill(~mask, tokenizer().pad_token_id),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask | (position < 2), -100),
    }


def _said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)


def preferences() -> Dataset:
    return _dataset(
        [
            {
                "prompt": _said("user", question),
                "chosen": _said("assistant", good),
                "rejected": _said("assistant", bad),
            }
            for question, good, bad in zip(QUESTIONS, GOOD, BAD, strict=True)
        ]
    )


def unpaired() -> Dataset:
    rows = [
        {"prompt": _said("user", q), "completion": _said("assistant", a), "label": label}
        for q, good, bad in zip(QUESTIONS, GOOD, BAD, strict=True)
        for a, label in ((good, True), (bad, False))
    ]
    return _dataset(rows)


def completions() -> Dataset:
    """Prompts and answers in two columns."""
    return unpaired().remove_columns("label")


def conversations() -> Dataset:
    return _dataset(
        [
            {"messages": _said("user", question) + _said("assistant", good)}
            for question, good in zip(QUESTIONS, GOOD, strict=True)
        ]
    )


def prompts() -> Dataset:
    return _dataset([{"prompt": _said("user", question)} for question in QUESTIONS])


def with_images(rows: Dataset) -> Dataset:
    """A picture of one colour at the head of every row."""
    from PIL import Image  # no other test needs it

    pictures = [
        [Image.new("RGB", (8, 8), (40 * i, 255 - 20 * i, 90))] for i in range(rows.num_rows)
    ]
    return _dataset(
        [{**row, "images": picture} for row, picture in zip(rows, pictures, strict=True)]
    )
