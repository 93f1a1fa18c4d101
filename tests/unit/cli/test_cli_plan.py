"""`vitscale plan`: what is printed is what the formulas say, for a person and for a machine."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vitscale.cli.plan import command
from vitscale.errors import ConfigError

HUGE = Path(__file__).parents[3] / "configs/in21k/vit_huge_patch14.yaml"


def planned(*words):
    result = CliRunner().invoke(command, [str(HUGE), *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def as_json(*words):
    return json.loads(planned(*words, "--json"))


def policy(phase, recompute):
    return next(row for row in phase["activations"] if row["recompute"] == recompute)


def test_the_huge_config_on_64_gpus():
    plan = as_json("--gpus", 64, "--hbm", 80)
    assert plan["model"]["parameters"] == sum(plan["model"]["parts"].values()) == 660_385_363
    (phase,) = plan["phases"]
    assert (phase["global_batch"], phase["micro_batch"], phase["grad_accum"]) == (4096, 64, 1)
    assert phase["train_flops"] == phase["executed_train_flops"] == 3 * phase["forward_flops"]
    assert [row["stage"] for row in plan["state"] if row["chosen"]] == [1]
    assert "engine.zero_stage=1" in plan["state"][0]["refused"]
    first, third = plan["state"][1], plan["state"][3]
    assert first["weights"] == pytest.approx(2 * 660_385_363, rel=1e-6)
    assert third["resident"] < first["resident"]
    none, full = policy(phase, "none"), policy(phase, "full")
    assert none["chosen"]
    assert none["fits"]
    assert none["step_bytes"] > none["kept_bytes"] > 10 * full["kept_bytes"]
    assert 2 <= none["largest_micro_batch"] < full["largest_micro_batch"]
    assert none["largest_dividing"] == 64  # a rank has no more
    assert plan["deepspeed"]["train_batch_size"] == 4096


def test_a_smaller_gpu_is_refused_what_it_cannot_hold():
    words = ("--gpus", 8, "--hbm", 24)
    (phase,) = as_json(*words)["phases"]
    assert not policy(phase, "none")["fits"]
    assert policy(phase, "full")["fits"]
    table = planned(*words).split("activations, GB")[1].splitlines()
    assert next(line for line in table if line.startswith("> none")).split()[6] == "NO"


def test_phases_have_their_own_size_and_batch():
    plan = as_json("--gpus", 8, "schedule.phases=[{until: 80 %, img_size: 168, micro_batch: 128}]")
    early, late = plan["phases"]
    assert (early["until"], early["tokens"], early["micro_batch"], early["grad_accum"]) == ("80 %", 145, 128, 4)
    assert (late["until"], late["tokens"], late["grad_accum"]) == ("90 epochs", 257, 8)
    assert early["train_flops"] < late["train_flops"]


def test_what_lost_nodes_leave():
    rows = as_json("--gpus", 64)["if_lost"]
    assert [row["nodes"] for row in rows] == [7, 6, 4]
    seven, _, four = rows
    assert seven["divided"] == {"gpus": 32, "micro_batch": 64, "grad_accum": 2, "masked": 0.0, "longer": 2.0}
    padded = {"gpus": 56, "micro_batch": 38, "grad_accum": 2, "masked": 160 / 4256, "longer": 76 / 64}
    assert seven["padded"] == padded
    assert four["divided"] == four["padded"] == seven["divided"]
    table = planned("--gpus", 64).split("if nodes of 8 GPUs are lost (here batch.pad=false;")[1].splitlines()
    assert " ".join(table[2].split()) == "7 | 32 2 x 64 x 2.00 | 56 2 x 38 x 1.19 3.8 %"
    only_padded = ("--gpus", 4, "--gpus-per-node", 2, "batch={global_batch: 18, micro_batch: 4, pad: true}")
    assert [row["divided"] for row in as_json(*only_padded)["if_lost"]] == [None]
    assert "| none" in planned(*only_padded)
    assert "if nodes" not in planned("--gpus", 8)


def test_a_padded_batch_executes_its_padding_too():
    words = ("--gpus", 56, "batch.pad=true")
    (phase,) = as_json(*words)["phases"]
    assert (phase["micro_batch"], phase["grad_accum"], phase["padding"]) == (38, 2, 160)
    assert phase["executed_train_flops"] / phase["train_flops"] == pytest.approx(4256 / 4096)
    assert "4096 = 56 ranks x 38 images x 2 micro-steps - 160 masked, at" in planned(*words)


def test_recomputation_and_subsets_change_what_is_executed():
    def executed(*words):
        (phase,) = as_json("--gpus", 64, *words)["phases"]
        return phase["executed_train_flops"] / phase["train_flops"]

    assert 1.2 < executed("engine.activation_checkpointing=full") < 4 / 3
    assert executed("model.drop_path_rate=0.4", "model.drop_path_mode=subset") == pytest.approx(0.8, abs=0.02)


def test_offload_and_average_have_their_columns():
    plain = planned("--gpus", 8)
    assert "on host" not in plain
    assert "average" not in plain.split("state, GB")[1]
    assert "on host" in planned("--gpus", 8, "engine.zero_stage=2", "engine.offload=optimizer")
    assert "average" in planned("--gpus", 8, "average={decay: 0.999}").split("state, GB")[1]


def test_the_torch_engine_has_no_stages():
    plan = as_json("engine.kind=torch", "engine.precision=fp32", "--gpus", 64)
    (row,) = plan["state"]
    assert row["weights"] == row["gradients"] == 4 * 660_385_363
    assert row["moments"] == 8 * 660_385_363
    assert plan["deepspeed"] is None
    assert "by engine.kind" in planned("engine.kind=torch", "engine.precision=fp32", "--gpus", 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", 7), "batch.global_batch 4096 is not 7 ranks"),
        (("--gpus", 8, "schedule.phases=[{until: 50 %, img_size: 150}]"), "use model.img_size=140 or 154"),
        (("model.img_size=225",), "use model.img_size=224 or 238"),
        (("engine.zero_stage=0",), "engine.zero_stage=1"),
        (("engine.fp8=true",), "engine.compile=true"),
        (("engine.fp8=true", "engine.compile=true", "engine.precision=bf16", "--device", "cpu"), "not cpu"),
        (("optim.fused=true", "--device", "cpu"), "optim.fused=true needs parameters on a GPU"),
        (("engine.qwz=true", "engine.zero_stage=3", "--device", "cpu"), "set engine.qwz=false"),
        (("engine.hpz=3", "engine.zero_stage=3", "--gpus", 8), "engine.hpz=3 does not divide"),
        (("checkpoint.every_steps=0",), "checkpoint.every_steps"),
        (("data.label_space=in12k",), "set model.num_classes=11821"),
        (("data.label_space=in1k", "model.num_classes=1000", "loss.kind=semantic"), "loss.kind=softmax"),
        (("engine.deepspeed_overrides={zero_optimization: {stage: 3}}",), "use engine.zero_stage"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(words, said):
    result = CliRunner().invoke(command, [str(HUGE), *map(str, words)])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("words", "said"), [("model.num_classes=4", "set model.num_classes=3"), ("loss.kind=semantic", "loss.kind=softmax")]
)
def test_a_dataset_that_lies_here_is_asked_for_its_classes(micro_config, words, said):
    result = CliRunner().invoke(command, [str(micro_config), words, "--device", "cpu"])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
