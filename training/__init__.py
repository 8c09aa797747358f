"""How the models that the package brings were trained, from nothing on one CPU core; not installed.

From a checkout: ``python -m training.pocket --out DIR`` and ``python -m training.text --out DIR``.
"""
