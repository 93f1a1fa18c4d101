"""`load_pretrained` from end to end: weights as they are published, behind a real server, to a model that fits."""

import hashlib
import io
import threading
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from portable_models import random_portable
from timm.layers import resample_abs_pos_embed

import vitscale
from vitscale.checkpoint import FORMATS, Origin, PortableModel, load_pretrained, pretrained
from vitscale.checkpoint.download import OFFLINE_VARIABLE
from vitscale.config.cache import CACHE_VARIABLE
from vitscale.errors import CheckpointError, ConfigError
from vitscale.model import TABLE, resample_pos_embed

TOLERANCE = 1e-5
GOOGLE, DISTILLED, DINO = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_224_dino"
# The rest of the twelve blocks would only cost time.
SHALLOW = {"depth": 2}


@cache
def source(name, depth=SHALLOW["depth"]):
    """timm's model that the published file is of, with weights of our own."""
    activation = {"act_layer": "gelu_tanh"} if name == GOOGLE else {}
    with torch.device("meta"):
        model = timm.create_model(TABLE[name].timm_name, pretrained=False, depth=depth, **activation)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.to_empty(device="cpu").named_parameters():
        mean = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        parameter.data.normal_(mean, 0.05, generator=generator)
    return model.eval().requires_grad_(False)


def write_npz(folder, depth=SHALLOW["depth"]):
    """Google's file of the source model."""
    entry, state = TABLE[GOOGLE], source(GOOGLE, depth).state_dict()
    variant = replace(entry.variant, act="gelu_tanh", depth=depth)
    model = PortableModel(GOOGLE, variant, state, entry.preprocessing, Origin("jax", "0"))
    FORMATS["npz"].write(model, folder, "fp32")
    return folder / "model.npz"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files by the name of their row, each as its authors laid it out; not to be written to."""
    folder = tmp_path_factory.mktemp("published")
    google = write_npz(folder)
    torch.save({"model": source(DISTILLED).state_dict()}, folder / "deit.pth")
    torch.save(source(DINO).state_dict(), folder / "dino_deitsmall16_pretrain.pth")
    digest = hashlib.sha256((folder / "deit.pth").read_bytes()).hexdigest()[:8]
    return {
        GOOGLE: google.rename(folder / "Ti_16-i21k-300ep--imagenet2012-res_224.npz"),
        DISTILLED: (folder / "deit.pth").rename(folder / f"deit_tiny_distilled_patch16_224-{digest}.pth"),
        DINO: folder / "dino_deitsmall16_pretrain.pth",
    }


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked.append(name)
        content = self.server.files.get(name)
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")


class Remote(ThreadingHTTPServer):
    """A server of files by name, which notes what it was asked for."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked = files, []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/published/{name}"


@pytest.fixture
def remote(published, monkeypatch, tmp_path):
    """A server of the published files, the table pointing at it, and an empty cache."""
    server = Remote({path.name: path.read_bytes() for path in published.values()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    rows = {name: replace(TABLE[name], weights_url=server.url(path.name)) for name, path in published.items()}
    monkeypatch.setattr(pretrained, "TABLE", {**TABLE, **rows})
    monkeypatch.setattr("vitscale.checkpoint.download._BACKOFF_S", 0.01)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(OFFLINE_VARIABLE, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def loaded(published, name, **arguments):
    """The model of a file on the disk."""
    given = {} if name == GOOGLE else {"model": name, "changes": SHALLOW}
    return load_pretrained(published[name], **given, **arguments)


def images(side=224, channels=3):
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(built, theirs):
    expected = theirs(images())
    assert expected.std() > 0.01  # the comparison is not one of zeros
    assert (built(images()) - expected).abs().max().item() <= TOLERANCE


def assert_same_tensors(found, expected, but=()):
    """Bitwise, and none besides."""
    assert set(found) - set(but) == set(expected) - set(but)
    for name in set(expected) - set(but):
        assert torch.equal(found[name], expected[name]), name


# Names, addresses and paths.


@pytest.mark.parametrize("name", [GOOGLE, DISTILLED, DINO])
def test_a_name_gives_the_logits_of_the_published_model(remote, name):
    built = load_pretrained(name, changes=SHALLOW)
    assert_same_logits(built, source(name))
    assert_same_tensors(built.state_dict(), source(name).state_dict())
    assert len(remote.asked) == 1


def test_the_architecture_is_that_of_the_file_and_googles_gelu_its_tanh_form(remote):
    google = replace(TABLE[GOOGLE].variant, act="gelu_tanh", depth=2)
    assert load_pretrained(GOOGLE, changes=SHALLOW).variant == google
    built = load_pretrained(DISTILLED, changes=SHALLOW)
    assert built.variant == replace(TABLE[DISTILLED].variant, depth=2)


def test_a_name_alone_is_the_whole_published_model(remote, tmp_path):
    remote.files[next(iter(remote.files))] = write_npz(tmp_path, depth=12).read_bytes()
    built = load_pretrained(GOOGLE)
    assert_same_logits(built, source(GOOGLE, depth=12))
    assert built.variant == replace(TABLE[GOOGLE].variant, act="gelu_tanh")


def test_it_is_the_package_roots_own():
    assert vitscale.load_pretrained is load_pretrained
    assert "load_pretrained" in vitscale.__all__


def test_an_address_is_fetched(remote):
    google, deit, _ = remote.files
    assert_same_logits(load_pretrained(remote.url(google)), source(GOOGLE))
    built = load_pretrained(remote.url(deit), model=DISTILLED, changes=SHALLOW)
    assert_same_logits(built, source(DISTILLED))
    assert remote.asked == [google, deit]


def test_an_address_of_a_file_that_does_not_say_what_it_is_asks_for_a_name(remote):
    with pytest.raises(CheckpointError, match="say what it is with --model") as caught:
        load_pretrained(remote.url(list(remote.files)[1]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_a_path_is_read_where_it_is(published, monkeypatch, tmp_path, as_type):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert_same_logits(load_pretrained(as_type(published[GOOGLE])), source(GOOGLE))
    built = load_pretrained(as_type(published[DISTILLED]), model=DISTILLED, changes=SHALLOW)
    assert_same_logits(built, source(DISTILLED))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("format_", ["vitscale", "timm", "hf", "npz", "big_vision"])
def test_a_folder_of_any_format_says_what_it_is(tmp_path, format_):
    model = random_portable()
    FORMATS[format_].write(model, tmp_path, "fp32")
    built = load_pretrained(tmp_path)
    assert built.variant == model.variant
    assert_same_tensors(built.state_dict(), model.weights)


def test_a_path_goes_before_the_name_that_it_is_called(remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / GOOGLE).mkdir()
    FORMATS["vitscale"].write(random_portable(), tmp_path / GOOGLE, "fp32")
    assert load_pretrained(GOOGLE).variant.embed_dim == 24
    assert remote.asked == []


@pytest.mark.parametrize("name", ["vit_giant_patch14_224", "vit_22b_patch14_224"])
def test_a_name_without_published_weights_says_so(remote, name):
    with pytest.raises(CheckpointError, match=f"^{name}: no weights of this name are published; `vitscale models`"):
        load_pretrained(name)
    assert remote.asked == []


def test_what_is_neither_a_name_nor_a_path_says_so(remote):
    with pytest.raises(CheckpointError, match=r"^vit_tiny_patch16_225: no such file or folder, and no name that"):
        load_pretrained("vit_tiny_patch16_225")


# The cache.


def test_a_second_call_asks_nobody(remote, tmp_path):
    first, second = (load_pretrained(DISTILLED, changes=SHALLOW) for _ in range(2))
    assert len(remote.asked) == 1
    assert_same_tensors(first.state_dict(), second.state_dict())
    kept = [path.name for path in (tmp_path / "cache" / "weights").iterdir() if path.suffix == ".pth"]
    assert len(kept) == 1
    assert kept[0].endswith(list(remote.files)[1])


def test_two_models_of_one_file_share_nothing(remote):
    first, second = (load_pretrained(DISTILLED, changes=SHALLOW) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert_same_logits(second, source(DISTILLED))
    assert_same_logits(load_pretrained(DISTILLED, changes=SHALLOW), source(DISTILLED))


def test_what_is_cached_is_there_without_a_network(remote, monkeypatch):
    load_pretrained(GOOGLE, changes=SHALLOW)
    remote.files.clear()
    assert_same_logits(load_pretrained(GOOGLE, changes=SHALLOW, offline=True), source(GOOGLE))
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    assert_same_logits(load_pretrained(GOOGLE, changes=SHALLOW), source(GOOGLE))
    assert len(remote.asked) == 1


def test_what_is_not_cached_is_refused_offline(remote, monkeypatch):
    with pytest.raises(CheckpointError, match="is not in the cache") as caught:
        load_pretrained(GOOGLE, changes=SHALLOW, offline=True)
    assert remote.url(next(iter(remote.files))) in str(caught.value)
    assert str(caught.value).isprintable()
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    with pytest.raises(CheckpointError, match=f"is not in the cache .* {OFFLINE_VARIABLE} is set"):
        load_pretrained(remote.url("x.npz"))
    assert remote.asked == []
    assert_same_logits(load_pretrained(GOOGLE, changes=SHALLOW, offline=False), source(GOOGLE))


def test_another_cache_is_filled_when_it_is_named(remote, tmp_path):
    load_pretrained(GOOGLE, changes=SHALLOW, cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob("*.npz"))
    assert not (tmp_path / "cache").exists()
    load_pretrained(GOOGLE, changes=SHALLOW)
    assert len(remote.asked) == 2


def test_a_server_that_is_down_is_one_line(published, monkeypatch, tmp_path):
    server = Remote({})
    url = server.url("ViT-H_14.npz")
    server.server_close()
    monkeypatch.setattr("vitscale.checkpoint.download._BACKOFF_S", 0.01)
    monkeypatch.setattr(pretrained, "TABLE", {**TABLE, GOOGLE: replace(TABLE[GOOGLE], weights_url=url)})
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for asked in (GOOGLE, url):
        with pytest.raises(CheckpointError, match=r"127\.0\.0\.1 is out of reach") as caught:
            load_pretrained(asked)
        assert str(caught.value).startswith(f"{url}: ")
        assert str(caught.value).isprintable()


def test_a_file_that_is_gone_is_one_line(remote):
    remote.files.clear()
    with pytest.raises(CheckpointError, match=r"Ti_16.*\.npz: HTTP 404") as caught:
        load_pretrained(GOOGLE, changes=SHALLOW)
    assert str(caught.value).isprintable()


def test_a_file_that_is_not_the_published_one_is_refused(remote):
    name = list(remote.files)[1]
    remote.files[name] = remote.files[name][:-1] + b"x"
    with pytest.raises(CheckpointError, match="its name promises a SHA-256"):
        load_pretrained(DISTILLED, changes=SHALLOW)


def wider(path):
    """The arrays of an npz with one of another width."""
    with np.load(path) as arrays:
        changed = {**arrays, "embedding/bias": np.ones(193, np.float32)}
    content = io.BytesIO()
    np.savez(content, **changed)
    return content.getvalue()


def test_a_file_of_another_model_than_its_row_is_refused(remote, published):
    google, _, dino = remote.files
    remote.files[dino] = published[DISTILLED].read_bytes()
    remote.files[google] = wider(published[GOOGLE])
    with pytest.raises(CheckpointError, match=r"leaves 197 patches, .*: it is of another model") as caught:
        load_pretrained(DINO, changes=SHALLOW)
    assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError, match=rf"the model wants \[192\]: it was taken for {GOOGLE}") as caught:
        load_pretrained(GOOGLE, changes=SHALLOW)
    assert str(caught.value).isprintable()


# The head.


@pytest.mark.parametrize("name", [GOOGLE, DISTILLED])
@pytest.mark.parametrize("num_classes", [None, 1000])
def test_the_head_is_kept_for_the_same_classes(published, name, num_classes):
    built = loaded(published, name, num_classes=num_classes)
    assert_same_tensors(built.state_dict(), source(name).state_dict())


def heads_of(state):
    return {key for key in state if key.startswith("head")}


@pytest.mark.parametrize("name", [GOOGLE, DISTILLED, DINO])
def test_no_classes_leave_the_head_out(published, name):
    built = loaded(published, name, num_classes=0)
    state = source(name).state_dict()
    assert heads_of(built.state_dict()) == set()
    assert_same_tensors(built.state_dict(), state, but=heads_of(state))
    assert built.variant.num_classes == 0


@torch.no_grad()
def test_without_a_head_the_output_is_the_class_tokens_features(published):
    features = source(GOOGLE).forward_features(images())[:, 0]
    assert (loaded(published, GOOGLE, num_classes=0)(images()) - features).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [GOOGLE, DISTILLED, DINO])
@torch.no_grad()
def test_other_classes_get_a_fresh_zero_head_on_the_same_trunk(published, name):
    built = loaded(published, name, num_classes=10)
    state, expected = built.state_dict(), source(name).state_dict()
    fresh = heads_of(state)
    assert len(fresh) == (4 if name == DISTILLED else 2)
    assert all(not state[key].any() and state[key].shape[0] == 10 for key in fresh)
    assert_same_tensors(state, expected, but=fresh | heads_of(expected))
    assert built.variant.num_classes == 10
    assert built(images()).tolist() == [[0.0] * 10]


def test_the_representation_layer_stays_under_a_fresh_head(tmp_path):
    model = random_portable(representation_size=20)
    FORMATS["vitscale"].write(model, tmp_path, "fp32")
    built = load_pretrained(tmp_path, num_classes=3)
    assert built.head.weight.shape == (3, 20)
    assert_same_tensors(built.state_dict(), model.weights, but={"head.weight", "head.bias"})


@pytest.mark.parametrize("num_classes", [None, 0, 10])
def test_the_model_is_in_evaluation_mode_and_can_be_trained(published, num_classes):
    built = loaded(published, DISTILLED, num_classes=num_classes)
    assert not any(module.training for module in built.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in built.parameters())


# Pixels and channels.


@pytest.mark.parametrize("name", [GOOGLE, DISTILLED])
@pytest.mark.parametrize("method", [None, "timm", "timm_npz", "google"])
def test_another_size_resizes_the_position_embedding_and_nothing_else(published, name, method):
    built = loaded(published, name, img_size=384, pos_embed=method)
    expected = source(name).state_dict()
    default = "google" if name == GOOGLE else "timm"
    prefix = 1 if name == GOOGLE else 2
    resized = {m: resample_pos_embed(expected["pos_embed"], (24, 24), prefix, method=m)
               for m in ("timm", "timm_npz", "google")}  # fmt: skip
    # Each differs from the others, so that equality with one of them says which it was.
    assert (resized["timm"] - resized["google"]).abs().max() > 1e-3
    assert (resized["timm_npz"] - resized["google"]).abs().max() > 1e-3
    assert torch.equal(built.pos_embed, resized[method or default])
    assert_same_tensors(built.state_dict(), expected, but={"pos_embed"})
    assert built.variant.img_size == 384


def test_a_downloaded_npz_is_resized_as_google_does(remote):
    expected = resample_pos_embed(source(GOOGLE).pos_embed, (14, 24), 1, method="google")
    assert torch.equal(load_pretrained(GOOGLE, changes=SHALLOW, img_size=(224, 384)).pos_embed, expected)


def test_a_state_dict_of_timm_is_resized_as_timm_does(published):
    expected = resample_abs_pos_embed(source(DISTILLED).pos_embed, [24, 24], num_prefix_tokens=2)
    torch.testing.assert_close(loaded(published, DISTILLED, img_size=384).pos_embed.data, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_resized_model_computes(published):
    logits = loaded(published, DINO, img_size=96, num_classes=4)(images(96))
    assert logits.shape == (1, 4)


def test_the_same_size_leaves_the_position_embedding_alone(published):
    assert torch.equal(loaded(published, GOOGLE, img_size=224).pos_embed, source(GOOGLE).pos_embed)


def test_an_image_that_does_not_divide_into_patches_is_refused(published):
    with pytest.raises(ConfigError, match=r"model\.img_size 225 is no multiple of model\.patch_size 16"):
        loaded(published, GOOGLE, img_size=225)


@torch.no_grad()
def test_one_channel_is_an_image_whose_three_are_equal(published):
    built = loaded(published, GOOGLE, in_chans=1)
    grey = images(channels=1)
    assert built.variant.in_chans == 1
    assert (built(grey) - source(GOOGLE)(grey.expand(-1, 3, -1, -1))).abs().max() <= 1e-4
    assert_same_tensors(built.state_dict(), source(GOOGLE).state_dict(), but={"patch_embed.proj.weight"})


def test_four_channels_repeat_the_first_at_the_same_strength(published):
    built, old = loaded(published, DISTILLED, in_chans=4), source(DISTILLED).patch_embed.proj.weight
    expected = torch.cat([old, old[:, :1]], dim=1) * 0.75
    torch.testing.assert_close(built.patch_embed.proj.weight.data, expected, rtol=0, atol=1e-7)
    assert_same_tensors(built.state_dict(), source(DISTILLED).state_dict(), but={"patch_embed.proj.weight"})


@torch.no_grad()
def test_all_of_it_at_once(remote):
    built = load_pretrained(GOOGLE, changes=SHALLOW, num_classes=5, img_size=96, in_chans=1)
    assert built(images(96, 1)).shape == (1, 5)
    whole = replace(TABLE[GOOGLE].variant, act="gelu_tanh", depth=2)
    assert built.variant == replace(whole, num_classes=5, img_size=96, in_chans=1)
