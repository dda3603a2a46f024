"""Pretext tasks, one module each. To add one, write a module and list its class here."""

from vissl_lite.errors import UserError, brief, did_you_mean
from vissl_lite.pretext.barlow_twins import BarlowTwins
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.byol import BYOL
from vissl_lite.pretext.colorization import Colorization
from vissl_lite.pretext.densecl import DenseCL
from vissl_lite.pretext.diet import DIET
from vissl_lite.pretext.dino import DINO
from vissl_lite.pretext.dinov2 import DINOv2
from vissl_lite.pretext.distillation import Distillation
from vissl_lite.pretext.ibot import IBOT
from vissl_lite.pretext.ijepa import IJEPA
from vissl_lite.pretext.inpainting import Inpainting
from vissl_lite.pretext.jigsaw import Jigsaw
from vissl_lite.pretext.lejepa import LeJEPA
from vissl_lite.pretext.mae import MAE
from vissl_lite.pretext.moco import MoCo
from vissl_lite.pretext.moco_v3 import MoCoV3
from vissl_lite.pretext.multi import Multi
from vissl_lite.pretext.nnclr import NNCLR
from vissl_lite.pretext.relative_patch import RelativePatch
from vissl_lite.pretext.rotation import Rotation
from vissl_lite.pretext.simclr import SimCLR
from vissl_lite.pretext.simmim import SimMIM
from vissl_lite.pretext.simsiam import SimSiam
from vissl_lite.pretext.spark import SparK
from vissl_lite.pretext.swav import SwAV
from vissl_lite.pretext.vicreg import VICReg
from vissl_lite.pretext.visreg import VISReg

# In the order of ``vissl-lite list pretexts``: grouped by family, simplest first.
PRETEXTS: dict[str, type[PretextTask]] = {
    task.info.name: task
    for task in (
        Rotation,
        RelativePatch,
        Jigsaw,
        Colorization,
        Inpainting,
        DIET,
        SimCLR,
        MoCo,
        MoCoV3,
        NNCLR,
        DenseCL,
        SwAV,
        BYOL,
        SimSiam,
        BarlowTwins,
        VICReg,
        LeJEPA,
        VISReg,
        DINO,
        IBOT,
        DINOv2,
        MAE,
        SimMIM,
        SparK,
        IJEPA,
        Distillation,
        Multi,
    )
}


def pretext_class(name: str) -> type[PretextTask]:
    """Return the class of a pretext by its name.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in PRETEXTS:
        raise UserError(f"unknown pretext {brief(name)}: {did_you_mean(name, PRETEXTS)}")
    return PRETEXTS[name]
