"""patch_trl: for scripts that can't change. Each case is a process of its own: the patch is global."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from pairs import llama

RUN_SCRIPT = "import sys; from truetune.train.patch import run_script; run_script(sys.argv[1:])"


def run(code: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *argv], capture_output=True, text=True, timeout=300
    )


def test_patching_covers_every_name_and_unpatching_undoes_it():
    done = run("""
        import truetune, trl
        stock = trl.SFTTrainer, trl.SFTConfig
        truetune.patch_trl()
        truetune.patch_trl()
        import trl.trainer.sft_trainer as module
        from trl.trainer import SFTTrainer as second
        assert trl.SFTTrainer is second is module.SFTTrainer is truetune.SFTTrainer
        assert trl.SFTConfig is module.SFTConfig is trl.trainer.SFTConfig is truetune.SFTConfig
        truetune.unpatch_trl()
        from trl.trainer import SFTTrainer as third
        assert (trl.SFTTrainer, trl.SFTConfig) == stock and third is module.SFTTrainer is stock[0]
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", ["from trl import SFTTrainer", "from trl.trainer.sft_trainer import SFTConfig as C"])
def test_names_imported_before_the_patch_are_an_error(line):
    done = run(f"{line}\nimport truetune\ntruetune.patch_trl()")
    assert done.returncode == 1
    assert "imported from trl before patch_trl()" in done.stderr


def test_a_script_runs_with_its_arguments_under_our_trainer(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import helper_beside_the_script
        from trl import SFTTrainer, SFTConfig
        assert __name__ == "__main__"
        print(SFTTrainer.__module__, SFTConfig.__module__, sys.argv[1:])
    """)
    )
    (tmp_path / "helper_beside_the_script.py").write_text("")
    done = run(
        "import sys; from truetune.train.patch import run_script; run_script(sys.argv[1:])", str(script), "--a", "1"
    )
    assert done.stdout.split("\n")[0] == "truetune.train.trainer truetune.train.config ['--a', '1']", done.stderr


def test_trls_own_script_trains_through_our_trainer(tmp_path, tokenizer, gsm8k_rows):
    """`truetune run -m trl.scripts.sft ...`: TRL's command line script on a saved model and a local file."""
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in gsm8k_rows[:16]]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (
        f"-m trl.scripts.sft --model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/data "
        f"--output_dir {tmp_path}/out --max_steps 2 --per_device_train_batch_size 2 --bf16 false --use_cpu true "
        "--report_to none --logging_steps 1 --embedding_learning_rate 1e-4 --eval_strategy no --dtype float32"
    )
    done = run(RUN_SCRIPT, *arguments.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fused linear" in done.stderr  # a table of 80 columns wraps the rest
    assert "embeddings" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


STEPS_ON_SHARDS = """
    import json, sys
    from pathlib import Path
    from accelerate import PartialState
    from datasets import load_dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    batch_size, out = int(sys.argv[1]), Path(sys.argv[2])
    set_seed(0)
    trainer = SFTTrainer(
        model=str(out / "model"),
        args=SFTConfig(
            output_dir=str(out / "run"), max_steps=3, per_device_train_batch_size=batch_size, learning_rate=1e-3,
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, bf16=False, use_cpu=True,
        ),
        train_dataset=load_dataset("json", data_files=str(out / "train.jsonl"), split="train"),
    )
    trainer.train()
    wanted = ("loss", "grad_norm", "num_tokens", "entropy")
    steps = [[entry[name] for name in wanted] for entry in trainer.state.log_history if "loss" in entry]
    rank, ranks = PartialState().process_index, PartialState().num_processes
    result = {"ranks": ranks, "steps": steps, "report": trainer.report.to_dict()}
    (out / f"{ranks}-{rank}.json").write_text(json.dumps(result))
"""


def test_under_accelerate_launch_every_rank_is_ours_and_the_steps_are_those_of_one_process(
    tmp_path, tokenizer, gsm8k_rows
):
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in gsm8k_rows[:16]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(STEPS_ON_SHARDS))

    # With --cpu Accelerate starts one process whatever is asked; with --multi_gpu as many as asked, GPUs or not.
    launcher = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    ours = ["-m", "truetune", "run", str(script)]
    two = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launcher.split(),
        "--main_process_port",
        "0",
        *ours,
        "2",
        str(tmp_path),
    ]
    one = [sys.executable, *ours, "4", str(tmp_path)]
    for command in (two, one):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    *ranks, alone = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("2-0", "2-1", "1-0")]
    for rank in ranks:
        report = rank["report"]
        assert report["stock"] == [] and report["fused_losses"] == report["packed_batches"] == 3
        assert sum(report["attention_calls"].values()) >= 3 * 2
        for step, step_alone in zip(rank["steps"], alone["steps"], strict=True):
            assert step == pytest.approx(step_alone, rel=1e-4)
