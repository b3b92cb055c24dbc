// Products of few rows of activations, in terms of the vectors of one instruction set. Included by
// avx512.cc, avx2.cc and neon.cc within their namespaces.
//
// A vector holds elements of one row of weights. Each lane sums some of them, and lanes are added at
// the very end. So weights are read once, as they are stored, 4-bit ones two to a byte.
//
// LoadBytes(p) and the like come from the including file; kOffset says how Dot expects weights.

// Activations that stay in the L2 cache while rows of weights pass by, in bytes.
constexpr int64_t kInputsInCache = 1 << 18;
// Rows of weights that stay in the L1 cache while blocks of activations pass by.
constexpr int64_t kColumns = 64;
// Converted scales that stay in the L1 cache.
constexpr int64_t kScalesInCache = 1 << 11;
// How many tiles ahead weights are prefetched, and how many bytes at least: the hardware alone has too
// few reads in flight to use the memory's bandwidth.
constexpr int64_t kAhead = 4, kLeastAhead = 1 << 13;
inline int64_t Ahead(const Weights& w) {
  return std::max(kAhead * kTileColumns * w.bytes(), kLeastAhead);
}

constexpr int64_t kBytes = sizeof(Bytes);

// float16 as float32, also where the processor takes subnormal floats for zero: those of float16 are
// integers times 2^-24. Masks, because loops with branches are not vectorized.
inline float FromFloat16(uint16_t x) {
  const int32_t magnitude = x & 0x7fff, exponent = magnitude < 0x7c00 ? 112 : 224;
  const uint32_t normal = (magnitude << 13) + (exponent << 23), small = BitsOf(magnitude * 0x1p-24f);
  const uint32_t is_small = -static_cast<uint32_t>(magnitude < 0x400);
  return FloatOf((small & is_small) | (normal & ~is_small) | (x & 0x8000u) << 16);
}

// Scales of some columns in float32: a piece of what is stored, or converted.
class Scales {
 public:
  Scales(const Weights& w, int64_t begin, int64_t end) : G_(w.G), begin_(begin) {
    if (w.scale_type == Weights::kFloat32) {
      values_ = w.scales(), begin_ = 0;
      return;
    }
    const auto* halves = static_cast<const uint16_t*>(w.scale) + begin * G_;
    const int64_t count = (end - begin) * G_;
    float* to = Scratch<float>(0, count);
    if (w.scale_type == Weights::kFloat16)
      for (int64_t i = 0; i < count; ++i) to[i] = FromFloat16(halves[i]);
    else
      for (int64_t i = 0; i < count; ++i) to[i] = FloatOf(uint32_t{halves[i]} << 16);
    values_ = to;
  }

  // Those of column n; the next columns follow.
  const float* operator()(int64_t n) const { return values_ + (n - begin_) * G_; }

  // How many columns have weights and converted scales that stay in the L1 cache.
  static int64_t ColumnsInCache(const Weights& w) {
    if (w.scale_type == Weights::kFloat32) return kColumns;
    const int64_t columns = kScalesInCache / w.G / kTileColumns * kTileColumns;
    return std::clamp<int64_t>(columns, kTileColumns, kColumns);
  }

 private:
  const float* values_;
  int64_t G_, begin_;
};

// Calls kernel.Tile<rows, columns>(m, n, scales) for some columns.
template <int R, typename Kernel>
inline void Columns(const Kernel& kernel, const Scales& scales, int64_t m, int64_t n, int64_t end) {
  for (; n + kTileColumns <= end; n += kTileColumns)
    kernel.template Tile<R, kTileColumns>(m, n, scales);
  for (; n < end; ++n) kernel.template Tile<R, 1>(m, n, scales);
}

// Runs a kernel over all columns, in blocks of rows that stay in the cache.
template <typename Kernel>
void ForTiles(ThreadPool& pool, int64_t M, const Weights& w, int64_t input_bytes,
              const Kernel& kernel) {
  int64_t rows = kInputsInCache / std::max<int64_t>(1, input_bytes) / kRows * kRows;
  rows = std::max<int64_t>(kRows, rows);
  int64_t least = std::max<int64_t>(16, (1 << 16) / std::max<int64_t>(1, w.K));
  Parallel(pool, w.N, least, kTileColumns, [&](int64_t first, int64_t last) {
    // The tiles prefetch all but the beginning.
    const int64_t bytes = std::min(kLeastAhead, w.at(last, 0) - w.at(first, 0));
    for (int64_t i = 0; i < bytes; i += 64) Prefetch(w.at(first, 0) + i);
    for (int64_t n = first, end; n < last; n = end) {
      end = std::min(n + Scales::ColumnsInCache(w), last);
      const Scales scales(w, n, end);
      for (int64_t m0 = 0; m0 < M; m0 += rows) {
        int64_t m1 = std::min(m0 + rows, M), m = m0;
        for (; m + kRows <= m1; m += kRows) Columns<kRows>(kernel, scales, m, n, end);
        if constexpr (kRows > 3) {
          if (m1 - m == 3) Columns<3>(kernel, scales, m, n, end);
          if (m1 - m == 2) Columns<2>(kernel, scales, m, n, end);
        }
        if (m1 - m == 1) Columns<1>(kernel, scales, m, n, end);
      }
    }
  });
}

#include "few_rows_int8.h"
#include "few_rows_groups.h"
#include "few_rows_floats.h"
