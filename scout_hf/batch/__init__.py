"""Offline batches: many prompts out of a file, grouped by how they begin; resumable, in one process or on Ray."""

from scout_hf.batch.ray_workers import RayWorkers, must_have_ray
from scout_hf.batch.running import Done, run
from scout_hf.batch.settings import Settings

__all__ = ["Done", "RayWorkers", "Settings", "must_have_ray", "run"]
