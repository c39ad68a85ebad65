"""A plain TRL script, without any use of fastpo.

python examples/run_unchanged.py --steps 20        # TRL's own head
fastpo run examples/run_unchanged.py --steps 20    # fastpo's: the same losses
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
TEXTS = [f"The {noun} is {colour}." for noun in ("door", "cat", "bird") for colour in COLOURS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(TEXTS, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        )
        data = Dataset.from_list([{"text": text} for text in TEXTS])
        model = Qwen2ForCausalLM(config)
        trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"sft: loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")


if __name__ == "__main__":
    main()
