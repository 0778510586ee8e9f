"""`make soak`: runs of every kind, killed at every phase and at random moments, go on to the bit.

The moments come from a seed that is printed; SOAK_SEED=N repeats it.
"""

import os
import random
import shutil

import pytest

from killed_run import LORA, PHASES, RECIPE, Run, assert_same_to_the_bit, write_rows

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
SEED = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(2**32)))
KILLS = int(os.environ.get("SOAK_KILLS", 20))  # at random moments, of each kind of run

BEST = {
    "training.save_strategy": "epoch",
    "training.load_best_model_at_end": "true",
    "training.greater_is_better": "true",
    "training.eval_on_start": "true",
}
KINDS = {
    "lora": LORA,
    "full": {"method": "full"},
    "embedding groups": {
        **LORA,
        "lora.modules_to_save": "[embed_tokens, lm_head]",
        "training.embedding_learning_rate": "1e-3",
        "training.loraplus_lr_ratio": "4",
    },
    "full, embedding group": {"method": "full", "training.embedding_learning_rate": "1e-3"},
    "not accumulated": {**LORA, "training.gradient_accumulation_steps": "1", "training.save_steps": "5"},
    "not packed": {**LORA, "packing": "false", "training.save_steps": "7"},
    "8-bit optimizer": {"method": "full", "training.optim": "adamw_8bit"},  # bitsandbytes 0.50 has it for CPUs
    "8-bit optimizer of adapters and embeddings": {
        **LORA,
        "lora.modules_to_save": "[embed_tokens, lm_head]",
        "training.optim": "paged_adamw_8bit",  # not paged on a CPU
    },
    "qlora": {**LORA, "method": "qlora"},
    "bf16, rounded stochastically": {
        "method": "full",
        "precision": "bf16",
        "training.stochastic_rounding": "true",
    },
    "streamed": {
        **LORA,
        "streaming": "true",
        "eval_data": "null",
        "training.eval_strategy": "no",
        "training.max_steps": "9",
    },
    "best model at the end": {**LORA, **BEST},
    "another process collates": {**LORA, "training.dataloader_num_workers": "1"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory, data) -> tuple[Run, float]:
    """A run that is not killed, and its seconds."""
    run = Run(tmp_path_factory.mktemp("runs") / "whole", data, KINDS[request.param])
    run.finish("--dry-run")  # what the first process compiles and imports is not in the second's seconds
    return run, run.finish()


def test_killed_at_every_phase(whole, tmp_path):
    """In one run after the other, and in a run that goes on after it was killed."""
    run = Run(tmp_path / "run", whole[0].data, whole[0].settings)
    for phase in PHASES:
        if (
            phase == "evaluation"
            and run.settings.get("training.eval_strategy", RECIPE["training.eval_strategy"]) == "no"
        ):
            continue
        if phase == "between micro-batches" and run.settings.get("training.gradient_accumulation_steps") == "1":
            continue
        shutil.rmtree(run.output, ignore_errors=True)
        run.killed(phase, 4)
        if phase != "putting the result in place":
            run.killed("optimizer step", 8, *run.how_to_go_on())
        run.finish(*run.how_to_go_on())
        assert_same_to_the_bit(run, whole[0])


def test_killed_at_random_moments(whole, tmp_path):
    """Killed from outside, up to five times before it is let finish, until there were enough kills."""
    print(f"SOAK_SEED={SEED} SOAK_KILLS={KILLS}")
    expected, seconds = whole
    moments = random.Random(f"{SEED}/{sorted(expected.settings.items())}")
    run = Run(tmp_path / "run", expected.data, expected.settings)
    kills = 0
    while kills < KILLS:
        shutil.rmtree(run.output, ignore_errors=True)
        options: list[str] = []
        for _ in range(moments.randint(1, 5)):
            moment = moments.uniform(0, seconds)
            print(f"killed after {moment:.3f} s of {' '.join(options) or 'a new run'}")
            if not run.killed_after(moment, *options):
                print("which had ended before")
                break
            kills += 1
            options = run.how_to_go_on()
        else:
            run.finish(*options)
        assert_same_to_the_bit(run, expected)
