"""MTLTrainer: nnU-Net's trainer, starting from the selected encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import timm.layers
import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from mtl_nnunet import __version__
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import temporary_beside, to_json, write_text, written_atomically
from mtl_nnunet.plans import ITERATIONS_KEY, RECIPE_KEY, RECORD_KEY, selection_of, with_timm_unet
from mtl_nnunet.recipe import (
    RECIPE_VARIABLE,
    EpochwiseLR,
    Recipe,
    optimizer_of,
    parameter_groups,
    recipe,
    recipe_of_environment,
)
from mtl_nnunet.selection import Selection, load_selected_encoder
from mtl_nnunet.trainings import CHECKPOINTS, TRAINED_WITH

RECORD_FILE = "mtl_selection.json"
ITERATIONS_VARIABLE = "MTL_ITERATIONS_PER_EPOCH"
# nnU-Net's own way for a model to predict where its trainer is not on the path; the real one stands in the plans
TRAINER_NAME_FOR_PREDICTION = "nnUNetTrainer"


class MTLTrainer(nnUNetTrainer):
    """nnU-Net's trainer with TimmUNet, starting from the dataset's selection.

    How it learns is a ``Recipe``: the defaults, changed by the plans, by ``MTL_RECIPE``, and by what defines a variant.
    It takes part in multiple inheritance: ``class Mine(MTLTrainer, nnUNetTrainerDA5)`` is both.

    Attributes:
        load_encoder: Whether the encoder starts from the selection or from random weights.
        fixed: Hyper-parameters that make a variant what it is.
    """

    load_encoder = True
    fixed: ClassVar[dict[str, Any]] = {}
    _best_ema: float | None

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
        self._refuse_what_would_be_ignored()
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "nnU-Net trains on a CUDA GPU unless told otherwise, and PyTorch finds none here. Add -device cpu (slow: shorten the epochs with "
                "MTL_ITERATIONS_PER_EPOCH) or -device mps, or see what mtl-nnunet doctor says of the GPU."
            )
        in_plans = plans.get(RECORD_KEY, {}).get(RECIPE_KEY, {})
        recipe(in_plans, where=f"the recipe in the plans '{plans.get('plans_name')}'")
        # a fold that goes on does so with its own recipe, whatever the environment says now
        goes_on = plans.get("continue_training") and _has_checkpoint(
            _model_folder(type(self).__name__, plans, configuration), fold
        )
        self.recipe = recipe(in_plans, {} if goes_on else recipe_of_environment(), self.fixed)
        record = {
            **self._selected(plans, configuration, fold, dataset_json),
            RECIPE_KEY: asdict(self.recipe),
            "trainer": type(self).__name__,
            TRAINED_WITH: __version__,
        }
        super().__init__(with_timm_unet(plans, configuration, record), configuration, fold, dataset_json, device)
        self.initial_lr = self.recipe.lr
        self.weight_decay = self.recipe.weight_decay
        # a run that is killed loses the epoch in progress and no more
        self.save_every = 1
        self._set_iterations()

    def initialize(self) -> None:
        """Build the network and, unless a checkpoint follows, load the selected encoder into it."""
        # what a subclass sets in nnU-Net's own way counts
        self._adopt(replace(self.recipe, lr=self.initial_lr, weight_decay=self.weight_decay))
        with _sync_batch_norm_keeps_activations():
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
            if self.selection.caution:
                self.print_to_log_file(
                    f"Warning: the encoder's weights ({self.selection.published}) are under {self.selection.licence}, which {self.selection.caution}."
                )
        self.print_to_log_file(
            f"Recipe: {self.recipe.summary}; {self._warmup()} of {self.num_epochs} epochs of "
            f"{self.num_iterations_per_epoch} iterations are warm-up, then poly decay; patch size "
            f"{list(self.configuration_manager.patch_size)}, batch size {self.configuration_manager.batch_size}, BatchNorm statistics of the "
            f"encoder {'frozen' if self._freezes_statistics() else 'live'}."
        )
        if self.fixed:
            fixed = ", ".join(f"{k}={v}" for k, v in self.fixed.items())
            self.print_to_log_file(f"{type(self).__name__} fixes {fixed}.")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, EpochwiseLR]:
        """The recipe's optimiser and a schedule that keeps the ratio of the groups' rates."""
        optimizer = optimizer_of(parameter_groups(self._bare_network(), self.recipe), self.recipe)
        return optimizer, EpochwiseLR(optimizer, self.num_epochs, self._warmup(), self._frozen_epochs())

    def on_train_epoch_start(self) -> None:
        """Before nnU-Net switches to training mode, say what of the encoder stays as it is."""
        frozen = self.current_epoch < self._frozen_epochs()
        encoder = self._bare_network().encoder
        encoder.frozen, encoder.frozen_statistics = frozen, self._freezes_statistics()
        super().on_train_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, with one message where memory runs out.

        Raises:
            UserError: Out of memory.
        """
        try:
            done: dict[str, Any] = super().train_step(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            patch = "x".join(str(s) for s in self.configuration_manager.patch_size)
            raise UserError(
                f"out of memory on {self.device} with batches of {self.batch_size} patches of {patch} ({self.configuration_name}, encoder "
                f"{self._bare_network().encoder.name}). Plan a smaller batch: mtl-nnunet plans -gpu_memory_target GB, then -p; "
                "or select a smaller encoder."
            ) from error
        return done

    def on_train_start(self) -> None:
        """Take possession of the model folder before nnU-Net writes its plans there."""
        self._record_iterations()
        if self.local_rank == 0:
            self._claim_model_folder()
            # of a run that was killed while it wrote
            for leftover in Path(self.output_folder).glob(".checkpoint_*.pth.*.tmp"):
                leftover.unlink(missing_ok=True)
        super().on_train_start()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, and then the picture of the training, beside the selection that it started from."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0 and self.load_encoder:
            self._draw_training()

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
        begun = checkpoint["init_args"]["plans"].get(RECORD_KEY, {})
        begun_from = begun.get("encoder_sha256")
        record = self.plans_manager.plans[RECORD_KEY]
        if begun_from != record["encoder_sha256"]:
            raise UserError(_other_selection(Path(filename_or_checkpoint).parent, begun_from, record["encoder_sha256"]))
        begun_with = recipe(begun.get(RECIPE_KEY, {}), self.fixed, where=filename_or_checkpoint)
        if begun_with != replace(self.recipe, lr=self.initial_lr, weight_decay=self.weight_decay):
            self.print_to_log_file(
                f"This fold goes on with the recipe it was begun with, not with the one that the plans or {RECIPE_VARIABLE} would "
                f"give now ({self.recipe.summary})."
            )
            self._adopt(begun_with)
        self.resuming = True
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except ValueError as error:
            raise UserError(
                f"the optimiser's state in {filename_or_checkpoint} does not fit ({error}): the fold was begun by another version of "
                f"mtl-nnunet ({begun.get(TRAINED_WITH, 'unknown')}; this is {__version__}). Install that one to go on with it."
            ) from error
        best = Path(filename_or_checkpoint).with_name("checkpoint_best.pth")
        if best.is_file():
            # of one epoch nnU-Net writes the latest checkpoint first, which knows only the best epoch before
            with suppress(UserError):
                known = (self._best_ema, _read_checkpoint(str(best))["_best_ema"])
                self._best_ema = max((ema for ema in known if ema is not None), default=None)

    def _selected(
        self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any]
    ) -> dict[str, Any]:
        """The record of the selection to train from, checked against what the model folder was begun from."""
        folder = _model_folder(type(self).__name__, plans, configuration)
        begun = _read_record(folder)
        if begun is not None and _has_checkpoint(folder, fold):
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
        temporary = temporary_beside(file)
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
        begun_with = begun.get(RECIPE_KEY, record[RECIPE_KEY]) if begun else record[RECIPE_KEY]
        if begun_with != record[RECIPE_KEY]:
            differing = ", ".join(f"{k}={v}" for k, v in begun_with.items() if v != record[RECIPE_KEY].get(k))
            self.print_to_log_file(
                f"Warning: the first fold of this model was begun with another recipe ({differing}). Folds of one model are "
                "comparable only with the same recipe."
            )

    def _draw_training(self) -> None:
        """A picture that cannot be drawn is one line in the log: the training is done, and stays what it is."""
        name = self.plans_manager.dataset_name
        try:
            # what it needs to draw may be broken too
            from mtl_nnunet.training_report import report_training

            report = report_training(
                name, self.configuration_name, self.fold, type(self).__name__, self.plans_manager.plans_name
            )
            self.print_to_log_file(f"Picture of the training: {report.page}")
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            self.print_to_log_file(f"Warning: no picture of the training was drawn: {said}")

    def _refuse_what_would_be_ignored(self) -> None:
        """Trainers that bring an optimiser or a network of their own do not go together with this one."""
        mro = type(self).__mro__
        for cls in mro[mro.index(MTLTrainer) + 1 : mro.index(nnUNetTrainer)]:
            for method in ("configure_optimizers", "build_network_architecture"):
                if method in vars(cls):
                    raise UserError(
                        f"{type(self).__name__} combines MTLTrainer with {cls.__name__}, whose {method} would be ignored or would not fit: "
                        "MTLTrainer brings a network and a recipe. Combine it with trainers that change augmentation, loss, sampling "
                        f"or length, and set hyper-parameters with {RECIPE_VARIABLE}."
                    )

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

    def _record_iterations(self) -> None:
        """nnU-Net records them nowhere, and trainings of other numbers are not comparable; of a fold with several there is no number."""
        now, record = self.num_iterations_per_epoch, self.plans_manager.plans[RECORD_KEY]
        if not self.resuming:
            record[ITERATIONS_KEY] = now
            return
        # of a fold that goes on nnU-Net saves the arguments that it was begun with
        begun = self.my_init_kwargs["plans"][RECORD_KEY]
        before = begun.get(ITERATIONS_KEY)
        if before not in (None, now) and self.current_epoch < self.num_epochs:
            self.print_to_log_file(
                f"Warning: this fold was begun with {before} iterations per epoch and goes on with {now} ({ITERATIONS_VARIABLE})."
            )
            begun[ITERATIONS_KEY] = None
        record[ITERATIONS_KEY] = begun.get(ITERATIONS_KEY)

    def _adopt(self, how: Recipe) -> None:
        self.recipe = how
        self.initial_lr, self.weight_decay = how.lr, how.weight_decay
        self.plans_manager.plans[RECORD_KEY][RECIPE_KEY] = asdict(how)

    def _warmup(self) -> int:
        return int(min(self.recipe.warmup_epochs, self.num_epochs // 10))

    def _frozen_epochs(self) -> int:
        return self.num_epochs if self.recipe.frozen_epochs == "all" else int(self.recipe.frozen_epochs)

    def _freezes_statistics(self) -> bool:
        # by the batch of all GPUs: shares of 7 are 4 and 3, and one GPU would wait for statistics that the other does not send
        return self.recipe.freezes_statistics(self.configuration_manager.batch_size)

    def _bare_network(self) -> Any:
        network: Any = (
            self.network.module if isinstance(self.network, nn.parallel.DistributedDataParallel) else self.network
        )
        return getattr(network, "_orig_mod", network)


@contextmanager
def _sync_batch_norm_keeps_activations() -> Iterator[None]:
    """For several GPUs nnU-Net calls torch's converter, which would drop the activation inside timm's BatchNormAct2d."""
    with mock.patch.object(nn.SyncBatchNorm, "convert_sync_batchnorm", timm.layers.convert_sync_batchnorm):
        yield


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _model_folder(trainer: str, plans: dict[str, Any], configuration: str) -> Path:
    if not nnUNet_results.is_set():
        raise UserError("the environment variable nnUNet_results is not set. Set it as nnU-Net's documentation says.")
    return Path(nnUNet_results.get(), plans["dataset_name"], f"{trainer}__{plans['plans_name']}__{configuration}")


def _has_checkpoint(folder: Path, fold: int) -> bool:
    return any((folder / f"fold_{fold}" / name).is_file() for name in CHECKPOINTS)


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
