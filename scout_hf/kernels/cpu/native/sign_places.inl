// Tables of what patterns of signs add to sums, and which patterns tokens have, for instruction sets that shuffle within
// 16 bytes.
namespace {

constexpr int VB = 4 * W;              // bytes of a vector
constexpr int T = SCOUT_SIGN_VECTORS;  // vectors of tokens that share a load of each table

// Every 16 bytes of a vector have the same table.
inline void lay_tables(const scout_signs& s, vb* tables) {
  for (int i = 0; i < s.heads * 2 * s.rows; i++)
    for (int lane = 0; lane < VB / 16; lane++)
      __builtin_memcpy((uint8_t*)&tables[i] + 16 * lane, s.tables + (int64_t)i * 16, 16);
}

// Where to look: [2 * rows][T], once for all heads.
template <int R>
inline void lay_places(const uint8_t* (*blocks)[R], int64_t step, int rows, vb* places) {
  for (int row = 0; row < rows; row++, places += 2 * T)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const vb signs = side_by_side<R>(blocks[t], row * step);
      store(places + t, signs & 15);
      store(places + T + t, (vb)((vw)signs >> 4) & 15);
    }
}

}  // namespace
