"""From a file of chats to packs: stock TRL and truetune on the same file, tokenizer and cores, in one run.

    python benchmarks/bench_data.py --data gsm8k_train.jsonl --out benchmarks/results/data.json [--repeats 5]

The chats are GSM8K's question and answer as messages, the tokenizer is a byte-level BPE of up to 32,000 tokens trained
on that text, the template TRL's plain qwen2_5.jinja, packs hold 2,048 tokens. Stock is `load_dataset`, then the
preparation of `trl.SFTTrainer` with packing "bfd" and dataset_num_proc=2; building the trainer and its model is not
counted. It supervises every token; with `assistant_only_loss` and TRL's training template it supervises the answers, as
ours does (`prepare`, then `pack`). Each starts from empty caches, in turns; medians.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

CAPACITY = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_chats(data: Path, chats: Path) -> list[str]:
    """Writes GSM8K's rows as chats and returns their texts."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with chats.open("w", encoding="utf-8") as file:
        for row in rows:
            turns = (("user", row["question"]), ("assistant", row["answer"]))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return [row["question"] + "\n" + row["answer"] for row in rows]


def train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[-1]
    )


def stock_trainer(tokenizer, assistant_only_loss: bool, directory: Path):
    """A stock trainer on a one-layer model and two rows: only its way of preparing data is used."""
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    args = trl.SFTConfig(
        output_dir=str(directory),
        max_length=CAPACITY,
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=assistant_only_loss,
        dataset_num_proc=2,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    two_rows = Dataset.from_list([{"messages": messages}] * 2)
    return trl.SFTTrainer(model, args, train_dataset=two_rows, processing_class=tokenizer)


def run_stock(trainer, chats: Path, tokenizer, cache: Path) -> dict:
    from datasets import load_dataset

    dataset = load_dataset("json", data_files=str(chats), split="train", cache_dir=str(cache))
    packed = trainer._prepare_dataset(dataset, tokenizer, trainer.args, True, None, "train")
    tokens = sum(map(sum, packed["seq_lengths"]))
    return {"packs": len(packed), "tokens": tokens, "fill": tokens / (len(packed) * CAPACITY)}


def run_truetune(chats: Path, tokenizer, cache: Path) -> dict:
    from truetune.data.packing import pack
    from truetune.data.prepare import prepare
    from truetune.data.rows import Source

    prepared = prepare([Source(str(chats))], tokenizer, max_length=CAPACITY, cache_dir=cache)
    assert not prepared.from_cache
    packs = pack(prepared.lengths, CAPACITY)
    tokens = prepared.counts.tokens
    return {"packs": len(packs), "tokens": tokens, "fill": tokens / (len(packs) * CAPACITY)}


def measure(data: Path, repeats: int) -> dict:
    import datasets
    import trl

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        tokenizer = train_tokenizer(write_chats(data, work / "chats.jsonl"))
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
        stock = stock_trainer(tokenizer, assistant_only_loss=False, directory=work)
        masked = stock_trainer(tokenizer, assistant_only_loss=True, directory=work)
        systems = {
            "trl": lambda cache: run_stock(stock, work / "chats.jsonl", tokenizer, cache),
            "trl, assistant_only_loss": lambda cache: run_stock(masked, work / "chats.jsonl", tokenizer, cache),
            "truetune": lambda cache: run_truetune(work / "chats.jsonl", tokenizer, cache),
        }
        results: dict[str, dict] = {name: {"seconds": []} for name in systems}
        for repeat in range(repeats):
            order = list(systems) if repeat % 2 else list(systems)[::-1]
            for name in order:
                with tempfile.TemporaryDirectory(dir=work) as cache:
                    started = time.perf_counter()
                    outcome = systems[name](Path(cache))
                    results[name]["seconds"].append(round(time.perf_counter() - started, 3))
                    results[name] |= outcome
    baseline = statistics.median(results["trl"]["seconds"])
    for result in results.values():
        result["median_s"] = statistics.median(result["seconds"])
        result["of_trl"] = result["median_s"] / baseline
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = measure(args.data, args.repeats)

    print(f"{'':26} {'median':>8} {'of TRL':>8} {'packs':>6} {'fill':>7}")
    for name, result in results.items():
        median, share = f"{result['median_s']:.2f} s", f"{result['of_trl']:.2f}"
        print(f"{name:26} {median:>8} {share:>8} {result['packs']:>6} {result['fill']:>7.2%}")
    packages = ("truetune", "trl", "transformers", "tokenizers", "datasets", "torch")
    report = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "cores": len(os.sched_getaffinity(0)),
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
