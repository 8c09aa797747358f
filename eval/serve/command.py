"""``scout-hf serve``: from options to a running server."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any

import torch
import uvicorn
from safetensors import SafetensorError

import scout_hf
from scout_hf import PrefixStore, ScoutConfig
from scout_hf.errors import ConfigError, ScoutError
from scout_hf.eval.language.load import ask_at_terminal, located
from scout_hf.eval.options import Serve
from scout_hf.eval.serve.app import make_app
from scout_hf.eval.serve.models import PatchedModel
from scout_hf.eval.settings import single_values_of, value_of
from scout_hf.eval.stores import open_store
from scout_hf.selection import check_digest

PATIENCE = 5
"""Seconds that running requests have to end after the server is told to."""


def run(options: Serve, tell: Callable[[str], Any]) -> None:
    """Serve until the process is told to stop.

    ConfigError and its kin for wrong settings, a port that is taken, and a model that cannot be loaded or patched.
    """
    config, store = config_of(options), store_of(options)
    # Before the model, whose loading may take minutes.
    listening = listen(options.host, options.port)
    try:
        models = load(options, config, store, tell)
        try:
            tell(f"{options.model} is served at {address(listening)}/v1 ({config.in_brief}); statistics: /stats")
            server = uvicorn.Server(uvicorn.Config(make_app(models), timeout_graceful_shutdown=PATIENCE))
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass  # how a server is stopped; uvicorn has ended all in order
        finally:
            models.shutdown()
    finally:
        listening.close()


def config_of(options: Serve) -> ScoutConfig:
    """The settings; ConfigError before anything is loaded."""
    settings = single_values_of(options.set)
    for name in ("budget", "split"):
        if (given := getattr(options, name)) is not None:
            if name in settings:
                raise ConfigError(f"--{name} and --set {name} are both given: leave one out")
            settings[name] = value_of(given)
    config = ScoutConfig.from_options(**settings)
    check_digest(config.digest, None, config.mass)
    return config


def store_of(options: Serve) -> PrefixStore | None:
    """The store that was asked for; ConfigError if it cannot be used."""
    if options.store is None:
        if options.store_limit is not None:
            raise ConfigError(f"--store-limit {options.store_limit} is of a store: add --store DIR, or leave it out")
        return None
    return open_store(options.store, options.store_limit)


def load(options: Serve, config: ScoutConfig, store: PrefixStore | None, tell: Callable[[str], Any]) -> PatchedModel:
    """The model, loaded and patched."""
    name = options.model
    source = located(name, (lambda question: True) if options.yes else ask_at_terminal, tell)
    patch = functools.partial(scout_hf.patch, config=config, store=store)
    try:
        models = PatchedModel(name, source, patch, device=options.device, dtype=dtype_of(options))
    except ScoutError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{name} cannot be served: {str(error).strip().partition(chr(10))[0]}") from error
    (loaded,) = models.loaded_models.values()
    if getattr(loaded.processor, "chat_template", None) is None:
        tell(f"{name} has no chat template: completions are answered, chat completions and responses are not")
    return models


def dtype_of(options: Serve) -> str:
    """As asked; by default that of the weights, and float32 on a CPU, where most have no fast bfloat16."""
    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.accelerator.is_available())
    return options.dtype or ("float32" if on_cpu else "auto")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and refuses connections until the server takes it; ConfigError if it cannot be bound."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
        except BaseException:
            bound.close()
            raise
        return bound
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened at: {error}") from error


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
