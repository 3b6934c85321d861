"""What AEM costs, as a share of step time: from timed sections inside one run, since an A/B at 1 % drowns in noise.

    .venv/bin/python tests/bench/aem_cost.py

Three sources of entropy, each on the default experiment:
    sampler      the local session measures entropies while it samples: nothing is scored again
    scoring      old log-probs are scored anyway (bf16, vLLM, several updates per step): the same pass yields entropies
    extra pass   nobody scores, so AEM alone pays for a forward pass
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(steps: int = 12) -> None:
    import conftest  # noqa: F401  (environment first)

    from aem_exp import config
    from aem_exp.run import execution
    from aem_exp.rundir import metrics

    with tempfile.TemporaryDirectory() as outputs:
        words = [
            f"trainer.steps={steps}",
            f"outputs={outputs}",
            "evaluation.tasks=8",
            "evaluation.every=0",
            "tracking=off",
        ]
        for source, dtype in (("sampler", []), ("scoring", ["trainer.bf16=true"])):
            experiment = config.load([*words, *dtype])
            folder = execution.run(replace(experiment, name=source))
            rows = [row for row in metrics.read(folder) if "time/aem" in row][1:]
            total = {name: sum(row.get(f"time/{name}", 0.0) for row in rows) for name in SECTIONS}
            step = sum(total.values())
            print(f"{source}: {step / len(rows):.2f} s per step")
            for name, value in total.items():
                print(f"  {name:<12} {value / len(rows) * 1e3:8.1f} ms   {value / step:7.2%} of the step")
            if source == "scoring":
                print(f"  extra pass: {total['scoring'] / step:.1%} of the step, where nobody else scores")


SECTIONS = ("generation", "environment", "scoring", "aem", "update")

if __name__ == "__main__":
    main()
