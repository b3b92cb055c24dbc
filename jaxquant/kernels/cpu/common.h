// What the kernels of all instruction sets share: operands, results, scratch memory, and the table
// of kernels that each instruction set exports.
//
// Activations are rows (M, K) and weights rows (N, K): the contracted axis is last in both.
//
// avx512.cc, avx2.cc and neon.cc each define vectors of one instruction set and include few_rows.h,
// quantize_rows.h, power_blocks.h and update_blocks.h, written in terms of these vectors or of loops
// that the compiler vectorizes for the set; avx512.cc also includes panels_avx512.h and, where the
// compiler knows AMX, panels_amx.h; avx2.cc includes panels_avx2.h.
// handlers.cc calls the kernels from XLA's FFI; parallel.cc runs them on XLA's threads.

#ifndef JAXQUANT_KERNELS_CPU_COMMON_H_
#define JAXQUANT_KERNELS_CPU_COMMON_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define JAXQUANT_X86 1
#elif defined(__aarch64__) && defined(__GNUC__)
#define JAXQUANT_ARM 1
#endif

// A loop over registers. GCC keeps arrays of vectors in memory unless such loops are unrolled first.
#define UNROLLED(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; ++i)
// Keeps a function out of line, so that its registers are allocated regardless of its callers.
#define NOINLINE __attribute__((noinline))
// The functions in between are compiled for an instruction set. Standard headers are included
// before: their functions are shared with code that runs on any processor.
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(set) \
  PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(set) _Pragma("GCC push_options") PRAGMA(GCC target(set))
#define END_TARGET _Pragma("GCC pop_options")
#endif

namespace xla::ffi {
class ThreadPool;
}

namespace jaxquant {

using xla::ffi::ThreadPool;

// Runs work(begin, end) on pieces of [0, count) on the threads of the pool and on this one, and
// returns when all of them are done. A piece has at least `least` elements, a multiple of `multiple`.
void Parallel(ThreadPool& pool, int64_t count, int64_t least, int64_t multiple,
              std::function<void(int64_t, int64_t)> work);
// Threads of the pool.
int64_t Threads(ThreadPool& pool);

// Prefetches weights into the L2 cache.
inline void Prefetch(const void* weights) { __builtin_prefetch(weights, 0, 2); }

// Weights (N, K) as they are stored, 4-bit ones with the low nibble first. Scales and zero points
// are (N, G), for groups of K / G elements of a row. A null scale means 1, a null zero point 0.
struct Weights {
  enum ScaleType { kFloat32, kFloat16, kBFloat16 };
  const uint8_t* codes;
  int64_t N, K;
  int bits;
  const void* scale = nullptr;
  const float* zero = nullptr;
  int64_t G = 1;
  ScaleType scale_type = kFloat32;  // the others only for products of few rows

  int64_t group() const { return std::max<int64_t>(1, K / G); }
  const uint8_t* at(int64_t n, int64_t k) const { return codes + (n * K + k) * bits / 8; }
  int64_t bytes() const { return std::max<int64_t>(1, K * bits / 8); }
  const float* scales() const { return static_cast<const float*>(scale); }
};

// Queries of T tokens for each of B sequences, of G heads for each of H key heads, and S positions of
// keys and values (B, H, S, D) as they are stored: 4-bit codes two to a byte, the low nibble first, or
// any bytes that a table has values for. Token t of sequence b sees the positions to starts[b] + t.
// Scales are (B, H, S), of the scores and of the weights of the values; null means 1.
struct Attention {
  enum Type { kFloat32, kBFloat16, kInt8, kInt4, kBytes };
  const float* query;  // (B, T, H * G, D)
  const void *keys, *values;
  Type type;
  const float* table;  // 256 values
  const float *key_scale, *value_scale;
  const int32_t* starts;
  float* out;  // (B, T, H * G, D)
  int64_t B, T, H, G, S, D;

  // Of one position of a head.
  int64_t bytes() const {
    return type == kFloat32 ? 4 * D : type == kBFloat16 ? 2 * D : type == kInt4 ? (D + 1) / 2 : D;
  }
};

// Blocks of an array, of `width` elements along the last axis, which has `columns`.
struct Blocks {
  // Numbers of elements and of blocks from the start.
  struct Place {
    int64_t element, block;
  };
  // An axis before the last one: number of blocks, and from one to the next.
  struct Axis {
    int64_t count;
    Place step;
  };
  int64_t columns, width;
  std::vector<int64_t> rows;  // of a block: elements from its first one
  std::vector<Axis> axes;

  int64_t outer() const {
    int64_t product = 1;
    for (const Axis& axis : axes) product *= axis.count;
    return product;
  }
  // The block of index i along the axes before the last one.
  Place At(int64_t i) const {
    Place place{0, 0};
    for (size_t a = axes.size(); a-- > 0; i /= axes[a].count) {
      const int64_t n = i % axes[a].count;
      place.element += n * axes[a].step.element, place.block += n * axes[a].step.block;
    }
    return place;
  }
};

// Codes of powers of 2 or 4: `count` entries on each side of zero, or above it.
struct Codebook {
  int64_t power, bits, count;
  bool has_negative;
};

// Elementwise steps from arrays of one shape to others. Those of codes are decoded before and encoded
// after, with a scale per block.
struct Update {
  struct Array {
    enum Type { kFloat32, kBFloat16, kCodes };
    Type type;
    void* data;
    float* scales;
    Codebook book;
    uint32_t words[2];  // of the noise of codes

    template <typename T>
    T* as() const {
      return static_cast<T*>(data);
    }
  };
  // Rows are in slots: of the inputs, then of the outputs, then of what is computed in between.
  struct Step {
    // In the order of OPERATIONS in updates.py.
    enum Operation {
      kCopy, kNegate, kMagnitude, kRoot, kSign, kRoundToBFloat16, kAdd, kSubtract, kMultiply, kDivide,
      kMaximum, kMinimum, kEqual, kLess, kLessOrEqual, kSelect, kCombine
    };
    struct Operand {
      int64_t slot;  // of a row; negative for a scalar
      const float* scalar;
    };
    Operation operation;
    int64_t out;
    Operand operands[4];
  };
  std::vector<Array> inputs, outputs;
  std::vector<Step> steps;
  int64_t slots;
  bool is_random;  // whether codes are rounded stochastically
  Blocks blocks;
};

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The bits of a float as bfloat16, rounded to nearest, ties to even; NaN stays NaN.
inline uint16_t ToBFloat16(float x) {
  const uint32_t bits = BitsOf(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Where sums are stored: int32 unscaled, or floats multiplied by the scale of their row, then by
// that of their column. A null scale means 1.
struct Result {
  enum Type { kInt32, kFloat32, kBFloat16 };
  void* out;  // (M, N)
  int64_t N;
  Type type;
  const float *row = nullptr, *column = nullptr;

  void Put(int64_t m, int64_t n, float sum) const {
    if (row) sum *= row[m];
    if (column) sum *= column[n];
    if (type == kFloat32) static_cast<float*>(out)[m * N + n] = sum;
    else static_cast<uint16_t*>(out)[m * N + n] = ToBFloat16(sum);
  }
  void Put(int64_t m, int64_t n, int32_t sum) const {
    if (type == kInt32) static_cast<int32_t*>(out)[m * N + n] = sum;
    else Put(m, n, static_cast<float>(sum));
  }
};

// The first bytes of p, then zeros, for a vector of `size` bytes.
template <size_t size>
struct Padded {
  alignas(64) uint8_t bytes[size] = {};
  Padded() = default;
  Padded(const void* p, int64_t count) { std::memcpy(bytes, p, count); }
};

// Reorders activations as nibbles lie in memory: in each block the even elements, then the odd ones.
// Rows of K elements become rows of `stride`, with zeros at their ends.
template <typename T>
std::vector<T> EvensThenOdds(const T* x, int64_t M, int64_t K, int64_t block, int64_t stride) {
  std::vector<T> arranged(M * stride);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t b = 0; b < K; b += block) {
      const T* from = x + m * K + b;
      T* to = arranged.data() + m * stride + b;
      const int64_t size = std::min(block, K - b);
      for (int64_t i = 0; i < size / 2; ++i) {
        to[i] = from[2 * i];
        to[block / 2 + i] = from[2 * i + 1];
      }
    }
  return arranged;
}

// Rows of K codes as rows of `stride`, with zeros at their ends.
inline std::vector<int8_t> WithStride(const int8_t* x, int64_t M, int64_t K, int64_t stride) {
  std::vector<int8_t> wide(M * stride);
  for (int64_t m = 0; m < M; ++m) std::copy_n(x + m * K, K, wide.data() + m * stride);
  return wide;
}

// The exact sum of codes. There is none for floats: the compiler must keep their order of addition.
inline int32_t SumOf(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// Sums of `width` codes each.
template <typename Sum>
std::vector<Sum> SumsOf(const int8_t* x, int64_t count, int64_t width) {
  std::vector<Sum> sums(count);
  for (int64_t i = 0; i < count; ++i) sums[i] = SumOf(x + i * width, width);
  return sums;
}

// Scratch memory on cache lines, which a thread keeps for its next piece of work.
struct alignas(64) CacheLine {
  uint8_t bytes[64];
};
template <typename T>
T* Scratch(int which, int64_t count) {
  static thread_local std::vector<CacheLine> kept[4];
  kept[which].resize(std::max<size_t>(kept[which].size(), (count * sizeof(T) + 63) / 64));
  return reinterpret_cast<T*>(kept[which].data());
}

// The kernels of one instruction set. Products write to `out`: (M, N).
struct Kernels {
  bool (*is_supported)();  // by this processor

  // Codes (M, K) and scales (M,) of rows, each by its largest magnitude.
  void (*quantize_float32)(ThreadPool&, const float* x, int64_t M, int64_t K, int64_t qmin,
                           int64_t qmax, int8_t* codes, float* scales);
  void (*quantize_bfloat16)(ThreadPool&, const uint16_t* x, int64_t M, int64_t K, int64_t qmin,
                            int64_t qmax, int8_t* codes, float* scales);
  // 8-bit codes by 8-bit codes, and by 4-bit or 8-bit codes in groups.
  void (*dot_int8)(ThreadPool&, const int8_t* x, int64_t M, const Weights&, const Result& out);
  void (*dot_groups)(ThreadPool&, const int8_t* x, int64_t M, const Weights&, const Result& out);
  // Floats by 4-bit codes in groups, each looked up in a table of 16 values.
  void (*dot_lookup)(ThreadPool&, const float* x, int64_t M, const Weights&, const float* table,
                     float* out);
  // Floats by 8-bit codes, perhaps in groups.
  void (*dot_widen)(ThreadPool&, const float* x, int64_t M, const Weights&, float* out);
  // Softmax of scaled products with keys, times values.
  void (*attend)(ThreadPool&, const Attention&);
  // All of an `Update`.
  void (*update_blocks)(ThreadPool&, const Update&);
  // bfloat16 by codes as above, rounded to bfloat16, summed in float32. Not in all sets; K is not 0.
  void (*dot_lookup_bfloat16)(ThreadPool&, const uint16_t* x, int64_t M, const Weights&,
                              const float* table, float* out) = nullptr;
  void (*dot_widen_bfloat16)(ThreadPool&, const uint16_t* x, int64_t M, const Weights&,
                             float* out) = nullptr;
};

extern const Kernels kAmx, kAvx512, kAvx2, kNeon;

}  // namespace jaxquant

#endif  // JAXQUANT_KERNELS_CPU_COMMON_H_
