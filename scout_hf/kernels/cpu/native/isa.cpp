// Chooses among the instruction sets at load.
#include "isa.h"

#include <atomic>

#include "scout_cpu.h"

extern const scout_isa scout_isa_base;
#if defined(__x86_64__)
// Absent if the compiler that built the library did not support them.
extern const scout_isa scout_isa_avx2 __attribute__((weak));
extern const scout_isa scout_isa_avx512 __attribute__((weak));
extern const scout_isa scout_isa_avx512bf16 __attribute__((weak));
#elif defined(__aarch64__)
extern const scout_isa scout_isa_neon;
#endif

namespace {

struct List {
  const scout_isa* sets[8];
  int count = 0;
  List() {
    const scout_isa* known[] = {
        &scout_isa_base,
#if defined(__x86_64__)
        &scout_isa_avx2, &scout_isa_avx512, &scout_isa_avx512bf16,
#elif defined(__aarch64__)
        &scout_isa_neon,
#endif
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    for (const scout_isa* set : known)
      if (set && set->runs()) sets[count++] = set;
  }
};

const List& available() {
  static const List list;
  return list;
}

std::atomic<int> current{-1};

}  // namespace

const scout_isa* scout_isa_for(int numbers, int tokens) {
  for (int index = scout_current_isa(); index >= 0; index--) {
    const scout_isa* set = available().sets[index];
    if (numbers % (2 * set->width) == 0 && tokens % set->width == 0) return set;
  }
  return nullptr;
}

const scout_isa* scout_isa_for_signs(int block_size) {
  for (int index = scout_current_isa(); index >= 0; index--)
    if (available().sets[index]->signs_fit(block_size)) return available().sets[index];
  return nullptr;
}

extern "C" {

SCOUT_EXPORT int scout_isa_count(void) { return available().count; }

SCOUT_EXPORT const char* scout_isa_name(int index) {
  return index >= 0 && index < available().count ? available().sets[index]->name : "";
}

SCOUT_EXPORT int scout_use_isa(int index) {
  if (index < 0 || index >= available().count) return SCOUT_UNSUPPORTED;
  current.store(index, std::memory_order_relaxed);
  return SCOUT_OK;
}

SCOUT_EXPORT int scout_current_isa(void) {
  int index = current.load(std::memory_order_relaxed);
  return index < 0 ? available().count - 1 : index;
}

SCOUT_EXPORT int scout_abi(void) { return SCOUT_ABI; }

}  // extern "C"
