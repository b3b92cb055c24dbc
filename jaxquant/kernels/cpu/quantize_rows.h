// Scales and codes of rows, by the largest magnitude of each, vectorized by the compiler. Included by
// avx512.cc, avx2.cc and neon.cc within their namespaces.
//
// The results have the same bits as those of `quantize` under XLA, which multiplies by reciprocals and
// flushes subnormals to zero. T is float, or uint16_t for bfloat16.

// Elements that a thread quantizes at least: they take 20 microseconds, waking a thread up to 40.
constexpr int64_t kQuantizedAtOnce = 1 << 17;

using jaxquant::BitsOf;
inline uint32_t BitsOf(uint16_t x) { return static_cast<uint32_t>(x) << 16; }

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kLeastNormal = 0x00800000;

template <typename T>
NOINLINE float ScaleOf(const T* x, int64_t K, int64_t largest_code) {
  // Magnitudes are ordered like their bits, with NaN above infinity.
  uint32_t most = 0;
  for (int64_t k = 0; k < K; ++k) most = std::max(most, BitsOf(x[k]) & kMagnitude);
  if (most >= kInfinity) return FloatOf(kInfinity | 0x400000);
  const float scale = FloatOf(most) * (1 / static_cast<float>(largest_code));
  if (scale < FloatOf(kLeastNormal)) return 1;
  return std::min(scale, 1 / FloatOf(kLeastNormal));
}

template <typename T>
NOINLINE void CodesOf(const T* x, int64_t K, float inverse, float qmin, float qmax, int8_t* codes) {
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
  const float shift = 12582912.0f;
  for (int64_t k = 0; k < K; ++k) {
    uint32_t bits = BitsOf(x[k]);
    float value = FloatOf((bits & kMagnitude) < kLeastNormal ? 0 : bits) * inverse;
    value = value < qmin ? qmin : value;
    value = value > qmax ? qmax : value;
    codes[k] = static_cast<int8_t>(BitsOf(value + shift) - BitsOf(shift));
  }
}

template <typename T>
void QuantizeRows(ThreadPool& pool, const T* x, int64_t M, int64_t K, int64_t qmin,
                  int64_t qmax, int8_t* codes, float* scales) {
  const int64_t least = std::max<int64_t>(1, kQuantizedAtOnce / std::max<int64_t>(1, K));
  Parallel(pool, M, least, 1, [=](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const float scale = scales[m] = ScaleOf(x + m * K, K, std::min(-qmin, qmax));
      if (scale == scale) CodesOf(x + m * K, K, 1 / scale, qmin, qmax, codes + m * K);
      else std::memset(codes + m * K, 0, K);
    }
  });
}
