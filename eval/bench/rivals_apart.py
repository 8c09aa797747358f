"""Another runtime in a process of its own, asked line by line: llama.cpp or OpenVINO GenAI; without scout_hf.

``python rivals_apart.py KIND`` reads requests and writes answers, one line of JSON each; see
:mod:`scout_hf.eval.bench.rivals_process`. Between requests it waits for a line, and nothing of it runs. Times are taken
here, so that no pipe is part of them.
"""

import ctypes
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

GGML_TYPES = {"f16": 1, "q8_0": 8}
TEXT, SPARE = 0, 1
READ_AT_ONCE = 2048
WARM_UPS = 2
"""Steps before the timed ones of a request: the first one after a prompt has buffers to make."""


class LlamaCpp:
    """llama.cpp by the C functions of llama-cpp-python; flash attention is on."""

    packages, fills = ("llama-cpp-python",), True

    def __init__(self):
        import llama_cpp

        self._c = llama_cpp
        self._context, self._piece, self._piece_tokens = None, None, 0

    def open(self, file, threads, tokens, kv):
        """Load a GGUF file with room for so many tokens."""
        c, kind = self._c, GGML_TYPES[kv]
        c.llama_log_set(c.llama_log_callback(), None)  # what it says goes to stderr
        c.llama_backend_init()
        given = c.llama_model_default_params()
        given.n_gpu_layers = 0
        self._model = c.llama_model_load_from_file(file.encode(), given)
        if not self._model:
            raise ValueError("llama.cpp cannot load it")
        given = c.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch = tokens, READ_AT_ONCE, READ_AT_ONCE // 4
        given.n_threads = given.n_threads_batch = threads
        given.type_k = given.type_v = kind
        given.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        # A second sequence in the same memory, for parts of a text that are repeated.
        given.n_seq_max, given.kv_unified = 2, True
        self._context = c.llama_init_from_model(self._model, given)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {tokens} tokens with keys and values in {kv}")
        self._memory = c.llama_get_memory(self._context)
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        return {"vocabulary": self._vocabulary, "kv_types": [given.type_k, given.type_v]}

    def likeliest(self, ids):
        """The token that follows a text, which is forgotten."""
        self._decode(ids)
        logits = self._c.llama_get_logits_ith(self._context, -1)
        found = max(range(self._vocabulary), key=logits.__getitem__)
        self._forget(0)
        return found

    def read(self, ids):
        """Have a text in the cache, of which a beginning may be there; seconds."""
        more = ids[self._held() :]
        begin = time.perf_counter()
        for place in range(0, len(more), READ_AT_ONCE):
            self._decode(more[place : place + READ_AT_ONCE])
        return time.perf_counter() - begin, self._held()

    def fill(self, tokens):
        """Have so many tokens in the cache, by repeating keys and values of what was read, at later places."""
        c, context, memory = self._c, self._context, self._memory
        if self._piece is None:
            size = c.llama_state_seq_get_size(context, TEXT)
            self._piece, self._piece_tokens = (ctypes.c_uint8 * size)(), self._held()
            if c.llama_state_seq_get_data(context, self._piece, size, TEXT) != size:
                raise RuntimeError("llama.cpp did not hand out its keys and values")
        while (held := self._held()) < tokens:
            if not c.llama_state_seq_set_data(context, self._piece, len(self._piece), SPARE):
                raise RuntimeError(f"llama.cpp did not take keys and values again behind {held} tokens")
            c.llama_memory_seq_rm(memory, SPARE, min(self._piece_tokens, tokens - held), -1)
            c.llama_memory_seq_add(memory, SPARE, 0, -1, held)
            c.llama_memory_seq_cp(memory, SPARE, TEXT, -1, -1)
            c.llama_memory_seq_rm(memory, SPARE, -1, -1)
        return self._held()

    def step(self, ids, count):
        """Behind the text, further tokens one by one, which are forgotten; seconds of the last ``count``."""
        first, seconds = self._held(), []
        for token in ids:
            begin = time.perf_counter()
            self._decode([token])
            seconds.append(time.perf_counter() - begin)
        held = self._held()
        self._forget(first)
        return seconds[-count:], held

    def _decode(self, ids):
        tokens = (self._c.llama_token * len(ids))(*ids)
        if code := self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens returned {code}")

    def _forget(self, first):
        if not self._c.llama_memory_seq_rm(self._memory, TEXT, first, -1):
            raise RuntimeError(f"llama.cpp cannot forget what is behind {first} tokens")

    def _held(self):
        return self._c.llama_memory_seq_pos_max(self._memory, TEXT) + 1


class OpenVino:
    """OpenVINO GenAI's LLMPipeline on the CPU; it knows the beginning of a prompt that it has read before."""

    packages, fills = ("openvino-genai", "openvino"), False

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

    def _fill(self, tokens):
        return {"held": self.runtime.fill(tokens)}

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
    say(versions=found, fills=served.runtime.fills)
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
