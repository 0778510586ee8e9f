"""`truetune demo`: the whole job on the built-in model and data, by the same way as a user's own."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from truetune import demo, run
from truetune.demo.evaluate import answer, exact_match, read_questions
from truetune.models.load import load_model
from truetune.recipe import load_recipe
from truetune.run_model import load_tokenizer

# Random weights take full fine-tuning at a high learning rate; a pretrained model would take LoRA at 2e-4.
SETTINGS = (
    "method=full",
    "max_length=512",
    "training.num_train_epochs=6",
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=1",
    "training.learning_rate=3e-3",
    "training.weight_decay=0.1",
    "training.adam_beta2=0.98",
    "training.gradient_checkpointing=false",
)


def run_demo(output: str | Path = "runs/demo", console: Console | None = None) -> dict[str, float]:
    """Builds, asks, fine-tunes, asks again and prints both; returns exact match after training, by task."""
    console = console or Console(highlight=False)
    torch.set_num_threads(1)  # half a million weights: a second thread waits more than it works
    recipe = load_recipe(None, SETTINGS, {"model": demo.BUILTIN, "data": demo.BUILTIN, "output_dir": str(output)})
    console.rule("Built-in model and data", align="left")
    questions = read_questions(demo.resolve_data(demo.BUILTIN, "held_out"))
    tokenizer, _ = load_tokenizer(recipe)
    model = load_model(demo.resolve_model(demo.BUILTIN), precision="auto")
    console.print(f"A Llama with {model.num_parameters():,} random weights in {demo.resolve_model(demo.BUILTIN)}")
    console.print(f"Instructions in {demo.resolve_data(demo.BUILTIN)}; {len(questions)} held-out questions beside it\n")
    before = answer(model, tokenizer, questions)

    console.rule("Fine-tuning", align="left")
    result = run.train(recipe, overwrite=True, console=console)
    if result.trainer is None or result.interrupted:
        return {}

    console.rule("Held-out questions, before and after", align="left")
    after = answer(result.trainer.model, tokenizer, questions)
    samples = Table("question", "right answer", "before", "after")
    for index in range(8):
        samples.add_row(after[index].question, after[index].right, before[index].given[:30], after[index].given)
    console.print(samples)
    scores = Table("task", "before", "after", title="Exact match", title_justify="left")
    share_before, share_after = exact_match(before), exact_match(after)
    for task in sorted(share_after, key=lambda name: (name == "all", name)):
        scores.add_row(task, f"{share_before[task]:.1%}", f"{share_after[task]:.1%}")
    console.print(scores)
    console.print(f"\nThe model, its record and its checkpoints are in {output}. The same with your own file:\n")
    console.print("  truetune train --model Qwen/Qwen3-0.6B --data YOUR_CHATS.jsonl --method lora --output runs/mine")
    return share_after
