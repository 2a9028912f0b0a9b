"""nnU-Net trainers that start from the selected encoder."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mtl_nnunet import __version__
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import to_json, write_text, written_atomically
from mtl_nnunet.plans import RECORD_KEY, selection_of, with_timm_unet
from mtl_nnunet.selection import Selection, load_selected_encoder

RECORD_FILE = "mtl_selection.json"
ITERATIONS_VARIABLE = "MTL_ITERATIONS_PER_EPOCH"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
# nnU-Net's own way for a model to predict where its trainer is not on the path; the real one stands in the plans
TRAINER_NAME_FOR_PREDICTION = "nnUNetTrainer"


class MTLTrainer(nnUNetTrainer):
    """nnU-Net's trainer with TimmUNet, starting from the dataset's selection.

    AdamW; the pretrained encoder learns at a tenth of the decoder's rate; linear warm-up, then nnU-Net's polynomial
    decay, applied to every group by the same factor so that the groups keep their ratio.
    """

    load_encoder = True
    encoder_lr_factor = 0.1

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net records the arguments by this signature
    ):
        plans = deepcopy(plans)
        self.selection: Selection | None = None
        self.resuming = False
        record = self._selected(plans, configuration, fold, dataset_json)
        plans = with_timm_unet(
            plans, configuration, {**record, "trainer": type(self).__name__, "trained_with": __version__}
        )
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-3
        self.weight_decay = 1e-2
        self.warmup_epochs = 10
        self._set_iterations()

    def initialize(self) -> None:
        """Build the network and, unless a checkpoint follows, load the selected encoder into it."""
        super().initialize()
        network = self._bare_network()
        record = self.plans_manager.plans[RECORD_KEY]
        if self.resuming:
            self.print_to_log_file(f"Encoder {record['encoder']}: weights come from the checkpoint of this fold.")
        elif not self.load_encoder:
            self.print_to_log_file(f"Encoder {record['encoder']}: random weights.")
        else:
            if self.selection is None:
                self.selection = selection_of(self.plans_manager.plans)
            load_selected_encoder(self.selection, network.encoder)
            self.print_to_log_file(f"Encoder weights: {self.selection.summary}.")
        self.print_to_log_file(
            f"Recipe: AdamW, weight decay {self.weight_decay:g}, {self._warmup()} warm-up epochs, poly decay over "
            f"{self.num_epochs} epochs of {self.num_iterations_per_epoch} iterations; learning rate "
            f"{self.initial_lr:g}, encoder {self.initial_lr * self.encoder_lr_factor:g}; patch size "
            f"{list(self.configuration_manager.patch_size)}."
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """AdamW with the encoder in a group of its own; biases and norms are not decayed."""
        network = self._bare_network()
        # nnU-Net calls this before it converts the network for several GPUs
        if self.is_ddp and any(type(m).__name__.startswith("BatchNormAct") for m in network.encoder.modules()):
            raise UserError(
                f"encoder '{network.encoder.name}' cannot be trained on several GPUs yet: nnU-Net's conversion to SyncBatchNorm "
                "would drop its activations. Train on one GPU, or use a ResNet or ConvNeXt."
            )
        encoder = {id(p) for p in network.encoder.parameters()}
        groups: list[dict[str, Any]] = []
        for name, in_encoder, lr in (
            ("decoder", False, self.initial_lr),
            ("encoder", True, self.initial_lr * self.encoder_lr_factor),
        ):
            parameters = [p for p in network.parameters() if (id(p) in encoder) == in_encoder and p.requires_grad]
            for decayed in (True, False):
                groups.append(
                    {
                        "name": f"{name}, {'decayed' if decayed else 'not decayed'}",
                        "params": [p for p in parameters if (p.ndim > 1) == decayed],
                        "lr": lr,
                        "weight_decay": self.weight_decay if decayed else 0.0,
                    }
                )
        optimizer = torch.optim.AdamW(groups)
        return optimizer, EpochwiseLR(optimizer, self.num_epochs, self._warmup())

    def on_train_start(self) -> None:
        """Take possession of the model folder before nnU-Net writes its plans there."""
        if self.local_rank == 0:
            self._claim_model_folder()
        super().on_train_start()

    def save_checkpoint(self, filename: str) -> None:
        """Write the checkpoint atomically, in types that load with ``weights_only=True``."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self._bare_network().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": _plain(self.logger.get_checkpoint()),
            "_best_ema": _plain(self._best_ema),
            "current_epoch": self.current_epoch + 1,
            "init_args": _plain(self.my_init_kwargs),
            "trainer_name": TRAINER_NAME_FOR_PREDICTION,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }
        with written_atomically(filename) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:
                # torch's zip writer hides the operating system's reason
                raise OSError(f"torch could not write the checkpoint ({str(error).splitlines()[0]})") from error

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue or validate: everything comes from the checkpoint, the encoder's file is not needed.

        Raises:
            UserError: The file cannot be read safely, or was begun from another selection.
        """
        checkpoint = _read_checkpoint(filename_or_checkpoint)
        begun_from = checkpoint["init_args"]["plans"].get(RECORD_KEY, {}).get("encoder_sha256")
        record = self.plans_manager.plans[RECORD_KEY]
        if begun_from != record["encoder_sha256"]:
            raise UserError(_other_selection(Path(filename_or_checkpoint).parent, begun_from, record["encoder_sha256"]))
        self.resuming = True
        super().load_checkpoint(filename_or_checkpoint)

    def _selected(
        self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any]
    ) -> dict[str, Any]:
        """The record of the selection to train from, checked against what the model folder was begun from."""
        folder = _model_folder(type(self).__name__, plans, configuration)
        begun = _read_record(folder)
        fold_folder = folder / f"fold_{fold}"
        if begun is not None and any((fold_folder / name).is_file() for name in CHECKPOINTS):
            try:
                self.selection = selection_of(plans)
            except UserError:
                # a fold that has a checkpoint can go on without the selection it came from
                return begun
        else:
            self.selection = selection_of(plans)
        record = {**plans.get(RECORD_KEY, {}), **self.selection.record()}
        if begun is not None and begun["encoder_sha256"] != record["encoder_sha256"]:
            raise UserError(_other_selection(folder, begun["encoder_sha256"], record["encoder_sha256"]))
        if self.selection.dataset != plans["dataset_name"]:
            raise UserError(
                f"the selection in {self.selection.folder} was made for {self.selection.dataset}, not for "
                f"{plans['dataset_name']}. Run mtl-select-checkpoint for this dataset."
            )
        if isinstance(self.selection.fold, int) and fold != self.selection.fold:
            raise UserError(
                f"the selection in {self.selection.folder} looked at labels of all cases but the validation cases of fold "
                f"{self.selection.fold}, so fold {fold} would be validated on cases it was chosen by. Select for this fold: "
                f"mtl-select-checkpoint -f {fold}."
            )
        channels = len(dataset_json.get("channel_names", dataset_json.get("modality", {})))
        if channels != self.selection.input_channels:
            raise UserError(
                f"{plans['dataset_name']} has {channels} channels, but the selection was made with {self.selection.input_channels}. "
                "Run mtl-select-checkpoint again with --overwrite."
            )
        return record

    def _claim_model_folder(self) -> None:
        """Write which selection this model folder belongs to; the first fold to start decides."""
        folder = Path(self.output_folder_base)
        record = self.plans_manager.plans[RECORD_KEY]
        file = folder / RECORD_FILE
        temporary = folder / f".{RECORD_FILE}.{os.getpid()}.tmp"
        write_text(temporary, to_json(record))
        try:
            # a link is made only where no file is: of two folds that start at once, one finds the other's record
            os.link(temporary, file)
        except FileExistsError:
            pass
        except OSError:
            # file systems without hard links
            if not file.exists():
                os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        begun = _read_record(folder)
        begun_from = str(begun["encoder_sha256"]) if begun else None
        if begun_from != record["encoder_sha256"]:
            raise UserError(_other_selection(folder, begun_from, record["encoder_sha256"]))

    def _set_iterations(self) -> None:
        """Iterations per epoch from the environment: the way to train on a CPU without a class of one's own."""
        text = os.environ.get(ITERATIONS_VARIABLE)
        if not text:
            return
        numbers = text.split(",")
        if not 1 <= len(numbers) <= 2 or not all(n.strip().isdigit() and int(n) > 0 for n in numbers):
            raise UserError(
                f"{ITERATIONS_VARIABLE}={text} is not valid. Expected iterations per epoch, e.g. 50 or 50,10 "
                "(training,validation)."
            )
        self.num_iterations_per_epoch = int(numbers[0])
        self.num_val_iterations_per_epoch = int(numbers[-1]) if len(numbers) > 1 else max(1, int(numbers[0]) // 5)

    def _warmup(self) -> int:
        return int(min(self.warmup_epochs, self.num_epochs // 10))

    def _bare_network(self) -> Any:
        network: Any = (
            self.network.module if isinstance(self.network, nn.parallel.DistributedDataParallel) else self.network
        )
        return getattr(network, "_orig_mod", network)


class MTLTrainerScratch(MTLTrainer):
    """The same network and recipe from random weights, for a fair comparison.

    Random weights have nothing to preserve, so the encoder learns at the full rate.
    """

    load_encoder = False
    encoder_lr_factor = 1.0


class EpochwiseLR(LambdaLR):
    """Linear warm-up, then nnU-Net's polynomial decay, as one factor on each group's own rate.

        f(e) = (e + 1) / (w + 1)                     e < w
        f(e) = (1 - (e - w) / (E - w))^0.9           e >= w

    nnU-Net calls ``step(epoch)`` with the epoch it is about to train, also after resuming; its own schedulers write one
    rate into every group, which would undo the groups.

    Args:
        optimizer: Its groups' ``lr`` are the rates at factor 1.
        num_epochs: E.
        warmup_epochs: w.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_epochs: int, warmup_epochs: int = 0):
        def factor(epoch: int) -> float:
            if epoch < warmup_epochs:
                return (epoch + 1) / (warmup_epochs + 1)
            remaining = max(0.0, 1 - (epoch - warmup_epochs) / (num_epochs - warmup_epochs))
            return float(remaining**0.9)

        super().__init__(optimizer, factor)

    def step(self, epoch: int | None = None) -> None:
        """Set every group's rate for an epoch; without one, for the next."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        rates = [base * f(self.last_epoch) for base, f in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def _short(trainer: type[MTLTrainer], epochs: int) -> type[MTLTrainer]:
    name = f"{trainer.__name__}_{epochs}epoch{'' if epochs == 1 else 's'}"

    def __init__(
        self: MTLTrainer,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        trainer.__init__(self, plans, configuration, fold, dataset_json, device)
        self.num_epochs = epochs

    return type(
        name,
        (trainer,),
        {"__init__": __init__, "__module__": __name__, "__doc__": f"{trainer.__name__} for {epochs} epochs."},
    )


MTLTrainer_1epoch = _short(MTLTrainer, 1)
MTLTrainer_5epochs = _short(MTLTrainer, 5)
MTLTrainer_10epochs = _short(MTLTrainer, 10)
MTLTrainerScratch_1epoch = _short(MTLTrainerScratch, 1)
MTLTrainerScratch_5epochs = _short(MTLTrainerScratch, 5)
MTLTrainerScratch_10epochs = _short(MTLTrainerScratch, 10)


def _model_folder(trainer: str, plans: dict[str, Any], configuration: str) -> Path:
    if not nnUNet_results.is_set():
        raise UserError("the environment variable nnUNet_results is not set. Set it as nnU-Net's documentation says.")
    return Path(nnUNet_results.get(), plans["dataset_name"], f"{trainer}__{plans['plans_name']}__{configuration}")


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        record["encoder_sha256"], record["encoder"], record["input_channels"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}). Delete the model folder, or restore the file.") from error
    return record


def _other_selection(folder: Path, begun_from: str | None, selected: str) -> str:
    return (
        f"{folder} was begun from another selection (SHA-256 {str(begun_from)[:12]}) than the one selected now "
        f"({selected[:12]}), and folds of one model must share it. Train under plans of another name (mtl-nnunet plans, then -p), "
        "select the first checkpoint again, or delete that folder."
    )


def _read_checkpoint(filename: str) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(filename, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{filename} cannot be read as a checkpoint of MTLTrainer ({type(error).__name__}). It is damaged or of another "
            "trainer: delete it to start this fold again."
        ) from error
    return checkpoint


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as Python numbers, at any depth: ``weights_only=True`` refuses the former."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else value
