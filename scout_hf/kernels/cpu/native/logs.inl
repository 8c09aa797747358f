// 2^x and log2 of vectors of floats, for any type vf of such vectors and vi of as many integers.
namespace {

// 2^x for x <= 0, to 1e-5; 0 below -126, and for NaN.
inline vf exp2_of(vf x) {
  const vf least = vf{} - 126.0f;
  const vi within = x > least;
  x = within ? x : least;
  const vi whole = __builtin_convertvector(x, vi);  // towards 0: the rest is in (-1, 0]
  const vf rest = x - __builtin_convertvector(whole, vf);
  const vf fraction = 1.0f + rest * (0.6930757f + rest * (0.239547f + rest * (0.0534019f + rest * 0.0069349f)));
  const vf scale = (vf)((whole + 127) << 23);
  return within ? fraction * scale : vf{};
}

// log2 of x >= 0, to 1e-5; finite for 0.
inline vf log2_of(vf x) {
  const vi bits = (vi)x, exponent = (bits >> 23) - 127;
  const vf m = (vf)((bits & 0x7fffff) | 0x3f800000) - 1.0f;
  const vf low = 1.4425348f + m * (-0.7180336f + m * 0.4571581f);
  const vf high = -0.2773416f + m * (0.121473f - m * 0.0257924f);
  return __builtin_convertvector(exponent, vf) + m * (low + m * m * m * high);
}

}  // namespace
