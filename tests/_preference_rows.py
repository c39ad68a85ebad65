"""Rows of preference pairs, and files of them."""

import json

GOOD = {"prompt": "Why is the sky blue?", "chosen": "Blue light scatters.", "rejected": "No idea."}


def chat(prompt, chosen, rejected):
    def say(role, text):
        return [{"role": role, "content": text}]

    return {
        "prompt": say("user", prompt),
        "chosen": say("assistant", chosen),
        "rejected": say("assistant", rejected),
    }


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
