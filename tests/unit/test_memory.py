"""Memory for slabs: huge pages where the system gives them, and nothing left when a slab is gone."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from scout_hf.errors import HostMemoryError, PinnedMemoryError, ScoutError
from scout_hf.stores import memory, pinned
from scout_hf.stores.memory import HUGE_BYTES, allocate_slab, held_bytes, huge_page_bytes
from scout_hf.stores.pages import PagePool

CPU = torch.device("cpu")
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")


def is_mapped(address):
    spans = (line.split()[0].split("-") for line in MAPS.read_text().splitlines())
    return any(int(low, 16) <= address < int(high, 16) for low, high in spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64], ids=str)
def test_a_slab_has_its_shape_and_takes_what_is_written(dtype):
    for shape in ((3, 2, 5), (0, 4), (3, 1 << 20, 3)):
        slab = allocate_slab(shape, dtype, CPU)
        assert slab.shape == shape and slab.dtype == dtype and slab.is_contiguous() and slab.device.type == "cpu"
        slab.fill_(7)
        assert bool((slab == 7).all())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
class TestHugePages:
    def test_large_slabs_begin_on_a_huge_page(self):
        for size in (2 * HUGE_BYTES, 2 * HUGE_BYTES + 2, 5 * HUGE_BYTES - 6):
            assert allocate_slab((size // 2,), torch.bfloat16, CPU).data_ptr() % HUGE_BYTES == 0

    def test_small_slabs_are_ordinary_memory(self, monkeypatch):
        monkeypatch.setattr(memory, "_map_huge", None)
        allocate_slab((2 * HUGE_BYTES - 1,), torch.uint8, CPU)
        with pytest.raises(TypeError):
            allocate_slab((2 * HUGE_BYTES,), torch.uint8, CPU)

    @pytest.mark.skipif(not SWITCH.exists(), reason="this kernel does not say")
    def test_they_come_where_the_system_gives_them(self):
        slab = allocate_slab((5 * HUGE_BYTES,), torch.uint8, CPU)
        assert huge_page_bytes([slab]) == 0  # nothing was written yet
        slab.fill_(1)
        if "[never]" in SWITCH.read_text():
            assert huge_page_bytes([slab]) == 0
        else:
            assert 0 < huge_page_bytes([slab]) <= slab.nbytes

    def test_of_a_pool_of_pages(self):
        pool = PagePool((8, 2, 64, 128), torch.float32, CPU)
        pool.allocate(30)
        assert pool.slabs[0].nbytes > 4 * HUGE_BYTES and pool.slabs[0].data_ptr() % HUGE_BYTES == 0
        pool.slabs[0].zero_()
        asked = SWITCH.exists() and "[never]" not in SWITCH.read_text()
        assert (huge_page_bytes(pool.slabs) > 0) == asked

    def test_a_kernel_that_refuses_the_advice(self, monkeypatch):
        class Refusing(mmap.mmap):
            def madvise(self, *args):
                raise OSError("Invalid argument")

        monkeypatch.setattr(mmap, "mmap", Refusing)
        assert bool((allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU).fill_(3) == 3).all())

    @pytest.mark.skipif(not MAPS.exists(), reason="a system that does not list its mappings")
    def test_memory_lives_as_long_as_any_view_of_it(self):
        slab = allocate_slab((8 * HUGE_BYTES,), torch.uint8, CPU)
        middle = slab[4 * HUGE_BYTES :][:5].fill_(9)
        place = slab.data_ptr() + 4 * HUGE_BYTES
        del slab
        gc.collect()
        assert is_mapped(place) and middle.tolist() == [9] * 5
        del middle
        gc.collect()
        assert not is_mapped(place)

    @pytest.mark.skipif(not MAPS.exists(), reason="a system that does not list its mappings")
    def test_memory_goes_with_the_pool(self):
        pool = PagePool((2 * HUGE_BYTES,), torch.uint8, CPU)
        pool.allocate(2)
        place = pool.slabs[0].data_ptr() + HUGE_BYTES
        assert is_mapped(place)
        del pool
        gc.collect()
        assert not is_mapped(place)


def smaps_of(*entries):
    """A file such as /proc/self/smaps: mappings with their kilobytes on huge pages."""
    lines = []
    for low, high, kilobytes in entries:
        lines += [f"{low:x}-{high:x} rw-p 00000000 00:00 0 [anon]", f"Size: {(high - low) // 1024} kB"]
        lines += [f"AnonHugePages:  {kilobytes} kB", "ShmemPmdMapped:        0 kB", "VmFlags: rd wr hg"]
    return "\n".join(lines) + "\n"


class TestCounting:
    @pytest.fixture
    def slabs(self):
        return [allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU) for _ in range(2)]

    def count(self, tmp_path, slabs, *entries):
        (tmp_path / "smaps").write_text(smaps_of(*entries))
        return huge_page_bytes(slabs, tmp_path / "smaps")

    def test_only_mappings_that_hold_a_slab_count(self, tmp_path, slabs):
        one, two = (slab.data_ptr() for slab in slabs)
        assert self.count(tmp_path, slabs, (4096, 8192, 2048), (one, one + 3 * HUGE_BYTES, 4096)) == 4096 << 10
        assert self.count(tmp_path, slabs, (one - HUGE_BYTES, one, 2048), (one + 1, one + HUGE_BYTES, 2048)) == 0
        both = sorted([(one, one + 4096, 2048), (two, two + 4096, 6144)])
        assert self.count(tmp_path, slabs, *both) == 8192 << 10
        assert self.count(tmp_path, slabs[:1], *both) == 2048 << 10

    def test_no_more_than_the_slabs_have(self, tmp_path, slabs):
        one = slabs[0].data_ptr()
        assert self.count(tmp_path, slabs[:1], (one - HUGE_BYTES, one + 99 * HUGE_BYTES, 99 * 2048)) == 3 * HUGE_BYTES

    def test_small_slabs_do_not_count(self, tmp_path):
        small = torch.zeros(HUGE_BYTES, dtype=torch.uint8)
        place = small.data_ptr()
        assert self.count(tmp_path, [small], (place, place + HUGE_BYTES, 2048)) == 0

    def test_without_slabs_or_without_the_file_there_are_none(self, tmp_path, slabs):
        assert huge_page_bytes([], tmp_path / "none") == huge_page_bytes(slabs, tmp_path / "none") == 0


class TestNoMemory:
    """More than any machine has: the system refuses for good."""

    PETABYTES = 1 << 52

    @pytest.fixture(params=["huge pages", "torch"])
    def route(self, request, monkeypatch):
        if request.param == "torch":
            monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
        elif not hasattr(mmap, "MADV_HUGEPAGE"):
            pytest.skip("a system without huge pages")

    @pytest.mark.parametrize("size", [PETABYTES, 1 << 62])
    def test_it_says_what_was_wanted_what_is_held_and_what_to_try(self, route, size):
        gc.collect()
        before = held_bytes()
        slab = allocate_slab((3, 1 << 20), torch.float32, CPU)
        assert held_bytes() - before == slab.nbytes
        with pytest.raises(HostMemoryError) as caught:
            allocate_slab((size,), torch.uint8, CPU)
        told, held = str(caught.value), f"holds {held_bytes() / 2**30:.3g} GiB in slabs"
        assert told.startswith(f"no host memory for {size / 2**30:.3g} GiB more (") and held in told
        for part in ("of this machine's", "are free", 'host_dtype="int8"', "shorter context", "fewer rows", "caches"):
            assert part in told
        assert isinstance(caught.value, (ScoutError, MemoryError)) and caught.value.__cause__ is not None
        del slab
        gc.collect()
        assert held_bytes() == before

    def test_other_errors_of_torch_stay_what_they_are(self):
        with pytest.raises(RuntimeError, match="negative dimension"):
            allocate_slab((-1,), torch.uint8, CPU)

    def test_a_pool_that_cannot_grow_stays_as_it_was(self, route):
        pool = PagePool((1 << 20,), torch.uint8, CPU)
        pool.allocate(60)
        with pytest.raises(HostMemoryError):
            pool.allocate(self.PETABYTES >> 20)
        assert (pool.pages, len(pool.slabs), pool.used_pages) == (67, 1, 60)
        assert len(pool.allocate(7)) == 7 and len(pool.slabs) == 1


class TestPinned:
    """Where there is no GPU, with a driver that only writes down what it is asked for."""

    @pytest.fixture
    def driver(self, monkeypatch):
        class Driver:
            calls, answer, same, moved = [], 0, 1, 1 << 40

            def cuDeviceGet(self, into, number):
                into._obj.value = 100 + number
                return 0

            def cuDeviceGetAttribute(self, into, what, device):
                self.calls.append(("ask", what, device.value))
                into._obj.value = self.same
                return 0

            def cuMemHostGetDevicePointer_v2(self, into, address, flags):
                into._obj.value = address.value + self.moved
                return 0

            def cudaHostRegister(self, address, size, flags):
                self.calls.append(("pin", address, size))
                return self.answer

            def cudaHostUnregister(self, address):
                assert is_mapped(address)
                self.calls.append(("unpin", address))

        one = Driver()
        one.calls = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: one)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(pinned, "_driver", lambda: one)
        pinned.host_address_serves.cache_clear()
        yield one
        pinned.host_address_serves.cache_clear()

    def test_a_slab_is_unpinned_before_its_memory_goes(self, driver):
        slab = allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU, pinned=True)
        place = slab.data_ptr()
        assert driver.calls == [("pin", place, 3 * HUGE_BYTES)]
        view = slab[100:]
        del slab
        gc.collect()
        assert len(driver.calls) == 1 and is_mapped(place)
        del view
        gc.collect()
        assert driver.calls[1:] == [("unpin", place)] and not is_mapped(place)

    def test_a_driver_that_refuses_leaves_nothing_behind(self, driver):
        driver.answer = 2
        with pytest.raises(PinnedMemoryError, match="cannot pin 0.0 GiB .*CUDA error 2.*host_dtype"):
            allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU, pinned=True)
        gc.collect()
        assert [call[0] for call in driver.calls] == ["pin"]

    def test_a_pool_asks_for_all_its_slabs(self, driver):
        pool = PagePool((8, 2, 64, 128), torch.float32, CPU, pinned=True)
        pool.allocate(30)
        pool.allocate(100)
        assert len(driver.calls) == len(pool.slabs) == 2

    def test_the_first_pin_asks_each_gpu_where_it_reads(self, driver, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 0)
        slabs = [allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU, pinned=True) for _ in range(2)]
        assert [call[0] for call in driver.calls] == ["ask", "ask", "pin", "pin"]
        assert driver.calls[:2] == [("ask", 91, 100), ("ask", 91, 101)]
        del slabs

    @pytest.mark.parametrize("same", [0, 1])
    def test_addresses_for_kernels_are_those_of_the_gpu(self, driver, monkeypatch, same):
        driver.same = same
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 0)
        pool = PagePool((2, HUGE_BYTES // 8), torch.float32, CPU, pinned=True)
        ids = torch.cat([pool.allocate(9), pool.allocate(90)]).view(3, -1)
        assert len(pool.slabs) == 2
        here = pool.addresses(ids)
        assert torch.equal(pool.seen_by_device(here), here if same else here + driver.moved)

    def test_work_ends_before_its_memory_is_unpinned(self, driver, monkeypatch):
        """A kernel of a cache that was dropped may still copy from there."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: number)  # nothing was launched on the first
        monkeypatch.setattr(torch.cuda, "synchronize", lambda number: driver.calls.append(("wait", number)))
        slab = allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU, pinned=True)
        driver.calls.clear()
        del slab
        gc.collect()
        assert [call[0] for call in driver.calls] == ["wait", "wait", "unpin"]

    def test_a_driver_that_does_not_say_is_an_error(self, driver, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        driver.cuDeviceGetAttribute = lambda *given: 3
        with pytest.raises(PinnedMemoryError, match="CUDA error 3.*update the driver"):
            allocate_slab((3 * HUGE_BYTES,), torch.uint8, CPU, pinned=True)
