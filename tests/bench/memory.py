"""Peak memory of training on a CPU.

    python tests/bench/memory.py            # 64 and 256 episodes per step, all at once and in portions
    python tests/bench/memory.py --model    # the estimates for a model of 135 M weights, against measurements

Each measurement runs in its own process.

Portions: `device_episodes` limits the episodes that are generated at once, `device_tokens` the tokens that are trained at once.
With both, twice the episodes should need less than twice the memory, apart from the memory of the libraries.

Model: random weights in the shape of SmolLM2-135M, fp32, full training and LoRA. `corrected` is the estimate for the later steps
after the first step of the same run has corrected it; `from 1 row` is the estimate that the run with one row corrected.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

TASKS = (8, 32)
PORTIONS = ["launch.device_episodes=64", "launch.device_tokens=8192"]
WORDS = "trainer.steps=2 trainer.mini_batch=all evaluation.tasks=8 evaluation.every=0 launch.save_every=0 tracking=off"
LORA = ["model.lora={r: 8, target_modules: all-linear}"]
MODEL_WORDS = (
    "env=household_chat env.max_turns=3 env.response_tokens=8 trainer.steps=3 trainer.tasks_per_step=1 trainer.group_size=2"
    " trainer.entropy_coef=0.001 trainer.learning_rate=1e-6 baseline.advantage.eps=1e-4 evaluation.tasks=1 evaluation.every=0"
    " launch.save_every=0 tracking=off model.make=null"
).split()  # without an entropy bonus, the equal returns of random weights would make no update
SIZES = (1, 2, 3)  # rows of a micro-batch; an update has six rows, or the rows of one micro-batch if there are three


def run_experiment(words: list[str], outputs: str) -> Path:
    command = [sys.executable, "-m", "aem_exp", *words]
    env = {**os.environ, "AEM_OUTPUTS": outputs, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    (folder,) = (file.parent for file in Path(outputs).glob("*/metrics.jsonl"))
    return folder


def peaks_gb(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["memory/peak_gb"] for row in rows if "memory/peak_gb" in row]


def show_portions() -> None:
    print(f"{'episodes per step':<18}{'all at once':>14}{'in portions':>14}")
    for tasks in TASKS:
        words = [*WORDS.split(), f"trainer.tasks_per_step={tasks}"]
        peaks = []
        for more in ([], PORTIONS):
            with tempfile.TemporaryDirectory() as outputs:
                peaks.append(peaks_gb(run_experiment([*words, *more], outputs))[-1])
        whole, portions = peaks
        print(f"{8 * tasks:<18}{whole:>11.2f} GB{portions:>11.2f} GB   x {whole / portions:.2f}", flush=True)


def show_model() -> None:
    import conftest  # noqa: F401  (sets environment variables first)
    from support import random_models

    print("| training | micro-batch | step 1 | later | estimate | corrected | from 1 row |\n" + 7 * "|---" + "|")
    with tempfile.TemporaryDirectory() as model:
        random_models.save_model(random_models.SMOLLM2, Path(model))
        for name, more in (("full", []), ("LoRA r=8", LORA)):
            first = None
            for rows in SIZES:
                words = [*MODEL_WORDS, f"model.path={model}", *more, f"trainer.mini_batch={3 if rows == 3 else 6}"]
                with tempfile.TemporaryDirectory() as outputs:
                    folder = run_experiment([*words, f"launch.device_rows={rows}"], outputs)
                    first = show_model_row(name, folder, first)


def show_model_row(name: str, folder: Path, first):
    """Print a measurement; return the correction of the first measurement."""
    from aem_exp import config
    from aem_exp.jobs import ram
    from aem_exp.jobs.memory import estimate_memory
    from aem_exp.jobs.sizes import ProcessSpec
    from aem_exp.rundir import measured_memory

    measured, peaks = measured_memory.read(folder), peaks_gb(folder)
    process = ProcessSpec.from_experiment(config.read(folder))
    sizes = {
        "rows": measured.rows,
        "tokens": measured.tokens,
        "play_tokens": measured.tokens,
        "prompt": measured.tokens,
    }
    need = estimate_memory(replace(process, **sizes, episodes=measured.episodes)).total
    first = first or measured
    said = [ram.PYTHON_BYTES + need, measured.correct(need), first.correct(need)]
    texts = " | ".join(f"{value / 1e9:.2f} GB ({value / 1e9 / peaks[-1] - 1:+.1%})" for value in said)
    size = f"{measured.rows} x {measured.tokens} tokens"
    print(f"| {name} | {size} | {peaks[0]:.2f} GB | {peaks[-1]:.2f} GB | {texts} |", flush=True)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="store_true", help="estimates for a model of 135 M weights")
    (show_model if parser.parse_args().model else show_portions)()


if __name__ == "__main__":
    main()
