"""The arms of other runtimes: what can be measured with a model, and one of them as it reads and decodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.eval.bench.rivals_apart import GGML_TYPES, KINDS, WARM_UPS
from scout_hf.eval.bench.rivals_process import Rival, RivalError
from scout_hf.eval.language import gguf_files
from scout_hf.eval.language.packaged import PACKAGED, cache_folder, gguf_of

LLAMA, OPENVINO = KINDS
TITLES = {LLAMA: "llama.cpp", OPENVINO: "OpenVINO"}
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "u8": 1.0}
"""Per number; blocks of q8_0 have a scale. Those of u8 have some too, so that its limit is a little too low."""

OPENVINO_READS = ("F16", "F32", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0")
"""Formats of weights in a GGUF file that OpenVINO GenAI 2026.4 loads; Q5_0 is none."""

SPARE_TOKENS = 512
_FLASH = re.compile(r"flash_attn\s*=\s*(\w+)")


@dataclass(frozen=True)
class Setting:
    """One arm: a runtime, a file of weights, and how it keeps keys and values."""

    kind: str
    file: Path
    weights: str
    kv: str
    step_bytes: int

    @property
    def name(self) -> str:
        """Of the arm."""
        return f"{TITLES[self.kind]} {self.weights} ({self.kv} KV)"


def files_for(model: str, given: Sequence[Path], f16: bool, ask: Any, tell: Any) -> list[Path]:
    """GGUF files of a model: those that are given, else the one that it came from; none where there is none."""
    files = list(given)
    if not files and model.endswith(".gguf"):
        files = [Path(model)]
    if not files and model in PACKAGED:
        try:
            files = [file for file in [gguf_of(model, ask, tell)] if file]
        except ConfigError as error:  # of a terminal where nobody can be asked
            tell(f"no GGUF file of {model}: {error}")
    if f16 and files:
        out = cache_folder() / "gguf" / f"{files[0].stem}.f16.gguf"
        if not _is_newer(out, files[0]):
            gguf_files.write_f16(files[0], out, tell)
        files.append(out)
    return files


def _is_newer(made: Path, file: Path) -> bool:
    return made.is_file() and made.stat().st_mtime >= file.stat().st_mtime


def settings_for(files: Sequence[Path], openvino: Path | None, layers: int, vocabulary: int) -> list[Setting]:
    """The arms that these files make; ConfigError if one is of another model."""
    found = []
    for place, file in enumerate(files):
        held = gguf_files.facts(file)
        if (held.layers, held.vocabulary) != (layers, vocabulary):
            raise ConfigError(
                f"{file} is another model: it has {held.layers} layers and {held.vocabulary} tokens, and the model of "
                f"transformers {layers} and {vocabulary}; give a GGUF file of the same weights with --gguf"
            )
        # Of further files one arm is enough: how it keeps keys and values was compared.
        kinds = ("f16", "q8_0") if not place else ("f16",)
        found += [Setting(LLAMA, file, held.format, kv, held.step_bytes) for kv in kinds]
        if not place and not openvino:
            found.append(Setting(OPENVINO, file, held.format, "u8", held.step_bytes))
    if openvino:
        weights = next(iter(openvino.glob("openvino_model.bin")), None)
        if weights is None:
            raise ConfigError(f"--openvino {openvino}: there is no openvino_model.bin in it")
        found.append(Setting(OPENVINO, openvino, openvino.name, "u8", weights.stat().st_size))
    return found


def loadable(setting: Setting, tell: Any) -> Setting:
    """The same, of a file that the runtime loads: formats that OpenVINO does not know are written in another one."""
    if setting.kind != OPENVINO or setting.file.is_dir():
        return setting
    if not (unknown := gguf_files.foreign(setting.file, OPENVINO_READS)):
        return setting
    out = cache_folder() / "gguf" / f"{setting.file.stem}.openvino.gguf"
    if not _is_newer(out, setting.file):
        gguf_files.write_known(setting.file, out, OPENVINO_READS, tell)
    weights = f"{setting.weights}, {' and '.join(sorted(unknown))} as Q8_0"
    return replace(setting, file=out, weights=weights, step_bytes=gguf_files.facts(out).step_bytes)


class Their:
    """One arm, with its process; RivalError and Missing as :class:`Rival` has them."""

    def __init__(
        self, given: Setting, python: str, threads: int, tokens: int, ids: Sequence[int], steps: int, tell: Any
    ):
        self.name, self._ids, self._steps = given.name, ids, steps
        self.rival = Rival(given.kind, python, threads)
        self._read, self._seconds = 0, 0.0
        try:
            self.setting = setting = loadable(given, tell)
            room = tokens + SPARE_TOKENS
            said = self.rival.ask("open", file=str(setting.file), threads=threads, tokens=room, kv=setting.kv)
            self.attention = self._checked(said)
        except BaseException:
            self.close()
            raise

    def must_be(self, prompts: Sequence[Sequence[int]], likely: Sequence[Sequence[int]]) -> float:
        """RivalError unless it goes on with likely tokens behind most prompts: else it is another model."""
        found = self.rival.ask("probe", prompts=[list(ids) for ids in prompts])["next"]
        right = sum(token in tokens for token, tokens in zip(found, likely, strict=True)) / len(likely)
        if right < 0.75:
            raise RivalError(
                f"it is another model: it goes on with a likely token behind {right:.0%} of {len(likely)} prompts"
            )
        return right

    def length(self) -> int:
        """Tokens that were read."""
        return self._read

    def read(self, tokens: int) -> float:
        """Read the text up to a context; seconds from its beginning."""
        more = [self._ids[place % len(self._ids)] for place in range(self._read, tokens)]
        said = self.rival.ask("read", ids=more)
        self._held(said, tokens)
        self._read, self._seconds = tokens, self._seconds + said["seconds"]
        return self._seconds

    def fill(self, tokens: int) -> float | None:
        """Fill the cache with repeats of what was read, if it can; else read on: seconds from the text's beginning."""
        if not self.rival.fills:
            return self.read(tokens)
        self._held(self.rival.ask("fill", tokens=tokens), tokens)
        self._read = tokens
        return None

    def steps(self) -> tuple[list[float], dict[str, Any]]:
        """Seconds of steps behind the text, and what was done."""
        count = WARM_UPS + self._steps
        said = self.rival.ask("step", ids=[self._ids[(self._read + place) % len(self._ids)] for place in range(count)])
        self._held(said, self._read + count)
        if len(said["seconds"]) != self._steps:
            raise RivalError(f"{self._steps} steps were asked for, and {len(said['seconds'])} timed")
        return said["seconds"], {"held_tokens": said["held"], "attended_tokens": said["held"]}

    def facts(self, numbers: int) -> dict[str, Any]:
        """Bytes held, at most needed, and read by a step over so many keys and values."""
        kv = numbers * KV_BYTES[self.setting.kv]
        read = {"kv_bytes": kv, "kv_share": 1.0, "read_bytes": self.setting.step_bytes + kv}
        return self.rival.grown_bytes() | read

    def close(self) -> None:
        """End its process."""
        self.rival.close()

    def _held(self, said: dict[str, Any], tokens: int) -> None:
        if said["held"] != tokens:
            raise RivalError(f"{tokens} tokens should be in its cache, and {said['held']} are")

    def _checked(self, said: dict[str, Any]) -> str:
        if self.setting.kind != LLAMA:
            return "its own"
        if said["kv_types"] != [GGML_TYPES[self.setting.kv]] * 2:
            raise RivalError(f"its cache is of the types {said['kv_types']}, and not {self.setting.kv}")
        found = _FLASH.findall(self.rival.log())
        if found and found[-1] in ("0", "disabled", "false"):
            raise RivalError("flash attention is off")
        return f"flash attention {found[-1]}" if found else "flash attention, as asked for"
