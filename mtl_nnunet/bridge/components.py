"""nnU-Net's prediction cut where MONAI's workflow has its joints: preprocessing, inferer, postprocessing, saving.

Each part calls nnU-Net's own function, so that the voxels are nnU-Net's; between the parts travel MONAI's tensors.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor, nn

from mtl_nnunet.bridge.geometry import affine_of, from_monai, from_zyx, to_zyx
from mtl_nnunet.bridge.model import NATURAL_READER, TrainedModel
from mtl_nnunet.cases import read_with_nnunet, refuse_endless_file
from mtl_nnunet.errors import UserError

# of nnU-Net's reader and preprocessor; JSON text, which MONAI's collation leaves alone
PROPERTIES = "nnunet_properties"


class NNUNetPreprocessd(MapTransform):
    """Read the files of a case with nnU-Net's reader; crop, normalise and resample as nnU-Net does.

    In place of files it takes a ``MetaTensor`` (C, X, Y, Z) as ``LoadImaged`` and ``EnsureChannelFirstd`` make it.

    Out comes a ``MetaTensor`` (C, Z, Y, X) in the plans' axis order and spacing; what undoes it stands in its ``meta``.

    Args:
        keys: Where the list of files is, one a channel, or the image in memory.
        model: ``read_model``.
        allow_missing_keys: Leave dictionaries without the key alone.

    Raises:
        UserError: A file that cannot be read, or another number of channels than the model has.
    """

    def __init__(self, keys: KeysCollection, model: TrainedModel, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.model = model

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Every key's files to a tensor."""
        done = dict(data)
        for key in self.key_iterator(done):
            done[key] = self._preprocessed(done[key])
        return done

    def _preprocessed(self, image: Any) -> MetaTensor:
        model = self.model
        if isinstance(image, Tensor):
            voxels, properties = from_monai(image, model.reader)
            name = str(getattr(image, "meta", {}).get("filename_or_obj", "an image"))
        else:
            paths = [Path(image)] if isinstance(image, (str, Path)) else [Path(f) for f in image]
            for path in paths:
                refuse_endless_file(path)
            voxels, properties = read_with_nnunet(paths, model.reader)
            name = str(paths[0])
        if len(voxels) != len(model.channel_names):
            raise UserError(
                f"{name} has {len(voxels)} channel(s), but the model was trained on {len(model.channel_names)} "
                f"({', '.join(model.channel_names)}). Give one file a channel, in that order."
            )
        preprocessor = model.configuration_manager.preprocessor_class(verbose=False)
        preprocessed, _, properties = preprocessor.run_case_npy(
            voxels, None, properties, model.plans_manager, model.configuration_manager, model.dataset
        )
        meta = {"filename_or_obj": name, PROPERTIES: json.dumps(properties, default=_listed)}
        return MetaTensor(torch.from_numpy(preprocessed).to(torch.float32).contiguous(), meta=meta)


class NNUNetInferer(Inferer):
    """nnU-Net's sliding window: Gaussian weights, half-precision sums, mirroring, the mean over folds.

    With one fold it takes the network as it is given; with several it loads each fold's weights into it in turn.

    Args:
        model: ``read_model``.
        tile_step_size: Step of the window as a part of the patch.
        use_gaussian: Weigh the middle of a patch more.
        use_mirroring: Average over the flips that the model was trained with; ``False`` is nnU-Net's ``--disable_tta``.
        perform_everything_on_device: Keep the sums on the GPU; nnU-Net falls back where they do not fit.
        progress: Show a bar for each case.
    """

    def __init__(
        self,
        model: TrainedModel,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.tile_step_size = tile_step_size
        self.use_gaussian = use_gaussian
        self.use_mirroring = use_mirroring
        self.perform_everything_on_device = perform_everything_on_device
        self.progress = progress

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Preprocessed cases (B, C, Z, Y, X) to nnU-Net's logits (B, heads, Z, Y, X), float16, on the CPU."""
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        model, device = self.model, inputs.device
        # it would print for every case that keeping everything on the device is for CUDA only
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnUNetPredictor(
                tile_step_size=self.tile_step_size,
                use_gaussian=self.use_gaussian,
                use_mirroring=self.use_mirroring,
                perform_everything_on_device=self.perform_everything_on_device,
                device=device,
                allow_tqdm=self.progress,
            )
        weights = list(model.weights) if len(model.weights) > 1 else [network.state_dict()]
        predictor.manual_initialization(
            network,
            model.plans_manager,
            model.configuration_manager,
            weights,
            model.dataset,
            model.trainer,
            model.mirroring_axes,
        )
        cases = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        threads = torch.get_num_threads()
        # as nnUNetv2_predict does: the last bit of a convolution may depend on it
        torch.set_num_threads(multiprocessing.cpu_count() if device.type == "cpu" else 1)
        try:
            return torch.stack([predictor.predict_logits_from_preprocessed_data(case).cpu() for case in cases])
        finally:
            torch.set_num_threads(threads)


class NNUNetSegmentationd(MapTransform):
    """Logits to the segmentation in the geometry of the file, as nnU-Net does: resample, decide, undo the cropping.

    Out comes a ``MetaTensor`` (1, X, Y, Z), or (1, X, Y) for 2D images, in MONAI's axis order with MONAI's affine.

    Args:
        keys: Where the logits are.
        model: ``read_model``.
        image_key: Where the preprocessed image is, whose ``meta`` says what to undo.
        allow_missing_keys: Leave dictionaries without the key alone.
    """

    def __init__(
        self, keys: KeysCollection, model: TrainedModel, image_key: str = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.model = model
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Every key's logits to a segmentation."""
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        done, model = dict(data), self.model
        about = done[self.image_key].meta
        properties = json.loads(about[PROPERTIES])
        for key in self.key_iterator(done):
            logits = done[key].as_tensor() if isinstance(done[key], MetaTensor) else done[key]
            labels = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.cpu().numpy(), model.plans_manager, model.configuration_manager, model.label_manager, properties
            )
            # torch computes little with uint16
            labels = labels if labels.dtype == np.uint8 else labels.astype(np.int32)
            flat = _is_flat(model, properties)
            done[key] = MetaTensor(
                torch.from_numpy(np.ascontiguousarray(from_zyx(labels, flat)))[None],
                affine=affine_of(properties),
                meta={"filename_or_obj": about["filename_or_obj"], PROPERTIES: about[PROPERTIES]},
            )
        return done


class NNUNetSaved(MapTransform):
    """Write segmentations with nnU-Net's writer: the file of the image decides geometry, header and format.

    Args:
        keys: Where the segmentations are, as ``NNUNetSegmentationd`` or a transform after it leaves them.
        model: ``read_model``.
        output_dir: Where to; files are named by ``case_key`` and appear once they are whole.
        case_key: Where the name of the case is.
        allow_missing_keys: Leave dictionaries without the key alone.

    Raises:
        UserError: The file cannot be written, or would replace the image itself.
    """

    def __init__(
        self,
        keys: KeysCollection,
        model: TrainedModel,
        output_dir: str | Path,
        case_key: str = "case",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.model = model
        self.output_dir = Path(output_dir)
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Every key's segmentation to a file; the data goes through unchanged."""
        for key in self.key_iterator(dict(data)):
            self._write(data[key], str(data[self.case_key]))
        return dict(data)

    def _write(self, segmentation: MetaTensor, case: str) -> None:
        properties = json.loads(segmentation.meta[PROPERTIES])
        voxels = segmentation.as_tensor()[0].cpu().numpy()
        name = f"{case}{self.model.file_ending}"
        image = Path(str(segmentation.meta.get("filename_or_obj", "")))
        if image.is_file() and (self.output_dir / name).exists() and (self.output_dir / name).samefile(image):
            raise UserError(
                f"the segmentation of {image} would replace that image. Pass --output_dir another folder, or name images CASE_0000..."
            )
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            # the writer of TIFF adds a second file
            with tempfile.TemporaryDirectory(prefix=f".{case}.", dir=self.output_dir) as temporary:
                writer = self.model.plans_manager.image_reader_writer_class()
                writer.write_seg(
                    to_zyx(voxels, _is_flat(self.model, properties)), str(Path(temporary, name)), properties
                )
                for file in sorted(Path(temporary).iterdir()):
                    os.replace(file, self.output_dir / file.name)
        except (OSError, RuntimeError) as error:
            # SimpleITK raises the latter
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise UserError(
                f"could not write {self.output_dir / name}: {reason}. Free space, or pass --output_dir FOLDER."
            ) from error


def _is_flat(model: TrainedModel, properties: dict[str, Any]) -> bool:
    """Whether the file holds a plane: nnU-Net gives it a third axis of one."""
    return model.reader == NATURAL_READER or len(properties.get("sitk_stuff", {}).get("spacing", ())) == 2


def _listed(value: Any) -> Any:
    """NumPy's arrays and numbers in JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} among the properties of an image")
