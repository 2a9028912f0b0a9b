"""GPU memory of training, counted without a GPU, and the batch size that a memory target allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from mtl_nnunet.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

GB = 2**30
MIN_BATCH_SIZE = 2
# nnU-Net's ExperimentPlanner.max_dataset_covered and UNet_min_batch_size
MAX_DATASET_COVERED = 0.05
RESERVE = GB
# counting stops being quick far beyond what any GPU has
MAX_TARGET_GB = 1024
FRAGMENTATION = 0.1
ADAMW_MOMENTS, SGD_MOMENTS = 2, 1
ASSUMPTIONS = (
    "one GPU, mixed precision as nnU-Net trains on CUDA (float16 autocast, float32 weights), without torch.compile, which keeps less",
    "kept tensors: what autograd saves for backward in the network and in nnU-Net's loss at every deep-supervision scale it uses",
    "working memory of backward: twice the largest kept tensor; an optimiser step after it: the size of the weights",
    "float32 weights, gradients and optimiser state (AdamW: two moments a parameter; nnU-Net's SGD for its own network: one)",
    f"allocator fragmentation {FRAGMENTATION:.0%}; CUDA context and cuDNN workspaces {RESERVE / GB:g} GB; 1 GB = 2^30 bytes",
    f"nnU-Net's rules: a batch of at least {MIN_BATCH_SIZE}, and of at most {MAX_DATASET_COVERED:.0%} of the dataset's voxels",
)


@dataclass(frozen=True)
class Kept:
    """Tensors that autograd saves for backward, each storage once.

    Attributes:
        total: Bytes of all.
        largest: Bytes of the largest.
    """

    total: int
    largest: int


@dataclass(frozen=True)
class TrainingMemory:
    """What one training step holds on the GPU, in bytes.

    Attributes:
        weights: Parameters and buffers.
        gradients: One for each parameter that learns.
        optimizer: The optimiser's state.
        batch: Images and targets.
        kept: What autograd saves.
    """

    weights: int
    gradients: int
    optimizer: int
    batch: int
    kept: Kept

    @property
    def working(self) -> int:
        """Bytes that come and go: at the larger of the two peaks, in backward or in the optimiser's step, beyond ``kept``.

        working = max(2 largest, weights - kept), at least 0
        """
        return max(2 * self.kept.largest, self.weights - self.kept.total)

    @property
    def total(self) -> int:
        """Bytes of GPU memory that the step needs.

        total = reserve + (1 + fragmentation) (weights + gradients + optimizer + batch + kept + working)
        """
        held = self.weights + self.gradients + self.optimizer + self.batch + self.kept.total + self.working
        return RESERVE + round((1 + FRAGMENTATION) * held)


@dataclass(frozen=True)
class BatchSize:
    """A batch size and what decided it.

    Attributes:
        configuration: nnU-Net's name of the configuration.
        network: Class of the network.
        patch_size: Its patch.
        size: The batch size to train with.
        fits: The largest that fits into the memory target; 0 if not even nnU-Net's smallest batch does.
        covers: The largest that covers at most 5 % of the dataset's voxels.
        planned: The batch size in the plans.
        memory: What a batch of ``size`` needs, or, where nothing fits, nnU-Net's smallest batch.
    """

    configuration: str
    network: str
    patch_size: tuple[int, ...]
    size: int
    fits: int
    covers: int
    planned: int
    memory: TrainingMemory


def kept_tensors(forward: Callable[[], object], counted_elsewhere: Iterable[Tensor] = ()) -> Kept:
    """What autograd saves during a forward pass, counted from the tensors themselves.

    Args:
        forward: Runs the forward pass and returns the loss; backward is not needed.
        counted_elsewhere: Tensors whose storages are left out, such as parameters and the batch.

    Returns:
        Bytes; views of one storage count once, with the whole storage.
    """
    import torch

    # a storage that dies could lend its address to the next one, so all are held until the count is done
    others = [t.untyped_storage() for t in counted_elsewhere]
    left_out = {s._cdata for s in others}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
        sizes = [s.nbytes() for s in saved.values()]
    del loss
    return Kept(sum(sizes), max(sizes, default=0))


@contextmanager
def mixed_precision(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast``, also for CUDA where there is no GPU; None switches nothing on."""
    import torch

    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # torch.autocast("cuda") switches itself off on a machine without a GPU
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def nnunet_loss(label_manager: Any, batch_dice: bool) -> Callable[[Any, list[Tensor]], Tensor]:
    """nnU-Net's Dice and cross-entropy over the outputs of a network with deep supervision.

    The coarsest output has weight 0 in nnU-Net and costs nothing in the loss.

    Args:
        label_manager: Of the plans: labels or regions, with or without an ignore label.
        batch_dice: Of the configuration.

    Returns:
        A function of the outputs (a list, finest first, or one tensor) and one target a scale.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss as Dice

    ignored = label_manager.ignore_label
    options = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": label_manager.has_regions, "ddp": False}
    if label_manager.has_regions:
        loss: Any = DC_and_BCE_loss({}, options, use_ignore_label=ignored is not None, dice_class=Dice)
    else:
        loss = DC_and_CE_loss(options, {}, ignore_label=ignored, dice_class=Dice)

    def with_ignored(output: Tensor, target: Tensor) -> Any:
        # what nnU-Net's loss does where a patch has annotated voxels; whether it has, tensors without values cannot say
        mask = target != ignored
        dice = loss.dc(output, target.where(mask, target.new_zeros(())), loss_mask=mask)
        return dice + loss.ce(output, target[:, 0])

    one = loss if ignored is None or label_manager.has_regions else with_ignored

    def every_scale(outputs: Any, targets: list[Tensor]) -> Tensor:
        if not isinstance(outputs, (list, tuple)):
            outputs = [outputs]
        scored = list(outputs)[:-1] or list(outputs)
        pairs = zip(scored, targets[: len(scored)], strict=True)
        losses = [one(output, target) / 2**i for i, (output, target) in enumerate(pairs)]
        total: Tensor = sum(losses[1:], losses[0])
        return total

    return every_scale


def targets_of(outputs: Any, label_manager: Any) -> list[Tensor]:
    """Empty targets as nnU-Net's data loader makes them, one a scale: int16 labels, or one bool map a region."""
    import torch

    channels, dtype = 1, torch.int16
    if label_manager.has_regions:
        channels = label_manager.num_segmentation_heads + (label_manager.ignore_label is not None)
        dtype = torch.bool
    scales = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [torch.zeros((len(o), channels, *o.shape[2:]), dtype=dtype, device=o.device) for o in scales]


def memory_counter(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    moments: int = ADAMW_MOMENTS,
    device: str = "cuda",
    dtype: str | None = "float16",
    fake: bool = True,
) -> Callable[[int], TrainingMemory]:
    """A function that says what training at a batch size holds, for the network that plans name.

    The network runs on tensors without values, so that neither a GPU nor the memory is needed and a count takes about as
    long for a large patch as for a small one.

    Args:
        plans: nnU-Net's plans; network, patch size and Dice are read from them.
        configuration: Which of their configurations.
        dataset_json: nnU-Net's ``dataset.json``: channels and labels.
        moments: float32 values that the optimiser keeps for a parameter.
        device: Device whose kernels are counted.
        dtype: Half precision of autocast; None for float32 throughout.
        fake: False computes with real tensors on a device that exists.

    Returns:
        Batch size to bytes.

    Raises:
        UserError: The network cannot be built, or cannot run on tensors without values.
    """
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from torch._subclasses.fake_tensor import FakeTensorMode

    manager = PlansManager(deepcopy(plans))
    resolved = manager.get_configuration(configuration)
    labels = manager.get_label_manager(dataset_json)
    channels = determine_num_input_channels(manager, resolved, dataset_json)
    # real at first: constructors may compute with values, e.g. drop-path rates
    network = get_network_from_plans(
        resolved.network_arch_class_name,
        resolved.network_arch_init_kwargs,
        resolved.network_arch_init_kwargs_req_import,
        channels,
        labels.num_segmentation_heads,
        allow_init=False,
        deep_supervision=True,
    )
    mode: Any = FakeTensorMode() if fake else nullcontext()
    with mode:
        network = _without_values(network, device) if fake else network.to(device)
    network.train()
    loss_of = nnunet_loss(labels, resolved.batch_dice)
    parameters = list(network.parameters())
    weights = [*parameters, *network.buffers()]
    learning = sum(p.nbytes for p in parameters if p.requires_grad)
    precision = None if dtype is None else getattr(torch, dtype)

    examples: list[Tensor] = []

    def memory(batch_size: int) -> TrainingMemory:
        with mode:
            images = torch.zeros((batch_size, channels, *resolved.patch_size), device=device)
            if not examples:
                with torch.no_grad(), mixed_precision(device, precision):
                    examples.extend(targets_of(network(images), labels))
            targets = [e.new_zeros((batch_size, *e.shape[1:])) for e in examples]

            def forward() -> object:
                outputs = network(images)
                return outputs, loss_of(outputs, targets)

            with mixed_precision(device, precision):
                kept = kept_tensors(forward, [*weights, images, *targets])
        batch = images.nbytes + sum(t.nbytes for t in targets)
        return TrainingMemory(sum(w.nbytes for w in weights), learning, moments * learning, batch, kept)

    @cache
    def counted(batch_size: int) -> TrainingMemory:
        try:
            return memory(batch_size)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            # a network that cannot take this patch, or an operator that cannot run without values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the memory of {network_of(plans, configuration)} in configuration '{configuration}' cannot be counted at "
                f"patch size {list(resolved.patch_size)} ({reason}). Leave -gpu_memory_target out and set batch_size in the plans."
            ) from error

    return counted


def largest_batch(memory: Callable[[int], TrainingMemory], target: int) -> int:
    """The largest batch whose training fits into a memory target.

    Bytes are affine in the batch size, apart from the largest tensor, which may be a weight for small batches; so lines
    through counts give a guess, and counts around the guess decide.

    Args:
        memory: Batch size to what it needs, e.g. of ``memory_counter``.
        target: Bytes.

    Returns:
        Batch size; 0 if not even nnU-Net's smallest fits.
    """

    def fits(size: int) -> bool:
        return memory(size).total <= target

    low = MIN_BATCH_SIZE
    if not fits(low):
        return 0
    size = 2 * low
    # the second line lies where the largest tensor grows with the batch
    for _ in range(2):
        half = max(low, size // 2)
        if size > half:
            slope = (memory(size).total - memory(half).total) / (size - half)
            size = max(low, half + int((target - memory(half).total) / slope))
    step = 1
    if fits(size):
        while fits(size + step):
            size, step = size + step, 2 * step
        low, high = size, size + step
    else:
        while size - step > low and not fits(size - step):
            size, step = size - step, 2 * step
        low, high = max(low, size - step), size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def five_percent_batch(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> int:
    """nnU-Net's cap on the batch: at most 5 % of the dataset's voxels after resampling.

        round(0.05 * voxels of the median case * cases / voxels of the patch)

    A 2D configuration does not state how many slices the median case has: that is taken from 3d_fullres, or else from
    the original median shape.

    Raises:
        UserError: The plans or ``dataset.json`` lack what nnU-Net's planner writes there.
    """
    from mtl_nnunet.plans import resolved_configuration

    resolved = resolved_configuration(plans, configuration)
    try:
        shape = [float(s) for s in resolved.median_image_size_in_voxels]
        if len(shape) == 2:
            full = plans["configurations"].get("3d_fullres", {}).get("median_image_size_in_voxels")
            shape = [float((full or plans["original_median_shape_after_transp"])[0]), *shape]
        cases = int(dataset_json["numTraining"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the plans '{plans.get('plans_name')}' or dataset.json do not say how many voxels the dataset has ({error!r}), so "
            "nnU-Net's limit on the batch size cannot be kept. Plan the dataset again with nnUNetv2_plan_experiment."
        ) from error
    voxels, patch = prod(shape) * cases, prod(int(s) for s in resolved.patch_size)
    return round(MAX_DATASET_COVERED * voxels / patch)


def size_batch(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], target: int, moments: int = ADAMW_MOMENTS
) -> BatchSize:
    """The batch size of a configuration for a memory target, by nnU-Net's rules.

        size = max(2, min(the largest that fits, the largest that covers 5 % of the dataset))

    Args:
        plans: nnU-Net's plans.
        configuration: Which of their configurations; its patch size stays.
        dataset_json: nnU-Net's ``dataset.json``.
        target: Bytes of GPU memory.
        moments: float32 values that the optimiser keeps for a parameter.

    Returns:
        The size and what decided it; whether anything fits is left to the caller.

    Raises:
        UserError: The network's memory or the dataset's voxels cannot be counted.
    """
    from mtl_nnunet.plans import resolved_configuration

    resolved = resolved_configuration(plans, configuration)
    covers = five_percent_batch(plans, configuration, dataset_json)
    memory = memory_counter(plans, configuration, dataset_json, moments)
    fits = largest_batch(memory, target)
    size = max(MIN_BATCH_SIZE, min(fits, covers))
    return BatchSize(
        configuration,
        network_of(plans, configuration),
        tuple(int(s) for s in resolved.patch_size),
        size,
        fits,
        covers,
        int(resolved.batch_size),
        memory(size),
    )


def size_batches(
    source: dict[str, Any], plans: dict[str, Any], configurations: Iterable[str], target_gb: float
) -> list[tuple[BatchSize, BatchSize | UserError]]:
    """Batch sizes for a memory target, each beside what the network of the source plans would get by the same count.

    Args:
        source: The plans that ``plans`` were made from, with nnU-Net's own network.
        plans: Plans that name TimmUNet.
        configurations: Which of their configurations.
        target_gb: GPU memory in GB of 2^30 bytes.

    Returns:
        For each configuration ours and the source's, or why the latter could not be counted.

    Raises:
        UserError: The target is no positive number, nothing fits into it, or something cannot be counted.
    """
    from mtl_nnunet.plans import preprocessed_folder

    if not (isfinite(target_gb) and 0 < target_gb <= MAX_TARGET_GB):
        raise UserError(f"-gpu_memory_target {target_gb:g} is not valid. Expected GB of one GPU's memory, e.g. 8.")
    target = int(target_gb * GB)
    file = preprocessed_folder(plans["dataset_name"]) / "dataset.json"
    try:
        dataset_json: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}). nnU-Net's planner writes it: plan the dataset again."
        ) from error
    sized: list[tuple[BatchSize, BatchSize | UserError]] = []
    for configuration in configurations:
        ours = size_batch(plans, configuration, dataset_json, target)
        if not ours.fits:
            raise UserError(
                f"{ours.network} in configuration '{configuration}' does not fit into {target_gb:g} GB: a batch of {ours.size} at "
                f"patch size {list(ours.patch_size)} needs {ours.memory.total / GB:.2f} GB by this count. Select a smaller encoder, or "
                "raise -gpu_memory_target."
            )
        try:
            stock: BatchSize | UserError = size_batch(source, configuration, dataset_json, target, SGD_MOMENTS)
        except UserError as error:
            stock = error
        sized.append((ours, stock))
    return sized


def report(sized: list[tuple[BatchSize, BatchSize | UserError]], source_name: str, target_gb: float) -> str:
    """The batch sizes, what a step of each holds, what decided them and what was assumed, in lines for a person."""
    lines = [f"batch sizes for {target_gb:g} GB of GPU memory:"]
    for ours, stock in sized:
        lines += [f"  {ours.configuration}: {_row(ours)} (the plans '{source_name}' had {ours.planned})"]
        memory = ours.memory
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimiser": memory.optimizer,
            "batch": memory.batch,
            "kept tensors": memory.kept.total,
            "working memory": memory.working,
        }
        lines.append("    holds " + ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items()) + " GB")
        if isinstance(stock, UserError):
            lines.append(f"    the network of '{source_name}': {stock}")
        elif not stock.fits:
            lines.append(f"    {stock.network} of '{source_name}' would not fit: {_row(stock)}")
        else:
            lines.append(f"    {stock.network} of '{source_name}' would get {_row(stock)}")
    return "\n".join([*lines, "assumed:", *(f"  {a}" for a in ASSUMPTIONS)])


def network_of(plans: dict[str, Any], configuration: str) -> str:
    """What to call a configuration's network: its class, and the encoder if it names one.

    Examples:
        >>> kwargs = {"encoder": "resnet18"}
        >>> architecture = {"network_class_name": "mtl_nnunet.network.TimmUNet", "arch_kwargs": kwargs}
        >>> network_of({"configurations": {"2d": {"architecture": architecture}}}, "2d")
        'TimmUNet (resnet18)'
    """
    from mtl_nnunet.plans import resolved_configuration

    resolved = resolved_configuration(plans, configuration)
    name = str(resolved.network_arch_class_name).rpartition(".")[2]
    encoder = resolved.network_arch_init_kwargs.get("encoder")
    return f"{name} ({encoder})" if encoder else name


def _row(batch: BatchSize) -> str:
    patch = " x ".join(str(s) for s in batch.patch_size)
    text = f"batch {batch.size} at patch {patch}, {batch.memory.total / GB:.2f} GB"
    if batch.fits > batch.covers:
        limit = f"5 % of the dataset's voxels allow {batch.covers}"
        text += f"; memory allows {batch.fits}, {limit}"
        if batch.covers < MIN_BATCH_SIZE:
            text += f", nnU-Net's smallest is {MIN_BATCH_SIZE}"
    return text


def _without_values(network: nn.Module, device: str) -> nn.Module:
    """The network with tensors of the same shapes on a device, inside the current ``FakeTensorMode``."""
    import torch

    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                made[id(tensor)] = torch.nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    originals = [*network.parameters(), *network.buffers()]
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = like(tensor)  # type: ignore[assignment]
    # ids are good only as long as the tensors live
    del originals
    return network
