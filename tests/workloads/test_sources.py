"""Models as people have them: timm's from folders and hubs, transformers' from folders and hubs, other image sizes."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from ablations.models.loading import check_model, create_model, head_classes, input_config
from ablations.models.model_names import chosen_name, parse_model_name
from ablations.run.session import Settings
from ablations.workloads import ModelError, open_model
from reducers import Placement, ToMe, at, reduce_tokens
from reducers.budget import Drop
from reducers.hosts import host_of
from tests.reducers.cvt_models import make_cvt
from tests.reducers.hf_models import make_hf

NAME = "test_vit"


def opened(name: str, **options: Any) -> nn.Module:
    return open_model(name, weights=options.pop("weights", None), workload_name="imagefolder", **options).model


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_say_source_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert chosen_name("deit_tiny_patch16_224.fb_in1k") == "deit_tiny_patch16_224.fb_in1k"
    assert chosen_name("deit_tiny_patch16_224", "384") == "deit_tiny_patch16_224?img=384"
    assert chosen_name("deit_tiny_patch16_224?img=384", "384,320") == "deit_tiny_patch16_224?img=384x320"
    assert chosen_name("hf-hub:timm/a@main", "96") == "hf-hub:timm/a@main?img=96"
    assert chosen_name("hf:mine") == f"hf:{tmp_path / 'mine'}" and chosen_name("hf:a/b") == "hf:a/b"
    assert chosen_name("local-dir:mine?img=64") == f"local-dir:{tmp_path / 'mine'}?img=64"
    assert parse_model_name("hf:a/b?img=12x24").size == (12, 24)
    assert Settings(model="a b", img_size="384").chosen() == [("a?img=384", None), ("b?img=384", None)]
    for wrong, message in (
        ("hub:a/b", "unknown source 'hub'.*hf-hub:…, local-dir:…, hf:…"),
        ("hf:", "nothing stands behind hf:"),
        ("a?img=0", "is no size: write 384, or 384,320"),
        ("a?img=wide", "is no size"),
    ):
        with pytest.raises(ModelError, match=message):
            parse_model_name(wrong)
    with pytest.raises(ModelError, match="64 px and no others: leave IMG_SIZE out"):
        check_model("digits_vit_tiny?img=96")


# --- timm's -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes for images of 96 pixels, as timm saves it."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=3, img_size=96)
    with torch.no_grad():
        model.pos_embed.add_(torch.randn_like(model.pos_embed))
    save_for_hf(model, folder, model_args={"img_size": 96}, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] = {**config["pretrained_cfg"], "input_size": [3, 96, 96], "num_classes": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as fetching files asks for: where each is, its digest, and its bytes."""

    def __init__(self, *arguments: Any, files: Path, asked: list[str]) -> None:
        self.files, self.asked = files, asked
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        file = self.files / self.path.rpartition("/")[2]
        if "/resolve/" not in self.path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hash(file.name) & 0xFFFFFFFF:040x}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A hub on this machine that serves one folder under any name, and the cache that is filled from it."""
    import huggingface_hub
    from huggingface_hub import constants

    servers, plain = [], huggingface_hub.hf_hub_download
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this machine is asked, and no other

    def serve(files: Path) -> list[str]:
        asked: list[str] = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, files=files, asked=asked))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download",
            lambda *a, **k: plain(*a, **{**k, "cache_dir": tmp_path / "cache", "endpoint": address}),
        )  # fmt: skip
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@torch.no_grad()
def test_a_folder_of_timms_is_opened_as_timm_opens_it(timm_folder: Path) -> None:
    name = f"local-dir:{timm_folder}"
    assert head_classes(name, weights=None) == 3 and input_config(name)["input_size"] == (3, 96, 96)
    loaded = open_model(name, weights=None, workload_name="imagefolder", classes=3)
    images = torch.randn(2, 3, 96, 96)
    expected = timm.create_model(name, pretrained=True).eval()
    torch.testing.assert_close(loaded.model(images), expected(images), rtol=0, atol=0)
    assert loaded.weights == "file" and reduce_tokens(loaded.model, Placement()).host.grid == (6, 6)
    saved = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    save_file(saved, timm_folder / "again.safetensors")
    again = opened(name, weights=str(timm_folder / "again.safetensors"))
    torch.testing.assert_close(again(images), expected(images), rtol=0, atol=0)
    assert opened(name, weights="random", classes=5).num_classes == 5


@torch.no_grad()
def test_a_repository_of_timms_is_fetched_once_and_only_its_config_and_safetensors(
    timm_folder: Path, hub: Any, tmp_path: Path
) -> None:
    asked = hub(timm_folder)
    model = opened("hf-hub:someone/small")
    images = torch.randn(1, 3, 96, 96)
    expected = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    torch.testing.assert_close(model(images), expected(images), rtol=0, atol=0)
    assert {path.rpartition("/")[2] for path in asked if "resolve" in path} == {"config.json", "model.safetensors"}
    count = len(asked)
    opened("hf-hub:someone/small")
    assert len(asked) == count, "what is here is not asked for again"
    hub(tmp_path)
    with pytest.raises(ModelError, match="config.json of hf-hub:someone/other cannot be fetched from the hub"):
        check_model("hf-hub:someone/other")


@torch.no_grad()
def test_another_size_of_image_has_timms_own_positions(timm_folder: Path, hub: Any) -> None:
    for size, shape in ((64, (64, 64)), ((128, 96), (128, 96))):
        text = str(size) if isinstance(size, int) else "{},{}".format(*size)
        name = chosen_name(f"local-dir:{timm_folder}", text)
        expected = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, img_size=size).eval()
        images = torch.randn(2, 3, *shape)
        for weights in (None, str(timm_folder / "model.safetensors")):
            torch.testing.assert_close(opened(name, weights=weights)(images), expected(images), rtol=0, atol=1e-6)
        assert input_config(name)["input_size"] == (3, *shape)
    assert host_of(create_model("deit_tiny_patch16_224?img=384")).grid == (24, 24)


def test_what_is_no_model_of_timms_is_refused_with_the_other_form(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"has no config.json of timm's.*transformers is written hf:{tmp_path}"):
        check_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "vit_of_tomorrow", "pretrained_cfg": {}}')
    with pytest.raises(ModelError, match="'vit_of_tomorrow', which this version of timm does not know"):
        check_model(f"local-dir:{tmp_path}")


# --- transformers' ----------------------------------------------------------------------------------------------------

tf = pytest.importorskip("transformers")
PROCESSOR = {
    "do_resize": True, "size": {"height": 48, "width": 48}, "resample": 3, "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],
}  # fmt: skip


def saved(folder: Path, name: str, processor: dict[str, Any] | None = None, **changes: Any) -> Any:
    model = make_hf(name, dtype=torch.float32, **changes)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor or PROCESSOR))
    return model


HEADS = [
    "ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification",
    "CLIPForImageClassification", "SiglipForImageClassification",
]  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_folder_of_transformers_is_opened_with_its_weights_and_its_processor(name: str, tmp_path: Path) -> None:
    model, images = saved(tmp_path, name), torch.randn(2, 3, 48, 48)
    loaded = open_model(f"hf:{tmp_path}", weights=None, workload_name="imagefolder", classes=7)
    torch.testing.assert_close(loaded.model(images).logits, model(images).logits, rtol=0, atol=1e-6)
    assert loaded.weights == "file" and not loaded.model.training and head_classes(f"hf:{tmp_path}", weights=None) == 7
    assert input_config(f"hf:{tmp_path}") == {
        "input_size": (3, 48, 48), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 1.0,
        "crop_mode": "squash", "interpolation": "bicubic",
    }  # fmt: skip
    weights = str(tmp_path / "model.safetensors")
    torch.testing.assert_close(
        opened(f"hf:{tmp_path}", weights=weights)(images).logits, model(images).logits, rtol=0, atol=1e-6
    )
    assert host_of(opened(f"hf:{tmp_path}", weights="random", classes=4)).classes == 4


@torch.no_grad()
def test_a_repository_of_transformers_is_fetched(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    model, images = saved(tmp_path / "served", "ViTForImageClassification"), torch.randn(1, 3, 48, 48)
    (tmp_path / "served" / "modeling_mine.py").write_text("raise SystemExit('ran')")
    asked = hub(tmp_path / "served")
    loaded = open_model("hf:someone/vit", weights=None, workload_name="imagefolder")
    torch.testing.assert_close(loaded.model(images).logits, model(images).logits, rtol=0, atol=1e-6)
    assert loaded.weights == "hub" and input_config("hf:someone/vit")["mean"] == (0.4, 0.5, 0.6)
    assert not any(path.endswith(".py") for path in asked)


@torch.no_grad()
def test_positions_are_resampled_as_timm_does_and_models_that_do_it_themselves_are_left_to(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    model = saved(tmp_path, "DeiTForImageClassification")
    sized = opened(chosen_name(f"hf:{tmp_path}", "64,32"))
    assert sized(torch.randn(1, 3, 64, 32)).logits.shape == (1, 7) and host_of(sized).grid == (8, 4)
    torch.testing.assert_close(
        sized.deit.embeddings.position_embeddings,
        resample_abs_pos_embed(model.deit.embeddings.position_embeddings, [8, 4], [6, 6], num_prefix_tokens=2),
    )
    from_file = opened(chosen_name(f"hf:{tmp_path}", "64,32"), weights=str(tmp_path / "model.safetensors"))
    assert torch.equal(from_file.deit.embeddings.position_embeddings, sized.deit.embeddings.position_embeddings)
    other = tmp_path / "dino"
    other.mkdir()
    cropping = {
        **PROCESSOR,
        "size": {"shortest_edge": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
    }
    dino = saved(other, "Dinov2ForImageClassification", cropping)
    found, images = opened(f"hf:{other}"), torch.randn(2, 3, 32, 32)
    assert host_of(found).grid == (4, 4) and input_config(f"hf:{other}")["crop_pct"] == 0.8
    torch.testing.assert_close(found(images).logits, dino(images).logits, rtol=0, atol=1e-6)
    fast = reduce_tokens(found, at(1, ToMe(Drop(2))))
    assert fast.trace(images)[1].tokens[0].tolist() == [17, 17, 15, 15, 15]


@torch.no_grad()
def test_a_folder_with_a_cvt_is_opened_at_any_size(tmp_path: Path) -> None:
    model = make_cvt(dtype=torch.float32, stride=2)
    model.save_pretrained(tmp_path)
    sized = {**PROCESSOR, "size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sized))
    for asked, side in ((f"hf:{tmp_path}", 64), (chosen_name(f"hf:{tmp_path}", "96"), 96)):
        found, images = opened(asked), torch.randn(2, 3, side, side)
        torch.testing.assert_close(found(images).logits, model(images).logits, rtol=0, atol=1e-6)
        assert host_of(found).grid == (side // 16, side // 16) and input_config(asked)["input_size"] == (3, side, side)
        assert reduce_tokens(found, at(4, ToMe(Drop(2)))).trace(images)[1].tokens[0, -1] == (side // 16) ** 2 - 1
    with pytest.raises(ModelError, match="50 x 50 px are no whole patches of 16"):
        opened(f"hf:{tmp_path}?img=50")


def _changed(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_folder_that_cannot_be_used_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hf:{tmp_path}"
    with pytest.raises(ModelError, match="config.json is not in .*model.save_pretrained"):
        check_model(name)
    saved(tmp_path, "ViTForImageClassification")
    with pytest.raises(ModelError, match="is no folder: name one"):
        check_model("hf:./nowhere")
    with pytest.raises(ModelError, match="50 x 50 px are no whole patches of 8"):
        opened(f"{name}?img=50")
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "away.json")
    with pytest.raises(ModelError, match="preprocessor_config.json is not in .*processor.save_pretrained"):
        input_config(name)
    (tmp_path / "away.json").rename(tmp_path / "preprocessor_config.json")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "classifier" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="do not fill a ViTForImageClassification .*classifier.bias is missing"):
        opened(name)
    nan: dict[str, Tensor] = {**weights, "classifier.bias": weights["classifier.bias"] * float("nan")}
    save_file(nan, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="classifier.bias of the weights of hf:.* is not finite"):
        opened(name)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="model.safetensors of hf:.* is missing, and only one safetensors file"):
        opened(name)
    _changed(tmp_path, auto_map={"AutoModel": "modeling_mine.Mine"})
    with pytest.raises(ModelError, match="brings code of its own .*no code of a repository is run"):
        check_model(name)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(ModelError, match="is a BertModel, which is not driven; there are ViTModel"):
        check_model(name)
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"], "model_type": "dinov2"}')
    with pytest.raises(ModelError, match="comes without a classifier"):
        head_classes(name, weights=None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"transformers is missing; install the extra: pip install 'sievit\[hf\]'"):
        create_model(name)
