"""Memory estimates: published sizes, invariants, measurements of small models, plans, and refusals."""

import json
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from support import peak_memory
from support.peak_memory import Setting, process_spec

from aem_exp import policy
from aem_exp.__main__ import main
from aem_exp.config import load
from aem_exp.core.errors import ConfigError
from aem_exp.jobs import dispatch, memory, memory_trace, plan, vllm_server
from aem_exp.jobs.fit import check_memory
from aem_exp.jobs.memory import estimate_memory
from aem_exp.jobs.memory_trace import MemoryTrace, Meter
from aem_exp.jobs.sizes import SHAPES, ProcessSpec, StepSizes

pytestmark = pytest.mark.usefixtures("clean")
SWE = ["+experiment=swebench_32b"]
ALL_ALONE = [*SWE, "launch=nodes8", "evaluation.context_tokens=0", "evaluation.max_turns=50"]  # no server nodes
NODE = ["+experiment=webshop_1_5b", "model=qwen2_5_7b", "launch=node1"]
DDP = ["launch.trainer.fsdp=null", "launch.trainer.fsdp_config=null", "+launch.trainer.gradient_checkpointing=true"]
ALONE = [*NODE, *DDP, "launch.gpus_per_node=1"]
WEIGHTS = {  # as published: 1.54 B, 7.61 B (7.62 of them counted here), 32.8 B
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


def planned(words):
    return estimate_memory(ProcessSpec.from_experiment(load(words)))


def part(need, phase, *names):
    return sum(need.phases[phase].get(name, 0) for name in names)


# Values computed by hand.


@pytest.mark.slow
@pytest.mark.parametrize("path", SHAPES)
def test_weight_counts_agree_with_published_counts(path):
    passes = ProcessSpec.from_experiment(load([f"model.path={path}", "model.make=null"])).passes
    assert sum(p.numel() for p in memory._cached_trace(passes).parameters) == WEIGHTS[path]


@pytest.mark.slow
def test_resident_memory_follows_from_the_weights():
    n, whole, sharded = WEIGHTS["Qwen/Qwen2.5-7B-Instruct"], planned(ALONE), planned(NODE)
    for phase in ("update", "scoring"):
        assert part(whole, phase, "weights") == 4 * n and part(whole, phase, "optimizer") == 8 * n
        assert part(whole, phase, "reference") == 4 * n  # beta is above 0
        assert part(sharded, phase, "weights", "optimizer") == pytest.approx(12 * n / 8)
    assert part(whole, "optimizer", "gradients") == 4 * n
    assert part(sharded, "optimizer", "gradients") == pytest.approx(4 * n / 8)
    assert whole.saved == sharded.saved == 12 * n


def test_step_sizes():
    whole = StepSizes(1024, 1024, 1024, 1024 * 36864, 1024 * 36864, 1)
    assert StepSizes.from_experiment(load(SWE)) == whole
    assert StepSizes.from_experiment(load(ALL_ALONE)) == replace(whole, live=64)  # one per process
    windows = StepSizes.from_experiment(load(NODE))
    assert windows == StepSizes(128, 128, 128 * 15, 128 * 15 * 4608, 128 * 15 * 512, 30)


@pytest.mark.slow
def test_kv_cache_of_the_32b_model():
    need = planned(ALL_ALONE)
    assert part(need, "play", "KV cache") == pytest.approx(2 * 2 * 64 * 8 * 128 * 36864, rel=0.01)
    assert part(need, "play", "gathered") == 2 * WEIGHTS["Qwen/Qwen3-32B"]


# Invariants.


@pytest.mark.slow
def test_twice_the_processes_hold_half_of_the_shards():
    process_spec = ProcessSpec.from_experiment(load(NODE))
    one, two = (
        estimate_memory(replace(process_spec, ranks=n, passes=replace(process_spec.passes, processes=n)))
        for n in (8, 16)
    )
    for name in ("weights", "optimizer", "reference"):
        assert part(two, "update", name) == pytest.approx(part(one, "update", name) / 2)
    assert part(two, "update", "activations") == part(one, "update", "activations")


@pytest.mark.slow
def test_ddp_replicates_memory_and_doubles_gradients():
    ddp, nodes, alone = planned([*NODE, *DDP]), planned([*NODE, *DDP, "launch.nodes=4"]), planned(ALONE)
    for name in ("weights", "optimizer", "reference"):
        assert part(ddp, "update", name) == part(nodes, "update", name) == part(alone, "update", name)
    assert part(ddp, "optimizer", "gradients") == 2 * part(alone, "optimizer", "gradients")


@pytest.mark.slow
def test_matched_controls_keep_copies_for_a_trial():
    """Gradients of the reference in the backward pass; in the trial also the weights and moments before it."""
    n, plain = WEIGHTS["Qwen/Qwen2.5-7B-Instruct"], planned(ALONE)
    for name, trial in (("matched_gradient", 0), ("matched_update", 16 * n), ("matched_kl", 16 * n)):
        matched = planned([*ALONE, f"modulation={name}"])
        assert part(matched, "update", "gradients") == part(plain, "update", "gradients") + 4 * n
        assert part(matched, "optimizer", "gradients") == part(plain, "optimizer", "gradients") + trial


@pytest.mark.slow
def test_only_the_adapter_is_trained_with_lora():
    lora = "model.lora={r: 8, target_modules: [q_proj, v_proj]}"
    adapter = planned(["+experiment=webshop_1_5b", "launch=gpu1", lora])
    ours = 28 * 8 * ((1536 + 1536) + (1536 + 256))
    assert adapter.trained == ours and adapter.weights == WEIGHTS["Qwen/Qwen2.5-1.5B-Instruct"] + ours
    assert part(adapter, "update", "optimizer") == 8 * ours and part(adapter, "optimizer", "gradients") == 4 * ours
    assert part(adapter, "update", "reference") == 0  # the reference is the policy without the adapter
    assert adapter.saved == 12 * ours


def make_trace(kind="qwen3", checkpointing=False, layers=7):
    shape = Setting("deep", kind=kind, layers=layers).shape
    make = lambda: policy.build_from_config(shape, "float32", "sdpa", {})  # noqa: E731
    return MemoryTrace(make, autocast=True, checkpointing=checkpointing)


@pytest.mark.slow
def test_memory_grows_with_rows_and_length_and_shrinks_with_checkpointing():
    whole, again = make_trace(layers=4), make_trace(layers=4, checkpointing=True)
    sizes = ((1, 64), (2, 64), (2, 128))
    held, less = ([sum(seen.update(rows, t, t - 1).values()) for rows, t in sizes] for seen in (whole, again))
    assert held == sorted(held) and less == sorted(less)
    assert all(a < b for a, b in zip(less, held, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointing"), [("qwen3", False), ("qwen2", True)])
def test_extrapolation_from_few_layers_is_exact(monkeypatch, kind, checkpointing):
    """The estimate for seven layers from two and three layers equals a trace of all seven."""
    update, play = make_trace(kind, checkpointing).update(4, 96, 95, again=True), make_trace(kind).play(4, 96, 8)
    monkeypatch.setattr(memory_trace, "TRACED_LAYERS", 7)
    assert make_trace(kind, checkpointing).update(4, 96, 95, again=True) == update
    assert make_trace(kind).play(4, 96, 8) == play


# Measurements.


def test_meter_counts_live_bytes():
    with Meter() as meter:
        a = torch.ones(1000)
        b = a + 1
        c = b[10:]  # another view of the same bytes
        del b
        assert sum(meter.live.values()) == 8000
        del a, c
        assert sum(meter.live.values()) == 0
    assert sum(meter.peaks[0].values()) == 8000


@pytest.mark.slow
@pytest.mark.parametrize("setting", peak_memory.SETTINGS[:3], ids=lambda setting: setting.name)
def test_estimate_agrees_with_training(tmp_path, setting):
    held, need = peak_memory.measure_peak(setting, tmp_path)
    assert need.total == pytest.approx(held, rel=0.15)


@pytest.mark.slow
def test_estimate_agrees_with_play(tmp_path):
    setting = Setting("play", hidden=256)
    trainer = peak_memory.make_trainer(setting, tmp_path)
    with peak_memory.track_peak(trainer.model, setting.cuda) as held:
        played = trainer.rollout.play(peak_memory.draw(0), trainer.sampler)
    need = estimate_memory(process_spec(setting, *peak_memory.lengths(played)))
    assert sum(need.phases["play"].values()) - part(need, "play", "optimizer") == pytest.approx(held[0], rel=0.15)


# Plans and refusals.


@pytest.mark.slow
def test_swebench_32b_fits_its_launch(capsys):
    assert main([*SWE, "plan=true"]) == 0
    said = capsys.readouterr().out
    for heading in ("step", "memory", "serve", "disk", "cost"):
        assert f"\n{heading:<7} " in said
    assert "of 80 GB per GPU" in said and "32.76 B weights" in said and "1,024 rows" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "start"),
    [
        ([*SWE, "launch.device_rows=4"], "launch.device_rows=4: needs 205 of 80 GB"),
        (
            [*SWE, "launch.gpus_per_node=1", "launch.nodes=64"],
            "launch.server_nodes=4: the 1 GPUs of a server node hold 70",
        ),
        ([*ALL_ALONE, "launch.device_episodes=8"], "launch.device_episodes=8: needs"),
        ([*NODE, *DDP], "launch.trainer.fsdp=false: needs"),
        (
            [*NODE, "launch.sampler=engine", "launch.trainer.use_vllm=true", "model=qwen3_32b"],
            "launch.trainer.vllm_gpu_memory_utilization=0.3: gives vLLM 24.0 GB",
        ),
    ],
)
def test_experiments_that_do_not_fit_are_refused(capsys, words, start):
    assert main([*words, "plan=true"]) == 2
    said = capsys.readouterr().err
    assert start in said and said.count("\n") == 1


@pytest.mark.slow
def test_proposed_value_fits():
    experiment = load([*ALL_ALONE, "launch.device_episodes=8"])
    with pytest.raises(ConfigError) as caught:
        check_memory(experiment)
    assert caught.value.field == "launch.device_episodes" and "; 1 would fit" in caught.value.remedy
    check_memory(load([*ALL_ALONE, "launch.device_episodes=1"]))


@pytest.mark.slow
def test_unknown_gpu_memory_is_not_refused(capsys):
    assert main([*SWE, "launch.gpu_memory_gb=0", "launch.device_rows=64", "plan=true"]) == 0
    assert "launch.gpu_memory_gb=0: " in capsys.readouterr().out
    assert main([*SWE, "launch.gpu_tflops=0", "plan=true"]) == 0
    assert "cost    unknown" in capsys.readouterr().out


@pytest.mark.slow
def test_context_beyond_the_position_limit_gives_a_warning(tmp_path, capsys):
    assert main([*SWE, "plan=true"]) == 0
    assert (
        "evaluation.context_tokens=69632: the config.json of the model has 40,960 positions" in capsys.readouterr().out
    )
    assert not plan.context_warnings(load([*SWE, "evaluation.context_tokens=0"]))
    assert not plan.context_warnings(load([]))
    tiny = Setting("tiny").shape | {"max_position_embeddings": 1024}
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    for rope, most in (
        ({}, 1024),
        ({"rope_parameters": scaled}, 1024),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 2048),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tiny | rope))
        words = [f"model.path={tmp_path}", "model.make=null", "env.response_tokens=16"]
        assert not plan.context_warnings(load([*words, f"env.context_tokens={most}"]))
        (warning,) = plan.context_warnings(load([*words, f"env.context_tokens={most + 1}"]))
        assert f"env.context_tokens={most + 1}: the config.json of the model has {most:,} positions" in warning
        assert ("vLLM server refuses" in warning) == bool(rope)
        options = vllm_server._context_options(str(tmp_path), most + 1)
        assert options == ([] if rope else ["--hf-overrides", json.dumps({"max_position_embeddings": most + 1})])
        assert vllm_server._context_options(str(tmp_path), most) == []


@pytest.mark.slow
def test_memory_and_disk_are_checked_before_submission(monkeypatch, tmp_path):
    monkeypatch.setattr(policy, "locate", lambda model: "")
    experiment = load(["model=qwen2_5_7b", "launch=slurm1", "tracking=off", f"outputs={tmp_path}"])
    with pytest.raises(ConfigError) as caught:
        dispatch.check_prepared(experiment)
    assert "of 80 GB per GPU" in caught.value.remedy
    free = namedtuple("Usage", "free")(1e9)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: free)
    roomy = replace(experiment, launch=replace(experiment.launch, gpu_memory_gb=1000.0))
    with pytest.raises(ConfigError) as caught:
        dispatch.check_prepared(roomy)
    assert caught.value.field == "outputs" and "1.0 GB" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_models_without_a_readable_config(tmp_path, capsys):
    assert main(["model.path=someone/nothing", "model.make=null", "plan=true"]) == 0
    assert "hf download someone/nothing config.json" in capsys.readouterr().out
    bad = {"nowhere": None, "broken": "{", "typeless": "{}", "strange": '{"model_type": "starship"}', "no_lm": None}
    for name, text in bad.items():
        if text:
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(text)
        assert main([f"model.path={tmp_path / name}", "model.make=null", "plan=true"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("aem_exp: model.path=") and "config.json" in said and said.count("\n") == 1


@pytest.mark.slow
def test_model_that_cannot_be_traced_is_not_refused(tmp_path, capsys):
    experts = {"model_type": "mixtral", "num_local_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(Setting("experts", autocast=True).shape | experts))
    words = [f"model.path={tmp_path}", "model.make=null", "trainer.bf16=true", "launch=slurm1"]
    assert main([*words, "plan=true"]) == 0
    assert "cannot be traced" in capsys.readouterr().out
    check_memory(load(words))


@pytest.mark.slow
def test_shape_is_read_from_a_local_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(Setting("tiny").shape))
    assert main([f"model.path={tmp_path}", "model.make=null", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "per process, without Python itself" in said and "cost" not in said
    assert planned([f"model.path={tmp_path}", "model.make=null"]).weights == 846_912
