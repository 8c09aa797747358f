"""Where releases of transformers and wrappers of models differ, each difference in one place."""
