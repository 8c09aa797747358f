"""Stands in for OpenVINO GenAI: a file of JSON says what it predicts, and what goes wrong with it."""

import json
from pathlib import Path
from types import SimpleNamespace


class SchedulerConfig:
    pass


class GenerationConfig:
    pass


class TokenizedInputs:
    def __init__(self, ids, mask):
        assert ids.data.shape == mask.data.shape
        self.ids = ids.data


class LLMPipeline:
    def __init__(self, path, device, scheduler_config, INFERENCE_NUM_THREADS, KV_CACHE_PRECISION):
        assert device == "CPU" and scheduler_config.enable_prefix_caching and KV_CACHE_PRECISION == "u8"
        self.plan = json.loads(Path(path).read_text())

    def generate(self, inputs, config):
        (ids,), count = inputs.ids.tolist(), config.max_new_tokens
        assert config.ignore_eos and not config.do_sample
        first = self.plan["next"].get(" ".join(map(str, ids)), self.plan["else"])
        passes = SimpleNamespace(token_infer_durations=[1000.0] * (count - self.plan.get("fewer", 0)))
        metrics = SimpleNamespace(
            raw_metrics=passes,
            get_num_input_tokens=lambda: len(ids),
            get_num_generated_tokens=lambda: count,
        )
        return SimpleNamespace(tokens=[[first] * count], perf_metrics=metrics)
