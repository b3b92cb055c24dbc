// Codes of power codebooks in blocks, vectorized by the compiler. Included by avx512.cc, avx2.cc and
// neon.cc within their namespaces, after quantize_rows.h.
//
// Codes are those of `quantize` under XLA: the same arithmetic in float32, up to products that XLA
// fuses with additions. XLA's threads flush subnormals to zero.

// Elements that a thread encodes or decodes at least.
constexpr int64_t kPowersAtOnce = 1 << 15;
// Bits of floats.
constexpr uint32_t kOne = 0x3f800000, kNaN = 0x7fc00000;
// Elements of a row that are encoded at a time, so that the block stays in the L2 cache.
constexpr int64_t kStretch = 256, kStretchMultiple = 16;

// A code's value is power(index / count), with the sign of the index if it has one.
template <int power>
inline float Raise(float x) {
  const float square = x * x;
  return power == 2 ? square : square * square;
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
  const float entries = count, step = 1 / entries;
  for (int64_t i = 0; i < size; ++i, ++position) {
    const uint32_t bits = BitsOf(x[i]) & kept[i];
    // Negative elements of unsigned formats are zeros. As integers, because GCC does not vectorize
    // branches on floats.
    const uint32_t magnitude =
        has_negative ? bits & kMagnitude : std::max(static_cast<int32_t>(bits), 0);
    const uint32_t ratio = BitsOf(FloatOf(magnitude) * inverse[i]);
    const float value = FloatOf(std::min(ratio, kOne));
    const float root = power == 2 ? std::sqrt(value) : std::sqrt(std::sqrt(value));
    int32_t index = static_cast<int32_t>(root * entries);
    index = std::min(index, count - 1);
    const float below = Raise<power>(index * step), above = Raise<power>((index + 1) * step);
    const float part = is_random ? Noise(position, first, second) : 0.5f;
    index += value - below > (above - below) * part;
    const int32_t sign = -static_cast<int32_t>(bits >> 31);
    // Of unsigned formats, positive elements never become zero.
    index = has_negative ? count + ((index ^ sign) - sign)
                         : std::max(index, static_cast<int32_t>(ratio > 0));
    codes[i] = index;
  }
}

template <int power, bool has_negative>
NOINLINE void DecodeRow(const uint8_t* __restrict codes, int64_t size,
                        const float* __restrict scale, int32_t count, float* __restrict x) {
  const float step = 1 / static_cast<float>(count);
  for (int64_t i = 0; i < size; ++i) {
    const float value = (static_cast<int32_t>(codes[i]) - (has_negative ? count : 0)) * step;
    const float raised = Raise<power>(value);
    x[i] = (has_negative && value < 0 ? -raised : raised) * scale[i];
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

inline void MagnitudesOf(const float* __restrict x, int64_t size, uint32_t* __restrict most) {
  for (int64_t i = 0; i < size; ++i) most[i] = std::max(most[i], BitsOf(x[i]) & kMagnitude);
}

template <int power, bool has_negative, bool is_random>
void EncodeTile(const PowerBlocks& b, const PowerBlocks::Place& place, const float* x, int64_t size,
                uint8_t* codes, float* scales) {
  uint32_t* most = Scratch<uint32_t>(0, 2 * size);
  uint32_t* kept = most + size;
  float* inverse = Scratch<float>(1, size);
  uint8_t* bytes = Scratch<uint8_t>(2, size);
  std::fill_n(most, size, 0);
  for (const auto& row : b.rows) MagnitudesOf(x + place.values + row.values, size, most);
  for (int64_t begin = 0; begin < size; begin += b.width) {
    uint32_t peak = 0;
    for (int64_t i = begin; i < begin + b.width; ++i) peak = std::max(peak, most[i]);
    const bool is_finite = peak < kInfinity;
    const bool is_normal = is_finite && peak >= kLeastNormal;
    const float scale = is_normal ? std::min(FloatOf(peak), 1 / FloatOf(kLeastNormal)) : 1;
    scales[place.scale + begin / b.width] = is_finite ? scale : FloatOf(kNaN);
    std::fill_n(inverse + begin, b.width, 1 / scale);
    std::fill_n(kept + begin, b.width, is_finite ? ~0u : 0u);
  }
  for (const auto& row : b.rows) {
    const int64_t at = place.codes + row.codes;
    uint8_t* to = b.bits == 8 ? codes + at : bytes;
    EncodeRow<power, has_negative, is_random>(x + place.values + row.values, size, inverse, kept,
                                              b.count, at, b.first, b.second, to);
    if (b.bits == 4) PackNibbles(bytes, size, codes + at / 2);
  }
}

template <int power, bool has_negative>
void DecodeTile(const PowerBlocks& b, const PowerBlocks::Place& place, const uint8_t* codes,
                const float* scales, int64_t size, float* x) {
  float* scale = Scratch<float>(1, size);
  uint8_t* bytes = Scratch<uint8_t>(2, size);
  for (int64_t i = 0; i < size; i += b.width) {
    const float value = scales[place.scale + i / b.width];
    std::fill_n(scale + i, b.width, std::isinf(value) ? FloatOf(kNaN) : value);
  }
  for (const auto& row : b.rows) {
    const int64_t at = place.codes + row.codes;
    if (b.bits == 4) UnpackNibbles(codes + at / 2, size, bytes);
    DecodeRow<power, has_negative>(b.bits == 8 ? codes + at : bytes, size, scale, b.count,
                                   x + place.values + row.values);
  }
}

// Calls work(place, columns) for tiles of whole blocks.
template <typename Work>
void ForTiles(ThreadPool& pool, const PowerBlocks& b, Work work) {
  // Whole blocks, pairs of nibbles and vectors, and tiles of about equal sizes.
  const int64_t multiple = std::lcm<int64_t>(b.width, kStretchMultiple);
  const int64_t count = (b.columns + kStretch - 1) / kStretch, share = (b.columns + count - 1) / count;
  const int64_t tile = std::min((share + multiple - 1) / multiple * multiple, b.columns);
  const int64_t tiles = (b.columns + tile - 1) / tile;
  const int64_t size = tile * static_cast<int64_t>(b.rows.size());
  const int64_t least = std::max<int64_t>(1, kPowersAtOnce / size);
  Parallel(pool, b.outer() * tiles, least, 1, [=, &b](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = i % tiles * tile;
      PowerBlocks::Place place = b.At(i / tiles);
      place.codes += column, place.values += column, place.scale += column / b.width;
      work(place, std::min(tile, b.columns - column));
    }
  });
}

template <int power, bool has_negative, bool is_random>
void EncodeBlocks(ThreadPool& pool, const PowerBlocks& b, const float* x, uint8_t* codes,
                  float* scales) {
  ForTiles(pool, b, [=, &b](const PowerBlocks::Place& place, int64_t size) {
    EncodeTile<power, has_negative, is_random>(b, place, x, size, codes, scales);
  });
}

template <int power, bool has_negative>
void DecodeBlocks(ThreadPool& pool, const PowerBlocks& b, const uint8_t* codes,
                  const float* scales, float* x) {
  ForTiles(pool, b, [=, &b](const PowerBlocks::Place& place, int64_t size) {
    DecodeTile<power, has_negative>(b, place, codes, scales, size, x);
  });
}

// The same, with the properties of the codebook as template arguments.
void EncodePowers(ThreadPool& pool, const PowerBlocks& b, const float* x, uint8_t* codes,
                  float* scales) {
  static constexpr decltype(&EncodeBlocks<2, false, false>) kAll[2][2][2] = {
      {{EncodeBlocks<2, false, false>, EncodeBlocks<2, false, true>},
       {EncodeBlocks<2, true, false>, EncodeBlocks<2, true, true>}},
      {{EncodeBlocks<4, false, false>, EncodeBlocks<4, false, true>},
       {EncodeBlocks<4, true, false>, EncodeBlocks<4, true, true>}}};
  kAll[b.power == 4][b.has_negative][b.is_random](pool, b, x, codes, scales);
}

void DecodePowers(ThreadPool& pool, const PowerBlocks& b, const uint8_t* codes,
                  const float* scales, float* x) {
  static constexpr decltype(&DecodeBlocks<2, false>) kAll[2][2] = {
      {DecodeBlocks<2, false>, DecodeBlocks<2, true>},
      {DecodeBlocks<4, false>, DecodeBlocks<4, true>}};
  kAll[b.power == 4][b.has_negative](pool, b, codes, scales, x);
}
