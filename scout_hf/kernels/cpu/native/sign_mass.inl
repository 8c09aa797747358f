// What all ways of lookup in sign codes share.
namespace {

// 2 to the power of x / 2^23 - 127, with straight lines between whole powers: the number whose bits are x.
inline vf power(vf x) {
  const vf low = splat(0x1p23f), high = splat(253 * 0x1p23f);
  return (vf)__builtin_convertvector(smaller(larger(x, low), high), vi);
}

// 2^(scale * number * worth - reference), where factor is worth * 2^23 and one (127 - reference) * 2^23.
inline vf mass_of(vf number, vf scale, vf factor, vf one) { return power(number * scale * factor + one); }

// The sum of every four lanes of four vectors: lanes 4k to 4k + 3 are for lanes 4k to 4k + 3 of the vectors.
inline vf sums_of_four(const vf* v) {
#if SCOUT_W == 16
  const vf a = SCOUT_SHUFFLE(v[0], v[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               SCOUT_SHUFFLE(v[0], v[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const vf b = SCOUT_SHUFFLE(v[2], v[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               SCOUT_SHUFFLE(v[2], v[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  return SCOUT_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SCOUT_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif SCOUT_W == 8
  const vf a =
      SCOUT_SHUFFLE(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) + SCOUT_SHUFFLE(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const vf b =
      SCOUT_SHUFFLE(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) + SCOUT_SHUFFLE(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
  return SCOUT_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SCOUT_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  const vf a = SCOUT_SHUFFLE(v[0], v[1], 0, 4, 1, 5) + SCOUT_SHUFFLE(v[0], v[1], 2, 6, 3, 7);
  const vf b = SCOUT_SHUFFLE(v[2], v[3], 0, 4, 1, 5) + SCOUT_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
  return SCOUT_SHUFFLE(a, b, 0, 1, 4, 5) + SCOUT_SHUFFLE(a, b, 2, 3, 6, 7);
#endif
}

// Bytes that begin anywhere, so that the last ones may be in one more line.
inline void prefetch_all(const uint8_t* from, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
  __builtin_prefetch(from + bytes - 1, 0, 2);
}

// Every `parts`-th line of the signs of a block; part 0: its scales, too.
inline void prefetch_code(const uint8_t* code, int signs, int64_t scales, int tokens, int part, int parts) {
  for (int at = 64 * part; at < signs; at += 64 * parts) __builtin_prefetch(code + at, 0, 2);
  if (part) return;
  __builtin_prefetch(code + signs - 1, 0, 2);
  prefetch_all(code + scales, tokens);
}

inline const uint8_t* code_at(const scout_signs& s, int64_t place) {
  place = place < s.blocks - 1 ? place : s.blocks - 1;
  return s.codes + (s.ids ? s.ids[place] : place) * s.code_bytes;
}

}  // namespace
