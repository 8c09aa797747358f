"""A separate process for test_without_library: what came out, which warnings there were, and what was used.

Nothing is imported here that loads the library by itself.
"""

import os
import sys
import warnings

import torch

import scout_hf
from scout_hf.kernels.cpu.library import ISA_VARIABLE, PATH_VARIABLE, load_library
from tests.integration.common import ONE_TIER, TWO_TIERS, left_padded, llama, logits, run

INT8 = {"host_dtype": "int8"}
RUNS = {
    "one tier": ONE_TIER,
    "two tiers": TWO_TIERS,
    "one tier, int8": ONE_TIER | INT8,
    "two tiers, int8": TWO_TIERS | INT8,
}
UNKNOWN_ISA = "none of them"


def everything():
    """Logits of a short generation for every way to run."""
    model, found = llama(), {}
    for name, options in RUNS.items():
        with scout_hf.patch(model, **options):
            found[name] = logits(run(model, left_padded(0, 13)))
    return found


def record():
    """Run everything; the results, what scout_hf warned of, and the instruction set in use."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = everything()
    told = [f"{one.category.__name__}: {one.message}" for one in caught if "scout_hf" in str(one.message)]
    used = load_library()
    return {"logits": found, "told": told, "isa": used and used.isa}


def main(path, then):
    """Write down what happens without the library, and with a path to none.

    And what happens then: with an unknown instruction set, and with a known one.
    """
    found = [record()]
    load_library.cache_clear()
    os.environ[PATH_VARIABLE] = "/nowhere/_scout_cpu.so"
    found.append(record())
    if then:
        load_library.cache_clear()
        del os.environ[PATH_VARIABLE]
        os.environ[ISA_VARIABLE] = UNKNOWN_ISA
        try:
            scout_hf.patch(llama())
        except scout_hf.ConfigError as refused:
            found.append(str(refused))
        os.environ[ISA_VARIABLE] = "base"
        found.append(record())
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
