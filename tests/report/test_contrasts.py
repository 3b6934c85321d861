"""Declared contrasts: weights of arms and cells, values within seeds, intervals over seeds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support import ROOT

from aem_exp.report import command as report
from aem_exp.report.analysis import ArmCell, SeedRun
from aem_exp.report.contrasts import compute_contrasts
from aem_exp.rundir import archive
from aem_exp.stats import compare, power
from aem_exp.sweep import question
from aem_exp.sweep.contrasts import Contrast

SWEEP = """
question: Does AEM help both?
base: evaluation.tasks=2 trainer.steps=2
arms: {none: modulation=none, aem: modulation=aem}
products: ['baseline=grpo,rloo']
contrasts:
  pooled: {aem: 1, none: -1}
  interaction: {aem/rloo: 1, none/rloo: -1, aem/grpo: -1, none/grpo: 1}
seeds: 0,1,2
"""


def run(seed, success):
    """A finished run whose tasks have these outcomes."""
    tasks = {"id": ["a", "b"], "kind": ["", ""], "success": [[value] for value in success]}
    experiment = {"seed": seed, "trainer": {"steps": 2, "tasks_per_step": 1, "group_size": 2}}
    final = {"panel": "test", "panel_hash": "h"}
    return SeedRun(seed, archive.Archive(f"r{seed}", experiment, "done", result={"final": final}, tasks=tasks))


def cell(arm, point, scores):
    return ArmCell(arm, point, tuple(run(seed, (score, score)) for seed, score in enumerate(scores)))


CELLS = [
    cell("none", "grpo", [0.5, 0.6, 0.7]),
    cell("aem", "grpo", [0.6, 0.6, 0.9]),
    cell("none", "rloo", [0.4, 0.4, 0.4]),
    cell("aem", "rloo", [0.4, 0.6, 0.5]),
]


def test_weights_of_an_arm_are_divided_among_its_points(tmp_path):
    (file := tmp_path / "mine.yaml").write_text(SWEEP)
    pooled, interaction = question.load(file).contrasts
    assert pooled.weights == {"aem/grpo": 0.5, "aem/rloo": 0.5, "none/grpo": -0.5, "none/rloo": -0.5}
    assert sum(interaction.weights.values()) == 0 and len(interaction.weights) == 4
    (one_point := tmp_path / "one.yaml").write_text(SWEEP.replace("grpo,rloo", "grpo").split("  inter")[0] + "seeds: 0")
    assert question.load(one_point).contrasts[0].weights == {"aem": 1, "none": -1}


def test_contrast_is_computed_within_seeds():
    """By hand: the pooled differences of the seeds are 0.05, 0.1 and 0.15."""
    weights = {"aem/grpo": 0.5, "aem/rloo": 0.5, "none/grpo": -0.5, "none/rloo": -0.5}
    pooled, other = compute_contrasts(
        CELLS, [Contrast("pooled", weights), Contrast("grpo", {"aem/grpo": 1, "none/grpo": -1})]
    )
    assert pooled.values == pytest.approx([0.05, 0.1, 0.15]) and pooled.seeds == (0, 1, 2)
    half = stats.t.ppf(0.975, 2) * 0.05 / math.sqrt(3)
    found = pooled.interval
    assert (found.difference, found.low, found.high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    assert pooled.primary and not other.primary
    assert other.values == pytest.approx([0.1, 0.0, 0.2])


def test_seeds_with_a_missing_run_are_left_out():
    short = replace(CELLS[1], runs=(*CELLS[1].runs[:2], SeedRun(2, None)))
    (result,) = compute_contrasts([CELLS[0], short], [Contrast("gain", {"aem/grpo": 1, "none/grpo": -1})])
    assert (result.seeds, result.missing) == ((0, 1), (2,))
    assert result.verdict.startswith("so far: ")


def test_runs_on_different_panels_are_refused_within_a_point_only():
    def on_panel(each, panel):
        runs = [replace(r, archive=replace(r.archive, result={"final": {"panel_hash": panel}})) for r in each.runs]
        return replace(each, runs=tuple(runs))

    weights = {"aem/grpo": 1, "none/grpo": -1, "aem/rloo": -1, "none/rloo": 1}
    points = [on_panel(each, each.point) for each in CELLS]
    (result,) = compute_contrasts(points, [Contrast("interaction", weights)])
    assert result.interval is not None
    (result,) = compute_contrasts([on_panel(CELLS[0], "x"), *CELLS[1:]], [Contrast("interaction", weights)])
    assert result.interval is None and "panels differ" in result.verdict


def test_interval_covers_the_truth_when_runs_of_a_seed_are_correlated():
    """Student's t over seeds is exact for normal blocks, whatever their correlation. 4,000 simulations."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(4000):
        block = rng.normal(0, 0.05, 8)
        found = compare.one_sample_interval((block + rng.normal(0.02, 0.02, 8)) - (block + rng.normal(0, 0.03, 8)))
        hits += found.low < 0.02 < found.high
    assert hits / 4000 == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_detectable_effect_of_blocks_is_found_with_80_percent():
    rng, effect = np.random.default_rng(0), power.paired_detectable_effect(12)
    samples = rng.normal(effect, 1, (20_000, 12))
    found = [compare.one_sample_interval(sample).low > 0 for sample in samples[:4000]]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
def test_report_of_a_sweep_with_contrasts(tmp_path, monkeypatch, capsys):
    """The archived runs of `household_grpo`, with a declared hypothesis."""
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path / "outputs"))
    text = (ROOT / "sweeps" / "household_grpo.yaml").read_text()
    (file := tmp_path / "household_grpo.yaml").write_text(
        text + "contrasts: {AEM against its placebo: {aem: 1, shuffled: -1}}\n"
    )
    results = ROOT / "sweeps" / "results" / "household_grpo"
    assert report.main([str(file), "--from", str(results), "--out", str(tmp_path / "page"), "--no-tracking"]) == 0
    shown = capsys.readouterr().out
    assert "AEM against its placebo (primary)" in shown
    page = (tmp_path / "page" / "report.md").read_text()
    assert "Declared contrasts" in page and "All differences are exploratory" in page
    scores = {}
    for each in map(archive.read, sorted(results.glob("*.json.gz"))):
        scores.setdefault(each.experiment["modulation"]["name"], {})[each.seed] = np.mean(each.success)
    gaps = [scores["aem"][seed] - scores["shuffled"][seed] for seed in range(10)]
    found = stats.ttest_1samp(gaps, 0).confidence_interval()
    assert f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]" in shown
