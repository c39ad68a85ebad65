"""Writes the demo's preference pairs: `python -m fastpo.demo.make_data`. Same text on every run.

Fifty everyday topics (topics.txt) times eight kinds of request. Both answers of a pair talk about
the same topic with the same facts; what differs is the manner. The preferred answer is polite, to
the point and in the form that was asked for; the other one has one of five faults. Lengths are
balanced, so that counting words does not tell the two apart. The held-out pairs have topics of
their own.

In the templates {A} to {D} are the four pieces of advice of a topic as sentences and {a} to {d}
the same as clauses; {X}, {Y} and {elsewhere} come from another topic.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
SEED = 2024
HELD_OUT_TOPICS = 8

QUESTIONS = {
    "how": (
        "How do I {task}?",
        "What is the best way to {task}?",
        "I would like to {task}. Can you help me?",
    ),
    "list": (
        "Give me three tips to {task}, as a numbered list.",
        "I want to {task}. Please list three steps, numbered.",
    ),
    "sentence": (
        "In one sentence: what matters most if I want to {task}?",
        "Tell me in a single sentence how to {task}.",
    ),
    "why": (
        "Somebody told me: {A} Why?",
        "My neighbour says this about how to {task}: {A} What is the reason?",
    ),
    "mistake": (
        "What is a common mistake when people try to {task}?",
        "I tried to {task} and it went wrong. What did I do?",
    ),
    "message": (
        "Write a short message to a friend who wants to {task}.",
        "My sister wants to {task}. Write her two or three friendly lines.",
    ),
    "order": (
        "I want to {task}. What do I do first, and what comes next?",
        "Which two things should I do first to {task}?",
    ),
    "hard": (
        "Is it hard to {task}?",
        "I have never managed to {task}. Is it worth another try?",
    ),
}

GOOD = {
    "how": (
        "Happy to help. {A} {B} {C} {close}",
        "Gladly! {A} That matters because {because}. {D} {close}",
        "Of course. {B} {C} Above all, {a}, because {because}. {close}",
    ),
    "list": ("1. {A}\n2. {B}\n3. {C}", "1. {A}\n2. {C}\n3. {D}", "1. {B}\n2. {C}\n3. {D}"),
    "sentence": (
        "The main thing is this: {a}, because {because}.",
        "Most of all, {a}, because {because}.",
    ),
    "why": (
        "Good question! The reason is that {because}. {close}",
        "That is good advice, because {because}. It also helps to {b}. {close}",
    ),
    "mistake": (
        "A common mistake is {mistake}. {A} {close}",
        "It is often {mistake}, as happens to many. Next time, {a}, because {because}. {close}",
    ),
    "message": (
        "Hi! I heard that you want to {task}. {A} {C} I am sure it will work out well!",
        "Dear friend, what a nice plan to {task}! {B} {D} Call me if I can help.",
    ),
    "order": (
        "First, {a}, because {because}. Then {b}. {close}",
        "Begin with this: {a}. After that, {b}. {close}",
    ),
    "hard": (
        "Not at all, and anyone can learn it. {A} {B} {close}",
        "It is easier than it looks, so please do try. {B} Just avoid {mistake}. {close}",
    ),
}
CLOSINGS = (
    "Good luck!",
    "I hope that helps.",
    "Feel free to ask if anything is unclear.",
    "You will see the difference soon.",
    "Have fun with it!",
    "",
    "",
)

HEDGES = (
    "Well, that depends on many things, and it is difficult to say.",
    "I cannot really give advice on that.",
    "There are many opinions about this, and I would rather not take a side.",
    "Hard to tell, honestly.",
    "Hm.",
)
VAGUE = (
    "Some people who want to {task} do one thing and some do another.",
    "Perhaps somebody else knows, or you could look it up somewhere.",
    "Maybe {b}, or maybe not, who knows.",
    "It could be about {mistake}, but it could also be something else.",
)
SHRUGS = (
    "In the end it is up to you.",
    "Results may vary.",
    "I would not want to be pinned down.",
    "Ask me something else.",
)
DRIFT_STARTS = ("{B}", "{D}", "Something about {mistake}.")
DRIFT_TURNS = (
    "That reminds me of people who {elsewhere}.",
    "But what I really want to talk about is how to {elsewhere}.",
    "By the way, did you ever {elsewhere}?",
    "Anyway, yesterday I tried to {elsewhere}.",
)
BAD = {
    "evasive": [
        f"{hedge} {vague} {shrug}" for hedge in HEDGES for vague in VAGUE for shrug in SHRUGS
    ],
    "rude": [
        "Seriously? Everybody knows how to {task}. {A} Was that so hard?",
        "What a silly question. {B} {C} Next time think before you ask.",
        "Not this again. {A} {B} Even a child could work that out.",
        "If you have to ask, you should leave it alone. {C} Stop {mistake}, you fool.",
        "Oh please. {B} And no, I will not explain it twice.",
        "You again? {A} {C} I have better things to do than to teach you how to {task}.",
        "No wonder you cannot {task}, lazy as you are. {B}",
    ],
    "wrong form": [
        "KEYWORDS: {a} / {c} / {d} / ETC ETC",
        "so {a} and {b} and {d} and whatever",
        "{c} ??? {a} ??? idk lol",
        "* {A}\n* {B}\n* {C}\n* {D}\n* and so on",
        "{B}!!! {D}!!! JUST DO IT!!!",
    ],
    "drifting": [
        f"{start} {turn} {end}"
        for start in DRIFT_STARTS
        for turn in DRIFT_TURNS
        for end in ("{X} {Y}", "{X}", "{Y}")
    ],
    "padded": [
        "As a very advanced assistant I have been asked how to {task}. This is a question about "
        "how to {task}. Before I answer it, let me repeat the question.",
        "To {task} means to {task}, and it has been so since ancient times. There is a lot to say "
        "about it, and much has been said. In conclusion, it is a broad subject.",
        "Great minds have thought about how to {task}. First of all, it is important to note that "
        "it is important. {C} More could be said.",
        "What does it mean to {task}? What does it mean to ask what it means? One could fill a "
        "book.",
        "Thank you for this question, which is a question that many people ask. To {task} is a "
        "task. {D} Tasks are many.",
    ],
}


def read_topics(path: Path = HERE / "topics.txt") -> list[dict[str, str]]:
    """The words that fill the templates, one dict a topic."""
    topics = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        pairs = [line.split(": ", 1) for line in block.splitlines()]
        words = {key: text for key, text in pairs if key != "step"}
        for letter, sentence in zip(
            "ABCD", (text for key, text in pairs if key == "step"), strict=True
        ):
            words[letter] = sentence
            words[letter.lower()] = sentence[0].lower() + sentence[1:].rstrip(".")
        topics.append(words)
    return topics


def make_pair(kind: str, topic: dict, other: dict, rng: Random) -> dict[str, list[dict]]:
    words = dict(topic, close=rng.choice(CLOSINGS))
    words |= {"elsewhere": other["task"], "X": other["A"], "Y": other["C"]}
    chosen = rng.choice(GOOD[kind]).format(**words).strip()
    # Of a few bad answers, the one nearest in length: the preference must not be about length.
    templates = BAD[rng.choice(list(BAD))]
    bad = [rng.choice(templates).format(**words) for _ in range(5)]
    rejected = min(bad, key=lambda text: abs(len(text) - len(chosen)))
    return {
        "prompt": [{"role": "user", "content": rng.choice(QUESTIONS[kind]).format(**words)}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def make_pairs() -> tuple[list[dict], list[dict]]:
    """Training pairs and held-out pairs; they share no topic."""
    rng = Random(SEED)
    topics = read_topics()
    rng.shuffle(topics)
    parts: tuple[list[dict], list[dict]] = ([], [])
    split = (topics[HELD_OUT_TOPICS:], topics[:HELD_OUT_TOPICS])
    for part, own in zip(parts, split, strict=True):
        for topic in own:
            others = [t for t in own if t is not topic]
            part += [make_pair(kind, topic, rng.choice(others), rng) for kind in QUESTIONS]
        rng.shuffle(part)
    return parts


def as_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    for name, rows in zip(("train", "heldout"), make_pairs(), strict=True):
        path = HERE / f"pairs_{name}.jsonl"
        path.write_text(as_jsonl(rows), encoding="utf-8")
        print(f"{path}: {len(rows)} pairs")


if __name__ == "__main__":
    main()
