"""`vitscale plan --goodput`: what is printed is what the formulas say."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vitscale.cli.plan import command
from vitscale.planning import BEST, WORST

CONFIGS = Path(__file__).parents[3] / "configs/in21k"
GIANT = (CONFIGS / "vit_giant_patch14_augreg.yaml", "batch.micro_batch=4", "--gpus", 1024)


def planned(*words):
    result = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def as_json(*words):
    plan = json.loads(planned(*words, "--goodput", "--json"))
    return plan, plan["goodput"]


def at(goodput, gpus):
    return next(row for row in goodput["sizes"] if row["gpus"] == gpus)


def test_giant_on_1024_gpus():
    plan, goodput = as_json(*GIANT)
    assert plan["checkpoint_bytes"] == 12 * plan["model"]["parameters"]
    assert [row["gpus"] for row in goodput["sizes"]] == [64, 256, 1024, 4096, 16_384]
    best, worst = (at(goodput, 1024)[case] for case in ("best", "worst"))
    assert best["failure_every_s"] == pytest.approx(44.5 * 3600, rel=2e-3)
    assert best["stall_s"] == BEST.stall_s(plan["checkpoint_bytes"], 1024)
    assert best["restart_s"] < worst["restart_s"]
    # The claim of the design, and what it does not hold for.
    assert best["goodput"] > 0.998
    assert 0.985 < worst["goodput"] < 0.99
    kept = [row[case]["goodput"] for case in ("best", "worst") for row in goodput["sizes"]]
    assert kept == sorted(kept[:5], reverse=True) + sorted(kept[5:], reverse=True)

    # 45 % of 989 TFLOP/s on each GPU.
    (phase,) = plan["phases"]
    assert goodput["step_s"] == pytest.approx(4096 * phase["train_flops"] / (1024 * 0.45 * 989e12))
    assert goodput["every_steps"] == round(worst["interval_s"] / goodput["step_s"])
    chosen = goodput["at"][str(goodput["every_steps"])]["worst"]
    assert chosen["goodput"] == pytest.approx(worst["goodput"], rel=1e-6)
    assert chosen["goodput"] + sum(chosen["losses"].values()) == pytest.approx(1)
    assert max(chosen["losses"], key=chosen["losses"].get) == "detect"
    alone = goodput["alone"]
    assert (alone[0]["field"], len(alone)) == ("detect_s", len(goodput["assumptions"]))
    assert alone[0]["goodput"] > 0.99 > alone[-1]["goodput"] == worst["goodput"]
    # Saves that wait for each other are far worse.
    assert goodput["at"]["1000"]["worst"]["goodput"] < 0.5
    for case in ("best", "worst"):
        mean, low = goodput["drawn"][case]["independent"]
        assert low < mean == pytest.approx(goodput["at"][str(goodput["every_steps"])][case]["goodput"], abs=1e-3)


def test_a_measured_step_sets_the_steps_between_saves():
    _, assumed = as_json(*GIANT)
    _, measured = as_json(*GIANT, "--step-s", 0.5)
    assert measured["step_s"] == 0.5
    assert measured["step_from"] == "--step-s"
    assert measured["sizes"] == assumed["sizes"]
    assert measured["every_steps"] == round(at(measured, 1024)["worst"]["interval_s"] / 0.5)
    _, long = as_json(*GIANT, "--step-s", 5000)
    assert long["every_steps"] == 1


@pytest.mark.parametrize(
    ("words", "hang_s"),
    [((), 540), (("watchdog.step_s=370", "watchdog.answer_s=30"), 400), (("watchdog.step_s=null",), 600),
     (("watchdog.step_s=3600",), 600)],
)  # fmt: skip
def test_the_worst_detection_is_the_watchdogs(words, hang_s):
    _, goodput = as_json(*GIANT, *words)
    detection = next(row for row in goodput["assumptions"] if row["field"] == "detect_s")
    assert (detection["best"], detection["worst"]) == (BEST.detect_s, hang_s)
    assert WORST.detect_s == 540
    assert goodput["at"][str(goodput["every_steps"])]["worst"]["goodput"] == pytest.approx(
        at(goodput, 1024)["worst"]["goodput"], rel=1e-6
    )


def test_the_section_for_a_person():
    plain = planned(*GIANT)
    assert "goodput" not in plain
    output = planned(*GIANT, "--goodput")
    assert output.startswith(plain.rstrip())
    text = output.split("goodput: ")[1]
    lines = text.splitlines()
    for basis in ("measured", "published", "assumed"):
        assert basis in text
    marked = next(line for line in lines if line.startswith("> 1024"))
    assert marked.endswith("99.89 % to 98.90 %")
    assert "(recommended, 567 s)" in text
    assert "(the config's, 14 s)" in text
    assert "best: 99 % is reached" in text
    assert "worst: 99 % is NOT reached, for want of" in text
    assert "worst, but for one assumption: detection 99.2" in text
    assert "Each 600 s more" in text


def test_a_config_that_saves_as_recommended_is_told_once():
    every_steps = as_json(*GIANT)[1]["every_steps"]
    text = planned(*GIANT, "--goodput", f"checkpoint.every_steps={every_steps}")
    assert text.count("with checkpoint.every_steps=") == 1


def test_a_size_of_its_own_is_a_row_of_its_own():
    _, goodput = as_json(CONFIGS / "vit_huge_patch14.yaml", "--gpus", 8)
    assert [row["gpus"] for row in goodput["sizes"]] == [8, 64, 256, 1024, 4096, 16_384]


def test_seconds_of_a_step_alone_are_refused():
    result = CliRunner().invoke(command, [*map(str, GIANT), "--step-s", "1"])
    assert result.exit_code == 2
    assert "add --goodput" in result.output
