"""Published methods of attention over KV that does not fit on the device, by name."""

from scout_hf.methods.base import Method, make_method, method_names, register_method
from scout_hf.methods.dense import Dense
from scout_hf.methods.hgca import HGCA
from scout_hf.methods.infinigen import InfiniGen
from scout_hf.methods.kvpr import KVPR
from scout_hf.methods.scout import Scout
from scout_hf.methods.unused import unused_settings

__all__ = [
    "HGCA",
    "KVPR",
    "Dense",
    "InfiniGen",
    "Method",
    "Scout",
    "make_method",
    "method_names",
    "register_method",
    "unused_settings",
]
