"""How the models that the package brings were trained, from nothing on one CPU core.

``python -m scout_hf.eval.training.pocket --out DIR``, and the same with ``text``.
"""
