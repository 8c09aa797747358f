// Attention of many queries over a list of tiles: included after tile.inl. Keys are transposed and values converted once,
// some tokens at a time, for all queries; what is computed per query then comes from L1.
namespace {

constexpr int STAGE = W == 8 ? 16 : 32;  // tokens
constexpr int WIDE = 2;    // vectors of tokens per query at once
static_assert(STAGE % (WIDE * W) == 0, "a stage must hold whole vectors");

// Element x of every four lanes: 0 to 3 of a, 4 to 7 of b.
#define SCOUT_OF_FOUR(x, at) ((x) < 4 ? (x) + (at) : (x)-4 + (at) + W)
#define SCOUT_FOUR(at, i, j, k, l) SCOUT_OF_FOUR(i, at), SCOUT_OF_FOUR(j, at), SCOUT_OF_FOUR(k, at), SCOUT_OF_FOUR(l, at)
#if SCOUT_W == 16
#define SCOUT_FOURS(a, b, i, j, k, l)                                                                          \
  SCOUT_SHUFFLE(a, b, SCOUT_FOUR(0, i, j, k, l), SCOUT_FOUR(4, i, j, k, l), SCOUT_FOUR(8, i, j, k, l), \
                SCOUT_FOUR(12, i, j, k, l))
#elif SCOUT_W == 8
#define SCOUT_FOURS(a, b, i, j, k, l) SCOUT_SHUFFLE(a, b, SCOUT_FOUR(0, i, j, k, l), SCOUT_FOUR(4, i, j, k, l))
#else
#define SCOUT_FOURS(a, b, i, j, k, l) SCOUT_SHUFFLE(a, b, SCOUT_FOUR(0, i, j, k, l))
#endif

// W vectors of W lanes.
template <class V>
inline void transpose(V* v) {
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    const V a = SCOUT_FOURS(v[i], v[i + 1], 0, 4, 1, 5), b = SCOUT_FOURS(v[i], v[i + 1], 2, 6, 3, 7);
    const V c = SCOUT_FOURS(v[i + 2], v[i + 3], 0, 4, 1, 5), d = SCOUT_FOURS(v[i + 2], v[i + 3], 2, 6, 3, 7);
    v[i] = SCOUT_FOURS(a, c, 0, 1, 4, 5), v[i + 1] = SCOUT_FOURS(a, c, 2, 3, 6, 7);
    v[i + 2] = SCOUT_FOURS(b, d, 0, 1, 4, 5), v[i + 3] = SCOUT_FOURS(b, d, 2, 3, 6, 7);
  }
#if SCOUT_W == 16
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const V ab = SCOUT_QUARTERS(v[j], v[j + 4], 0, 1, 4, 5), AB = SCOUT_QUARTERS(v[j], v[j + 4], 2, 3, 6, 7);
    const V cd = SCOUT_QUARTERS(v[j + 8], v[j + 12], 0, 1, 4, 5), CD = SCOUT_QUARTERS(v[j + 8], v[j + 12], 2, 3, 6, 7);
    v[j] = SCOUT_QUARTERS(ab, cd, 0, 2, 4, 6), v[j + 4] = SCOUT_QUARTERS(ab, cd, 1, 3, 5, 7);
    v[j + 8] = SCOUT_QUARTERS(AB, CD, 0, 2, 4, 6), v[j + 12] = SCOUT_QUARTERS(AB, CD, 1, 3, 5, 7);
  }
#elif SCOUT_W == 8
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const V a = v[j], b = v[j + 4];
    v[j] = SCOUT_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), v[j + 4] = SCOUT_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#endif
}

// Some tokens of the chunk: `keys` has the addresses of their keys, the values lie `behind` bytes after them. Packed
// tiles have no such rows: there it is tokens `first` to `first + count` of one tile, with the tile's padding mask.
struct Stage {
  const uint8_t* keys[STAGE];
  int count;
  const uint8_t* tile;
  int first;
  const uint8_t* padding_mask;
};

// Goes through a chunk, stage by stage, without its padding.
struct Stages {
  const scout_chunk& c;
  int tile = 0, token = 0;

  inline int tokens() const { return tile + 1 < c.count ? c.block_size : c.last_tokens; }

  inline bool next_rows(Stage& s, int64_t row_bytes) {
    s.count = 0, s.padding_mask = nullptr;
    for (; tile < c.count; tile++, token = 0) {
      const uint8_t* mask = c.padding_mask ? c.padding_mask[tile] : nullptr;
      for (const int end = tokens(); token < end; token++) {
        if (mask && !mask[token]) continue;
        if (s.count == STAGE) return true;
        s.keys[s.count++] = c.tiles[tile] + token * row_bytes;
      }
    }
    return s.count > 0;
  }

  inline bool next_span(Stage& s) {
    if (tile == c.count) return false;
    const int left = tokens() - token;
    s.tile = c.tiles[tile], s.first = token, s.count = left < STAGE ? left : STAGE;
    s.padding_mask = c.padding_mask && c.padding_mask[tile] ? c.padding_mask[tile] + token : nullptr;
    token += s.count;
    if (s.count == left) tile++, token = 0;
    return true;
  }
};

// Prefetches a stage, a little at a time: in one go it would wait for itself.
struct Ahead {
  const Stage* stage;
  int64_t values;
  int count, lines;  // lines per row
  int row = 0, line = 0;
  inline void some() {
    if (row >= count) return;
    const uint8_t* at = stage->keys[row] + 64 * line;
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + values, 0, 2);
    if (++line == lines) line = 0, row++;
  }
};

// Keys as [head_dim][STAGE], values as [tokens][head_dim] in the order of `pair`.
template <class R>
struct Floats {
  typedef float Query;
  static constexpr bool packed = false;
  alignas(64) float keys[SCOUT_MAX_HEAD_DIM * STAGE], values[SCOUT_MAX_HEAD_DIM * STAGE];

  static inline const float* query(const scout_chunk& c) { return c.query; }
  static inline void order(float* out, int numbers) { bring_back<R>(out, numbers); }

  void lay(const scout_chunk& c, const Stage& s) {
    const int D = c.head_dim;
    for (int t0 = 0; t0 < s.count; t0 += W)
      for (int d = 0; d < D; d += 2 * W) {
        vf a[W], b[W];
#pragma GCC unroll 16
        for (int t = 0; t < W; t++)
          R::pair(s.keys[t0 + t < s.count ? t0 + t : s.count - 1] + (int64_t)d * R::bytes, a[t], b[t]);
        transpose(a);
        transpose(b);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
          store(keys + (d + (R::even_odd ? 2 * i : i)) * STAGE + t0, a[i]);
          store(keys + (d + (R::even_odd ? 2 * i + 1 : W + i)) * STAGE + t0, b[i]);
        }
      }
    for (int t = 0; t < s.count; t++)
      for (int d = 0; d < D; d += 2 * W) {
        vf a, b;
        R::pair(s.keys[t] + c.tile_bytes / 2 + (int64_t)d * R::bytes, a, b);
        store(values + t * D + d, a), store(values + t * D + d + W, b);
      }
  }
};

// The same from a packed tile.
struct Unpacked {
  typedef float Query;
  static constexpr bool packed = true;
  alignas(64) float keys[SCOUT_MAX_HEAD_DIM * STAGE], values[SCOUT_MAX_HEAD_DIM * STAGE];

  static inline const float* query(const scout_chunk& c) { return c.query; }
  static inline void order(float*, int) {}

  static inline float scale(const uint8_t* bf16) {
    uint16_t half;
    __builtin_memcpy(&half, bf16, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }

  void lay(const scout_chunk& c, const Stage& s) {
    const int D = c.head_dim, B = c.block_size, half = B * D;
    const uint8_t *from = s.tile + half, *key_scales = from + half, *value_scales = key_scales + 2 * D;
    for (int d = 0; d < D; d += 2) {
      const vf even = splat(scale(key_scales + 2 * d)), odd = splat(scale(key_scales + 2 * d + 2));
      for (int t = 0; t < s.count; t += W) {
        const vi both = (vi)widen((const int8_t*)s.tile + (int64_t)d * B + 2 * (s.first + t));
        store(keys + d * STAGE + t, __builtin_convertvector((vi)((vu)both << 16) >> 16, vf) * even);
        store(keys + (d + 1) * STAGE + t, __builtin_convertvector(both >> 16, vf) * odd);
      }
    }
    for (int t = 0; t < s.count; t += 4)
      for (int d = 0; d < D; d += W) {
        const vu four = load<vu>(from + (int64_t)(s.first + t) * D + 4 * d);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
          const vi one = (vi)(four << (24 - 8 * k)) >> 24;
          store(values + (t + k) * D + d,
                __builtin_convertvector(one, vf) * splat(scale(value_scales + 2 * (s.first + t + k))));
        }
      }
  }
};

template <int GB>
inline void scores_of(const float* keys, int tokens, int numbers, const float* query, float* out,
                      Ahead& ahead) {
  for (int t0 = 0; t0 < tokens; t0 += WIDE * W) {
    vf sum[GB][WIDE] = {};
    const float* at = keys + t0;
    for (int d = 0; d < numbers; d++, at += STAGE) {
      ahead.some();
      vf k[WIDE];
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; i++) k[i] = load<vf>(at + i * W);
#pragma GCC unroll 4
      for (int g = 0; g < GB; g++) {
        const vf q = splat(query[g * numbers + d]);
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) sum[g][i] += q * k[i];
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++)
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; i++) store(out + g * ROW + t0 + i * W, sum[g][i]);
  }
}

template <int GB>
inline void values_of(const float* values, int tokens, int numbers, const float* weights, const Softmax* states,
                      float* out) {
  add_values<F32, GB>((const uint8_t*)values, tokens, numbers, weights, states, out, nullptr);
}

#ifdef SCOUT_BF16_DOT
// For bf16 queries: pairs of channels of keys [head_dim / 2][STAGE][2], pairs of tokens of values, and weights rounded
// to bf16.
struct Pairs {
  typedef uint16_t Query;
  static constexpr bool packed = false;
  alignas(64) int32_t keys[SCOUT_MAX_HEAD_DIM / 2 * STAGE], values[SCOUT_MAX_HEAD_DIM * STAGE / 2];

  static inline const uint16_t* query(const scout_chunk& c) { return c.query_bf16; }
  static inline void order(float* out, int numbers) { bring_back<BF16>(out, numbers); }

  void lay(const scout_chunk& c, const Stage& s) {
    const int D = c.head_dim;
    for (int t0 = 0; t0 < s.count; t0 += W)
      for (int d = 0; d < D; d += 2 * W) {
        vi v[W];
#pragma GCC unroll 16
        for (int t = 0; t < W; t++) v[t] = load<vi>(s.keys[t0 + t < s.count ? t0 + t : s.count - 1] + 2 * d);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(keys + (d / 2 + i) * STAGE + t0, v[i]);
      }
    for (int t = 0; t < s.count; t += 2)
      for (int d = 0; d < D; d += 2 * W) {
        const int64_t at = c.tile_bytes / 2 + 2 * d;
        const vi x = load<vi>(s.keys[t] + at), y = t + 1 < s.count ? load<vi>(s.keys[t + 1] + at) : vi{};
        store(values + t / 2 * D + d, (x & 0xffff) | (y << 16));
        store(values + t / 2 * D + d + W, (vi)((vu)x >> 16) | (y & (int)0xffff0000));
      }
  }
};

template <int GB>
inline void scores_of(const int32_t* keys, int tokens, int numbers, const uint16_t* query, float* out,
                      Ahead& ahead) {
  for (int t0 = 0; t0 < tokens; t0 += WIDE * W) {
    vf sum[GB][WIDE] = {};
    const int32_t* at = keys + t0;
    for (int d = 0; d < numbers; d += 2, at += STAGE) {
      ahead.some();
      vi k[WIDE];
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; i++) k[i] = load<vi>(at + i * W);
#pragma GCC unroll 4
      for (int g = 0; g < GB; g++) {
        const vi q = vi{} + load<int32_t>(query + g * numbers + d);
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) sum[g][i] = bf16_dot(sum[g][i], q, k[i]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++)
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; i++) store(out + g * ROW + t0 + i * W, sum[g][i]);
  }
}

template <int GB>
inline void values_of(const int32_t* values, int tokens, int numbers, const float* weights, const Softmax* states,
                      float* out) {
  // A weight of an odd last token pairs with none.
  alignas(64) uint16_t halves[GB][STAGE + W];
  for (int t = 0; t < tokens; t += W)
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) to_bf16(load<vf>(weights + g * ROW + t), halves[g] + t);
  for (int d = 0; d < numbers; d += 2 * W) {
    vf sum[GB][2];
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) sum[g][i] = load<vf>(out + g * numbers + d + i * W) * splat(states[g].shrink);
    const int32_t* at = values + d;
    for (int t = 0; t < tokens; t += 2, at += numbers) {
      const vi a = load<vi>(at), b = load<vi>(at + W);
#pragma GCC unroll 4
      for (int g = 0; g < GB; g++) {
        const vi p = vi{} + load<int32_t>(halves[g] + t);
        sum[g][0] = bf16_dot(sum[g][0], p, a), sum[g][1] = bf16_dot(sum[g][1], p, b);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) store(out + g * numbers + d + i * W, sum[g][i]);
  }
}
#endif

template <class M, int GB>
inline void attend_strip(const scout_chunk& c, const M& laid, const Stage& s, int g0, Softmax* states, Ahead& ahead) {
  alignas(64) float scores[GB * ROW];
  float scales[GB];
  const int D = c.head_dim;
  for (int g = 0; g < GB; g++) scales[g] = c.scale;
  scores_of<GB>(laid.keys, s.count, D, M::query(c) + (int64_t)g0 * D, scores, ahead);
  weigh<GB>(scores, s.count, s.padding_mask, scales, c.softcap, states + g0);
  values_of<GB>(laid.values, s.count, D, scores, states + g0, c.out + (int64_t)g0 * D);
}

template <class M>
void attend_stages(const scout_chunk& c, int row_bytes) {
  M laid;
  Softmax states[SCOUT_MANY];
  for (int g = 0; g < c.group; g++) states[g] = Softmax{NEGATIVE_INFINITY, 1.0f, vf{}};
  __builtin_memset(c.out, 0, sizeof(float) * c.group * c.head_dim);
  Stages stages{c};
  Stage both[2];
  auto next = [&](Stage& s) { return M::packed ? stages.next_span(s) : stages.next_rows(s, row_bytes); };
  bool more = next(both[0]);
  for (int turn = 0; more; turn ^= 1) {
    const Stage& s = both[turn];
    laid.lay(c, s);
    more = next(both[turn ^ 1]);
    Ahead ahead{&both[turn ^ 1], c.tile_bytes / 2, more && !M::packed ? both[turn ^ 1].count : 0, (row_bytes + 63) / 64};
    int g = 0;
    for (; g + 4 <= c.group; g += 4) attend_strip<M, 4>(c, laid, s, g, states, ahead);
    switch (c.group - g) {
      case 1: attend_strip<M, 1>(c, laid, s, g, states, ahead); break;
      case 2: attend_strip<M, 2>(c, laid, s, g, states, ahead); break;
      case 3: attend_strip<M, 3>(c, laid, s, g, states, ahead); break;
    }
  }
  for (int g = 0; g < c.group; g++) {
    M::order(c.out + (int64_t)g * c.head_dim, c.head_dim);
    c.max[g] = states[g].max, c.sum[g] = total(states[g].sum);
  }
}

void attend_many(const scout_chunk* c) {
  switch (c->dtype) {
    case SCOUT_F32: return attend_stages<Floats<F32>>(*c, 4 * c->head_dim);
    case SCOUT_F16: return attend_stages<Floats<F16>>(*c, 2 * c->head_dim);
    case SCOUT_I8: return attend_stages<Unpacked>(*c, 0);
  }
#ifdef SCOUT_BF16_DOT
  // Rounded weights are as exact as torch's flash attention, which has no soft cap.
  if (c->query_bf16 && c->softcap == 0.0f) return attend_stages<Pairs>(*c, 2 * c->head_dim);
#endif
  attend_stages<Floats<BF16>>(*c, 2 * c->head_dim);
}

}  // namespace
