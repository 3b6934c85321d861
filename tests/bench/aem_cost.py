"""The cost of AEM as a share of the step time.

    .venv/bin/python tests/bench/aem_cost.py

The times are measured as sections of one run: a difference of 1 % between two runs would be lost in noise.

Three sources of entropy, each on the default experiment:
    sampler      the local session measures entropies while it samples; there is no scoring pass
    scoring      a scoring pass computes old log-probs anyway (bf16, vLLM, several updates per step), and entropies with them
    extra pass   without AEM there would be no scoring pass, so AEM pays for a forward pass
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(steps: int = 12) -> None:
    import conftest  # noqa: F401  (sets environment variables first)

    from aem_exp import config
    from aem_exp.run import execution
    from aem_exp.rundir import metrics

    with tempfile.TemporaryDirectory() as outputs:
        overrides = [
            f"trainer.steps={steps}",
            f"outputs={outputs}",
            "evaluation.tasks=8",
            "evaluation.every=0",
            "tracking=off",
        ]
        for source, dtype in (("sampler", []), ("scoring", ["trainer.bf16=true"])):
            experiment = config.load([*overrides, *dtype])
            folder = execution.run(replace(experiment, name=source))
            rows = [row for row in metrics.read(folder) if "time/aem" in row][1:]
            total = {name: sum(row.get(f"time/{name}", 0.0) for row in rows) for name in SECTIONS}
            step = sum(total.values())
            print(f"{source}: {step / len(rows):.2f} s per step")
            for name, value in total.items():
                print(f"  {name:<12} {value / len(rows) * 1e3:8.1f} ms   {value / step:7.2%} of the step")
            if source == "scoring":
                print(
                    f"  extra pass: {total['scoring'] / step:.1%} of the step, if there is no scoring pass without AEM"
                )


SECTIONS = ("generation", "environment", "scoring", "aem", "update")

if __name__ == "__main__":
    main()
