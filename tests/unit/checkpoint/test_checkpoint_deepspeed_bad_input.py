"""Folders of DeepSpeed's that are damaged, incomplete, hostile or of something else: one clear line, nothing executed.

The files are laid out as DeepSpeed 0.19.8 lays them out, which tests/distributed/test_checkpoint_deepspeed_files.py
has it do itself.
"""

import logging
import os
import random
import shutil
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from vitscale.checkpoint import Hints, read_portable
from vitscale.checkpoint.deepspeed_files import read_deepspeed
from vitscale.cli.main import main
from vitscale.config import load_config
from vitscale.errors import CheckpointError, ConfigError
from vitscale.model import create_model
from vitscale.ranks.groups import Ranks
from vitscale.train.adoption import adopt_deepspeed
from vitscale.train.build import draw_blueprint

TINY = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
WORLD_SIZE = 4
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL, MODEL_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def small_state():
    """Of a model that was trained a while: no two of its parameters have equal values."""
    generator = torch.Generator().manual_seed(0)
    state = create_model(TINY, **SMALL).state_dict()
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}


def model_states(shapes, module, **changes):
    return {
        "module": module, "buffer_names": [], "optimizer": None, "param_shapes": shapes, "frozen_param_shapes": None,
        "shared_params": {}, "frozen_param_fragments": None, "global_steps": 8, "skipped_steps": 0,
        "dp_world_size": WORLD_SIZE, "mp_world_size": 1, "ds_version": "0.19.8", **changes,
    }  # fmt: skip


def write_stage_2(tag):
    """A tag of four ranks, in two parameter groups."""
    tag.mkdir(parents=True)
    state = small_state()
    groups = [{name: value for name, value in state.items() if (value.ndim > 1) == matrix} for matrix in (True, False)]
    shapes = [OrderedDict((name, value.shape) for name, value in group.items()) for group in groups]
    torch.save(model_states(shapes, {name: value.bfloat16() for name, value in state.items()}), tag / MODEL)
    flats = [torch.cat([value.flatten() for value in group.values()]) for group in groups]
    sizes = [-(-flat.numel() // WORLD_SIZE) for flat in flats]
    for rank in range(WORLD_SIZE):
        partition = {
            "zero_stage": ZeroStageEnum.gradients, "loss_scaler": LossScaler(scale=1),
            "partition_count": [WORLD_SIZE] * 2,
            "single_partition_of_fp32_groups": [flats[i][rank * sizes[i]:][:sizes[i]].clone() for i in (0, 1)],
            "param_slice_mappings": [addresses(groups[i], rank, sizes[i]) for i in (0, 1)],
            "base_optimizer_state": {"state": {}, "param_groups": []},
        }  # fmt: skip
        torch.save({"optimizer_state_dict": partition, "ds_version": "0.19.8"}, tag / OPTIM.format(rank))
    return tag


def addresses(group, rank, size):
    """Where the parameters of a group lie in a rank's partition of `size` elements."""
    found, start = OrderedDict(), -rank * size
    for name, value in group.items():
        low, high = max(0, start), min(size, start + value.numel())
        if low < high:
            found[name] = fragment_address(numel=high - low, start=low)
        start += value.numel()
    return found


def write_stage_3(tag):
    tag.mkdir(parents=True)
    state = small_state()
    shapes = [OrderedDict((name, value.shape) for name, value in state.items())]
    for rank in range(WORLD_SIZE):
        placeholders = {name: torch.empty(0) for name in state}
        torch.save(model_states(shapes, placeholders), tag / MODEL_3.replace("rank_0", f"rank_{rank}", 1))
        pieces = []
        for value in state.values():
            padded = -(-value.numel() // WORLD_SIZE)
            flat = torch.nn.functional.pad(value.flatten(), (0, padded * WORLD_SIZE - value.numel()))
            pieces.append(flat[rank * padded :][:padded])
        partition = {
            "zero_stage": ZeroStageEnum.weights, "loss_scaler": LossScaler(scale=1), "partition_count": WORLD_SIZE,
            "optimizer_state_dict": {"state": {}, "param_groups": []}, "fp32_flat_groups": [torch.cat(pieces)],
        }  # fmt: skip
        torch.save({"optimizer_state_dict": partition}, tag / OPTIM.format(rank))
    return tag


def write_stage_0(tag):
    """In bf16 with a fused optimizer: its fp32 weights are flat and have no names."""
    tag.mkdir(parents=True)
    state = small_state()
    flats = [
        torch.cat([value.flatten() for value in state.values() if (value.ndim > 1) == matrix])
        for matrix in (True, False)
    ]
    low = {name: value.bfloat16() for name, value in state.items()}
    torch.save(model_states(None, low, optimizer={"fp32_groups_flat": flats}), tag / MODEL)
    return tag


def write_universal(tag):
    tag.mkdir(parents=True)
    state = small_state()
    shapes = [OrderedDict((name, value.shape) for name, value in state.items())]
    torch.save(model_states(shapes, {}), tag / MODEL)
    for name, value in state.items():
        (tag / "zero" / name).mkdir(parents=True)
        torch.save({"param": value}, tag / "zero" / name / "fp32.pt")
    return tag


WRITERS = {"stage 0": write_stage_0, "stage 2": write_stage_2, "stage 3": write_stage_3, "universal": write_universal}


@pytest.fixture
def saved(tmp_path):
    """What save_checkpoint leaves: a tag, and `latest`."""
    write_stage_2(tmp_path / "run" / "global_step8")
    (tmp_path / "run" / "latest").write_text("global_step8")
    return tmp_path / "run"


def read(path, **hints):
    return read_portable(path, "deepspeed", Hints(TINY, SMALL, **hints)).build()


def refusal(path, read=read, **hints):
    with pytest.raises(CheckpointError) as caught:
        read(path, **hints)
    said = str(caught.value)
    assert said.isprintable(), said  # one line, without a terminal's colours
    return said


def outcome(path):
    """The line with which a folder is refused; empty where it is read."""
    try:
        read(path)
    except CheckpointError as error:
        return str(error)
    return ""


def edit(path, change):
    """Change what a file holds."""
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_sound_folders_of_these_tests_are_read(tmp_path, kind):
    """The tests below would pass on any folder that is not."""
    tag = WRITERS[kind](tmp_path / "run" / "global_step8")
    model = read_portable(tmp_path / "run", hints=Hints(TINY, SMALL)).build()
    expected = small_state()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert read_portable(tag, hints=Hints(TINY, SMALL)).origin.path == "run/global_step8"


# Which tag.


def test_a_folder_without_latest_and_without_tags(tmp_path):
    (tmp_path / "zero_to_fp32.py").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path}: no `latest` and no tag of DeepSpeed's here: give the folder that DeepSpeed's save_checkpoint was "
        "given, or one of its tags"
    )


def test_a_latest_without_any_tag(tmp_path):
    (tmp_path / "latest").write_text("global_step8\n")
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / 'latest'}: names 'global_step8', which is no tag with files in it: give ")


@pytest.mark.parametrize("named", ["global_step9", "../run/global_step8", "\x1b[31m", ""])
def test_a_latest_that_names_no_tag_lists_those_there_are(saved, named):
    (saved / "latest").write_text(named)
    said = refusal(saved)
    assert said.startswith(f"{saved / 'latest'}: names ")
    assert said.endswith(f": give one of its tags itself, such as {saved / 'global_step8'} (there are global_step8)")


def test_several_tags_and_no_latest_are_not_guessed_at(saved):
    write_stage_2(saved / "global_step10")
    (saved / "latest").unlink()
    assert refusal(saved) == (
        f"{saved}: nothing says which tag is meant: give one of its tags itself, such as {saved / 'global_step10'} "
        "(there are global_step8, global_step10)"
    )


@contextmanager
def without_privileges():
    """File modes say nothing to root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_may_not_be_read(tmp_path):
    path = tmp_path / "run"
    path.mkdir(mode=0)
    with without_privileges():
        assert refusal(path, read=read_deepspeed) == f"{path}: cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["latest", f"global_step8/{MODEL}"])
def test_a_file_that_may_not_even_be_asked_for(saved, name):
    path = saved / name
    path.unlink()
    path.symlink_to("x" * 300)  # stat fails, for root too
    assert refusal(saved, read=read_deepspeed) == f"{path}: cannot be read: File name too long"


# Files of a tag.


@pytest.mark.parametrize("kind", ["stage 2", "stage 3"])
def test_a_missing_partition_is_named_with_how_many_there_are(tmp_path, kind):
    tag = WRITERS[kind](tmp_path / "run" / "global_step8")
    write_stage_2(tmp_path / "run" / "global_step4")
    (tag / OPTIM.format(2)).unlink()
    assert refusal(tag) == (
        f"{tag}: {OPTIM.format(2)} is missing: 4 ranks wrote this checkpoint and the files of 3 are here: copy what is "
        "missing, or import another tag (global_step4)"
    )


def test_a_tag_whose_save_was_cut_off_before_the_weights(saved):
    (saved / "global_step8" / MODEL).unlink()
    assert refusal(saved) == (
        f"{saved / 'global_step8'}: neither {MODEL} nor {MODEL_3} is here: the save was cut off, or not all files were "
        "copied, from where it was saved"
    )


def test_a_parameter_that_a_universal_checkpoint_lacks(tmp_path):
    tag = write_universal(tmp_path / "run" / "global_step8")
    shutil.rmtree(tag / "zero" / "norm.weight")
    said = refusal(tag)
    assert said.startswith(f"{tag / 'zero' / 'norm.weight' / 'fp32.pt'}: missing: ")


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", [MODEL, OPTIM.format(1)])
def test_a_truncated_file_is_named(saved, name, kept):
    path = saved / "global_step8" / name
    os.truncate(path, kept if isinstance(kept, int) else int(path.stat().st_size * kept))
    assert refusal(saved).startswith(f"{path}: truncated or damaged, no readable torch checkpoint (")


def test_a_flipped_bit_is_seen_which_deepspeed_and_torch_do_not(saved):
    path = saved / "global_step8" / OPTIM.format(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=False)
    said = refusal(saved)
    assert said.startswith(f"{path}: damaged: ")
    assert said.endswith("is not what its CRC-32 says: copy the file anew")


def test_a_compressed_file_whose_tensors_do_not_lie_in_it(saved):
    path = saved / "global_step8" / OPTIM.format(1)
    sound = path.with_suffix(".sound")
    path.rename(sound)
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.namelist():
            packed.writestr(entry, source.read(entry))
        first = source.namelist()[0]
    assert refusal(saved) == (
        f"{path}: {first} is compressed, which torch.save never does: copy the file anew from where it was saved"
    )


def test_a_file_that_ends_within_a_tensor_while_it_is_read(saved):
    model = read_portable(saved, "deepspeed", Hints(TINY, SMALL))
    path = saved / "global_step8" / OPTIM.format(0)
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match=f"cannot be read: {path}: truncated: the file ends within a tensor"):
        model.build()


def test_a_partition_of_another_save(saved):
    path = saved / "global_step8" / OPTIM.format(3)
    edit(path, lambda tree: tree["optimizer_state_dict"].update(partition_count=[2, 2]))
    assert refusal(saved) == f"{path}: one of 2 partitions, where 4 ranks saved: it is of another save"


def test_a_save_over_an_older_one_that_was_cut_off(saved):
    tag = saved / "global_step8"
    for rank in range(WORLD_SIZE):
        edit(tag / OPTIM.format(rank), lambda tree, rank=rank: with_moments(tree, updates=8 if rank < 3 else 4))
    assert refusal(saved) == (
        f"{tag / OPTIM.format(3)}: after 4 updates, where {OPTIM.format(0)} is after 8: a save over an older one was "
        "cut off: import another tag"
    )


def test_partitions_that_do_not_make_up_a_parameter(saved):
    tag = saved / "global_step8"
    edit(
        tag / OPTIM.format(0), lambda tree: tree["optimizer_state_dict"]["param_slice_mappings"][0].popitem(last=False)
    )
    said = refusal(saved)
    assert said.startswith(f"{tag}: its partitions hold 0 of the 16 elements of cls_token: ")


def test_a_run_that_is_outside_its_partition(saved):
    def move(tree):
        tree["optimizer_state_dict"]["param_slice_mappings"][0]["cls_token"].start = 10**12

    edit(saved / "global_step8" / OPTIM.format(0), move)
    assert "cls_token cannot be read: elements 1000000000000 to 1000000000016 of a tensor" in refusal(saved)


def test_partitions_of_stage_3_whose_elements_are_elsewhere(tmp_path):
    """As under MiCS, and with the optimizer's state on NVMe."""
    tag = write_stage_3(tmp_path / "global_step8")
    path = tag / OPTIM.format(1)
    edit(path, lambda tree: tree["optimizer_state_dict"].update(fp32_flat_groups=[torch.zeros(5)]))
    said = refusal(tag)
    assert said.startswith(f"{path}: has 5 elements of group 0, where ")
    assert said.endswith("were expected: the rest is elsewhere (MiCS, NVMe), or the file is of another save")


def test_a_universal_parameter_of_another_shape(tmp_path):
    tag = write_universal(tmp_path / "global_step8")
    path = tag / "zero" / "norm.weight" / "fp32.pt"
    torch.save({"param": torch.ones(17)}, path)
    assert refusal(tag) == f"{path}: has shape [17], where [16] was expected"


@pytest.mark.parametrize("name", ["{}", "../../outside", "a/b", ".", ".."])
def test_a_name_that_leads_out_of_a_universal_checkpoint(tmp_path, name):
    tag = write_universal(tmp_path / "global_step8")
    name = name.format(tmp_path / "outside")
    (tag / "zero" / name).mkdir(exist_ok=True, parents=True)
    torch.save({"param": torch.ones(2)}, tag / "zero" / name / "fp32.pt")
    edit(tag / MODEL, lambda tree: tree["param_shapes"][0].update({name: (2,)}))
    assert f"(ValueError: {name!r} is no name of a parameter)" in refusal(tag)


def test_fp32_weights_that_are_not_the_modules(tmp_path):
    tag = write_stage_0(tmp_path / "global_step8")
    edit(tag / MODEL, lambda tree: tree["optimizer"]["fp32_groups_flat"][1].mul_(1.5))
    assert "(ValueError: an fp32 weight rounds to no weight of the module): it is damaged, or of" in refusal(tag)


def test_files_of_two_saves_at_other_stages(saved):
    shutil.copy(saved / "global_step8" / MODEL, saved / "global_step8" / MODEL_3)
    assert refusal(saved) == (
        f"{saved / 'global_step8'}: {MODEL} and {MODEL_3} are of two saves, at ZeRO 3 and at another stage: move the "
        "files of one away"
    )


def test_files_of_two_saves_in_other_precisions(saved):
    tag = saved / "global_step8"
    shutil.copy(tag / OPTIM.format(0), tag / f"bf16_{OPTIM.format(0)}")
    said = refusal(saved)
    assert said.startswith(
        f"{tag}: {OPTIM.format('N')} and bf16_{OPTIM.format('N')} are of two saves in different prec"
    )


# What is not read.


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallelism"),
        ("layer_03-model_00-model_states.pt", "pipeline parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
    ],
)
def test_parallelism_other_than_zero_is_refused(saved, name, what):
    (saved / "global_step8" / name).touch()
    assert refusal(saved) == (
        f"{saved / 'global_step8'}: {name} is of a model under {what}, which is not read here: only ZeRO's partitions "
        "are: save the whole model as a state dict, and import that"
    )


def test_a_model_over_several_ranks_is_refused(saved):
    path = saved / "global_step8" / MODEL
    edit(path, lambda tree: tree.update(mp_world_size=2))
    assert refusal(saved) == f"{path}: the model is spread over 2 ranks, which is not read here"


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: {key: value for key, value in tree.items() if key != "param_shapes"},
        lambda tree: tree | {"dp_world_size": "4"},
        lambda tree: tree | {"param_shapes": [["norm.weight"]]},
        lambda tree: tree | {"param_shapes": [*tree["param_shapes"], {"cls_token": ("a",)}]},
        lambda tree: tree | {"module": {5: torch.ones(2)}},
        lambda tree: tree | {"module": {"\x1b[31m": torch.ones(2)}},
        lambda tree: tree | {"param_shapes": [{"a\nb": (2,)}]},
        lambda tree: tree | {"module": None},
        lambda tree: tree | {"shared_params": {"a": "b"}},
        lambda tree: tree | {"global_steps": "many"},
        lambda tree: [1, 2],
        lambda tree: torch.ones(3),
    ],
)
def test_another_layout_is_said_and_not_guessed_at(saved, change):
    path = saved / "global_step8" / MODEL
    torch.save(change(torch.load(path, weights_only=False)), path)
    said = refusal(saved)
    assert said.startswith(f"{saved / 'global_step8'}: not laid out as DeepSpeed 0.19 does it (")
    assert said.endswith("): it is damaged, or of another release")


def test_a_partition_without_what_it_should_have(saved):
    edit(
        saved / "global_step8" / OPTIM.format(2), lambda tree: tree["optimizer_state_dict"].pop("param_slice_mappings")
    )
    assert "not laid out as DeepSpeed 0.19 does it (KeyError: 'param_slice_mappings')" in refusal(saved)


def test_weights_that_are_no_numbers(saved):
    path = saved / "global_step8" / OPTIM.format(0)
    edit(path, lambda tree: tree["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][:3].fill_(float("nan")))
    assert "cls_token: 3 of 16 values are NaN or infinite" in refusal(saved)


def test_the_shapes_of_another_model(saved):
    with pytest.raises(CheckpointError) as caught:
        read_portable(saved, hints=Hints(TINY))
    assert str(caught.value) == (
        f"{saved / 'global_step8'}: cls_token has shape [1, 1, 16], the model wants [1, 1, 192]: it was taken for "
        f"{TINY}: say what it is with --model"
    )


def test_without_a_name_nothing_says_what_the_model_is(saved):
    with pytest.raises(CheckpointError, match=r"global_step8: a file without a config tells neither .* --model"):
        read_portable(saved)


# Pickles.


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Failing:
    """Cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)


class Class:
    """Harmless, but it could be anything."""


@pytest.fixture(params=[MODEL, OPTIM.format(2)])
def armed(request, saved, tmp_path):
    """A tag with a pickle in one of its files that would leave a file behind."""
    canary = tmp_path / "canary"
    path = saved / "global_step8" / request.param
    edit(path, lambda tree: tree.update(client=Bomb(canary)))
    return saved, path, canary


@pytest.mark.fault(32)
def test_a_pickle_is_refused_and_never_executed(armed):
    saved, path, canary = armed
    said = refusal(saved)
    assert said.startswith(f"{path}: holds more than tensors, which only executing it could read: refused (")
    assert "posix.system" in said
    assert said.endswith("): give --unsafe-pickle if you trust whoever wrote it")
    assert not canary.exists()


def test_unsafe_pickle_executes_it_and_says_so(armed, caplog):
    saved, path, canary = armed
    with caplog.at_level(logging.WARNING):
        read(saved, unsafe_pickle=True)
    assert canary.exists()  # else the test above would show nothing
    assert caplog.messages == [f"--unsafe-pickle: executing {path}, which can do whatever this account can"]


def test_unsafe_pickle_executes_nothing_that_can_be_read_without(saved, caplog):
    with caplog.at_level(logging.WARNING):
        read(saved, unsafe_pickle=True)
    assert caplog.messages == []


def test_an_unsafe_pickle_that_fails_is_one_line(saved):
    path = saved / "global_step8" / MODEL
    edit(path, lambda tree: tree.update(client=Failing()))
    assert refusal(saved, unsafe_pickle=True).startswith(
        f"{path}: truncated or damaged, no readable torch checkpoint ("
    )


def test_a_class_is_refused_by_its_name(saved):
    path = saved / "global_step8" / MODEL
    edit(path, lambda tree: tree.update(client=Class()))
    said = refusal(saved)
    assert said.startswith(f"{path}: holds more than tensors, ")
    assert f"{Class.__module__}.Class" in said


def test_stand_ins_do_nothing_with_what_they_are_given(saved, tmp_path):
    """A file may call them with anything, and give them any state."""
    path = saved / "global_step8" / MODEL

    class Called:
        def __reduce__(self):
            return LossScaler, (1, "touch me", {"a": []}), {"__class__": "int", "cur_scale": 5}

    edit(path, lambda tree: tree.update(client=Called()))
    read(saved)


def test_a_list_that_holds_itself_is_no_endless_loop(saved):
    def coil(tree):
        tree["client"] = []
        tree["client"].append(tree["client"])

    path = saved / "global_step8" / MODEL
    edit(path, coil)
    assert refusal(saved).startswith(f"{path}: truncated or damaged, no readable torch checkpoint (maximum recursion")


@pytest.mark.parametrize("kind", WRITERS)
def test_no_damage_ends_in_another_error(tmp_path, kind):
    tag = WRITERS[kind](tmp_path / "global_step8")
    chance = random.Random(0)
    files = sorted(path for path in tag.rglob("*.pt"))
    refused = 0
    for _ in range(60):
        path = chance.choice(files)
        sound = path.read_bytes()
        damaged = bytearray(sound)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        for _ in range(chance.randrange(1, 4)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        said = outcome(tag)
        assert said.isprintable()
        refused += bool(said)
        path.write_bytes(sound)
    assert refused >= 30  # a byte of the archive's padding or of a time says nothing
    read(tag)


# Training state.


def test_moments_are_not_moved_up_into_a_gap(saved):
    for rank in range(WORLD_SIZE):
        edit(saved / "global_step8" / OPTIM.format(rank), with_moments)
    edit(
        saved / "global_step8" / OPTIM.format(2),
        lambda tree: tree["optimizer_state_dict"]["base_optimizer_state"]["state"].pop(0),
    )
    moments = read_deepspeed(saved).moments["exp_avg"]
    expected = small_state()
    outcomes = {name: moment_outcome(make) for name, make in moments.items()}
    refused = {name for name, found in outcomes.items() if isinstance(found, str)}
    assert refused
    assert {outcomes[name] for name in refused} == {"rank 2 saved nothing of parameter group 0"}
    assert all(torch.equal(outcomes[name], expected[name] + 1) for name in expected.keys() - refused)


def moment_outcome(make):
    try:
        return make()
    except ValueError as error:
        return str(error)


def test_a_training_state_without_moments_is_refused(saved, micro_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"global_step8: says nothing of Adam's moments by the parameter's name"):
        adopt_deepspeed(saved, load_config(micro_config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_training_state_goes_over_nothing(saved, micro_config, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out: exists already: choose another --out, or remove it"):
        adopt_deepspeed(saved, load_config(micro_config), tmp_path / "out")


def test_a_training_state_for_which_there_is_no_place(saved, micro_config, tmp_path):
    for rank in range(WORLD_SIZE):
        path = saved / "global_step8" / OPTIM.format(rank)
        edit(path, with_moments)
    changes = SMALL | {"representation_size": 0}
    config = load_config(micro_config, [f"model.{key}={value}" for key, value in changes.items()])
    tag = adopt_deepspeed(saved, config, tmp_path / "out")
    assert tag == tmp_path / "out" / "checkpoints" / "step-00000008"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/out/checkpoints.*: Not a directory: nothing was imported"):
        adopt_deepspeed(saved, config, tmp_path / "file" / "out")


def with_moments(tree, updates=8):
    partition = tree["optimizer_state_dict"]
    partition["base_optimizer_state"]["state"] = {
        group: {"step": torch.tensor(float(updates)), "exp_avg": flat + 1, "exp_avg_sq": flat + 2}
        for group, flat in enumerate(partition["single_partition_of_fp32_groups"])
    }


def test_a_config_that_starts_from_deepspeeds_files_is_told_the_way(saved, micro_config):
    config = load_config(micro_config, [f"init.path={saved}"])
    with pytest.raises(ConfigError, match=f"init.path {saved}: nothing in it says what it is: `vitscale import "):
        draw_blueprint(config, Ranks(0, 1, 0, 1, torch.device("cpu")))


# The command.


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code


CHANGES = [f"model.{key}={value}" for key, value in SMALL.items() if key != "num_classes"]


def test_the_command_writes_our_format_with_a_certificate(saved, tmp_path, capsys):
    assert run("import", saved, "--model", TINY, *CHANGES, "--out", tmp_path / "out") == 0
    assert "bitwise equal" in capsys.readouterr().out
    model, expected = read_portable(tmp_path / "out"), small_state()
    assert all(torch.equal(model.checked(name), expected[name]) for name in expected)
    assert model.trained["source"] == "run/global_step8"
    assert (tmp_path / "out" / "certificate.json").is_file()


def test_the_command_ends_in_one_line_and_executes_only_when_told(armed, tmp_path, capsys):
    saved, path, canary = armed
    words = ("import", saved, "--from", "deepspeed", "--model", TINY, *CHANGES, "--out", tmp_path / "out")
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: holds more than tensors, ")
    assert said.count("\n") == 1
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    assert run(*words, "--unsafe-pickle") == 0
    assert canary.exists()


@pytest.mark.parametrize(
    "words", [("--model", TINY), ("--features-only",), ("--from", "timm"), ("--precision", "bf16")]
)
def test_the_command_takes_no_changes_of_a_training_state(saved, micro_config, tmp_path, capsys, words):
    assert run("import", saved, "--training", micro_config, "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert said == f"error: {words[0]} has no effect with --training, which takes the state as it is: leave it out\n"


def test_the_command_says_that_a_training_state_is_not_there(saved, micro_config, tmp_path, capsys):
    file = saved / "latest"
    for path, what in ((tmp_path / "nowhere", "no such folder"), (file, "is a file"), (file / "run", "no such folder")):
        assert run("import", path, "--training", micro_config, "--out", tmp_path / "out") == 2
        assert capsys.readouterr().err == (
            f"error: {path}: {what}: give the folder that DeepSpeed's save_checkpoint was given, or one of its tags\n"
        )
