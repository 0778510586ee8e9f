"""patch_trl: for scripts that can't change. Each case is a process of its own: the patch is global."""

import subprocess
import sys
import textwrap

import pytest

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
    import json

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
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
