"""Tensors' names: wrappers, self-supervised methods and other libraries' names, turned into timm's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtl_nnunet.errors import UserError, listed

# what wrappers put into a name: torch.compile, FSDP, activation checkpointing, Lightning Fabric
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
FLAT = "_flat_param"

# where an encoder lies in a bigger module, first match first. MoCo, MoCo v3, DINO and BYOL hold two of them.
AVERAGED = (
    *("encoder_k.", "momentum_encoder.", "momentum_backbone.", "backbone_momentum.", "teacher_backbone."),
    *("target_encoder.", "teacher.", "model_ema.", "ema_model.", "ema."),
)
TRAINED = ("encoder_q.", "base_encoder.", "online_encoder.", "student_backbone.", "student.")
PLAIN = ("backbone.", "encoder.", "timm_model.", "visual.", "trunk.", "model.", "net.", "network.")
# what their own code evaluates: the trained encoder of MoCo, the averaged one of DINO
ENCODERS = {
    "default": (
        *("encoder_q.", "base_encoder.", "online_encoder.", "teacher_backbone.", "teacher."),
        *("backbone.", "student_backbone.", "student.", *PLAIN[1:]),
    ),
    "ema": (*AVERAGED, *PLAIN),
    "trained": (*TRAINED, *PLAIN),
}
SCHEMES = {"encoder_q.": "MoCo", "encoder_k.": "MoCo", "base_encoder.": "MoCo v3", "momentum_encoder.": "MoCo v3"}
# projections and queues of self-supervised methods, beside or in place of a classifier; counters of averaged models
HEADS = re.compile(
    r"^(?:fc\.\d+\.|head\.(?:\d+|mlp|last_layer)\.|classifier\.\d+\.|projection_head\.|projector\.|predictor\.|prototypes\."
    r"|queue$|queue_ptr$|n_averaged$)"
)


class NoSuchWeightsError(ValueError):
    """The file has no second set of weights."""


def encoder_tensors(weights: Mapping[str, Any], which: str = "default") -> tuple[dict[str, Any], list[str], str | None]:
    """The encoder's tensors of a state dict, in timm's names where they are known to differ.

    Args:
        weights: State dict, possibly of a bigger module.
        which: ``default``: what the method's own code evaluates; ``ema``: the moving average; ``trained``: what gradients trained.

    Returns:
        The encoder's tensors, the names of those left out, and the method (``MoCo`` and others) where prefixes tell it.

    Raises:
        UserError: Sharded weights.
        NoSuchWeightsError: ``ema`` is asked for and the names tell of no average.
    """
    if any(FLAT in name for name in weights):
        raise UserError(
            "it holds flattened shards of FSDP. Save the whole state dict: FullStateDictConfig in torch, "
            "or full_state_dict=True in torch.distributed.checkpoint.state_dict"
        )
    left_out: list[str] = []
    scheme, averaged = None, False
    inside = ""
    weights = _without_wrappers(weights)
    while True:
        prefix = next((p for p in _prefixes(weights, which) if _is_encoder(weights, p)), None)
        if prefix is None:
            break
        left_out += [inside + k for k in weights if not k.startswith(prefix)]
        scheme = scheme or _scheme(weights, prefix)
        averaged = averaged or prefix in AVERAGED
        inside += prefix
        weights = _without_wrappers({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
    if which == "ema" and not averaged:
        raise NoSuchWeightsError
    weights = in_timm_names(weights)
    heads = [k for k in weights if HEADS.match(k)]
    return {k: v for k, v in weights.items() if k not in heads}, left_out + [inside + k for k in heads], scheme


def in_timm_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names of torchvision's, Microsoft's and Meta's own code turned into timm's; others stay as they are.

    Known are torchvision's ConvNeXt and Swin (v1 and v2), Meta's ConvNeXt, Microsoft's Swin, and a ResNet whose layers were
    put into a ``Sequential`` without names. torchvision's ResNets have timm's names already.

    Examples:
        >>> import torch
        >>> tensors = {"features.0.0.weight": torch.ones(96, 3, 4, 4), "features.1.0.layer_scale": torch.ones(96, 1, 1)}
        >>> {name: tuple(t.shape) for name, t in in_timm_names(tensors).items()}
        {'stem.0.weight': (96, 3, 4, 4), 'stages.0.blocks.0.gamma': (96,)}
    """
    names = list(weights)
    if any(re.match(r"features\.\d+\.\d+\.layer_scale$", n) for n in names):
        return {_torchvision_convnext(n): _flat(v) if n.endswith("layer_scale") else v for n, v in weights.items()}
    if any(re.match(r"features\.\d+\.\d+\.attn\.", n) for n in names):
        return _torchvision_swin(weights)
    if any(n.startswith("downsample_layers.") for n in names):
        return {_meta_convnext(n): v for n, v in weights.items()}
    if any(re.match(r"layers\.0\.downsample\.", n) for n in names) and "patch_embed.proj.weight" in weights:
        return _microsoft_swin(weights)
    if names and all(re.match(r"[014567]\.", n) for n in names) and "4.0.conv1.weight" in weights:
        children = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
        return {children[n[0]] + n[1:]: v for n, v in weights.items()}
    return dict(weights)


def in_groups(names: list[str]) -> str:
    """Names in a sentence, by what they begin with.

    Examples:
        >>> in_groups(["student.a", "student.b", "queue"])
        'student (2 tensors), queue (1 tensor)'
    """
    counts = Counter(name.partition(".")[0] for name in names)
    return listed([f"{k} ({n} tensor{'s' * (n > 1)})" for k, n in counts.items()], 8)


def _without_wrappers(weights: Mapping[str, Any]) -> dict[str, Any]:
    # an averaged model of torch counts beside the wrapped module
    stripped = {WRAPPERS.sub("", k): v for k, v in weights.items() if k != "n_averaged"}
    while stripped and all(k.startswith("module.") for k in stripped):
        stripped = {WRAPPERS.sub("", k[len("module.") :]): v for k, v in stripped.items()}
    if len(stripped) < len(weights) - ("n_averaged" in weights):
        raise UserError(
            "it holds some tensors twice, with and without the prefix of a wrapper (_orig_mod., module.). Save the state dict of "
            "one of them"
        )
    return stripped


def _prefixes(weights: Mapping[str, Any], which: str) -> tuple[str, ...]:
    # a teacher without a student is another network that was distilled from, not the average of this one
    is_pair = any(k.startswith(("student.", "student_backbone.")) for k in weights)
    if which == "default" and not is_pair:
        teachers = ("teacher_backbone.", "teacher.")
        return (*(p for p in ENCODERS[which] if p not in teachers), *teachers)
    return ENCODERS[which]


def _is_encoder(weights: Mapping[str, Any], prefix: str) -> bool:
    return any(k.startswith(prefix) and isinstance(v, Tensor) and v.ndim == 4 for k, v in weights.items())


def _scheme(weights: Mapping[str, Any], prefix: str) -> str | None:
    if prefix in SCHEMES:
        return SCHEMES[prefix]
    tops = {k.partition(".")[0] for k in weights}
    if {"teacher", "student"} <= tops:
        return "teacher and student"
    return None


def _torchvision_convnext(name: str) -> str:
    layers = {
        "block.0": "conv_dw",
        "block.2": "norm",
        "block.3": "mlp.fc1",
        "block.5": "mlp.fc2",
        "layer_scale": "gamma",
    }
    if match := re.match(r"features\.(\d+)\.(\d+)\.(.+)$", name):
        group, index, rest = int(match[1]), match[2], match[3]
        if group == 0:
            return f"stem.{index}.{rest}"
        if group % 2 == 0:
            return f"stages.{group // 2}.downsample.{index}.{rest}"
        for old, new in layers.items():
            if rest == old or rest.startswith(f"{old}."):
                return f"stages.{group // 2}.blocks.{index}.{new}{rest[len(old) :]}"
    return re.sub(r"^classifier\.2\.", "head.fc.", re.sub(r"^classifier\.0\.", "head.norm.", name))


def _torchvision_swin(weights: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, tensor in weights.items():
        # computed anew from the window
        if name.endswith(("relative_position_index", "relative_coords_table")):
            continue
        new = re.sub(r"^head\.", "head.fc.", name)
        if match := re.match(r"features\.(\d+)\.(.+)$", name):
            group, rest = int(match[1]), match[2]
            if group == 0:
                new = "patch_embed." + {"0": "proj", "2": "norm"}.get(rest[0], rest[0]) + rest[1:]
            elif group % 2 == 0:
                new = f"layers.{group // 2}.downsample.{rest}"
            else:
                new = f"layers.{group // 2}.blocks.{rest}".replace(".mlp.0.", ".mlp.fc1.").replace(
                    ".mlp.3.", ".mlp.fc2."
                )
        renamed[new] = tensor
    if any(".cpb_mlp." in name for name in renamed):
        for name in [n for n in renamed if n.endswith(".attn.qkv.bias")]:
            # version 2 has no bias of the keys, which torchvision stores and sets to zero
            query, _, value = renamed.pop(name).chunk(3)
            renamed[name.replace("qkv.bias", "q_bias")], renamed[name.replace("qkv.bias", "v_bias")] = query, value
    return renamed


def _microsoft_swin(weights: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(("relative_position_index", "relative_coords_table", "attn_mask")):
            continue
        new = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
        renamed[re.sub(r"^head\.(?=weight$|bias$)", "head.fc.", new)] = tensor
    return renamed


def _meta_convnext(name: str) -> str:
    new = re.sub(r"^downsample_layers\.0\.", "stem.", name)
    new = re.sub(r"^downsample_layers\.(\d+)\.(\d+)", r"stages.\1.downsample.\2", new)
    new = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", new)
    new = new.replace(".dwconv.", ".conv_dw.").replace(".pwconv1.", ".mlp.fc1.").replace(".pwconv2.", ".mlp.fc2.")
    return re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.(?=weight$|bias$)", "head.fc.", new))


def _flat(tensor: Any) -> Any:
    return tensor.flatten() if isinstance(tensor, Tensor) else tensor
