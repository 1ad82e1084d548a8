"""planish: hammer a network flat, then quantize it.

Every name is imported when it is first used, so that ``import planish`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Format": "planish.scheme",
    "PlanishError": "planish.errors",
    "Preprocessing": "planish.models",
    "Scheme": "planish.scheme",
    "calibration_subset": "planish.data",
    "evaluate": "planish.evaluation",
    "export": "planish.deploy.onnx.export",
    "flatten": "planish.flattening",
    "FlattenSettings": "planish.flattening",
    "ledger": "planish.network",
    "load": "planish.deploy.checkpoint",
    "load_data": "planish.data",
    "load_model": "planish.models",
    "make_loader": "planish.data",
    "QATSettings": "planish.qat",
    "quantize": "planish.ptq",
    "save": "planish.deploy.checkpoint",
    "train": "planish.qat",
    "TrainingSettings": "planish.training",
}
__all__ = sorted([*_WHERE, "__version__"])

if TYPE_CHECKING:
    from planish.data import calibration_subset, load_data, make_loader
    from planish.deploy.checkpoint import load, save
    from planish.deploy.onnx.export import export
    from planish.errors import PlanishError
    from planish.evaluation import evaluate
    from planish.flattening import FlattenSettings, flatten
    from planish.models import Preprocessing, load_model
    from planish.network import ledger
    from planish.ptq import quantize
    from planish.qat import QATSettings, train
    from planish.scheme import Format, Scheme
    from planish.training import TrainingSettings


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
