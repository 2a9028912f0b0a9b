"""Published weights as candidates: ``timm:NAME`` and ``hf-hub:OWNER/NAME``, with revision, hash and licence."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models._hub import download_cached_file

from mtl_nnunet.checkpoints.checkpoint import Checkpoint, Published
from mtl_nnunet.checkpoints.file import timm_name
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import sha256

FROM_TIMM, FROM_HUB = "timm:", ("hf-hub:", "hf_hub:")
KIND = "published weights"
FILES = ("model.safetensors", "pytorch_model.bin")
# what publications say of weights, by the whole name; epochs where they say one number for every network of that name
RSB = "ResNet strikes back, {}: LAMB, binary cross-entropy (arXiv:2110.00476)"
RECIPES: tuple[tuple[str, int | None, str], ...] = (
    (r"\.a1_in1k$", 600, RSB.format("A1")),
    (r"\.a2_in1k$", 300, RSB.format("A2")),
    (r"\.a3_in1k$", 100, RSB.format("A3") + ", trained at 160 pixels"),
    (r"^swin_(?:tiny|small|base)\w*\.ms_in1k$", 300, "Swin Transformer, ImageNet-1k (arXiv:2103.14030)"),
    (r"^convnext_(?:tiny|small|base|large)\.fb_in1k$", 300, "ConvNeXt, ImageNet-1k (arXiv:2201.03545)"),
    (r"\.tv_in1k$", None, "torchvision's first recipe (its weights V1)"),
    (r"\.tv2_in1k$", None, "torchvision's second recipe (its weights V2)"),
    (r"\.gluon_in1k$", None, "GluonCV's recipe"),
    (r"\.fb_ssl_yfcc100m_ft_in1k$", None, "semi-supervised on YFCC100M, then ImageNet-1k (arXiv:1905.00546)"),
    (
        r"\.fb_swsl_ig1b_ft_in1k$",
        None,
        "semi-weakly supervised on 1 billion images, then ImageNet-1k (arXiv:1905.00546)",
    ),
    (r"[._]e(\d+)_", None, "epochs as the name says"),
)


def is_published_name(name: str | Path) -> bool:
    """Whether a candidate names published weights, not a path.

    Examples:
        >>> [is_published_name(n) for n in ("timm:resnet50", "hf-hub:timm/resnet18.a1_in1k", "runs/resnet50")]
        [True, True, False]
    """
    return str(name).startswith((FROM_TIMM, *FROM_HUB))


def list_published(name: str) -> list[Checkpoint]:
    """What a name stands for, without fetching anything.

    Args:
        name: ``timm:ARCHITECTURE`` (all published weights of it), ``timm:ARCHITECTURE.TAG`` or ``hf-hub:OWNER/NAME``, each with
            ``@REVISION`` if wanted.

    Returns:
        Candidates; their path is that in the local cache, or one that does not exist where they have to be fetched.

    Raises:
        UserError: timm knows no such weights.
    """
    kind, revision, plain = _parsed(name)
    if kind != FROM_TIMM:
        own = plain.removeprefix("timm/")
        if plain.startswith("timm/") and own in timm.list_models(f"{own.partition('.')[0]}.*", pretrained=True):
            known = _of_timm(own, revision)
            assert known.published is not None
            if known.published.source == plain:
                return [replace(known, published=replace(known.published, name=name.partition("@")[0]))]
        source = Published(name.partition("@")[0], plain, revision, None)
        path = _cached(plain, revision) or Path(plain)
        return [Checkpoint(path, None, timm_name(plain), KIND, published=source)]
    return [_of_timm(full, revision) for full in _full_names(plain)]


def find_published(name: str) -> list[Checkpoint]:
    """Fetch what a name stands for, or find it in the local cache of the Hugging Face Hub, which is asked first.

    Args:
        name: As for ``list_published``.

    Returns:
        One checkpoint for each of the weights, with the commit they are of.

    Raises:
        UserError: timm knows no such weights, or they cannot be fetched; the message says how to bring them.
    """
    return [fetched(candidate) for candidate in list_published(name)]


def recipe_of(full: str) -> tuple[int | None, str]:
    """Length of the pretraining in epochs and the recipe, as far as the name of published weights tells.

    Examples:
        >>> recipe_of("resnet50.a3_in1k")
        (100, 'ResNet strikes back, A3: LAMB, binary cross-entropy (arXiv:2110.00476), trained at 160 pixels')
        >>> recipe_of("mobilenetv4_conv_small.e3600_r256_in1k"), recipe_of("resnet50.d_in1k")
        ((3600, 'epochs as the name says'), (None, ''))
    """
    for pattern, epochs, words in RECIPES:
        if match := re.search(pattern, full):
            return (int(match[1]) if match.groups() else epochs), words
    return None, ""


def _parsed(name: str) -> tuple[str, str | None, str]:
    kind = next(k for k in (FROM_TIMM, *FROM_HUB) if name.startswith(k))
    plain, _, revision = name[len(kind) :].partition("@")
    if not plain or ("@" in name and not revision) or "@" in revision:
        raise UserError(
            f"{name} names no published weights. Expected timm:NAME or hf-hub:OWNER/NAME, and @REVISION if wanted."
        )
    return kind, revision or None, plain


def _full_names(plain: str) -> list[str]:
    # pretrained weights that exist as files: timm's own repositories, or a URL
    if "." in plain:
        found = (
            [plain]
            if timm.is_model(plain) and plain in timm.list_models(f"{plain.split('.')[0]}.*", pretrained=True)
            else []
        )
    else:
        found = timm.list_models(f"{plain}.*", pretrained=True)
    if found:
        return list(found)
    architecture = plain.partition(".")[0]
    there = timm.list_models(f"{architecture}.*", pretrained=True)
    if there:
        meant = f"Of {architecture} it knows: {listed(there, 30)}."
    else:
        close = difflib.get_close_matches(plain, timm.list_models(pretrained=True), n=3)
        meant = f"Did you mean {listed(close)}?" if close else "timm.list_models(pretrained=True) lists them."
    raise UserError(f"timm {timm.__version__} knows no published weights 'timm:{plain}'. {meant}")


def _of_timm(full: str, revision: str | None) -> Checkpoint:
    configuration = timm.get_pretrained_cfg(full)
    epochs, recipe = recipe_of(full)
    repository = configuration.hf_hub_id
    if repository and repository.endswith("/"):
        repository += full
    source = repository or _url(configuration)
    return Checkpoint(
        path=(_cached(repository, revision) if repository else None) or Path(source),
        epoch=None,
        architecture=full.partition(".")[0],
        kind=KIND,
        published=Published(f"{FROM_TIMM}{full}", source, revision, configuration.license, epochs, recipe),
    )


def _url(configuration: Any) -> str:
    return str(configuration.url[0] if isinstance(configuration.url, (list, tuple)) else configuration.url)


def _cached(repository: str, revision: str | None) -> Path | None:
    for file in FILES:
        try:
            path = try_to_load_from_cache(repository, file, revision=revision)
        except HFValidationError as error:
            raise UserError(f"hf-hub:{repository} is no name of a repository: {error}.") from error
        if isinstance(path, str):
            return Path(path)
    return None


def fetched(candidate: Checkpoint) -> Checkpoint:
    """A candidate of ``list_published`` with its file, and with the commit and the licence that came with it.

    Raises:
        UserError: As ``find_published``.
    """
    about = candidate.published
    assert about is not None
    if about.source.startswith(("http://", "https://")):
        path = Path(_or_explain(partial(download_cached_file, about.source), candidate))
        return replace(candidate, path=path)
    repository, revision = about.source, about.revision
    path = _one_of(repository, revision, candidate)
    commit = path.parent.name
    # of the same commit, and only where timm does not say it already
    is_known = candidate.architecture is not None and about.licence is not None
    configuration = {} if is_known else _configuration(repository, commit, candidate)
    own = configuration.get("pretrained_cfg")
    licence = (
        about.licence
        or (own.get("license") if isinstance(own, dict) else None)
        or _licence_of_card(repository, commit, candidate)
    )
    architecture = candidate.architecture or timm_name(configuration.get("architecture"))
    if architecture is None and "architectures" in configuration:
        raise UserError(
            f"{about.name} is not a timm network (it is {listed(list(map(str, configuration['architectures'])))}). Only repositories that timm "
            "can load are supported: their config.json names an 'architecture'."
        )
    _check_blob(path)
    return replace(
        candidate,
        path=path,
        architecture=architecture,
        published=replace(about, revision=commit, licence=licence if isinstance(licence, str) else None),
    )


def _one_of(repository: str, revision: str | None, candidate: Checkpoint) -> Path:
    if (cached := _cached(repository, revision)) is not None:
        return cached
    for file in FILES:
        try:
            return Path(_download(repository, file, revision, candidate))
        except EntryNotFoundError:
            continue
    raise UserError(
        f"repository {repository} has none of {', '.join(FILES)}. Fetch its file and pass it with -ckpt FILE -encoder NAME."
    )


def _download(repository: str, file: str, revision: str | None, candidate: Checkpoint) -> str:
    """From the local cache where it is there, so that a network that is away costs nothing; else from the Hub."""
    try:
        return str(hf_hub_download(repository, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        # what the cache knows not to exist would raise EntryNotFoundError
        return str(_or_explain(partial(hf_hub_download, repository, file, revision=revision), candidate))


def _configuration(repository: str, commit: str, candidate: Checkpoint) -> dict[str, Any]:
    try:
        content = json.loads(Path(_download(repository, "config.json", commit, candidate)).read_text(encoding="utf-8"))
    except (EntryNotFoundError, OSError, ValueError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def _licence_of_card(repository: str, commit: str, candidate: Checkpoint) -> str | None:
    try:
        text = Path(_download(repository, "README.md", commit, candidate)).read_text(encoding="utf-8")
    except (EntryNotFoundError, OSError, ValueError, UserError):
        return None
    header = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    stated = re.search(r"^license:\s*([\w.\-]+)\s*$", header[1], flags=re.MULTILINE) if header else None
    return stated[1] if stated else None


def _check_blob(path: Path) -> None:
    """A file that the Hub stores by its SHA-256 lies in the cache under that name."""
    named = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", named) and (found := sha256(path)) != named:
        raise UserError(
            f"{path} is not the file that was published: SHA-256 {found[:12]}, expected {named[:12]}. Delete it from the cache and fetch it again."
        )


def _or_explain(fetch: Callable[[], Any], candidate: Checkpoint) -> Any:
    about = candidate.published
    assert about is not None
    where = about.source + (f" at revision {about.revision}" if about.revision else "")
    try:
        return fetch()
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the network cannot be reached"
        cause: BaseException = error
    except OfflineModeIsEnabled as error:
        reason, cause = "HF_HUB_OFFLINE is set", error
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:
        reason, cause = "its publisher asks users to accept terms first", error
    except RevisionNotFoundError as error:
        reason, cause = "there is no such revision", error
    except RepositoryNotFoundError as error:
        reason, cause = "there is no such repository, or it is private", error
    except Exception as error:
        # proxies and connections fail in the words of whichever HTTP library is underneath
        reason, cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:150], error
    raise UserError(_how_to_bring(about, candidate.architecture or "NAME", where, reason)) from cause


def _how_to_bring(about: Published, architecture: str, where: str, reason: str) -> str:
    if about.source.startswith("http"):
        return (
            f"weights {about.name} cannot be fetched from {where}: {reason}. Fetch that file elsewhere and pass it: "
            f"-ckpt FILE -encoder {architecture}."
        )
    pinned = f" --revision {about.revision}" if about.revision else ""
    return (
        f"weights {about.name} cannot be fetched from {where}: {reason}; and they are not in the cache {constants.HF_HUB_CACHE}. Where there is a "
        f"network: hf download {about.source} model.safetensors config.json{pinned}; then copy that cache here and set HF_HUB_CACHE, or pass the "
        f"file alone: -ckpt model.safetensors -encoder {architecture}."
    )
