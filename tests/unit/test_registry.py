"""Implementations by name: what may be registered, and the error for an unknown name."""

from __future__ import annotations

import pytest

from scout_hf import ConfigError
from scout_hf.kernels import cpu
from scout_hf.methods import Method, Scout, method_names, register_method
from scout_hf.methods.base import find_method
from scout_hf.registry import Registry


class Base:
    name = ""


class One(Base):
    name = "one"


class Two(Base):
    name = "two"


@pytest.fixture
def registry():
    registry = Registry("flavour")
    for known in (Two, One):
        assert registry.register(known, Base) is known
    return registry


def test_names_are_sorted_and_found(registry):
    assert registry.names() == ("one", "two")
    assert registry.find("one") is One and registry.find("two") is Two
    registry.register(One, Base)  # once more changes nothing
    assert registry.names() == ("one", "two")


def test_registries_are_apart(registry):
    assert Registry("flavour").names() == ()


@pytest.mark.parametrize("wrong", [Base, One(), "one", None, int])
def test_only_named_subclasses(registry, wrong):
    with pytest.raises(ConfigError, match="is no flavour: register a subclass of Base that sets a name"):
        registry.register(wrong, Base)
    assert registry.names() == ("one", "two")


def test_a_taken_name_stays_with_its_owner(registry):
    with pytest.raises(ConfigError, match="a flavour named 'one' is registered already; choose another name"):
        registry.register(type("Other", (Base,), {"name": "one"}), Base)
    assert registry.find("one") is One


@pytest.mark.parametrize("name", ["three", "One", "", None])
def test_an_unknown_name_is_told_the_known_ones(registry, name):
    with pytest.raises(ConfigError) as caught:
        registry.find(name)
    assert f"flavour={name!r}" in str(caught.value) and "'one', 'two'" in str(caught.value)


def test_methods_have_theirs():
    assert "scout" in method_names() and find_method("scout") is Scout and register_method(Scout) is Scout
    with pytest.raises(ConfigError, match="subclass of Method"):
        register_method(Method)
    with pytest.raises(ConfigError, match="method='scoutt' is not known.*'scout'"):
        find_method("scoutt")


class Bare(Method):
    name = "bare"


def test_a_method_that_lacks_a_part_is_refused_when_it_is_registered():
    with pytest.raises(ConfigError, match="'bare' lacks attend, tier_bytes; define it in Bare"):
        register_method(Bare)
    assert "bare" not in method_names()


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ConfigError, match="try 'scout'"):
        find_method("scuot")


def test_a_backend_of_one_s_own_can_be_chosen(monkeypatch):
    monkeypatch.setattr(cpu._BACKENDS, "_classes", dict(cpu._BACKENDS._classes))

    class Mine(cpu.find_backend("torch")):
        name = "mine"

    assert cpu.register_backend(Mine) is Mine
    assert "mine" in cpu.backend_names() and isinstance(cpu.make_backend("mine"), Mine)
    with pytest.raises(ConfigError, match="subclass of CpuBackend"):
        cpu.register_backend(One)
