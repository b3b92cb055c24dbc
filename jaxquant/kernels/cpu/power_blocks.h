// Rows of codes of power codebooks, vectorized by the compiler. Included by avx512.cc, avx2.cc and
// neon.cc within their namespaces, after quantize_rows.h.
//
// Codes are those of `quantize` under XLA: the same arithmetic in float32, up to products that XLA
// fuses with additions. XLA's threads flush subnormals to zero.

// Bits of floats.
constexpr uint32_t kOne = 0x3f800000, kNaN = 0x7fc00000;

// A code's value is Raise(index / count), with the sign of the index if it has one.
template <int power>
inline float Raise(float x) {
  const float square = x * x;
  return power == 2 ? square : square * square;
}
// The same with the sign of x.
template <int power>
inline float RaiseSigned(float x) {
  const float square = x * FloatOf(BitsOf(x) & kMagnitude);
  return power == 2 ? square : x * x * square;
}

// x ** (1 / power) of x >= 0, within 1.5e-6 of it, and nearly 0 of 0; square roots take longer.
// A guess y of x ** (-1 / power) from the bits has an error e = 1 - x y ** power of at most 0.124, and
// the root is x y ** (power - 1) (1 - e) ** (1 / power - 1), the last factor as a polynomial: Chebyshev's
// interpolation for such e.
template <int power>
inline float Root(float x) {
  constexpr uint32_t kGuess = power == 2 ? 0x5f3749df : 0x4f581ae5;
  constexpr float kFirst = power == 2 ? 0.49999833f : 0.749960005f,
                  kSecond = power == 2 ? 0.37499845f : 0.656211674f,
                  kThird = power == 2 ? 0.31394073f : 0.611965597f,
                  kFourth = power == 2 ? 0.27475828f : 0.573935986f;
  // Of less, powers of y would be infinite.
  x = FloatOf(std::max(BitsOf(x), kLeastNormal));
  const float y = FloatOf(kGuess - (BitsOf(x) >> (power == 2 ? 1 : 2)));
  const float error = 1 - x * Raise<power>(y);
  const float factor = 1 + error * (kFirst + error * (kSecond + error * (kThird + error * kFourth)));
  return (power == 2 ? x * y : x * y * (y * y)) * factor;
}

// Uniform in [0, 1), by position: `uniform_noise` of core/noise.py.
inline float Noise(uint32_t position, uint32_t first, uint32_t second) {
  uint32_t bits = (position ^ first) * 0xED5AD4BBu;
  bits = (bits ^ bits >> 11) * 0xAC4C1B51u;
  bits = ((bits ^ bits >> 15) + second) * 0x31848BABu;
  return static_cast<float>(static_cast<int32_t>(bits >> 8)) * (1.0f / (1 << 24));
}

// Rounds each magnitude / scale to the entry below or above: at random, or to nearest. `kept` has no
// bits for elements that become zeros.
template <int power, bool has_negative, bool is_random>
NOINLINE void EncodeRow(const float* __restrict x, int64_t size, const float* __restrict inverse,
                        const uint32_t* __restrict kept, int32_t count, uint32_t position,
                        uint32_t first, uint32_t second, uint8_t* __restrict codes) {
  const float largest = Raise<power>(count);
  for (int64_t i = 0; i < size; ++i, ++position) {
    const uint32_t bits = BitsOf(x[i]) & kept[i];
    // Negative elements of unsigned formats are zeros. As integers, because GCC does not vectorize
    // branches on floats.
    const uint32_t magnitude =
        has_negative ? bits & kMagnitude : std::max(static_cast<int32_t>(bits), 0);
    // More than 1 only where the scale is limited; such elements get the last entry.
    const float ratio = FloatOf(magnitude) * inverse[i], value = ratio * largest;
    int32_t index = std::min(static_cast<int32_t>(Root<power>(value)), count - 1);
    const float at = index, below = Raise<power>(at), above = Raise<power>(at + 1);
    const float part = is_random ? Noise(position, first, second) : 0.5f;
    index += value - below > (above - below) * part;
    const int32_t sign = -static_cast<int32_t>(bits >> 31);
    // Of unsigned formats, positive elements never become zero.
    index = has_negative ? count + ((index ^ sign) - sign)
                         : std::max(index, static_cast<int32_t>(BitsOf(ratio) > 0));
    codes[i] = index;
  }
}

template <int power, bool has_negative>
NOINLINE void DecodeRow(const uint8_t* __restrict codes, int64_t size,
                        const float* __restrict scale, int32_t count, float* __restrict x) {
  const float step = 1 / static_cast<float>(count);
  for (int64_t i = 0; i < size; ++i) {
    const float value = (static_cast<int32_t>(codes[i]) - (has_negative ? count : 0)) * step;
    x[i] = (has_negative ? RaiseSigned<power>(value) : Raise<power>(value)) * scale[i];
  }
}

// Two codes to a byte, the low half first, from and to a byte each.
inline void PackNibbles(const uint8_t* __restrict codes, int64_t size, uint8_t* __restrict packed) {
  for (int64_t i = 0; i < size / 2; ++i) packed[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}
inline void UnpackNibbles(const uint8_t* __restrict packed, int64_t size,
                          uint8_t* __restrict codes) {
  for (int64_t i = 0; i < size / 2; ++i) {
    codes[2 * i] = packed[i] & 15;
    codes[2 * i + 1] = packed[i] >> 4;
  }
}

NOINLINE inline void MagnitudesOf(const float* __restrict x, int64_t size,
                                  uint32_t* __restrict most) {
  for (int64_t i = 0; i < size; ++i) most[i] = std::max(most[i], BitsOf(x[i]) & kMagnitude);
}

// The scales of blocks of `width` columns, from the largest magnitude of each column, which is lost; for
// each column, the reciprocal, and no bits if its block becomes zeros.
NOINLINE inline void ScalesOf(uint32_t* __restrict most, int64_t size, int64_t width,
                              float* __restrict scales, float* __restrict inverse,
                              uint32_t* __restrict kept) {
  for (int64_t begin = 0; width > 1 && begin < size; begin += width) {
    uint32_t peak = 0;
    for (int64_t i = begin; i < begin + width; ++i) peak = std::max(peak, most[i]);
    std::fill_n(most + begin, width, peak);
  }
  const uint32_t largest = BitsOf(1 / FloatOf(kLeastNormal));
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t peak = most[i], scale = peak < kLeastNormal ? kOne : std::min(peak, largest);
    const bool is_finite = peak < kInfinity;
    inverse[i] = 1 / FloatOf(scale);
    kept[i] = is_finite ? ~0u : 0u;
    most[i] = is_finite ? scale : kNaN;
  }
  for (int64_t i = 0; i < size / width; ++i) scales[i] = FloatOf(most[i * width]);
}

// The scale of each column.
NOINLINE inline void FillScales(const float* __restrict scales, int64_t size, int64_t width,
                                float* __restrict filled) {
  const auto value = [&](int64_t i) {
    const uint32_t bits = BitsOf(scales[i]);
    return FloatOf((bits & kMagnitude) == kInfinity ? kNaN : bits);
  };
  if (width > 1)
    for (int64_t i = 0; i < size / width; ++i) std::fill_n(filled + i * width, width, value(i));
  else
    for (int64_t i = 0; i < size; ++i) filled[i] = value(i);
}

// The functions of a codebook.
using Encode = decltype(&EncodeRow<2, false, false>);
using Decode = decltype(&DecodeRow<2, false>);

inline Encode EncoderOf(const Codebook& book, bool is_random) {
  static constexpr Encode kAll[2][2][2] = {
      {{EncodeRow<2, false, false>, EncodeRow<2, false, true>},
       {EncodeRow<2, true, false>, EncodeRow<2, true, true>}},
      {{EncodeRow<4, false, false>, EncodeRow<4, false, true>},
       {EncodeRow<4, true, false>, EncodeRow<4, true, true>}}};
  return kAll[book.power == 4][book.has_negative][is_random];
}

inline Decode DecoderOf(const Codebook& book) {
  static constexpr Decode kAll[2][2] = {{DecodeRow<2, false>, DecodeRow<2, true>},
                                        {DecodeRow<4, false>, DecodeRow<4, true>}};
  return kAll[book.power == 4][book.has_negative];
}
