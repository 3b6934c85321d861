"""Sweep files and grids: every file of sweeps/, resolution of cells, invalid files, and statistical power."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from support import ROOT

from aem_exp import config
from aem_exp.config import ConfigError
from aem_exp.config.compose import Composer
from aem_exp.stats import power
from aem_exp.sweep import cells, sweep_file
from aem_exp.sweep.question import load, parse_grid

FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
GROUPS = config.list_choices([ROOT / "conf"])
pytestmark = pytest.mark.usefixtures("clean")
SMALL = """
question: Does it?
base: trainer.steps=20
arms:
  none: modulation=none
  aem: modulation=aem
seeds: 0,1
"""


def write_sweep(tmp_path, text, name="mine"):
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    return file


def refused(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(write_sweep(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# sweeps/


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_sweep_file_resolves_to_the_experiments_of_its_overrides(file):
    sweep = load(file)
    assert sweep.question.endswith("?")
    assert file.read_text().startswith(("# ", "question: "))
    assert len(sweep.cells) == len(sweep.arms) * len(sweep.points) * len(sweep.seeds)
    assert len({cell.folder for cell in sweep.cells}) == len({(cell.group, cell.seed) for cell in sweep.cells})
    for cell in sweep.cells[:: max(1, len(sweep.cells) // 8)]:
        assert config.load(list(cell.overrides)) == cell.experiment
        assert config.run_dir(cell.experiment) == cell.folder


@pytest.mark.slow
def test_ablations_and_main_are_complete():
    for name in ("ablations", "household_ablations"):
        causal = load(name.replace("ablations", "causal"), ["seed=0"]).arms
        assert set(causal) - {"aem", "none"} == {"raising", "lowering"}
        controls = load(name.replace("ablations", "controls"), ["seed=0"]).arms
        sharded = (
            {name for name in GROUPS["modulation"] if name.startswith("matched_")} if name == "ablations" else set()
        )
        assert {*load(name, ["seed=0"]).arms, *causal, *controls} == set(GROUPS["modulation"]) - sharded
    main = {
        (e.env.name, e.model.name, e.baseline.name, e.modulation.name)
        for e in (cell.experiment for cell in load("main", ["seed=0"]).cells)
    }
    rows = {row[:3] for row in main}
    assert rows >= {
        (env, model, baseline)
        for env in ("alfworld", "webshop")
        for model in ("qwen2_5_1_5b", "qwen2_5_7b")
        for baseline in ("grpo", "gspo", "dapo")
    }
    assert main == {(*row, modulation) for row in rows for modulation in ("none", "aem")}


@pytest.mark.slow
def test_names_and_paths_find_the_same_file(monkeypatch):
    assert sweep_file.list_sweeps().keys() == {file.stem for file in FILES}
    monkeypatch.setenv("AEM_OUTPUTS", str(ROOT))
    here = load("household_quick")
    monkeypatch.chdir(ROOT)
    assert load("sweeps/household_quick.yaml") == here
    assert here.file == ROOT / "sweeps/household_quick.yaml"
    assert here.question == sweep_file.list_sweeps()["household_quick"]
    with pytest.raises(ConfigError, match="did you mean household_quick"):
        load("household_quik")


# Cells.


def test_cells_are_arms_times_points_times_seeds(tmp_path):
    products = """
products:
  - baseline=grpo,rloo trainer.learning_rate=1e-4,1e-3
  - [+experiment=household_dapo]
"""
    sweep = load(write_sweep(tmp_path, SMALL + products), ["trainer.steps=7", "outputs=here"])
    assert (sweep.name, list(sweep.arms), sweep.seeds) == ("mine", ["none", "aem"], (0, 1))
    assert [cell.group for cell in sweep.cells[::2]] == [
        f"{arm}/{point}"
        for arm in ("none", "aem")
        for point in (
            *("grpo/learning_rate=0.0001", "grpo/learning_rate=0.001"),
            *("rloo/learning_rate=0.0001", "rloo/learning_rate=0.001", "household_dapo"),
        )
    ]
    last = sweep.cells[-1]
    assert (last.arm, last.point, last.seed) == ("aem", ("+experiment=household_dapo",), 1)
    assert last.overrides == (
        "modulation=aem",
        "+experiment=household_dapo",
        "trainer.steps=7",
        "outputs=here",
        "seed=1",
    ) or (last.overrides[-3:] == ("trainer.steps=7", "outputs=here", "seed=1"))
    assert last.experiment.baseline.name == "dapo" and last.experiment.trainer.steps == 7
    assert last.folder.parent == tmp_path / "here"


def test_command_line_overrides_the_file(tmp_path):
    file = write_sweep(tmp_path, SMALL + "launch: launch=local launch.threads=2\n")
    sweep = load(file, ["seed=range(3,5)", "launch=gpu1"])
    assert sweep.seeds == (3, 4)
    assert {(cell.experiment.launch.name, cell.experiment.launch.threads) for cell in sweep.cells} == {("gpu1", 2)}
    assert load(write_sweep(tmp_path, SMALL.replace("0,1", "[4, 2]"))).seeds == (4, 2)
    assert load(write_sweep(tmp_path, SMALL.replace("0,1", "7"))).seeds == (7,)


def test_one_experiment_of_two_products_is_one_cell_with_two_labels(tmp_path):
    products = "products:\n  - baseline=grpo,rloo\n  - baseline=rloo trainer.steps=20,30\n"
    sweep = load(write_sweep(tmp_path, SMALL + products))
    folders = [cell.folder for cell in sweep.cells]
    assert len(folders) == len(set(folders)) == 2 * (2 * 2 + 2)  # seeds x (arms x first product, and two steps=30)
    labels = {(label.arm, label.point) for cell in sweep.cells for label in cell.labels}
    assert labels == {(arm, point) for arm in sweep.arms for point in sweep.points}
    (both,) = [cell for cell in sweep.cells if cell.seed == 1 and cell.group == "aem/rloo"]
    assert [(label.arm, label.group) for label in both.labels] == [("aem", "aem/rloo"), ("aem", "aem/rloo/steps=20")]


def test_group_names_are_unique(tmp_path):
    products = "products:\n  - trainer.temperature=0.5,1.0 evaluation.temperature=0.5,1.0\n"
    groups = [cell.group for cell in load(write_sweep(tmp_path, SMALL + products), ["seed=0"]).cells]
    assert len(set(groups)) == len(groups) == 8
    assert "none/temperature=0.5/temperature=1.0" in groups
    products = "products:\n  - trainer.temperature=0.5\n  - evaluation.temperature=0.5\n"
    groups = [cell.group for cell in load(write_sweep(tmp_path, SMALL + products), ["seed=0"]).cells]
    assert groups[:2] == ["none/trainer.temperature=0.5", "none/evaluation.temperature=0.5"]


@pytest.mark.slow
def test_first_key_of_a_grid_gives_the_arms():
    sweep = parse_grid(
        ["seed=0,1,2", "modulation=none,aem", "baseline=glob(r*)", "trainer.steps=range(10,30,10)", "name=x"]
    )
    assert (list(sweep.arms), sweep.seeds, sweep.file) == (["none", "aem"], (0, 1, 2), None)
    assert sweep.name == "grid-modulation-baseline-steps"
    assert len(sweep.cells) == 2 * 3 * 2 * 3
    cell = sweep.cells[-1]
    assert cell.group == "aem/rloo/steps=20" and cell.experiment.name == "x"
    assert config.load(list(cell.overrides)) == cell.experiment
    seeds = parse_grid(["modulation=none", "seed=4,5"])
    assert (seeds.name, dict(seeds.arms), [cell.group for cell in seeds.cells]) == (
        "grid-seed",
        {"base": ()},
        ["base"] * 2,
    )
    assert parse_grid(["modulation=none,aem"]).seeds == (config.load([]).seed,)


# A cell is the experiment that `config.load` makes of its overrides.

WORDS = [
    *(f"modulation={name}" for name in GROUPS["modulation"]),
    *(f"baseline={name}" for name in GROUPS["baseline"]),
    *(f"+experiment={name}" for name in GROUPS["experiment"]),
    *("launch=gpu1", "launch=node1", "model=qwen2_5_7b", "env=household_chat", "model=tiny", "env=household"),
    *(
        "trainer.steps=3",
        "trainer.learning_rate=1e-5",
        "trainer.delta=2.0",
        "~trainer.adam_beta1",
        "trainer.group_size=1",
    ),
    *("modulation.lam.value=0.25", "modulation.gate=0.0", "name=run-${seed}", "name=of ${env.name}", "env.window=3"),
    *("modulation.lam={_target_: aem_exp.schedules.Linear, start: 2.0, end: 0.5}", "model.make.noise=0.0${seed}"),
    *("baseline.advantage={_target_: aem_exp.advantages.leave_one_out, over: trajectories}", "trainer.oversample=2"),
    *(
        "env.make.kinds=[pick_and_place]",
        "env.make.kindss=[x]",
        "trainer.stepss=3",
        "modulation.nonsense=1",
        "launch=node9",
    ),
    *(
        "++env.history=window",
        "trainer.mini_batch=all",
        "evaluation.panel=test",
        "tracking=null",
        "env.make.objects=???",
    ),
]


def alone(overrides):
    try:
        return config.load(overrides)
    except ConfigError as error:
        return str(error)


def together(composer, overrides, seeds):
    try:
        return list(cells._resolve_seeds(overrides, seeds, composer))
    except ConfigError as error:
        return str(error)


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_seeds_resolved_together_equal_seeds_resolved_alone(shared, words):
    overrides, seeds = shared.drop_replaced_choices(words), ["seed=2", "seed=5"]
    one = [alone([*overrides, seed]) for seed in seeds]
    many = together(shared, overrides, seeds)
    assert many == next((sentence for sentence in one if isinstance(sentence, str)), one)


@pytest.fixture(scope="module")
def shared():
    """One composer for all examples: its caches must not affect results."""
    return Composer()


@pytest.mark.slow
def test_config_dir_applies_to_every_cell(tmp_path):
    (tmp_path / "own/baseline").mkdir(parents=True)
    (tmp_path / "own/baseline/grpo.yaml").write_text("""# @package _global_
# GRPO with a wider clip
baseline: {name: grpo, advantage: {_target_: aem_exp.advantages.group_normalised, over: turns, eps: 1.0e-6}}
trainer: {loss_type: dapo, epsilon: 0.25}
""")
    main = (ROOT / "conf/config.yaml").read_text()
    main = main.replace("\n\nname:", "\n  - override hydra/job_logging: none\n\nname:", 1)
    for text in (None, main):  # the second needs `hydra.compose`
        if text:
            (tmp_path / "own/config.yaml").write_text(text)
        sweep = load(write_sweep(tmp_path, SMALL), config_dir=tmp_path / "own")
        for cell in sweep.cells:
            assert cell.experiment == config.load(list(cell.overrides), tmp_path / "own")
            assert cell.experiment.trainer.epsilon == 0.25


@pytest.mark.slow
def test_cells_can_continue_a_run(tmp_path):
    parent = config.load(["trainer.steps=10", f"outputs={tmp_path}"])
    folder = config.run_dir(parent)
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps(config.to_dict(parent)))
    (folder / "result.json").write_text("{}")
    text = SMALL.replace("base:", f"base: from={folder}")
    sweep = load(write_sweep(tmp_path, text))
    assert [cell.experiment for cell in sweep.cells] == [config.load(list(cell.overrides)) for cell in sweep.cells]
    assert {cell.experiment.parent for cell in sweep.cells} == {config.signature(parent)}
    sentence = refused(tmp_path, text.replace("steps=20", "steps=5"))
    assert sentence.startswith("mine: none seed=0: trainer.steps=5: ") and "10" in sentence


@pytest.mark.slow
def test_a_grid_of_300_cells():
    words = ["modulation=aem,none,token,linear,shuffled", "baseline=grpo,rloo,dapo,gigpo", "seed=range(15)"]
    cells = parse_grid(words).cells
    assert len(cells) == len({cell.folder for cell in cells}) == 300
    for cell in cells[::50]:
        assert config.load(list(cell.overrides)) == cell.experiment


# Invalid sweeps: one sentence with the location, before anything runs.

BAD = [
    (SMALL.replace("arms:", "arm:"), "mine.arm={", "did you mean arms?"),
    (SMALL + "product: []\n", "mine.product=[]:", "did you mean products?"),
    (SMALL + "search: {}\n", "mine.search={}:"),
    (SMALL.replace("seeds: 0,1", "seeds:"), "mine.seeds=null:"),
    (SMALL.replace("seeds: 0,1", "seeds: []"), "mine.seeds=[]:"),
    (SMALL.replace("seeds: 0,1\n", ""), "mine.seeds=null:"),
    (
        SMALL.replace("seeds: 0,1", "seeds: range(0,1000000000000)"),
        "mine.seeds: seed=range(0,1000000000000):",
        "10,000",
    ),
    (SMALL.replace("seeds: 0,1", "seeds: range(3,3)"), "mine.seeds: seed=range(3,3):"),
    (SMALL.replace("seeds: 0,1", "seeds: 0,0"), "mine.seeds=seed=0:"),
    (SMALL.replace("seeds: 0,1", "seeds: 0,-1"), "mine: none seed=-1: seed=-1:", "at least 0"),
    (SMALL.replace("seeds: 0,1", "seeds: one"), "mine: none seed=one: seed=one:"),
    (SMALL + "pairs: []\n", "mine.pairs=[]:"),
    (SMALL + "contrasts: [aem]\n", "mine.contrasts=", "mapping"),
    (SMALL + "contrasts: {gain: aem}\n", "mine.contrasts.gain=aem:", "such as {aem: 1, none: -1}"),
    (SMALL + "contrasts: {gain: {aem: 1, non: -1}}\n", "mine.contrasts.gain=non: did you mean none?"),
    (SMALL + "contrasts: {gain: {aem: one, none: -1}}\n", "mine.contrasts.gain.aem=one: must be a number"),
    (SMALL + "contrasts: {gain: {aem: 1, none: -0.5}}\n", "mine.contrasts.gain=a sum of 0.5: ", "sum to 0"),
    (SMALL + "pairs: [none]\n", "mine.pairs=none:"),
    (SMALL + "pairs: [aem aem]\n", "mine.pairs=aem aem:"),
    (SMALL + "pairs: [aem non]\n", "mine.pairs=non: did you mean none?"),
    (SMALL + "pairs: [aem none, none aem]\n", "mine.pairs=none aem:"),
    (SMALL + "pairs: aem none\n", "mine.pairs=aem none:", "list"),
    (SMALL + "products: []\n", "mine.products=[]:"),
    (SMALL + "products:\n", "mine.products=null:"),
    (SMALL + "products:\n  -\n", "mine.products=null:"),
    (SMALL + "products:\n  - []\n", "mine.products=null:"),
    (SMALL + "products:\n  - modulation=glob(x*)\n", "mine.products: modulation=glob(x*):"),
    (SMALL + "products:\n  - baseline=grpo,grpo\n", "mine.products=baseline=grpo:"),
    (
        SMALL + "products:\n  - [baseline=grpo,rloo]\n",
        "mine.products=rloo:",
        "key=value",
    ),
    (
        SMALL + "products:\n  - baseline: grpo,rloo\n",
        "mine.products={'baseline': 'grpo,rloo'}:",
    ),
    (SMALL + "products: baseline=grpo,rloo\n", "mine.products=baseline=grpo,rloo:", "list"),
    (
        SMALL + "products:\n  - trainer.epsilon=interval(0,1)\n",
        "mine.products: trainer.epsilon=interval(0,1):",
    ),
    (
        SMALL + "products:\n  - trainer.learning_rate=1e-3,0.0010\n",
        "mine.products=trainer.learning_rate=0.001:",
    ),
    (
        SMALL + "products:\n  - trainer.beta=0,0.0\n",
        "mine.products=trainer.beta=0.0:",
        "trainer.beta=0:",
    ),
    (SMALL + "products:\n  - launch=local,gpu1\n", "mine.products=launch=gpu1:", "launch=local:"),
    (SMALL.split("arms:")[0] + "arms: {}\nseeds: 0\n", "mine.arms={}:"),
    (
        SMALL.split("arms:")[0] + "arms: [modulation=aem]\nseeds: 0\n",
        "mine.arms=['modulation=aem']:",
        "mapping",
    ),
    (SMALL.replace("aem: modulation", "a/b: modulation"), "mine.arms=a/b:", "letters"),
    (SMALL.replace("aem: modulation", "no: modulation"), "mine.arms=false:", "letters"),
    (SMALL.replace("aem: modulation=aem", "none: modulation=aem"), "mine.none=null:"),
    (
        SMALL + "products:\n  - baseline=rloo modulation=none\n",
        "mine.arms.aem=modulation=aem:",
        "none at baseline=rloo",
    ),
    (SMALL + "seeds: 3\n", "mine.seeds=null:"),
    (SMALL.replace("=aem", "=none"), "mine.arms.aem=modulation=none:", "none:"),
    (
        SMALL.replace("=aem", "=none launch=gpu1 name=x"),
        "mine.arms.aem=modulation=none launch=gpu1 name=x:",
        "none:",
    ),
    (
        SMALL.replace("=aem", "=aem,linear"),
        "mine.arms.aem=modulation=aem,linear:",
        "products:",
    ),
    (
        SMALL.replace("steps=20", "steps=20,30"),
        "mine.base=trainer.steps=20,30:",
        "products:",
    ),
    (SMALL.replace("=aem", "=aem seed=3"), "mine.arms.aem=seed=3:", "seeds:"),
    (SMALL.replace("=aem", "=aem outputs=x"), "mine.arms.aem=outputs=x:", "base:"),
    (SMALL.replace("=aem", "=aem tracking=x"), "mine.arms.aem=tracking=x:", "base:"),
    (SMALL + "products:\n  - seed=0,1\n", "mine.products=seed=0:", "seeds:"),
    (SMALL.replace("steps=20", "steps=20 seed=1"), "mine.base=seed=1:", "seeds:"),
    (SMALL.replace("=aem", "=aemm"), "mine: aem seed=0: modulation=aemm: did you mean aem?"),
    (SMALL.replace("=aem", "='aem"), "mine.arms.aem=modulation='aem:", "No closing quotation"),
    (SMALL.replace("=aem", ""), "mine.arms.aem: override=modulation:", "key=value"),
    (SMALL.replace("steps=20", "stepss=20"), "mine: none seed=0: trainer.stepss=20:", "steps"),
    (
        SMALL + "products:\n  - baseline=grpo,gspo\n",
        "mine: aem baseline=gspo seed=0: trainer.importance_sampling_level=se",
    ),
    (SMALL + "products:\n  - env.make.kinds=[[x\n", "mine.products: override=env.make.kinds=[[x:", "key=value"),
    (SMALL.replace("Does it?", "[1]"), "mine.question=[1]:", "sentence"),
    ("- a\n", "sweep=", "question, base"),
    ("a: [\n", "sweep=", "YAML"),
]


@pytest.mark.parametrize(("text", "parts"), [(text, parts) for text, *parts in BAD], ids=[case[1][:60] for case in BAD])
def test_invalid_sweep_is_refused(tmp_path, text, parts):
    sentence = refused(tmp_path, text)
    assert sentence.startswith(parts[0]) and all(part in sentence for part in parts), sentence


def test_invalid_command_line_is_refused(tmp_path):
    assert "mine.overrides=trainer.steps=1,2: " in refused(tmp_path, SMALL, "trainer.steps=1,2")
    assert "arms.aem=modulation=aem: " in refused(tmp_path, SMALL, "modulation=aem")
    assert "override=x: " in refused(tmp_path, SMALL, "x")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trainer.steps=3"], "-m=trainer.steps=3: "),
        ([], "-m=: "),
        (["modulation=none,none"], "-m=modulation=none: "),
        (["modulation=none,aemm"], "grid-modulation: aemm seed=0: modulation=aemm: did you mean aem?"),
        (["outputs=a,b"], "outputs=a: "),
        (["launch=local,gpu1"], "arms.gpu1=launch=gpu1: "),
    ],
)
def test_invalid_grid_is_refused(words, part):
    with pytest.raises(ConfigError) as caught:
        parse_grid(words)
    assert part in str(caught.value)


# Power.


@pytest.mark.parametrize(
    ("seeds", "tasks", "repeats", "seed_sd", "points"),
    [
        *((3, 140, 8, 2, 6.8), (5, 140, 8, 2, 4.5), (10, 140, 8, 2, 3.0)),
        *((3, 140, 8, 4, 12.7), (5, 140, 8, 4, 8.3), (10, 140, 8, 4, 5.5), (3, 140, 1, 2, 10.5)),
    ],
)
def test_power_table_for_alfworld(seeds, tasks, repeats, seed_sd, points):
    assert round(power.planned_detectable_points(seeds, tasks, repeats, seed_sd, pooled=True), 1) == points
    exact = power.planned_detectable_points(seeds, tasks, repeats, seed_sd)
    assert points - 0.05 < exact < points * (1.16 if seeds == 3 else 1.04)


def test_three_seeds_cannot_detect_the_published_gain_on_swebench():
    assert round(power.planned_detectable_points(3, 500, 8, within=0.19, pooled=True), 1) == 6.5
    assert power.planned_detectable_points(1, 500) == np.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "pooled", "expected"), [(3, False, 0.8), (5, False, 0.8), (10, False, 0.8), (3, True, 0.7)]
)
def test_power_agrees_with_simulations(seeds, pooled, expected):
    rng, tasks, repeats, sd, rounds = np.random.default_rng(0), 140, 2, 3.0, 6000
    p_T = rng.beta(1.6, 1.0, tasks)
    within = float((p_T * (1 - p_T)).mean())
    gain = power.planned_detectable_points(seeds, tasks, repeats, sd, within, pooled=pooled) / 100
    true = p_T.mean() + rng.normal(0, sd / 100, (rounds, 2, seeds)) + np.array([0, gain])[:, None]
    # Each run has a random shift; the number of successes of a task is binomial.
    noise = (rng.binomial(repeats, p_T, (rounds, 2, seeds, tasks)) / repeats - p_T).mean(-1)
    scores = true + noise
    p = stats.ttest_ind(scores[:, 0], scores[:, 1], axis=-1, equal_var=False).pvalue
    assert (p < 0.05).mean() == pytest.approx(expected, abs=0.025)
    assert scores.std(-1, ddof=1).mean() * 100 == pytest.approx(power.run_sd(tasks, repeats, sd, within), rel=0.15)


def test_more_comparisons_need_a_larger_difference():
    assert power.planned_detectable_points(5, 140, comparisons=15) > 1.4 * power.planned_detectable_points(5, 140)
