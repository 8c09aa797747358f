// From the masses of blocks to what they are ranked by, and the ranks into bins: a few passes over all candidates.
#include "logs.inl"

namespace {

inline float least_lane(vf v) {
  float all = v[0];
  for (int i = 1; i < W; i++) all = v[i] < all ? v[i] : all;
  return all;
}
inline float largest_lane(vf v) { return -least_lane(-v); }

// log2 of the masses, plus `reference`, with log2 linear between powers of two, matching the 2^x that makes the
// masses: exact if a single token dominates. Returns the largest mass; ignores NaN.
float logarithms(const float* mass, int count, float reference, float* scores) {
  const float rest = reference - 127;
  vf most = {};
  int i = 0;
  for (; i + W <= count; i += W) {
    const vf here = load<vf>(mass + i);
    most = here > most ? here : most;
    store(scores + i, __builtin_convertvector((vi)here, vf) * 0x1p-23f + rest);
  }
  float all = largest_lane(most);
  for (; i < count; i++) {
    all = mass[i] > all ? mass[i] : all;
    scores[i] = (float)load<int32_t>(mass + i) * 0x1p-23f + rest;
  }
  return all;
}

// log2 of a sum of numbers whose log2 these are.
inline float log2_of_sum(float a, float b) {
  const float top = a > b ? a : b, less = a > b ? b : a;
  return less > NEGATIVE_INFINITY ? top + log2_of(1.0f + exp2_of(splat(less - top)))[0] : top;
}

// Computed in logarithms, since a share may be too small for a float.
void shares(const scout_shares* s) {
  for (int h = 0; h < s->heads; h++) {
    const float* mass = s->masses + h * s->stride;
    vf most = splat(NEGATIVE_INFINITY), sum = {};
    for (int i = 0; i < s->count; i += W) {
      const vf here = load<vf>(mass + i);
      most = here > most ? here : most;
    }
    const float highest = largest_lane(most);
    for (int i = 0; i < s->count; i += W) sum += exp2_of(load<vf>(mass + i) - highest);
    float all = 0;
    for (int k = 0; k < W; k++) all += sum[k];
    s->totals[h] = highest + log2_of(splat(all))[0];
    if (s->recent) s->totals[h] = log2_of_sum(s->totals[h], s->recent[h]);
  }
  const float each = log2_of(splat((float)s->heads))[0];
  for (int i = 0; i < s->count; i += W) {
    vf most = load<vf>(s->masses + i) - s->totals[0], sum = {};
    for (int h = 1; h < s->heads; h++) {
      const vf share = load<vf>(s->masses + h * s->stride + i) - s->totals[h];
      most = share > most ? share : most;
    }
    for (int h = 0; h < s->heads; h++)
      sum += exp2_of(load<vf>(s->masses + h * s->stride + i) - s->totals[h] - most);
    store(s->out + i, s->heads == 1 ? most : most + log2_of(sum) - each);
  }
}

int into_bins(float* scores, int count, int32_t* places, int32_t* bins) {
  const vf none = splat(NEGATIVE_INFINITY), all = -none, huge = splat(3.0e38f);
  vf low = huge, high = -huge;
  vi real = {};
  for (int i = 0; i < count; i += W) {
    vf s = load<vf>(scores + i);
    s = s == s ? s : all;
    store(scores + i, s);
    real -= s > none;
    const vf above = s > none ? s : huge, below = s < all ? s : -huge;
    low = above < low ? above : low;
    high = below > high ? below : high;
  }
  const float least = least_lane(low), most = largest_lane(high);
  float step = most > least ? (SCOUT_BINS - 3) / (most - least) : 0.0f;
  if (!(step < -NEGATIVE_INFINITY)) step = 0.0f;  // scores almost equal: one bin for all
  for (int i = 0; i < count; i += W) {
    const vf s = load<vf>(scores + i);
    vf within = s < least ? splat(least) : s;
    within = within > most ? splat(most) : within;
    vi place = __builtin_convertvector((within - least) * step, vi) + 1;
    place = place < 1 ? vi{} + 1 : place;  // the range overflows a float
    place = s == none ? vi{} : place;
    place = s == all ? vi{} + (SCOUT_BINS - 1) : place;
    store(places + i, place);
  }
  for (int i = 0; i < count; i++) bins[places[i]]++;
  int valid = 0;
  for (int i = 0; i < W; i++) valid += real[i];
  return valid;
}

}  // namespace
