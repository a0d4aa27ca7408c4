"""A model folder for nnU-Net v2's own predictor: its planner's 2D network, random weights.

nnU-Net itself takes the fingerprint of a folder of volumes, plans the configuration and builds the
network; all that is added is a seed instead of a training. Its own command then predicts:

    nnUNetv2_predict_from_modelfolder -i {inputs} -o {outputs} -m MODEL -f 0 -device cpu
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

_CLASSES = 15
_DATASET = "Dataset001_Peer"


def make_model(volumes: Path, target: Path, seed: int) -> dict[str, float | str]:
    """Write `dataset.json`, `plans.json` and `fold_0/checkpoint_final.pth` into `target`.

    Args:
        volumes: folder of `images/NAME_0000.nii.gz` and `labels/NAME.nii.gz` that it plans for.
        target: the model folder.
        seed: of the weights.

    Returns:
        What the network is: stages, parameters, patch, 10**9 multiply-accumulates a patch.
    """
    with tempfile.TemporaryDirectory() as work:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = str(Path(work, name))
        raw = Path(work, "nnUNet_raw", _DATASET)
        shutil.copytree(volumes / "images", raw / "imagesTr")
        shutil.copytree(volumes / "labels", raw / "labelsTr")
        dataset = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0} | {f"label{n}": n for n in range(1, _CLASSES)},
            "numTraining": len(list((volumes / "images").iterdir())),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")

        # nnU-Net reads the folders' names from the environment when it is imported.
        from nnunetv2.experiment_planning.plan_and_preprocess_api import (
            extract_fingerprints,
            plan_experiments,
        )
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        extract_fingerprints([1], num_processes=1)
        identifier = plan_experiments([1])
        planned = Path(work, "nnUNet_preprocessed", _DATASET, f"{identifier}.json")
        (target / "fold_0").mkdir(parents=True, exist_ok=True)
        shutil.copy(planned, target / "plans.json")

    (target / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    plans = PlansManager(str(target / "plans.json"))
    configuration = plans.get_configuration("2d")
    torch.manual_seed(seed)
    network = nnUNetTrainer.build_network_architecture(
        plans, configuration, 1, _CLASSES, enable_deep_supervision=False
    )
    torch.save(
        {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "2d"},
            "inference_allowed_mirroring_axes": (0, 1),
        },
        target / "fold_0" / "checkpoint_final.pth",
    )
    patch = [int(size) for size in configuration.patch_size]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta").eval()(torch.empty(1, 1, *patch, device="meta"))
    return {
        "network": configuration.network_arch_class_name,
        "features": str(configuration.network_arch_init_kwargs["features_per_stage"]),
        "parameters": sum(weights.numel() for weights in network.parameters()),
        "patch": str(patch),
        "spacing_mm": str([float(size) for size in configuration.spacing]),
        "gmac": counter.get_total_flops() / 2e9,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.peers.nnunet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmark.peers.nnunet --volumes PHANTOMS --model MODEL",
    )
    parser.add_argument("--volumes", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args()
    print(json.dumps(make_model(options.volumes, options.model, options.seed), indent=2))
