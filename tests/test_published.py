"""Published weights: fetched by huggingface_hub itself from a server that answers as the Hub does, then without any."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import DEMO_RUN, run_forked
from timm.models import save_for_hf

from mtl_nnunet.checkpoints import find_checkpoints, find_published, list_checkpoints, list_published
from mtl_nnunet.checkpoints.checkpoint import Published
from mtl_nnunet.cli.main import main
from mtl_nnunet.errors import UserError

COMMITS = {"main": "1" * 40, "old": "2" * 40}
CARD = "---\nlibrary_name: timm\nlicense: cc-by-nc-4.0\n---\n# Weights\n"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories as timm writes them: a published one, one of a user's, one that is not timm's."""
    root = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("timm/test_resnet.r160_in1k", "someone/my_resnet")):
        for revision in COMMITS:
            torch.manual_seed(10 * seed + (revision == "old"))
            save_for_hf(
                timm.create_model("test_resnet", num_classes=5), root / revision / name, safe_serialization=True
            )
            (root / revision / name / "README.md").write_text(CARD)
    other = root / "main" / "someone" / "not_timm"
    save_for_hf(timm.create_model("test_resnet"), other, safe_serialization=True)
    (other / "config.json").write_text(
        json.dumps({"architectures": ["ResNetForImageClassification"], "model_type": "resnet"})
    )
    old = root / "main" / "someone" / "old_pickle"
    save_for_hf(timm.create_model("test_resnet"), old, safe_serialization=False)
    return root


@pytest.fixture
def hub(repositories: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of the server and the requests that it got."""
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, with_body: bool) -> None:
            if "/resolve/" in self.path:
                requests.append(self.path)
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            revision = next((k for k, v in COMMITS.items() if v == revision), revision)
            file = repositories / revision / repository / name
            if not file.is_file():
                code = (
                    "RepoNotFound"
                    if not any((repositories / r / repository).is_dir() for r in COMMITS)
                    else "EntryNotFound"
                    if revision in COMMITS
                    else "RevisionNotFound"
                )
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            # the Hub names big files by their SHA-256, small ones by git's SHA-1
            by = hashlib.sha256(content) if name.endswith((".safetensors", ".bin")) else hashlib.sha1(content)
            self.send_response(200)
            self.send_header("ETag", f'"{by.hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMITS[revision])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


# huggingface_hub, and timm, which imports it, are not among them
IMPORTS = "import warnings, torch, torchvision; warnings.simplefilter('ignore')"
SCRIPT = """
import json, sys
from dataclasses import asdict
from mtl_nnunet.checkpoints import find_checkpoints, read_weights
from mtl_nnunet.errors import UserError
try:
    found = find_checkpoints(sys.argv[1:])
except UserError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps([
        {**asdict(c), "path": str(c.path), "label": c.label, "sha256": c.sha256, "tensors": len(read_weights(c))} for c in found
    ]))
"""


def in_new_process(home: Path, *names: str, address: str | None = None) -> Any:
    """huggingface_hub reads its variables when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if address is None else {"HF_ENDPOINT": address}
    done = run_forked(SCRIPT, ["-c", *names], environment, home, imports=IMPORTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_fetched_once_then_found_without_a_network(
    tmp_path: Path, hub: tuple[str, list[str]], repositories: Path
) -> None:
    address, requests = hub
    names = ("timm:test_resnet.r160_in1k", "hf-hub:someone/my_resnet@old")
    fetched = in_new_process(tmp_path, *names, address=address)
    assert requests
    asked = len(requests)
    by_label = {c["label"]: c for c in fetched}
    assert set(by_label) == {"test_resnet.r160_in1k", "someone/my_resnet"}
    for label, revision, repository, licence in (
        ("test_resnet.r160_in1k", "main", "timm/test_resnet.r160_in1k", "apache-2.0"),
        ("someone/my_resnet", "old", "someone/my_resnet", "apache-2.0"),
    ):
        found = by_label[label]
        file = repositories / revision / repository / "model.safetensors"
        assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert found["architecture"] == "test_resnet"
        assert found["published"]["revision"] == COMMITS[revision], "a branch is recorded as the commit it stood at"
        assert found["published"]["source"] == repository
        assert found["published"]["licence"] == licence
        assert found["tensors"] == len(timm.create_model("test_resnet").state_dict())
    assert in_new_process(tmp_path, *names) == fetched, "HF_HUB_OFFLINE"
    pinned = in_new_process(tmp_path, f"hf-hub:someone/my_resnet@{COMMITS['old']}", address=address)
    assert pinned[0]["sha256"] == by_label["someone/my_resnet"]["sha256"]
    assert len(requests) == asked, "what is in the cache is not asked for again"


def test_licence_of_the_card_where_the_configuration_has_none(
    tmp_path: Path, hub: tuple[str, list[str]], repositories: Path
) -> None:
    folder = repositories / "main" / "someone" / "carded"
    save_for_hf(timm.create_model("test_resnet"), folder, safe_serialization=True)
    configuration = json.loads((folder / "config.json").read_text())
    configuration["pretrained_cfg"].pop("license", None)
    (folder / "config.json").write_text(json.dumps(configuration))
    (folder / "README.md").write_text(CARD)
    (found,) = in_new_process(tmp_path, "hf-hub:someone/carded", address=hub[0])
    assert found["published"]["licence"] == "cc-by-nc-4.0"
    assert Published(**found["published"]).caution == "forbids commercial use"


def test_repositories_without_safetensors(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    (found,) = in_new_process(tmp_path, "hf-hub:someone/old_pickle", address=hub[0])
    assert found["path"].endswith("pytorch_model.bin")
    assert in_new_process(tmp_path, "hf-hub:someone/old_pickle") == [found]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf-hub:someone/nothing", "there is no such repository, or it is private"),
        ("hf-hub:someone/my_resnet@nowhere", "there is no such revision"),
        ("hf-hub:someone/not_timm", "is not a timm network (it is ResNetForImageClassification)"),
        ("hf-hub:a/b/c", "is no name of a repository"),
    ],
)
def test_what_the_hub_does_not_have(tmp_path: Path, hub: tuple[str, list[str]], name: str, said: str) -> None:
    error = in_new_process(tmp_path, name, address=hub[0])["error"]
    assert said in error
    assert "\n" not in error


def test_offline_the_error_says_how_to_bring_the_files(tmp_path: Path) -> None:
    error = in_new_process(tmp_path, "timm:resnet50.a1_in1k@abc")["error"]
    assert "\n" not in error
    for part in (
        "timm:resnet50.a1_in1k cannot be fetched from timm/resnet50.a1_in1k at revision abc: HF_HUB_OFFLINE is set",
        f"not in the cache {tmp_path}",
        "hf download timm/resnet50.a1_in1k model.safetensors config.json --revision abc",
        "-ckpt model.safetensors -encoder resnet50",
    ):
        assert part in error


def test_a_damaged_cache_is_noticed(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    (found,) = in_new_process(tmp_path, "timm:test_resnet.r160_in1k", address=hub[0])
    blob = Path(found["path"]).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    error = in_new_process(tmp_path, "timm:test_resnet.r160_in1k")["error"]
    assert "is not the file that was published: SHA-256" in error


def test_all_published_weights_of_a_network_are_listed_without_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    names = timm.list_models("resnet50.*", pretrained=True)
    listed = list_published("timm:resnet50")
    assert [c.published.name for c in listed if c.published] == [f"timm:{n}" for n in names]
    known = {c.label: c.published for c in listed if c.published}
    assert {n: known[f"resnet50.{n}"].epochs for n in ("a1_in1k", "a2_in1k", "a3_in1k")} == {
        "a1_in1k": 600,
        "a2_in1k": 300,
        "a3_in1k": 100,
    }
    for name, about in known.items():
        assert about.licence == timm.get_pretrained_cfg(name).license
    assert main(["checkpoints", "timm:resnet50"]) == 0
    out = capsys.readouterr().out
    assert "timm:resnet50.fb_swsl_ig1b_ft_in1k" in out
    assert "cc-by-nc-4.0*" in out
    assert out.strip().endswith("* forbids commercial use")


def test_every_published_name_of_timm_is_listed() -> None:
    for name in timm.list_models(pretrained=True):
        (found,) = list_published(f"timm:{name}")
        assert found.published is not None
        assert found.published.source.startswith("http") or found.published.source.count("/") == 1
        assert found.architecture == name.partition(".")[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:resnet5O", r"knows no published weights 'timm:resnet5O'\. Did you mean resnet50"),
        ("timm:resnet50.a9_in1k", r"Of resnet50 it knows: resnet50\.a1_in1k"),
        ("timm:", "names no published weights"),
        ("timm:resnet50@", "names no published weights"),
        ("hf-hub:a/b@c@d", "names no published weights"),
    ],
)
def test_names_that_are_none(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_published(name)
    with pytest.raises(UserError, match=said):
        find_checkpoints([name])
    with pytest.raises(UserError, match=said):
        list_checkpoints(name)


@pytest.mark.parametrize(
    ("licence", "says"),
    [
        ("cc-by-nc-4.0", "forbids"),
        ("cc-by-nc-sa-4.0", "forbids"),
        ("fair-noncommercial-research-license", "forbids"),
        ("apple-amlr", "forbids"),
        ("CC BY-NC 4.0", "forbids"),
        ("cc_by_nc_4.0", "forbids"),
        ("cc-by-nc4.0", "forbids"),
        ("Apache 2.0", None),
        ("seer-license", "terms of its own"),
        ("dinov3-license", "terms of its own"),
        ("other", "terms of its own"),
        ("apache-2.0", None),
        ("bsd-3-clause", None),
        ("cc-by-4.0", None),
        ("ncsa", None),
        ("unknown", None),
        (None, None),
    ],
)
def test_licences(licence: str | None, says: str | None) -> None:
    caution = Published("timm:a", "timm/a", None, licence).caution
    assert caution is None if says is None else says in str(caution)


def test_of_every_licence_that_timm_states_it_is_known_what_to_say() -> None:
    stated = {timm.get_pretrained_cfg(name).license for name in timm.list_models(pretrained=True)}
    silent = {licence for licence in stated if Published("timm:a", "timm/a", None, licence).caution is None}
    assert silent <= {None, "", "unknown", "mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0"}


def test_networks_that_do_not_go_together_are_refused_before_they_are_fetched() -> None:
    # fetching would say that there is no network here, or take minutes
    with pytest.raises(UserError, match="different architectures"):
        find_checkpoints(["timm:resnet18.a1_in1k", "timm:resnet50.a1_in1k"])
    with pytest.raises(UserError, match="different architectures"):
        find_checkpoints(["timm:resnet1*"])


def test_licence_goes_into_the_selection_and_is_warned_of(tmp_path: Path, make_dataset: Any) -> None:
    from dataclasses import replace

    from mtl_nnunet.report import warnings_in_words
    from mtl_nnunet.select import select_checkpoint
    from mtl_nnunet.selection import read_selection

    make_dataset(1, num_cases=4)
    (found,) = find_checkpoints(DEMO_RUN / "checkpoint-39.pth.tar")
    (found,) = (replace(found, epoch=None, published=Published("timm:a.b", "timm/a.b", "3" * 40, "cc-by-nc-4.0", 100)),)
    outcome = select_checkpoint(1, [found], num_slices=12, output=tmp_path / "selection")
    assert outcome.content is not None
    assert outcome.content["choice"]["published"]["licence"] == "cc-by-nc-4.0"
    assert any("forbids commercial use" in w for w in warnings_in_words(outcome.ranking, 4))
    # one alone was not chosen
    assert not any("has not been measured" in w for w in warnings_in_words(outcome.ranking, 4))
    selection = read_selection(tmp_path / "selection")
    assert selection.caution == "forbids commercial use"
    assert selection.record()["licence"] == "cc-by-nc-4.0"
    assert selection.record()["published"] == f"timm:a.b@{'3' * 40}"
    assert f"timm:a.b@{'3' * 40}, licence cc-by-nc-4.0" in selection.summary
