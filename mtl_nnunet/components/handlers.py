"""Handlers for MONAI's and Ignite's engines: records and safe loading of weights, transferability along a training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl_nnunet.callbacks import MonitorHandler
from mtl_nnunet.cases import find_dataset_folder
from mtl_nnunet.components.data import Split, with_own_patients
from mtl_nnunet.components.plan import Plan, read_record, record_file, record_of
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import sha256, to_json, write_text
from mtl_nnunet.monitoring import Monitor
from mtl_nnunet.scores import parse_scores
from mtl_nnunet.slices import gather_slices
from mtl_nnunet.stopping import StopRule

logger = logging.getLogger(__name__)
MODEL_KEY = "model"


class ModelRecorder:
    """A handler for a validation engine that writes beside the weights what they are of, whenever they changed.

    Args:
        model: The file that MONAI's ``CheckpointSaver`` writes; this handler stands after it.
        plan: What the network is and what it is fed.
        cases: What it is trained and validated on.
        metric: Name of the metric to keep.
    """

    def __init__(self, model: str | Path, plan: Plan, cases: Split | None = None, metric: str = "val_mean_dice"):
        self.model = Path(model)
        self.plan = plan
        self.cases = cases
        self.metric = metric

    def attach(self, engine: Any) -> None:
        """Be called when the engine is done."""
        from ignite.engine import Events

        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write the record of weights that have none yet."""
        if not self.model.is_file():
            return
        with suppress(UserError):
            if read_record(self.model)["sha256"] == sha256(self.model):
                return
        value = engine.state.metrics.get(self.metric)
        # the trainer tells its validator which epoch it is
        record = record_of(
            self.model, self.plan, None if value is None else float(value), engine.state.epoch, self.cases
        )
        write_text(record_file(self.model), to_json(record))


class ValidateEvery:
    """A handler for a trainer that runs a validator after every so many epochs, and after the last one.

    MONAI's ``ValidationHandler`` leaves out the epochs after the last multiple of its interval.

    Args:
        validator: MONAI's ``Evaluator``; it is told the epoch.
        interval: In epochs.

    Raises:
        UserError: An interval below 1.
    """

    def __init__(self, validator: Any, interval: int):
        if interval < 1:
            raise UserError(f"val_interval is {interval}; expected at least 1 epoch.")
        self.validator = validator
        self.interval = interval

    def attach(self, engine: Any) -> None:
        """Be called after the epochs."""
        from ignite.engine import Events

        due = lambda trainer, epoch: epoch % self.interval == 0 or epoch == trainer.state.max_epochs  # noqa: E731
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)

    def __call__(self, engine: Any) -> None:
        """Validate."""
        self.validator.run(engine.state.epoch)


class ModelLoader:
    """A handler that loads a trained model when an engine starts, strictly and after checking its hash.

    Args:
        model: File of weights, with its record beside it.
        network: What to load them into, alone or inside ``DistributedDataParallel``.
    """

    def __init__(self, model: str | Path, network: nn.Module):
        self.model = Path(model)
        self.network = network

    def attach(self, engine: Any) -> None:
        """Be called when the engine starts."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any = None) -> None:
        """Load.

        Raises:
            UserError: No such file, one that was altered or cannot be read, or weights of another network.
        """
        load_model(self.model, self.network)


def keep_trained(model: str | Path, overwrite: bool = False) -> None:
    """Refuse to begin a training whose first validation would replace a trained model.

    Raises:
        UserError: There is one, and nothing says that it may be replaced.
    """
    if Path(model).exists() and not overwrite:
        raise UserError(
            f"{model} exists already. Pass --overwrite True to replace it, or --ckpt_dir FOLDER for another place."
        )


def enough_to_share(cases: Split, processes: int) -> None:
    """Refuse processes that would have no case to validate on, or none to learn from.

    Raises:
        UserError: Fewer cases than processes.
    """
    for part, entries in (("validation", cases.validation), ("training", cases.training)):
        if len(entries) < processes:
            raise UserError(
                f"{processes} processes share {len(entries)} {part} cases, and each needs one. Start fewer: --nproc_per_node={len(entries)}."
            )


def load_model(model: str | Path, network: nn.Module) -> None:
    """Load a trained model's weights, strictly and after checking their hash.

    Raises:
        UserError: As ``ModelLoader``.
    """
    record = read_record(model)
    found = sha256(model)
    if found != record["sha256"]:
        raise UserError(
            f"{model} is not the file that {record_file(model)} describes: SHA-256 {found[:12]}, expected {record['sha256'][:12]}. "
            "Copy both again from where the model was trained."
        )
    try:
        content = torch.load(model, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{model} cannot be read as weights ({type(error).__name__}). Copy it again.") from error
    weights = content.get(MODEL_KEY, content) if isinstance(content, dict) else content
    bare = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    own = bare.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{model} holds no weights of a network. Expected what configs/train.yaml writes.")
    odd = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
    if odd:
        raise UserError(
            f"{model} is of another network than this config's ({_name_of(bare)}): {len(odd)} tensors differ ({listed(odd, 2)}). "
            "Pass the settings it was trained with, or leave them out so that its record is followed."
        )
    bare.load_state_dict(weights)
    logger.info(f"loaded {model}, SHA-256 {found[:12]}")


def transferability_handler(
    dataset_dir: str | Path,
    output: str | Path,
    network: nn.Module,
    scores: str | Sequence[str] = "contrastive",
    rule: Mapping[str, Any] | None = None,
    every: int = 1,
    num_slices: int = 256,
    num_cases: int = 64,
    patients: str | Path | None = None,
    **options: Any,
) -> MonitorHandler:
    """A handler that scores the encoder of a training on a target after epochs, writes the curve, and stops by the rule.

    For loops of Ignite and MONAI that pretrain a timm network; see ``mtl_nnunet.callbacks.MonitorHandler``.

    Args:
        dataset_dir: Folder of the target: an nnU-Net raw dataset, or a Decathlon/MONAI datalist.
        output: Folder of history and curve.
        network: What is trained.
        scores: By which scores.
        rule: Fields of ``mtl_nnunet.stopping.StopRule``, such as ``{"name": "patience", "patience": 3}``.
        every: After every so many epochs.
        num_slices: Slices at most.
        num_cases: Cases read at most.
        patients: Table ``case,patient``; None takes ``patients.csv`` of the folder if it is there.
        options: Further ones of ``mtl_nnunet.monitoring.Monitor``.

    Raises:
        UserError: A dataset that cannot be read, or an unknown score or rule.
    """
    labelled = any(score.labels for score in parse_scores(scores))
    known = [field.name for field in fields(StopRule)]
    unknown = [str(name) for name in rule or {} if name not in known]
    if unknown:
        raise UserError(f"a rule has no field {listed(unknown)}. Available: {listed(known, len(known))}.")
    dataset = with_own_patients(find_dataset_folder(dataset_dir), dataset_dir, patients)
    slices = gather_slices(dataset, num_slices, num_cases, options.get("seed", 0), with_labels=labelled)
    monitor = Monitor(output, slices, scores, rule=StopRule(**(rule or {})), dataset=dataset.name, **options)
    return MonitorHandler(monitor, network, every)


def _name_of(network: nn.Module) -> str:
    name = getattr(getattr(network, "encoder", None), "name", None)
    return f"encoder {name}" if name else type(network).__name__
