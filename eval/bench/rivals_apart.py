"""Another runtime in a process of its own, asked line by line: llama.cpp or OpenVINO GenAI; without scout_hf.

``python rivals_apart.py KIND`` reads requests and writes answers, one line of JSON each; see
:mod:`scout_hf.eval.bench.rivals_process`. Between requests it waits for a line, and nothing of it runs. Times are taken
here, so that no pipe is part of them.
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

GGML_TYPES = {"f16": 1, "q8_0": 8}
READ_AT_ONCE = 2048
WARM_UPS = 2
"""Steps before the timed ones of a request: the first one after a prompt has buffers to make."""


class LlamaCpp:
    """llama.cpp by llama-cpp-python; flash attention is on."""

    packages = ("llama-cpp-python",)

    def __init__(self):
        import llama_cpp

        self._library, self._model = llama_cpp, None

    def open(self, file, threads, tokens, kv):
        """Load a GGUF file with room for so many tokens."""
        kind = GGML_TYPES[kv]
        self._model = self._library.Llama(
            model_path=file,
            n_ctx=tokens,
            n_batch=READ_AT_ONCE,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            flash_attn=True,
            type_k=kind,
            type_v=kind,
            verbose=True,  # its log, to stderr, says how it attends
        )
        given = self._model.context_params
        return {"vocabulary": self._model.n_vocab(), "kv_types": [given.type_k, given.type_v]}

    def likeliest(self, ids):
        """The token that follows a text, which is forgotten."""
        self._model.n_tokens = 0
        self._model.eval(ids)
        logits = self._library.llama_get_logits_ith(self._model.ctx, -1)
        found = max(range(self._model.n_vocab()), key=logits.__getitem__)
        self._model.n_tokens = 0
        return found

    def read(self, ids):
        """Have a text in the cache, of which a beginning may be there; seconds."""
        first = self._model.n_tokens
        begin = time.perf_counter()
        self._model.eval(ids[first:])
        return time.perf_counter() - begin, self._held()

    def step(self, ids, count):
        """Behind the text, further tokens one by one, which are forgotten; seconds of the last ``count``."""
        first, seconds = self._model.n_tokens, []
        for token in ids:
            begin = time.perf_counter()
            self._model.eval([token])
            seconds.append(time.perf_counter() - begin)
        held = self._held()
        self._model.n_tokens = first  # what is behind goes with the next call
        return seconds[-count:], held

    def _held(self):
        memory = self._library.llama_get_memory(self._model.ctx)
        return self._library.llama_memory_seq_pos_max(memory, 0) + 1


class OpenVino:
    """OpenVINO GenAI's LLMPipeline on the CPU; it knows the beginning of a prompt that it has read before."""

    packages = ("openvino-genai", "openvino")

    def __init__(self):
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._runtime, self._library, self._pipeline = numpy, openvino, openvino_genai, None

    def open(self, file, threads, tokens, kv):
        """Load a GGUF file, or a folder with a model of OpenVINO."""
        scheduler = self._library.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = True, READ_AT_ONCE
        self._pipeline = self._library.LLMPipeline(
            file, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads, KV_CACHE_PRECISION=kv
        )
        return {}

    def likeliest(self, ids):
        """The token that follows a text."""
        return int(self._generate(ids, 1).tokens[0][0])

    def read(self, ids):
        """Read a prompt, as far as it is not known, and give one token; seconds."""
        begin = time.perf_counter()
        done = self._generate(ids, 1)
        return time.perf_counter() - begin, done.perf_metrics.get_num_input_tokens()

    def step(self, ids, count):
        """Generate behind a prompt that was read; seconds of the last ``count`` tokens."""
        text, more = ids
        done = self._generate(text, more + 1).perf_metrics
        # The first is what is left of the prompt, and the last token that it gave is in no cache.
        seconds = [taken / 1e6 for taken in done.raw_metrics.token_infer_durations][1:]
        if len(seconds) != more:
            raise RuntimeError(f"{more} steps were asked for, and {len(seconds)} were counted")
        return seconds[-count:], done.get_num_input_tokens() + done.get_num_generated_tokens() - 1

    def _generate(self, ids, tokens):
        config = self._library.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        row = self._numpy.array([ids], dtype=self._numpy.int64)
        given = (self._runtime.Tensor(part) for part in (row, self._numpy.ones_like(row)))
        return self._pipeline.generate(self._library.TokenizedInputs(*given), config)


KINDS = {"llama.cpp": LlamaCpp, "openvino": OpenVino}


class Served:
    """Answers requests with one of the runtimes."""

    def __init__(self, kind):
        self.runtime, self._kind, self._text = KINDS[kind](), kind, []

    def answer(self, asked):
        """The answer to a request."""
        return getattr(self, "_" + asked.pop("do"))(**asked)

    def _open(self, **given):
        return self.runtime.open(**given)

    def _probe(self, prompts):
        return {"next": [self.runtime.likeliest(ids) for ids in prompts]}

    def _read(self, ids):
        """``ids`` follow what was read before."""
        self._text += ids
        seconds, held = self.runtime.read(self._text)
        return {"seconds": seconds, "held": held}

    def _step(self, ids):
        """All but the first tokens are timed."""
        count = len(ids) - WARM_UPS
        given = ids if self._kind == "llama.cpp" else (self._text, len(ids))
        seconds, held = self.runtime.step(given, count)
        return {"seconds": seconds, "held": held}


def main(kind):
    """Answer until there are no more requests."""
    # Libraries print as they like; what is asked for goes where they do not.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**words):
        answers.write(json.dumps(words) + "\n")
        answers.flush()

    try:
        served = Served(kind)
    except ImportError as error:
        return say(absent=f"{type(error).__name__}: {error}")
    found = {}
    for package in KINDS[kind].packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    say(versions=found)
    for line in sys.stdin:
        try:
            said = served.answer(json.loads(line))
        except Exception as error:  # of a library, which may raise anything
            said = {"failed": f"{type(error).__name__}: {error}"}
        say(**said)


if __name__ == "__main__":
    # The modules beside this file are not those that libraries mean by their names.
    HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != HERE]
    main(sys.argv[1])
