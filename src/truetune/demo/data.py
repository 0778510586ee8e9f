"""The built-in instruction data: questions whose answers can be checked, drawn at random from pools of words.

A task draws the facts of one question and its answer; one of its wordings makes the facts a question. Every answer is
in the question or follows from it, so what a model learns is to read, not to remember. Answers stand where a small
model with random weights learns to look within a minute on a CPU; tasks that bind names to things take it far longer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

ANIMALS = (
    "bear camel deer duck eagle fox frog goat hen horse lion mouse otter owl panda pig rabbit seal sheep tiger".split()
)
FOODS = "apple bean bread butter carrot cherry corn honey lemon mango melon olive onion peach pear plum rice".split()
TOOLS = "axe broom bucket chisel clamp drill file hammer ladder lever mop nail rake rope saw shovel wrench".split()
CLOTHES = "apron belt boot cap coat dress glove hat jacket mitten robe sandal scarf shirt skirt sock tie vest".split()
WORDS = ANIMALS + FOODS + TOOLS + CLOTHES
COLOURS = "black blue brown golden green grey orange pink purple red silver white".split()
NAMES = (
    "Ada Amir Anna Ben Bruno Carla Chen Clara David Emma Felix Hana Hugo Ines Ivan Jana Kenji Lara Leo Maya Noah Olga "
    "Omar Paula Rosa Samir Sofia Tom Vera Zoe"
).split()
CITIES = (
    "Accra Athens Berlin Bogota Cairo Dakar Delhi Dublin Hanoi Lagos Lima Lisbon Oslo Paris Prague Quito Rome".split()
)

Facts = dict[str, str]


@dataclass(frozen=True)
class Example:
    """`answer` is the only right one."""

    task: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def first_word(rng: random.Random) -> tuple[Facts, str]:
    words = rng.sample(WORDS, 4)
    return {"words": ", ".join(words)}, words[0]


def last_word(rng: random.Random) -> tuple[Facts, str]:
    words = rng.sample(WORDS, 4)
    return {"words": ", ".join(words)}, words[-1]


def swap(rng: random.Random) -> tuple[Facts, str]:
    first, second = rng.sample(WORDS, 2)
    return {"first": first, "second": second}, f"{second} and {first}"


def capitals(rng: random.Random) -> tuple[Facts, str]:
    words = " ".join(rng.sample(WORDS, 2))
    return {"words": words}, words.upper()


def receiver(rng: random.Random) -> tuple[Facts, str]:
    giver, taker = rng.sample(NAMES, 2)
    return {"giver": giver, "taker": taker, "colour": rng.choice(COLOURS), "thing": rng.choice(TOOLS + CLOTHES)}, taker


def gift(rng: random.Random) -> tuple[Facts, str]:
    facts, _ = receiver(rng)
    return facts, f"the {facts['colour']} {facts['thing']}"


def destination(rng: random.Random) -> tuple[Facts, str]:
    start, end = rng.sample(CITIES, 2)
    return {"start": start, "end": end, "platform": str(rng.randint(1, 20))}, end


def animal(rng: random.Random) -> tuple[Facts, str]:
    chosen = rng.choice(ANIMALS)
    words = [chosen, *rng.sample(FOODS + TOOLS + CLOTHES, 3)]
    rng.shuffle(words)
    return {"words": ", ".join(words)}, chosen


TASKS: dict[Callable[[random.Random], tuple[Facts, str]], list[str]] = {
    first_word: ["Which word comes first: {words}?", "Say the first of these words: {words}."],
    last_word: ["Which word comes last: {words}?", "Say the last of these words: {words}."],
    swap: ["Swap these two words: {first} and {second}.", "Turn this around: {first} and {second}."],
    capitals: ["Write in capital letters: {words}.", "Shout these words: {words}."],
    receiver: [
        "{giver} gave {taker} the {colour} {thing}. Who got it?",
        "{giver} sent {taker} the {colour} {thing}. Who has it now?",
    ],
    gift: [
        "{giver} gave {taker} the {colour} {thing}. What was given?",
        "{giver} sent {taker} the {colour} {thing}. What was sent?",
    ],
    destination: ["The train from {start} to {end} leaves from platform {platform}. Where does it go?"],
    animal: ["Which of these is an animal: {words}?", "Find the animal: {words}."],
}


def make_examples(rows: int, seed: int = 0) -> list[Example]:
    """`rows` different questions, the tasks in turn; a pure function of its arguments."""
    rng = random.Random(seed)
    tasks = list(TASKS)
    facts_seen: set[tuple[str, ...]] = set()
    examples: list[Example] = []
    while len(examples) < rows:
        task = tasks[len(examples) % len(tasks)]
        facts, answer = task(rng)
        key = (task.__name__, *facts.values())
        if key not in facts_seen:  # no question twice, in no other wording either: what is held out is new
            facts_seen.add(key)
            examples.append(Example(task.__name__, rng.choice(TASKS[task]).format(**facts), answer))
    return examples
