// Attention over a list of tiles for one instruction set: included by every isa_*.cpp, which defines the
// vector width W in floats, `half_pair`, `widen`, `madd` and, if available, a bf16 dot product.
// Only GCC/clang vector types and no templates of the standard library: whatever is instantiated here must not be
// merged by the linker with the same thing built for another instruction set.

#if defined(__clang__)
#define SCOUT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SCOUT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})  // for GCC before version 12
#endif

// Keeps the compiler from loading a vector again for each of its uses.
#if defined(__x86_64__)
#define SCOUT_IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__aarch64__)
#define SCOUT_IN_REGISTER(v) asm("" : "+w"(v))
#else
#define SCOUT_IN_REGISTER(v) (void)(v)
#endif

namespace {

typedef uint32_t vu __attribute__((vector_size(4 * W)));  // for sums that may wrap

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

template <class T>
inline T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(void* to, T value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Adding zero would be an instruction, since it changes -0.
inline vf splat(float x) { return x - vf{}; }

// Into L2.
inline void prefetch_span(const uint8_t* from, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// Into L1, from where an earlier prefetch has brought it. Half a tile at a time: a whole one would push out too much.
constexpr int64_t NEAR_BYTES = 8192;
inline void prefetch_near(const uint8_t* from, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 3);
}

// -- from 2W stored numbers to two vectors of floats ---------------------------------------------------------------

struct F32 {
  static constexpr int bytes = 4;
  static constexpr bool even_odd = false;
  static inline void pair(const uint8_t* from, vf& a, vf& b) {
    a = load<vf>(from);
    b = load<vf>(from + sizeof(vf));
  }
};

struct F16 {
  static constexpr int bytes = 2;
  static constexpr bool even_odd = false;
  static inline void pair(const uint8_t* from, vf& a, vf& b) { half_pair(from, a, b); }
};

struct BF16 {
  static constexpr int bytes = 2;
  static constexpr bool even_odd = true;  // a shift and a mask instead of a shuffle; queries are laid out to match
  static inline void pair(const uint8_t* from, vf& a, vf& b) {
    vi both = load<vi>(from);
    a = (vf)(both << 16);
    b = (vf)(both & (int)0xffff0000);
  }
};

struct I8 {
  static constexpr int bytes = 1;
  static constexpr bool even_odd = false;
  typedef int8_t some __attribute__((vector_size(W)));
  static inline void pair(const uint8_t* from, vf& a, vf& b) {
    a = __builtin_convertvector(__builtin_convertvector(load<some>(from), vi), vf);
    b = __builtin_convertvector(__builtin_convertvector(load<some>(from + W), vi), vf);
  }
};

struct I4 {
  static constexpr int bytes = 1;  // of two numbers
  static constexpr bool even_odd = true;
  static inline void pair(const uint8_t* from, vf& a, vf& b) {
    const vi both = __builtin_convertvector(load<I8::some>(from), vi);
    a = __builtin_convertvector((vi)((vu)both << 28) >> 28, vf);
    b = __builtin_convertvector(both >> 4, vf);
  }
};

template <class R>
inline void lay_out(const float* natural, float* laid, int numbers) {
  if (!R::even_odd) {
    __builtin_memcpy(laid, natural, numbers * sizeof(float));
    return;
  }
  for (int d = 0; d < numbers; d += 2 * W)
    for (int i = 0; i < W; i++) laid[d + i] = natural[d + 2 * i], laid[d + W + i] = natural[d + 2 * i + 1];
}

template <class R>
inline void bring_back(float* laid, int numbers) {
  if (!R::even_odd) return;
  float natural[2 * W];
  for (int d = 0; d < numbers; d += 2 * W) {
    for (int i = 0; i < W; i++) natural[2 * i] = laid[d + i], natural[2 * i + 1] = laid[d + W + i];
    __builtin_memcpy(laid + d, natural, sizeof natural);
  }
}

// -- sums across lanes ---------------------------------------------------------------------------------------------

// Lane L of the sum is the sum over the lanes of source slot(L).
constexpr int slot(int lane) { return (lane & ~3) | ((lane & 1) << 1) | ((lane >> 1) & 1); }

#if SCOUT_W == 16
inline vf fold_halves(vf a, vf b) {
  return SCOUT_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         SCOUT_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline vf fold_eights(vf a, vf b) {
  return SCOUT_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
         SCOUT_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
inline vf fold_fours(vf a, vf b) {
  return SCOUT_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SCOUT_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
inline vf fold_twos(vf a, vf b) {
  return SCOUT_SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         SCOUT_SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
inline vf sums(vf* v) {
  for (int i = 0; i < 8; i++) v[i] = fold_halves(v[i], v[i + 8]);
  for (int i = 0; i < 4; i++) v[i] = fold_eights(v[i], v[i + 4]);
  for (int i = 0; i < 2; i++) v[i] = fold_fours(v[i], v[i + 2]);
  return fold_twos(v[0], v[1]);
}
#elif SCOUT_W == 8
inline vf sums(vf* v) {
  for (int i = 0; i < 4; i++)
    v[i] = SCOUT_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           SCOUT_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; i++)
    v[i] = SCOUT_SHUFFLE(v[i], v[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           SCOUT_SHUFFLE(v[i], v[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return SCOUT_SHUFFLE(v[0], v[1], 0, 2, 8, 10, 4, 6, 12, 14) +
         SCOUT_SHUFFLE(v[0], v[1], 1, 3, 9, 11, 5, 7, 13, 15);
}
#else
inline vf sums(vf* v) {
  for (int i = 0; i < 2; i++)
    v[i] = SCOUT_SHUFFLE(v[i], v[i + 2], 0, 1, 4, 5) + SCOUT_SHUFFLE(v[i], v[i + 2], 2, 3, 6, 7);
  return SCOUT_SHUFFLE(v[0], v[1], 0, 2, 4, 6) + SCOUT_SHUFFLE(v[0], v[1], 1, 3, 5, 7);
}
#endif

// Units are quarters (or halves) of a vector: a's are numbered first, then b's.
#if SCOUT_W == 16
#define SCOUT_QUARTERS(a, b, i, j, k, l)                                                                            \
  SCOUT_SHUFFLE(a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3, 4 * k, \
                          4 * k + 1, 4 * k + 2, 4 * k + 3, 4 * l, 4 * l + 1, 4 * l + 2, 4 * l + 3)
#elif SCOUT_W == 8
#define SCOUT_QUARTERS(a, b, i, j, k, l) \
  SCOUT_SHUFFLE(a, b, 2 * i, 2 * i + 1, 2 * j, 2 * j + 1, 2 * k, 2 * k + 1, 2 * l, 2 * l + 1)
#else
#define SCOUT_QUARTERS(a, b, i, j, k, l) SCOUT_SHUFFLE(a, b, i, j, k, l)
#endif

// From one vector per run of tokens, with a unit per query, to one vector per query.
template <int GB>
inline void by_query(vf* v) {
  if (GB == 2) {
    vf a = SCOUT_QUARTERS(v[0], v[1], 0, 1, 4, 5), b = SCOUT_QUARTERS(v[0], v[1], 2, 3, 6, 7);
    v[0] = a, v[1] = b;
  } else if (GB > 2) {
    vf a = SCOUT_QUARTERS(v[0], v[1], 0, 2, 4, 6), b = SCOUT_QUARTERS(v[0], v[1], 1, 3, 5, 7);
    vf c = SCOUT_QUARTERS(v[2], v[3], 0, 2, 4, 6), d = SCOUT_QUARTERS(v[2], v[3], 1, 3, 5, 7);
    v[0] = SCOUT_QUARTERS(a, c, 0, 2, 4, 6), v[1] = SCOUT_QUARTERS(b, d, 0, 2, 4, 6);
    v[2] = SCOUT_QUARTERS(a, c, 1, 3, 5, 7), v[3] = SCOUT_QUARTERS(b, d, 1, 3, 5, 7);
  }
}

template <class V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline auto largest(V v) {
  v = greater(v, SCOUT_QUARTERS(v, v, 2, 3, 0, 1));
  v = greater(v, SCOUT_QUARTERS(v, v, 1, 0, 3, 2));
  auto most = v[0];
  for (int i = 1; i < W / 4; i++) most = v[i] > most ? v[i] : most;
  return most;
}

inline float total(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// -- exponential and soft cap; both propagate NaN --------------------------------------------------------------------

inline vf exponential(vf x) {
  const vf lowest = splat(-87.0f), magic = splat(12582912.0f);
  vf within = x < lowest ? lowest : x;
  vf shifted = within * splat(1.44269504088896341f) + magic;
  vf n = shifted - magic;
  vf r = within - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  vf y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * r * r + r + splat(1.0f);
  vu power = ((vu)shifted - (vu)magic + 127) << 23;
  return x < lowest ? splat(0.0f) : y * (vf)power;
}

// cap * tanh(x / cap)
inline vf soft_cap(vf x, float cap) {
  vf scaled = x / splat(cap);
  vf size = scaled < splat(0.0f) ? -scaled : scaled;
  vf z = scaled * scaled;
  vf series = splat(-5.70498872745e-3f);
  series = series * z + splat(2.06390887954e-2f);
  series = series * z + splat(-5.37397155531e-2f);
  series = series * z + splat(1.33314422036e-1f);
  series = series * z + splat(-3.33332819422e-1f);
  series = series * z * scaled + scaled;
  vf decay = exponential(size * splat(-2.0f));
  vf far = (splat(1.0f) - decay) / (splat(1.0f) + decay);
  far = scaled < splat(0.0f) ? -far : far;
  return (size < splat(0.625f) ? series : far) * splat(cap);
}

// -- scores of a tile ------------------------------------------------------------------------------------------------

// Products of a stored row with a query, 2W numbers at a time.
template <class R>
struct FloatProduct {
  typedef float Query;
  typedef vf Part;
  static constexpr int bytes = R::bytes, parts = 2;
  static inline vf key(const uint8_t* from, int part) {
    vf a, b;
    R::pair(from, a, b);
    return part ? b : a;
  }
  static inline vf query(const float* from, int part) { return load<vf>(from + part * W); }
  static inline vf add(vf sum, vf k, vf q) { return sum + k * q; }
};

#ifdef SCOUT_BF16_DOT
// For bf16 queries: exact products, half the instructions.
struct Bf16Product {
  typedef uint16_t Query;
  typedef vi Part;
  static constexpr int bytes = 2, parts = 1;
  static inline vi key(const uint8_t* from, int) { return load<vi>(from); }
  static inline vi query(const uint16_t* from, int) { return load<vi>(from); }
  static inline vf add(vf sum, vi k, vi q) { return bf16_dot(sum, k, q); }
};
#endif

// out[g][t] = keys[t] . query[g]; does not read rows from `rows` on, but writes whole vectors.
template <class P, int GB>
inline void dots(const uint8_t* keys, int rows, int numbers, const typename P::Query* query, float* out,
                 int out_stride, const uint8_t* next, const uint8_t* soon = nullptr) {
  constexpr int RUNS = GB == 3 ? 4 : GB, TB = W / RUNS;
  const int64_t row_bytes = (int64_t)numbers * P::bytes;
  for (int t0 = 0; t0 < rows; t0 += W) {
    vf run[RUNS] = {};
#pragma GCC unroll 1
    for (int r = 0; r < RUNS; r++) {
      const int first = t0 + r * TB;
      if (first >= rows) break;
      const uint8_t* row[TB];
#pragma GCC unroll 16
      for (int t = 0; t < TB; t++) row[t] = keys + (first + t < rows ? first + t : rows - 1) * row_bytes;
      vf sum[W] = {};
      for (int d = 0; d < numbers; d += 2 * W) {
        constexpr int BYTES = TB * 2 * W * P::bytes;
        if (next) prefetch_span(next + first * row_bytes + (int64_t)d * TB * P::bytes, BYTES);
        if (soon) prefetch_near(soon + first * row_bytes + (int64_t)d * TB * P::bytes, BYTES);
        // A part of all keys, then of one query after the other: few registers, and each number is loaded once.
#pragma GCC unroll 2
        for (int part = 0; part < P::parts; part++) {
          typename P::Part k[TB];
#pragma GCC unroll 16
          for (int t = 0; t < TB; t++) k[t] = P::key(row[t] + (int64_t)d * P::bytes, part);
#pragma GCC unroll 4
          for (int g = 0; g < GB; g++) {
            typename P::Part q = P::query(query + g * numbers + d, part);
            if (TB > 1) SCOUT_IN_REGISTER(q);
#pragma GCC unroll 16
            for (int t = 0; t < TB; t++) {
              vf& s = sum[slot(g * TB + t)];
              s = P::add(s, k[t], q);
            }
          }
        }
      }
      run[r] = sums(sum);
    }
    by_query<GB>(run);
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) store(out + g * out_stride + t0, run[g]);
  }
}

// -- weights of a tile: online softmax -------------------------------------------------------------------------------

constexpr int ROW = SCOUT_MAX_BLOCK + 16;  // dots() writes whole vectors

struct Softmax {
  float max, shrink;
  vf sum;
};

// Turns scores into weights in place; `shrink` is the factor for earlier results.
template <int GB>
inline void weigh(float* scores, int tokens, const uint8_t* padding_mask, const float* scales, float softcap,
                  Softmax* states) {
  const int padded = (tokens + W - 1) / W * W;
  vf most[GB], base[GB], sum[GB] = {};
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++) most[g] = splat(NEGATIVE_INFINITY);
  for (int t = 0; t < padded; t += W) {
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      float* at = scores + g * ROW + t;
      vf s = load<vf>(at) * splat(scales[g]);
      if (softcap != 0.0f) s = soft_cap(s, softcap);
      store(at, s);
      most[g] = greater(s, most[g]);
    }
  }
  if (padding_mask || padded > tokens) {
    for (int g = 0; g < GB; g++) {
      float* row = scores + g * ROW;
      for (int t = 0; t < padded; t++)
        if (t >= tokens || (padding_mask && !padding_mask[t])) row[t] = NEGATIVE_INFINITY;
      most[g] = splat(NEGATIVE_INFINITY);
      for (int t = 0; t < padded; t += W) most[g] = greater(load<vf>(row + t), most[g]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++) {
    const float before = states[g].max, here = largest(most[g]);
    const float max = here > before ? here : before;
    base[g] = splat(max == NEGATIVE_INFINITY ? 0.0f : max);
    states[g].max = max;
    states[g].shrink = before == max ? 1.0f : exponential(splat(before) - base[g])[0];
  }
  for (int t = 0; t < padded; t += W) {
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      float* at = scores + g * ROW + t;
      const vf p = exponential(load<vf>(at) - base[g]);
      store(at, p);
      sum[g] += p;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++) states[g].sum = states[g].sum * splat(states[g].shrink) + sum[g];
}

// -- weighted values of a tile -----------------------------------------------------------------------------------------

template <class R, int GB, int NS>
inline void add_slice(const uint8_t* values, int tokens, int numbers, int d0, const float* weights,
                      const Softmax* states, float* out, const uint8_t* next, const uint8_t* soon) {
  vf sum[GB][2 * NS];
  const int64_t row_bytes = (int64_t)numbers * R::bytes;
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++)
#pragma GCC unroll 4
    for (int s = 0; s < 2 * NS; s++) sum[g][s] = load<vf>(out + g * numbers + d0 + s * W) * splat(states[g].shrink);
  const uint8_t* at = values + (int64_t)d0 * R::bytes;
  constexpr int BYTES = NS * 2 * W * R::bytes;
  // Where two slices share a line, the first prefetches from memory and the second from L2.
  const bool first = BYTES >= 64 || d0 * R::bytes % 64 == 0;
  next = next && first ? next + (int64_t)d0 * R::bytes : nullptr;
  soon = soon && (BYTES >= 64 || !first) ? soon + (int64_t)d0 * R::bytes : nullptr;
  for (int t = 0; t < tokens; t++, at += row_bytes) {
    if (next) prefetch_span(next + t * row_bytes, BYTES);
    if (soon) prefetch_near(soon + t * row_bytes, BYTES);
    vf v[2 * NS];
#pragma GCC unroll 2
    for (int s = 0; s < NS; s++) R::pair(at + s * 2 * W * R::bytes, v[2 * s], v[2 * s + 1]);
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      vf p = splat(weights[g * ROW + t]);
#pragma GCC unroll 4
      for (int s = 0; s < 2 * NS; s++) sum[g][s] += p * v[s];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++)
#pragma GCC unroll 4
    for (int s = 0; s < 2 * NS; s++) store(out + g * numbers + d0 + s * W, sum[g][s]);
}

template <class R, int GB>
inline void add_values(const uint8_t* values, int tokens, int numbers, const float* weights, const Softmax* states,
                       float* out, const uint8_t* next, const uint8_t* soon = nullptr) {
  constexpr int NS = R::bytes == 4 ? 1 : SLICES;
  int d = 0;
  for (; d + 2 * W * NS <= numbers; d += 2 * W * NS)
    add_slice<R, GB, NS>(values, tokens, numbers, d, weights, states, out, next, soon);
  for (; d < numbers; d += 2 * W) add_slice<R, GB, 1>(values, tokens, numbers, d, weights, states, out, next, soon);
}

#if SCOUT_W == 16
#define SCOUT_EACH_FOUR(v, i, j, k, l)                                                                             \
  SCOUT_SHUFFLE(v, v, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                          k + 12, l + 12)
#elif SCOUT_W == 8
#define SCOUT_EACH_FOUR(v, i, j, k, l) SCOUT_SHUFFLE(v, v, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define SCOUT_EACH_FOUR(v, i, j, k, l) SCOUT_SHUFFLE(v, v, i, j, k, l)
#endif

// -- integers for int8 tiles ---------------------------------------------------------------------------------------------

#ifdef SCOUT_BYTE_DOT
typedef uint8_t ByteWeight;
#else
typedef int16_t ByteWeight;  // in the order 0, 2, 1, 3 of every four tokens
#endif

inline vf as_floats(const uint8_t* bf16) {
  typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
  return (vf)(__builtin_convertvector(load<vu16>(bf16), vi) << 16);
}

// Quantises weights times the scales of a tile to 0..255: weights[g][t] * scales[t] = integer * factors[g].
// Eight bits are enough: the rounding error is a fraction of that of the int8 values.
template <int GB>
inline void to_bytes(const float* weights, const uint8_t* scales_bf16, int count, ByteWeight* into, float* factors) {
  alignas(64) float scaled[GB][SCOUT_MAX_BLOCK];
  // Magnitudes are compared as integers: the same order as floats, with NaN largest.
  vi most[GB] = {};
  vf up[GB];
  for (int i = 0; i < count; i += W) {
    const vf scale = as_floats(scales_bf16 + 2 * i);
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const vf x = load<vf>(weights + g * ROW + i) * scale;
      store(scaled[g] + i, x);
      most[g] = greater((vi)x, most[g]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++) {
    const int bits = largest(most[g]);
    const float peak = load<float>(&bits);
    factors[g] = peak * (1.0f / 255.0f);
    up[g] = splat(peak > 0.0f ? 255.0f / peak : 0.0f);
  }
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  const vf magic = splat(12582912.0f);
  for (int i = 0; i < count; i += W) {
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const vi whole = (vi)(load<vf>(scaled[g] + i) * up[g] + magic);
#ifdef SCOUT_BYTE_DOT
      typedef uint8_t narrow __attribute__((vector_size(W)));
      store(into + g * ROW + i, __builtin_convertvector(whole & 0xff, narrow));
#else
      typedef int16_t narrow __attribute__((vector_size(2 * W)));
      store(into + g * ROW + i, __builtin_convertvector(SCOUT_EACH_FOUR(whole & 0xff, 0, 2, 1, 3), narrow));
#endif
    }
  }
}

// Quantises queries times the scales of each tile to int16. The factor is reused for the next tile while results
// stay between 12 and 15 bits, which saves a pass.
template <int GB>
struct Int16Query {
  alignas(64) float wide[GB][SCOUT_MAX_HEAD_DIM];
  alignas(64) int16_t narrow[GB * SCOUT_MAX_HEAD_DIM];
  float factors[GB];

  inline void start(const float* query, int numbers) {
    for (int g = 0; g < GB; g++) {
      factors[g] = 1.0f;
      __builtin_memcpy(wide[g], query + g * numbers, numbers * sizeof(float));
    }
  }

  inline void scale(const uint8_t* scales_bf16, int numbers) {
    typedef int16_t vs __attribute__((vector_size(2 * W)));
    for (;;) {
      vi most[GB] = {};
      for (int d = 0; d < numbers; d += W) {
        const vf scale = as_floats(scales_bf16 + 2 * d), magic = splat(12582912.0f);
#pragma GCC unroll 4
        for (int g = 0; g < GB; g++) {
          const vf x = load<vf>(wide[g] + d) * scale;
          most[g] = greater((vi)x & 0x7fffffff, most[g]);
          store(narrow + g * numbers + d, __builtin_convertvector((vi)(x + magic), vs));
        }
      }
      bool again = false;
#pragma GCC unroll 4
      for (int g = 0; g < GB; g++) {
        const int bits = largest(most[g]);
        const float peak = load<float>(&bits);
        if ((peak >= 2048.0f && peak <= 32766.0f) || peak < 1.0e-30f) continue;  // or everything rounds to 0
        if (!(peak < 3.0e38f)) {
          factors[g] = peak - peak;  // NaN
          continue;
        }
        again = true;
        const float up = 16383.0f / peak;
        factors[g] /= up;
        for (int d = 0; d < numbers; d += W) store(wide[g] + d, load<vf>(wide[g] + d) * splat(up));
      }
      if (!again) return;
    }
  }
};

// out[g][t] = query[g] . key t, for NS vectors of tokens from t0 on. Keys lie as [head_dim / 2][block][2], so that no sum
// across lanes is needed.
template <int GB, int NS>
inline void scores_slice(const uint8_t* keys, int block, int numbers, int t0, const int16_t* query, float* out,
                         const uint8_t* next) {
  vi sum[GB][NS] = {};
  const uint8_t* at = keys + 2 * t0;
  if (next) next += 2 * t0;
  for (int d = 0; d < numbers; d += 2, at += 2 * block) {
    if (next) prefetch_span(next + (int64_t)d * block, NS * 2 * W);
    vh k[NS];
#pragma GCC unroll 4
    for (int s = 0; s < NS; s++) k[s] = widen((const int8_t*)at + s * 2 * W);
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const vh q = (vh)(vi{} + load<int32_t>(query + g * numbers + d));
#pragma GCC unroll 4
      for (int s = 0; s < NS; s++) sum[g][s] = madd(sum[g][s], k[s], q);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++)
#pragma GCC unroll 4
    for (int s = 0; s < NS; s++) store(out + g * ROW + t0 + s * W, __builtin_convertvector(sum[g][s], vf));
}

// Weighted values of NS vectors of channels from d0 on. Values lie as [block / 4][head_dim][4].
template <int GB, int NS>
inline void values_slice(const uint8_t* values, int block, int numbers, int d0, const ByteWeight* weights,
                         const float* factors, const Softmax* states, float* out, const uint8_t* next) {
  vi sum[GB][NS] = {};
  const uint8_t* at = values + 4 * d0;
  if (next) next += 4 * d0;
  for (int t = 0; t < block; t += 4, at += 4 * numbers) {
    if (next) prefetch_span(next + (int64_t)t * numbers, NS * 4 * W);
#ifdef SCOUT_BYTE_DOT
    vi v[NS];
#pragma GCC unroll 4
    for (int s = 0; s < NS; s++) v[s] = load<vi>(at + s * 4 * W);
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const vi w = vi{} + load<int32_t>(weights + g * ROW + t);
#pragma GCC unroll 4
      for (int s = 0; s < NS; s++) sum[g][s] = byte_dot(sum[g][s], w, v[s]);
    }
#else
    vh odd[NS], even[NS];
#pragma GCC unroll 4
    for (int s = 0; s < NS; s++) {
      const vh four = load<vh>(at + s * 4 * W);
      odd[s] = four >> 8;
      even[s] = (four << 8) >> 8;
    }
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) {
      const vh w02 = (vh)(vi{} + load<int32_t>(weights + g * ROW + t));
      const vh w13 = (vh)(vi{} + load<int32_t>(weights + g * ROW + t + 2));
#pragma GCC unroll 4
      for (int s = 0; s < NS; s++) sum[g][s] = madd(madd(sum[g][s], even[s], w02), odd[s], w13);
    }
#endif
  }
#pragma GCC unroll 4
  for (int g = 0; g < GB; g++)
#pragma GCC unroll 4
    for (int s = 0; s < NS; s++) {
      float* to = out + g * numbers + d0 + s * W;
      const vf more = __builtin_convertvector(sum[g][s], vf) * splat(factors[g]);
      store(to, load<vf>(to) * splat(states[g].shrink) + more);
    }
}

// -- one chunk -----------------------------------------------------------------------------------------------------------

template <int GB>
void start(const scout_chunk& c, int g0, Softmax* states) {
  for (int g = 0; g < GB; g++) states[g] = Softmax{NEGATIVE_INFINITY, 1.0f, vf{}};
  __builtin_memset(c.out + g0 * c.head_dim, 0, sizeof(float) * GB * c.head_dim);
}

template <int GB>
void finish(const scout_chunk& c, int g0, const Softmax* states) {
  for (int g = 0; g < GB; g++) c.max[g0 + g] = states[g].max, c.sum[g0 + g] = total(states[g].sum);
}

template <class R, int GB>
void attend_group(const scout_chunk& c, int g0, bool prefetches) {
  alignas(64) float query[GB * SCOUT_MAX_HEAD_DIM], scores[GB * ROW];
  Softmax states[GB];
  const int D = c.head_dim;
  float *out = c.out + g0 * D, scales[GB];
  for (int g = 0; g < GB; g++) {
    lay_out<R>(c.query + (g0 + g) * D, query + g * D, D);
    scales[g] = c.scale;
  }
  start<GB>(c, g0, states);
  for (int i = 0; i < c.count; i++) {
    const int tokens = i + 1 < c.count ? c.block_size : c.last_tokens;
    const uint8_t* keys = c.tiles[i];
    const uint8_t* values = keys + c.tile_bytes / 2;
    const uint8_t* next = !prefetches ? nullptr : i + 1 < c.count ? c.tiles[i + 1] : c.after;
    const uint8_t* next_values = next ? next + c.tile_bytes / 2 : nullptr;
    const bool near = prefetches && c.tile_bytes / 2 <= NEAR_BYTES;
    const uint8_t *own = near ? values : nullptr, *next_keys = near ? next : nullptr;
#ifdef SCOUT_BF16_DOT
    if (R::even_odd && c.query_bf16)
      dots<Bf16Product, GB>(keys, tokens, D, c.query_bf16 + g0 * D, scores, ROW, next, own);
    else
#endif
      dots<FloatProduct<R>, GB>(keys, tokens, D, query, scores, ROW, next, own);
    const uint8_t* padding_mask = c.padding_mask ? c.padding_mask[i] : nullptr;
    weigh<GB>(scores, tokens, padding_mask, scales, c.softcap, states);
    add_values<R, GB>(values, tokens, D, scores, states, out, next_values, next_keys);
  }
  for (int g = 0; g < GB; g++) bring_back<R>(out + g * D, D);
  finish<GB>(c, g0, states);
}

template <int GB>
void attend_group_int8(const scout_chunk& c, int g0, bool prefetches) {
  constexpr int NS = 2;
  alignas(64) float scores[GB * ROW];
  alignas(64) ByteWeight weights[GB * ROW];
  float factors[GB];
  Int16Query<GB> query;
  Softmax states[GB];
  const int D = c.head_dim, B = c.block_size, half = B * D;
  float* out = c.out + g0 * D;
  start<GB>(c, g0, states);
  query.start(c.query + g0 * D, D);
  for (int i = 0; i < c.count; i++) {
    const uint8_t* keys = c.tiles[i];
    const uint8_t *values = keys + half, *key_scales = values + half, *value_scales = key_scales + 2 * D;
    const uint8_t* next = !prefetches ? nullptr : i + 1 < c.count ? c.tiles[i + 1] : c.after;
    const uint8_t* next_values = next ? next + half : nullptr;
    if (next) prefetch_span(next + 2 * half, 2 * (D + B));
    query.scale(key_scales, D);
    int t = 0, d = 0;
    for (; t + NS * W <= B; t += NS * W) scores_slice<GB, NS>(keys, B, D, t, query.narrow, scores, next);
    for (; t < B; t += W) scores_slice<GB, 1>(keys, B, D, t, query.narrow, scores, next);
#pragma GCC unroll 4
    for (int g = 0; g < GB; g++) factors[g] = query.factors[g] * c.scale;
    weigh<GB>(scores, B, c.padding_mask ? c.padding_mask[i] : nullptr, factors, c.softcap, states);
    to_bytes<GB>(scores, value_scales, B, weights, factors);
    for (; d + NS * W <= D; d += NS * W)
      values_slice<GB, NS>(values, B, D, d, weights, factors, states, out, next_values);
    for (; d < D; d += W) values_slice<GB, 1>(values, B, D, d, weights, factors, states, out, next_values);
  }
  finish<GB>(c, g0, states);
}

template <int GB>
void attend_part(const scout_chunk& c, int g0) {
  const bool prefetches = g0 == 0;
  switch (c.dtype) {
    case SCOUT_F32: return attend_group<F32, GB>(c, g0, prefetches);
    case SCOUT_F16: return attend_group<F16, GB>(c, g0, prefetches);
    case SCOUT_BF16: return attend_group<BF16, GB>(c, g0, prefetches);
    default: return attend_group_int8<GB>(c, g0, prefetches);
  }
}

void attend(const scout_chunk* c) {
  int g = 0;
  for (; g + 4 <= c->group; g += 4) attend_part<4>(*c, g);
  switch (c->group - g) {
    case 1: return attend_part<1>(*c, g);
    case 2: return attend_part<2>(*c, g);
    case 3: return attend_part<3>(*c, g);
  }
}

// Rows one at a time, in memory order: reading two at a time was half as fast.
template <class R, int PACKED = 1>
void code_dots(const uint8_t* codes, int64_t rows, int numbers, const float* weights, float* out) {
  constexpr int AHEAD_BYTES = 2048;
  alignas(64) float laid[2 * SCOUT_MAX_HEAD_DIM];
  lay_out<R>(weights, laid, numbers);
  const int64_t row_bytes = (int64_t)numbers * R::bytes / PACKED;
  for (int64_t r0 = 0; r0 < rows; r0 += W) {
    vf sum[W];
#pragma GCC unroll 4
    for (int t = 0; t < W; t++) {
      const uint8_t* at = codes + (r0 + t < rows ? r0 + t : rows - 1) * row_bytes;
      vf a = vf{}, b = vf{};
      for (int d = 0; d < numbers; d += 2 * W, at += 2 * W * R::bytes / PACKED) {
        __builtin_prefetch(at + AHEAD_BYTES, 0, 2);
        vf x, y;
        R::pair(at, x, y);
        a += x * load<vf>(laid + d);
        b += y * load<vf>(laid + d + W);
      }
      sum[slot(t)] = a + b;
    }
    float lanes[W];
    store(lanes, sums(sum));
    __builtin_memcpy(out + r0, lanes, (rows - r0 < W ? rows - r0 : W) * sizeof(float));
  }
}

void score(const uint8_t* codes, int dtype, int64_t rows, int numbers, const float* weights, float* out) {
  switch (dtype) {
    case SCOUT_F32: return code_dots<F32>(codes, rows, numbers, weights, out);
    case SCOUT_F16: return code_dots<F16>(codes, rows, numbers, weights, out);
    case SCOUT_I8: return code_dots<I8>(codes, rows, numbers, weights, out);
    case SCOUT_I4: return code_dots<I4, 2>(codes, rows, numbers, weights, out);
    default: return code_dots<BF16>(codes, rows, numbers, weights, out);
  }
}

int64_t read(const uint8_t* from, int64_t bytes, const uint8_t* next) {
  vu sum[4] = {};
  constexpr int64_t STEP = 4 * sizeof(vu);
  int64_t at = 0;
  for (; at + STEP <= bytes; at += STEP) {
    if (next) prefetch_span(next + at, STEP);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i] += load<vu>(from + at + i * sizeof(vu));
  }
  int64_t all = 0;
  for (; at < bytes; at++) all += from[at];
  vu both = sum[0] + sum[1] + sum[2] + sum[3];
  for (int i = 0; i < W; i++) all += both[i];
  return all;
}

}  // namespace
