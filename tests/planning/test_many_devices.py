"""What a plan says of many devices: memory by scheme, bytes on the wire by formulas, what would make it fit, and the verb."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qat import plan
from qat.planning.devices import DEVICES, GIB, device
from qat.planning.facts import Coded, Facts, Saved, Weights
from qat.planning.memory import CODES, DDP, FSDP2, ONE, Choice, Student, fits, host, parts, schemes, whole
from qat.planning.remedies import EIGHT_BITS, remedies
from qat.planning.speed import bytes_sent, speed
from qat.planning.table import advice

LATENTS = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
BLOCK = Weights(LATENTS, ((4096, 1), (4096, 1)), tuple(Coded(n, k // 4, 16) for n, k in LATENTS))
ROOT = Weights(latent=(), other=((32000, 4096), (32000, 4096), (4096, 1)))
SEVEN = Facts(ROOT, (BLOCK,) * 32, 4096, Saved(1_700_000_000, 38 * GIB), Saved(20, 2 * GIB), 13.9e9, 32000)
LATENT, OTHER = SEVEN.latents, SEVEN.parameters - SEVEN.latents
PLAIN, TAUGHT = Student(SEVEN), Student(SEVEN, SEVEN)
CHOICE = Choice(FSDP2, 8, 1, batch=1)


def test_seven_billion() -> None:
    assert SEVEN.parameters == 6_738_415_616 and LATENT == 32 * 202_375_168


@pytest.mark.parametrize("world", [2, 8, 64])
def test_bytes_sent_are_those_of_the_rings(world: int) -> None:
    share = (world - 1) / world
    sent = {one: bytes_sent(PLAIN, replace(CHOICE, scheme=one, devices=world)) for one in (DDP, FSDP2, CODES)}
    assert sent[DDP] == pytest.approx(8 * SEVEN.parameters * share)
    assert sent[FSDP2] == pytest.approx(12 * SEVEN.parameters * share, rel=2e-3)
    assert sent[CODES] == pytest.approx((4.5 * LATENT + 12 * OTHER) * share, rel=2e-3)
    assert bytes_sent(TAUGHT, replace(CHOICE, devices=world, teacher=2.0)) - sent[FSDP2] == pytest.approx(
        2 * SEVEN.parameters * share, rel=2e-3
    )


def test_steps_that_need_floats_gather_floats() -> None:
    codes, floats, half = (
        bytes_sent(PLAIN, replace(CHOICE, scheme=scheme, floats=share))
        for scheme, share in ((CODES, 0), (FSDP2, 0), (CODES, 0.5))
    )
    assert half == pytest.approx((codes + floats) / 2, abs=1)
    plain, coded, mixed = (
        parts(PLAIN, replace(CHOICE, scheme=one, floats=share)) for one, share in ((FSDP2, 0), (CODES, 0), (CODES, 0.5))
    )
    assert mixed == plain and "codes for backward" in plain
    assert coded["codes for backward"] == SEVEN.saved.fixed - LATENT // 4
    assert plain["gathered"] - coded["gathered"] == 2 * (4 * 4 - 1) * sum(n * k for n, k in LATENTS) // 4


def test_rows_that_do_not_divide_are_padded() -> None:
    odd = replace(SEVEN, root=Weights((), ((5, 10),)), blocks=())
    assert bytes_sent(Student(odd), replace(CHOICE, devices=4)) == 3 * 3 * 2 * 10 * 4  # 2 rows on each of 4, of which 3 are sent
    assert odd.part(4) == 20 and bytes_sent(Student(odd), replace(CHOICE, scheme=ONE, devices=1)) == 0


def test_accumulated_batches_send_gradients_once_with_ddp_and_weights_each_time_with_fsdp2() -> None:
    for scheme, times in ((DDP, 1), (FSDP2, 4)):
        once, often = (bytes_sent(PLAIN, replace(CHOICE, scheme=scheme, accumulate=n)) for n in (1, 4))
        assert often == times * once


def test_sums_in_float64_take_eight_bytes_on_the_wire_and_on_the_device() -> None:
    exact = replace(CHOICE, exact=True, accumulate=2)
    assert bytes_sent(PLAIN, exact) - bytes_sent(PLAIN, replace(CHOICE, accumulate=2)) == pytest.approx(
        2 * 4 * SEVEN.parameters * 7 / 8, rel=2e-3
    )
    ring = [bytes_sent(PLAIN, replace(exact, scheme=DDP, exact=wide)) for wide in (True, False)]
    assert ring[0] - ring[1] == 2 * 7 * 4 * SEVEN.parameters // 8
    for scheme, devices in ((ONE, 1), (DDP, 8), (FSDP2, 8)):
        found, before = (parts(PLAIN, replace(exact, scheme=scheme, devices=devices, exact=wide)) for wide in (True, False))
        assert found["sums of gradients"] == 2 * before["gradients"] and "sums of gradients" not in before
    assert "sums of gradients" not in parts(PLAIN, replace(exact, scheme=ONE, devices=1, accumulate=1))


def test_moments_beside_the_device_take_a_matrix_of_it_and_the_cpus_memory() -> None:
    one = Choice(ONE, 1, 1, batch=1)
    away = replace(one, state=0.0, resting=8.0)
    assert parts(PLAIN, one)["optimizer"] == 8 * SEVEN.parameters and parts(PLAIN, away)["optimizer"] == 8 * 32000 * 4096
    assert host(PLAIN, away) - host(PLAIN, one) == 8 * SEVEN.parameters
    assert remedies(PLAIN, one, 72 * GIB)[-1].setting == "optim=adamw_offloaded"


def test_each_process_has_copies_in_the_cpus_memory_and_the_whole_model_is_measured() -> None:
    count = SEVEN.parameters
    assert whole(PLAIN) == 4 * count and host(PLAIN, Choice(ONE, 1, 1, batch=1)) == 12 * count
    assert host(PLAIN, CHOICE) == 8 * 12 * count == host(TAUGHT, replace(CHOICE, teacher=4.0))  # which is the model as it came
    assert host(TAUGHT, replace(CHOICE, teacher=2.0)) == 8 * (12 + 2) * count
    two = replace(CHOICE, devices=2)
    assert host(PLAIN, two) == (2 * 8 + 12) * count == host(PLAIN, replace(two, nodes=4))  # a checkpoint, by the first of two
    assert advice(PLAIN, CHOICE, replace(DEVICES["h100"], memory=24 * GIB))[-1].startswith(
        "before and after training a run measures the model on each device: the 25.1 GiB of whole float32 weights do not fit"
    )
    assert advice(PLAIN, CHOICE, DEVICES["h100"]) == []


def test_shards_divide_what_lasts_and_not_what_a_batch_leaves() -> None:
    whole, shared = (parts(TAUGHT, replace(CHOICE, scheme=one, batch=2, teacher=4.0)) for one in (DDP, FSDP2))
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert shared[name] == pytest.approx(whole[name] / 8, rel=1e-3)
    assert whole["weights"] == 4 * SEVEN.parameters and whole["optimizer"] == 8 * SEVEN.parameters
    assert [shared[name] for name in ("codes for backward", "activations")] == [
        whole[name] for name in ("codes for backward", "activations")
    ]
    assert "gathered" not in whole and shared["gathered"] >= 2 * (2 * 4 * BLOCK.count + 4 * ROOT.count)
    less = parts(TAUGHT, replace(CHOICE, batch=2, teacher=4.0, checkpointing=True))
    assert less["activations"] < shared["activations"] / 4 and less["codes for backward"] < shared["codes for backward"] / 30


def test_what_would_fit_is_tried_in_order_and_no_more_than_is_needed() -> None:
    found = remedies(TAUGHT, replace(CHOICE, scheme=DDP, batch=4, teacher=4.0), 79 * GIB)
    assert [one.setting for one in found] == ["trainer.activation_checkpointing=true", "trainer.strategy=fsdp2"]
    assert found[0].bytes > found[1].bytes and fits(TAUGHT, found[1].choice, 79 * GIB)
    assert found[1].bytes == sum(parts(TAUGHT, found[1].choice).values())
    assert remedies(TAUGHT, found[1].choice, 79 * GIB) == []


def test_on_one_device_eight_bits_and_a_teacher_in_sixteen() -> None:
    one = Choice(ONE, 1, 1, batch=4, teacher=4.0)
    found = remedies(TAUGHT, one, 90 * GIB)
    assert [each.setting for each in found][:3] == [
        "trainer.activation_checkpointing=true",
        "optim=adamw_8bit",
        "model.teacher_dtype=bfloat16",
    ]
    assert found[1].choice.state == EIGHT_BITS and found[2].choice.teacher == 2.0
    assert found[-1].setting == "data.batch_size=1 trainer.accumulate_grad_batches=4"
    assert found[-1].choice.sequences == one.sequences and fits(TAUGHT, found[-1].choice, 90 * GIB)


def test_where_settings_do_not_help_the_devices_that_would_are_named() -> None:
    found = remedies(TAUGHT, Choice(ONE, 1, 1, batch=1, teacher=4.0), 39 * GIB)
    assert (
        found[-1].setting == "trainer.strategy=fsdp2 trainer.devices=8 trainer.num_nodes=1" and found[-1].bytes < 0.9 * 39 * GIB
    )
    assert not fits(TAUGHT, remedies(TAUGHT, CHOICE, GIB)[-1].choice, GIB)


def test_time_is_compute_and_travel_hidden_or_not() -> None:
    choice = replace(CHOICE, nodes=2, mixed=True)
    found = speed(PLAIN, choice, DEVICES["h100"])
    assert found.tokens == 16 * 4096 and found.compute == pytest.approx(4096 * 3 * 13.9e9 / (0.4 * 989e12))
    assert found.travel == pytest.approx(found.sent / 50e9)
    assert found.seconds == (max(found.compute, found.travel), found.compute + found.travel)
    low, high = found.hours(10**9)
    assert low < high and high == pytest.approx(10**9 / found.tokens * (found.compute + found.travel) / 3600)
    again = speed(PLAIN, replace(choice, checkpointing=True), DEVICES["h100"])
    assert again.compute == pytest.approx(found.compute * 4 / 3)
    assert speed(PLAIN, replace(choice, nodes=1), DEVICES["h100"]).travel < found.travel / 5


def test_devices_are_records_whose_values_may_be_given() -> None:
    assert device("H100,memory=94,wire=25") == replace(DEVICES["h100"], memory=94 * GIB, wire=25e9)
    for words, said in (
        ("h1000", "must be one of b200, h200"),
        ("h100,ram=3", "KEY=NUMBER"),
        ("h100,share=2", "share at most 1"),
    ):
        with pytest.raises(ValueError, match=said):
            device(words)
    assert [one.name for one in schemes(1)] == ["one device"] and len(schemes(64)) == 3


def test_the_verb_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    on = ["--on", "4090,memory=0.001", "--tokens", "1M"]
    words = [str(tmp_path), *on, "trainer.devices=2", "data.sequence_length=64", "distill=kl"]
    assert plan.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 x 4090" in lines[0] and any("fsdp2, codes gathered" in line for line in lines)
    weights = next(line for line in lines if line.strip().startswith("weights"))
    assert "658,688 bytes" in weights and weights.count("329,344 bytes") == 2  # 4 bytes each, on each of two half of them
    assert any("trainer.activation_checkpointing=true: " in line for line in lines)
    assert plan.main([*words[:4], "1", *words[5:]]) == 2 and "less than one sequence" in capsys.readouterr().err
    assert plan.main([str(tmp_path / "none"), *words[1:]]) == 2
    with pytest.raises(SystemExit, match="2"):
        plan.main([str(tmp_path), "--on", "h100", "--hours", "1"])


def test_a_size_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["1b", "--on", "h100", "trainer.devices=8", "trainer.num_nodes=8", "trainer.strategy=fsdp2", "--tokens", "1B"]
    assert plan.main([*words, "data.sequence_length=2048"]) == 0
    assert capsys.readouterr().out.startswith("1,235,814,400 parameters, 973,078,528 of them codes; 64 x h100")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["7x", "--on", "h100"], "model.path=7x: of models named by their size alone there are 1b, 3b, 7b, 8b, 13b, 34b, 70b"),
        (["135M"], "model.path=135M: of models named by their size alone there are 1b"),
        (["7b"], "model.path=7b is a size without weights, for --on DEVICE, as h100; give a model"),
    ],
)
def test_sizes_that_are_no_model_are_refused_without_a_look_at_the_hub(words: list[str], said: str, capsys) -> None:
    assert plan.main([*words, "--tokens", "1B"]) == 2
    assert said in capsys.readouterr().err
